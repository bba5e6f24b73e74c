"""How long a command takes to answer: `python -m benchmarks.startup [--out FILE.json]`.

`maskdm --help`, and `maskdm train digits` from the command to the end of its first step, with nothing prepared
and with the data prepared before. Medians of new processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import results_directory, write_rows
from maskdm.config import Hardware
from maskdm.engine import environment, this_machine


def help_seconds() -> float:
    """`maskdm --help`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "maskdm", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_step_seconds(cache: Path) -> float:
    """`maskdm train digits`, until its log holds the first step."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "maskdm", "train", "digits", "--recipe", "digits", "--out", str(log.parent)]
        started = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"MASKDM_CACHE": str(cache)})
        while process.poll() is None and not (log.is_file() and '"train"' in log.read_text()):
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        if process.poll() is not None:
            raise SystemExit(f"maskdm train ended with {process.returncode} before its first step")
        process.kill()
        process.wait()
        return seconds


def main() -> None:
    """Time the commands and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = this_machine(Hardware())
    rows: list[dict[str, object]] = []

    def measure(name: str, run: Callable[[], float]) -> None:
        seconds = [run() for _ in range(options.repeats)]
        rows.append({"command": name, "seconds": statistics.median(seconds), "all": seconds})
        print(f"{name:45} {statistics.median(seconds):6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})", flush=True)

    def cold() -> float:
        with tempfile.TemporaryDirectory() as empty:
            return first_step_seconds(Path(empty))

    measure("maskdm --help", help_seconds)
    measure("maskdm train digits, first step, cold", cold)
    with tempfile.TemporaryDirectory() as cache:
        first_step_seconds(Path(cache))
        measure("maskdm train digits, first step, data prepared", lambda: first_step_seconds(Path(cache)))
    head = {"environment": environment(machine, torch.get_num_threads())}
    write_rows(options.out or results_directory(machine.device) / "startup.json", head, rows)
    print(json.dumps(head | {"rows": rows}))


if __name__ == "__main__":
    main()
