"""Load data sets into memory as uint8 arrays, convert them to network input, and choose the images of each training step.

``load`` finds a data set, ``to_batch`` converts its images to network input, ``Order`` chooses the images of each step.
"""

import gzip
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .download import download, has_checksum
from .files import atomic_write, cache_folder

__all__ = ["DATASETS", "Images", "Order", "from_uint8", "load", "to_batch", "to_uint8"]


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory: ``images`` (N, H, W, C) uint8 with C 1 or 3, ``labels`` (N,) int64, the class ``names``.

    ``mirror`` is True if an image that is flipped left to right keeps its class.

    Example:
        >>> from sdit.data import load
        >>> digits = load("digits")
        >>> digits.images.shape, digits.images.dtype, digits.labels[:4], digits.names[3]
        (torch.Size([1500, 8, 8, 1]), torch.uint8, tensor([0, 1, 2, 3]), '3')
    """

    name: str
    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    mirror: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        n, height, width, channels = self.images.shape
        return f"Images({self.name}: {n} of {height}x{width}x{channels}, {len(self.names)} classes)"


# Conversions


def from_uint8(images: Tensor) -> Tensor:
    """Convert uint8 levels 0..255 of any shape to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(x: Tensor) -> Tensor:
    """Round x to the nearest of the 256 levels and clip to 0..255: the exact inverse of ``from_uint8``. NaN becomes 0.

    Example:
        >>> import torch
        >>> from sdit.data import from_uint8, to_uint8
        >>> levels = torch.arange(256, dtype=torch.uint8)
        >>> torch.equal(to_uint8(from_uint8(levels)), levels)
        True
    """
    return x.float().add(1).mul_(127.5).round_().clamp_(0, 255).nan_to_num_(0).to(torch.uint8)


def _resize(images: Tensor, size: int) -> Tensor:
    """Crop (N, H, W, C) uint8 to the central square and resize to (N, size, size, C): bilinear, antialiased, rounded."""
    height, width = images.shape[1:3]
    if height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, top : top + side, left : left + side]
    if images.shape[1] == size:
        return images
    pieces = []
    for piece in images.split(4096):  # in pieces: a float copy of a whole data set takes four times its memory
        x = piece.permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        pieces.append(x.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(pieces).contiguous()


def to_batch(images: Tensor | np.ndarray, config, flip: Tensor | None = None) -> Tensor:
    r"""Convert images to network input: x / 127.5 - 1, channels first.

    Images of another size are cropped to the central square and resized (bilinear, antialiased). The result is rounded to one
    of the 256 levels, because the likelihood in the objective assumes these levels. Grey images are repeated to all channels.

    Args:
        images: (B, H, W, 1 or 3) uint8, on any device.
        config: configuration of the model; channels and image_size (S) are used.
        flip: (B,) bool, True for images to mirror left to right.

    Returns:
        (B, channels, S, S) float32 in [-1, 1], contiguous, on the device of images.

    Raises:
        TypeError: images are not uint8.
        ValueError: a shape is wrong, or config.channels is neither 3 nor the number of channels of the images.

    Example:
        >>> from sdit import PRESETS
        >>> from sdit.data import load, to_batch
        >>> x = to_batch(load("digits").images[:2], PRESETS["mnist"])
        >>> x.shape, x.min().item()
        (torch.Size([2, 3, 28, 28]), -1.0)
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 of 0..255, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.shape[1] * images.shape[2]:
        raise ValueError(f"images must be (B, H, W, C) with C 1 or 3, got {tuple(images.shape)}")
    if (images.shape[3], config.channels) not in ((1, 1), (1, 3), (3, 3)):
        allowed = "1 or 3" if images.shape[3] == 1 else "3"
        raise ValueError(f"config.channels must be {allowed} for images of {images.shape[3]} channels, got {config.channels}")
    x = from_uint8(_resize(images, config.image_size).permute(0, 3, 1, 2)).expand(-1, config.channels, -1, -1)
    if flip is not None:
        if not isinstance(flip, Tensor) or flip.dtype != torch.bool or flip.shape != (len(x),):
            raise ValueError(f"flip must be a bool tensor of shape ({len(x)},), got {flip!r}")
        x = torch.where(flip.to(x.device)[:, None, None, None], x.flip(3), x)
    return x.contiguous()


# Order


@lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


class Order:
    r"""Choose which of n images each training step uses: every image once per epoch, in a new order each epoch.

    The choice is a pure function of (n, seed, step), so a checkpoint only needs the step. Epoch e is the permutation that
    numpy's generator draws from (seed, e). Batches continue across the end of an epoch, so every batch is full and every image
    is used. ``batch_size`` counts the images of the whole step. With several processes, ``world`` must divide it, and process
    ``rank`` takes its slice; together the processes use the same images as one process.

    Args:
        n: number of images, at least 1.
        seed: at least 0.

    Raises:
        TypeError, ValueError: an argument, here or in a method, is not an int or is out of range.

    Example:
        >>> import torch
        >>> from sdit.data import Order
        >>> order = Order(10, seed=0)
        >>> sorted(torch.cat([order.indices(step, 4) for step in range(5)]).tolist()) == sorted(2 * list(range(10)))
        True
        >>> halves = [order.indices(3, 4, rank=rank, world=2) for rank in (0, 1)]
        >>> torch.equal(torch.cat(halves), order.indices(3, 4))
        True
    """

    def __init__(self, n: int, seed: int = 0):
        for name, value, least in (("n", n, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.n, self.seed = n, seed

    def indices(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """Return the indices of the images that this rank uses in step ``step`` (0, 1, ...): (batch_size / world,) int64."""
        first, count = self._slice(step, batch_size, rank, world)
        first += step * batch_size
        parts = []
        while count:
            epoch, offset = divmod(first, self.n)
            part = _permutation(self.n, self.seed, epoch)[offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def flips(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
        """Return which images of ``indices`` to mirror, each with probability 1/2: (batch_size / world,) bool."""
        first, count = self._slice(step, batch_size, rank, world)
        bits = np.random.default_rng((self.seed, 1, step)).random(batch_size) < 0.5
        return torch.from_numpy(bits[first : first + count])

    @staticmethod
    def _slice(step, batch_size, rank, world):
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..world-1, got rank {rank} of world {world}")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a positive multiple of world = {world}, got {batch_size}")
        return rank * (batch_size // world), batch_size // world


# Finding files


def _base_folders(root) -> list[Path]:
    if root is not None:
        return [Path(root).expanduser()]
    own = [Path(os.environ["SDIT_DATA"]).expanduser()] if os.environ.get("SDIT_DATA") else []
    return [*own, Path("data"), cache_folder(), Path("/usr/share/datasets")]


def _candidate_folders(spec, root) -> list[Path]:
    """List the folders to search. A base folder is searched itself only if the caller gave it or its name is the data set's:
    the files of MNIST and Fashion-MNIST have the same names."""
    found = []
    for base in _base_folders(root):
        found += [base / folder for folder in spec.folders]
        if root is not None or any(base.name == Path(folder).name for folder in spec.folders):
            found.append(base)
    return found


def _missing_files_error(name, spec, files, root, reasons) -> FileNotFoundError:
    not_downloaded = f", nor downloaded ({'; '.join(reasons)})" if reasons else ""
    if root is not None:
        advice = "Leave root (--data) out to have them downloaded, "
    elif reasons:
        advice = "Connect to a network, "
    else:
        advice = f"""python -c "from sdit.data import load; load('{name}')" downloads them; else """
    return FileNotFoundError(
        f"{name}: {', '.join(files)} not found in folders named {', '.join(spec.folders)} below "
        f"{', '.join(map(str, _base_folders(root)))}{not_downloaded}. {advice}{spec.advice}put the files into "
        f"{cache_folder() / name}, or say where they are with the environment variable SDIT_DATA or root (--data)"
    )


def _download(name, spec, files, reasons: list[str]) -> Path | None:
    """Download ``files`` into the cache from the first mirror with correct checksums. Return the folder or None."""
    folder = cache_folder() / name
    for mirror in spec.mirrors:
        try:
            for file, content in spec.fetch(mirror, files):
                if not has_checksum(content, spec.checksums[file]):
                    raise OSError(f"{file} has the wrong checksum")
                with atomic_write(folder / file) as target:
                    target.write(content)
            return folder
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            reasons.append(f"{mirror}: {error}")
    return None


# MNIST and Fashion-MNIST: idx files


def _read_bytes(path: Path) -> bytes:
    """Return the bytes of a file, decompressed if its name ends in .gz."""
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again") from None


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an idx file: two zero bytes, type 8 (unsigned byte), number of dimensions, their sizes (big-endian), values."""
    content = _read_bytes(path)
    start = 4 + 4 * ndim
    if content[:4] != bytes((0, 0, 8, ndim)) or len(content) < start:
        raise ValueError(
            f"{path} is not an idx file of bytes in {ndim} dimensions: it starts with {content[:4].hex(' ') or 'nothing'}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", ndim, offset=4))
    expected = int(np.prod(shape, dtype=object))
    if len(content) - start != expected:
        raise ValueError(f"{path} is damaged: it says shape {shape}, {expected} bytes, and holds {len(content) - start}")
    return np.frombuffer(content, np.uint8, expected, offset=start).reshape(shape)


def _fetch_idx(mirror, files):
    for file in files:
        yield file, gzip.decompress(download(f"{mirror}{file}.gz"))


def _load_idx(name, spec, root, split):
    prefix = {"train": "train", "test": "t10k"}[split]
    files = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    paths = None
    for folder in _candidate_folders(spec, root):
        found = [next((p for p in (folder / file, folder / f"{file}.gz") if p.is_file()), None) for file in files]
        if all(found):
            paths = found
            break
    if paths is None:
        reasons = []
        folder = _download(name, spec, files, reasons) if root is None else None
        if folder is None:
            raise _missing_files_error(name, spec, [f"{file}[.gz]" for file in files], root, reasons)
        paths = [folder / file for file in files]
    images, labels = _read_idx(paths[0], 3), _read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise ValueError(f"{paths[0]} holds {len(images)} images and {paths[1]} {len(labels)} labels")
    if not images.size:
        raise ValueError(f"{paths[0]} holds no image: shape {images.shape}")
    if labels.max() >= len(spec.names):
        raise ValueError(f"{paths[1]} is damaged: label {labels.max()} where 0..{len(spec.names) - 1} are allowed")
    return images[..., None], labels, spec.names


# CIFAR-10: the official python batches


class _ArraysOnly(pickle.Unpickler):
    """Unpickle numbers, strings, lists, dicts and numpy arrays; refuse all other objects, because they could run code."""

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 needs")


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = batch[b"data"], np.asarray(batch[b"labels"])
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is not a python batch of CIFAR-10: {type(error).__name__}: {error}") from None
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise ValueError(f"{path} is not a python batch of CIFAR-10: its data must be bytes of shape (N, 3072)")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{path} is damaged: {len(images)} images and labels of shape {labels.shape}")
    if labels.size and not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(f"{path} is damaged: labels {labels.min()}..{labels.max()} where 0..9 are allowed")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _fetch_cifar(mirror, files):
    with tarfile.open(fileobj=io.BytesIO(download(mirror)), mode="r:gz") as archive:
        for file in files:
            try:
                member = archive.extractfile(f"cifar-10-batches-py/{file}")
            except KeyError:
                member = None
            if member is None:
                raise OSError(f"the archive lacks {file}")
            yield file, member.read()


def _load_cifar(name, spec, root, split):
    files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    folders = _candidate_folders(spec, root)
    folder = next((folder for folder in folders if all((folder / file).is_file() for file in files)), None)
    if folder is None:
        reasons = []
        folder = _download(name, spec, files, reasons) if root is None else None
        if folder is None:
            raise _missing_files_error(name, spec, files, root, reasons)
    images, labels = zip(*(_read_cifar(folder / file) for file in files))
    return np.concatenate(images), np.concatenate(labels), spec.names


# Digits, and folders


def _load_digits(name, spec, root, split):
    if root is not None:
        raise ValueError(f"digits come with scikit-learn, not from a folder: leave root (--data) out, got {str(root)!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    part = slice(None, 1500) if split == "train" else slice(1500, None)  # other people wrote the last 297
    images = np.rint(digits.images[part] * (255 / 16)).astype(np.uint8)  # levels 0..16
    return images[..., None], digits.target[part], spec.names


_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def _load_folder(name, spec, root, split, size):
    if root is None:
        raise ValueError("root (--data) must name the folder of images, in which each class has a folder of its own")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("reading image files needs pillow: pip install pillow") from None
    top = Path(root).expanduser()
    if not top.is_dir():
        raise FileNotFoundError(f"the folder {top} does not exist")
    if (top / "train").is_dir() and (top / "test").is_dir():
        top = top / split
    elif split != "train":
        raise ValueError(f"{top} has no test split, all of it is 'train': make folders train and test in it for that")
    classes = sorted(p.name for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
    paths = [
        (path, label)
        for label, folder in enumerate([top / c for c in classes] or [top])
        for path in sorted(folder.rglob("*") if classes else folder.iterdir())
        if path.suffix.lower() in _SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
    if not paths:
        raise FileNotFoundError(
            f"no image in {top}: searched for {' '.join(_SUFFIXES)}" + (" in its sub-folders" if classes else "")
        )

    images, grey = [], True
    for path, _ in paths:
        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                grey = grey and image.mode in ("1", "L")
                pixels = torch.from_numpy(np.array(image.convert("L" if grey else "RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from None
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if size is not None:
            pixels = _resize(pixels[None], size)[0]
        elif images and pixels.shape[:2] != images[0].shape[:2]:
            raise ValueError(
                f"size must be given for images of different sizes: {paths[0][0].name} is {tuple(images[0].shape[:2])}, "
                f"{path} {tuple(pixels.shape[:2])}"
            )
        images.append(pixels)
    # One colour image makes the data set colour: expand the grey images that come before it.
    images = [pixels if grey else pixels.expand(-1, -1, 3) for pixels in images]
    return torch.stack(images).numpy(), np.array([label for _, label in paths]), tuple(classes) or ("image",)


@dataclass(frozen=True)
class _Spec:
    """How to find, load and download one data set."""

    load: Callable
    names: tuple[str, ...] = ()
    mirror: bool = False
    folders: tuple[str, ...] = ()  # subfolders of a base that may hold its files: ours, Debian's, torchvision's
    mirrors: tuple[str, ...] = ()  # addresses to download from
    fetch: Callable | None = None
    checksums: dict[str, str] | None = None  # of the decompressed files: SHA-256, or MD5 if only that is published
    advice: str = ""


_DIGITS = tuple("0123456789")

DATASETS: dict[str, _Spec] = {
    "digits": _Spec(_load_digits, _DIGITS),
    "mnist": _Spec(
        _load_idx,
        _DIGITS,
        folders=("mnist", "MNIST", "MNIST/raw"),
        mirrors=("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
        fetch=_fetch_idx,
        checksums={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion_mnist": _Spec(
        _load_idx,
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        mirror=True,
        folders=("fashion_mnist", "fashion-mnist", "FashionMNIST", "FashionMNIST/raw"),
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        fetch=_fetch_idx,
        checksums={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        advice="install Debian's package dataset-fashion-mnist, ",
    ),
    "cifar10": _Spec(
        _load_cifar,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        mirror=True,
        folders=("cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py"),
        mirrors=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
        fetch=_fetch_cifar,
        checksums={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
        advice="unpack cifar-10-python.tar.gz and ",
    ),
    "folder": _Spec(_load_folder, mirror=True),
}


def load(
    name: str, root: str | Path | None = None, split: str = "train", size: int | None = None, download: bool = True
) -> Images:
    r"""Load a whole data set into memory.

    ======================  =================================================================================================
    ``digits``              1797 images of 8x8 from scikit-learn: the first 1500 to train, the others to test
    ``mnist``               28x28: idx files, compressed or not
    ``fashion_mnist``       28x28: idx files; Debian's package dataset-fashion-mnist has them
    ``cifar10``             32x32 in colour: the official python batches, unpacked
    ``folder``              image files in ``root``, with one sub-folder per class; if ``root`` has folders train and test,
                            these hold the class folders
    ======================  =================================================================================================

    ``load`` searches root and its sub-folders, under the names that torchvision and Debian use. Without root it searches
    $SDIT_DATA, ./data, ~/.cache/sdit and /usr/share/datasets. If it finds no files there, it downloads them into ~/.cache/sdit
    and checks the checksums of the decompressed files. It never downloads if root is given.

    Args:
        name: one of ``DATASETS``.
        root: folder of the files; required for ``folder``, not allowed for ``digits``.
        split: "train" or "test".
        size: crop all images to the central square and resize them to size x size pixels; None keeps their size.
        download: False searches only this machine.

    Returns:
        :class:`Images`.

    Raises:
        ValueError: an argument is wrong, or a file is damaged.
        FileNotFoundError: files are missing; the message says what to install or where to put them.
        ImportError: scikit-learn or pillow is needed and missing.

    Source: digits: Alpaydin and Kaynak, UCI 1998; MNIST: LeCun et al. 1998; Fashion-MNIST: arXiv 1708.07747; CIFAR-10:
    Krizhevsky 2009.

    Example:
        >>> from sdit.data import load
        >>> load("digits", split="test")
        Images(digits: 297 of 8x8x1, 10 classes)
        >>> load("digits", size=16)
        Images(digits: 1500 of 16x16x1, 10 classes)
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size must be a positive int or None, got {size!r}")
    spec = DATASETS[name] if download else replace(DATASETS[name], mirrors=())
    if name == "folder":
        images, labels, names = spec.load(name, spec, root, split, size)
    else:
        images, labels, names = spec.load(name, spec, root, split)
    images = torch.from_numpy(np.array(images, order="C"))  # a copy, because the bytes of a file are read-only
    if size is not None:
        images = _resize(images, size)
    return Images(name, images, torch.from_numpy(labels.astype(np.int64)), names, spec.mirror)
