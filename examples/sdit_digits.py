"""Train SDiT, the spiking diffusion transformer, on scikit-learn's handwritten digits from Python, then draw digits with it."""

import argparse
import dataclasses

from sdit import PRESETS
from sdit.sample import sample, save_grid
from sdit.train import TrainSettings, train

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--steps", type=int, default=2000, help="training steps; minutes on two cores (default: %(default)s)")
p.add_argument("--dim", type=int, default=PRESETS["digits"].dim, help="channels of a token (default: %(default)s)")
p.add_argument("--run", default="runs/example", help="folder of the run, for checkpoints and curves (default: %(default)s)")
p.add_argument("--out", default="samples.png", help="file of the picture (default: %(default)s)")
args = p.parse_args()

config = dataclasses.replace(PRESETS["digits"], dim=args.dim)
model = train(config, TrainSettings.of(config, steps=args.steps), args.run)  # returns the averaged weights
labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
images = sample(model, labels, sampler="dpm++", steps=20, guidance=2.0, seed=0)
save_grid(args.out, images, labels)
print(f"{len(labels)} digits in {args.out}")
