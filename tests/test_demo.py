"""What the demo computes, refuses and stops, and its JSON API; the page itself is in test_demo_browser.py."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from test_sample_command import TRAIN, picture, run  # noqa: F401 - the fixture

from maskdm.cli import run_command
from maskdm.demo.answers import Answers
from maskdm.demo.api import Api
from maskdm.demo.service import PICTURES, Drawn, Service
from maskdm.demo.uploads import MOST_BYTES, open_layers, read_mask
from maskdm.demo.wishes import Wish
from maskdm.demo.work import Busy, Job, Stopped, Worker
from maskdm.errors import UserError
from maskdm.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def service(run: Path) -> Iterator[Service]:  # noqa: F811
    made = Service([run])
    yield made
    made.close()


@pytest.fixture
def client(service: Service) -> TestClient:
    return TestClient(Starlette(routes=[Route("/generate", Api(service).generate, methods=["POST"])]))


def digit(number: int) -> np.ndarray:
    from sklearn.datasets import load_digits

    return (np.asarray(load_digits().images)[number] * (255 / 16)).round().astype(np.uint8)[None]


# --- drawing ---


def test_the_same_images_as_maskdm_sample(run: Path, service: Service, tmp_path: Path) -> None:  # noqa: F811
    drawn = service.generate(Wish(num=5, seed=7, steps=3, labels=("3", "8"), guidance=2.0)).result()
    more = ["--num", "5", "--seed", "7", "--steps", "3", "--labels", "3", "8", "--guidance", "2"]
    assert run_command(["sample", str(run), "--out", str(tmp_path), *more]) == 0
    for number, image in enumerate(drawn.images):
        assert np.array_equal(image[0], np.asarray(picture(tmp_path / f"sample-{number:06}.png")))
    assert drawn.used["labels"] == ["3", "8", "3", "8", "3"] and drawn.used["steps"] == 3 and drawn.used["guidance"] == 2


def test_a_way_between_seeds_has_their_images_at_its_ends(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    # in bf16, which some processors multiply in, a batch of five rounds otherwise than one of one
    monkeypatch.setattr("maskdm.engine.hardware.multiplies_bf16", lambda kind: False)
    way = service.morph(Wish(num=5, seed=1, labels=("3", "8")), 2).result().images.astype(int)
    ends = [service.generate(Wish(num=1, seed=seed, labels=(label,))).result().images[0] for seed, label in ((1, "3"), (2, "8"))]
    assert np.abs(way[0] - ends[0]).max() <= 1 and np.abs(way[-1] - ends[1]).max() <= 1
    assert np.abs(way[2] - way[0]).max() > 1 and np.abs(way[2] - way[-1]).max() > 1


def test_images_are_seen_on_their_way(service: Service) -> None:
    shown = list(service.generate(Wish(num=4, steps=200)).watch())
    pictures = [each.images for each in shown if each.images is not None]
    assert len(pictures) >= 2 and all(each.shape == (4, 1, 8, 8) for each in pictures)
    assert not np.array_equal(pictures[0], pictures[-1]) and any(each.text.startswith("step ") for each in shown)


def test_two_checkpoints_at_the_same_seed(service: Service) -> None:
    names = [model.name for model in service.shelf.models()]
    assert names == ["run", "run, end of pretrain"]
    whole, masked = (service.generate(Wish(name, num=2, seed=3)).result() for name in names)
    assert not np.array_equal(whole.images, masked.images)
    assert "step-00000020-pretrain" in masked.used["weights"] and "finetune" in whole.used["weights"]


def test_inpainting_keeps_what_is_known(service: Service) -> None:
    layer = Image.new("RGBA", (512, 512))
    layer.paste((255, 0, 80, 255), (256, 0, 512, 512))
    drawn = service.inpaint(Wish(num=3, steps=5, labels=("3",)), digit(3), [layer]).result()
    assert all(np.array_equal(image[:, :, :4], digit(3)[:, :, :4]) for image in drawn.images)
    assert not any(np.array_equal(image[:, :, 4:], digit(3)[:, :, 4:]) for image in drawn.images)


def test_masks_are_painted_at_any_size(service: Service, run: Path) -> None:  # noqa: F811
    settings = RunDirectory(run).config().data
    stroke = Image.new("RGBA", (512, 512))
    stroke.paste((1, 2, 3, 255), (0, 70, 512, 100))  # half of one row of pixels
    covered = read_mask([stroke], settings)
    assert covered[1].all() and covered.sum() == 8
    for layers, words in (([], "nothing is painted"), ([Image.new("RGBA", (9, 9), "red")], "all of the image")):
        with pytest.raises(UserError, match=words):
            read_mask(layers, settings)


def test_nearest_training_images(service: Service, run: Path) -> None:  # noqa: F811
    rows = RunDirectory(run).config()
    seen = service.masks(None, None, 5, 0).result()
    found = service.nearest(None, seen.images[0]).result()
    assert found.names[0] == seen.name and found.distances[0] == 0 and found.ratio == 0 and "looks like a copy" in found.verdict
    mirrored = service.nearest(None, np.ascontiguousarray(seen.images[0][:, :, ::-1])).result()
    assert mirrored.names[0] == seen.name and mirrored.mirrored[0] and list(mirrored.distances) == sorted(mirrored.distances)
    assert rows.data.image_size == (8, 8) and len(found.images) == 8


def test_what_the_masked_stage_saw(service: Service) -> None:
    seen = service.masks(None, "pretrain", 2, 1).result()
    assert seen.images.shape == (5, 1, 8, 8) and "sees 50%" in seen.text
    patches = (seen.images[1:] == seen.images[0]).reshape(4, 4, 2, 4, 2).all(axis=(2, 4)).sum(axis=(1, 2))
    assert (patches >= 8).all() and not np.array_equal(seen.images[1], seen.images[2])
    assert not np.array_equal(service.masks(None, None, 2, 2).result().images[1], seen.images[1])


# --- bounds ---


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"num": 0}, "num is 0; give 1 to 64"),
        ({"num": 65}, "num is 65"),
        ({"steps": 10_000}, "steps is 10000; give 1 to 1000"),
        ({"seed": -1}, "seed is -1"),
        ({"scheduler": "dim"}, "scheduler 'dim' is none of .*; did you mean ddim"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"labels": ("eleven",)}, "'eleven' is no class of this model"),
        ({"labels": ("1",) * 100}, "labels are too many"),
        ({"labels": ("3:1e308+8:1e308",)}, "add up to no number"),
        ({"seed": 10**400}, r"seed is 1000000000\d*\.\.\.; give"),
        ({"model": "walk"}, "'walk' is no model here, which are run"),
    ],
)
def test_what_is_out_of_bounds_is_said_at_once(wish: dict[str, Any], words: str, service: Service) -> None:
    with pytest.raises(UserError, match=words):
        service.generate(Wish(**wish))


def bomb(width: int, height: int) -> bytes:
    """A PNG that says that it has so many pixels, in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no image", "cannot be read as an image: not an image"),
        (b"", "empty file"),
        (bomb(9000, 9000), "has 9000 x 9000 pixels"),
        (bomb(60_000, 60_000), "more than 179 million pixels"),
        (bomb(20, 20), "damaged"),
        (b"\0" * (MOST_BYTES + 1), "more than 20 MiB"),
    ],
)
def test_bad_uploads_are_refused_in_a_sentence(content: bytes, words: str, service: Service, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=words):
        service.upload(None, tmp_path / "x.png")


def test_uploads_are_brought_to_the_size_of_the_run(service: Service, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "x.jpg")
    assert service.upload(None, tmp_path / "x.jpg").shape == (1, 8, 8)
    with pytest.raises(UserError, match="another size"):
        service.inpaint(Wish(), np.zeros((3, 8, 8), dtype=np.uint8), [])


def test_runs_on_latents_are_not_inpainted(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    traits = replace(service.shelf.traits(None), latent=True)
    monkeypatch.setattr(service.shelf, "traits", lambda name: traits)
    with pytest.raises(UserError, match="draws latents, whose pixels are not known"):
        service.inpaint(Wish(), digit(0), [])
    with pytest.raises(UserError, match="draws latents, whose pixels are not known"):
        service.upload(None, Path("any"))


def test_masks_are_looked_at_before_they_are_decoded(service: Service, run: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = RunDirectory(run).config().data
    for name, content, words in (
        ("large.png", bomb(9000, 9000), "too many pixels"), ("cut.png", bomb(20, 20), "cannot be read"), ("x.png", b"x", "cannot be read"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_mask(open_layers([tmp_path / name]), settings)
    (tmp_path / "large.png").write_bytes(bomb(5000, 5000))
    with pytest.raises(UserError, match="too many pixels"):
        read_mask(open_layers([tmp_path / "large.png"] * 3), settings)
    with pytest.raises(UserError, match="not there any more"):
        service.upload(None, tmp_path / "gone.png")


def test_pictures_on_the_way_are_so_many_at_most(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Job, "due", True)
    monkeypatch.setattr(Job, "show", lambda self, text, images=None: seen.extend([text] if images is not None else []))
    service.generate(Wish(num=4, steps=200)).result()
    assert PICTURES - 2 <= len(seen) <= PICTURES and seen[0] == "step 1 of 200"


# --- one at a time ---


def test_stopped_between_two_steps_and_before_its_turn(service: Service) -> None:
    long = service.generate(Wish(num=64, steps=1000))
    waiting = service.generate(Wish(num=1, steps=1))
    seen = 0
    for shown in long.watch():
        if shown.images is not None:
            seen += 1
            assert waiting.ahead == 1 and waiting.stop() and not waiting.stop()
            started = time.monotonic()
            assert long.stop()
            break
    with pytest.raises(Stopped):
        long.result()
    assert seen == 1 and time.monotonic() - started < 5
    with pytest.raises(Stopped):
        waiting.result()
    assert not long.stop() and service.generate(Wish(num=1)).result().images.shape == (1, 1, 8, 8)


def test_so_many_wait_and_no_more() -> None:
    worker, go = Worker(waiting=1), threading.Event()

    def wait(job: Job[bool]) -> bool:
        return go.wait(10)

    first, second = worker.begin(wait), worker.begin(wait)
    with pytest.raises(Busy, match="2 computations are asked for already"):
        worker.begin(wait)
    assert next(second.watch()).text == "waits for 1 before it"
    go.set()
    assert first.result() and worker.begin(wait).result()
    worker.close()


def test_who_looks_away_stops_the_work(service: Service) -> None:
    job = service.generate(Wish(num=64, steps=1000))
    frames = job.watch()
    next(frames)
    frames.close()
    with pytest.raises(Stopped):
        job.result()


def test_a_failure_is_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    def fail(job: Job[Drawn]) -> Drawn:
        raise ZeroDivisionError("oh")

    worker = Worker()
    with pytest.raises(UserError, match=r"the computation failed \(ZeroDivisionError\)"):
        worker.begin(fail).result()
    assert "ZeroDivisionError: oh" in caplog.text
    worker.close()


# --- what the page asks ---


def asked(service: Service, event: str, *given: Any) -> list[Any]:
    """All that a handler of the page answers."""
    answered = getattr(Answers(service), event)(*given, gr.Request(session_hash="test"))
    return list(answered)


def test_the_command_on_the_page_draws_the_same(service: Service) -> None:
    said = asked(service, "generate", "run", 2, ["3"], 1, 2, None, 1)[-1][1]
    assert "--guidance 1.0 --labels 3" in said  # the run's own may be another
    assert "maskdm sample" not in asked(service, "generate", "run, end of pretrain", 2, [], 1, 2, None, None)[-1][1]


@pytest.mark.parametrize(
    ("event", "given", "words"),
    [
        ("generate", ("run", 100, [], 0, 2, None, None), "num is 100; give 1 to 64"),
        ("generate", ("run", 2, [], float("nan"), 2, None, None), "seed is not a whole number"),
        ("generate", ("run", 2, "3", 0, 2, None, None), "labels is not a list"),
        ("generate", ({"a": 1}, 2, [], 0, 2, None, None), "model is not a text"),
        ("inpaint", ("run", np.zeros((1, 8, 8), dtype=np.uint8), {"layers": [{"path": "/no"}]}, 2, [], 0, 2, None, None), "cannot be read"),
        ("morph", ("run", 3, 0, None, float("inf"), None, 2, None, None), "the last seed is not a whole number"),
        ("masks", ("run", 7, 0, 0), "the stage is not a text"),
        ("nearest", ([], None, 0), "generate something first"),
    ],
)
def test_what_no_page_of_ours_sends_is_a_sentence(event: str, given: tuple[Any, ...], words: str, service: Service) -> None:
    last = asked(service, event, *given)[-1]
    assert words in last[1] and 'class="wrong"' in last[1]


# --- runs ---


def test_a_run_that_is_gone_is_a_sentence(run: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(run, tmp_path / "gone")
    made = Service([run, tmp_path / "gone"])
    answers = Answers(made)
    outputs = len(answers.adapt("gone"))
    (tmp_path / "gone" / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        made.generate(Wish("gone"))
    shutil.rmtree(tmp_path / "gone")
    said = answers.adapt("gone")
    assert "is not there" in said[0] and len(said) == outputs and len(answers.adapt("run")) == outputs
    assert answers.adapt_compared("gone") == gr.skip() and "ready" in answers.refresh()[0]
    made.close()


def test_a_run_that_trains_is_followed(run: Path, tmp_path: Path) -> None:  # noqa: F811
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = max((copy / "checkpoints").glob("step-*"), key=lambda path: path.name)
    aside = newest.rename(tmp_path / newest.name)
    made = Service([copy])
    assert "pretrain" in made.generate(Wish(num=1)).result().used["weights"]
    aside.rename(newest)
    assert "finetune" in made.generate(Wish(num=1)).result().used["weights"]
    (newest / "average.safetensors").write_bytes(b"half of it")
    later = newest.with_name("step-00000099")
    shutil.copytree(newest, later)
    shutil.copytree(run / "checkpoints" / newest.name, tmp_path / "whole")
    shutil.rmtree(newest)
    (tmp_path / "whole").rename(newest)
    assert "00000080" in made.generate(Wish(num=1)).result().used["weights"] and later.is_dir()
    made.close()


def test_an_unconditional_run_has_no_classes(tmp_path: Path) -> None:
    few = ["--data.conditional", "false", "--pretrain.budget.steps", "2", "--finetune.budget.steps", "2", "--intervals.sample", "0"]
    assert run_command([*TRAIN, *few, "--out", str(tmp_path / "plain")]) == 0
    made = Service([tmp_path / "plain"])
    traits = made.shelf.traits(None)
    assert traits.classes == () and not traits.guided
    assert made.generate(Wish(num=1)).result().used["labels"] is None
    with pytest.raises(UserError, match="this model was trained without classes"):
        made.generate(Wish(labels=("3",)))
    made.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not there; give the directory of a run"),
        (["."], "is not the directory of a run"),
        (["young"], "young has no checkpoint yet; train it first"),
        ([], "name the directory of a run"),
        (["RUN", "--port", "-1"], "--port is -1; give a number from 0 to 65535"),
        (["RUN", "--port", "TAKEN"], "Address already in use.; give another --port"),
        (["RUN", "--host", "no.such.host.invalid"], "--host no.such.host.invalid is no address of this machine"),
        (["RUN", "--port", "NO-GRADIO"], "maskdm demo needs gradio: pip install 'maskdm.demo.'"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    words: list[str],
    message: str,
    run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "young", ignore=shutil.ignore_patterns("step-*"))
    if "NO-GRADIO" in words:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = {"RUN": str(run), "TAKEN": str(taken.getsockname()[1]), "NO-GRADIO": "0"}
        assert run_command(["demo", *(given.get(word, word) for word in words)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1 and "Traceback" not in said


def test_the_demo_is_found_without_anything_heavy() -> None:
    code = "import sys, maskdm.cli; maskdm.cli.run_command(['demo', '--help']); print({'torch', 'gradio', 'starlette'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()" and "--host" in done.stdout


# --- the API ---


def test_the_api_gives_images_and_what_was_used(client: TestClient, service: Service) -> None:
    answer = client.post("/generate", json={"num": 2, "seed": 5, "labels": [3, "8"], "steps": 3, "guidance": 2})
    given = answer.json()
    assert answer.status_code == 200 and len(given["images"]) == 2
    drawn = service.generate(Wish(num=2, seed=5, labels=("3", "8"), steps=3, guidance=2.0)).result()
    for text, image in zip(given["images"], drawn.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))), image[0])
    used = given["used"]
    assert (used["num"], used["seed"], used["labels"], used["steps"], used["guidance"]) == (2, 5, ["3", "8"], 3, 2.0)
    assert used["scheduler"] == "ddim" and used["model"] == "run"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("x", "the request is no JSON"),
        ("[" * 50_000, "the request is no JSON"),
        ("[]", "the request is no JSON object"),
        ('{"sed": 1}', "'sed' is no field; .*did you mean seed"),
        ('{"num": true}', "num is not a whole number"),
        ('{"num": 2.5}', "num is not a whole number"),
        ('{"num": 1000}', "num is 1000; give 1 to 64 images"),
        ('{"steps": 10000}', "steps is 10000"),
        ('{"labels": "3"}', "labels is not a list of classes"),
        ('{"labels": [[3]]}', "labels is not a list of classes"),
        ('{"labels": ["eleven"]}', "'eleven' is no class"),
        ('{"guidance": 1e999}', "guidance is inf"),
        ('{"seed": 1e3}', "seed is not a whole number"),
        ('{"scheduler": "x"}', "scheduler 'x' is none of"),
        ('{"guidance": 1' + "0" * 400 + "}", "guidance is inf; give"),
        ('{"labels": ["\\ud800"]}', "'\\?' is no class"),
    ],
)
def test_bad_requests_are_400_and_a_sentence(body: str, sentence: str, client: TestClient) -> None:
    import re

    answer = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and re.search(sentence, answer.json()["error"]), answer.text


def test_requests_of_other_kinds(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.post("/generate", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert (
        client.post("/generate", content=json.dumps({"labels": ["x" * 70_000]}), headers={"Content-Type": "application/json"}).status_code
        == 413
    )
    assert client.get("/generate").status_code == 405

    def refuse(wish: Wish) -> Job[Drawn]:
        raise Busy("too many")

    monkeypatch.setattr(service, "generate", refuse)
    assert client.post("/generate", json={}).status_code == 503
