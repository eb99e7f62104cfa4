"""The command ``sdit``; each of its sub-commands is one call of the Python API.

Every import that takes time is inside ``main``, which answers Ctrl-C at any moment.
"""

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path

__all__ = ["main"]

_TRAIN = """\
Train a model, with a progress bar that shows loss and mean firing rate.

  sdit train --preset digits                            minutes on two cores, no GPU
  sdit train --preset fashion_mnist --bf16              on a GPU
  sdit train --preset digits --set variant=faithful --out runs/faithful
  sdit train --preset digits --set prediction=flow --set learn_sigma=false --out runs/flow
  sdit train --preset fashion_tiny --set dataset=folder --set num_classes=2 --data photos --out runs/photos
  sdit train --resume runs/digits                       goes on after a crash, a kill or Ctrl-C
  torchrun --nproc-per-node 2 -m sdit train --preset mnist

The data set "folder" is your own images: photos/cat/1.png, photos/dog/a.jpg, ... are two classes, cat and dog, of any size;
with folders photos/train and photos/test, the classes are in these. Colour images need --set channels=3.

The folder of the run holds checkpoints, metrics.jsonl, pictures in samples/ and TensorBoard's files where it is installed.
One process trains in it at a time. --resume remembers all of the command that began the run; --data, --device, --steps,
--accumulate, --keep and the --*-every can be given other values.
"""
_SAMPLE = """\
Draw images with a trained model: a labelled grid, beside it a GIF of the denoising.

  sdit sample                                           Fashion-MNIST, by the model in the package
  sdit sample runs/digits                               forty images, the classes in turn
  sdit sample runs/digits --labels 3,1,4 -n 30 --guidance 2 --out 314.png
"""
_EVALUATE = """\
Say how good images are: Frechet distance, KID and label accuracy in the features of a small classifier, beside real images.

  sdit evaluate runs/fashion -n 5000 --sampler dpm++ --steps 50 --json fashion.json
  sdit evaluate --images samples.npz                    what sdit sample --npz wrote
  sdit evaluate runs/digits --classifier digits.safetensors

The package has a classifier for Fashion-MNIST; perf/train_classifier.py trains others. What is drawn is kept in
~/.cache/sdit/evaluate (to be deleted at any time): the same command goes on where one was stopped, or to a larger -n.
"""
_CONVERT = """\
Turn a checkpoint of the research code (.pt) into one of this package. Nothing in the file is executed.

  sdit convert model.pt model.safetensors
"""
_INFO = """\
What a model costs: parameters, multiply-adds, memory of a training step, firing rate of each layer on real data, energy.

  sdit info mnist                                       an untrained preset
  sdit info runs/digits                                 a trained model
  sdit info pretrained                                  the model in the package

Images of the data set are looked for on this machine, nothing is downloaded.
"""
_PLOT = """\
Draw the curves of a run: loss, gradient, firing rates, speed.

  sdit plot runs/digits --out curves.png
"""

_SETTINGS = {  # help of the fields of TrainSettings
    "steps": "steps of the optimiser, in all",
    "batch_size": "images of one step, over all processes and parts",
    "accumulate": "parts of a step, computed one after the other to save memory",
    "lr": "learning rate of AdamW, above 0",
    "weight_decay": "weight decay of AdamW",
    "warmup": "steps over which the learning rate rises",
    "cosine": "let the learning rate fall to 0 along a cosine, or not",
    "clip": "largest norm of the gradient, 0 for no limit",
    "ema": "decay of the average of weights, 0 for none",
    "flip": "mirror half of the images, where their class allows it, or not",
    "bf16": "compute matrix multiplications in bfloat16, or not",
    "seed": "seed of the initial weights and everything drawn",
    "log_every": "steps between lines of metrics.jsonl",
    "sample_every": "steps between pictures in samples/, 0 for none",
    "save_every": "steps between checkpoints",
    "keep": "checkpoints to keep, the newest",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help says more)\n")


def _parser():
    from .config import PRESETS
    from .data import DATASETS
    from .diffusion import SAMPLERS
    from .settings import TrainSettings

    def command(name, text, run):
        raw = argparse.RawDescriptionHelpFormatter
        lines = text.splitlines()
        part = commands.add_parser(name, help=re.split("[,:]|[.] ", lines[0])[0], description=text, formatter_class=raw)
        part.add_argument("--debug", action="store_true", help="show the traceback of an error")
        part.set_defaults(run=run)
        return part

    def data(part):
        where = "$SDIT_DATA, data/, ~/.cache/sdit and /usr/share/datasets"
        part.add_argument("--data", metavar="FOLDER", help=f"where the data set's files are, if not in {where}")

    device = "cpu, cuda, cuda:1, ..; a GPU where there is one if left out"

    def sampling(part):  # what is left out has the default of the Python function
        def option(name, text, **kind):
            part.add_argument(name, help=text, default=argparse.SUPPRESS, **kind)

        option("--sampler", "ddpm (the default), ddim, dpm++; for a model with prediction=flow euler (the default), heun")
        given = ", ".join(f"{k}: {v}" for k, v in SAMPLERS.items())
        option("--steps", f"steps of the sampler ({given}); of ddim a divisor of 1000", type=int, metavar="N")
        option("--guidance", "classifier-free guidance, 1 for none (1)", type=float, metavar="X")
        option("--threshold", "threshold of all neurons, if not the trained one", type=float, metavar="X")
        option("--clip", "limit the predicted image to [-1, 1] in every step", action="store_true")
        option("--seed", "each image is a function of it and of its place (0)", type=int, metavar="N")
        option("--batch-size", "images at a time (64)", type=int, metavar="N")
        option("--ema", "take the averaged weights (the default)", action=argparse.BooleanOptionalAction)
        option("--bf16", "compute matrix multiplications in bfloat16", action="store_true")
        option("--device", device)

    def change(part):
        part.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes",
            help="change a field of the preset, as T=8, spiking=wkv, dim=256, variant=faithful, dataset=folder; repeatable "
                 "(depth=2 is three blocks: depth // 2 before the middle one and as many after it)",
        )  # fmt: skip

    text = "SDiT, the Spiking Diffusion Transformer: train it, draw images with it, measure it."
    parser = _Parser(prog="sdit", description=text, epilog="sdit COMMAND --help says more about each.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    part = command("train", _TRAIN, _train)
    part.add_argument("--preset", metavar="NAME", help=f"what to train: {', '.join(PRESETS)}")
    part.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, from its newest checkpoint")
    part.add_argument("--out", metavar="RUN", help="folder for the run (runs/NAME)")
    data(part)
    change(part)
    part.add_argument("--device", help=device)
    group = part.add_argument_group("settings", "left out: what suits the preset; run.json of a run says what was taken")
    for field in dataclasses.fields(TrainSettings):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type, "metavar": "N"}
        group.add_argument(f"--{field.name.replace('_', '-')}", default=None, help=_SETTINGS[field.name], **kind)

    part = command("sample", _SAMPLE, _sample)
    part.add_argument(
        "checkpoint", nargs="?", default="pretrained",
        help="a .safetensors file, the folder of a run, whose newest checkpoint is taken, or the package's (%(default)s)",
    )  # fmt: skip
    part.add_argument("--out", default="samples.png", help="the grid, a .png; .gif and .npz get the same name (%(default)s)")
    part.add_argument(
        "--labels", default="all",
        help="all (the classes in turn), random, or numbers and names of classes with commas between, none for no class "
             "(%(default)s)",
    )  # fmt: skip
    part.add_argument("-n", type=int, help="images (40, or one for each label named)")
    part.add_argument("--npz", action="store_true", help="also write images and labels as arrays")
    part.add_argument("--gif", action=argparse.BooleanOptionalAction, default=True, help="write the denoising (the default)")
    sampling(part)

    part = command("evaluate", _EVALUATE, _evaluate)
    part.add_argument("checkpoint", nargs="?", help="a .safetensors file, the folder of a run, or pretrained")
    part.add_argument("--images", metavar="FILE", help="measure this .npz: images (N, S, S, C) uint8, labels (N,)")
    part.add_argument("-n", type=int, help="images, at least 129 (1000; all of --images)")
    part.add_argument(
        "--classifier", metavar="FILE", help="of perf/train_classifier.py (the one in the package, Fashion-MNIST)"
    )
    part.add_argument("--json", metavar="FILE", help="write the figures, and all they depend on")
    part.add_argument("--npz", metavar="FILE", help="write the images that were drawn, and their labels, as arrays")
    data(part)
    sampling(part)

    part = command("convert", _CONVERT, _convert)
    part.add_argument("source", metavar="in.pt", help="a checkpoint of the research code")
    part.add_argument("target", metavar="out.safetensors", help="the file to write")
    part.add_argument("--dataset", metavar="NAME", help=f"what it was trained on, to be kept: {', '.join(DATASETS)}")

    part = command("info", _INFO, _info)
    part.add_argument("model", help=f"a checkpoint, the folder of a run, pretrained, or a preset: {', '.join(PRESETS)}")
    part.add_argument("--batch-size", type=int, default=8, metavar="N", help="images to measure on (8)")
    data(part)
    change(part)

    part = command("plot", _PLOT, _plot)
    part.add_argument("folder", metavar="RUN", help="folder of a run")
    part.add_argument("--out", metavar="FILE", help="a .png (curves.png in the folder)")
    return parser


def _config(preset, changes):
    """A preset with fields changed as ``FIELD=VALUE`` says."""
    from .config import PRESETS

    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return dataclasses.replace(PRESETS[preset], **field_values(PRESETS[preset], changes))


def field_values(dataclass, changes) -> dict:
    """{field: value} of ``FIELD=VALUE`` words."""
    fields = {field.name: field.type for field in dataclasses.fields(dataclass)}
    values = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"--set takes FIELD=VALUE with FIELD one of {', '.join(fields)}, got {change!r}")
        try:
            if fields[name] is bool:
                values[name] = {"true": True, "false": False}[value.lower()]
            else:
                values[name] = fields[name](value) if fields[name] in (int, float) else value
        except (ValueError, KeyError):
            kind = {int: "an int", float: "a number", bool: "true or false"}[fields[name]]
            raise ValueError(f"--set {name} must be {kind}, got {value!r}") from None
    return values


def _train(args):
    from .checkpoint import about, newest
    from .settings import TrainSettings
    from .train import train

    if bool(args.preset) == bool(args.resume):
        raise ValueError("give --preset to start a run, or --resume to go on with one")
    given = {name: value for name in _SETTINGS if (value := getattr(args, name)) is not None}
    if args.resume:
        if args.changes or args.out:
            raise ValueError("--resume takes the model and the folder as they are, without --set and --out")
        if not Path(args.resume).is_dir():
            what = "is not a folder" if Path(args.resume).exists() else "does not exist"
            raise ValueError(f"--resume takes the folder of a run, which sdit train --out made; {args.resume} {what}")
        meta, out = about(path := newest(args.resume)), args.resume
        try:
            settings = TrainSettings(**meta["settings"] | given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be resumed, it holds no settings of this version's trainer: {error}") from None
        train(None, settings, out, resume=True, root=args.data, device=args.device)
        more = f"its {settings.steps:,} steps were done before; --steps N goes on" if meta["step"] >= settings.steps else ""
    else:
        config, more = _config(args.preset, args.changes), ""
        if args.out == "":
            raise ValueError("--out must name a folder, got ''")
        out = args.out or f"runs/{args.preset}"
        train(config, TrainSettings.of(config, **given), out, root=args.data, device=args.device)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"done: sdit sample {out}, sdit plot {out}" + (more and f" ({more})"))


def _sample(args):
    from .sample import run

    apart = ("command", "debug", "run", "checkpoint", "out")
    run(args.checkpoint, args.out, **{name: value for name, value in vars(args).items() if name not in apart})


def _evaluate(args):
    from .evaluate import run

    apart = ("command", "debug", "run", "checkpoint", "json", "data")
    given = {name: value for name, value in vars(args).items() if name not in apart}
    run(args.checkpoint, report=args.json, root=args.data, **given)


def _convert(args):
    from .checkpoint import save_model
    from .data import DATASETS
    from .research import load_research

    target = Path(args.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"the file to write must end in .safetensors, got {args.target!r}")
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it, or choose another name")
    if args.dataset is not None and args.dataset not in DATASETS:
        raise ValueError(f"--dataset must be one of {', '.join(DATASETS)}, got {args.dataset!r}")
    model = load_research(args.source)
    model.config = dataclasses.replace(model.config, dataset=args.dataset)
    save_model(target, model)
    c = model.config
    print(f"{target}: {c.image_size}x{c.image_size}x{c.channels}, patch {c.patch_size}, {c.dim} wide, depth {c.depth} "
          f"({len(model.blocks)} blocks)")  # fmt: skip


def _info(args):
    import torch

    from .checkpoint import load_model
    from .config import PRESETS
    from .data import load, to_batch
    from .diffusion import STEPS, add_noise
    from .info import info
    from .model import SDiT

    if args.model in PRESETS and not Path(args.model).exists():
        torch.manual_seed(0)
        model = SDiT(_config(args.model, args.changes))
    else:
        if args.changes:
            raise ValueError("--set is for presets, a trained model is what it is")
        if not Path(args.model).exists() and args.model != "pretrained":
            raise FileNotFoundError(f"{args.model} is neither a file, nor a folder, nor a preset: {', '.join(PRESETS)}")
        model = load_model(args.model)
    n, config = args.batch_size, model.config
    if n < 1:
        raise ValueError(f"--batch-size must be at least 1, got {n}")
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(n) * STEPS // n + STEPS // (2 * n)  # spread over all times
    noise = torch.randn(n, config.channels, config.image_size, config.image_size, generator=generator)
    try:
        if config.dataset is None:
            raise FileNotFoundError("the model does not say which data set it is for (sdit convert --dataset NAME)")
        data = load(config.dataset, args.data or model.trained_on.get("root"), size=config.image_size, download=False)
    except FileNotFoundError as error:
        print(info(model, (noise, t, torch.arange(n) % config.num_classes)))
        print(f"\nFiring rates, and what follows from them, are of noise, not of images: {_in_options(str(error), args)}")
        return
    chosen = torch.randint(len(data), (n,), generator=generator)
    x0 = to_batch(data.images[chosen], config)
    xt, t, _ = add_noise(config, x0, noise, t)
    print(info(model, (xt, t, data.labels[chosen])))


def _plot(args):
    from .plot import plot

    print(plot(args.folder, args.out))


def _in_options(text, args):
    """An error of the Python API in words of the command line: batch_size is --batch-size, dim is --set dim, root is --data."""
    text = re.sub(r"\w+ \((--[\w-]+)\)", r"\1", text)  # the library's own "root (--data)"
    words = {"root": "--data", "name": "--set dataset", "n": "-n"}
    if "changes" in args:
        from .config import Config

        words |= {field.name: f"--set {field.name}" for field in dataclasses.fields(Config)}
    own = {name: f"--{name.replace('_', '-')}" for name in vars(args) if name not in _NOT_OPTIONS}
    return re.sub(r"^(?:config\.|settings\.)?(\w+)(?=[ :])", lambda match: (own | words).get(match[1], match[0]), text)


_NOT_OPTIONS = ("command", "run", "changes", "checkpoint", "source", "target", "model", "folder")


def _let_threads_rest():
    """Let torch's OpenMP threads spin for 0.1 ms when they wait, not for milliseconds, before they go to sleep.

    Where other processes want the cores, a spinning thread takes the time of the thread that it waits for: perf/bench_load.py.
    OpenMP reads the variable when torch is imported. What the user has set stays.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(argv: list[str] | None = None) -> int:
    """Run ``sdit`` with these arguments; the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    command, args = "sdit", argparse.Namespace(debug=False)
    try:
        _let_threads_rest()
        args = _parser().parse_args(argv)
        command = f"sdit {args.command}"
        args.run(args)
    except KeyboardInterrupt as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{command}: {str(stopped) or 'stopped'}", file=sys.stderr)
        exec("")  # an interrupt inside exec, as of a dataclass, leaves a flag by which python -m dies of SIGINT; this clears it
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if args.debug:
            raise
        named = isinstance(error, OSError) and error.filename
        text = f"{error.filename}: {error.strerror}" if named else _in_options(" ".join(str(error).split()), args)
        print(f"{command}: error: {text or type(error).__name__}", file=sys.stderr)
        return 2
    return 0
