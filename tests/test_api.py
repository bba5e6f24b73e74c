"""The names that each package offers, exactly."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "maskdm": ["DiT", "MaskDMPipeline", "UViT", "__version__"],
    "maskdm.data": [
        "Batch", "BrokenImage", "Dataset", "Loader", "Source", "Summary", "decode", "duplicates", "flip", "inspect",
        "open_source", "prepare", "to_model_range", "to_uint8",
    ],
    "maskdm.models": ["Denoiser", "DenoiserOutput", "DiT", "UViT", "build", "patchify", "unpatchify"],
    "maskdm.engine": [
        "Average", "Checkpoint", "Machine", "PowerAverages", "Progress", "StageProgress", "Step", "Trainer", "Transfer", "autocast",
        "environment", "learning_rate", "make_optimizer", "this_machine", "transfer",
    ],
    "maskdm.sampling": ["MaskDMPipeline", "make_scheduler", "offered", "seeded"],
    "maskdm.evaluation": [
        "Evaluation", "FeatureNetwork", "Images", "KernelDistance", "Labels", "Neighbours", "PrecisionRecall", "Statistics",
        "cached_self", "evaluate_samples", "frechet_distance", "kernel_distance", "load_self", "nearest", "precision_recall",
        "train_self",
    ],
    "maskdm.recipes": ["RECIPES", "Choice", "choose", "cifar10", "digits", "emoji", "recipe"],
    "maskdm.runs": [
        "Display", "Diverged", "Interrupted", "SampleRequest", "SweepRequest", "TrainRequest", "describe_data", "ema_sweep", "evaluate_run",
        "parse_lengths", "report_run", "sample_run", "train",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name])
    assert all(getattr(module, each) is not None for each in module.__all__)
