"""The names that each package offers, exactly."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "maskdm": [
        "DiT", "Interrupted", "MaskDMPipeline", "Run", "UViT", "UserError", "__version__", "compare", "evaluate_images", "train",
    ],
    "maskdm.data": [
        "Batch", "BrokenImage", "Dataset", "Feed", "Latents", "Loader", "Loss", "Pixels", "ShardDataset", "ShardLoader", "Source",
        "Summary", "cache_directory", "decode", "duplicates", "flip", "inspect", "make_loader", "open_source", "pack", "prepare",
        "to_model_range", "to_uint8",
    ],
    "maskdm.models": ["Denoiser", "DenoiserOutput", "DiT", "UViT", "build", "encode", "haar", "inverse_haar", "open_autoencoder",
        "patchify", "unpatchify",
    ],
    "maskdm.engine": [
        "Average", "Checkpoint", "Lost", "Machine", "PowerAverages", "Precision", "Probe", "Progress", "Ranks", "Skipped", "StageProgress",
        "Step",
        "Switch", "Trainer",
        "Transfer", "autocast", "available_memory", "environment", "give_back_freed_memory", "joined", "keep_freed_memory",
        "learning_rate", "make_optimizer", "matrix_ceiling", "more_pieces", "out_of_memory", "peak_memory", "reset_peak_memory",
        "this_machine", "transfer",
    ],
    "maskdm.sampling": ["MaskDMPipeline", "make_scheduler", "offered", "seeded", "slerp"],
    "maskdm.evaluation": [
        "DenoisingLoss", "Estimate", "Evaluation", "Extractor", "FeatureNetwork", "ImageSet", "Images",
        "KernelDistance", "Labels", "Manifold", "Matches", "Neighbours", "Progress", "Searcher", "SelfNetwork",
        "Statistics", "Subject", "cached_self", "colour_drift", "denoising_loss", "digest", "evaluate_samples", "fill",
        "frechet_distance", "frechet_halves", "frechet_infinity", "frechet_ratio", "frechet_standard_error", "is_self",
        "kernel_distance", "load_network", "load_self", "manifold", "nearest", "overfitting", "train_self",
    ],
    "maskdm.export": ["CODE", "SAMPLER", "Facts", "bundle", "card", "write_folder", "write_onnx", "write_program"],
    "maskdm.recipes": ["OFFERED", "RECIPES", "Choice", "choose", "recipe"],
    "maskdm.report": ["compare_runs", "write_report"],
    "maskdm.runs": [
        "CompareRequest", "Display", "DistilRequest", "Diverged", "EditRequest", "EvaluateRequest", "ExportRequest", "Interrupted", "Lost",
        "PackRequest", "PushRequest", "SampleRequest", "SweepRequest", "TrainRequest",
        "compare", "compare_reports", "describe_data", "distil_run", "draw_run", "edit", "ema_sweep", "evaluate", "export", "pack_data",
        "parse_formats", "parse_lengths", "plan", "push", "report_run", "sample_run", "train",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name])
    assert all(getattr(module, each) is not None for each in module.__all__)
