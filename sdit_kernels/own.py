"""Neurons of the user: ``sdit_kernels.neuron.define`` makes an op and a module of a step."""

import dataclasses
import hashlib
import inspect
import itertools
import keyword
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .checks import check_flag, check_number, is_number
from .neuron import Neuron, Trace
from .neuron.printer import TORCH, text
from .neuron.trace import Operations, in_order, is_condition
from .nn.neurons import OwnNeuron
from .ops.lif import No, Yes
from .ops.neuron import NeuronOp, check_state
from .ops.norm_lif import Norm
from .ops.operator import refuse_script

# Names that generated code, the schemas of operators, or the arguments and attributes of ops and modules use
_RESERVED = {
    "x", "ds", "g", "tape", "states", "parameters", "sharpness", "torch", "tl", "triton", "numba", "V", "KIND", "step",
    "record", "pullback", "tangent", "state", "surrogate", "alpha", "return_state", "return_state_seq", "spike_dtype",
    "op", "self", "keep", "backend", "Tensor", "Scalar", "ScalarType", "Device", "Layout", "Generator", "int", "float", "bool",
    "str", "complex", "inf", "nan", *dir(torch.nn.Module()), *dir(OwnNeuron),
}  # fmt: skip
_GENERATED = re.compile(r"t\d+|d_\w+|g_\w+|(tape|states|parameters)\d+|checkpoint\w*|start_\w+|\w+_value|\w+_seq")
_operators: dict[str, NeuronOp] = {}  # by the text of the neuron
_lock = threading.Lock()


class Op:
    """The op of a neuron, made by :func:`sdit_kernels.neuron.define`. Call it to run T steps."""

    __prepare_scriptable__ = refuse_script

    def __init__(self, step, states, parameters, start):
        self.step, self.states, self.start = step, states, start
        if not isinstance(parameters, Mapping) and len(set(parameters)) < len(parameters):
            raise ValueError(f"parameters must have different names, got {parameters!r}")
        self.defaults = dict(parameters) if isinstance(parameters, Mapping) else dict.fromkeys(parameters)
        self.parameters = tuple(self.defaults)
        name = re.sub(r"\W", "", getattr(step, "__name__", ""), flags=re.ASCII).strip("_")
        self.name = self.__name__ = name if name.isidentifier() else "neuron"
        self.__doc__ = getattr(step, "__doc__", None)
        self.flags = _flags_of(step)
        for kind, names in (("states", states), ("parameters", self.parameters), ("flags of the step", tuple(self.flags))):
            _check_names(kind, names)
        every = (*states, *self.parameters, *self.flags)
        if twice := {name for name in every if every.count(name) > 1}:
            raise ValueError(f"states, parameters and flags must have different names, got {min(twice)!r} twice")
        for name, default in self.defaults.items():
            if default is not None:
                _check_finite(f"the default of the parameter {name}", default)
        self._operator, self._binary = self._make_operator()

    def _make_operator(self):
        """Return (the operator, whether all spikes are 0 or 1). Neurons of the same text share an operator."""
        starts = {state: self.start.get(state, 0.0) for state in self.states}
        numbers = tuple(f"start_{state}" for state, value in starts.items() if value)
        neuron = Neuron(
            self.name, self.step, self.states, self.parameters, numbers,
            tuple(f"start_{state}" if value else None for state, value in starts.items()),
        )  # fmt: skip
        found, binary, traces = [repr((self.states, self.parameters, self.flags, starts))], True, {}
        for setting in itertools.product((False, True), repeat=len(self.flags)):
            try:
                traced = Trace(neuron, dict(zip(self.flags, setting)))
            except AttributeError as error:
                operations = [name for name in dir(Operations) if not name.startswith("_")]
                names = f"its states are {', '.join(self.states)}, its parameters {', '.join(self.parameters) or 'none'}, "
                names += f"the operations o.{', o.'.join(operations)}"
                raise AttributeError(f"the step of {self.name} uses a name that it does not have ({error}); {names}") from error
            traces[setting] = traced
            found.append(text(traced, TORCH, True, ("step", "pullback")))
            binary = binary and _is_binary(traced.spike)
        name = f"{self.name}_{hashlib.sha256(chr(0).join(found).encode()).hexdigest()[:12]}"
        with _lock:
            if name not in _operators:
                constants = [value for value in starts.values() if value]
                frozen = dataclasses.replace(neuron, name=name, step=_freeze(self.step, traces))
                _operators[name] = NeuronOp(frozen, constants=constants, binary=binary)
            return _operators[name], binary

    def __repr__(self):
        return f"<op {self.name}: states {', '.join(self.states)}; parameters {', '.join(self.parameters) or 'none'}>"

    def __reduce__(self):
        return define, (self.step, self.states, self.defaults, self.start)

    # fmt: off
    @overload
    def __call__(
        self, x: Tensor, state: Sequence[Tensor | None] | None = ..., *, return_state: No = ..., return_state_seq: No = ...,
        **settings: Any,
    ) -> Tensor: ...
    @overload
    def __call__(
        self, x: Tensor, state: Sequence[Tensor | None] | None = ..., *, return_state: Yes, return_state_seq: Yes,
        **settings: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]: ...
    @overload
    def __call__(
        self, x: Tensor, state: Sequence[Tensor | None] | None = ..., *, return_state: Yes, return_state_seq: No = ...,
        **settings: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...
    @overload
    def __call__(
        self, x: Tensor, state: Sequence[Tensor | None] | None = ..., *, return_state: No = ..., return_state_seq: Yes,
        **settings: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]: ...
    @overload
    def __call__(
        self, x: Tensor, state: Sequence[Tensor | None] | None = ..., *, return_state: bool = ..., return_state_seq: bool = ...,
        **settings: Any,
    ) -> Any: ...
    # fmt: on

    def __call__(
        self, x, state=None, *, surrogate="atan", alpha=None, return_state=False, return_state_seq=False, spike_dtype=None,
        **settings,
    ):  # fmt: skip
        """Run T steps; see :func:`sdit_kernels.neuron.define`."""
        parameters, flags = self._settings(settings, spike_dtype)
        return self._operator.states(
            x, state, parameters, flags, surrogate, alpha, return_state, return_state_seq, spike_dtype
        )  # fmt: skip

    def _settings(self, settings, spike_dtype):
        """Return (parameters, flags) in the order of the step."""
        for name in settings:
            if name not in self.defaults and name not in self.flags:
                names = ", ".join((*self.parameters, *self.flags)) or "none"
                raise TypeError(f"{self.name} has the settings {names}, got {name!r}")
        parameters, flags = [], []
        for name, default in self.defaults.items():
            parameters.append(settings.get(name, default))
            if parameters[-1] is None:
                raise TypeError(f"{self.name} needs its parameter {name}, a number or a tensor")
        for name, default in self.flags.items():
            flags.append(settings.get(name, default))
            check_flag(name, flags[-1])
        if spike_dtype is not None and not self._binary:
            raise ValueError(f"spike_dtype is for spikes that are 0 or 1, and {self.name} computes others: leave it out")
        return parameters, flags

    def after_norm(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, running_mean: Tensor | None = None,
        running_var: Tensor | None = None, state: Sequence[Tensor | None] | None = None, *, training: bool,
        momentum: float = 0.1, eps: float = 1e-5, channel_axis: int = 2, per_step: bool = False,
        step_factor: Tensor | None = None, scale: float = 1.0, process_group: Any = None, surrogate: Any = "atan",
        alpha: float | None = None, return_state: bool = False, return_state_seq: bool = False,
        spike_dtype: torch.dtype | None = None, **settings: Any,
    ):  # fmt: skip
        """Run a BatchNorm and T steps of this neuron, which must have one state, in one pass.

        The arguments of the norm are as in :func:`sdit_kernels.norm_lif`; the others, and the result, are as in a call of the
        op. A parameter (C,) has one value per channel of ``channel_axis``.

        Raises:
            TypeError: the neuron has several states. Otherwise the errors of :func:`sdit_kernels.norm_lif`.
        """
        if len(self.states) != 1:
            raise TypeError(f"after_norm is for neurons with one state, and {self.name} has {', '.join(self.states)}")
        (v,) = check_state(state, self.states)
        parameters, flags = self._settings(settings, spike_dtype)
        norm = Norm(
            weight, bias, running_mean, running_var, training, momentum, eps, channel_axis, per_step, step_factor, scale,
            process_group,
        )  # fmt: skip
        found = self._operator.after_norm(
            x, norm, v, None, False, parameters=parameters, flags=flags, surrogate=surrogate, alpha=alpha,
            return_v=return_state, return_v_seq=return_state_seq, spike_dtype=spike_dtype,
        )  # fmt: skip
        return (found[0], *((v,) for v in found[1:])) if isinstance(found, tuple) else found

    def module(
        self, *, surrogate="atan", alpha: float | None = None, step_mode: str = "m", store_state_seq: bool = False, **settings
    ) -> OwnNeuron:
        """Return a module that calls this op and keeps the states between calls, as :class:`sdit_kernels.nn.LIF` does.

        Args:
            surrogate (str | Callable): as in the op.
            alpha: as in the op.
            step_mode: "m" (multi-step): x and the spikes are (T, ...). "s" (single-step): they are (...), one step per call.
            store_state_seq: store each state after every step of the last call, the state v in ``.v_seq``.
            **settings (float | Tensor | bool): the parameters, and the flags of the step. A ``torch.nn.Parameter`` is learned;
                another tensor becomes a buffer of the module.

        Raises:
            TypeError, ValueError: a setting is missing, unknown, or has the wrong type or range.
        """
        return OwnNeuron(self, step_mode, store_state_seq, surrogate=surrogate, alpha=alpha, **settings)


def define(
    step: Callable[..., Any],
    states: Sequence[str] = ("v",),
    parameters: Iterable[str] | Mapping[str, float | None] = (),
    start: float | Mapping[str, float] = 0.0,
) -> Op:
    r"""Make a fused op, with its backward pass, of a neuron of your own.

    ``step(x, s, p, o)`` computes one time step and returns the spike and the states after the step: one state, or a tuple in
    the order of ``states``. x is the input current, ``s.v`` the state v before the step, ``p.k`` the parameter k. Besides
    + - * / it uses the operations o::

        o.fire(z)            1 where z >= 0, else 0, with the surrogate gradient
        o.fire_above(z)      1 where z > 0, else 0, with the surrogate gradient
        o.either(c, d)       1 where the spike c or d is 1, of two spikes that never fire together
        o.where(c, a, b)     a where c, else b; c is a spike. The gradient of c is (a - b) times the gradient of the result
        o.level(z, lo, hi)   z clipped to the integers lo and hi, then rounded, ties to even; its derivative is 1 within, else
                             0. unit=u: of z / u; window=(a, b): the derivative is 1 from a to b
        o.maximum(a, b), o.minimum(a, b), o.abs(a), o.exp(a)
        o.detach(a)          a without gradient

    The step runs on symbols once, here. Its kernels and derivatives on every backend follow from that. So it must not depend on
    anything that changes later, and values have no truth: write ``o.where`` instead of ``if``. A keyword argument of the step
    with the default True or False is a flag: a Python ``if`` on it is allowed, and each setting has kernels of its own.

    Args:
        step: the function. Its derivatives are exact except for the spike, which has the surrogate gradient.
        states: names of the states.
        parameters: names of the parameters, or {name: default}. A default of None means that every call must give a value.
        start: value of the states before the first step, one number or {state: number}.

    Returns:
        The op. ``op(x, state=None, *, surrogate="atan", alpha=None, return_state=False, return_state_seq=False,
        spike_dtype=None, **settings)`` runs T steps:

        - x is (T, ...), float32, float64, bfloat16 or float16. The arithmetic is float32, or float64 for float64 data.
        - state is a tuple with the states before the first step, x.shape[1:] each. None, for all or for one: ``start``.
        - settings are the parameters by name: numbers, scalar tensors, or tensors (C,) with one value per channel of x's last
          axis; and the flags.
        - The result is s, or (s, state), (s, state_seq) or (s, state, state_seq), as requested. The states are tuples.
          Gradients reach x, the states and the parameters. The forward pass keeps x, the given states and parameters, and
          for T > 16 the states of every 16th step.
        - spike_dtype may be torch.uint8 or torch.bool without gradients, if the spikes are 0 or 1.

        ``op.module(**settings)`` makes a ``torch.nn.Module`` that keeps the states between calls. Ops and modules can be
        pickled if Python can import the step by its name. Two ops of the same text share their operator and kernels.

    Raises:
        TypeError, ValueError, AttributeError: the step uses what symbols do not have (a truth value, ==, <, **, functions of
            torch or numpy, unknown names, constants that are not finite) or returns the wrong number of states; a name is not
            an identifier or is in use. A call raises the errors of :func:`sdit_kernels.lif`.

    Source: the example is KLIF: Jiang and Zhang, KLIF: An Optimized Spiking Neuron Unit for Tuning Surrogate Gradient Slope and
    Membrane Potential, arXiv 2302.09238, with a soft reset.

    Example:
        >>> import torch
        >>> from sdit_kernels import neuron
        >>> def klif(x, s, p, o):
        ...     h = s.v + (x - s.v) * 0.5
        ...     f = o.maximum(p.k * h, 0.0)
        ...     fired = o.fire(f - 1.0)
        ...     return fired, f - fired * 1.0
        >>> op = neuron.define(klif, parameters={"k": 1.0})
        >>> s, (v,) = op(torch.tensor([[1.5], [0.5], [0.0]]), k=2.0, return_state=True)
        >>> s.flatten().tolist(), v.tolist()
        ([1.0, 1.0, 0.0], [0.0])
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), op.module(k=torch.nn.Parameter(torch.tensor(1.0))))
    """
    if not callable(step):
        raise TypeError(f"step must be a function (x, s, p, o), got {type(step).__name__}")
    for name, names in (("states", states), ("parameters", parameters)):
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise TypeError(f"{name} must be a sequence of names, such as ('v',), got {names!r}")
    states = tuple(states)
    if not states:
        raise ValueError("states must name at least one state, got none")
    if isinstance(start, Mapping):
        if unknown := set(start) - set(states):
            raise ValueError(f"start must name states, {', '.join(states)}, got {min(map(str, unknown))}")
        start = dict(start)
    else:
        start = dict.fromkeys(states, start)
    for name, value in start.items():
        _check_finite(f"start of {name}", value)
    return Op(step, states, parameters if isinstance(parameters, Mapping) else tuple(parameters), start)


def costs(name: str) -> tuple[int, int] | None:
    """Return the multiply-adds and additions of a step of a neuron of the user by the name of its operator; None: unknown.

    A sum of a product counts with the product, and a division as a product. Comparisons, maxima and selects are additions.
    """
    if name not in _operators:
        return None
    traced = Trace(_operators[name].neuron)
    nodes = [n for n in in_order((traced.spike, *traced.after)) if n.args and n.op not in ("neg", "detach", "exp")]
    products = {n.id for n in nodes if n.op in ("*", "/")}
    sums = [n for n in nodes if n.op in ("+", "-") and any(a.id in products for a in n.args)]
    return len(products), len(nodes) - len(products) - len(sums)


def _freeze(step, traces):
    """Return a step that always computes what ``step`` computed when it was traced. traces: by the values of the flags."""
    names = tuple(_flags_of(step))

    def frozen(x, s, p, o, **flags):
        return traces[tuple(flags[name] for name in names)].replay(x, s, p, o)

    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in _flags_of(step).items()
    ]
    positional = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in "xspo"]
    frozen.__signature__ = inspect.Signature(positional + keywords)  # type: ignore[attr-defined]
    return frozen


def _is_binary(spike):
    chosen = spike.op == "select" and all(a.op == "number" and str(float(a.value)) in ("0.0", "1.0") for a in spike.args[1:])
    return chosen or is_condition(spike)


def _check_finite(name, value):
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    check_number(name, value, torch.float32)


def _check_names(kind, names):
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{kind} must be names, got {type(name).__name__}")
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or keyword.iskeyword(name):
            raise ValueError(f"{kind} must be identifiers of the letters a-z, digits and underscores, got {name!r}")
        if name in _RESERVED or _GENERATED.fullmatch(name):
            raise ValueError(f"{kind} must not be called {name!r}: the op, the module or generated code uses this name")


def _flags_of(step):
    """Return {name: default} of the keyword arguments of a step, after checking its signature."""
    try:
        signature = inspect.signature(step)
    except ValueError as error:  # some builtins have none
        raise TypeError(f"step must be a function (x, s, p, o), got {step!r}") from error
    found = signature.parameters.values()
    flags = {f.name: f.default for f in found if f.kind is f.KEYWORD_ONLY}
    for name, default in flags.items():
        if not isinstance(default, bool):
            raise TypeError(f"the keyword argument {name} of the step must have the default True or False")
    try:
        signature.bind(*"xspo")
    except TypeError as error:
        raise TypeError(f"step must take the arguments (x, s, p, o), and flags by keyword, got {signature}") from error
    return flags
