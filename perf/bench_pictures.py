"""Measure the images of trained models at several settings, and estimate the energy of an image.

    python perf/bench_pictures.py --model hybrid=runs/hybrid --model pure=runs/pure --guidance 1 --guidance 1.5 --steps 10
        --steps 20 --json perf/results/fashion_mnist_pictures.json
    python perf/bench_pictures.py --model pretrained --sampler ddpm --steps 250 --json perf/results/fashion_mnist_pictures.json
    python perf/bench_pictures.py --plot perf/results/fashion_mnist_pictures.png --json perf/results/fashion_mnist_pictures.json

Every combination of the settings is one row: the measures of ``sdit evaluate``, and millijoules of an image. Rows that are in
the file of --json are not measured again, so that a stopped run continues. Choose settings with the images of another --seed.
The energy is the energy of one pass of the network (``sdit info``, on 256 noisy training images) times the number of passes of
an image: one per step, and a second one where guidance is not 1.
"""

import argparse
import itertools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness
from sdit.checkpoint import load_model, newest
from sdit.data import load
from sdit.evaluate import draw, evaluate
from sdit.files import sha256
from sdit.info import info, noisy_batch
from sdit.sampler import make_scheduler

SAMPLING = ("sampler", "steps", "guidance", "guidance_interval")
SETTINGS = (*SAMPLING, "noise_scale", "clip", "seed", "bf16")


def measure_energy(model, images=256):
    """Return {kind: millijoules of one pass}."""
    data = load(model.config.dataset, model.trained_on.get("root"), size=model.config.image_size)
    found = info(model, noisy_batch(model.config, data, images))
    names = ("mac", "arithmetic", "with_memory", "quantised")
    return {name: found.energy[name] for name in names}


def count_passes(config, sampler, steps, guidance, interval):
    """Return the passes of the network for an image."""
    times = make_scheduler(sampler, steps, config).timesteps.tolist()
    low, high = (0, 1000) if interval is None else interval
    return len(times) + sum(guidance != 1 and low <= t <= high for t in times)


def measure(path, row, energy):
    """Add the measures to a row of settings."""
    settings = {key: row[key] for key in SETTINGS}
    images, labels, _ = draw(path, row["n"], batch_size=100, **settings)
    passes = count_passes(load_model(path).config, *(row[key] for key in SAMPLING))
    row |= {"passes": passes, "energy_mj": {kind: round(passes * mj, 4) for kind, mj in energy.items()}}
    found = evaluate(images, labels)
    return row | {part: found[part] for part in ("drawn", "floor", "test")}


def plot(path, rows):
    """Draw Frechet distance against the energy of an image: per model, the best guidance at every number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    most = max(row["n"] for row in rows)
    rows = [row for row in rows if (row["n"], row["sampler"]) == (most, "dpm++")]
    colors = dict(zip(dict.fromkeys(row["model"] for row in rows), ("#0072b2", "#d55e00", "#009e73")))
    kinds = {"arithmetic": "arithmetic", "with_memory": "with memory", "quantised": "integers, with memory"}
    with pyplot.rc_context({"font.size": 9}):
        figure, panels = pyplot.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained", facecolor="white")
        for axes, (kind, title) in zip(panels, kinds.items(), strict=True):
            for model, color in colors.items():
                best = {}
                for row in rows:
                    if row["model"] == model:
                        steps, distance = row["steps"], row["drawn"]["frechet_distance"]
                        if steps not in best or distance < best[steps][1]:
                            best[steps] = row["energy_mj"][kind], distance, row
                points = [best[steps] for steps in sorted(best)]
                axes.plot([x for x, *_ in points], [y for _, y, _ in points], "o-", color=color, label=model, markersize=4)
                for x, y, row in points:
                    axes.annotate(f"{row['steps']}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
            axes.set(xscale="log", yscale="log", xlabel="mJ for an image")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("{x:g}")
            axes.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
            axes.set_title(title, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"Frechet distance, {most:,} images")
        panels[0].legend(frameon=False)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def parse_model(word):
    name, _, path = word.rpartition("=")
    return name or path, newest(path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", default=[], metavar="NAME=CHECKPOINT", type=parse_model, help="repeatable")
    p.add_argument("--sampler", default="dpm++", help="%(default)s")
    p.add_argument("--steps", action="append", type=int, help="repeatable (20)")
    p.add_argument("--guidance", action="append", type=float, help="repeatable (1)")
    p.add_argument("--interval", nargs=2, type=float, metavar=("LOW", "HIGH"), help="guidance only at these times")
    p.add_argument("--noise-scale", action="append", type=float, help="repeatable (1)")
    p.add_argument("--clip", action="store_true", help="as in sdit sample")
    p.add_argument("-n", type=int, default=5000, help="images (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="%(default)s")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--json", type=pathlib.Path, metavar="FILE", help="read and write the rows")
    p.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw the rows of --json into this PNG file")
    p.set_defaults(csv=None, device="cpu")
    args = p.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for name, path in args.model:
        torch.manual_seed(0)
        digest, energy = sha256(path), None
        for steps, guidance, scale in itertools.product(args.steps or [20], args.guidance or [1.0], args.noise_scale or [1.0]):
            interval = args.interval if guidance != 1 else None
            wanted = {"model": name, "checkpoint_sha256": digest, "n": args.n, "seed": args.seed, "bf16": args.bf16}
            wanted |= dict(zip(SAMPLING, (args.sampler, steps, guidance, interval)), noise_scale=scale, clip=args.clip)
            if any(all(row.get(key) == value for key, value in wanted.items()) for row in rows):
                continue
            energy = energy or measure_energy(load_model(path))
            rows.append(row := measure(path, wanted, energy))
            of = row["drawn"]
            print(
                f"{name}, {steps} steps, guidance {guidance:g}{f' at {interval}' if interval else ''}"
                f"{f', noise scale {scale:g}' if scale != 1 else ''}{', clip' if args.clip else ''}: distance "
                f"{of['frechet_distance']:.4f}, precision {of['precision']:.3f}, recall {of['recall']:.3f}, label accuracy "
                f"{of['label_accuracy']:.3f}, {row['energy_mj']['arithmetic']:.2f} mJ",
                flush=True,
            )
            harness.save(__doc__.splitlines()[0], rows, args)
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    main()
