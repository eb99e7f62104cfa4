"""Initial values and settings of training, faithful against improved, on digits: each sees as many images, in about equal time.

Prints and writes, for each of the four pairs: seconds, the objective on the test images, and the share of generated digits that
a support vector machine trained on the real ones takes for the label asked for (of the real test images: in the file too).

    python perf/ablate_digits.py --json perf/results/sdit_digits_ablation.json
"""

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
from sklearn.svm import SVC

from sdit import PRESETS
from sdit.data import load, to_batch, to_uint8
from sdit.diffusion import training_loss
from sdit.sample import sample
from sdit.train import TrainSettings, train


def judge(model, machine, test):
    config = model.config
    x0 = to_batch(test.images, config)
    with torch.no_grad():
        losses = [training_loss(model, x0, test.labels, torch.Generator().manual_seed(i)) for i in range(10)]
    labels = torch.arange(200) % 10
    found = {name: sum(loss[name].item() for loss in losses) / len(losses) for name in ("loss", "mse", "vb")}
    for guidance in (1.0, 2.0):
        images = to_uint8(sample(model, labels, sampler="ddim", guidance=guidance, clip=True, batch_size=200))
        found[f"label_found_guidance_{guidance:g}"] = machine.score(images.flatten(1).numpy() / 16, labels.numpy())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64_000, help="for each run to see (%(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    digits, test = load("digits"), load("digits", split="test")
    machine = SVC(gamma=0.002).fit(digits.images.flatten(1).numpy() / 16, digits.labels.numpy())
    rows = []
    for initial in ("faithful", "improved"):
        config = dataclasses.replace(PRESETS["digits"], variant=initial)
        for settings in ("faithful", "improved"):
            s = TrainSettings.of(dataclasses.replace(config, variant=settings))
            s = dataclasses.replace(s, steps=args.images // s.batch_size, sample_every=0, save_every=10**9)
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                model = train(config, s, folder, progress=False)
                seconds = time.perf_counter() - began
            row = {"initial_values": initial, "settings": settings, "steps": s.steps, "batch_size": s.batch_size}
            rows.append(row | {"seconds": round(seconds, 1)} | judge(model, machine, test))
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        about = {"command": "python perf/ablate_digits.py", "images": args.images, "config": PRESETS["digits"].to_dict()}
        about |= {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        real = machine.score(test.images.flatten(1).numpy() / 16, test.labels.numpy())
        args.json.write_text(json.dumps(about | {"label_found_real": real, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
