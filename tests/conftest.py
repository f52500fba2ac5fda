"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("pipeline", deadline=None)  # a busy machine is not a failure
settings.load_profile("pipeline")


@pytest.fixture(scope="session")
def mvtec_root() -> Path:
    """The folder that holds the real `transistor/`; tests that need it are skipped without it."""
    root = os.environ.get("PIPELINE_MVTEC_ROOT")
    if not root:
        pytest.skip("PIPELINE_MVTEC_ROOT is not set")
    return Path(root)
