"""Measure generated images: Frechet distance, KID, precision, recall and label accuracy, in the features of a classifier.

``evaluate`` measures images, ``draw`` generates them, and ``run`` is the body of ``sdit evaluate``.
"""

import hashlib
import importlib.metadata
import json
import zipfile
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .classifier import FASHION_MNIST, Classifier, features, label_accuracy, load_classifier
from .data import load
from .execution import matmul_precision
from .files import atomic_write, cache_folder, ensure_writable, sha256
from .lock import lock
from .metrics import frechet_distance, kid, precision_recall
from .pictures import check_image_folder, save_images, save_npz
from .processes import join_processes
from .sample import with_recommended

__all__ = [
    "Classifier", "draw", "evaluate", "features", "frechet_distance", "kid", "label_accuracy", "load_classifier",
    "precision_recall", "run",
]  # fmt: skip


def evaluate(
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    classifier: Classifier | None = None,
    root: str | Path | None = None,
) -> dict:
    """Measure images and, for comparison, the same number of real images (the *floor*).

    Both sets are compared with the whole test split of the classifier's data set; for precision and recall, with N images of
    it. The floor consists of N images of the train split: the classes in turn, the first images of each class. Real images
    reach the floor, not 0. Both distances grow as N falls. The classifier was trained on the train split, which raises the
    label accuracy of the floor. The label accuracy of the test split is measured on real images that the classifier has not
    seen.

    Args:
        images: N images, uint8, as :func:`features` takes them.
        labels: (N,) ints; the number of classes stands for no label.
        classifier: from :func:`load_classifier`; None for the classifier in this package (Fashion-MNIST).
        root: folder of the data set, as in :func:`sdit.data.load`.

    Returns:
        {"n", "dataset", "drawn", "floor", "test"}. "drawn" and "floor" hold "frechet_distance" (:func:`frechet_distance`),
        "kid" and "kid_standard_error" (:func:`kid`), "precision" and "recall" (:func:`precision_recall`), "label_accuracy" over
        the images with a label (None without labels), and "label_accuracy_by_class". "test" holds the last two for the test
        split, and its number of images "n".

    Raises:
        TypeError, ValueError: images or labels are wrong; there are too few images for a covariance of the features, or more
            than the train split has for the floor. OSError, ImportError: the data set cannot be loaded.

    Example:
        >>> from sdit.data import load
        >>> from sdit.evaluate import evaluate
        >>> train = load("fashion_mnist")  # doctest: +SKIP
        >>> evaluate(train.images[-1000:], train.labels[-1000:])["drawn"]["label_accuracy"] > 0.9  # doctest: +SKIP
        True
    """
    classifier = load_classifier() if classifier is None else classifier
    if len(images) != len(labels):
        raise ValueError(f"labels must be one for each of {len(images)} images, got {len(labels)}")
    labels = _check_labels(labels, classifier)
    test, floor, floor_labels = _load_real_images(len(labels), classifier, root)
    drawn = features(classifier, images)
    reference = features(classifier, test.images)
    equal = min(len(drawn), len(reference))  # sets of equal size, for precision and recall
    some = reference[np.random.default_rng(0).permutation(len(reference))[:equal]]

    def measure(found, labels):
        mean, error = kid(found, reference)
        precision, recall = precision_recall(found[:equal], some)
        measures = {"frechet_distance": frechet_distance(found, reference), "kid": mean, "kid_standard_error": error}
        return measures | {"precision": precision, "recall": recall} | _accuracies(classifier, found, labels)

    return {
        "n": len(labels),
        "dataset": classifier.dataset,
        "drawn": measure(drawn, labels),
        "floor": measure(features(classifier, floor), floor_labels),
        "test": {"n": len(test)} | _accuracies(classifier, reference, test.labels),
    }


def _accuracies(classifier, found, labels):
    def accuracy_of(chosen):
        return label_accuracy(classifier, found[chosen], labels[chosen]) if chosen.any() else None

    by_class = {name: accuracy_of(labels == i) for i, name in enumerate(classifier.names)}
    return {"label_accuracy": accuracy_of(labels < len(by_class)), "label_accuracy_by_class": by_class}


def _check_labels(labels, classifier):
    labels, classes, least = torch.as_tensor(labels), len(classifier.names), classifier.widths[-1] + 1
    if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise TypeError(f"labels must be ints in one dimension, got {labels.dtype} of shape {tuple(labels.shape)}")
    labels = labels.long()
    if len(labels) < least:
        raise ValueError(f"n must be at least {least}, for a covariance of {least - 1} features, got {len(labels)}")
    if labels.min() < 0 or labels.max() > classes:
        raise ValueError(f"labels must be in 0..{classes} ({classes} for none), got {labels.min()}..{labels.max()}")
    return labels


def _load_real_images(n, classifier, root):
    """Load (the test split, n images of the train split with the classes in turn, their labels)."""
    test, train = (load(classifier.dataset, root, split=split, size=classifier.image_size) for split in ("test", "train"))
    if train.names != classifier.names:
        raise ValueError(f"the classes of {classifier.dataset} must be the classifier's, {classifier.names}, got {train.names}")
    labels = torch.arange(n) % len(classifier.names)
    chosen = torch.empty_like(labels)
    for i, name in enumerate(classifier.names):
        places, found = labels == i, (train.labels == i).nonzero()[:, 0]
        if len(found) < (needed := int(places.sum())):
            raise ValueError(
                f"n must be smaller for a floor of as many train images: it takes {needed} of {name}, {classifier.dataset} "
                f"has {len(found)}"
            )
        chosen[places] = found[:needed]
    return test, train.images[chosen], labels


# The command


def draw(
    checkpoint: str | Path,
    n: int,
    *,
    folder: str | Path | None = None,
    ema: bool = True,
    bf16: bool = False,
    tf32: bool = True,
    device: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    noise_scale: float = 1.0,
    threshold: float | None = None,
    clip: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    compile: bool = False,
    graph: bool = False,
) -> tuple[Tensor, Tensor, dict]:
    """Generate n images with a checkpoint, the classes in turn, and keep each batch on the disk.

    The same call continues after a kill, and a call with a larger n reuses the images of a smaller one. Under ``torchrun``, or
    an initialised ``torch.distributed``, each process draws some of the batches, and all processes return the same images.

    Args:
        checkpoint: a file, or the folder of a run, to load its newest checkpoint.
        n: number of images, at least 1.
        folder: where to keep the images; None for ``~/.cache/sdit/evaluate``. The images lie in a sub-folder whose name is a
            hash of all settings that change them. You may delete it at any time.
        ema, bf16, tf32, device: as in ``sdit sample``.
        sampler, steps, guidance, guidance_interval, noise_scale, threshold, clip, seed, batch_size, compile, graph: as in
            :func:`sdit.sample.sample`.

    Returns:
        Images (n, S, S, C) uint8, labels (n,) int64, and a dict of the settings that determine the images, for JSON.

    Raises:
        The errors of :func:`sdit.checkpoint.load_model` and :func:`sdit.sample.sample`. OSError: folder cannot be written.
        BlockingIOError: another process generates these images. FileNotFoundError: several processes do not share folder.

    Example:
        >>> import tempfile
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.checkpoint import save_model
        >>> from sdit.evaluate import draw
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(f"{folder}/a.safetensors", SDiT(PRESETS["digits"], dim=32, depth=2))
        ...     images, labels, facts = draw(f"{folder}/a.safetensors", 3, folder=folder, sampler="ddim", steps=2)
        >>> images.shape, labels.tolist(), facts["seed"]
        (torch.Size([3, 8, 8, 1]), [0, 1, 2], 0)
    """
    from . import diffusion, pure
    from . import model as network
    from . import sample as sampling
    from . import sampler as solver
    from .checkpoint import load_model, newest

    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be an int of at least 1, got {n!r}")
    checkpoint = newest(checkpoint)
    with join_processes(device) as processes:
        device = processes.device
        model = load_model(checkpoint, ema=ema).to(device)
        sampler = next(iter(solver.samplers(model.config))) if sampler is None else sampler
        steps = solver.SAMPLERS.get(sampler) if steps is None else steps
        settings = {"sampler": sampler, "steps": steps, "guidance": guidance, "guidance_interval": guidance_interval}
        settings |= {"noise_scale": noise_scale, "threshold": threshold, "clip": clip, "seed": seed, "batch_size": batch_size}
        sampling.check_settings(model.config, **settings)
        facts = {"checkpoint_sha256": sha256(checkpoint), **settings, "ema": ema, "bf16": bf16, "device": device.type}
        facts |= {"compile": compile, "graph": graph} | ({"tf32": tf32 and not bf16} if device.type == "cuda" else {})
        facts |= {"torch": torch.__version__, "diffusers": importlib.metadata.version("diffusers")}
        facts["code_sha256"] = {
            module.__name__: sha256(module.__file__) for module in (network, pure, diffusion, solver, sampling)
        }
        key = hashlib.sha256(json.dumps(facts, default=repr).encode()).hexdigest()[:16]
        folder = (cache_folder() / "evaluate" if folder is None else Path(folder)) / key
        facts["labels"] = "the classes in turn"
        labels, size = torch.arange(n) % model.config.num_classes, model.config.channels * model.config.image_size**2
        kept = _KeptBatches(folder, labels, batch_size)
        cast = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
        try:
            with processes.only_first(kept.hold(size)), cast, matmul_precision(device, tf32):
                missing = processes.share(kept.missing)
                mine = missing[processes.rank :: processes.world]
                done = n - kept.count(missing)
                with sampling.progress_bar(done + kept.count(mine), processes.rank == 0, done) as bar:
                    for start, drawn in sampling.sample_batches(
                        model, labels, mine, compile=compile, graph=graph, **settings,
                        callback=lambda _, step, steps, x: sampling.advance_bar(bar, len(x) / steps if step else 0),
                    ):  # fmt: skip
                        save_npz(kept.path(start), drawn, kept.labels_of(start))
                processes.wait()
                return kept.read_all(), labels, facts
        except KeyboardInterrupt:
            done = sum(len(part) for part in map(kept.read, kept.starts) if part is not None)
            message = f"stopped after {done} of {n} images, which {folder} keeps: the same command continues"
            raise KeyboardInterrupt(message) from None


class _KeptBatches:
    """The files of :func:`draw`, one for each batch."""

    def __init__(self, folder, labels, batch_size):
        self.folder, self.labels, self.batch_size = folder, labels, batch_size
        self.starts, self.missing = range(0, len(labels), batch_size), []

    def path(self, start):
        return self.folder / f"{start:07d}.npz"

    def labels_of(self, start):
        return self.labels[start : start + self.batch_size]

    def count(self, starts):
        return sum(len(self.labels_of(start)) for start in starts)

    @contextmanager
    def hold(self, size):
        """Hold the lock of the folder. Find the batches that are missing, and check that they can be written."""
        with lock(self.folder / "lock", f"{self.folder}, where these images are kept,", "wait until it ends"):
            self.missing = [start for start in self.starts if self.read(start) is None]
            if self.missing:
                room = (1 << 20) + (len(self.labels) - self.missing[0]) * size
                ensure_writable(self.path(self.missing[0]), "folder (XDG_CACHE_HOME moves it)", room)
            yield

    def read(self, start):
        """Return the images of a batch; None if its file is missing, damaged or different."""
        return _read_kept_images(self.path(start), self.labels_of(start))

    def read_all(self):
        parts = []
        for start in self.starts:
            parts.append(self.read(start))
            if parts[-1] is None:
                raise FileNotFoundError(f"{self.path(start)} is missing: all processes must share this folder")
        return torch.cat(parts)


def _read_kept_images(path, labels):
    """Return the images for these labels from a file of :func:`draw`; None if it is missing, damaged or different."""
    try:
        with np.load(path) as file:
            images, found = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    n = len(labels)
    return images[:n] if len(images) >= n and torch.equal(found[:n], labels) else None


def _read_npz(path):
    """Read (images, labels) from a file that ``sdit sample --npz`` wrote."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError(f"it is not an npz file, but {Path(path).stat().st_size} bytes of something else")
        with np.load(path) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[1] != images.shape[2]
            or images.shape[3] not in (1, 3)
        ):
            raise ValueError(f"images must be (N, S, S, 1 or 3) of uint8, got {tuple(images.shape)} of {images.dtype}")
        return images, labels
    except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        why = str(error).partition(". ")[0]  # numpy's next sentence recommends allow_pickle, which executes code
        raise ValueError(f"{path} must hold the arrays images and labels, as sdit sample --npz writes them: {why}") from None


def run(
    source: str | Path,
    *,
    n: int | None = None,
    classifier: str | Path | None = None,
    root: str | Path | None = None,
    npz: str | Path | None = None,
    images: str | Path | None = None,
    report: str | Path | None = None,
    device: str | None = None,
    **settings,
) -> dict:
    """Run ``sdit evaluate``: generate or read images, measure them with :func:`evaluate`, print and save the measures.

    Under ``torchrun`` the processes draw different batches, and the first process measures and writes.

    Args:
        source: a checkpoint: generate ``n`` (default: 1,000) images with it, by :func:`draw` with ``device`` and ``settings``
            (and the recommended settings, as ``sdit sample``).
            Or an .npz file of images and labels: measure its first ``n`` (default: all) images.
        classifier: file of a classifier; None for the one in this package.
        root: folder of the data set.
        npz: write the generated images to this file.
        images: write the generated images into this empty or new folder, see :func:`sdit.pictures.save_images`.
        report: write the measures, and the settings and versions behind them, to this JSON file.

    Returns:
        The dict that ``report`` holds; an empty dict in all processes except the first.
    """
    if npz is not None and Path(npz).suffix != ".npz":
        raise ValueError(f"npz must end in .npz, got {str(npz)!r}")
    if Path(source).suffix == ".npz":
        outputs = {"device": device, "npz": npz, "images": images}
        if wrong := [*settings, *(name for name, value in outputs.items() if value is not None)]:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            raise ValueError(f"{source} holds images that exist already: {given} cannot be combined with it")
    with join_processes(device) as processes, processes.only_first(_hold_files(npz, images, report)):
        return _evaluate_and_report(processes, source, n, classifier, root, npz, images, report, settings | {"device": device})


@contextmanager
def _hold_files(npz, images, report):
    """Check that the files can be written, and hold their locks."""
    if images is not None:
        check_image_folder(images, npz, report)
    with ExitStack() as stack:
        for name, path in (("npz", npz), ("json", report)):
            if path is not None:
                path = Path(path)
                ensure_writable(path, name)
                advice = f"wait until it ends, or choose another {name} (--{name})"
                stack.enter_context(lock(path.with_name(f".{path.name}.lock"), str(path), advice))
        yield


def _evaluate_and_report(processes, source, n, classifier, root, npz, images, report, settings):
    from sdit_kernels import __version__

    from .checkpoint import load_model

    loaded_classifier, path = load_classifier(classifier), FASHION_MNIST if classifier is None else Path(classifier)
    exist = Path(source).suffix == ".npz"
    if exist:
        pixels, labels = _read_npz(source)
        if n is not None and not 0 < n <= len(labels):
            raise ValueError(f"n must be 1 to {len(labels)}, as many as {source} holds, got {n}")
        pixels, labels = pixels[:n], labels[:n]
        facts = {"images": Path(source).name, "images_sha256": sha256(source)}
    else:
        n = 1000 if n is None else n
        model = load_model(source)
        config, root = model.config, root or model.trained_on.get("root")
        _check_classifier_fits(loaded_classifier, config)
        _check_labels(torch.arange(max(n, 0)) % config.num_classes, loaded_classifier)
        _load_real_images(n, loaded_classifier, root)  # raises errors about the data before the images are generated
        pixels, labels, facts = draw(source, n, **with_recommended(model, settings))
        facts = {"checkpoint": str(source)} | facts
    if processes.rank:
        return {}
    found = evaluate(pixels, labels, loaded_classifier, root)
    found |= {"images": facts, "classifier": path.name, "classifier_sha256": sha256(path)}
    found |= {"sdit_kernels": __version__, "torch": torch.__version__, "numpy": np.__version__}
    print(_format_table(found))  # print before writing the files, because a write may fail
    lost = "free some space, then the same command writes it" + ("" if exist else ", without drawing the images again")
    if npz is not None:
        with atomic_write(Path(npz), lost) as file:
            np.savez(file, images=pixels.numpy(), labels=labels.numpy())
    if images is not None:
        save_images(images, pixels)
    if report is not None:
        with atomic_write(Path(report), lost) as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
    return found


def _check_classifier_fits(classifier, config):
    if config.dataset is None:
        raise ValueError("the model does not say which data set it is for (sdit convert --dataset NAME)")
    if config.dataset != classifier.dataset:
        images = f"images of {config.dataset}, the classifier is for {classifier.dataset}"
    elif config.image_size != classifier.image_size:
        images = f"images of {config.image_size} pixels a side, the classifier is for {classifier.image_size}"
    elif config.num_classes != len(classifier.names):
        raise ValueError(f"the model has {config.num_classes} classes, the classifier {len(classifier.names)}")
    else:
        return
    raise ValueError(
        f"the model draws {images}: give --classifier FILE, which perf/train_classifier.py --dataset {config.dataset} "
        f"--size {config.image_size} --out FILE trains (in this package's repository)"
    )


def _format_table(found):
    n, test = found["n"], found["test"]

    def percent(x):
        return "" if x is None else f"{100 * x:.1f} %"

    rows = [("", "Frechet distance", "KID x 1000", "precision", "recall", "label accuracy")]
    for name, row_title in (("drawn", f"{n} drawn images"), ("floor", f"floor: {n} train images")):
        measures = found[name]
        error = f"{1000 * measures['kid']:.3f} \N{PLUS-MINUS SIGN} {1000 * measures['kid_standard_error']:.3f}"
        cells = f"{measures['frechet_distance']:.4f}", error, f"{measures['precision']:.3f}", f"{measures['recall']:.3f}"
        rows.append((row_title, *cells, percent(measures["label_accuracy"])))
    rows.append((f"{test['n']} test images", *[""] * 4, percent(test["label_accuracy"])))
    lines = [f"{a:<26}{b:>18}{c:>18}{d:>12}{e:>9}{f:>17}" for a, b, c, d, e, f in rows]
    by_class = found["drawn"]["label_accuracy_by_class"]
    least = ", ".join(f"{name} {100 * x:.0f}" for name, x in by_class.items() if x is not None)
    lines += [
        f"label accuracy by class: {least}" if least else "no image has a label",
        f"Distances are to all test images of {found['dataset']}; the floor is of as many real ones, of each class the",
        f"first. Features: {found['classifier']}, sha256 {found['classifier_sha256'][:8]}..; figures of another",
        "classifier or number of images cannot be compared with these.",
    ]
    return "\n".join(lines)
