"""Exports open without maskdm, and compute what the network does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from maskdm.cli import run_command
from maskdm.errors import UserError
from maskdm.export import CODE, SAMPLER, bundle, write_folder, write_onnx, write_program
from maskdm.export.graphs import _check
from maskdm.sampling import seeded
from tests.export_helpers import networks, pipeline

ELSEWHERE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("maskdm", "jaxtyping", "tyro", "beartype"):
            raise ImportError(f"{name} is not on this machine")

sys.meta_path.insert(0, Missing())
import diffusers, torch

for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline="maskdm_pipeline", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    labels = [0, 2] if pipeline.unet.num_classes else None
    draw = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images = pipeline(2, labels, draw(), 3, guidance_scale=2.0 if labels else 1.0, output_type="pt").images
    if labels is None:
        assert type(pipeline).__module__.startswith("diffusers_modules")
        stock = diffusers.DDPMPipeline.from_pretrained(folder, trust_remote_code=True)
        assert type(stock) is diffusers.DDPMPipeline
        stock.set_progress_bar_config(disable=True)
        assert stock(2, num_inference_steps=2, output_type="np").images.shape[0] == 2
    else:  # it says itself what opens it
        assert type(diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)) .__name__ == "MaskDMPipeline"
    torch.save(images, f"{folder}/images.pt")
assert not any(name.split(".")[0] == "maskdm" for name in sys.modules)
"""


def test_folders_open_without_maskdm_and_draw_the_same(tmp_path: Path) -> None:
    made = networks()
    for name, network in made.items():
        write_folder(pipeline(network), tmp_path / name)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(tmp_path), *made]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, network in made.items():
        labels = [0, 2] if network.num_classes else None
        scale = 2.0 if labels else 1.0
        ours: Any = pipeline(network)(
            2, labels, [torch.Generator().manual_seed(s) for s in (1, 2)], 3, guidance_scale=scale, output_type="pt"
        )
        theirs = torch.load(tmp_path / name / "images.pt", weights_only=True)
        torch.testing.assert_close(ours.images, theirs, atol=1e-5, rtol=0, msg=name)  # equal where both use as many threads
        assert ours.images.std() > 0.01


def test_a_bundle_holds_what_is_needed_and_nothing_of_training() -> None:
    text = bundle([("maskdm.models.dit", "DiT")], "A network")
    assert "class DiT(Denoiser)" in text and "class UViT" not in text and "class Config" not in text
    assert "maskdm." not in text.replace("from maskdm 0", "") and "__module__" not in text and "pyright" not in text
    names: dict[str, Any] = {"__name__": "elsewhere"}
    sys.modules["elsewhere"] = type(sys)("elsewhere")
    exec(compile(text, "elsewhere", "exec", dont_inherit=True), names)
    del sys.modules["elsewhere"]
    network = networks()["dit-classes"]
    other = names["DiT"](**{key: value for key, value in network.config.items() if not key.startswith("_")})
    other.load_state_dict(network.state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(other.eval()(x, 5.0).sample, network(x, 5.0).sample)


def test_names_that_two_modules_use_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "maskdm_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def _one() -> int:\n    return 1\n\n\ndef one() -> int:\n    return _one()\n")
    (package / "b.py").write_text(
        "from maskdm_of_test.a import one as first\n\n\ndef _one() -> int:\n    return 20\n\n\n"
        "def both() -> int:\n    return first() + _one()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("maskdm.export.definitions.PACKAGE", "maskdm_of_test")
    text = bundle([("maskdm_of_test.b", "both")], "Two")
    names: dict[str, Any] = {}
    exec(text, names)
    assert names["both"]() == 21 and "_one_of_b" in text


@pytest.mark.parametrize("name", ["uvit", pytest.param("dit-haar-fuse", marks=pytest.mark.slow)])
def test_torch_export_computes_the_same_at_any_batch(name: str, tmp_path: Path) -> None:
    network = networks()[name]
    assert write_program(pipeline(network), tmp_path / "model.pt2") < 1e-4
    extra = {"maskdm": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    x, t = torch.randn(7, *_shape(network)), torch.rand(7) * 999
    torch.testing.assert_close(program.module()(x, t), network(x, t).sample, atol=1e-4, rtol=1e-4)
    assert json.loads(extra["maskdm"])["target"] == "v"


def _shape(network: Any) -> tuple[int, ...]:
    return (network.config["in_channels"], *network.size)


@pytest.mark.parametrize(
    "name", ["dit-classes", *(pytest.param(each, marks=pytest.mark.slow) for each in ("dit-haar-fuse", "uvit", "uvit-haar-classes"))]
)
def test_onnx_computes_the_same_and_a_script_without_torch_draws_from_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    network = networks()[name]
    path = tmp_path / "model.onnx"
    difference = write_onnx(pipeline(network), path)
    assert difference is not None and difference < 1e-4
    blocked = f"import sys; sys.modules['torch'] = sys.modules['maskdm'] = None; sys.argv[0] = ''; exec(open({str(SAMPLER)!r}).read())"
    command = [sys.executable, "-c", blocked, str(path), "5", "4", str(tmp_path / "grid.png"), *(["1"] if network.num_classes else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture)
    height, width = network.size
    assert pixels.shape[:2] == (3 * height, 3 * width) and (pixels[2 * height :, 2 * width :] == 0).all()
    noise = np.random.default_rng(0).standard_normal((5, *_shape(network)))
    ours = pipeline(network)
    ours.scheduler = _starting_from(noise, ours.scheduler)
    labels = [1] * 5 if network.num_classes else None
    drawn: Any = ours(5, labels, seeded(0, range(5)), 4, output_type="np")
    first = (drawn.images[0] * 255).round().astype(int).squeeze()
    assert abs(first - pixels[:height, :width].astype(int)).max() <= 1


def _starting_from(noise: Any, scheduler: Any) -> Any:
    """The scheduler, whose first step is from this noise."""
    step, first = scheduler.step, torch.from_numpy(noise).float()
    scale = scheduler.scale_model_input
    state = {"begun": False}

    def scaled(x: torch.Tensor, t: Any) -> torch.Tensor:
        if not state["begun"]:
            x.copy_(first)
            state["begun"] = True
        return scale(x, t)

    scheduler.scale_model_input, scheduler.step = scaled, step
    return scheduler


def test_what_is_missing_for_onnx_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm.export.graphs.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'maskdm\[export\]'"):
        write_onnx(pipeline(networks()["uvit"]), tmp_path / "model.onnx")


def test_a_graph_that_differs_is_refused(tmp_path: Path) -> None:
    network = networks()["uvit"]
    with pytest.raises(UserError, match=r"model\.onnx does not compute what the network does \(a difference of 0\.0"):
        _check(network, lambda x, t: network(x, t).sample + 1e-2, tmp_path / "model.onnx")
    assert _check(network, lambda x, t: network(x, t).sample + 1e-5, tmp_path / "model.onnx") < 1e-4


# --- the verb -----------------------------------------------------------------------------------------------------

TINY = ["--model.width", "16", "--depth", "2", "--heads", "2", "--threads", "1", "--sampling.steps", "2", "--sampling.num", "4"]
STEPS = ["--pretrain.budget.steps", "2", "--finetune.budget.steps", "2", "--precision", "bf16", "--tracking", "none"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps in bf16, with figures of an evaluation that is made up."""
    path = tmp_path_factory.mktemp("export")
    os.environ["MASKDM_CACHE"] = str(path / "cache")
    run = path / "private folder" / "my run"
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(run), *TINY, *STEPS]) == 0
    figures = {
        "num_samples": 100, "reference": "1438 of 1438 training images", "features": {"name": "self", "hash": "abcdef0123456789"},
        "frechet_distance": 1.5, "frechet_distance_interval": [1.25, 1.75], "precision": 0.5, "precision_interval": [0.4, 0.6],
        "precision_heldout": 0.9, "copies": {"count": 3, "num_samples": 100, "share_interval": [0.01, 0.085]},
        "provenance": {"scheduler": "ddim", "steps": 50, "guidance": 1.0, "weights_hash": "of others"},
        "verdicts": ["Variety is lacking."],
    }  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(figures))
    return run


def test_export_writes_a_card_from_the_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "exports" / "one"
    assert run_command(["export", str(finished), "--out", str(out), "--licence", "My Own"]) == 0
    assert f"exported to {out}" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.yaml", "export.json", "model_index.json", "samples.png", "scheduler", "unet", f"{CODE}.py",
    }  # fmt: skip
    text = (out / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["license_name"], head["library_name"]) == ("other", "my-own", "diffusers")
    for words in (
        "# my run",
        "gray images of 8 x 8 pixels of 10 classes",
        "1797: 1438 trained on, 359 held out",
        "| licence | My Own |",
        "| pretrain | patch, 50% |",
        "training in bf16",
        "| Precision | 0.5 | 0.4 to 0.6 | 0.9 |",
        "| Frechet distance | 1.5 | 1.25 to 1.75 |  |",
        "sampler ddim, 50 steps, guidance 1",
        "of other weights of the same run",
        "- Variety is lacking.",
        "3 of 100 samples (95 % interval: up to 8.5%)",
    ):
        assert words in text, words
    written = "".join(path.read_text(errors="ignore") for path in out.rglob("*") if path.suffix in (".md", ".yaml", ".json", ".py"))
    assert "private folder" not in written and str(finished.parent) not in written
    assert run_command(["export", str(finished), "--out", str(out)]) == 0  # an export is replaced
    text = (out / "README.md").read_text()
    assert "unknown: whoever exported it has not said" in text and "licence of the images is not known" in text


@pytest.mark.slow
def test_exports_of_other_forms_and_weights(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_command(["export", str(finished), "--out", str(out), "--format", "torch", "--weights", "raw", "--name", "Digits"]) == 0
    assert "model.pt2: at most" in capsys.readouterr().err
    assert {"model.pt2", "README.md"} <= {path.name for path in out.iterdir()} and not (out / "unet").exists()
    text = (out / "README.md").read_text()
    assert "# Digits" in text and "- weights: as trained" in text and "`model.pt2`: the network as a graph" in text


def test_a_run_is_exported_on_its_way_to_a_hub(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, set[str], str]] = []

    def sender(request: Any) -> Any:
        def send(folder: Path) -> str:
            sent.append((folder.name, {path.name for path in folder.iterdir()}, (folder / "README.md").read_text()))
            return "sent"

        return send

    monkeypatch.setattr(sys.modules["maskdm.runs.push"], "_sender", sender)
    assert run_command(["push", str(finished), "--to", "anna/flowers", "--licence", "mit"]) == 0
    name, files, text = sent[0]
    assert name == "flowers" and {"README.md", "model_index.json", "unet"} <= files
    assert "license: mit" in text and "# flowers" in text


def test_bad_requests_are_refused_by_name(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    run, out = str(finished), str(tmp_path / "x")
    for words, said in (
        (
            [run, "--out", out, "--format", "onx"],
            "--format is 'onx'; give some of diffusers, onnx, torch, with commas between; did you mean onnx?",
        ),
        ([run, "--out", out, "--format", ","], "--format is ','"),
        ([str(tmp_path / "absent"), "--out", out], "absent is not there"),
        ([run, "--out", run], "is the run itself"),
        ([run, "--out", str(tmp_path / "full")], "holds files that are not an export's"),
        ([run, "--out", str(tmp_path / "file")], "is a file; give a directory"),
        ([run, "--out", out, "--licence", " "], "--licence is empty"),
    ):
        assert run_command(["export", *words]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear" and not (tmp_path / "x").exists()
