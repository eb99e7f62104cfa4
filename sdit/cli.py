"""The command ``sdit``. Each sub-command is one call of the Python API.

Slow imports are inside ``main``, so that Ctrl-C during an import ends the command without a traceback.
"""

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path

from .files import PRETRAINED

__all__ = ["main"]

_TRAIN = """\
Train a model, with a progress bar that shows loss and mean firing rate.

  sdit train --preset digits                            minutes on two cores, no GPU
  sdit train --preset fashion_mnist --bf16              on a GPU
  sdit train --preset digits --set variant=faithful --out runs/faithful
  sdit train --preset fashion_pure --bf16               every matrix multiplication sees spikes
  sdit train --preset digits --set prediction=flow --set learn_sigma=false --out runs/flow
  sdit train --preset fashion_tiny --set dataset=folder --set num_classes=2 --data photos --out runs/photos
  sdit train --resume runs/digits                       continue after a crash, a kill or Ctrl-C
  sdit train --initial pretrained --steps 2000 --out runs/mine    start from the weights of a model
  torchrun --nproc-per-node 2 -m sdit train --preset mnist

The data set "folder" holds your own images, of any size, in one folder per class: photos/cat/1.png, photos/dog/a.jpg, ...
If there are folders photos/train and photos/test, these hold the class folders. Colour images need --set channels=3.

The folder of the run holds checkpoints, metrics.jsonl, pictures in samples/ and TensorBoard's files if it is installed. Only
one process can train in it at a time. --resume takes all options of the command that began the run; it can change --data,
--device, --steps, --accumulate, --keep, --tf32, --compile, --graph and the --*-every.
"""
_SAMPLE = """\
Draw images with a trained model: a labelled grid, and a GIF of the denoising.

  sdit sample                                           Fashion-MNIST, with the model in this package
  sdit sample pretrained-hybrid                         the same, with the model whose layers output firing rates
  sdit sample runs/digits                               forty images, the classes in turn
  sdit sample runs/digits --labels 3,1,4 -n 30 --guidance 2 --out 314.png
"""
_EVALUATE = """\
Measure images: Frechet distance, KID, precision, recall and label accuracy in the features of a small classifier, compared
with real images.

  sdit evaluate runs/fashion -n 5000 --sampler dpm++ --steps 50 --json fashion.json
  sdit evaluate samples.npz                             images from sdit sample --npz
  sdit evaluate runs/digits --classifier digits.safetensors

The package has a classifier for Fashion-MNIST; perf/train_classifier.py trains others. The images are kept in
~/.cache/sdit/evaluate, so the same command continues after a stop, and a larger -n reuses them. You may delete that folder.
"""
_CONVERT = """\
Convert a checkpoint of the research code (.pt) to a checkpoint of this package. No code in the file is executed.

  sdit convert model.pt model.safetensors
"""
_INFO = """\
Show the cost of a model: parameters, multiply-adds, memory of a training step, firing rates on real data, energy.

  sdit info mnist                                       an untrained preset
  sdit info runs/digits                                 a trained model
  sdit info pretrained                                  the model in this package

The firing rates need images of the data set. They are only searched on this machine; nothing is downloaded.
"""
_PLOT = """\
Plot the curves of a run: loss, gradient, firing rates, speed.

  sdit plot runs/digits --out curves.png
"""

_SETTINGS = {  # help of the fields of TrainSettings
    "steps": "total number of optimiser steps",
    "batch_size": "images of one step, over all processes and accumulated parts",
    "accumulate": "number of parts into which a step is split, to save memory",
    "lr": "learning rate of AdamW, above 0",
    "weight_decay": "weight decay of AdamW",
    "warmup": "steps over which the learning rate rises",
    "cosine": "let the learning rate fall to 0 along a cosine",
    "clip": "largest norm of the gradient, 0 for no limit",
    "ema": "decay of the average of the weights, 0 for no average",
    "flip": "mirror half of the images, if mirrored images keep their class",
    "bf16": "compute matrix multiplications in bfloat16",
    "tf32": "on a GPU, compute float32 matrix multiplications in TF32 (the default)",
    "compile": "compile model and loss with torch.compile; the first step takes a minute",
    "graph": "on a GPU, record a step as CUDA graphs and replay them: fewer waits for Python",
    "seed": "seed of the initial weights and all random numbers",
    "log_every": "steps between lines of metrics.jsonl",
    "sample_every": "steps between pictures in samples/, 0 for none",
    "save_every": "steps between checkpoints",
    "keep": "number of checkpoints to keep, the newest",
}


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        """Refuse unknown options here, so that the error names the command and not only sdit."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help says more)\n")


def make_parser():
    from .config import PRESETS
    from .data import DATASETS
    from .sampler import SAMPLERS
    from .settings import TrainSettings

    def command(name, text, run):
        formatter = argparse.RawDescriptionHelpFormatter
        lines = text.splitlines()
        part = commands.add_parser(name, help=re.split("[,:]|[.] ", lines[0])[0], description=text, formatter_class=formatter)
        part.add_argument("--debug", action="store_true", help="show the traceback of an error")
        part.set_defaults(run=run)
        return part

    def data(part):
        where = "$SDIT_DATA, data/, ~/.cache/sdit and /usr/share/datasets"
        part.add_argument("--data", metavar="FOLDER", help=f"folder of the data set (default: searched in {where})")

    device = "cpu, cuda, cuda:1, .. (default: a GPU if there is one)"

    def sampling(part):  # SUPPRESS: an option that is not given gets the default of the Python function
        def option(name, text, **kind):
            part.add_argument(name, help=text, default=argparse.SUPPRESS, **kind)

        option("--sampler", "dpm++ (default), ddpm, ddim; for a model with prediction=flow: euler (default), heun")
        default_steps = ", ".join(f"{k}: {v}" for k, v in SAMPLERS.items())
        option("--steps", f"steps of the sampler ({default_steps}); ddim needs a divisor of 1000", type=int, metavar="N")
        otherwise = "(default: as the checkpoint recommends, or"
        option("--guidance", f"classifier-free guidance; 1 turns it off {otherwise} 1)", type=float, metavar="X")
        text = f"the guidance applies only at times from LOW to HIGH; 1000 is noise, 0 the image {otherwise} 0 1000)"
        option("--guidance-interval", text, type=float, nargs=2, metavar=("LOW", "HIGH"))
        text = f"multiply the predicted noise; slightly above 1, images have less noise left {otherwise} 1)"
        option("--noise-scale", text, type=float, metavar="X")
        option("--threshold", "threshold of all neurons (default: the trained value)", type=float, metavar="X")
        option("--clip", "limit the predicted image to [-1, 1] in every step", action="store_true")
        option("--seed", "seed; an image depends only on it, on its number and on rounding (0)", type=int, metavar="N")
        option("--batch-size", "images at a time (64)", type=int, metavar="N")
        option("--ema", "use the averaged weights (the default)", action=argparse.BooleanOptionalAction)
        option("--bf16", "compute matrix multiplications in bfloat16", action="store_true")
        option(
            "--tf32", "on a GPU, compute float32 matrix multiplications in TF32 (the default)",
            action=argparse.BooleanOptionalAction,
        )  # fmt: skip
        option("--compile", "compile the model with torch.compile; the first images take a minute", action="store_true")
        option("--graph", "on a GPU, record the network as a CUDA graph and replay it", action="store_true")
        option("--device", device)

    def change(part):
        part.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes",
            help="change a field of the preset: T=8, spiking=wkv, dim=256, variant=faithful, dataset=folder (repeatable; "
                 "depth=2 means three blocks: depth // 2 before the middle block and depth // 2 after it)",
        )  # fmt: skip

    text = "SDiT, the Spiking Diffusion Transformer: train it, draw images with it, measure it."
    parser = _Parser(prog="sdit", description=text, epilog="sdit COMMAND --help describes a command.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    part = command("train", _TRAIN, _train)
    part.add_argument("--preset", metavar="NAME", help=f"preset to train: {', '.join(PRESETS)}")
    part.add_argument("--resume", metavar="RUN", help="continue the run in this folder from its newest checkpoint")
    part.add_argument(
        "--initial", metavar="MODEL",
        help="start a new run from the averaged weights of a model: a checkpoint, the folder of a run, or one of "
             f"{', '.join(PRETRAINED)}",
    )  # fmt: skip
    part.add_argument("--out", metavar="RUN", help="folder of the run (runs/NAME; with --initial it must be given)")
    data(part)
    change(part)
    part.add_argument("--device", help=device)
    group = part.add_argument_group(
        "settings", "default: values that suit the preset, or the model of --initial; run.json lists them"
    )
    for field in dataclasses.fields(TrainSettings):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type, "metavar": "N"}
        group.add_argument(f"--{field.name.replace('_', '-')}", default=None, help=_SETTINGS[field.name], **kind)

    part = command("sample", _SAMPLE, _sample)
    part.add_argument(
        "checkpoint", nargs="?", default="pretrained",
        help="a .safetensors file, the folder of a run (its newest checkpoint), or a model in this package: pretrained-pure "
             "(every matrix multiplication sees spikes), pretrained-hybrid, or pretrained (the default), which is the pure one",
    )  # fmt: skip
    part.add_argument("--out", default="samples.png", help="the grid, a .png; the .gif and .npz get its name (%(default)s)")
    part.add_argument(
        "--labels", default="all",
        help="all (the classes in turn), random, or a comma-separated list of numbers and names of classes; none: no class "
             "(%(default)s)",
    )  # fmt: skip
    part.add_argument("-n", type=int, help="number of images (40, or one for each label in the list)")
    part.add_argument("--npz", action="store_true", help="also write images and labels as arrays")
    part.add_argument("--images", metavar="FOLDER", help="also write each image as a PNG file into this empty or new folder")
    part.add_argument("--gif", action=argparse.BooleanOptionalAction, default=True, help="write the GIF (the default)")
    sampling(part)

    part = command("evaluate", _EVALUATE, _evaluate)
    part.add_argument(
        "source",
        help="a model to draw images with: a .safetensors file, the folder of a run, pretrained, pretrained-hybrid or "
             "pretrained-pure; or an .npz file of images (N, S, S, C) uint8 and labels (N,)",
    )  # fmt: skip
    part.add_argument("-n", type=int, help="number of images, at least 129 (1000, or all of the .npz file)")
    part.add_argument(
        "--classifier", metavar="FILE", help="a file of perf/train_classifier.py (the classifier in this package)"
    )
    part.add_argument("--json", metavar="FILE", help="write the measures, and the settings and versions behind them")
    part.add_argument("--npz", metavar="FILE", help="write the drawn images and their labels as arrays")
    part.add_argument("--images", metavar="FOLDER", help="write each drawn image as a PNG file into this empty or new folder")
    data(part)
    sampling(part)

    part = command("convert", _CONVERT, _convert)
    part.add_argument("source", metavar="in.pt", help="a checkpoint of the research code")
    part.add_argument("target", metavar="out.safetensors", help="the file to write")
    part.add_argument("--dataset", metavar="NAME", help=f"its data set, stored in the target: {', '.join(DATASETS)}")

    part = command("info", _INFO, _info)
    part.add_argument("model", help=f"a checkpoint, the folder of a run, or one of {', '.join((*PRESETS, *PRETRAINED))}")
    part.add_argument("--batch-size", type=int, default=8, metavar="N", help="number of images to measure with (8)")
    data(part)
    change(part)

    part = command("plot", _PLOT, _plot)
    part.add_argument("folder", metavar="RUN", help="folder of a run")
    part.add_argument("--out", metavar="FILE", help="file to write, a .png (curves.png in the folder)")
    return parser


def _config(preset, changes):
    """Return a preset with the fields of ``changes``, each ``FIELD=VALUE``, replaced."""
    from .config import PRESETS

    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return dataclasses.replace(PRESETS[preset], **field_values(PRESETS[preset], changes))


def field_values(dataclass, changes) -> dict:
    """Parse a list of ``FIELD=VALUE`` words into {field: value}."""
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
    from .checkpoint import about, load_model, newest
    from .settings import TrainSettings
    from .train import train

    ways = [f"--{way}" for way in ("preset", "initial", "resume") if getattr(args, way) is not None]
    if len(ways) != 1:
        raise ValueError(
            "give one of --preset to start a run, --initial to start a run from the weights of a model, and --resume to "
            f"continue a run; got {' and '.join(ways) or 'none'}"
        )
    given = {name: value for name in _SETTINGS if (value := getattr(args, name)) is not None}
    if args.resume:
        if args.changes or args.out:
            raise ValueError("--resume keeps the model and the folder of the run: leave --set and --out out")
        if not Path(args.resume).is_dir():
            problem = "is not a folder" if Path(args.resume).exists() else "does not exist"
            raise ValueError(f"--resume takes the folder of a run, which sdit train --out made; {args.resume} {problem}")
        meta, out = about(path := newest(args.resume)), args.resume
        try:
            settings = TrainSettings(**meta["settings"] | given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be resumed, its training settings do not fit this version: {error}") from None
        train(None, settings, out, resume=True, root=args.data, device=args.device)
        more = f"its {settings.steps:,} steps were done before; --steps N continues" if meta["step"] >= settings.steps else ""
    else:
        if args.out == "":
            raise ValueError("--out must name a folder, got ''")
        if args.preset is None and args.out is None:
            raise ValueError("--initial needs --out, the folder of the new run")
        if args.initial == "":
            raise ValueError("--initial must name a model, got ''")
        if args.initial is None:
            initial, config = None, _config(args.preset, args.changes)
        else:
            initial = load_model(args.initial)
            config = dataclasses.replace(initial.config, **field_values(initial.config, args.changes))
        more = ""
        out = args.out or f"runs/{args.preset}"
        train(config, TrainSettings.of(config, **given), out, root=args.data, device=args.device, initial=initial)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"done: sdit sample {out}, sdit plot {out}" + (more and f" ({more})"))


def _sample(args):
    from .sample import run

    excluded = ("command", "debug", "run", "checkpoint", "out")
    run(args.checkpoint, args.out, **{name: value for name, value in vars(args).items() if name not in excluded})


def _evaluate(args):
    from .evaluate import run

    excluded = ("command", "debug", "run", "source", "json", "data")
    given = {name: value for name, value in vars(args).items() if name not in excluded}
    run(args.source, report=args.json, root=args.data, **given)


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
    from .data import load
    from .info import info, noisy_batch
    from .model import SDiT
    from .sample import describe_guidance

    if args.model in PRESETS and not Path(args.model).exists():
        torch.manual_seed(0)
        model = SDiT(_config(args.model, args.changes))
    else:
        if args.changes:
            raise ValueError("--set is for presets; it cannot change a trained model")
        if not Path(args.model).exists() and args.model not in PRETRAINED:
            names = ", ".join((*PRESETS, *PRETRAINED))
            raise FileNotFoundError(f"{args.model} is neither a file, nor a folder, nor one of {names}")
        model = load_model(args.model)
    n, config = args.batch_size, model.config
    if n < 1:
        raise ValueError(f"--batch-size must be at least 1, got {n}")
    try:
        if config.dataset is None:
            raise FileNotFoundError("the model does not say which data set it is for (sdit convert --dataset NAME)")
        data = load(config.dataset, args.data or model.trained_on.get("root"), size=config.image_size, download=False)
        reason = None
    except FileNotFoundError as error:
        data, reason = None, _in_options(str(error), args)
    print(info(model, noisy_batch(config, data, n)))
    if reason is not None:
        print(f"\nThe firing rates and the numbers derived from them are of noise, not of images: {reason}")
    if model.recommended:
        print(f"\nsdit sample and sdit evaluate use {describe_guidance(model.recommended)}.")


def _plot(args):
    from .plot import plot

    print(plot(args.folder, args.out))


def _in_options(text, args):
    """Replace argument names in an error message by options: batch_size by --batch-size, dim by --set dim, root by --data."""
    text = re.sub(r"\w+ \((--[\w-]+)\)", r"\1", text)  # some messages of the library already name the option
    words = {"root": "--data", "name": "--set dataset", "n": "-n"}
    if "changes" in args:
        from .config import Config

        words |= {field.name: f"--set {field.name}" for field in dataclasses.fields(Config)}
    own = {name: f"--{name.replace('_', '-')}" for name in vars(args) if name not in _NOT_OPTIONS}
    return re.sub(r"^(?:config\.|settings\.)?(\w+)(?=[ :])", lambda match: (own | words).get(match[1], match[0]), text)


_NOT_OPTIONS = ("command", "run", "changes", "checkpoint", "source", "target", "model", "folder")


def _shorten_thread_spinning():
    """Make waiting OpenMP threads of torch sleep after 0.1 ms of spinning, not after milliseconds.

    If other processes use the cores, a spinning thread takes CPU time from the thread that it waits for (perf/bench_load.py).
    OpenMP reads the variable when torch is imported. A value that the user has set is kept.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(argv: list[str] | None = None) -> int:
    """Run ``sdit`` with these arguments. Return the exit code: 0, 2 for an error, 130 after Ctrl-C."""
    command, args = "sdit", argparse.Namespace(debug=False)
    try:
        _shorten_thread_spinning()
        args = make_parser().parse_args(argv)
        command = f"sdit {args.command}"
        args.run(args)
    except KeyboardInterrupt as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{command}: {str(stop) or 'stopped'}", file=sys.stderr)
        # An interrupt inside exec (dataclasses use it) sets a flag that makes python -m die of SIGINT. This call clears it.
        exec("")
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if args.debug:
            raise
        named = isinstance(error, OSError) and error.filename
        text = f"{error.filename}: {error.strerror}" if named else _in_options(" ".join(str(error).split()), args)
        print(f"{command}: error: {text or type(error).__name__}", file=sys.stderr)
        return 2
    return 0
