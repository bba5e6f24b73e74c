"""Give maskdm damaged files and configurations: `python -m tests.fuzz [--files 1000] [--configurations 500] [--only KIND ...]`.

Each is to be taken, or refused by name in one line. A process a kind, whose address space is bounded; one that crashes, or is longer at
one than SECONDS, is begun again behind it. Prints a line a kind, what went wrong with its number (`--case KIND NUMBER` repeats one), and
last one JSON line. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.configurations import attempt_configuration
from tests.fuzz.files import FORMATS, Outcome, attempt

SECONDS, GIGABYTES = 20, 8
SETTINGS = ("yaml", "line")


def one(kind: str, number: int) -> Outcome:
    """The case of this kind and number."""
    return attempt_configuration(kind, number) if kind in SETTINGS else attempt(kind, number)


def work(kind: str, first: int, count: int, record: Path) -> None:
    """Cases from `first` on, each a line of `record`: its number before, and its outcome after."""
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    signal.signal(signal.SIGALRM, _late)
    warnings.simplefilter("ignore")
    with record.open("a", buffering=1) as file:
        for number in range(first, count):
            file.write(json.dumps({"begun": number}) + "\n")
            signal.alarm(SECONDS)
            started = time.perf_counter()
            try:
                taken, reason = one(kind, number)
                line: dict[str, Any] = {"taken": taken, "reason": reason[:200]}
            except BaseException:
                line = {"failed": traceback.format_exc()[-2000:]}
            signal.alarm(0)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            file.write(json.dumps({"number": number, "seconds": time.perf_counter() - started, "peak": peak, **line}) + "\n")


def _late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def run(kind: str, count: int) -> dict[str, Any]:
    """All cases of a kind, in processes of their own."""
    failed: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        record, first = Path(folder) / "record", 0
        while first < count:
            command = [sys.executable, "-m", "tests.fuzz", "--work", kind, str(first), str(count), str(record)]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
            error = _watch(child, record)
            lines = [json.loads(line) for line in record.read_text().splitlines()]
            begun = max((line["begun"] for line in lines if "begun" in line), default=first)
            if not any(line.get("number") == begun for line in lines):
                failed[begun] = f"the process ended with {child.returncode}: {error[-500:]}"
            first = begun + 1
    done = [line for line in lines if "number" in line]
    failed |= {line["number"]: line["failed"] for line in done if "failed" in line}
    return {
        "kind": kind,
        "cases": count,
        "taken": sum(line.get("taken", False) for line in done),
        "refused": sum(not line.get("taken", True) for line in done),
        "failed": failed,
        "slowest": max((line["seconds"] for line in done), default=0.0),
        "peak": max((line["peak"] for line in done), default=0),
    }


def _watch(child: subprocess.Popen[bytes], record: Path) -> str:
    """Wait for a process; end one that is at a case for so long that the alarm was not heard. Returns its last words."""
    while True:
        try:
            return child.communicate(timeout=5)[1].decode("utf-8", "replace")
        except subprocess.TimeoutExpired:
            if record.exists() and time.time() - record.stat().st_mtime > 2 * SECONDS:
                child.kill()


def main() -> int:
    """Run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--configurations", type=int, default=500, help="half of them YAML files, half command lines")
    parser.add_argument("--only", nargs="*", default=[*FORMATS, *SETTINGS])
    parser.add_argument("--case", nargs=2)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(one(options.case[0], int(options.case[1])))
        return 0
    if options.work:
        kind, first, count, record = options.work
        work(kind, int(first), int(count), Path(record))
        return 0
    started, found = time.perf_counter(), []
    for kind in options.only:
        found.append(run(kind, options.configurations // 2 if kind in SETTINGS else options.files))
        row = found[-1]
        print(
            f"{kind:9} {row['cases']:5} cases {row['taken']:5} taken {row['refused']:5} refused {len(row['failed']):4} failed, "
            f"slowest {row['slowest']:.2f} s, peak {row['peak'] / 1e9:.2f} GB",
            flush=True,
        )
        for number, reason in list(row["failed"].items())[:20]:
            print(f"  --case {kind} {number}: {reason.strip().splitlines()[-1][:300]}")
    total = {key: sum(row[key] for row in found) for key in ("cases", "taken", "refused")}
    print(json.dumps({**total, "failed": sum(len(row["failed"]) for row in found), "seconds": round(time.perf_counter() - started)}))
    return int(any(row["failed"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
