"""Draw images with a trained model.

``sample`` draws images with a model, ``sample_batches`` does it batch by batch, and ``run`` is the body of ``sdit sample``: it
loads a checkpoint and writes files.
"""

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import DATASETS, to_uint8
from .diffusion import STEPS
from .execution import make_recorder, matmul_precision, name_switch, replay_by_shape
from .files import ensure_writable
from .lock import lock
from .pictures import Film, check_image_folder, check_pillow, save_gif, save_grid, save_images, save_npz
from .processes import join_processes
from .sampler import (
    check_guidance,
    check_noise_scale,
    is_number,
    make_scheduler,
    predict,
    reverse_step,
    samplers,
    scale_noise,
)

__all__ = [
    "Film", "advance_bar", "check_settings", "choose_labels", "class_names", "progress_bar", "run", "sample", "sample_batches",
    "save_gif", "save_grid", "save_npz", "with_recommended",
]  # fmt: skip


def sample(
    model,
    labels: Sequence[int] | Tensor,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    noise_scale: float = 1.0,
    seed: int = 0,
    first: int = 0,
    clip: bool = False,
    threshold: float | None = None,
    batch_size: int = 64,
    compile: bool = False,
    graph: bool = False,
    progress: bool = False,
    callback: Callable[[int, int, int, Tensor], None] | None = None,
) -> Tensor:
    r"""Draw one image per label.

    Image i has a random generator of its own on the CPU, seeded with (seed, first + i). So an image does not depend on
    batch_size, on the other images or on the device, except for rounding in the network. Spikes can amplify rounding until some
    pixels differ visibly.

    The network runs in the dtype of its weights and under the caller's autocast, the sampler in float32. Tensors that do not
    change during the run are computed once (``model.frozen``). The model's current weights are used; to use averaged weights,
    load them first. For the settings that a checkpoint recommends, call ``sample(model, labels, **model.recommended)``.

    Args:
        model: :class:`sdit.SDiT`. It runs in eval mode; its own mode is restored afterwards.
        labels: N ints in 0 .. num_classes; num_classes is the null label, which draws an image of any class.
        sampler, steps, clip: see :func:`sdit.sampler.make_scheduler`; sampler None is "dpm++", or "euler" with prediction
            "flow".
        guidance: see :func:`sdit.sampler.predict`.
        guidance_interval: (low, high), 0 <= low <= high <= 1000: the guidance applies at times low <= t <= high, and is 1 at
            other times (Kynkaanniemi et al., arXiv 2404.07724). t falls from 999, noise, to 0. None: at all times. Not with
            guidance 1.
        noise_scale: the predicted noise is multiplied by it, see :func:`sdit.sampler.scale_noise`. Slightly above 1, images
            have less noise left. 1 with prediction "flow".
        seed: at least 0.
        first: number of the first image, at least 0.
        threshold: v_threshold of all neurons during this run; None keeps the trained value. Not with spiking "pure".
        batch_size: images at a time; with guidance the network computes twice as many.
        compile: compile the network with torch.compile, as one graph. The first step takes a minute.
        graph: on a GPU, record the network as a CUDA graph and replay it, from the third call on. A smaller last batch is
            recorded anew.
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
    settings = dict(sampler=sampler, steps=steps, guidance=guidance, guidance_interval=guidance_interval)
    settings |= dict(noise_scale=noise_scale, clip=clip, seed=seed, first=first, threshold=threshold, batch_size=batch_size)
    settings |= dict(compile=compile, graph=graph, progress=progress, callback=callback)
    return torch.cat([images for _, images in sample_batches(model, labels, **settings)])


@torch.no_grad()
def sample_batches(
    model,
    labels: Sequence[int] | Tensor,
    starts: Sequence[int] | None = None,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    noise_scale: float = 1.0,
    seed: int = 0,
    first: int = 0,
    clip: bool = False,
    threshold: float | None = None,
    batch_size: int = 64,
    compile: bool = False,
    graph: bool = False,
    progress: bool = False,
    callback: Callable[[int, int, int, Tensor], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Draw images batch by batch; yield (number of the first image, images) of each batch.

    Args:
        starts: numbers of the first images of the batches to draw, multiples of batch_size; None draws all batches. If several
            processes draw different batches, together they draw the same images as one process.
        model, labels and the others: as in :func:`sample`, which also lists the errors.

    Example:
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.sample import sample_batches
        >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
        >>> [(i, len(x)) for i, x in sample_batches(model, [3, 1, 4], [2], sampler="ddim", steps=2, batch_size=2)]
        [(2, 1)]
    """
    config = model.config
    labels = _check_labels(labels, config.num_classes)
    sampler = next(iter(samplers(config))) if sampler is None else sampler
    check_settings(config, sampler, steps, guidance, guidance_interval, noise_scale, threshold, clip, seed, batch_size, first)
    starts = range(0, len(labels), batch_size) if starts is None else starts
    if wrong := [start for start in starts if start % batch_size or not 0 <= start < len(labels)]:
        raise ValueError(f"starts must be multiples of {batch_size} in 0..{len(labels) - 1}, got {wrong[0]}")
    weight = next(model.parameters())
    recorder = make_recorder(graph, weight.device)
    network = torch.compile(model, fullgraph=True) if compile else model
    shape = (1, config.channels, config.image_size, config.image_size)

    low, high = (0, STEPS) if guidance_interval is None else guidance_interval

    def call(guidance, x, t, y):
        with name_switch(compile, "draw"):
            return predict(network, x.to(weight.dtype), t, y, guidance).float()

    calls = {value: functools.partial(call, value) for value in (guidance, 1.0)}

    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        if threshold is not None:
            stack.enter_context(_override_threshold(model, threshold))
        stack.enter_context(model.frozen())
        if recorder is not None:  # a recording is only valid inside this frozen()
            calls = {value: replay_by_shape(call, recorder, "draw") for value, call in calls.items()}
        bar = stack.enter_context(progress_bar(sum(len(labels[s : s + batch_size]) for s in starts), progress))
        for start in starts:
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
                out = calls[guidance if low <= t <= high else 1.0](x=x, t=model_t, y=y)
                out = scale_noise(config, out, x, t, noise_scale)
                x = reverse_step(scheduler, out, t, x, generators)
                advance_bar(bar, len(y) / len(times))
                if callback is not None:
                    callback(start, step, len(times), x)
            if not x.isfinite().all():
                lost = f"images {start}..{start + len(y) - 1} are lost"
                how = describe_guidance(dict(guidance=guidance, guidance_interval=guidance_interval, noise_scale=noise_scale))
                raise ValueError(f"the model outputs values that are not finite ({how}): {lost}")
            yield start, x.float().clamp(-1, 1).cpu()


def with_recommended(model, settings: dict) -> dict:
    """Return settings of :func:`sample`. For each that is missing, take what the model's checkpoint recommends.

    Guidance 1 takes no interval.
    """
    found = model.recommended | settings
    if found.get("guidance", 1.0) == 1 and "guidance_interval" not in settings:
        found.pop("guidance_interval", None)
    return found


def describe_guidance(settings: dict) -> str:
    """Return guidance and noise scale in words.

    Example:
        >>> from sdit.sample import describe_guidance
        >>> describe_guidance({"guidance": 3.0, "guidance_interval": (0, 550), "noise_scale": 1.02})
        'guidance 3 at times 0 to 550, noise scale 1.02'
    """
    interval = settings.get("guidance_interval")
    times = "" if interval is None else f" at times {interval[0]:g} to {interval[1]:g}"
    return f"guidance {settings.get('guidance', 1.0):g}{times}, noise scale {settings.get('noise_scale', 1.0):g}"


def check_settings(
    config, sampler, steps, guidance, guidance_interval, noise_scale, threshold, clip, seed, batch_size, first=0
) -> None:  # fmt: skip
    """Raise TypeError, ValueError or ImportError if :func:`sample` cannot draw with these settings."""
    for name, value, least in (("seed", seed, 0), ("first", first, 0), ("batch_size", batch_size, 1)):
        _check_int(name, value, least)
    make_scheduler(sampler, steps, config, clip)
    check_guidance(config, guidance, guidance_interval)
    check_noise_scale(config, noise_scale)
    if not isinstance(clip, bool):
        raise TypeError(f"clip must be true or false, got {clip!r}")
    if threshold is not None and not (is_number(threshold) and 0 < threshold < math.inf):
        raise ValueError(f"threshold must be a positive number, got {threshold!r}")
    if threshold is not None and config.spiking == "pure":
        raise ValueError(f"threshold must be None with spiking='pure', whose thresholds are learnt, got {threshold!r}")


def _check_int(name, value, least):
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def _check_labels(labels, num_classes):
    try:
        labels = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"labels must be ints in a sequence or tensor, got {labels!r}") from None
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


def progress_bar(total, wanted, done=0):
    """Return a progress bar of images. ``done`` images do not count in the images per second."""
    from tqdm import tqdm  # installed with diffusers

    form = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=total, initial=done, unit=" images", bar_format=form, disable=not wanted)


def advance_bar(bar, images):
    bar.update(min(images, bar.total - bar.n))  # the sum of the parts of an image may exceed it by a rounding error


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
    wanted = wanted.lower() if wanted.lower() in ("all", "random") else wanted
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
    images: str | Path | None = None,
    ema: bool = True,
    bf16: bool = False,
    tf32: bool = True,
    device: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    **settings,
) -> list[Path]:
    """Run ``sdit sample``: draw images with a checkpoint and write them to files.

    Under ``torchrun`` the processes draw different batches, and the first process writes the files. The images are the same.

    Args:
        checkpoint: a file, the folder of a run, or "pretrained"; see :func:`sdit.checkpoint.load_model`.
        out: the grid, a .png; the .gif and the .npz get the same name. Grid and GIF show the first 100 images, the .npz has
            all.
        labels, n: see :func:`choose_labels`.
        names: names of the classes; None takes the names of the training data.
        gif: write a GIF of the denoising.
        npz: write images and labels as arrays.
        images: also write each image into this empty or new folder, see :func:`sdit.pictures.save_images`.
        ema: use the averaged weights.
        bf16: run the network under bfloat16 autocast.
        tf32: on a GPU, compute float32 matrix multiplications in TF32.
        device: None takes a GPU if there is one.
        seed, batch_size, settings: see :func:`sample`. For each of guidance, guidance_interval and
            noise_scale that is missing, the checkpoint's recommendation is used (``model.recommended``).

    Returns:
        The paths of the files, and of the folder ``images``.
    """
    from .checkpoint import load_model

    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png, got {str(out)!r}")
    check_pillow()
    _check_int("batch_size", batch_size, 1)
    with join_processes(device) as processes:
        rank, world, device = processes
        model = load_model(checkpoint, ema=ema).to(device)
        settings = with_recommended(model, settings)
        names = class_names(model.config, model.trained_on.get("classes", ())) if names is None else tuple(names)
        chosen = choose_labels(labels, n, names, seed)

        film = Film(images=_MAX_SHOWN) if gif else None
        columns = len(names) if labels.lower() == "all" and len(names) <= 20 else None
        files = [out] + [out.with_suffix(".gif")] * gif + [out.with_suffix(".npz")] * npz
        written = files + ([] if images is None else [Path(images)])
        pixels = len(chosen) * model.config.channels * model.config.image_size**2
        with processes.only_first(_hold_files(out, images, pixels * npz)):
            began = time.perf_counter()
            try:
                cast = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
                with cast, matmul_precision(device, tf32):
                    mine, how = range(rank * batch_size, len(chosen), world * batch_size), dict(settings, callback=film)
                    drawn = list(
                        sample_batches(model, chosen, mine, seed=seed, batch_size=batch_size, progress=rank == 0, **how)
                    )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped, {out} is not written") from None
            collected = processes.collect((drawn, film))
            if collected is None:
                return written
            batches = sorted((batch for drawn, _ in collected for batch in drawn), key=lambda batch: batch[0])
            pictures = torch.cat([batch for _, batch in batches])
            for _, other in collected[1:]:
                if gif:
                    film.merge(other)
            seconds = time.perf_counter() - began
            _write_files(files, images, pictures, chosen, names, columns, film)
    shown = min(len(chosen), _MAX_SHOWN)
    summary = f"{len(pictures)} images" + (f" (the first {shown} shown)" if shown < len(pictures) else "")
    rate = f"{len(pictures) / seconds:.3g} images/s"
    print(f"{summary} in {seconds:.1f} s, {rate}, {describe_guidance(settings)}: {', '.join(map(str, written))}")
    return written


@contextmanager
def _hold_files(out, images, size):
    """Check that the files can be written, and hold the lock of ``out``."""
    if images is not None:
        check_image_folder(images, out)
    ensure_writable(out, "out", (1 << 20) + size)
    with lock(out.with_name(f".{out.stem}.lock"), str(out), "wait until it ends, or choose another out (--out)"):
        yield


def _write_files(files, folder, images, labels, names, columns, film):
    """Write the grid and, if ``files`` names them, the GIF and the arrays, the arrays first; and each image into ``folder``."""
    paths, done = {path.suffix.lower(): path for path in files}, None
    shown = slice(0, _MAX_SHOWN)
    try:
        if ".npz" in paths:
            save_npz(paths[".npz"], images, labels)
            done = paths[".npz"]
        save_grid(files[0], images[shown], labels[shown], names, columns)
        if ".gif" in paths:
            save_gif(paths[".gif"], film.frames, labels[shown], names, columns)
        if folder is not None:
            save_images(folder, to_uint8(images).permute(0, 2, 3, 1))
    except OSError as error:
        raise _save_after_error(error, images, labels, done) from None
