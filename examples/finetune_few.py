"""Masked pre-training on many images, then whole images of the few one cares for. About six minutes on one core.

python examples/finetune_few.py [NAME=VALUE ...]      settings of all three runs, such as budget__steps=300

Many: white digits on black, none of which is among the few. Few: sixty black ones on white. A run that saw nothing but the few, as
many steps, is what it is compared with.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import maskdm
from maskdm.config import Budget, DiTConfig, PatchMask, Stage

settings = dict(word.split("=", 1) for word in sys.argv[1:])
images = np.asarray(load_digits().images) / 16
for name, chosen in (("few", 1 - images[:60]), ("many", images[60:])):
    folder = Path("runs/images", name)
    if not folder.is_dir():  # written again they would be other data, with which no run goes on
        folder.mkdir(parents=True)
        for number, pixels in enumerate(chosen):
            Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"{number:04}.png")

network = {"model": DiTConfig(width=128, depth=7, heads=4, patch=2), "image_size": 8, "channels": 1}
masked = Stage("pretrain", Budget(steps=500), PatchMask(0.5), batch=128, lr=1.5e-3, warmup=100)
many = maskdm.train("runs/images/many", "runs/many", recipe="transfer-pretrain", stages=[masked], **network | settings)

whole = {"recipe": "transfer", "heldout": 0.3, "budget__images": 8000, "intervals__evaluate": 100}
tuned = maskdm.train("runs/images/few", "runs/few", init=many, **whole | network | settings)
scratch = maskdm.train("runs/images/few", "runs/few-from-scratch", lr=1e-3, **whole | network | settings)

losses = {run: [record["loss"] for record in run.metrics if record["event"] == "heldout"] for run in (tuned, scratch)}
for run, of_run in losses.items():
    print(f"{run.path}: held-out loss {min(of_run):.3f} at best; samples in {run.path / 'samples.png'}")
