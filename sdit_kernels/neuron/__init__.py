"""A neuron is its step, a Python function of a few lines. Its kernels and all derivatives follow from it.

library.py has the neurons, trace.py traces and differentiates a step, printer.py prints it as code for each backend. See the
code of a neuron with ``python -m sdit_kernels.neuron lif --backend triton --flags soft,detach``.
"""

import functools
from typing import Any, NamedTuple

from .library import LEAKY, LIF, NEURONS
from .trace import Neuron, Trace, Values

__all__ = ["LEAKY", "LIF", "NEURONS", "Neuron", "Trace", "Values", "Variant", "trace"]


class Variant(NamedTuple):
    """A neuron with its flags and numbers, as launchers take them. A tensor parameter overrides its number here."""

    neuron: Neuron
    flags: tuple[Any, ...]  # in the order of neuron.flags
    values: tuple[float, ...]  # the parameters, then the numbers
    surrogate: str
    alpha: float


@functools.cache
def trace(neuron: Neuron, flags: tuple[Any, ...], zeros: tuple[str, ...] = ()) -> Trace:
    """Trace a neuron once per setting of its flags. zeros: the numbers that are 0 and become constants of the code."""
    return Trace(neuron, dict(zip(neuron.flags, flags)), dict.fromkeys(zeros, 0.0))
