"""The peak memory of a process: its device's, or what it held resident."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Most bytes that this process has held resident.

    On Linux from /proc: `ru_maxrss` outlives exec, so that a process started by a large one reports its parent's peak.
    """
    if STATUS.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text("utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def of(device: torch.device) -> int:
    """Peak bytes: the accelerator's own, else the process's resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resident()
