"""Does masking pay on these images? Whole-image training against masked, at equal time and on the same seeds, with a verdict.

python examples/compare_arms.py [BUDGET [NAME=VALUE ...]]     ten minutes on two cores, of which eight are training

In place of "digits" goes a folder of your own; docs/guide.md says what else an arm may be.
"""

import sys

import maskdm

budget, *words = sys.argv[1:] or ["2m"]
settings = dict(word.split("=", 1) for word in words)
arms = "whole,masked=patch-50@60"
found = maskdm.compare("digits", "runs/compare", budget=budget, arms=arms, seeds=2, num=200, recipe="digits", **settings)
for name, arm in found["arms"].items():
    low, high = arm["loss_interval"]
    print(f"{name:8} {arm['images']:8.0f} images, held-out loss {arm['loss']:.4f} ({low:.4f} to {high:.4f})")
for verdict in found["verdicts"]:
    print(verdict["text"])
