"""Train the small classifier whose features ``sdit evaluate`` uses; this takes about ten minutes on one core.

    python perf/train_classifier.py --dataset fashion_mnist --out sdit/fashion_mnist_classifier.safetensors
    python perf/train_classifier.py --dataset cifar10 --size 28 --out cifar10_28.safetensors

The script uses one thread, so the result only depends on the arguments: the same machine and versions write the same bytes. It
trains with AdamW, one cycle of the learning rate, batches of 128, and matrix multiplications in bfloat16. Images are mirrored
if the data set allows it, and shifted by up to --shift pixels.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from perf import harness
from sdit.checkpoint import save
from sdit.classifier import Classifier, features, label_accuracy
from sdit.data import DATASETS, Order, load, to_batch
from sdit.files import sha256


def train(classifier, data, *, epochs, shift, lr, batch_size=128, seed=0, progress=print):
    """Train ``classifier``, in place, on ``data``."""
    order, steps = Order(len(data), seed), len(data) * epochs // batch_size
    moves = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2)
    classifier.train()
    for step in range(steps):
        index, flips = order.indices(step, batch_size), order.flips(step, batch_size)
        x = to_batch(data.images[index], classifier, flips if data.mirror else None)
        if shift:
            down, right = torch.randint(2 * shift + 1, (2,), generator=moves).tolist()
            x = F.pad(x, (shift,) * 4, value=-1.0)[..., down:, right:][..., : x.shape[2], : x.shape[3]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(classifier(x.contiguous(memory_format=torch.channels_last)).float(), data.labels[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        if (step + 1) % (steps // 10 or 1) == 0:
            progress(f"step {step + 1}/{steps}: cross entropy {loss.item():.3f}")
    return classifier.eval().requires_grad_(False)


def save_classifier(path, classifier):
    fields = ("channels", "image_size", "names", "dataset", "widths")
    save(path, {"classifier": classifier.state_dict()}, {"classifier": {name: getattr(classifier, name) for name in fields}})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=DATASETS, required=True)
    p.add_argument("--data", metavar="FOLDER", help="folder of the data set, if it is not in a usual place")
    p.add_argument("--size", type=int, help="resize the images to SIZE x SIZE pixels, the image size of the model to evaluate")
    p.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE", help="file to write, a .safetensors")
    p.add_argument("--epochs", type=int, default=16, help="passes over the data (%(default)s)")
    p.add_argument("--shift", type=int, default=0, help="largest random shift in pixels (%(default)s)")
    p.add_argument("--lr", type=float, default=1e-2, help="highest learning rate (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="seed of weights, order and shifts (%(default)s)")
    p.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the accuracies to this file")
    p.set_defaults(csv=None, device="cpu")
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    data, test = (load(args.dataset, args.data, split=split, size=args.size) for split in ("train", "test"))
    torch.manual_seed(args.seed)
    _, size, _, channels = data.images.shape
    classifier = Classifier(channels, size, data.names, data.name).to(memory_format=torch.channels_last)
    began = time.process_time()
    train(classifier, data, epochs=args.epochs, shift=args.shift, lr=args.lr, seed=args.seed)
    seconds = time.process_time() - began
    row = {"parameters": sum(parameter.numel() for parameter in classifier.parameters()), "cpu_seconds": round(seconds, 1)}
    for split in (data, test):
        accuracy = label_accuracy(classifier, features(classifier, split.images), split.labels)
        row["test_accuracy" if split is test else "train_accuracy"] = round(accuracy, 5)
    save_classifier(args.out, classifier)
    row["sha256"] = sha256(args.out)
    print(row)
    if args.json:
        harness.save(__doc__.splitlines()[0], [row], args)


if __name__ == "__main__":
    main()
