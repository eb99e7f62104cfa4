"""Measure what is lost where tokens become spikes, for several neurons of SDiT in spikes alone, and the quality of the models.

    python perf/spike_information.py --steps 4000 --json perf/results/spike_information.json
    python perf/spike_information.py --arm=-8..8+learnt --steps 1500 --images 0
    python perf/spike_information.py --cpu-seconds 600 --arm=-4..4+learnt --arm=binary+learnt --seed 1
    python perf/spike_information.py --json perf/results/spike_information.json --plot perf/results/spike_information.png
    python perf/spike_information.py --dry-run        # seconds: trains and measures almost nothing

Each arm trains ``--preset`` for the same steps, or for the same CPU time, with other neurons. Its words, with + between them:

    -4..4, 0..4, -1..1, ..   integer levels between two numbers (the hidden neurons: from 0), in one step
    binary                   T = 4 steps of a neuron that fires 0 or 1, without leak, soft reset; the current is x / (T theta)
    learnt                   the factor of the threshold is learnt; otherwise it keeps its initial value, 0.5
    scale                    binary only: the current of each of the T steps has a learnt factor

On test images at eight groups of times, the script measures for each neuron, as means over its calls:

    error        sum of (s theta - x)^2 / sum of x^2: what the next layer cannot see
    information  mutual information of x and s, in bits. s is a function of x, so it is the entropy of s, per channel, and then
                 the mean over channels. log2(9) = 3.17 is the most for -4..4
    rate         share of s that is not 0

and for the model the objective, and Frechet distance and label accuracy of ``--images`` generated images. A background process
can run it: arms whose row is in the file of ``--json`` do not run again.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

import sdit.train
from perf import harness
from perf.ablate_sdit import generate, make_measure, measure_objective
from sdit import PRESETS, SDiT
from sdit.data import Images, load
from sdit.pure import Spikes
from sdit.settings import TrainSettings
from sdit_kernels import lif, lif_rate

T = 4
ARMS = ["-4..4+learnt", "0..4+learnt", "binary+learnt", "binary+learnt+scale", "-4..4", "0..4", "binary", "-1..1+learnt"]
KINDS = {  # of neurons, for the chart: the part of their names
    "mix, in": "attention.neuron",
    "mix, out": "attention.gated",
    "MLP, in": "mlp.neuron",
    "MLP, hidden": "mlp.hidden",
    "skip": "skip_neurons",
    "last": "final",
    "condition": "condition",
}


class BinarySpikes(Spikes):
    """T steps of 0 and 1 under a constant current; the layer behind it sees their sum, as it is linear."""

    def __init__(self, scaled):
        super().__init__(0, T)
        self.scale = torch.nn.Parameter(torch.ones(T)) if scaled else None

    def forward(self, x):
        current = self.normalise(x) / T
        neuron = dict(tau=float("inf"), decay_input=False, v_threshold=1.0, v_reset=None)
        if self.scale is None:
            s = lif_rate(current, T, **neuron) * T
        else:
            s = lif(current * self.scale.view(T, *[1] * x.dim()), **neuron).sum(0)
        if self.recorder is not None:
            self.recorder("", (s != 0).detach())
        return s.to(x.dtype)


def parse_arm(arm):
    """Return (levels or None for binary, whether thresholds are learnt, whether steps have a scale)."""
    kind, *words = arm.split("+")
    binary = kind == "binary"
    try:
        levels = None if binary else tuple(map(int, kind.split("..")))
        if set(words) - {"learnt", "scale"} or ("scale" in words and not binary) or not (binary or levels[0] < levels[1]):
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(f"an arm is LO..HI or binary, with +learnt, and for binary +scale; got {arm!r}") from None
    return levels, "learnt" in words, "scale" in words


def build_model(config, arm):
    levels, learnt, scaled = parse_arm(arm)
    model = SDiT(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, Spikes):
            neuron = BinarySpikes(scaled) if levels is None else Spikes(min(0, levels[0]) if module.lo else 0, levels[1])
            neuron.log_factor.requires_grad_(learnt)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, neuron)
    return model


class Information:
    """What one neuron loses, from its inputs and spikes in all calls."""

    def __init__(self):
        self.lost = self.power = self.fired = self.count = 0.0
        self.histogram = None

    def __call__(self, neuron, args, s):
        x, s = args[0].detach().flatten(0, -2), s.detach().double().flatten(0, -2)
        self.lost += (s * neuron.thresholds(x) - x).square().sum().item()
        self.power += x.double().square().sum().item()
        self.fired += (s != 0).sum().item()
        self.count += s.numel()
        lo = neuron.lo
        found = torch.nn.functional.one_hot((s - lo).long(), neuron.hi - lo + 1).sum(0)  # (C, levels)
        self.histogram = found if self.histogram is None else self.histogram + found

    def figures(self):
        p = self.histogram / self.histogram.sum(1, keepdim=True)
        bits = -torch.special.xlogy(p, p).sum(1) / torch.log(torch.tensor(2.0))
        return {
            "error": round(self.lost / self.power, 4),
            "information": round(bits.mean().item(), 3),
            "rate": round(self.fired / self.count, 4),
        }


def measure_information(model, test):
    """Return ({neuron: figures}, {name: objective figures}) of the test images."""
    neurons = {name: m for name, m in model.named_modules() if isinstance(m, Spikes)}
    found = {name: Information() for name in neurons}
    handles = [neurons[name].register_forward_hook(found[name]) for name in neurons]
    objective = measure_objective(model, test)
    for handle in handles:
        handle.remove()
    return {name: part.figures() for name, part in found.items()}, objective


def train_arm(arm, config, settings, data):
    """Return (model, CPU seconds)."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sdit.train, "SDiT", lambda c: build_model(c, arm)):
        seconds = time.process_time()
        model = sdit.train.train(config, settings, folder, data=data, progress=False)
        return model, time.process_time() - seconds


def count_steps(cpu_seconds, arm, config, settings, data):
    """Return the number of steps that take so long."""
    _, short, long = (train_arm(arm, config, dataclasses.replace(settings, steps=n), data)[1] for n in (2, 4, 40))
    return max(1, round(cpu_seconds / ((long - short) / 36)))


def run_arm(arm, config, settings, data, test):
    model, seconds = train_arm(arm, config, settings, data)
    neurons, objective = measure_information(model, test)
    row = {"arm": arm, "seed": settings.seed, "steps": settings.steps, "cpu_seconds": round(seconds, 1)}
    row |= {key: objective[key] for key in ("loss", "mse", "mse_by_time", "mse_without_label")}
    for key in ("error", "information", "rate"):
        row[f"mean_{key}"] = round(sum(figures[key] for figures in neurons.values()) / len(neurons), 4)
    return row | {"neurons": neurons}, model


def plot(path, rows):
    """Draw error and information of each neuron, and the test error against the mean information, of rows of the same steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = dict(zip(ARMS, pyplot.get_cmap("tab10").colors))
    rows = [row for row in rows if "wanted_cpu_seconds" not in row and row["arm"] in ARMS]
    first = {row["arm"]: row for row in reversed(rows) if row["seed"] == min(other["seed"] for other in rows)}
    shown = [arm for arm in ARMS if arm in first]
    with pyplot.rc_context({"font.size": 9}):
        figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.2), layout="constrained", facecolor="white")
        for axes, key, title in (
            (panels[0], "error", "error"),
            (panels[1], "information", "bits"),
        ):
            start, ticks = 0, {}
            for kind, ending in KINDS.items():
                names = [name for name in first[shown[0]]["neurons"] if ending in name]
                for arm in shown:
                    values = [first[arm]["neurons"][name][key] for name in names]
                    places = range(start, start + len(values))
                    axes.plot(places, values, "o-", color=colors[arm], label=arm, markersize=3, linewidth=1)
                ticks[start + (len(names) - 1) / 2] = kind
                start += len(names) + 2
            axes.set(title=f"{title}, by kind, first block to last")
            axes.set_xticks(list(ticks), list(ticks.values()), rotation=30, ha="right")
        panels[0].set_ylim(0)
        for row in rows:
            label = row["arm"] if row is first.get(row["arm"]) else None
            panels[2].plot(row["mean_information"], row["mse"], "o", color=colors[row["arm"]], label=label, markersize=5)
        panels[2].set(xlabel="mean bits of a neuron", title="loss on test images, each seed")
        panels[2].legend(frameon=False, fontsize=7)
        for axes in panels:
            axes.title.set_size(10)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="fashion_pure", choices=[n for n, c in PRESETS.items() if c.spiking == "pure"])
    p.add_argument("--steps", type=int, default=4000, help="training steps of every arm (%(default)s)")
    p.add_argument("--cpu-seconds", type=float, help="train every arm for so long instead")
    p.add_argument("--seed", type=int, default=0, help="of weights, images and noise (%(default)s)")
    p.add_argument("--arm", action="append", help=f"repeatable, --arm=-4..4 (default: {' '.join(ARMS)})")
    p.add_argument("--images", type=int, default=500, help="images to generate per arm, 0 for none (%(default)s)")
    p.add_argument(
        "--json", type=pathlib.Path, metavar="PATH", help="write the rows; arms that are in the file do not run again"
    )
    p.add_argument("--plot", type=pathlib.Path, metavar="PATH", help="draw the rows of --json into this PNG file, and end")
    p.add_argument("--dry-run", action="store_true", help="a narrow model, two steps, random images: does it run?")
    p.set_defaults(csv=None, device="cpu")
    args = p.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    if args.plot:
        plot(args.plot, rows)
        return
    torch.set_num_threads(1)  # the CPU time of several threads would include their waiting
    arms = ARMS if args.arm is None else args.arm
    for arm in arms:
        parse_arm(arm)

    config, changes = PRESETS[args.preset], {"sample_every": 0, "save_every": 10**9, "bf16": True, "seed": args.seed}
    if args.dry_run:
        config, args.steps, args.images = dataclasses.replace(config, dim=16, depth=2), 2, 0
        pixels = torch.randint(256, (16, config.image_size, config.image_size, config.channels), dtype=torch.uint8)
        data = test = Images("random", pixels, torch.arange(16) % config.num_classes, ())
        changes["batch_size"] = 4
    else:
        data, test = load(config.dataset), load(config.dataset, split="test")
    settings = TrainSettings.of(config, steps=args.steps, **changes)
    measure, real = make_measure(data, test, args.images) if args.images else (None, {})
    for arm in arms:
        length = {"wanted_cpu_seconds": args.cpu_seconds} if args.cpu_seconds else {"steps": args.steps}
        wanted = {"arm": arm, "seed": args.seed, "images": args.images, **length}
        if any(all(row.get(key) == value for key, value in wanted.items()) for row in rows):
            continue
        if args.cpu_seconds:
            settings = dataclasses.replace(settings, steps=count_steps(args.cpu_seconds, arm, config, settings, data))
        row, model = run_arm(arm, config, settings, data, test)
        row |= wanted
        if args.images:
            row |= measure(*generate(model, args.images, 1.0, settings.bf16))
        row["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        rows.append(row)
        print({key: value for key, value in row.items() if key != "neurons"}, flush=True)
        harness.save(__doc__.splitlines()[0], rows, args, config=config.to_dict(), **real)


if __name__ == "__main__":
    main()
