"""A lock file that one process holds while it writes. The operating system releases the lock when the process dies."""

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

_held_descriptors = set()  # descriptors of the lock files of this process
_LOCKED_OFFSET = 1 << 30  # Windows refuses reads of a locked byte, so the locked byte lies far beyond the end of the text


def _close_in_child():
    """Close inherited lock files. A forked child shares them, so a worker that outlives its parent would keep the locks."""
    for descriptor in _held_descriptors:
        os.close(descriptor)
    _held_descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _take_lock(descriptor):
    """Take the lock. It raises BlockingIOError or PermissionError if another process holds it, another OSError if this disk has
    no locks."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        os.lseek(descriptor, _LOCKED_OFFSET, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def _open_locked(path, subject, advice):
    """Open and lock the file; return its descriptor. Return None if the earlier holder removed the file between our open and
    our lock, because a lock on a removed file protects nothing. On a disk without locks, warn and return the
    descriptor unlocked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _take_lock(descriptor)
        except (BlockingIOError, PermissionError):
            with suppress(FileNotFoundError):  # the holder has just removed the file: return None, and the caller tries again
                holder = path.read_text() or "another process"
                raise BlockingIOError(f"{subject} is in use by {holder}: {advice}") from None
        except OSError as error:
            problem = f"{path}: this file system has no locks ({error.strerror})"
            warnings.warn(
                f"{problem}: do not start another process on {subject}", stacklevel=4
            )  # the line of the with statement
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
    """Hold the lock file ``path`` during a with block. The text of the file names this process.

    The operating system ties the lock to the open file. The lock ends with the process, also after ``kill -9``, and a lock file
    that a dead process left does not block others. If the file system has no locks, the block runs without one, after a
    warning.

    Args:
        path: the lock file. It is removed at the end if possible; a file that is left behind locks nothing.
        subject: name of the protected object, for the error message.
        advice: advice for the user if another process holds the lock, for the error message.

    Raises:
        BlockingIOError: another process holds the lock; the message names it. OSError: the file cannot be made.

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
    while (descriptor := _open_locked(path, subject, advice)) is None:
        pass
    _held_descriptors.add(descriptor)
    try:
        with suppress(OSError):  # on a full disk the lock still holds, without its text
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}".encode())
        yield
    finally:
        if descriptor in _held_descriptors:  # not in a forked child, where _close_in_child has closed it
            with suppress(OSError):  # Windows cannot remove an open file
                path.unlink()
            _held_descriptors.remove(descriptor)
            os.close(descriptor)
