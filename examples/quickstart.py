"""From images to samples in ten lines: train (masked, then whole), draw, measure, export. Six minutes on two cores.

python examples/quickstart.py [NAME=VALUE ...]        settings, such as finetune__budget__minutes=0.5

"digits" are the handwritten ones that scikit-learn brings; put the path of a folder of your own images there, and leave the recipe out.
"""

import sys

import maskdm

settings = dict(word.split("=", 1) for word in sys.argv[1:])
run = maskdm.train("digits", out="runs/quickstart", recipe="digits", **settings)
for number, image in enumerate(run.sample(10, labels=range(10), seed=1)):
    image.resize((64, 64)).save(run.path / f"digit-{number}.png")
figures = run.evaluate(num=500)
print(f"{figures['class_accuracy']:.1%} of the samples are recognised, {figures['class_accuracy_heldout']:.1%} of real images")
run.export("runs/quickstart-model", licence="cc-by-4.0")
