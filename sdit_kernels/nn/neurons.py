"""Spiking neurons as modules that call the ops of this package.

All except ``LIFRate`` keep their states, for example the membrane potential ``.v``, from call to call until ``reset``. States
are not in the state_dict. They are not registered buffers either, because DistributedDataParallel would overwrite them with the
states of rank 0 in every forward pass.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import current_trace, has_ended, is_tracing, mark_transform
from ..checks import refuse_proxy
from ..dispatch import backend
from ..dtypes import state_dtype
from ..ops.cuba import adlif, cuba
from ..ops.leaky import lapicque, leaky
from ..ops.lif import lif, lif_rate
from ..ops.operator import refuse_script


class _Neuron(torch.nn.Module):
    """Base class of all neurons: stores the settings under the names of the ops' arguments."""

    _settings: tuple[str, ...] = (
        "tau",
        "decay_input",
        "v_threshold",
        "v_reset",
        "surrogate",
        "alpha",
        "detach_reset",
        "levels",
    )
    _shown: tuple[str, ...] = _settings
    _renamed: dict[str, str] = {}  # the op's argument of a setting that has another name here
    __prepare_scriptable__ = refuse_script

    def __init__(self, **settings):
        super().__init__()
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def _check(self, op, **arguments):
        """Run the op's checks on empty data. A tensor setting is checked in the first call, against the data."""
        settings = {self._renamed.get(name, name): getattr(self, name) for name in self._settings}
        settings = {name: 1.0 if isinstance(value, Tensor) else value for name, value in settings.items()}
        with backend("reference"):
            op(torch.empty((0, 1), device="cpu", dtype=torch.float32), **arguments, **settings)

    def op_arguments(self, x):
        return {self._renamed.get(name, name): getattr(self, name) for name in self._settings}

    def extra_repr(self) -> str:
        def show(value):
            return f"{type(value).__name__}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

        return ", ".join(f"{name}={show(getattr(self, name))}" for name in self._shown)


class _Context(NamedTuple):
    """The torch.jit.trace or the transform of torch.func that made a state. The state has no values after it ends."""

    trace: object | None
    layer: Tensor | None  # mark of the transform, for has_ended
    before: dict[str, Any]  # the states and their sequences when the trace began


def _context(v, before):
    """Return the context of a new state v, or None in an ordinary call."""
    layer = mark_transform(v)
    if layer is None and not is_tracing():
        return None
    return _Context(current_trace(), layer, before)


class _Stateful(_Neuron):
    """Base class of the neurons that keep their states between calls."""

    v: Tensor | None
    v_seq: Tensor | None
    _states: tuple[str, ...] = ("v",)
    _store = "store_v_seq"  # the setting that requests the states after every step
    _op: Callable[..., Any] = staticmethod(lif)
    _shown = (*_Neuron._shown, "step_mode", "store_v_seq")

    def __init__(self, step_mode, store, **settings):
        super().__init__(**settings)
        self.step_mode = step_mode
        setattr(self, self._store, store)
        self.reset()
        self._check(self._op)

    def _run(self, x, states, store):
        """Call the op. Return (spikes, last states, their sequences if ``store``)."""
        s, v, *v_seq = self._op(x, *states, **self.op_arguments(x), return_v=True, return_v_seq=store)
        return s, (v,), tuple(v_seq)

    def _kept(self):
        """Return the names of the attributes that keep states."""
        return *self._states, *(f"{name}_seq" for name in self._states)

    @property
    def step_mode(self) -> str:
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value):
        if value not in ("m", "s"):
            raise ValueError(f"step_mode must be 'm' (multi-step, (T, ...)) or 's' (single-step, (...)), got {value!r}")
        self._step_mode = value

    def reset(self) -> None:
        """Clear the states. The next call starts as the op does without states, with any batch shape."""
        for name in self._kept():
            setattr(self, name, None)

    def detach_(self) -> None:
        """Detach the states from earlier calls and keep their values: truncated backpropagation through time."""
        self._map_state(Tensor.detach)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            refuse_proxy(x)
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        single = self.step_mode == "s"
        if single:
            x = x.unsqueeze(0)
        eager = not torch.compiler.is_compiling()
        before = self._leave_context(x) if eager else None
        states = [self._start(name, x, eager) for name in self._states]
        store = getattr(self, self._store)
        s, found, sequences = self._run(x, states, store)
        for name, v in zip(self._states, found):
            setattr(self, name, v)
            if eager and (context := _context(v, before)):
                v.context = context
        for name, v_seq in zip(self._states, sequences if store else [None] * len(found)):
            setattr(self, f"{name}_seq", v_seq)
        return s.squeeze(0) if single else s

    def _start(self, name, x, eager):
        """Return a state before the first step, checked against the data x."""
        v = getattr(self, name)
        if isinstance(v, (int, float)):
            return torch.full(x.shape[1:], v, dtype=state_dtype(x.dtype), device=x.device)
        if v is not None and not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a tensor, a number or None, got {type(v).__name__}")
        if v is not None and v.shape != x.shape[1:]:
            raise ValueError(
                f"{name}, the state carried over from earlier calls, has shape {tuple(v.shape)}, and x asks for "
                f"{tuple(x.shape[1:])}; call reset() before data of another shape"
            )
        if v is not None and eager and v.is_inference() and not torch.is_inference_mode_enabled():
            return v.clone()  # autograd refuses a tensor that was made in inference_mode
        return v

    def _leave_context(self, x):
        """Raise if a state has no values any more, and clear the states of a trace that has ended.

        torch.jit.trace runs a module twice to check its graph, and both runs must start from the same states. Return the states
        and their sequences at the start of the current trace.
        """
        for name in self._states:
            v = getattr(self, name)
            context, fake_mode = getattr(v, "context", None), getattr(v, "fake_mode", None)
            if (fake_mode is not None and fake_mode is not getattr(x, "fake_mode", None)) or (
                context is not None and context.layer is not None and has_ended(context.layer)
            ):
                raise RuntimeError(
                    f"{name}, the state carried over from an earlier call, has no values here: it was made inside a "
                    "transform of torch.func (vmap, grad, ...) or under a FakeTensorMode (make_fx, ...) that has ended; call "
                    "reset() before this call"
                )
            if context is not None:
                if context.trace is not current_trace():
                    vars(self).update(context.before)
                return context.before
        return {name: getattr(self, name) for name in self._kept()}

    def _map_state(self, fn):
        for name in self._kept():
            value = getattr(self, name)
            setattr(self, name, fn(value) if isinstance(value, Tensor) else value)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._map_state(fn)
        return self

    def __getstate__(self):
        """Copies and pickles contain the values of the state without its graph, which torch cannot copy."""
        found = self.__dict__.copy()
        for name in self._kept():
            if isinstance(found[name], Tensor):
                found[name] = found[name].detach()
        return found


class LIF(_Stateful):
    r"""Leaky integrate-and-fire neuron over T time steps: :func:`sdit_kernels.lif` that keeps the membrane between calls.

    ::

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau        (decay_input=False: v[t-1] - (v[t-1] - v_reset) / tau + x[t])
        s[t] = 1 where h[t] >= v_threshold, else 0
        v[t] = v_reset where s[t], else h[t]                     (v_reset=None: h[t] - s[t] * v_threshold)

    Args:
        tau (float | Tensor): time constant in steps, at least 1. A number, a scalar tensor, or a tensor (C,) with one value per
            channel of x's last axis, or a value per token as in :func:`sdit_kernels.lif`. A ``torch.nn.Parameter`` is learned;
            another tensor becomes a buffer of the module.
        decay_input: True: the leak divides the input by tau too.
        v_threshold (float | Tensor): firing threshold. A number, a tensor or a parameter, like tau.
        v_reset: membrane potential after a spike. None subtracts the threshold instead (soft reset).
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        detach_reset: True: no gradient flows through the reset.
        levels (Levels | tuple[int, int] | str | None): None: binary spikes. "ternary", (lo, hi) or ``Levels(lo, hi, ..)``: see
            :func:`sdit_kernels.lif`. Integers need v_reset=None.
        threshold: None, "rms" or "mean": v_threshold times this norm of each token is its threshold, see
            :func:`sdit_kernels.lif`.
        detach_threshold: True: no gradient flows to x through the norm.
        step_mode: "m" (multi-step): x and the spikes are (T, ...). "s" (single-step): they are (...), one step per call.
        store_v_seq: store the membrane potential after every step of the last call in ``.v_seq``, (T, ...). In single-step
            mode T = 1.
    Attributes:
        v (Tensor | None): the membrane potential after the last step, with the shape of x without T, float32 (float64 for
            float64 data). You may set it, also to a number. It keeps its graph, so gradients reach earlier calls. ``.to()``
            moves it. Copies and pickles contain its value, the state_dict does not. A call that raises does not change it.
        v_seq (Tensor | None): the membrane potentials of the last call, with store_v_seq.

    Shape:
        x: (T, ...), or (...) in single-step mode. Output: the shape and dtype of x.

    Raises:
        TypeError, ValueError: at construction if a setting has the wrong type or range; in a call as in
            :func:`sdit_kernels.lif`, and if the shape of x does not match the membrane potential.

    Call reset inside a function that torch.utils.checkpoint runs, because it calls the module twice. Call reset after a
    transform of torch.func (vmap, grad, ...), because the membrane potential has no values after it. Call reset before
    torch.jit.trace, because the trace records the membrane potential as a constant.

    Source: Fang et al., SpikingJelly, Science Advances 9 (2023). The results equal SpikingJelly's LIFNode.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import LIF
        >>> neuron = LIF(tau=2.0)
        >>> x = torch.tensor([[0.6], [2.0], [1.5], [1.5]])
        >>> torch.cat([neuron(x[:2]), neuron(x[2:])]).flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
        >>> neuron.reset()
    """

    _settings = (*_Neuron._settings, "threshold", "detach_threshold")
    _shown = (*_settings, "step_mode", "store_v_seq")

    def __init__(
        self,
        tau=2.0,
        decay_input: bool = True,
        v_threshold=1.0,
        v_reset: float | None = 0.0,
        *,
        surrogate="atan",
        alpha: float | None = None,
        detach_reset: bool = False,
        levels=None,
        threshold: str | None = None,
        detach_threshold: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
    ):
        super().__init__(
            step_mode, store_v_seq, tau=tau, decay_input=decay_input, v_threshold=v_threshold, v_reset=v_reset,
            surrogate=surrogate, alpha=alpha, detach_reset=detach_reset, levels=levels, threshold=threshold,
            detach_threshold=detach_threshold,
        )  # fmt: skip


class IF(_Stateful):
    r"""Integrate-and-fire neuron: a :class:`LIF` without leak, h[t] = v[t-1] + x[t].

    Attributes, shapes and errors are the same as in :class:`LIF`.

    Args:
        v_threshold (float | Tensor): firing threshold. A number, a scalar tensor, or a tensor (C,); a ``torch.nn.Parameter`` is
            learned.
        v_reset: membrane potential after a spike. None subtracts the threshold instead (soft reset).
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        detach_reset: True: no gradient flows through the reset.
        levels (Levels | tuple[int, int] | str | None): None: binary spikes. "ternary", (lo, hi) or ``Levels(lo, hi, ..)``: see
            :func:`sdit_kernels.lif`. Integers need v_reset=None.
        step_mode: "m" (multi-step) or "s" (single-step), as in :class:`LIF`.
        store_v_seq: store the membrane potential after every step of the last call in ``.v_seq``.

    Source: Fang et al., SpikingJelly, Science Advances 9 (2023). The results equal SpikingJelly's IFNode.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import IF
        >>> IF(v_reset=None)(torch.full((4, 1), 0.75)).flatten().tolist()
        [0.0, 1.0, 1.0, 1.0]
    """

    tau, decay_input = math.inf, False
    _shown = _Stateful._shown[2:]

    def __init__(
        self,
        v_threshold=1.0,
        v_reset: float | None = 0.0,
        *,
        surrogate="atan",
        alpha: float | None = None,
        detach_reset: bool = False,
        levels=None,
        step_mode: str = "m",
        store_v_seq: bool = False,
    ):
        super().__init__(
            step_mode, store_v_seq, v_threshold=v_threshold, v_reset=v_reset, surrogate=surrogate, alpha=alpha,
            detach_reset=detach_reset, levels=levels,
        )  # fmt: skip


class ParametricLIF(_Stateful):
    r"""A :class:`LIF` neuron that learns its time constant: 1 / tau = sigmoid(w).

    Shapes, errors and the other attributes are the same as in :class:`LIF`.

    Args:
        init_tau: initial tau, above 1: w = -log(init_tau - 1).
        decay_input: True: the leak divides the input by tau too.
        v_threshold (float | Tensor): firing threshold. A number, a scalar tensor, or a tensor (C,); a ``torch.nn.Parameter`` is
            learned.
        v_reset: membrane potential after a spike. None subtracts the threshold instead (soft reset).
        channels: None: one w, of shape (). C: one w per channel of x's last axis, (C,).
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        detach_reset: True: no gradient flows through the reset.
        levels (Levels | tuple[int, int] | str | None): None: binary spikes. "ternary", (lo, hi) or ``Levels(lo, hi, ..)``: see
            :func:`sdit_kernels.lif`. Integers need v_reset=None.
        step_mode: "m" (multi-step) or "s" (single-step), as in :class:`LIF`.
        store_v_seq: store the membrane potential after every step of the last call in ``.v_seq``.

    Attributes:
        w (torch.nn.Parameter): the learned parameter, in any floating dtype. The module computes tau from it in float32
            (float64).
        tau (Tensor): 1 + exp(-w), the time constant.

    Source: Fang et al., Incorporating Learnable Membrane Time Constant, ICCV 2021; SpikingJelly's ParametricLIFNode.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import ParametricLIF
        >>> neuron = ParametricLIF(init_tau=2.0, channels=3)
        >>> neuron(torch.full((4, 3), 1.5)).sum().backward()
        >>> neuron.tau.tolist(), neuron.w.grad.shape
        ([2.0, 2.0, 2.0], torch.Size([3]))
    """

    w: torch.nn.Parameter
    _settings = _Stateful._settings[1:]  # every call computes tau from w
    _shown = ("init_tau", "channels", *_Stateful._shown[1:])

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold=1.0,
        v_reset: float | None = 0.0,
        *,
        channels: int | None = None,
        surrogate="atan",
        alpha: float | None = None,
        detach_reset: bool = False,
        levels=None,
        step_mode: str = "m",
        store_v_seq: bool = False,
    ):
        if not isinstance(init_tau, (int, float)) or isinstance(init_tau, bool):
            raise TypeError(f"init_tau must be a number, got {type(init_tau).__name__}")
        if not 1 < init_tau < math.inf:
            raise ValueError(f"init_tau must be above 1 and finite, so that 1 / init_tau is a sigmoid, got {init_tau}")
        if channels is not None and (not isinstance(channels, int) or isinstance(channels, bool)):
            raise TypeError(f"channels must be an int or None (one w for all), got {type(channels).__name__}")
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be at least 1 or None (one w for all), got {channels}")
        w = torch.nn.Parameter(torch.empty(() if channels is None else channels))
        super().__init__(
            step_mode, store_v_seq, w=w, decay_input=decay_input, v_threshold=v_threshold, v_reset=v_reset,
            surrogate=surrogate, alpha=alpha, detach_reset=detach_reset, levels=levels,
        )  # fmt: skip
        self.init_tau, self.channels = init_tau, channels
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.w, -math.log(self.init_tau - 1))

    @property
    def tau(self) -> Tensor:
        return self._tau(torch.float32)

    def _tau(self, dtype):
        return 1 + torch.exp(-self.w.to(torch.promote_types(self.w.dtype, dtype)))

    def op_arguments(self, x):
        return super().op_arguments(x) | {"tau": self._tau(state_dtype(x.dtype))}


class Leaky(_Stateful):
    r"""snnTorch's Leaky neuron over T time steps: :func:`sdit_kernels.leaky` that keeps the membrane between calls.

    ::

        h[t] = beta * v[t-1] + x[t]
        s[t] = 1 where h[t] > v_threshold, else 0

    A spike resets the membrane in the next step (reset_delay) or at once; see :func:`sdit_kernels.leaky`. Shapes, errors and
    attributes are the same as in :class:`LIF`.

    Args:
        beta (float | Tensor): decay per step, 0 to 1. A number, a scalar tensor, or a tensor (C,) with one value per channel of
            x's last axis. A ``torch.nn.Parameter`` is learned; another tensor becomes a buffer of the module.
        v_threshold (float | Tensor): firing threshold. A number, a tensor or a parameter, like beta.
        reset_mechanism: "subtract", "zero" or "none". It is the argument ``reset`` of the op; ``reset()`` is a method here.
        reset_delay: True: a spike resets the membrane in the next step. False: at once, and the reset has a gradient.
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        step_mode: "m" (multi-step) or "s" (single-step), as in :class:`LIF`.
        store_v_seq: store the membrane potential after every step of the last call in ``.v_seq``.

    Source: Eshraghian et al., Training Spiking Neural Networks Using Lessons From Deep Learning, Proceedings of the IEEE
    (2023). The results equal snnTorch's Leaky.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import Leaky
        >>> neuron = Leaky(beta=0.5)
        >>> neuron(torch.tensor([[0.75], [0.75], [0.25], [1.0]])).flatten().tolist(), neuron.v.tolist()
        ([0.0, 1.0, 0.0, 0.0], [0.90625])
    """

    _op = staticmethod(leaky)
    _settings = ("beta", "v_threshold", "reset_mechanism", "reset_delay", "surrogate", "alpha")
    _shown = (*_settings, "step_mode", "store_v_seq")
    _renamed = {"reset_mechanism": "reset"}

    def __init__(
        self,
        beta,
        v_threshold=1.0,
        reset_mechanism: str = "subtract",
        *,
        reset_delay: bool = True,
        surrogate="atan",
        alpha: float | None = None,
        step_mode: str = "m",
        store_v_seq: bool = False,
    ):
        super().__init__(
            step_mode, store_v_seq, beta=beta, v_threshold=v_threshold, reset_mechanism=reset_mechanism,
            reset_delay=reset_delay, surrogate=surrogate, alpha=alpha,
        )  # fmt: skip


class Lapicque(_Stateful):
    r"""snnTorch's Lapicque neuron over T time steps: :func:`sdit_kernels.lapicque` that keeps the membrane between calls.

    ::

        v[t] = x[t] * R * (1 / (R * C)) * time_step + (1 - time_step / (R * C)) * v[t-1]
        s[t] = 1 where v[t] > v_threshold, else 0

    A spike resets the membrane in the next step; see :func:`sdit_kernels.lapicque`. Shapes, errors and attributes are the same
    as in :class:`LIF`.

    Args:
        R (float | Tensor): resistance, positive. A number, a scalar tensor, or a tensor (C,) with one value per channel of x's
            last axis. A ``torch.nn.Parameter`` is learned; another tensor becomes a buffer of the module.
        C (float | Tensor): capacitance, positive, like R. The time constant of the membrane is R * C.
        time_step (float | Tensor): duration of a step, positive, in the unit of R * C, like R.
        v_threshold (float | Tensor): firing threshold, like R.
        reset_mechanism: "subtract", "zero" or "none". It is the argument ``reset`` of the op; ``reset()`` is a method here.
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = v - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        step_mode: "m" (multi-step) or "s" (single-step), as in :class:`LIF`.
        store_v_seq: store the membrane potential after every step of the last call in ``.v_seq``.

    Source: Eshraghian et al., Training Spiking Neural Networks Using Lessons From Deep Learning, Proceedings of the IEEE
    (2023). The results equal snnTorch's Lapicque.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import Lapicque
        >>> neuron = Lapicque(R=1.0, C=2.0)
        >>> neuron(torch.tensor([[1.0], [3.0], [1.0]])).flatten().tolist(), neuron.v.tolist()
        ([0.0, 1.0, 0.0], [0.375])
    """

    _op = staticmethod(lapicque)
    _settings = ("R", "C", "time_step", "v_threshold", "reset_mechanism", "surrogate", "alpha")
    _shown = (*_settings, "step_mode", "store_v_seq")
    _renamed = {"reset_mechanism": "reset"}

    def __init__(
        self,
        R=1.0,
        C=1.0,
        time_step=1.0,
        v_threshold=1.0,
        reset_mechanism: str = "subtract",
        *,
        surrogate="atan",
        alpha: float | None = None,
        step_mode: str = "m",
        store_v_seq: bool = False,
    ):
        super().__init__(
            step_mode, store_v_seq, R=R, C=C, time_step=time_step, v_threshold=v_threshold, reset_mechanism=reset_mechanism,
            surrogate=surrogate, alpha=alpha,
        )  # fmt: skip


class _ManyStates(_Stateful):
    """Base class of the neurons whose ops take and return their states as a tuple."""

    _store = "store_state_seq"

    def _run(self, x, states, store):
        found = self._op(x, tuple(states), **self.op_arguments(x), return_state=True, return_state_seq=store)
        return found if store else (*found, ())


class CuBa(_ManyStates):
    r"""Current-based LIF neuron, snnTorch's Synaptic: :func:`sdit_kernels.cuba` that keeps both states between calls.

    ::

        i[t] = beta_i * i[t-1] + x[t]
        h[t] = beta * v[t-1] + i[t]
        s[t] = 1 where h[t] > v_threshold, else 0

    A spike resets the membrane in the next step (reset_delay) or at once; see :func:`sdit_kernels.cuba`. Shapes and errors are
    the same as in :class:`LIF`.

    Args:
        beta_i (float | Tensor): decay of the current per step, 0 to 1 (snnTorch calls it alpha). A number, a scalar tensor, or
            a tensor (C,) with one value per channel of x's last axis. A ``torch.nn.Parameter`` is learned; another tensor
            becomes a buffer of the module.
        beta (float | Tensor): decay of the membrane potential per step, 0 to 1, like beta_i.
        v_threshold (float | Tensor): firing threshold, like beta_i.
        reset_mechanism: "subtract", "zero" or "none". It is the argument ``reset`` of the op; ``reset()`` is a method here.
        reset_delay: True: a spike resets the membrane in the next step. False: at once, and the reset has a gradient.
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        step_mode: "m" (multi-step) or "s" (single-step), as in :class:`LIF`.
        store_state_seq: store both states after every step of the last call in ``.i_seq`` and ``.v_seq``.
    Attributes:
        i (Tensor | None): the synaptic current after the last step; it behaves as ``v`` of :class:`LIF`.
        v (Tensor | None): the membrane potential after the last step, as in :class:`LIF`.

    Source: Eshraghian et al., Training Spiking Neural Networks Using Lessons From Deep Learning, Proceedings of the IEEE
    (2023). The results equal snnTorch's Synaptic.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import CuBa
        >>> neuron = CuBa(beta_i=0.5, beta=0.5)
        >>> neuron(torch.tensor([[1.0], [0.5], [0.0]])).flatten().tolist(), neuron.i.tolist(), neuron.v.tolist()
        ([0.0, 1.0, 0.0], [0.5], [0.25])
    """

    _op = staticmethod(cuba)
    _states = ("i", "v")
    _settings = ("beta_i", "beta", "v_threshold", "reset_mechanism", "reset_delay", "surrogate", "alpha")
    _shown = (*_settings, "step_mode", "store_state_seq")
    _renamed = {"reset_mechanism": "reset"}

    def __init__(
        self,
        beta_i,
        beta,
        v_threshold=1.0,
        reset_mechanism: str = "subtract",
        *,
        reset_delay: bool = True,
        surrogate="atan",
        alpha: float | None = None,
        step_mode: str = "m",
        store_state_seq: bool = False,
    ):
        super().__init__(
            step_mode, store_state_seq, beta_i=beta_i, beta=beta, v_threshold=v_threshold, reset_mechanism=reset_mechanism,
            reset_delay=reset_delay, surrogate=surrogate, alpha=alpha,
        )  # fmt: skip


class AdLIF(_ManyStates):
    r"""Adaptive LIF neuron over T time steps: :func:`sdit_kernels.adlif` that keeps both states between calls.

    ::

        h[t] = beta * v[t-1] + (1 - beta) * (x[t] - w[t-1])
        s[t] = 1 where h[t] >= v_threshold, else 0
        v[t] = 0 where s[t], else h[t]
        w[t] = beta_w * w[t-1] + (1 - beta_w) * (a * v[t] + b * s[t])

    Shapes and errors are the same as in :class:`LIF`.

    Args:
        beta (float | Tensor): decay of the membrane potential per step, 0 to 1. A number, a scalar tensor, or a tensor (C,)
            with one value per channel of x's last axis. A ``torch.nn.Parameter`` is learned; another tensor becomes a buffer of
            the module.
        beta_w (float | Tensor): decay of the adaptation current per step, 0 to 1, like beta.
        a (float | Tensor): how much the membrane potential drives the adaptation, like beta.
        b (float | Tensor): how much a spike drives the adaptation, like beta.
        v_threshold (float | Tensor): firing threshold, like beta.
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        step_mode: "m" (multi-step) or "s" (single-step), as in :class:`LIF`.
        store_state_seq: store both states after every step of the last call in ``.v_seq`` and ``.w_seq``.
    Attributes:
        v (Tensor | None): the membrane potential after the last step, as in :class:`LIF`.
        w (Tensor | None): the adaptation current after the last step; it behaves as ``v`` of :class:`LIF`.

    Source: Baronig et al., Advancing spatio-temporal processing through adaptation in spiking neural networks, Nature
    Communications 16 (2025), arXiv 2408.07517: SE-adLIF with a resting potential of 0.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import AdLIF
        >>> neuron = AdLIF(beta=0.5, beta_w=0.5, a=1.0, b=2.0)
        >>> neuron(torch.tensor([[2.0], [1.0], [1.0]])).flatten().tolist(), neuron.v.tolist(), neuron.w.tolist()
        ([1.0, 0.0, 0.0], [0.25], [0.375])
    """

    _op = staticmethod(adlif)
    _states = ("v", "w")
    _settings = ("beta", "beta_w", "a", "b", "v_threshold", "surrogate", "alpha")
    _shown = (*_settings, "step_mode", "store_state_seq")

    def __init__(
        self,
        beta,
        beta_w,
        a,
        b,
        v_threshold=1.0,
        *,
        surrogate="atan",
        alpha: float | None = None,
        step_mode: str = "m",
        store_state_seq: bool = False,
    ):
        super().__init__(
            step_mode, store_state_seq, beta=beta, beta_w=beta_w, a=a, b=b, v_threshold=v_threshold, surrogate=surrogate,
            alpha=alpha,
        )  # fmt: skip


class OwnNeuron(_ManyStates):
    """A neuron of the user, made by the method ``module`` of an op of :func:`sdit_kernels.neuron.define`.

    Its states and settings are attributes with their names. They behave as in :class:`LIF`.
    """

    def __init__(self, op, step_mode, store_state_seq, **settings):
        for name in settings:
            if name not in (*op.parameters, *op.flags, "surrogate", "alpha"):
                raise TypeError(f"{op.name} has the settings {', '.join((*op.parameters, *op.flags)) or 'none'}, got {name!r}")
        given = op.defaults | op.flags | settings
        super().__init__(step_mode, store_state_seq, op=op, **given)

    def _get_name(self):
        return self.op.name

    @property
    def _op(self):
        return self.op

    @property
    def _states(self):
        return self.op.states

    @property
    def _settings(self):
        return *self.op.parameters, *self.op.flags, "surrogate", "alpha"

    @property
    def _shown(self):
        return *self._settings, "step_mode", "store_state_seq"


class LIFRate(_Neuron):
    r"""Firing rate of a LIF neuron under a constant current: :func:`sdit_kernels.lif_rate` as a module without state.

    ::

        current = x, or sigmoid(gate) * x
        out     = residual + 1/T * sum over t < T of s[t],    s = lif(current repeated T times)

    Args:
        T: number of time steps, at least 1.
        tau (float | Tensor): time constant in steps, at least 1. A number, a scalar tensor, or a tensor (C,); a
            ``torch.nn.Parameter`` is learned.
        decay_input: True: the leak divides the input by tau too.
        v_threshold (float | Tensor): firing threshold. A number, a tensor or a parameter, like tau.
        v_reset: membrane potential after a spike, and at the start. None subtracts the threshold instead (soft reset).
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        detach_reset: True: no gradient flows through the reset.
        levels (Levels | tuple[int, int] | str | None): None: binary spikes. "ternary", (lo, hi) or ``Levels(lo, hi, ..)``: see
            :func:`sdit_kernels.lif`. Integers need v_reset=None.

    Shape:
        x: any shape (..., C). residual: the shape of x, the dtype of x or float32 (float64). gate: the shape and dtype of x.
        Output: the shape of x; the dtype of residual, or of x without a residual.

    Raises:
        TypeError, ValueError: at construction if a setting has the wrong type or range; in a call as in
            :func:`sdit_kernels.lif_rate`.

    Source: Yang et al., SDiT, arXiv 2402.11588.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import LIFRate
        >>> neuron = LIFRate(T=4)
        >>> x = torch.tensor([1.0, 1.1, 1.5, 2.0])
        >>> neuron(x).tolist(), neuron(x, residual=x).tolist()
        ([0.0, 0.25, 0.5, 1.0], [1.0, 1.350000023841858, 2.0, 3.0])
    """

    T: int
    _shown = ("T", *_Neuron._shown)

    def __init__(
        self,
        T: int = 4,
        *,
        tau=2.0,
        decay_input: bool = True,
        v_threshold=1.0,
        v_reset: float | None = 0.0,
        surrogate="atan",
        alpha: float | None = None,
        detach_reset: bool = False,
        levels=None,
    ):
        super().__init__(
            T=T, tau=tau, decay_input=decay_input, v_threshold=v_threshold, v_reset=v_reset, surrogate=surrogate,
            alpha=alpha, detach_reset=detach_reset, levels=levels,
        )  # fmt: skip
        self._check(lif_rate, T=T)

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        return lif_rate(x, self.T, residual, gate, **self.op_arguments(x))


class OverTime(torch.nn.Sequential):
    r"""Apply stateless modules to all time steps at once: reshape (T, B, ...) to (T*B, ...), call them, reshape back.

    ::

        y[t, b] = module(x)[t, b] = module(x.reshape(T*B, ...)).reshape(T, B, ...)[t, b]

    Use it between neurons for modules without a time axis, for example Conv2d, or BatchNorm, whose statistics are then over T
    and B. A module must not depend on earlier time steps, so put neurons outside.

    Args:
        modules (torch.nn.Module): called one after the other, as in ``torch.nn.Sequential``, with the same state_dict keys.

    Shape:
        x: (T, B, ...), any strides. Output: (T, B, ...), or a tuple or list of tensors with these axes.

    Raises:
        TypeError: x or an output is not a tensor.
        ValueError: a module keeps a membrane between calls, x has fewer than two axes, or the first axis of an output is not
            T*B.

    Source: SpikingJelly's SeqToANNContainer does the same.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import LIF, OverTime
        >>> net = torch.nn.Sequential(OverTime(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8)), LIF())
        >>> net(torch.rand(4, 32, 3)).shape
        torch.Size([4, 32, 8])
    """

    __prepare_scriptable__ = refuse_script

    def add_module(self, name: str, module: torch.nn.Module | None) -> None:
        if module is not None and not isinstance(module, torch.nn.Module):
            raise TypeError(f"OverTime takes torch.nn.Modules, one after the other, got {type(module).__name__}")
        for inner in [] if module is None else module.modules():
            if _is_stateful(inner):
                raise ValueError(
                    f"OverTime takes stateless modules, got {type(inner).__name__}, which needs the time axis: put it after "
                    "OverTime, as in Sequential(OverTime(Linear(3, 8)), LIF())"
                )
        super().add_module(name, module)

    def forward(self, x: Tensor):
        if not isinstance(x, Tensor):
            refuse_proxy(x)
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() < 2:
            raise ValueError(f"x must have axes for time and batch, (T, B, ...), got {tuple(x.shape)}")
        return _unfold(super().forward(x.flatten(0, 1)), x.shape[:2])


def _is_stateful(module):
    """True for neurons of this file and of SpikingJelly (a step mode and a reset) and of snnTorch (a reset_mem)."""
    return hasattr(module, "reset") and hasattr(module, "step_mode") or hasattr(module, "reset_mem")


def _unfold(y, steps):
    if isinstance(y, (tuple, list)):
        unfolded = [_unfold(part, steps) for part in y]
        return type(y)(*unfolded) if hasattr(y, "_fields") else type(y)(unfolded)
    if not isinstance(y, Tensor):
        raise TypeError(f"the modules of OverTime must return tensors, or tuples of tensors, got {type(y).__name__}")
    if y.dim() == 0 or y.shape[0] != steps[0] * steps[1]:
        raise ValueError(
            f"the modules of OverTime must keep the first axis, {steps[0] * steps[1]} = T*B, got an output of {tuple(y.shape)}"
        )
    return y.unflatten(0, steps)


def _modules(net):
    if not isinstance(net, torch.nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    return net.modules()


def reset(net: torch.nn.Module) -> None:
    """Reset every neuron of a network, like SpikingJelly's ``functional.reset_net``. Call it before each new batch.

    Args:
        net: any module. Modules that are not neurons of this package do not change.

    Raises:
        TypeError: net is not a module.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import LIF, reset
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3), LIF())
        >>> net(torch.rand(4, 2, 3)).shape
        torch.Size([4, 2, 3])
        >>> reset(net)
        >>> net(torch.rand(4, 5, 3)).shape
        torch.Size([4, 5, 3])
    """
    for module in _modules(net):
        if isinstance(module, _Stateful):
            module.reset()


def detach(net: torch.nn.Module) -> None:
    """Detach the membrane of every neuron of a network, like SpikingJelly's ``functional.detach_net``.

    Call it after each optimiser step of truncated backpropagation through time.

    Args:
        net: any module. Modules that are not neurons of this package do not change.

    Raises:
        TypeError: net is not a module.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import LIF, detach
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3), LIF())
        >>> for chunk in torch.rand(2, 4, 2, 3):
        ...     net(chunk).sum().backward()
        ...     detach(net)
    """
    for module in _modules(net):
        if isinstance(module, _Stateful):
            module.detach_()
