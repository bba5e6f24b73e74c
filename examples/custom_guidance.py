"""Any differentiable function of an image guides a network that was trained without it: here digits that are their own mirror images.

python examples/custom_guidance.py [RUN]              after examples/quickstart.py; ten seconds on two cores
"""

import sys

import torch
from torch import Tensor

import maskdm
from maskdm.sampling import seeded
from maskdm.sampling.guidance import METHODS, Steered
from maskdm.sampling.tasks import Fulfil


def asymmetry(images: Tensor) -> Tensor:
    """How far each image [batch, channels, height, width] in -1..1 is from its mirror image [batch]."""
    return (images - images.flip(-1)).square().mean(dim=(1, 2, 3))


run = maskdm.Run(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
pipeline = run.pipeline()
found = {}
for name, guidance in (("free", None), ("guided", Steered(Fulfil(asymmetry), METHODS["full"]))):
    drawn = pipeline(16, [8] * 16, seeded(0, range(16)), num_inference_steps=25, guidance=guidance, output_type="pt").images
    found[name] = asymmetry(drawn * 2 - 1).mean().item()
    sheet = torch.cat([torch.cat(list(row), dim=-1) for row in drawn.split(4)], dim=-2)
    pipeline.numpy_to_pil(sheet.permute(1, 2, 0).cpu().numpy())[0].resize((256, 256)).save(run.path / f"eights-{name}.png")
    print(f"{name}: {found[name]:.4f} from their mirror images, {run.path / f'eights-{name}.png'}")
