"""What the machine has, and what a configuration's `auto` means on it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from maskdm.config import Hardware
from maskdm.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Machine:
    """The device that training will use, with what a choice of model size and budget needs to know of it."""

    device: torch.device
    name: str
    cores: int
    precision: Precision
    flops: float
    """A cautious guess at the arithmetic per second that training reaches; the same on every machine of a kind."""


def this_machine(hardware: Hardware) -> Machine:
    """The machine as `hardware` would use it. Raises UserError for a device that is not there."""
    kind = hardware.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device is cuda, but torch sees no GPU here; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("hardware.device is mps, but torch sees none here; use --device cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    precision = hardware.precision if hardware.precision != "auto" else "bf16" if multiplies_bf16(kind) else "fp32"
    if precision == "fp16" and kind == "cpu":
        raise UserError("hardware.precision is fp16, which a CPU is slow at; use bf16 or fp32")
    name = torch.cuda.get_device_name() if kind == "cuda" else _cpu_name()
    flops = 1e14 if kind == "cuda" else 2e12 if kind == "mps" else 4e10 * cores
    return Machine(torch.device(kind), name, cores, precision, flops)


@functools.cache
def multiplies_bf16(kind: str) -> bool:
    """Whether a kind of device multiplies in bf16; those that only emulate it take up to 70 times as long (docs/experiments.md)."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a CPU's tensors leave, where it would give it back and fault every page in again at the next step.

    6 to 12 % of a step (docs/performance.md). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end up to which none is given back


def give_back_freed_memory() -> None:
    """Give glibc's free memory back to the system, where it was kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a GPU by torch's own error, on a CPU and on Apple's GPUs known by its words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error) or "MPS backend out of memory" in str(error)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def matrix_ceiling(device: torch.device, precision: Precision) -> float:
    """FLOP/s of square matrix products in a precision, measured: what the share of the machine's ceiling (MFU) is taken of."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    emulated = precision == "bf16" and not multiplies_bf16(device.type)  # 2 s a product of 1 024 on a CPU
    size, products = (256 if emulated else 1024, 1) if device.type == "cpu" else (8192, 8)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )  # zeros or ones would let a GPU clock higher
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        synchronize(device)
        best = min(best, (time.perf_counter() - started) / products)
    return 2.0 * size**3 / best


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Half-precision arithmetic around fp32 weights, where asked for."""
    match precision:
        case "fp32":
            return contextlib.nullcontext()
        case "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        case "fp16":
            return torch.autocast(device.type, torch.float16)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def environment(machine: Machine, threads: int) -> dict[str, str | int]:
    """What a figure depends on, for the record."""
    import diffusers

    return {
        "device": str(machine.device),
        "cpu": _cpu_name() if machine.device.type == "cpu" else machine.name,
        "threads": threads,
        "precision": machine.precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "platform": platform.platform(),
    }


def compiled(model: torch.nn.Module) -> Any:
    """The network compiled, for each mask and number of images anew.

    At torch's limit of 8 such forms whatever comes after is left as it is, and nothing but a line in the log says so.
    """
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore[reportPrivateUsage]
    return torch.compile(model, dynamic=False)
