"""Named ranges for Nsight Systems and Nsight Compute in the domain "sdit_kernels". SDIT_NVTX=1 at import turns them on.

A range costs about 65 ns around an operator, and 85 ns around a stage of a model, where it must check if torch.compile is
tracing. A compiled graph has only the ranges of its operators. If ranges are off, a decorated function is the function itself.
"""

import functools
import os

import torch

__all__ = ["range"]


def _domain():
    asked = os.environ.get("SDIT_NVTX", "0")
    if asked in ("", "0"):
        return None
    if asked != "1":
        raise ValueError(f"SDIT_NVTX must be 0 or 1; got {asked!r}")
    try:
        import nvtx
    except ImportError as error:
        raise ImportError("SDIT_NVTX=1 needs the package nvtx: pip install nvtx") from error
    return nvtx.get_domain("sdit_kernels")


class _Off:
    def __enter__(self):
        pass

    def __exit__(self, *exception):
        pass

    def __call__(self, f):
        return f

    untraced = __call__


class _Range:
    def __init__(self, name):
        self.attributes = _DOMAIN.get_event_attributes(message=name)

    def __enter__(self):
        if not torch.compiler.is_dynamo_compiling():
            _DOMAIN.push_range(self.attributes)

    def __exit__(self, *exception):
        if not torch.compiler.is_dynamo_compiling():
            _DOMAIN.pop_range()

    def __call__(self, f):  # repeats the code of untraced, because a call from one to the other costs 40 ns
        attributes, push, pop = self.attributes, _DOMAIN.push_range, _DOMAIN.pop_range
        compiling = torch.compiler.is_dynamo_compiling  # half the time of is_compiling; export without dynamo runs the range

        def ranged(*args):
            if compiling():
                return f(*args)
            push(attributes)
            try:
                return f(*args)
            finally:
                pop()

        ranged.__wrapped__ = f
        return ranged

    def untraced(self, f):
        """Decorate a function that torch.compile does not trace, for example the implementation of an operator."""
        attributes, push, pop = self.attributes, _DOMAIN.push_range, _DOMAIN.pop_range

        def ranged(*args):
            push(attributes)
            try:
                return f(*args)
            finally:
                pop()

        ranged.__wrapped__ = f
        return ranged


_DOMAIN = _domain()
_OFF = _Off()
_named = functools.cache(_Range)


def range(name: str):
    """Return a range called ``name``, for a ``with`` block or as a decorator of a function with positional arguments.

    Args:
        name: the name that Nsight shows.

    Raises:
        ImportError: SDIT_NVTX=1 and the package nvtx is not installed. Raised when this module is imported.
        ValueError: SDIT_NVTX is neither 0 nor 1. Raised when this module is imported.

    Example:
        >>> from sdit_kernels import nvtx
        >>> with nvtx.range("evaluation"):
        ...     pass
        >>> @nvtx.range("step")
        ... def step(x):
        ...     return x
    """
    return _OFF if _DOMAIN is None or torch.compiler.is_dynamo_compiling() else _named(name)
