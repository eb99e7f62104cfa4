"""The lock of a folder: errors name its process, and it ends with that process."""

import doctest
import errno
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import sdit.lock as module
from sdit.lock import lock

fcntl = pytest.importorskip("fcntl")

HOLDER = """
import sys, time
from sdit.lock import lock
with lock(sys.argv[1], "it", "wait"):
    print("locked", flush=True)
    {then}
"""


def start_holder(path, then="time.sleep(1000)"):
    command = [sys.executable, "-c", HOLDER.format(then=then), str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert child.stdout.readline() == "locked\n"
    return child


def test_an_error_names_the_process_that_holds_the_lock(tmp_path):
    path = tmp_path / "folder" / "lock"
    child = start_holder(path)
    said = rf"^it is in use by process {child.pid} on \S+, started 20.*: wait$"
    with pytest.raises(BlockingIOError, match=said), lock(path, "it", "wait"):
        pass
    child.kill()
    child.wait()
    assert path.read_text().startswith(f"process {child.pid} on ")
    with lock(path, "it", "wait"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not path.exists()


def test_one_process_takes_the_lock_only_once(tmp_path):
    with lock(tmp_path / "lock", "it", "wait"):
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=f"process {os.getpid()} "), lock(tmp_path / "lock", "it", "wait"):
                pass
    with pytest.raises(KeyError), lock(tmp_path / "lock", "it", "wait"):
        raise KeyError
    with lock(tmp_path / "lock", "it", "wait"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_children_do_not_hold_the_lock(tmp_path):
    """One worker outlives its killed parent and does not keep the lock. Another ends first and does not release it."""
    then = """
    import os
    if os.fork() == 0:
        print("worker", os.getpid(), flush=True)
        time.sleep(1000)
        os._exit(0)
    if os.fork() == 0: sys.exit()
    os.wait()
    print("one is gone", flush=True)
    time.sleep(1000)"""
    child = start_holder(tmp_path / "lock", then.strip())
    lines = sorted(child.stdout.readline() for _ in range(2))
    try:
        assert lines[0] == "one is gone\n"
        with pytest.raises(BlockingIOError, match=f"process {child.pid} "), lock(tmp_path / "lock", "it", "wait"):
            pass
        child.kill()
        child.wait()
        with lock(tmp_path / "lock", "it", "wait"):
            os.kill(int(lines[1].split()[1]), 0)  # raises if the worker has ended
    finally:
        os.kill(int(lines[1].split()[1]), 9)


def test_a_lock_file_removed_in_between_is_created_again(tmp_path, monkeypatch):
    """The holder ends after we open the file and before we lock it."""
    path, flock, times = tmp_path / "lock", fcntl.flock, []

    def late(descriptor, how):
        times.append(how)
        if len(times) < 3:
            path.unlink()
            if len(times) == 1:
                path.write_text("of a third process")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock(path, "it", "wait"):
        assert len(times) == 3
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(BlockingIOError), lock(path, "it", "wait"):
            pass


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def unsupported(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said = "this file system has no locks .No locks available.: do not start another process on it"
    with pytest.warns(UserWarning, match=said), lock(tmp_path / "lock", "it", "wait"):
        pass


def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(OSError) as caught, lock("/proc/lock", "it", "wait"):
        pass
    assert caught.value.filename == "/proc/lock"


def test_the_lock_works_with_the_call_of_windows(tmp_path, monkeypatch):
    """It locks a byte far behind the text, so that other processes can read the text."""

    class Windows:
        LK_NBLCK = 2

        @staticmethod
        def locking(descriptor, how, count):
            assert (how, count, os.lseek(descriptor, 0, os.SEEK_CUR)) == (2, 1, 1 << 30)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PermissionError(errno.EACCES, "Permission denied") from None

    monkeypatch.setitem(sys.modules, "msvcrt", Windows)
    monkeypatch.setattr(module, "fcntl", None)
    with lock(tmp_path / "lock", "it", "wait"):
        assert (tmp_path / "lock").stat().st_size < 200
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} "), lock(tmp_path / "lock", "it", "wait"):
            pass


def test_docstring_examples_run():
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
