"""The residual networks for CIFAR of the ResNet paper (arXiv 1512.03385, section 4.2): 6n + 2 layers, shortcuts without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from maskdm.errors import UserError
from maskdm.evaluation.features import FeatureNetwork, batch_on
from maskdm.evaluation.preparation import IMAGENET_MEAN, IMAGENET_STD, Preparation
from maskdm.evaluation.weights import existing_file, fill, read_state, sha256_of

# github.com/akamaster/pytorch_resnet_cifar10 trains on CIFAR-10 with ImageNet's mean and deviation
_PREPARATION = Preparation((32, 32), IMAGENET_MEAN, IMAGENET_STD)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # option A: every second pixel, and zeros for the channels that are new
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """Three stages of `blocks` blocks with `widths` channels; names of weights as in akamaster/pytorch_resnet_cifar10."""

    def __init__(self, widths: tuple[int, int, int], blocks: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks[0], 1)
        self.layer2 = _stage(widths[0], widths[1], blocks[1], 2)
        self.layer3 = _stage(widths[1], widths[2], blocks[2], 2)
        self.linear = nn.Linear(widths[2], num_classes)

    def forward(self, prepared: Float[Tensor, "n 3 _ _"]) -> Float[Tensor, "n _"]:
        """The last stage, averaged over the image: what the classes are read from."""
        x = F.relu(self.bn1(self.conv1(prepared)))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))


@dataclass(frozen=True)
class ResNetNetwork(FeatureNetwork):
    """A CIFAR ResNet: features before its linear layer, and that layer's classes."""

    model: ResNet
    device: torch.device

    def embed(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n _"]:
        """The pooled last stage."""
        features: Tensor = self.model(_PREPARATION(images).to(self.device))
        return features

    def scores(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n _"] | None:
        """The linear layer's."""
        scores: Tensor = self.model.linear(self.embed(images))
        return scores


def load_resnet(path: Path, device: torch.device) -> ResNetNetwork:
    """A network whose depth and widths are those of its weights. UserError for a file of another kind, or none."""
    state = read_state(existing_file(path))
    wrong = f"{path} is no CIFAR ResNet with option-A shortcuts, as akamaster/pytorch_resnet_cifar10 writes them"
    blocks = tuple(sum(key.startswith(f"layer{stage}.") and key.endswith(".conv1.weight") for key in state) for stage in (1, 2, 3))
    try:
        widths = tuple(len(state[f"layer{stage}.0.conv1.weight"]) for stage in (1, 2, 3))
        num_classes = len(state["linear.weight"])
    except KeyError as error:
        raise UserError(f"{wrong}: {error.args[0]} is missing") from error
    with torch.device("meta"):
        model = ResNet((widths[0], widths[1], widths[2]), (blocks[0], blocks[1], blocks[2]), num_classes)
    fill(model, state, wrong)
    name = f"ResNet-{2 * sum(blocks) + 2} ({num_classes} classes)"
    return ResNetNetwork(name, sha256_of(path), widths[2], num_classes, str(_PREPARATION), 4 * batch_on(device), model.to(device), device)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(outputs if i else inputs, outputs, 1 if i else stride) for i in range(blocks)))
