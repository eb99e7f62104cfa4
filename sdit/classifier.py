"""The small frozen classifier whose features measure the quality of generated images."""

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
    r"""A small image classifier: four 3x3 convolutions, the mean over positions, and one Linear that gives class logits.

    Batch norm and ReLU follow each convolution. Max pooling halves the image after the first and the third convolution. The
    network has 98,682 parameters for grey images and ten classes.

    Args:
        channels: channels of the images, 1 or 3.
        image_size: side of the images, at least 4.
        names: names of the classes.
        dataset: name of the data set that it was trained on.
        widths: channels of the convolutions; the last is D, the number of features.

    Shape:
        x: (B, channels, image_size, image_size), in [-1, 1]. Output: (B, classes).

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
        """Return the features (B, D) of images (B, channels, S, S) in [-1, 1]."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, channels, S, S) in [-1, 1]."""
        return self.head(self.features(x))


def load_classifier(path=None) -> Classifier:
    """Load a classifier that ``perf/train_classifier.py`` saved, in eval mode. None loads the one in this package.

    Raises:
        OSError: path cannot be read. ValueError: path is not a classifier, or is damaged; or the SHA-256 of the classifier in
            this package is not the one that the published figures were measured with. ImportError: safetensors is missing.

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
    """Compute the classifier's features of each image: the input of its last layer.

    Args:
        images: (N, S, S, C) uint8, as in ``Images.images`` and the .npz of ``sdit sample``. Convert the output x of a model
            with ``to_uint8(x).permute(0, 2, 3, 1)``. S must be the classifier's image_size. A grey image is repeated for a
            colour classifier; a colour image is averaged for a grey classifier.

    Returns:
        (N, D) float64.

    Raises:
        TypeError, ValueError: images has a wrong dtype or shape.

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
    """Return the share of images whose predicted class equals their label.

    Args:
        features: (N, D), from :func:`features`.
        labels: (N,) ints.

    Example:
        >>> import torch
        >>> from sdit.classifier import label_accuracy, load_classifier
        >>> label_accuracy(load_classifier(), torch.zeros(2, 128), torch.tensor([10, 10]))  # class 10 does not exist
        0.0
    """
    return (classifier.head(features.float()).argmax(1) == labels).double().mean().item()
