"""What is learned: the images, the network, and how images are noised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from maskdm.config.check import require


@dataclass(frozen=True)
class Data:
    """Where the images come from and how each becomes an array of height x width x channels."""

    source: Annotated[str, "folder, shards or URL of shards, table, data set folder, array, or a built-in name (digits, emoji)"]
    image_size: Annotated[tuple[int, int], "height and width in pixels: 64, or 64x96"]
    channels: Annotated[Literal[1, 3], "1 for gray, 3 for RGB"] = 3
    conditional: Annotated[bool, "learn the classes, where the data has them"] = False
    fit: Annotated[Literal["crop", "pad", "stretch"], "how an image of another shape is fitted: centre crop, pad, or stretch"] = "crop"
    background: Annotated[str, "colour laid under transparent images and around padded ones, as #rrggbb"] = "#ffffff"
    flip: Annotated[float, "probability that a training image is mirrored left to right"] = 0.0
    heldout: Annotated[float, "share of the images never trained on, kept for evaluation (5 000 at most)"] = 0.05
    limit: Annotated[int | None, "images trained on, drawn at random from those not held out; none: all"] = None
    max_broken: Annotated[float, "share of unreadable files that is skipped; above it the run is refused"] = 0.05
    shuffle: Annotated[int, "images of shards mixed with each other; twice as many are held in memory, by all processes together"] = 4096
    autoencoder: Annotated[str | None, "folder or hub id of a diffusers autoencoder, whose latents are learned; none: pixels"] = None
    latent_factor: Annotated[int, "pixels of a latent, down and across; read from the autoencoder"] = 1
    latent_channels: Annotated[int, "channels of a latent; read from the autoencoder"] = 0
    latent_mean: Annotated[tuple[float, ...], "mean of each channel of the latents; measured on the training images"] = ()
    latent_std: Annotated[tuple[float, ...], "standard deviation of each; measured"] = ()

    def __post_init__(self) -> None:
        height, width = self.image_size
        require(min(height, width) >= 4, f"data.image_size is {height}x{width}; the least is 4 pixels a side")
        require(max(height, width) <= 4096, f"data.image_size is {height}x{width}; the most is 4096 pixels a side")
        require(0 <= self.flip <= 1, f"data.flip is {self.flip}; give a probability from 0 to 1")
        require(0 <= self.heldout <= 0.5, f"data.heldout is {self.heldout}; give a share from 0 to 0.5")
        require(self.limit is None or self.limit >= 1, f"data.limit is {self.limit}; give at least 1, or none")
        require(0 <= self.max_broken <= 1, f"data.max_broken is {self.max_broken}; give a share from 0 to 1")
        require(self.shuffle >= 1, f"data.shuffle is {self.shuffle}; give a number of images, such as 4096")
        digits = self.background.removeprefix("#")
        good = len(digits) == 6 and all(c in "0123456789abcdefABCDEF" for c in digits)
        require(good, f"data.background is '{self.background}'; write a colour as #rrggbb, such as #ffffff")
        pixels = self.autoencoder is None
        require(
            not pixels or (self.latent_factor, self.latent_channels) == (1, 0),
            "data.latent_factor and latent_channels go with data.autoencoder",
        )
        counts = {len(self.latent_mean), len(self.latent_std)}
        require(counts in ({0}, {self.latent_channels}), "data.latent_mean and latent_std need a figure for each latent channel")

    @property
    def field_size(self) -> tuple[int, int]:
        """Height and width of what the network sees: in pixels, or latents."""
        return self.image_size[0] // self.latent_factor, self.image_size[1] // self.latent_factor

    @property
    def field_channels(self) -> int:
        """Channels of what the network sees."""
        return self.latent_channels or self.channels


# --- models -------------------------------------------------------------------------------------------------------

Transform = Literal["pixels", "haar"]
TRANSFORM = "what patches are cut from: pixels, or Haar wavelets at half the size, approximation and detail a token each"


class _Patched:
    """How a network's tokens lie in an image."""

    patch: int
    transform: Transform

    @property
    def side(self) -> int:
        """Side in pixels of what a patch covers: a coefficient of a wavelet stands for 2 x 2 pixels."""
        return 2 * self.patch if self.transform == "haar" else self.patch

    @property
    def sets(self) -> int:
        """Tokens of a patch: wavelets have one of the approximation and one of the detail."""
        return 2 if self.transform == "haar" else 1

    def tokens(self, size: tuple[int, int]) -> int:
        """Tokens of a whole image of this height and width in pixels, conditions not counted."""
        return (size[0] // self.side) * (size[1] // self.side) * self.sets


def swiglu_width(width: int, mlp_ratio: float) -> int:
    """Hidden width of a SwiGLU with the parameters of a GELU MLP of this ratio, in whole tiles of 32."""
    return -(-int(width * mlp_ratio * 2 / 3) // 32) * 32


FUSE = "blocks at either end past which inner ones may be skipped, joined again by a layer (SPRINT); 0: no such layer"
DIAL = "least and largest guidance scale that is told the network as a condition, for the lesson guided: 1,4; none: it takes none"
SHORTCUTS = "most sampling steps whose number is told the network as a condition, for the lesson shortcut; 0: it takes none"
TOKEN = "a learned token that stands for hidden patches in the last blocks, for the mask decode (MaskDiT)"


def _check_conditions(dial: tuple[float, float] | None, shortcuts: int) -> None:
    good = dial is None or (0 <= dial[0] <= 1 <= dial[1] and dial[0] < dial[1])
    require(good, f"model.dial is {dial}; give two guidance scales with 1, which is none, in their range, such as 1,4")
    require(shortcuts == 0 or shortcuts >= 2, f"model.shortcuts is {shortcuts}; give 0, or at least 2")


def _check_transformer(width: int, depth: int, heads: int, patch: int, mlp_ratio: float, fuse: int) -> None:
    require(min(width, depth, heads, patch) >= 1, "model.width, depth, heads and patch must be at least 1")
    require(0 <= 2 * fuse < depth, f"model.fuse is {fuse}; give 0, or blocks at either end that leave some of the {depth} between them")
    require(mlp_ratio > 0, f"model.mlp_ratio is {mlp_ratio}; it must be above 0")
    require(width % heads == 0, f"model.width {width} is not a multiple of model.heads {heads}")


@dataclass(frozen=True)
class UViTConfig(_Patched):
    """The paper's network: a ViT with long skip connections, every condition a token (arXiv 2209.12152)."""

    kind: ClassVar[str] = "uvit"
    width: Annotated[int, "features per token"] = 512
    depth: Annotated[int, "depth setting; 2 * (depth // 2) + 1 blocks are built"] = 13
    heads: Annotated[int, "attention heads; must divide the width"] = 8
    patch: Annotated[int, "side of a patch, in pixels or wavelet coefficients; must divide the image, or half of it"] = 4
    mlp_ratio: Annotated[float, "hidden width of the MLP over the width"] = 4.0
    qkv_bias: Annotated[bool, "a bias on the query, key and value projections"] = False
    transform: Annotated[Transform, TRANSFORM] = "pixels"
    fuse: Annotated[int, FUSE] = 0
    mask_token: Annotated[bool, TOKEN] = False
    dial: Annotated[tuple[float, float] | None, DIAL] = None
    shortcuts: Annotated[int, SHORTCUTS] = 0

    def __post_init__(self) -> None:
        _check_transformer(self.width, self.depth, self.heads, self.patch, self.mlp_ratio, self.fuse)
        _check_conditions(self.dial, self.shortcuts)
        require(self.width % 2 == 0, f"model.width {self.width} must be even, for the sinusoidal time token")


@dataclass(frozen=True)
class DiTConfig(_Patched):
    """A modern transformer: adaLN-zero, RMSNorm, 2-D rotary positions, QK-norm, SwiGLU (arXiv 2212.09748 and later)."""

    kind: ClassVar[str] = "dit"
    width: Annotated[int, "features per token"] = 384
    depth: Annotated[int, "number of blocks"] = 12
    heads: Annotated[int, "attention heads; the width per head must be a multiple of 4"] = 6
    patch: Annotated[int, "side of a patch, in pixels or wavelet coefficients; must divide the image, or half of it"] = 4
    mlp_ratio: Annotated[float, "hidden width of a GELU MLP with the parameters that the SwiGLU one has"] = 4.0
    transform: Annotated[Transform, TRANSFORM] = "pixels"
    fuse: Annotated[int, FUSE] = 0
    mask_token: Annotated[bool, TOKEN] = False
    dial: Annotated[tuple[float, float] | None, DIAL] = None
    shortcuts: Annotated[int, SHORTCUTS] = 0

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return swiglu_width(self.width, self.mlp_ratio)

    def __post_init__(self) -> None:
        _check_transformer(self.width, self.depth, self.heads, self.patch, self.mlp_ratio, self.fuse)
        _check_conditions(self.dial, self.shortcuts)
        per_head = self.width // self.heads
        require(per_head % 4 == 0, f"model.width {self.width} over model.heads {self.heads} is {per_head}; make it a multiple of 4")


Model = UViTConfig | DiTConfig


# --- diffusion ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UniformWeight:
    """Every noise level counts the same."""

    kind: ClassVar[str] = "uniform"


@dataclass(frozen=True)
class MinSNRWeight:
    """min(SNR, gamma), in terms of x0, translated to the target in use (arXiv 2303.09556)."""

    kind: ClassVar[str] = "min-snr"
    gamma: Annotated[float, "largest signal-to-noise ratio that counts"] = 5.0

    def __post_init__(self) -> None:
        require(self.gamma > 0, f"diffusion.weight.gamma is {self.gamma}; it must be above 0")


@dataclass(frozen=True)
class UniformTimesteps:
    """Timesteps uniform over the schedule."""

    kind: ClassVar[str] = "uniform"


@dataclass(frozen=True)
class LogitNormalTimesteps:
    """t / 1000 = sigmoid(mean + std * normal): the middle noise levels more often (arXiv 2403.03206)."""

    kind: ClassVar[str] = "logit-normal"
    mean: Annotated[float, "centre, before the sigmoid; above 0 favours high noise"] = 0.0
    std: Annotated[float, "spread, before the sigmoid"] = 1.0

    def __post_init__(self) -> None:
        require(self.std > 0, f"diffusion.timesteps.std is {self.std}; it must be above 0")


@dataclass(frozen=True)
class Diffusion:
    """How images are noised and what the network is asked for."""

    schedule: Annotated[Literal["linear", "cosine", "vp", "flow"], "noise: DDPM's linear, cosine, the VP-SDE, or rectified flow"] = "cosine"
    target: Annotated[Literal["eps", "x0", "v"], "what the network predicts: the noise, the image, or the velocity"] = "eps"
    weight: Annotated[UniformWeight | MinSNRWeight, "weight of a noise level in the loss: uniform or min-snr"] = UniformWeight()
    timesteps: Annotated[UniformTimesteps | LogitNormalTimesteps, "how timesteps are drawn: uniform or logit-normal"] = UniformTimesteps()
    stratified: Annotated[bool, "spread the timesteps of a batch evenly over their distribution"] = False
    label_drop: Annotated[float, "share of the labels replaced by the null class in training, which guidance needs"] = 0.1

    def __post_init__(self) -> None:
        blind = self.schedule == "flow" and self.target == "eps"  # at full noise x_t is the noise, and its image unknowable
        require(not blind, "diffusion.target eps does not go with schedule flow; use v or x0")
        require(0 <= self.label_drop <= 1, f"diffusion.label_drop is {self.label_drop}; give a share from 0 to 1")
