"""The job files for clusters: what they say is there, and their commands are ones that maskdm takes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskdm import cli
from maskdm.recipes import recipe
from maskdm.settings import override

JOBS = Path(__file__).parents[1] / "jobs"
SLURM = JOBS / "slurm.sh"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((JOBS / name).read_text())


def check_train(words: list[str]) -> None:
    """That these are the words of a `maskdm train` that is understood, up to the settings' values."""
    line = cli.split_settings(words)
    verb = cli._parse(line.rest)
    assert isinstance(verb, cli.Train) and verb.recipe is not None
    override(recipe(verb.recipe, verb.data), line.settings)
    assert verb.out.is_relative_to("/shared")


def check_torchrun(words: list[str]) -> None:
    """That torchrun takes the options, and maskdm the rest."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words[1:])
    assert options.shutdown_timeout >= 60  # torchrun's own 30 s may be less than a checkpoint takes
    assert words[0] == "torchrun" and options.module and options.training_script == "maskdm"
    check_train(options.training_script_args)


def check_pod(spec: dict[str, Any]) -> dict[str, Any]:
    """What every pod needs: time to save, and one file system for all. Returns its only container."""
    assert spec["terminationGracePeriodSeconds"] >= 60
    (container,) = spec["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["shared"] == "/shared" and mounts["memory"] == "/dev/shm"
    assert {volume["name"] for volume in spec["volumes"]} == set(mounts)
    assert any("persistentVolumeClaim" in volume for volume in spec["volumes"])
    assert {each["name"]: each["value"] for each in container["env"]}["MASKDM_CACHE"].startswith("/shared")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    return container


def test_slurm_is_a_sound_script() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SLURM)], check=True)
    head = re.findall(r"^#SBATCH (.*)$", SLURM.read_text(), re.MULTILINE)
    assert {"--signal=USR1@120", "--requeue"} <= set(head)


@pytest.mark.parametrize(
    ("launch", "code", "restarts", "requeued"),
    [("srun", 130, 0, True), ("srun", 0, 0, False), ("srun", 2, 0, False), ("torchrun", 1, 0, True), ("torchrun", 1, 10, False)],
)
def test_slurm_starts_what_exists_and_requeues_what_was_saved(
    launch: str, code: int, restarts: int, requeued: bool, tmp_path: Path
) -> None:
    for name, body in {
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/words; exit {code}',
        "scontrol": f'echo "$@" >> {tmp_path}/asked; echo gpu01',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NAME": "m", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[01-02]"}
    given |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "LAUNCH": launch, "SLURM_RESTART_COUNT": str(restarts)}
    assert subprocess.run(["bash", str(SLURM)], env=given, timeout=20).returncode == code
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert ("requeue 7" in asked) == requeued
    words = (tmp_path / "words").read_text().splitlines()
    if launch == "torchrun":
        check_torchrun(words[words.index("torchrun") :])
    else:
        assert words[words.index("python") :][:3] == ["python", "-m", "maskdm"]
        check_train(words[words.index("maskdm") + 1 :])


def test_jobset_begins_again_and_its_command_exists() -> None:
    job = manifest("kubernetes-jobset.yaml")
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["spec"]["failurePolicy"]["maxRestarts"] >= 1
    (group,) = job["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    container = check_pod(pod)
    shell, words = container["command"], shlex.split(container["args"][0].replace("$JOB_COMPLETION_INDEX", "1"))
    assert shell == ["/bin/sh", "-c"] and words[0] == "exec"
    check_torchrun(words[1:])
    assert words[words.index("--nnodes") + 1] == str(spec["completions"])
    name = f"{job['metadata']['name']}-{group['name']}-0-0.{job['metadata']['name']}"
    assert words[words.index("--master-addr") + 1] == name


def test_kubeflow_is_elastic_and_its_command_exists() -> None:
    job = manifest("kubeflow-trainer.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"] and elastic["maxRestarts"] >= 1
    assert worker["restartPolicy"] == "OnFailure"
    container = check_pod(worker["template"]["spec"])
    assert container["name"] == "pytorch"  # the operator looks for this name
    check_torchrun(container["command"])
