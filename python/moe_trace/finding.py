"""One line of what `moe-native doctor` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """How it stands, what was found, and what to do about it (empty for nothing). `lossy` is what a trace lacks,
    `problem` what keeps something from being recorded.
    """

    status: Literal["ok", "warning", "lossy", "problem"]
    what: str
    todo: str = ""
