"""Write files atomically, check beforehand that a file can be written, hash files; where the cache and the models are."""

import hashlib
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["PRETRAINED", "atomic_write", "cache_folder", "ensure_writable", "name_in_errors", "sha256"]

# The models in this package: averaged weights of the presets fashion_tiny and fashion_pure
PRETRAINED = {
    "pretrained": Path(__file__).with_name("fashion_mnist_pure.safetensors"),
    "pretrained-hybrid": Path(__file__).with_name("fashion_mnist_hybrid.safetensors"),
    "pretrained-pure": Path(__file__).with_name("fashion_mnist_pure.safetensors"),
}


@contextmanager
def atomic_write(path: Path, lost: str = ""):
    """Open a temporary file beside ``path`` for writing. It replaces ``path`` once it is complete and on the disk.

    If the with block or the write fails, the temporary file is removed and ``path`` is unchanged. An OSError names ``path`` and
    ends with the text ``lost``, which says what the user loses, for example "this checkpoint is not saved".
    """
    with name_in_errors(path, lost):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o644)  # mkstemp makes files that other users cannot read
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise


@contextmanager
def name_in_errors(path: Path, lost: str = ""):
    """Make an OSError of this with block, which writes ``path``, name ``path`` and end with the text ``lost``."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"{why}; {lost}" if lost else why, str(path)) from None


def ensure_writable(path: Path, name: str, size: int = 1 << 20) -> None:
    """Check that a file of ``size`` bytes can be written at ``path``, so that a long computation does not fail at its end.

    This makes the folder, then writes ``size`` bytes beside ``path`` and removes them. ``name`` is the argument that an error
    message names, for example "out".

    Raises:
        OSError: the folder cannot be made or has no room. ValueError: path is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{name} must be a file, {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            for done in range(0, size, 1 << 20):
                file.write(bytes(min(1 << 20, size - done)))
    except OSError as error:
        raise OSError(f"{name}: no file of {size:,} bytes can be written in {path.parent}: {error.strerror}") from None


def cache_folder() -> Path:
    """Return the folder for downloads and generated images: ``$XDG_CACHE_HOME/sdit``, usually ``~/.cache/sdit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdit"


def sha256(path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
