"""Kills runs at random moments, makes their disk fail, and looks for anything lost: `make chaos`, `make chaos KILLS=10` for a short one.

A small run is trained undisturbed. Then the same run again and again: each process is killed after a random time, or at a random write,
fsync or rename (`faults.c`), or the disk refuses some of them; the same command follows until the run is finished, and all that it left is
compared with what the undisturbed one left. A trial is a function of its number, and done ones are kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMES = {"seconds", "images_per_second", "tokens_per_second", "share_of_ceiling", "data_wait", "memory"}
"""Figures of the log that are no function of the seed."""

COMMAND = [
    "train", "digits", "--recipe", "digits", "--model.width", "32", "--depth", "3", "--heads", "2", "--threads", "1",
    "--pretrain.budget.steps", "60", "--finetune.budget.steps", "60",
    "--pretrain.budget.minutes", "none", "--finetune.budget.minutes", "none",
    "--pretrain.batch", "32", "--finetune.batch", "32", "--intervals.log", "1", "--intervals.save", "3", "--intervals.evaluate", "20",
    "--intervals.sample", "30", "--sampling.steps", "2", "--sampling.num", "4",
]  # fmt: skip

PATIENCE = 600.0
"""Seconds after which a run hangs: it takes ten or twenty, but others may want the machine."""


@dataclass
class Trial:
    """What is done to one process. after: seconds until it is killed. spec: as faults.c reads it."""

    after: float | None = None
    spec: str | None = None
    victim: int = 0
    """Among several processes, by its number modulo theirs."""

    @staticmethod
    def of(number: int, length: float, faults: bool) -> Trial:
        """The trial of a number; `length`: seconds that an undisturbed process takes."""
        chance = random.Random(number)
        victim = chance.randrange(10_000)
        if not faults and chance.random() < 0.5:
            return Trial(chance.uniform(0.1, length), None, victim)
        kind, where = chance.choice(("write", "fsync", "rename")), round(2 ** chance.uniform(0, 9))
        if not faults:
            return Trial(None, f"{kind}:{where}:1:0", victim)
        number = chance.choice((errno.ENOSPC, errno.EIO, errno.EROFS))
        return Trial(None, f"{kind}:{where}:{chance.choice((1, 5, 100_000))}:{number}", victim)

    @property
    def site(self) -> str:
        """Where it strikes."""
        return "time" if self.spec is None else self.spec.split(":")[0]


@dataclass
class Score:
    """What has been seen. kills: processes killed; survived: those whose run went on; faults: by site; losses: what went wrong."""

    trials: int = 0
    kills: int = 0
    survived: int = 0
    finished: int = 0
    mismatches: int = 0
    kill_sites: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    ended: int = 0
    """Processes that a fault ended, with one line."""
    losses: list[str] = field(default_factory=list[str])


def run(out: Path, trial: Trial, log: Path, world: int = 1) -> int:
    """The processes of a run, to their end; returns an exit code, negative where a signal ended the one that the trial is for.

    When that one dies the others are killed a moment later, as by torchrun.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    victim = trial.victim % world
    children = {rank: fork(out, trial if rank == victim else None, log, rank, world, port) for rank in range(world)}
    victims, codes = children[victim], dict[int, int]()
    started, kill_at = time.monotonic(), trial.after
    while len(codes) < world:
        for child in set(children.values()) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        spent = time.monotonic() - started
        if kill_at is not None and spent > kill_at and victims not in codes:
            os.kill(victims, signal.SIGKILL)
            kill_at = None
        if codes.get(victims, 0) < 0:
            time.sleep(trial.victim % 100 / 100)
        if codes.get(victims, 0) < 0 or spent > PATIENCE:
            for child in set(children.values()) - set(codes):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = -signal.SIGKILL if spent <= PATIENCE else -signal.SIGALRM
        time.sleep(0.002)
    hung = -signal.SIGALRM in codes.values()
    return -signal.SIGALRM if hung else codes[victims] if codes[victims] else max(codes.values())


def fork(out: Path, trial: Trial | None, log: Path, rank: int, world: int, port: int) -> int:
    """Begin one process; returns its number."""
    child = os.fork()
    if child != 0:
        return child
    code = 70
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if trial is not None and trial.spec is not None:
            os.environ |= {"CHAOS_ROOT": f"{out}/", "CHAOS_SPEC": trial.spec}
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from maskdm.cli import run_command

        code = run_command([*COMMAND, "--out", str(out)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def left_by(out: Path) -> dict[str, Any]:
    """All that must be the same: every tensor file and picture, the manifests and the log, without what clocks say."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix in (".safetensors", ".png"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "manifest.json":
            found[name] = without_times(json.loads(path.read_text()))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["log"] = [without_times(line) for line in lines if line["event"] != "resume"]
    found["losses"] = [without_times(line) for line in lines if line["event"] in ("train", "heldout")]
    return found


def differences(expected: dict[str, Any], got: dict[str, Any], faulty: bool = False) -> list[str]:
    """Names of what is not the same. Of a run whose disk was `faulty` the weights and losses at least: pictures may be missing."""
    names = sorted(expected.keys() | got.keys())
    if faulty:
        last = max(name for name in expected if name.startswith("checkpoints/"))
        names = ["losses", *(name for name in names if name.startswith(str(Path(last).parent)))]
    return [name for name in names if expected.get(name) != got.get(name)]


def without_times(value: Any) -> Any:
    """A record without the figures of clocks, and without the hashes of files, which are compared themselves."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES | {"files"}}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def judge(score: Score, trial: Trial, code: int, said: str, faults: bool) -> bool:
    """Book the end of a process; whether its run is finished."""
    one_line = "maskdm: error:" in said and "Traceback" not in said
    if faults:
        score.faults[trial.site] += 1
    if code == -signal.SIGKILL and not faults:
        score.kills += 1
        score.kill_sites[trial.site] += 1
        score.survived += 1  # taken back where the next process cannot go on
    elif faults and code == 1 and one_line:
        score.ended += 1
    elif code != 0:
        score.losses.append(f"trial {score.trials} ({trial}): exit code {code}: {said[-600:]}")
        score.survived -= 0 if faults else 1
    return code == 0


def chaos(kills: int, faults: int, work: Path, world: int = 1) -> Score:
    """Go on until so many processes have been killed, and so many disks have failed; the run at hand is then finished and compared."""
    reference = work / "undisturbed"
    if not (reference / "samples.png").is_file():
        shutil.rmtree(reference, ignore_errors=True)
        assert run(reference, Trial(), work / "undisturbed.log", world) == 0, (work / "undisturbed.log").read_text()
    expected = left_by(reference)
    started = time.monotonic()
    shutil.rmtree(work / "again", ignore_errors=True)
    assert run(work / "again", Trial(), work / "undisturbed.log", world) == 0
    length = time.monotonic() - started
    assert not differences(expected, left_by(work / "again")), "two undisturbed runs differ: nothing can be said"
    file, out, log = work / "score.json", work / "run", work / "run.log"
    score = Score()
    if file.is_file():
        kept = json.loads(file.read_text())
        score = Score(**kept | {"kill_sites": Counter(kept["kill_sites"]), "faults": Counter(kept["faults"])})
    while True:
        of_disk = score.kills >= kills
        enough = of_disk and score.faults.total() >= faults
        trial = Trial() if enough else Trial.of(score.trials, length, of_disk)
        log.write_bytes(b"")
        code = run(out, trial, log, world)
        if judge(score, trial, code, log.read_text(errors="replace"), of_disk and not enough):
            score.finished += 1
            wrong = differences(expected, left_by(out), of_disk)
            if wrong:
                score.mismatches += 1
                score.losses.append(f"trial {score.trials}: {', '.join(wrong[:8])} differ{'' if len(wrong) < 9 else ', and more'}")
            shutil.rmtree(out)
        score.trials += 1
        file.write_text(json.dumps(vars(score)))
        if score.losses or (enough and code == 0):
            return score
        if score.trials % 20 == 0:
            print(
                f"{score.trials} starts of {world}: {score.kills} killed, {score.faults.total()} disk faults, {score.finished} runs",
                flush=True,
            )


def main() -> int:
    """Parse, preload the faults, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, help="processes whose disk fails; half of --kills if left out")
    parser.add_argument("--kills-of-two", type=int, help="in runs of two processes; a fifth of --kills if left out")
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"), help="folder of the runs, and of what is known so far")
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    library = work / "faults.so"
    if os.environ.get("LD_PRELOAD") != str(library):
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faults.c"), "-ldl"], check=True)
        os.environ |= {"LD_PRELOAD": str(library), "MASKDM_CACHE": str(work / "cache"), "GOMP_SPINCOUNT": "1000"}
        os.execv(sys.executable, [sys.executable, "-m", "tests.chaos", *sys.argv[1:]])
    import maskdm.runs.train  # noqa: F401 - once, here: a forked process has it

    counts: dict[str, Any] = {"kills": 0, "survived": 0, "mismatches": 0, "faults": {}}
    lost: list[str] = []
    faults = given.kills // 2 if given.faults is None else given.faults
    two = given.kills // 5 if given.kills_of_two is None else given.kills_of_two
    for world, kills, fails in ((1, given.kills, faults), (2, two, 0)):
        if kills + fails == 0:
            continue
        folder = work / f"of-{world}"
        folder.mkdir(exist_ok=True)
        score = chaos(kills, fails, folder, world)
        show(score, world)
        counts["kills"] += score.kills
        counts["survived"] += score.survived
        counts["mismatches"] += score.mismatches
        counts["faults"] |= score.faults
        lost += score.losses
    print(json.dumps(counts))
    return 1 if lost else 0


def show(score: Score, world: int) -> None:
    """In words."""
    print(f"runs of {world} process{'es' if world > 1 else ''}:")
    print(f"  kills survived: {score.survived} of {score.kills} ({', '.join(f'{n} by {s}' for s, n in sorted(score.kill_sites.items()))})")
    sites = ", ".join(f"{number} in {site}" for site, number in sorted(score.faults.items())) or "none"
    print(f"  disk faults: {sites}; {score.ended} ended their process with one line, the others cost nothing")
    print(f"  runs finished: {score.finished}, other than the undisturbed one: {score.mismatches}")
    for loss in score.losses:
        print(f"  LOST: {loss}")


if __name__ == "__main__":
    sys.exit(main())
