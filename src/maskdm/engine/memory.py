"""Memory of the device that trains: its peak, and what is free."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(device: torch.device) -> int:
    """Bytes at most since `reset_peak_memory`: allocated on a GPU; resident in this process on a CPU (mapped files included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak. Where a CPU's system cannot (all but Linux), the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def available_memory(device: torch.device) -> int:
    """Bytes that this process could still take, what it has now included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    here = psutil.Process().memory_info().rss
    return min(psutil.virtual_memory().available + here, _left_in_container() + here)


def _left_in_container() -> int:
    """What the control group leaves (cgroup v2); more than any machine has where there is no limit."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    return 1 << 62


def more_pieces(batch: int, pieces: int) -> int:
    """Where memory ran out for a batch in so many pieces: at least twice as many, of equal size."""
    return next(count for count in range(2 * pieces, batch + 1) if batch % count == 0) if 2 * pieces <= batch else batch
