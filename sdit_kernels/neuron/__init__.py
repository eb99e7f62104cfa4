"""A neuron is its step, a Python function of a few lines. Its kernels and all derivatives follow from it.

``define`` makes an op of a step of your own. library.py has the neurons of the library, trace.py traces and differentiates a
step, printer.py prints it as code for each backend. See the code of a neuron with
``python -m sdit_kernels.neuron lif --backend triton --flags soft,detach``.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from .library import ADLIF, CUBA, LAPICQUE, LEAKY, LIF, NEURONS
from .trace import Neuron, Trace, Values

if TYPE_CHECKING:
    from ..own import define  # sdit_kernels/__init__.py puts it here, because it builds on the ops, which import this package

__all__ = ["ADLIF", "CUBA", "LAPICQUE", "LEAKY", "LIF", "NEURONS", "Neuron", "Trace", "Values", "Variant", "define", "trace"]


class Variant(NamedTuple):
    """A neuron with its flags and numbers, as launchers take them. A tensor parameter overrides its number here."""

    neuron: Neuron
    flags: tuple[Any, ...]  # in the order of neuron.flags
    values: tuple[float, ...]  # the parameters, then the numbers
    surrogate: str
    alpha: float
    norm: str = ""  # "rms" or "mean": v_threshold is a factor of this norm of the token
    detach_norm: bool = False

    @property
    def differentiates_norm(self) -> bool:
        return self.norm != "" and not self.detach_norm


@functools.cache
def trace(neuron: Neuron, flags: tuple[Any, ...], zeros: tuple[str, ...] = ()) -> Trace:
    """Trace a neuron once per setting of its flags. zeros: the numbers that are 0 and become constants of the code."""
    return Trace(neuron, dict(zip(neuron.flags, flags)), dict.fromkeys(zeros, 0.0))
