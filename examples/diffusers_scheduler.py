"""A diffusers scheduler in place of the run's, and the run in diffusers without maskdm's pipeline. Ten seconds on two cores.

python examples/diffusers_scheduler.py [RUN]          after examples/quickstart.py
"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler

import maskdm

run = maskdm.Run(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
labels = list(range(10))

pipeline = run.pipeline()
pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
ours = pipeline(10, labels, torch.Generator().manual_seed(0), num_inference_steps=12).images

# the folder brings its code along: whoever has diffusers can open it, maskdm or not
folder = run.export(run.path.with_name("quickstart-diffusers"), licence="cc-by-4.0")
elsewhere = DiffusionPipeline.from_pretrained(folder, custom_pipeline="maskdm_pipeline", trust_remote_code=True)
elsewhere.scheduler = UniPCMultistepScheduler.from_config(elsewhere.scheduler.config)
theirs = elsewhere(10, labels, torch.Generator().manual_seed(0), num_inference_steps=12).images

for number, image in enumerate(theirs):
    image.resize((64, 64)).save(Path(run.path, f"unipc-{number}.png"))
print(f"{type(elsewhere).__module__}: the same images: {all(a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))}")
