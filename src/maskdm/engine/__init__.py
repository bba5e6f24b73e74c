"""The training engine: the loop, its state on disk, and weights from elsewhere."""

from __future__ import annotations

from maskdm.engine.checkpoint import Checkpoint
from maskdm.engine.hardware import (
    Machine,
    Precision,
    autocast,
    environment,
    give_back_freed_memory,
    keep_freed_memory,
    matrix_ceiling,
    out_of_memory,
    this_machine,
)
from maskdm.engine.memory import available_memory, more_pieces, peak_memory, reset_peak_memory
from maskdm.engine.optim import Average, PowerAverages, learning_rate, make_optimizer
from maskdm.engine.progress import Progress, Skipped, StageProgress, Step
from maskdm.engine.ranks import Lost, Ranks, joined
from maskdm.engine.switch import Probe, Switch
from maskdm.engine.trainer import Trainer
from maskdm.engine.weights import Transfer, transfer

__all__ = [
    "Average",
    "Checkpoint",
    "Lost",
    "Machine",
    "PowerAverages",
    "Precision",
    "Probe",
    "Progress",
    "Ranks",
    "Skipped",
    "StageProgress",
    "Step",
    "Switch",
    "Trainer",
    "Transfer",
    "autocast",
    "available_memory",
    "environment",
    "give_back_freed_memory",
    "joined",
    "keep_freed_memory",
    "learning_rate",
    "make_optimizer",
    "matrix_ceiling",
    "more_pieces",
    "out_of_memory",
    "peak_memory",
    "reset_peak_memory",
    "this_machine",
    "transfer",
]
