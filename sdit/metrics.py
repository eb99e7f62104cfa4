"""Compare two sets of features: Frechet distance, kernel inception distance (KID), precision and recall."""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["frechet_distance", "kid", "precision_recall"]


def frechet_distance(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    r"""Compute the squared Frechet distance between normal distributions with the means and covariances of two feature sets.

    .. math:: |\mu_a - \mu_b|^2 + \operatorname{tr}(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2})

    The covariances are unbiased. The distance is biased upwards, more so for smaller sets, so only compare sets of equal size.
    The computation runs in float64. The trace of the root is the sum of the singular values of :math:`R_a R_b^T`, where
    :math:`S = R^T R` comes from a QR decomposition of the centred features. This form takes no root of a difference and stays
    accurate for singular covariances.

    Args:
        a, b: (N, D) and (M, D), from :func:`sdit.classifier.features`; N and M must exceed D, so that the covariances have full
            rank.

    Raises:
        TypeError, ValueError: a or b has a wrong dtype, shape or number of images.

    Source: Dowson and Landau, J. Multivariate Anal. 12 (1982). For generated images: Heusel et al., arXiv 1706.08500, in the
    features of another network; do not compare their numbers with these.

    Example:
        >>> import numpy as np
        >>> from sdit.metrics import frechet_distance
        >>> x = np.random.default_rng(0).normal(size=(100, 8))
        >>> round(frechet_distance(x, x + 0.5), 6)  # 8 * 0.5^2
        2.0
    """
    a, b = _check_features(a, b)
    for name, x in (("a", a), ("b", b)):
        if len(x) <= x.shape[1]:
            raise ValueError(f"{name} must hold more images than there are features, {x.shape[1]}, got {len(x)}")
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a, root_b = (np.linalg.qr(x - x.mean(0), "r") / math.sqrt(len(x) - 1) for x in (a, b))
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    squares = np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum()
    return max(0.0, float(squares - 2 * overlap))


def _check_features(a, b):
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
    r"""Compute the KID of two feature sets: squared maximum mean discrepancy, mean and standard error over disjoint subsets.

    For m features x and n features y, with :math:`k(x, y) = (x \cdot y / D + 1)^3`,

    .. math:: \frac{\sum_{i \ne j} k(x_i, x_j)}{m (m - 1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{n (n - 1)}
        - \frac{2}{m n} \sum_{i, j} k(x_i, y_j)

    This estimator is unbiased for any m and n. It can be negative by chance if the distributions are equal. Both sets are
    shuffled and cut into ``subsets`` parts, and part i of one is compared with part i of the other. No image is in two parts,
    so the values are independent, and their standard deviation over the root of their number is a standard error.

    Args:
        a, b: (N, D) and (M, D), from :func:`sdit.classifier.features`.
        subsets: number of parts, at least 2, at most half of N and of M.
        seed: seed of the shuffling.

    Returns:
        (mean, standard error)

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or value.

    Source: Binkowski et al., arXiv 1801.01401, in the features of another network.

    Example:
        >>> import numpy as np
        >>> from sdit.metrics import kid
        >>> x, y = np.random.default_rng(0).normal(size=(2, 1000, 8))
        >>> mean, error = kid(x, y)
        >>> abs(mean) < 3 * error, kid(x, y + 0.5)[0] > 0.5
        (True, True)
    """
    a, b = _check_features(a, b)
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


def precision_recall(a: Tensor | np.ndarray, b: Tensor | np.ndarray, *, k: int = 3) -> tuple[float, float]:
    r"""Compute how many generated images look real (precision) and how many kinds of real images are generated (recall).

    Every point of a set has a ball that reaches to its k-th nearest neighbour in the set. Precision is the share of a inside a
    ball of b. Recall is the share of b inside a ball of a. Balls shrink as a set grows, so only compare sets of equal size.

    Args:
        a, b: features of generated images (N, D) and of real images (M, D), from :func:`sdit.classifier.features`.
        k: at least 1, below N and M.

    Returns:
        (precision, recall), in 0 .. 1. The computation runs in float64.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or value.

    Source: Kynkaanniemi et al., Improved precision and recall, arXiv 1904.06991, in the features of another network.

    Example:
        >>> import numpy as np
        >>> from sdit.metrics import precision_recall
        >>> real = np.random.default_rng(0).normal(size=(1000, 2))
        >>> precision, recall = precision_recall(real[real[:, 0] > 1], real)  # real images, but only one kind of them
        >>> precision, recall < 0.25
        (1.0, True)
    """
    a, b = _check_features(a, b)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k < min(len(a), len(b)):
        raise ValueError(f"k must be an int of 1 to {min(len(a), len(b)) - 1}, below the smaller set, got {k!r}")
    return _share_inside(a, b, k), _share_inside(b, a, k)


_ROWS = 1000  # rows of a matrix of distances at a time


def _share_inside(points, centres, k):
    """Return the share of points inside a ball around a centre that reaches to its k-th nearest neighbour."""
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _distances(centres, centres)])  # 0 is the centre itself
    return float(np.mean(np.concatenate([(d <= radii).any(1) for d in _distances(points, centres)])))


def _distances(x, y):
    """Yield the Euclidean distances of some rows of x to all rows of y. Equal rows have the distance 0."""
    y = torch.from_numpy(y)
    for part in torch.from_numpy(x).split(_ROWS):
        yield torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()
