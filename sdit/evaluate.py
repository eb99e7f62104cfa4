"""How good drawn images are: Frechet distance, KID and label accuracy, in the features of a small frozen classifier.

``evaluate`` measures images, ``run`` is the body of ``sdit evaluate``, from a checkpoint or a file to a report.
"""

import hashlib
import importlib.metadata
import json
import math
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .data import _cache, from_uint8, load, replacing, to_uint8
from .lock import lock

__all__ = [
    "Classifier", "draw", "evaluate", "features", "frechet_distance", "kid", "label_accuracy", "load_classifier", "run",
]  # fmt: skip

FASHION_MNIST = Path(__file__).with_name("fashion_mnist_classifier.safetensors")
SHA256 = "66c07dc7394cb4da263e4f7611fd6cc0de2b31961b9d2c36a6ff763c47d6aa7a"


# The classifier


class Classifier(nn.Module):
    r"""Four 3x3 convolutions, each normalised and rectified, the mean over positions, one Linear: logits of the classes.

    The image is halved after the first and after the third convolution. 98,682 parameters for grey images and ten classes.

    Args:
        channels: of the images: 1, or 3.
        image_size: their side, at least 4.
        names: of the classes.
        dataset: name of the data that it was trained on.
        widths: channels of the convolutions; the last is D, the number of features.

    Example:
        >>> import torch
        >>> from sdit.evaluate import Classifier
        >>> Classifier(1, 28, ["cat", "dog"])(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 2])
    """

    def __init__(self, channels: int, image_size: int, names: Sequence[str], dataset=None, widths=(16, 32, 64, 128)):
        super().__init__()
        self.channels, self.image_size, self.names = channels, image_size, tuple(names)
        self.dataset, self.widths = dataset, tuple(widths)
        layers = []
        for i, (before, width) in enumerate(zip((channels, *widths), widths)):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i in (0, 2) else []
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], len(self.names))

    def features(self, x: Tensor) -> Tensor:
        """(B, D) of (B, channels, S, S) in [-1, 1]."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, classes) logits of (B, channels, S, S) in [-1, 1]."""
        return self.head(self.features(x))


def load_classifier(path=None) -> Classifier:
    """The classifier in a file of ``perf/train_classifier.py``, in eval mode; without path the package's, for Fashion-MNIST.

    Raises:
        OSError: it cannot be read. ValueError: it is none, or damaged; the package's, that its sha256 is not the one that
        figures were taken with. ImportError: safetensors is missing.

    Example:
        >>> from sdit.evaluate import load_classifier
        >>> load_classifier().names[9]
        'ankle boot'
    """
    from .checkpoint import load

    if path is None and (found := sha256(FASHION_MNIST)) != SHA256:
        raise ValueError(f"{FASHION_MNIST} is not the classifier of this package: its sha256 is {found}, not {SHA256}")
    path = FASHION_MNIST if path is None else Path(path)
    groups, meta = load(path)
    try:
        classifier = Classifier(**meta["classifier"])
        classifier.load_state_dict(groups["classifier"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no classifier of perf/train_classifier.py: {' '.join(str(error).split())}") from None
    return classifier.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def sha256(path) -> str:
    """Of a file, 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@torch.no_grad()
def features(classifier: Classifier, images: Tensor | np.ndarray) -> Tensor:
    """What the classifier's last layer sees of each image.

    Args:
        images: (N, S, S, C) uint8, as ``Images.images`` and the .npz of ``sdit sample``; drawn ones are
            ``to_uint8(x).permute(0, 2, 3, 1)``. S is the classifier's; grey is repeated where it wants colour, colour is
            averaged where it wants grey.

    Returns:
        (N, D) float64.

    Raises:
        TypeError, ValueError: images.

    Example:
        >>> import torch
        >>> from sdit.evaluate import features, load_classifier
        >>> features(load_classifier(), torch.zeros(3, 28, 28, 1, dtype=torch.uint8)).shape
        torch.Size([3, 128])
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    size = classifier.image_size
    if images.ndim != 4 or images.shape[1:3] != (size, size) or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be (N, {size}, {size}, 1 or 3), got {tuple(images.shape)}")
    parts = []
    for part in images.split(500):
        x = from_uint8(part.permute(0, 3, 1, 2))
        x = x.mean(1, keepdim=True) if classifier.channels == 1 else x.expand(-1, classifier.channels, -1, -1)
        parts.append(classifier.features(x.contiguous(memory_format=torch.channels_last)).double())
    return torch.cat(parts) if parts else torch.empty(0, classifier.widths[-1], dtype=torch.float64)


# The measures


def frechet_distance(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    r"""Squared Frechet distance between the normal distributions that have the means and covariances of two sets.

    .. math:: |\mu_a - \mu_b|^2 + \operatorname{tr}(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2})

    with unbiased covariances. It is biased upwards, the more the smaller the sets are: compare only equal numbers. In float64.
    The trace of the root is the sum of the singular values of :math:`R_a R_b^T`, where :math:`S = R^T R` comes from a QR
    decomposition of the centred features: roots are never taken of differences, and singular covariances cost no accuracy.

    Args:
        a, b: (N, D) and (M, D), of :func:`features`; N and M above D, below which a covariance has no full rank.

    Raises:
        TypeError, ValueError: a or b.

    Source: Dowson and Landau, J. Multivariate Anal. 12 (1982); for generated images Heusel et al., arXiv 1706.08500, in the
    features of another network, whose numbers these are not to be compared with.

    Example:
        >>> import numpy as np
        >>> from sdit.evaluate import frechet_distance
        >>> x = np.random.default_rng(0).normal(size=(100, 8))
        >>> round(frechet_distance(x, x + 0.5), 6)  # 8 * 0.5^2
        2.0
    """
    a, b = _checked(a, b)
    for name, x in (("a", a), ("b", b)):
        if len(x) <= x.shape[1]:
            raise ValueError(f"{name} must hold more images than there are features, {x.shape[1]}, got {len(x)}")
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a, root_b = (np.linalg.qr(x - x.mean(0), "r") / math.sqrt(len(x) - 1) for x in (a, b))
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    squares = np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum()
    return max(0.0, float(squares - 2 * overlap))


def _checked(a, b):
    a, b = (np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x) for x in (a, b))
    for name, x in (("a", a), ("b", b)):
        if x.dtype.kind != "f":
            raise TypeError(f"{name} must be of a float dtype, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] != a.shape[-1] or not x.size:
            raise ValueError(f"a and b must be (N, D) and (M, D), got {a.shape} and {b.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite")
    return a.astype(np.float64), b.astype(np.float64)


def kid(a: Tensor | np.ndarray, b: Tensor | np.ndarray, *, subsets: int = 10, seed: int = 0) -> tuple[float, float]:
    r"""KID's estimator: squared maximum mean discrepancy of two sets, mean and standard error over disjoint subsets.

    Of m features x and n features y, with :math:`k(x, y) = (x \cdot y / D + 1)^3`,

    .. math:: \frac{\sum_{i \ne j} k(x_i, x_j)}{m (m - 1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{n (n - 1)}
        - \frac{2}{m n} \sum_{i, j} k(x_i, y_j)

    which is unbiased at any m and n, and negative by chance where the distributions are one. Both sets are shuffled and cut
    into ``subsets`` parts; the i-th of one is set against the i-th of the other. No image is in two parts: the values are
    independent, and their standard deviation over the root of their number is a standard error.

    Args:
        a, b: (N, D) and (M, D), of :func:`features`.
        subsets: at least 2, at most half of N and of M.
        seed: of the shuffling.

    Returns:
        (mean, standard error)

    Raises:
        TypeError, ValueError: an argument.

    Source: Binkowski et al., arXiv 1801.01401, in the features of another network.

    Example:
        >>> import numpy as np
        >>> from sdit.evaluate import kid
        >>> x, y = np.random.default_rng(0).normal(size=(2, 1000, 8))
        >>> mean, error = kid(x, y)
        >>> abs(mean) < 3 * error, kid(x, y + 0.5)[0] > 0.5
        (True, True)
    """
    a, b = _checked(a, b)
    least = min(len(a), len(b))
    if not isinstance(subsets, int) or isinstance(subsets, bool) or not 2 <= subsets <= least // 2:
        raise ValueError(f"subsets must be an int of 2 to half of the smaller set, {least // 2}, got {subsets!r}")
    a, b = (np.array_split(np.random.default_rng((seed, i)).permutation(x), subsets) for i, x in ((1, a), (2, b)))
    values = [_mmd(x, y) for x, y in zip(a, b)]
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(subsets))


def _mmd(x, y):
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def label_accuracy(classifier: Classifier, features: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier takes for their label, of (N, D) ``features`` and (N,) int ``labels``.

    Example:
        >>> import torch
        >>> from sdit.evaluate import label_accuracy, load_classifier
        >>> label_accuracy(load_classifier(), torch.zeros(2, 128), torch.tensor([10, 10]))  # there is no class 10
        0.0
    """
    return (classifier.head(features.float()).argmax(1) == labels).double().mean().item()


def evaluate(
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    classifier: Classifier | None = None,
    root: str | Path | None = None,
) -> dict:
    """All measures of some images, beside those of real ones.

    The images are set against the whole test split of the classifier's data set. So is the *floor*, as many images of the train
    split, the classes in turn: of each class the first. The floor, not 0, is what real images reach; both grow as N falls. The
    classifier was trained on the train split, which shows in the floor's label accuracy, the test split's being that of real
    images it has not seen.

    Args:
        images: N of them, uint8, as :func:`features` takes them.
        labels: (N,) ints; the number of classes stands for no label.
        classifier: of :func:`load_classifier`; None for the package's, for Fashion-MNIST.
        root: where the data set's files are, as :func:`sdit.data.load` takes it.

    Returns:
        {"n", "dataset", "drawn", "floor", "test"}: "drawn" and "floor" hold "frechet_distance" (:func:`frechet_distance`),
        "kid" and "kid_standard_error" (:func:`kid`), "label_accuracy" of the images that have a label, or None where none has,
        and "label_accuracy_by_class"; "test" the last two, of the images of the test split, and their number "n".

    Raises:
        TypeError, ValueError: images or labels; they are too few for a covariance of the features, or so many that
        the train split has no floor. OSError, ImportError: the data set cannot be had.

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
    labels = _check(labels, classifier)
    test, floor, floor_labels = _real(len(labels), classifier, root)
    drawn = features(classifier, images)
    reference = features(classifier, test.images)

    def against(found, labels):
        mean, error = kid(found, reference)
        measures = {"frechet_distance": frechet_distance(found, reference), "kid": mean, "kid_standard_error": error}
        return measures | _accuracies(classifier, found, labels)

    return {
        "n": len(labels),
        "dataset": classifier.dataset,
        "drawn": against(drawn, labels),
        "floor": against(features(classifier, floor), floor_labels),
        "test": {"n": len(test)} | _accuracies(classifier, reference, test.labels),
    }


def _accuracies(classifier, found, labels):
    def of(chosen):
        return label_accuracy(classifier, found[chosen], labels[chosen]) if chosen.any() else None

    by_class = {name: of(labels == i) for i, name in enumerate(classifier.names)}
    return {"label_accuracy": of(labels < len(by_class)), "label_accuracy_by_class": by_class}


def _check(labels, classifier):
    labels, classes, least = torch.as_tensor(labels), len(classifier.names), classifier.widths[-1] + 1
    if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise TypeError(f"labels must be ints in one dimension, got {labels.dtype} of shape {tuple(labels.shape)}")
    labels = labels.long()
    if len(labels) < least:
        raise ValueError(f"n must be at least {least}, for a covariance of {least - 1} features, got {len(labels)}")
    if labels.min() < 0 or labels.max() > classes:
        raise ValueError(f"labels must be in 0..{classes} ({classes} for none), got {labels.min()}..{labels.max()}")
    return labels


def _real(n, classifier, root):
    """The test split; n images of the train split, the classes in turn, and their labels."""
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
    device: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    threshold: float | None = None,
    clip: bool = False,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor, dict]:
    """n images of a checkpoint, the classes in turn, batch after batch kept on the disk: the same call goes on where one was
    killed, and a larger n goes on where a smaller one ended.

    Args:
        checkpoint: a file, or the folder of a run, whose newest checkpoint is taken.
        n: at least 1.
        folder: where images are kept, in a folder named after all that they depend on; None for ``~/.cache/sdit/evaluate``. It
            may be deleted at any time.
        ema, bf16, device: as ``sdit sample``.
        sampler, steps, guidance, threshold, clip, seed, batch_size: as :func:`sdit.sample.sample`.

    Returns:
        (n, S, S, C) uint8, (n,) int64 labels, and what they depend on, for JSON.

    Raises:
        As :func:`sdit.checkpoint.load_model` and :func:`sdit.sample.sample`. OSError: folder cannot be written.
        BlockingIOError: another process draws these images.

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
    from . import diffusion
    from . import model as network
    from . import sample as sampling
    from .checkpoint import load_model, newest

    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be an int of at least 1, got {n!r}")
    checkpoint = newest(checkpoint)
    device = sampling.usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(checkpoint, ema=ema).to(device)
    sampler = next(iter(diffusion.samplers(model.config))) if sampler is None else sampler
    steps = diffusion.SAMPLERS.get(sampler) if steps is None else steps
    settings = {"sampler": sampler, "steps": steps, "guidance": guidance, "threshold": threshold, "clip": clip, "seed": seed}
    settings |= {"batch_size": batch_size}
    sampling.check_settings(model.config, **settings)
    facts = {"checkpoint_sha256": sha256(checkpoint), **settings, "ema": ema, "bf16": bf16, "device": device.type}
    facts |= {"torch": torch.__version__, "diffusers": importlib.metadata.version("diffusers")}
    facts["code_sha256"] = {module.__name__: sha256(module.__file__) for module in (network, diffusion, sampling)}
    key = hashlib.sha256(json.dumps(facts, default=repr).encode()).hexdigest()[:16]
    folder = (_cache() / "evaluate" if folder is None else Path(folder)) / key
    facts["labels"] = "the classes in turn"

    parts, labels, checked = [], torch.arange(n) % model.config.num_classes, False
    size = model.config.channels * model.config.image_size**2
    cast = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
    try:
        with (
            lock(folder / "lock", f"{folder}, where these images are kept,", "wait until it ends"),
            sampling._bar(n, True) as bar,
            cast,
        ):
            for start in range(0, n, batch_size):
                wanted, path = labels[start : start + batch_size], folder / f"{start:07d}.npz"
                part = _kept(path, wanted)
                if part is None:
                    if not checked:
                        sampling.writable(path, "folder (XDG_CACHE_HOME moves it)", (1 << 20) + (n - start) * size)
                        checked = True
                    drawn = sampling.sample(
                        model, wanted, first=start, **settings,
                        callback=lambda _, step, steps, x: bar.update(len(x) / steps if step else 0),
                    )  # fmt: skip
                    sampling.save_npz(path, drawn, wanted)
                    part = to_uint8(drawn).permute(0, 2, 3, 1)
                else:
                    bar.initial += len(part)  # not counted in the images per second
                    bar.update(len(part))
                parts.append(part)
    except KeyboardInterrupt:
        done = sum(map(len, parts))
        raise KeyboardInterrupt(f"stopped after {done} of {n} images, which {folder} keeps: the same command goes on") from None
    return torch.cat(parts), labels, facts


def _kept(path, labels):
    """The first images of a file that :func:`draw` wrote for these labels or more; None where it is none, or damaged."""
    try:
        with np.load(path) as file:
            images, found = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    n = len(labels)
    return images[:n] if len(images) >= n and torch.equal(found[:n], labels) else None


def _arrays(path):
    """(images, labels) of a file that ``sdit sample --npz`` wrote."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError(f"it is not an npz file, but {Path(path).stat().st_size} bytes of something else")
        with np.load(path) as file:
            return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        why = str(error).partition(". ")[0]  # numpy goes on to recommend what executes the file
        raise ValueError(f"{path} must hold the arrays images and labels, as sdit sample --npz writes them: {why}") from None


def run(
    checkpoint: str | Path | None = None,
    *,
    images: str | Path | None = None,
    n: int | None = None,
    classifier: str | Path | None = None,
    root: str | Path | None = None,
    npz: str | Path | None = None,
    report: str | Path | None = None,
    **settings,
) -> dict:
    """``sdit evaluate``: draw ``n`` images (1,000) with a checkpoint, as :func:`draw` with ``settings`` does, or take the first
    ``n`` (all) of the file ``images``; print :func:`evaluate`'s measures of them; write the images to the file ``npz``, the
    measures and what they were measured with to the file ``report``, as JSON. Returns what ``report`` holds.
    """
    from .sample import writable

    if (checkpoint is None) == (images is None):
        raise ValueError("give a checkpoint, or --images with a file that sdit sample --npz wrote")
    if npz is not None and Path(npz).suffix != ".npz":
        raise ValueError(f"npz must end in .npz, got {str(npz)!r}")
    if images is not None and (settings or npz is not None):
        wrong = [*settings, *(["npz"] if npz is not None else [])]
        given = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise ValueError(f"--images are there already: {given} cannot be given with it")
    with ExitStack() as stack:
        for name, path in (("npz", npz), ("json", report)):
            if path is not None:
                path = Path(path)
                writable(path, name)
                advice = f"wait until it ends, or choose another {name} (--{name})"
                stack.enter_context(lock(path.with_name(f".{path.name}.lock"), str(path), advice))
        return _run(checkpoint, images, n, classifier, root, npz, report, settings)


def _run(checkpoint, images, n, classifier, root, npz, report, settings):
    from sdit_kernels import __version__

    from .checkpoint import load_model

    judge, path = load_classifier(classifier), FASHION_MNIST if classifier is None else Path(classifier)
    if images is not None:
        pixels, labels = _arrays(images)
        if n is not None and not 0 < n <= len(labels):
            raise ValueError(f"n must be 1 to {len(labels)}, as many as {images} holds, got {n}")
        pixels, labels = pixels[:n], labels[:n]
        facts = {"images": Path(images).name, "images_sha256": sha256(images)}
    else:
        n = 1000 if n is None else n
        model = load_model(checkpoint)
        config, root = model.config, root or model.trained_on.get("root")
        _fits(judge, config)
        _check(torch.arange(max(n, 0)) % config.num_classes, judge)
        _real(n, judge, root)  # says what is wrong before anything is drawn
        pixels, labels, facts = draw(checkpoint, n, **settings)
        facts = {"checkpoint": str(checkpoint)} | facts
    found = evaluate(pixels, labels, judge, root)
    found |= {"images": facts, "classifier": path.name, "classifier_sha256": sha256(path)}
    found |= {"sdit_kernels": __version__, "torch": torch.__version__, "numpy": np.__version__}
    print(_table(found))  # first, in case no file can be written
    lost = "with room for it the same command writes it" + (", without drawing the images again" if images is None else "")
    if npz is not None:
        with replacing(Path(npz), lost) as file:
            np.savez(file, images=pixels.numpy(), labels=labels.numpy())
    if report is not None:
        with replacing(Path(report), lost) as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
    return found


def _fits(classifier, config):
    if config.dataset is None:
        raise ValueError("the model does not say which data set it is for (sdit convert --dataset NAME)")
    if config.dataset != classifier.dataset:
        what = f"images of {config.dataset}, the classifier is for {classifier.dataset}"
    elif config.image_size != classifier.image_size:
        what = f"images of {config.image_size} pixels a side, the classifier is for {classifier.image_size}"
    elif config.num_classes != len(classifier.names):
        raise ValueError(f"the model has {config.num_classes} classes, the classifier {len(classifier.names)}")
    else:
        return
    raise ValueError(
        f"the model draws {what}: give --classifier FILE, which perf/train_classifier.py --dataset {config.dataset} "
        f"--size {config.image_size} --out FILE trains (in this package's repository)"
    )


def _table(found):
    n, test = found["n"], found["test"]

    def percent(x):
        return "" if x is None else f"{100 * x:.1f} %"

    rows = [("", "Frechet distance", "KID x 1000", "label accuracy")]
    for name, what in (("drawn", f"{n} drawn images"), ("floor", f"floor: {n} train images")):
        of = found[name]
        error = f"{1000 * of['kid']:.3f} \N{PLUS-MINUS SIGN} {1000 * of['kid_standard_error']:.3f}"
        rows.append((what, f"{of['frechet_distance']:.4f}", error, percent(of["label_accuracy"])))
    rows.append((f"{test['n']} test images", "", "", percent(test["label_accuracy"])))
    lines = [f"{a:<26}{b:>18}{c:>18}{d:>18}" for a, b, c, d in rows]
    by_class = found["drawn"]["label_accuracy_by_class"]
    least = ", ".join(f"{name} {100 * x:.0f}" for name, x in by_class.items() if x is not None)
    lines += [
        f"label accuracy by class: {least}" if least else "no image has a label",
        f"Distances are to all test images of {found['dataset']}; the floor is that of as many real ones, of each class the",
        f"first. Features: {found['classifier']}, sha256 {found['classifier_sha256'][:8]}..; figures of another",
        "classifier or number of images cannot be compared with these.",
    ]
    return "\n".join(lines)
