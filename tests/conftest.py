"""What several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("pipeline", deadline=None)  # a busy machine is not a failure
settings.load_profile("pipeline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The detector's trainings come first.

    Some are compared bit by bit with one in a process of its own, which those that Ultralytics'
    own trainer has had in a process before do not survive; and they take the longest.
    """
    items.sort(key=lambda item: not item.path.name.startswith("test_finetune_yolo"))


@pytest.fixture(scope="session")
def mvtec_root() -> Path:
    """The folder that holds the real `transistor/`; tests that need it are skipped without it.

    Where PIPELINE_REQUIRE_MVTEC is set they fail instead.
    """
    root = Path(os.environ.get("PIPELINE_MVTEC_ROOT") or "nowhere")
    if not (root / "transistor").is_dir():
        give_up = pytest.fail if os.environ.get("PIPELINE_REQUIRE_MVTEC") else pytest.skip
        give_up(f"PIPELINE_MVTEC_ROOT: expected a folder with transistor/, found {root}")
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread: the same bits every time, and tests share the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sam(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sam-lite checkpoint with random weights."""
    import torch

    from pipeline.models import sam as sams
    from pipeline.models import sam_lite

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam") / "sam.safetensors"
    sams.save_sam(path, sams.LoadedSam(sam_lite.build_sam_lite(), "sam-lite", 1.5))
    return str(path)
