"""Count kernel launches."""

import collections
import contextlib
import functools
import importlib
import threading

_counters = []
_counters_lock = threading.Lock()


@contextlib.contextmanager
def launches():
    """Count kernel launches of all threads inside the block. Yield a Counter from kernel name to launches.

    It works in every mode and may be nested. Compilation without a launch (``warmup``) does not count.
    """
    counter = collections.Counter()
    with _counters_lock:
        _counters.append(counter)
    try:
        yield counter
    finally:
        with _counters_lock:
            # list.remove() would take the first *equal* counter, perhaps from an outer block.
            _counters[:] = [other for other in _counters if other is not counter]


def record_launch(name):
    with _counters_lock:
        for counter in _counters:
            counter[name] += 1


def count_runs_of(module, class_name):
    """Count the launches that go through ``run`` of a Triton class. In native mode our own launcher counts."""
    cls = getattr(importlib.import_module(module), class_name)
    original = cls.run

    @functools.wraps(original)
    def run(self, *args, grid, warmup, **kwargs):
        result = original(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup:
            record_launch(self.fn.__qualname__.rpartition(".")[2])  # __name__ is the name in the source for the interpreter
        return result

    cls.run = run
