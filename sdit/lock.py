"""A lock that one process holds for what it writes, and that the operating system takes from it when it dies."""

import os
import socket
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["lock"]

_held = set()  # descriptors of the lock files of this process
_FAR = 1 << 30  # Windows refuses reads of a locked byte, hence one behind the text


def _close_in_child():
    """A child shares its parent's locks until it closes them, so a worker that outlives its parent would keep the folder."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _try(descriptor):
    """Take the lock. BlockingIOError or PermissionError: another process has it. Any other OSError: there are no locks here."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def _open(path, subject, advice):
    """The descriptor of the locked file, or None where the holder before removed the file between our open and our lock: such a
    lock would protect nothing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _try(descriptor)
        except (BlockingIOError, PermissionError):
            with suppress(FileNotFoundError):  # that process has just ended
                holder = path.read_text() or "another process"
                raise BlockingIOError(f"{subject} is in use by {holder}: {advice}") from None
        except OSError as error:
            warnings.warn(f"{path}: no locks here ({error.strerror}); start no other process on {subject}", stacklevel=4)
            return descriptor
        else:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def lock(path: str | Path, subject: str, advice: str):
    """Hold the lock file ``path`` in this block; its text names this process.

    The lock belongs to the open file: it ends with the process, also after ``kill -9``, and a file that a dead process left is
    no obstacle. Where the file system has no locks, a warning says so and the block runs without one.

    Args:
        path: of the lock file, which exists only while the lock is held.
        subject: what it protects, for the error.
        advice: what to do if another process holds it, for the error.

    Raises:
        BlockingIOError: another process holds it; the error names it. OSError: the file cannot be made.

    Example:
        >>> import tempfile
        >>> from sdit.lock import lock
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with lock(f"{folder}/lock", folder, "wait"):
        ...         print(open(f"{folder}/lock").read().split()[0])
        process
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while (descriptor := _open(path, subject, advice)) is None:
        pass
    _held.add(descriptor)
    try:
        with suppress(OSError):  # a full disk: the lock holds without its text
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}".encode())
        yield
    finally:
        if descriptor in _held:  # not in a forked child
            with suppress(OSError):  # Windows removes no open file
                path.unlink()
            _held.remove(descriptor)
            os.close(descriptor)
