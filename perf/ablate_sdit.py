"""Train SDiT with different initial values, settings and sizes, and compare them after equal steps or equal CPU time.

    python perf/ablate_sdit.py --preset fashion_tiny --steps 600 --set bf16=true --json perf/results/sdit_fashion_ablation.json
    python perf/ablate_sdit.py --preset digits --steps 1000
    python perf/ablate_sdit.py --preset fashion_tiny --cpu-seconds 180 --arm "" --arm "lr=3e-4" --arm "dim=192 v_threshold=0.3"

An arm is a list of changes to the preset and its recipe: fields of ``Config`` and ``TrainSettings`` as NAME=VALUE, and

    settings=faithful       use the settings of that variant; ``variant`` still selects the initial values
    old=gate,condition      these parts have the initial values of "faithful": mixing, place, gate, condition, smooth
    std.labels.weight=1     standard deviation of the initial values of a parameter
    averages=0,0.99         keep averages of the weights with these decays too; each has its own row, 0 is the trained weights
    times=power:1.5         train at the times 1000 u^1.5, u uniform in 0..1; above 1, more of them have little noise
    times=logit_normal:-1   train at the times 1000 sigmoid(-1 + z), z normal
    norm=keys               spiking="pure": divide the keys of each token by their root mean square over the channels
    norm=keys_learnt        the same, then multiply each channel by a learnt factor that starts at 1

The default arms are the two variants, the initial values of each with the settings of the other, and "improved" without one of
its changes at a time. All arms use the batch size of the preset's recipe unless they change it.

The script measures the averaged weights if the settings keep an average. On 2,000 test images, with the same noise and uniform
times for all arms, it measures the objective, the mean squared error without labels, the firing rates, and the number of
neurons (channels of a layer) that never fire. On generated images it measures Frechet distance and label accuracy, if the
classifier of the package knows the data set. Otherwise ``label_found`` is the share of generated images that a support vector
machine, trained on real images, assigns to their label. Objectives are only comparable between arms with the same
``prediction``.
"""

import argparse
import copy
import dataclasses
import functools
import json
import pathlib
import re
import sys
import tempfile
import time
from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from sklearn.svm import SVC

import sdit.train
from perf import harness
from sdit import PRESETS, SDiT
from sdit.checkpoint import save
from sdit.classifier import features, label_accuracy, load_classifier
from sdit.cli import field_values
from sdit.config import Config
from sdit.data import load, to_batch, to_uint8
from sdit.diffusion import STEPS, draw, training_loss
from sdit.metrics import frechet_distance
from sdit.pictures import save_grid
from sdit.pure import PureTimeMix, SpikeLinear
from sdit.sample import sample
from sdit.settings import TrainSettings
from sdit.train import train
from sdit_kernels._torch import move_towards

PARTS = {  # {part of the initial values: pattern of parameter names}
    "mixing": r"\.(key|value|receptance|output)\.weight$",
    "place": r"\.(time_decay|time_first|time_mix_\w)$",
    "gate": r"\.tokens_out\.weight$",
    "condition": r"^(time|labels)\.",
    "smooth": r"^smooth\.",
}
NORMS = ("keys", "keys_learnt")
TIMES = {  # {distribution of the training times: function from (u uniform in 0..1, its number) to times / 1000}
    "power": lambda u, exponent: u**exponent,
    "logit_normal": lambda u, mean: (mean + torch.special.ndtri(u)).sigmoid(),
}
SAMPLING, GUIDANCE = 25, (1.0, 1.5)
FIELDS = [{field.name for field in dataclasses.fields(cls)} for cls in (Config, TrainSettings)]
ARMS = ["variant=faithful", "variant=improved", "variant=faithful settings=improved", "variant=improved settings=faithful"]
ARMS += [f"old={part}" for part in PARTS]
ARMS += ["lr=1e-4", "warmup=0", "cosine=false", "clip=0", "ema=0"]


class Patches(NamedTuple):
    """The changes of an arm that are neither fields of Config nor of TrainSettings."""

    old: tuple = ()  # parts with the initial values of "faithful"
    deviations: dict = {}  # {parameter: standard deviation of its initial values}
    averages: tuple = ()  # decays of further averages of the weights
    times: tuple | None = None  # (distribution in TIMES, its number)
    norm: str | None = None  # one of NORMS


def parse_arm(words, preset):
    """Parse an arm: (config, settings, patches)."""
    given = dict(word.split("=", 1) for word in words.split())
    old = tuple(part for part in given.pop("old", "").split(",") if part)
    if set(old) - set(PARTS):
        raise ValueError(f"old= takes {', '.join(PARTS)}, got {','.join(old)}")
    deviations = {name[4:]: float(given.pop(name)) for name in list(given) if name.startswith("std.")}
    averages = tuple(float(decay) for decay in given.pop("averages", "").split(",") if decay)
    times, norm = given.pop("times") if ":" in given.get("times", "") else None, given.pop("norm", None)
    if times is not None:
        kind, _, number = times.partition(":")
        if kind not in TIMES:
            raise ValueError(f"times= takes {', '.join(TIMES)}, each with :NUMBER; got {times}")
        times = kind, float(number)
    if norm not in (None, *NORMS):
        raise ValueError(f"norm= takes {', '.join(NORMS)}, got {norm}")
    variant = given.pop("settings", None)
    unknown = given.keys() - FIELDS[0] - FIELDS[1]
    if unknown:
        raise ValueError(
            "an arm takes fields of Config and TrainSettings, settings, old, std.PARAMETER, averages, times and norm; "
            f"got {min(unknown)!r}"
        )
    config, changes = (
        field_values(cls, [f"{name}={text}" for name, text in given.items() if name in fields])
        for cls, fields in zip((Config, TrainSettings), FIELDS)
    )
    config = dataclasses.replace(PRESETS[preset], **config)
    if norm and config.spiking != "pure":
        raise ValueError(f'norm= takes a network with spiking="pure", got {config.spiking!r}')
    batch_size = TrainSettings.of(PRESETS[preset]).batch_size
    of = dataclasses.replace(config, variant=variant or config.variant)
    settings = TrainSettings.of(of, **{"batch_size": batch_size, "sample_every": 0, "save_every": 10**9} | changes)
    return config, settings, Patches(old, deviations, averages, times, norm)


class NormedKeys(SpikeLinear):
    """The layer of the keys, and behind it a division of each token by its root mean square over the channels."""

    def __init__(self, layer, learnt):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.factor = torch.nn.Parameter(torch.ones(layer.out_features)) if learnt else None

    def forward(self, s):
        k = super().forward(s)
        return F.rms_norm(k.float(), k.shape[-1:], self.factor, eps=1e-6).to(k.dtype)  # bfloat16 sums are too coarse


def build_model(config, patches):
    model = SDiT(config)
    faithful = SDiT(config, variant="faithful").state_dict() if patches.old else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(re.search(PARTS[part], name) for part in patches.old):
                parameter.copy_(faithful[name])
        for name, std in patches.deviations.items():
            torch.nn.init.normal_(model.get_parameter(name), std=std)
    if patches.norm:
        for mix in [m for m in model.modules() if isinstance(m, PureTimeMix)]:
            mix.key = NormedKeys(mix.key, learnt=patches.norm == "keys_learnt")
    return model


def draw_at(times, config, n, generator):
    """Draw as sdit.diffusion.draw does, and then change the distribution of the times; noise and labels stay the same."""
    t, noise, drop = draw(config, n, generator)
    if times:
        kind, number = times
        t = (STEPS * TIMES[kind]((t.double() + 0.5) / STEPS, number)).long()
    return t, noise, drop


class RunWithAverages(sdit.train.Run):
    """A training run that also keeps the averages of ``models``, {decay: None}, and fills in the models."""

    def __init__(self, models, *args):
        super().__init__(*args)
        self.averages = models
        models.update((decay, copy.deepcopy(self.model).requires_grad_(False).eval()) for decay in models)

    def set_rates(self, step):
        self.weights = {decay: torch.tensor(1 - min(decay, (1 + step) / (10 + step))) for decay in self.averages}
        return super().set_rates(step)

    @torch.no_grad()
    def update(self):
        super().update()
        for decay, model in self.averages.items():
            move_towards(list(model.parameters()), self.parameters, self.weights[decay])


def train_arm(config, settings, patches):
    """Train a model; return ({decay of the average: model}, CPU seconds, wall seconds)."""
    models = dict.fromkeys(patches.averages)
    replaced = {
        "SDiT": functools.partial(build_model, patches=patches),
        "draw": functools.partial(draw_at, patches.times),
        "Run": functools.partial(RunWithAverages, models),
    }
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(sdit.train, **replaced):
        cpu, wall = time.process_time(), time.perf_counter()
        model = train(config, settings, folder, progress=False)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {settings.ema: model} | models, cpu, wall


def count_steps(seconds, config, settings, patches):
    """Return the number of steps of an arm that take ``seconds`` of CPU time."""
    _, short, long = (train_arm(config, dataclasses.replace(settings, steps=n), patches)[1] for n in (2, 4, 20))
    return max(1, round(seconds / ((long - short) / 16)))


@torch.no_grad()
def measure_objective(model, test):
    """Measure the objective, firing rates and dead neurons on test images; batch i of 8 has times in the i-th eighth."""
    config, each = model.config, min(250, len(test) // 8)
    losses, without, fired = [], [], {}
    with model.record(fired) as rates:
        for i in range(8):
            g = torch.Generator().manual_seed(i)
            t = torch.randint(STEPS // 8 * i, STEPS // 8 * (i + 1), (each,), generator=g)
            part = slice(i * each, (i + 1) * each)
            x0, y, (_, noise, drop) = to_batch(test.images[part], config), test.labels[part], draw(config, each, g)
            losses.append(training_loss(model, x0, y, t=t, noise=noise, drop=drop))
            without.append(training_loss(model, x0, y, t=t, noise=noise, drop=torch.ones_like(drop))["mse"].item())
    found = {name: round(sum(loss[name].item() for loss in losses) / 8, 5) for name in ("loss", "mse", "vb")}
    found["mse_by_time"] = [round(loss["mse"].item(), 5) for loss in losses]
    found["mse_without_label"] = round(sum(without) / 8, 5)
    found |= {"dead_neurons": sum(int((~some).sum()) for some in fired.values())}
    found["neurons"] = sum(some.numel() for some in fired.values())
    found["rates"] = {name: round(rate.item(), 4) for name, rate in rates.items()}
    return found


def generate(model, n, guidance, bf16):
    labels = torch.arange(n) % model.config.num_classes
    sampler = "euler" if model.config.prediction == "flow" else "dpm++"
    with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
        images = sample(model, labels, sampler=sampler, steps=SAMPLING, guidance=guidance, clip=True, batch_size=100)
    return images, labels


def make_measure(data, test, n):
    """Return (a function from images and labels to measures, the measures of real images).

    The real images are the test split, n images of the train split, and these n with every other one mirrored.
    """
    if data.name == load_classifier().dataset:
        classifier = load_classifier()
        real = features(classifier, test.images)

        def measure(images, labels):
            found = features(classifier, to_uint8(images).permute(0, 2, 3, 1))
            distance, accuracy = frechet_distance(found, real), label_accuracy(classifier, found, labels)
            return {"frechet_distance": round(distance, 3), "label_accuracy": round(accuracy, 4)}

        found = {"label_accuracy_test": round(label_accuracy(classifier, real, test.labels), 4)}
        images = data.images[:n].permute(0, 3, 1, 2) / 127.5 - 1
        half = images.clone()
        half[::2] = images[::2].flip(3)
        for name, x in (("train", images), ("train_half_mirrored", half)):
            found |= {f"{what}_{name}": value for what, value in measure(x, data.labels[:n]).items()}
        return measure, found | {"images_train": n}

    machine = SVC(C=5).fit(data.images[:8000].flatten(1).numpy() / 255, data.labels[:8000].numpy())

    def measure(images, labels):
        return {"label_found": round(machine.score(to_uint8(images).flatten(1).numpy() / 255, labels.numpy()), 4)}

    real = machine.score(test.images[:2000].flatten(1).numpy() / 255, test.labels[:2000].numpy())
    return measure, {"label_found_real": real}


def measure_model(model, test, settings, args, measure, number):
    """Return the measures of a model; ``number`` names its files in the folder of --keep."""
    found = {"parameters": sum(parameter.numel() for parameter in model.parameters())} | measure_objective(model, test)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        meta = {"config": model.config.to_dict(), "settings": dataclasses.asdict(settings), "step": settings.steps}
        save(args.keep / f"{number:02d}.safetensors", {"model": model.state_dict()}, meta)
    if args.images:
        found["images"] = args.images
    for guidance in GUIDANCE if args.images else ():
        images, labels = generate(model, args.images, guidance, settings.bf16)
        found |= {f"{name}_guidance_{guidance:g}": value for name, value in measure(images, labels).items()}
        if args.keep:
            save_grid(args.keep / f"{number:02d}_{guidance:g}.png", images[:100], labels[:100], columns=10)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, required=True)
    p.add_argument("--arm", action="append", metavar="CHANGES", help="an arm; repeatable (default: see above)")
    p.add_argument("--set", default="", metavar="CHANGES", help="changes in every arm, for example bf16=true")
    length = p.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="training steps of every arm")
    length.add_argument("--cpu-seconds", type=float, help="train every arm for about this CPU time")
    p.add_argument("--images", type=int, default=200, help="images to generate per arm (%(default)s)")
    p.add_argument(
        "--json", type=pathlib.Path, metavar="PATH", help="write all rows; arms whose row is in the file do not run again"
    )
    p.add_argument("--keep", type=pathlib.Path, metavar="FOLDER", help="save the models and grids of the generated images here")
    p.set_defaults(csv=None, device="cpu")
    args = p.parse_args()
    torch.set_num_threads(1)  # the CPU time of several threads would include their waiting

    name = PRESETS[args.preset].dataset
    data, test = load(name), load(name, split="test")
    measure, real = make_measure(data, test, args.images) if args.images else (None, {})
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    asked = {"steps": args.steps} if args.steps else {"cpu_seconds": args.cpu_seconds}
    for words in ARMS if args.arm is None else args.arm:
        words = " ".join(f"{args.set} {words}".split())
        config, settings, patches = parse_arm(words, args.preset)
        identity = {"arm": words, "asked": asked, "config": config.to_dict()}
        if any(identity == {key: row[key] for key in identity} for row in rows) or (
            "gate" in patches.old and not config.reconstruction
        ):
            continue
        settings = dataclasses.replace(settings, steps=args.steps or count_steps(args.cpu_seconds, config, settings, patches))
        models, cpu, wall = train_arm(config, settings, patches)
        start = {"arm": words, "asked": asked, "steps": settings.steps, "batch_size": settings.batch_size}
        start |= {"cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}
        for decay, model in models.items():
            row = start | {"ema": decay}
            row |= measure_model(model, test, settings, args, measure, len(rows))
            row |= {"config": config.to_dict(), "settings": dataclasses.asdict(settings)}
            row["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            rows.append(row)
            print({key: value for key, value in row.items() if key not in ("config", "settings", "rates")}, flush=True)
        harness.save(__doc__.splitlines()[0], rows, args, **real)  # once for all averages, so that none is skipped later


if __name__ == "__main__":
    main()
