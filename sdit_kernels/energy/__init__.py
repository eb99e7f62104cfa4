"""Count the multiply-adds, synaptic operations and energy of any model, with nothing to register.

``count(model, inputs)`` runs the model and returns a :class:`Report`. See docs/energy.md for how spikes are told from other
numbers, and for what the figures are worth.
"""

import warnings
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .recorder import Recorder
from .report import Costs, Input, Report, Row

__all__ = ["Costs", "Input", "Report", "Row", "count"]


class _Count:
    """What ``count`` returns without inputs: a context manager that gives a new report each time it is entered."""

    def __init__(self, model: nn.Module, costs: Costs):
        self._model, self._costs = model, costs
        self._running: Any = None
        self._recorder: Recorder | None = None

    def __enter__(self) -> Report:
        if self._running is not None:
            raise RuntimeError("this count is running: leave its with block, or call energy.count(model) once more")
        recorder = Recorder(self._model)
        running = recorder.running()
        running.__enter__()
        self._running, self._recorder = running, recorder
        return Report(recorder.found, self._costs)

    def __exit__(self, *error):
        running, self._running = self._running, None
        recorder, self._recorder = self._recorder, None
        running.__exit__(*error)
        if error[0] is None and recorder is not None and not recorder.found.saw_operators:
            warnings.warn("energy.count saw no operator: nothing ran in this thread inside the with block", stacklevel=2)

    def __getattr__(self, name):
        raise AttributeError(
            f"energy.count(model) without inputs is not a report and has no attribute {name!r}: it counts the calls in a with "
            "block, as in `with energy.count(model) as report: model()`"
        )


def count(model: nn.Module, /, *inputs: Any, costs: Costs = Costs(), **kwargs: Any) -> Any:  # noqa: B008
    """Count the products of a model: multiply-adds, what their operands are, synaptic operations, energy.

    ::

        synaptic operations = sum over events of the spiking operand of (level of the event) x (its fan-out)
        arithmetic energy   = costs.add x synaptic operations + costs.mac x multiply-adds of all other products

    With inputs, the model runs once, as it is (training or evaluation mode, gradients, autocast), and the report is returned.
    Without inputs, the result is a context manager that counts everything that this thread runs inside the with block: the
    model, its methods, submodules called by hand, and also a loss, an optimizer or another model. A product outside every
    module has the layer "(no module)". Backward passes do not count. Neuron states that the model keeps are not reset.

    Args:
        model: any module. A compiled model runs its Python code instead of the compiled code. On the "meta" device, where
            tensors have no values, every operand counts as floats.
        inputs, kwargs: arguments of the model. A model that takes no argument, or one named costs, needs the with block.
        costs: energy constants, a :class:`Costs`.

    Returns:
        A :class:`Report`, or a context manager that gives a new one each time it is entered.

    Raises:
        TypeError: model is not a module, or costs is not a :class:`Costs`.
        ValueError: the model has lazy parameters, which have no shape yet.

    Source: energy constants: Horowitz, ISSCC 2014. A level of n counts as n events, as in SDT-V3 (arXiv 2411.16061).

    Example:
        >>> import torch
        >>> from sdit_kernels import energy
        >>> net = torch.nn.Conv2d(1, 2, 3, padding=1, bias=False)
        >>> spikes = torch.zeros(1, 1, 4, 4)
        >>> spikes[0, 0, 0, 0] = spikes[0, 0, 1, 1] = 1
        >>> report = energy.count(net, spikes)
        >>> report.synaptic_operations  # the corner meets 4 taps, the other spike 9, in 2 channels
        26
        >>> with energy.count(net) as report:
        ...     for _ in range(3):
        ...         _ = net((torch.rand(1, 1, 4, 4) < 0.5).float())
        >>> report.macs, report.batches
        (864, 3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]
    if lazy:
        raise ValueError(f"the parameters of model must have shapes, but {lazy[0]} is lazy: call the model once before")
    if not isinstance(costs, Costs):
        raise TypeError(
            f"costs must be a sdit_kernels.energy.Costs, got {type(costs).__name__}; if the model takes an argument costs, "
            "call it inside `with energy.count(model) as report:`"
        )
    counting = _Count(model, costs)
    if not inputs and not kwargs:
        return counting
    with counting as report:
        model(*inputs, **kwargs)
    return report
