"""How good drawn images are: Frechet distance, KID and label accuracy, in the features of a small frozen classifier.

``evaluate`` measures images, ``run`` is the body of ``sdit evaluate``, from a checkpoint or a file to a report.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .data import _cache, from_uint8, load, replacing, to_uint8

__all__ = [
    "Classifier", "draw", "evaluate", "features", "frechet_distance", "kid", "label_accuracy", "load_classifier", "run",
]  # fmt: skip

FASHION_MNIST = Path(__file__).with_name("fashion_mnist_classifier.safetensors")
SHA256 = ""
_TRAIN = "python perf/train_classifier.py --dataset {} --out {}.safetensors, in this package's repository, trains one"


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
    return classifier.eval().requires_grad_(False)


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
    into ``subsets`` parts; the i-th of one is set against the i-th of the other. No image is in two parts, so that the values are
    independent and their standard deviation over the root of their number is a standard error.

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
    a, b = (np.array_split(np.random.default_rng((seed, i)).permutation(x), subsets) for i, x in enumerate((a, b)))
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
    """Share of images that the classifier takes for their label, of (N, D) ``features`` and (N,) int ``labels``."""
    return (classifier.head(features.float()).argmax(1) == labels).double().mean().item()
