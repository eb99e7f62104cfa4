"""Train SDiT with different initial values, settings and sizes, and compare them after equal steps or equal CPU time.

    python perf/ablate_sdit.py --preset fashion_tiny --steps 600 --set bf16=true --json perf/results/sdit_fashion_ablation.json
    python perf/ablate_sdit.py --preset digits --steps 1000
    python perf/ablate_sdit.py --preset fashion_tiny --cpu-seconds 180 --arm "" --arm "lr=3e-4" --arm "dim=192 v_threshold=0.3"

An arm is a list of changes to the preset and its recipe: fields of ``Config`` and ``TrainSettings`` as NAME=VALUE, and

    settings=faithful       use the settings of that variant; ``variant`` still selects the initial values
    old=gate,condition      these parts have the initial values of "faithful": mixing, place, gate, condition, smooth
    std.labels.weight=1     standard deviation of the initial values of a parameter

The default arms are the two variants, the initial values of each with the settings of the other, and "improved" without one of
its changes at a time. All arms use the batch size of the preset's recipe unless they change it.

The script measures the averaged weights if the settings keep an average. On 2,000 test images, with the same noise and times
for all arms, it measures the objective, the mean squared error without labels, the firing rates, and the number of neurons
(channels of a layer) that never fire. On generated images it measures Frechet distance and label accuracy, if the classifier of
the package knows the data set. Otherwise ``label_found`` is the share of generated images that a support vector machine,
trained on real images, assigns to their label. Objectives are only comparable between arms with the same ``prediction``.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import sys
import tempfile
import time
from contextlib import nullcontext
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
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
from sdit.sample import sample
from sdit.settings import TrainSettings
from sdit.train import train

PARTS = {  # {part of the initial values: pattern of parameter names}
    "mixing": r"\.(key|value|receptance|output)\.weight$",
    "place": r"\.(time_decay|time_first|time_mix_\w)$",
    "gate": r"\.tokens_out\.weight$",
    "condition": r"^(time|labels)\.",
    "smooth": r"^smooth\.",
}
SAMPLING, GUIDANCE = 25, (1.0, 1.5)
FIELDS = [{field.name for field in dataclasses.fields(cls)} for cls in (Config, TrainSettings)]
ARMS = ["variant=faithful", "variant=improved", "variant=faithful settings=improved", "variant=improved settings=faithful"]
ARMS += [f"old={part}" for part in PARTS]
ARMS += ["lr=1e-4", "warmup=0", "cosine=false", "clip=0", "ema=0"]


def parse_arm(words, preset):
    """Parse an arm: (config, settings, parts with the values of "faithful", {parameter: standard deviation})."""
    given = dict(word.split("=", 1) for word in words.split())
    old = [part for part in given.pop("old", "").split(",") if part]
    if set(old) - set(PARTS):
        raise ValueError(f"old= takes {', '.join(PARTS)}, got {','.join(old)}")
    deviations = {name[4:]: float(given.pop(name)) for name in list(given) if name.startswith("std.")}
    variant = given.pop("settings", None)
    unknown = given.keys() - FIELDS[0] - FIELDS[1]
    if unknown:
        raise ValueError(f"an arm takes fields of Config and TrainSettings, settings, old, std.PARAMETER; got {min(unknown)!r}")
    config, changes = (
        field_values(cls, [f"{name}={text}" for name, text in given.items() if name in fields])
        for cls, fields in zip((Config, TrainSettings), FIELDS)
    )
    config = dataclasses.replace(PRESETS[preset], **config)
    batch_size = TrainSettings.of(PRESETS[preset]).batch_size
    of = dataclasses.replace(config, variant=variant or config.variant)
    settings = TrainSettings.of(of, **{"batch_size": batch_size, "sample_every": 0, "save_every": 10**9} | changes)
    return config, settings, old, deviations


def build_model(config, old, deviations):
    model = SDiT(config)
    faithful = SDiT(config, variant="faithful").state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(re.search(PARTS[part], name) for part in old):
                parameter.copy_(faithful[name])
        for name, std in deviations.items():
            torch.nn.init.normal_(model.get_parameter(name), std=std)
    return model


def train_arm(config, settings, old, deviations):
    """Train a model; return (model, CPU seconds, wall seconds)."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(
        sdit.train, "SDiT", functools.partial(build_model, old=old, deviations=deviations)
    ):  # fmt: skip
        cpu, wall = time.process_time(), time.perf_counter()
        model = train(config, settings, folder, progress=False)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return model, cpu, wall


def count_steps(seconds, *arm):
    """Return the number of steps of an arm that take ``seconds`` of CPU time."""
    config, settings, *rest = arm
    _, short, long = (train_arm(config, dataclasses.replace(settings, steps=n), *rest)[1] for n in (2, 4, 20))
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
        config, settings, *initial = parse_arm(words, args.preset)
        identity = {"arm": words, "asked": asked, "config": config.to_dict()}
        if any(identity == {key: row[key] for key in identity} for row in rows) or (
            "gate" in initial[0] and not config.reconstruction
        ):
            continue
        settings = dataclasses.replace(settings, steps=args.steps or count_steps(args.cpu_seconds, config, settings, *initial))
        model, cpu, wall = train_arm(config, settings, *initial)
        row = {"arm": words, "asked": asked, "steps": settings.steps, "batch_size": settings.batch_size}
        row |= {"cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}
        row |= {"parameters": sum(parameter.numel() for parameter in model.parameters())} | measure_objective(model, test)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            meta = {"config": config.to_dict(), "settings": dataclasses.asdict(settings), "step": settings.steps}
            save(args.keep / f"{len(rows):02d}.safetensors", {"model": model.state_dict()}, meta)
        if args.images:
            row["images"] = args.images
        for guidance in GUIDANCE if args.images else ():
            images, labels = generate(model, args.images, guidance, settings.bf16)
            row |= {f"{name}_guidance_{guidance:g}": value for name, value in measure(images, labels).items()}
            if args.keep:
                save_grid(args.keep / f"{len(rows):02d}_{guidance:g}.png", images[:100], labels[:100], columns=10)
        row |= {"config": config.to_dict(), "settings": dataclasses.asdict(settings)}
        row["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        rows.append(row)
        print({key: value for key, value in row.items() if key not in ("config", "settings", "rates")}, flush=True)
        harness.save(__doc__.splitlines()[0], rows, args, **real)


if __name__ == "__main__":
    main()
