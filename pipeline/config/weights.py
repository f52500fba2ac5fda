"""Options of weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config.base import Config


class WeightsConfig(Config):
    """List, fetch or verify pretrained weights."""

    positional: ClassVar[tuple[str, ...]] = ("action", "names")
    action: Literal["list", "pull", "verify"] = Field(description="list, pull or verify")
    names: tuple[str, ...] = Field((), description="names of the list (none: all; pull needs one)")
    offline: bool = Field(False, description="never download")
