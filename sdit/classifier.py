"""The small frozen classifier in whose features drawn images are measured."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint import load
from .data import from_uint8
from .files import sha256

__all__ = ["FASHION_MNIST", "Classifier", "features", "label_accuracy", "load_classifier"]

FASHION_MNIST = Path(__file__).with_name("fashion_mnist_classifier.safetensors")
SHA256 = "66c07dc7394cb4da263e4f7611fd6cc0de2b31961b9d2c36a6ff763c47d6aa7a"


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
        >>> from sdit.classifier import Classifier
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
        >>> from sdit.classifier import load_classifier
        >>> load_classifier().names[9]
        'ankle boot'
    """
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
        >>> from sdit.classifier import features, load_classifier
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


def label_accuracy(classifier: Classifier, features: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier takes for their label, of (N, D) ``features`` and (N,) int ``labels``.

    Example:
        >>> import torch
        >>> from sdit.classifier import label_accuracy, load_classifier
        >>> label_accuracy(load_classifier(), torch.zeros(2, 128), torch.tensor([10, 10]))  # there is no class 10
        0.0
    """
    return (classifier.head(features.float()).argmax(1) == labels).double().mean().item()
