"""Shapes and types are executed: every annotated function of maskdm is checked by jaxtyping and beartype in the tests."""

from __future__ import annotations

import os
from collections.abc import Generator

from jaxtyping import install_import_hook

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does

hook = install_import_hook("maskdm", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other


@pytest.fixture(autouse=True, scope="session")
def _short_networks() -> Generator[None]:
    """Feature networks of the tests learn digits well enough in a tenth of the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskdm.evaluation.training._num_steps", lambda encoder, num_images: 40)
        yield
