"""Draw images with a trained model.

``sample`` draws images with a model; ``run`` is the body of ``sdit sample``: it loads a checkpoint and writes files.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import DATASETS
from .diffusion import check_guidance, make_scheduler, predict, reverse_step, samplers
from .files import ensure_writable
from .lock import lock
from .pictures import Film, check_pillow, save_gif, save_grid, save_npz

__all__ = [
    "Film", "check_settings", "choose_labels", "class_names", "progress_bar", "resolve_device", "run", "sample", "save_gif",
    "save_grid", "save_npz",
]  # fmt: skip


@torch.no_grad()
def sample(
    model,
    labels: Sequence[int] | Tensor,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    first: int = 0,
    clip: bool = False,
    threshold: float | None = None,
    batch_size: int = 64,
    compile: bool = False,
    progress: bool = False,
    callback: Callable[[int, int, int, Tensor], None] | None = None,
) -> Tensor:
    r"""Draw one image per label.

    Image i has a random generator of its own on the CPU, seeded with (seed, first + i). So an image does not depend on
    batch_size, on the other images or on the device, except for rounding in the network.

    The network runs in the dtype of its weights and under the caller's autocast, the sampler in float32. Tensors that do not
    change during the run are computed once (``model.frozen``). The model's current weights are used; to use averaged weights,
    load them first.

    Args:
        model: :class:`sdit.SDiT`. It runs in eval mode; its own mode is restored afterwards.
        labels: N ints in 0 .. num_classes; num_classes is the null label, which draws an image of any class.
        sampler, steps, clip: see :func:`sdit.diffusion.make_scheduler`; sampler None is "ddpm", or "euler" with prediction
            "flow".
        guidance: see :func:`sdit.diffusion.predict`.
        seed: at least 0.
        first: number of the first image, at least 0.
        threshold: v_threshold of all neurons during this run; None keeps the trained value. Not with spiking "pure".
        batch_size: images at a time; with guidance the network computes twice as many.
        compile: compile the network with torch.compile, as one graph. The first step takes a minute.
        progress: show a progress bar with images per second.
        callback: called as callback(start, step, steps, x). x holds the images start, start + 1, .. (not limited to [-1, 1], on
            the model's device); step is 0 before the first step, and 1 .. steps after each step.

    Returns:
        (N, channels, S, S) float32 on the CPU, limited to [-1, 1].

    Raises:
        TypeError, ValueError: an argument is wrong, or the network outputs NaN or infinite values.
        ImportError: diffusers is missing.

    Example:
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.sample import sample
        >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
        >>> sample(model, [3, 1, 4], sampler="ddim", steps=10, seed=0).shape
        torch.Size([3, 1, 8, 8])
    """
    config = model.config
    labels = _check_labels(labels, config.num_classes)
    sampler = next(iter(samplers(config))) if sampler is None else sampler
    check_settings(config, sampler, steps, guidance, threshold, clip, seed, batch_size, first)
    weight = next(model.parameters())
    network = torch.compile(model, fullgraph=True) if compile else model
    shape = (1, config.channels, config.image_size, config.image_size)

    done = []
    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        if threshold is not None:
            stack.enter_context(_override_threshold(model, threshold))
        stack.enter_context(model.frozen())
        bar = stack.enter_context(progress_bar(len(labels), progress))
        for start in range(0, len(labels), batch_size):
            y = labels[start : start + batch_size].to(weight.device)
            generators = [_make_generator(seed, first + start + i) for i in range(len(y))]
            x = torch.cat([torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators])
            x = x.to(weight.device)
            scheduler = make_scheduler(sampler, steps, config, clip)
            times = scheduler.timesteps.tolist()
            if callback is not None:
                callback(start, 0, len(times), x)
            for step, t in enumerate(times, start=1):
                model_t = torch.full((len(y),), t, device=weight.device)
                with name_switch(compile, "draw"):
                    out = predict(network, x.to(weight.dtype), model_t, y, guidance).float()
                x = reverse_step(scheduler, out, t, x, generators)
                bar.update(len(y) / len(times))
                if callback is not None:
                    callback(start, step, len(times), x)
            if not x.isfinite().all():
                raise ValueError(f"the model outputs values that are not finite: images {start}..{start + len(y) - 1} are lost")
            done.append(x.float().clamp(-1, 1).cpu())
    return torch.cat(done)


def check_settings(config, sampler, steps, guidance, threshold, clip, seed, batch_size, first=0) -> None:
    """Raise TypeError, ValueError or ImportError if :func:`sample` cannot draw with these settings."""
    for name, value, least in (("seed", seed, 0), ("first", first, 0), ("batch_size", batch_size, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    make_scheduler(sampler, steps, config, clip)
    check_guidance(config, guidance)
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if threshold is not None and not (number and 0 < threshold < math.inf):
        raise ValueError(f"threshold must be a positive number, got {threshold!r}")
    if threshold is not None and config.spiking == "pure":
        raise ValueError(f"threshold must be None with spiking='pure', whose thresholds are learnt, got {threshold!r}")


def _check_labels(labels, num_classes):
    labels = torch.as_tensor(labels, device="cpu")
    if not labels.numel():
        raise ValueError("labels must name at least one image, got none")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool or labels.ndim != 1:
        raise TypeError(f"labels must be ints in one dimension, got {labels.dtype} of shape {tuple(labels.shape)}")
    if labels.min() < 0 or labels.max() > num_classes:
        raise ValueError(f"labels must be in 0..{num_classes} ({num_classes} for no class), got {labels.min()}..{labels.max()}")
    return labels.long()


def _make_generator(seed, i):
    state = np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@contextmanager
def _override_threshold(model, value):
    """Set v_threshold of every neuron of ``model`` to ``value`` during the with block."""
    before = [(module, module.v_threshold) for module in model.modules() if hasattr(module, "v_threshold")]
    try:
        for module, _ in before:
            module.v_threshold = float(value)
        yield
    finally:
        for module, old in before:
            module.v_threshold = old


def progress_bar(total, wanted):
    from tqdm import tqdm  # installed with diffusers

    form = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=total, unit=" images", bar_format=form, disable=not wanted)


# Labels


def class_names(config, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the class names: ``names``, or the names of config.dataset; numbers if there are not num_classes names.

    Example:
        >>> from sdit import PRESETS
        >>> from sdit.sample import class_names
        >>> class_names(PRESETS["cifar10"])[:3]
        ('airplane', 'automobile', 'bird')
    """
    names = tuple(names) or (DATASETS[config.dataset].names if config.dataset in DATASETS else ())
    return names if len(names) == config.num_classes else tuple(map(str, range(config.num_classes)))


def choose_labels(wanted: str, n: int | None, names: Sequence[str], seed: int = 0) -> Tensor:
    r"""Parse the labels that a user types.

    Args:
        wanted: "all" for the classes in turn; "random" for uniform labels from ``seed``; or a comma-separated list of numbers
            and names of classes (upper or lower case), with "none" for the null label. The list is repeated until it has n
            labels.
        n: number of images; None takes 40, or the length of the list.
        names: names of the classes.
        seed: at least 0.

    Returns:
        (n,) int64.

    Raises:
        ValueError: a class does not exist, or n is below 1 or below the length of the list.

    Example:
        >>> from sdit.sample import choose_labels
        >>> choose_labels("all", 5, ["cat", "dog"]).tolist(), choose_labels("dog, 0, none", None, ["cat", "dog"]).tolist()
        ([0, 1, 0, 1, 0], [1, 0, 2])
    """
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if wanted == "random":
        return torch.from_numpy(np.random.default_rng((seed,)).integers(len(names), size=n or 40))
    known = [*enumerate(map(str, range(len(names)))), *enumerate(names), (len(names), "none")]
    numbers = {name.lower(): i for i, name in known}
    given = [part.strip() for part in wanted.split(",")]
    if wanted == "all":
        n, given = n or 40, list(map(str, range(len(names))))
    wrong = [part for part in given if part.lower() not in numbers]
    if wrong:
        named = [name for i, name in enumerate(names) if name != str(i)]
        classes = f"0 to {len(names) - 1}" + (f" or by name ({', '.join(named)})" if named else "")
        raise ValueError(
            f"labels must be all, random, or a list of classes with commas between: {classes}, or none for no class; "
            f"{wrong[0]!r} is not one"
        )
    labels = torch.tensor([numbers[part.lower()] for part in given])
    if wanted != "all" and n is not None and n < len(labels):
        raise ValueError(f"n must be at least {len(labels)}, the number of labels, got {n}")
    n = n or len(labels)
    return labels.repeat(math.ceil(n / len(labels)))[:n]


# The command


def resolve_device(device) -> torch.device:
    """Return the device that a user names. Raise ValueError if it cannot be used."""
    try:
        resolved = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if resolved.type == "meta":
        raise ValueError("device 'meta' cannot be used: it holds no numbers")
    return resolved


@contextmanager
def name_switch(compiles: bool, command: str):
    """Name the switch in the error of a failed compilation."""
    try:
        yield
    except Exception as error:
        if not compiles or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise RuntimeError(f"compile (--compile) failed, {command} without it: {reason}") from error


@contextmanager
def matmul_precision(device: torch.device, tf32: bool):
    """On a GPU, compute float32 matrix multiplications in TF32, or in full float32, inside the with block."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _save_after_error(error, images, labels, npz):
    """Save the images after a failed write; return an OSError that says where they are.

    They are in ``npz`` if that file was written. Otherwise they go into a new file in the folder for temporary files.
    """
    failed = f"{error.filename}: {error.strerror}"
    try:
        if npz is None:
            npz = Path(tempfile.mkdtemp(prefix="sdit-")) / "images.npz"
            save_npz(npz, images, labels)
    except OSError as second:
        return OSError(f"{failed}; the images are lost, {tempfile.gettempdir()} cannot hold them either: {second.strerror}")
    return OSError(f"{failed}; the images and their labels are in {npz}")


_MAX_SHOWN = 100  # images in the grid and in the GIF


def run(
    checkpoint: str | Path,
    out: str | Path = "samples.png",
    *,
    labels: str = "all",
    n: int | None = None,
    names: Sequence[str] | None = None,
    gif: bool = True,
    npz: bool = False,
    ema: bool = True,
    bf16: bool = False,
    tf32: bool = True,
    device: str | None = None,
    seed: int = 0,
    **settings,
) -> list[Path]:
    """Run ``sdit sample``: draw images with a checkpoint and write them to files.

    Args:
        checkpoint: a file, the folder of a run, or "pretrained"; see :func:`sdit.checkpoint.load_model`.
        out: the grid, a .png; the .gif and the .npz get the same name. Grid and GIF show the first 100 images, the .npz has
            all.
        labels, n: see :func:`choose_labels`.
        names: names of the classes; None takes the names of the training data.
        gif: write a GIF of the denoising.
        npz: write images and labels as arrays.
        ema: use the averaged weights.
        bf16: run the network under bfloat16 autocast.
        tf32: on a GPU, compute float32 matrix multiplications in TF32.
        device: None takes a GPU if there is one.
        seed, settings: see :func:`sample`.

    Returns:
        The paths of the files.
    """
    from .checkpoint import load_model

    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png, got {str(out)!r}")
    device = resolve_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_pillow()
    model = load_model(checkpoint, ema=ema).to(device)
    names = class_names(model.config, model.trained_on.get("classes", ())) if names is None else tuple(names)
    chosen = choose_labels(labels, n, names, seed)

    film = Film(images=_MAX_SHOWN) if gif else None
    shown = min(len(chosen), _MAX_SHOWN)
    columns = len(names) if labels == "all" and len(names) <= 20 else None
    written = [out] + [out.with_suffix(".gif")] * gif + [out.with_suffix(".npz")] * npz
    pixels = len(chosen) * model.config.channels * model.config.image_size**2
    ensure_writable(out, "out", (1 << 20) + pixels * npz)
    with lock(out.with_name(f".{out.stem}.lock"), str(out), "wait until it ends, or choose another out (--out)"):
        began = time.perf_counter()
        try:
            cast = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
            with cast, matmul_precision(device, tf32):
                images = sample(model, chosen, seed=seed, progress=True, callback=film, **settings)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped, {out} is not written") from None
        seconds, written_npz = time.perf_counter() - began, None
        try:
            if npz:
                save_npz(written[-1], images, chosen)
                written_npz = written[-1]
            save_grid(out, images[:shown], chosen[:shown], names, columns)
            if gif:
                save_gif(written[1], film.frames, chosen[:shown], names, columns)
        except OSError as error:
            raise _save_after_error(error, images, chosen, written_npz) from None
    summary = f"{len(images)} images" + (f" (the first {shown} shown)" if shown < len(images) else "")
    print(f"{summary} in {seconds:.1f} s, {len(images) / seconds:.3g} images/s: {', '.join(map(str, written))}")
    return written
