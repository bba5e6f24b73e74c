"""What training costs in arithmetic, counted from the configuration alone."""

from __future__ import annotations

from maskdm.config import Config, Convert, Denoise, DiTConfig, Guided, Halve, Mask, NoMask, Shortcut, Stage, UViTConfig
from maskdm.masking import num_sequences, tokens_of_blocks


def ideal_speedup(config: Config, mask: Mask) -> float:
    """How much cheaper the blocks' arithmetic is per image under a mask: (1/r) (6d + N) / (6d + rN) at keep rate r in all blocks."""
    return _blocks(config, NoMask()) / _blocks(config, mask)


def flops(config: Config, mask: Mask, images: int | float) -> float:
    """Arithmetic of the blocks, forward and backward, for training images.

    3 ((8 + 4 r) n d^2 + 4 n^2 d) for a block on n tokens, r the MLP's ratio, a U-ViT's tokens of time and class among them; 36 d^2 for a
    DiT's modulation of a sequence; 12 n d^2 for each long skip of a U-ViT, and for the layer behind `model.fuse`. Layers that adapters keep
    as they are have no gradients of their own: two thirds of that; the adapters' arithmetic, some per cent, is left out.
    """
    model = config.model
    tokens, width = _tokens(config, mask), model.width
    match model:
        case UViTConfig():
            tokens = [n + 1 + config.data.conditional for n in tokens]
            joined, per_token, per_sequence = tokens[config.blocks // 2 + 1 :], (8 + 4 * model.mlp_ratio) * width**2, 0
        case DiTConfig():
            joined, per_token, per_sequence = [], 8 * width**2 + 6 * width * model.hidden, 12 * width**2
    joined = [*joined, tokens[-1]] if model.fuse else joined
    layers = sum(n * per_token + per_sequence for n in tokens) + 4 * sum(joined) * width**2
    each = (2.0 if config.lora.rank else 3.0) * layers + 3.0 * sum(4 * n**2 * width for n in tokens)
    return images * num_sequences(mask) * each


def stage_flops(config: Config, stage: Stage, images: int | float) -> float:
    """As `flops`, with the forward passes of a stage's teacher, of which three cost what a training step does."""
    guided = 2.0 if config.model.dial else 1.0
    match stage.lesson:
        case Denoise() | Convert():
            passes = 0.0
        case Guided() | Halve():
            passes = 2.0
        case Shortcut():  # of a quarter of the batch two steps, of the rest the teacher
            passes = 0.5 + 0.75 * guided
    return flops(config, stage.mask, images) * (1 + passes / 3)


def tokens_per_image(config: Config, mask: Mask) -> int:
    """Tokens of an image that the first block works on, over all its sequences."""
    return num_sequences(mask) * _tokens(config, mask)[0]


def _blocks(config: Config, mask: Mask) -> float:
    """Arithmetic of a forward pass through the blocks, per image, at an MLP ratio of 4."""
    width = config.model.width
    return float(num_sequences(mask) * sum(24 * n * width**2 + 4 * n**2 * width for n in _tokens(config, mask)))


def _tokens(config: Config, mask: Mask) -> list[int]:
    """Tokens that each of the network's blocks works on, of one sequence."""
    return [config.model.sets * patches for patches in tokens_of_blocks(mask, config.grid, config.blocks)]
