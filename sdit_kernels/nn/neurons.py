"""Spiking neurons as modules over the ops of this package.

The membrane of ``LIF``, ``IF`` and ``ParametricLIF`` is carried over from call to call until ``reset``. It is ordinary module
state, ``.v``, with two exceptions: it is not in the state_dict, and it is not a registered buffer, because
DistributedDataParallel would overwrite it with the membrane of rank 0 in every forward pass.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import current_trace, has_ended, is_tracing, mark_transform
from ..checks import refuse_proxy
from ..dispatch import backend
from ..dtypes import state_dtype
from ..ops.lif import lif, lif_rate
from ..ops.operator import refuse_script


class _Neuron(torch.nn.Module):
    """What a neuron is told, under the names of the ops' arguments."""

    _settings: tuple[str, ...] = ("tau", "decay_input", "v_threshold", "v_reset", "surrogate", "alpha", "detach_reset")
    _shown: tuple[str, ...] = _settings
    __prepare_scriptable__ = refuse_script

    def __init__(self, **settings):
        super().__init__()
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def _check(self, op, **arguments):
        """The op's own checks, on no data at all; tensors wait for the data they must agree with."""
        settings = {name: getattr(self, name) for name in self._settings}
        settings = {name: 1.0 if isinstance(value, Tensor) else value for name, value in settings.items()}
        with backend("reference"):
            op(torch.empty(0, device="cpu", dtype=torch.float32), **arguments, **settings)

    def op_arguments(self, x):
        return {name: getattr(self, name) for name in self._settings}

    def extra_repr(self) -> str:
        def show(value):
            return f"{type(value).__name__}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

        return ", ".join(f"{name}={show(getattr(self, name))}" for name in self._shown)


class _Context(NamedTuple):
    """The torch.jit.trace or the transform of torch.func in which a membrane was made. The membrane does not outlive it."""

    trace: object | None
    layer: Tensor | None  # functorch marks it as dead when the transform ends
    before: tuple  # v and v_seq when the trace began


def _context(v, before):
    """The context of a new membrane v, None for an ordinary call."""
    layer = mark_transform(v)
    if layer is None and not is_tracing():
        return None
    return _Context(current_trace(), layer, before)


class _Stateful(_Neuron):
    """A neuron whose membrane lives on between calls."""

    v: Tensor | None
    v_seq: Tensor | None
    _state = ("v", "v_seq")
    _shown = (*_Neuron._shown, "step_mode", "store_v_seq")

    def __init__(self, step_mode, store_v_seq, **settings):
        super().__init__(**settings)
        self.step_mode = step_mode
        self.store_v_seq = store_v_seq
        self.reset()
        self._check(lif)

    @property
    def step_mode(self) -> str:
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value):
        if value not in ("m", "s"):
            raise ValueError(f"step_mode must be 'm' (multi-step, (T, ...)) or 's' (single-step, (...)), got {value!r}")
        self._step_mode = value

    def reset(self) -> None:
        """Forget the membrane: the next call starts from v_reset (0 with soft reset), with any batch shape."""
        self.v = self.v_seq = None

    def detach_(self) -> None:
        """Keep the membrane, cut it off from the calls that led to it: truncated backpropagation through time."""
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
        v = self.v
        if isinstance(v, (int, float)):
            v = torch.full(x.shape[1:], v, dtype=state_dtype(x.dtype), device=x.device)
        elif v is not None and not isinstance(v, Tensor):
            raise TypeError(f"v must be a tensor, a number or None, got {type(v).__name__}")
        elif v is not None and v.shape != x.shape[1:]:
            raise ValueError(
                f"v, the membrane carried over from earlier calls, has shape {tuple(v.shape)}, and x asks for "
                f"{tuple(x.shape[1:])}; call reset() before data of another shape"
            )
        elif v is not None and eager and v.is_inference() and not torch.is_inference_mode_enabled():
            v = v.clone()  # autograd refuses a membrane that inference_mode made
        out = lif(x, v, **self.op_arguments(x), return_v=True, return_v_seq=self.store_v_seq)
        s, self.v, self.v_seq = out if self.store_v_seq else (*out, None)
        if eager and (context := _context(self.v, before)):
            self.v.context = context  # type: ignore[union-attr]
        return s.squeeze(0) if single else s

    def _leave_context(self, x):
        """Refuse a membrane that has no values any more. Forget a membrane of a trace that has ended: torch.jit.trace records a
        module twice to check its graph, and both must start alike. Returns v and v_seq from when the current trace began."""
        context, fake_mode = getattr(self.v, "context", None), getattr(self.v, "fake_mode", None)
        if (fake_mode is not None and fake_mode is not getattr(x, "fake_mode", None)) or (
            context is not None and context.layer is not None and has_ended(context.layer)
        ):
            raise RuntimeError(
                "v, the membrane carried over from an earlier call, has no values here: it was made inside a transform of "
                "torch.func (vmap, grad, ...) or under a FakeTensorMode (make_fx, ...) that has ended; call reset() before "
                "this call"
            )
        if context is not None:
            if context.trace is current_trace():
                return context.before
            self.v, self.v_seq = context.before
        return self.v, self.v_seq

    def _map_state(self, fn):
        for name in self._state:
            value = getattr(self, name)
            setattr(self, name, fn(value) if isinstance(value, Tensor) else value)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._map_state(fn)
        return self

    def __getstate__(self):
        """Copies and pickles take the values of the state and leave its graph, which torch cannot copy."""
        found = self.__dict__.copy()
        for name in self._state:
            if isinstance(found[name], Tensor):
                found[name] = found[name].detach()
        return found


class LIF(_Stateful):
    r"""Leaky integrate-and-fire neuron over T steps: :func:`sdit_kernels.lif` with the membrane kept between calls.

    ::

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau        (decay_input=False: v[t-1] - (v[t-1] - v_reset) / tau + x[t])
        s[t] = 1 where h[t] >= v_threshold, else 0
        v[t] = v_reset where s[t], else h[t]                     (v_reset=None: h[t] - s[t] * v_threshold)

    Args:
        tau, decay_input, v_threshold, v_reset, surrogate, alpha, detach_reset: as in :func:`sdit_kernels.lif`. A
            ``torch.nn.Parameter`` as tau or v_threshold is learned, another tensor becomes a buffer of the module.
        step_mode: "m" (multi-step): x and the spikes are (T, ...). "s" (single-step): they are (...), one step a call.
        store_v_seq: keep the membrane after every step of the last call in ``.v_seq``, (T, ...), T = 1 in single-step mode.

    Attributes:
        v: None, or the membrane after the last step, x's shape without T, float32 (float64 for float64 data). May be set, also
            to a number. It keeps its
            graph, so that gradients reach earlier calls; follows ``.to()``; is copied and pickled by value; is not in the
            state_dict. A call that raises leaves it as it was.
        v_seq: None, or the membranes that store_v_seq asks for.

    Shape:
        x: (T, ...), or (...) in single-step mode. Output: x's shape and dtype.

    Raises:
        TypeError, ValueError: at construction for a setting of the wrong type or range; in a call as :func:`sdit_kernels.lif`,
            and for an x of another shape than the membrane's.

    A membrane that outlives a call does not go together with torch.utils.checkpoint, which calls the module twice: reset within
    the checkpointed function. A transform of torch.func (vmap, grad, ...) leaves a membrane without values: reset after it.
    torch.jit.trace records the membrane of that moment as a constant: reset before it.

    Source: Fang et al., SpikingJelly, Science Advances 9 (2023), whose LIFNode this equals.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import LIF
        >>> neuron = LIF(tau=2.0)
        >>> x = torch.tensor([[0.6], [2.0], [1.5], [1.5]])
        >>> torch.cat([neuron(x[:2]), neuron(x[2:])]).flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
        >>> neuron.reset()
    """

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
        step_mode: str = "m",
        store_v_seq: bool = False,
    ):
        super().__init__(
            step_mode, store_v_seq, tau=tau, decay_input=decay_input, v_threshold=v_threshold, v_reset=v_reset,
            surrogate=surrogate, alpha=alpha, detach_reset=detach_reset,
        )  # fmt: skip


class IF(_Stateful):
    r"""Integrate-and-fire neuron, without leak: h[t] = v[t-1] + x[t], else as :class:`LIF`.

    Args:
        v_threshold, v_reset, surrogate, alpha, detach_reset, step_mode, store_v_seq: as in :class:`LIF`; so are attributes,
            shapes and errors.

    Source: Fang et al., SpikingJelly, Science Advances 9 (2023), whose IFNode this equals.

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
        step_mode: str = "m",
        store_v_seq: bool = False,
    ):
        super().__init__(
            step_mode, store_v_seq, v_threshold=v_threshold, v_reset=v_reset, surrogate=surrogate, alpha=alpha,
            detach_reset=detach_reset,
        )  # fmt: skip


class ParametricLIF(_Stateful):
    r"""LIF neuron that learns its time constant: 1 / tau = sigmoid(w), else as :class:`LIF`.

    Args:
        init_tau: tau at the start, above 1: w = -log(init_tau - 1).
        decay_input, v_threshold, v_reset, surrogate, alpha, detach_reset, step_mode, store_v_seq: as in :class:`LIF`; so are
            attributes, shapes and errors.
        channels: None for one w, of shape (), or C for one w per channel of x's last axis, (C,).

    Attributes:
        w: the parameter. Its dtype may be narrower than the arithmetic's; tau is computed in float32 (float64).
        tau: 1 + exp(-w), what the neuron uses.

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
    _settings = _Stateful._settings[1:]  # tau is made of w in every call
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
            surrogate=surrogate, alpha=alpha, detach_reset=detach_reset,
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


class LIFRate(_Neuron):
    r"""Firing rate of a LIF neuron under a constant current: :func:`sdit_kernels.lif_rate`, stateless.

    ::

        current = x, or sigmoid(gate) * x
        out     = residual + 1/T * sum over t < T of s[t],    s = lif(current repeated T times)

    Args:
        T: simulation steps, at least 1.
        tau, decay_input, v_threshold, v_reset, surrogate, alpha, detach_reset: as in :class:`LIF`.

    Shape:
        x: (..., C), any shape. residual: x's shape, x's dtype or float32 (float64). gate: x's shape and dtype. Output: x's
        shape, the dtype of residual where there is one, else x's.

    Raises:
        TypeError, ValueError: at construction for a setting of the wrong type or range; in a call as
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
    ):
        super().__init__(
            T=T, tau=tau, decay_input=decay_input, v_threshold=v_threshold, v_reset=v_reset, surrogate=surrogate,
            alpha=alpha, detach_reset=detach_reset,
        )  # fmt: skip
        self._check(lif_rate, T=T)

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        return lif_rate(x, self.T, residual, gate, **self.op_arguments(x))


class OverTime(torch.nn.Sequential):
    r"""Apply stateless modules to every time step at once: fold (T, B, ...) to (T*B, ...), call them, unfold the output.

    ::

        y[t, b] = module(x)[t, b] = module(x.reshape(T*B, ...)).reshape(T, B, ...)[t, b]

    Use it between neurons for modules without a time axis, for example Conv2d or BatchNorm, whose statistics are then over T
    and B. A module must not depend on earlier time steps: neurons stand outside.

    Args:
        modules: called one after the other, as in ``torch.nn.Sequential``; the state_dict keys are the same too.

    Shape:
        x: (T, B, ...), any strides. Output: (T, B, ...), or a tuple or list of tensors with these axes.

    Raises:
        TypeError: x, or an output, is not a tensor. ValueError: a module keeps a membrane between calls; x has fewer than two
            axes; an output's first axis is not T*B.

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
    """Neurons of this file and of SpikingJelly have a step mode and a reset, snnTorch's a reset_mem."""
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
    """Reset every neuron of a network, as SpikingJelly's ``functional.reset_net``: call it before each new batch.

    Args:
        net: any module; what is not a neuron of this package is left alone.

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
    """Detach the membrane of every neuron of a network, as SpikingJelly's ``functional.detach_net``: call it after each
    optimiser step of truncated backpropagation through time.

    Args:
        net: any module; what is not a neuron of this package is left alone.

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
