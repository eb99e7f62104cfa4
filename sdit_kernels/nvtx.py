"""Named ranges for Nsight Systems and Nsight Compute, domain "sdit_kernels": off unless SDIT_NVTX=1 when this is imported.

On, a range costs about 65 ns around an operator and 85 ns around a stage of a model, which has to ask whether torch.compile is
tracing it: a graph has no ranges but those of its operators. Off, a decorated function is the function itself.
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

    def __call__(self, f):  # as untraced, written out: a call between the two costs 40 ns
        attributes, push, pop = self.attributes, _DOMAIN.push_range, _DOMAIN.pop_range
        compiling = torch.compiler.is_dynamo_compiling  # half the price of is_compiling; export without dynamo just runs this

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
        """Around a function that torch.compile takes as it is, such as an operator's."""
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
    """A range called ``name``: for a ``with`` block, or as decorator of a function of positional arguments.

    Raises:
        ImportError: when this module is imported with SDIT_NVTX=1 and without the package nvtx. ValueError: SDIT_NVTX is
            neither 0 nor 1.

    Example:
        >>> from sdit_kernels import nvtx
        >>> with nvtx.range("evaluation"):
        ...     pass
        >>> @nvtx.range("step")
        ... def step(x):
        ...     return x
    """
    return _OFF if _DOMAIN is None or torch.compiler.is_dynamo_compiling() else _named(name)
