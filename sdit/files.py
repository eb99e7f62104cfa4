"""Files that are whole or not there, and errors that name them."""

import hashlib
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_write", "cache_folder", "ensure_writable", "explained", "sha256"]


@contextmanager
def atomic_write(path: Path, lost: str = ""):
    """A file beside ``path`` that takes its place once it is complete and on the disk, and is removed otherwise; an OSError of
    it names ``path``, and says what is ``lost``."""
    with explained(path, lost):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o644)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise


@contextmanager
def explained(path: Path, lost: str = ""):
    """An OSError in this block, which writes ``path``, names it, and says what is ``lost``."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"{why}; {lost}" if lost else why, str(path)) from None


def ensure_writable(path: Path, name: str, size: int = 1 << 20) -> None:
    """Make the folder of a file that is to be written, or an OSError or ValueError now, not when its content is there: ``size``
    bytes are written beside it and removed."""
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
    """Where downloads and drawn images are kept: ``$XDG_CACHE_HOME/sdit``, usually ``~/.cache/sdit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdit"


def sha256(path) -> str:
    """Of a file, 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
