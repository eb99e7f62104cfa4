"""lif and lif_rate: the public functions and the operators ``sdit_kernels::lif*`` behind them."""

import functools
import numbers
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from .. import dispatch, memory, packed, reference, tuning
from ..checks import (
    check_data,
    check_flag,
    check_levels_fit,
    check_membrane,
    check_neuron,
    check_neuron_values,
    wants_gradient,
    warn_of_custom_surrogate,
)
from ..dtypes import state_dtype
from ..layout import empty_like, norm_columns
from ..levels import BINARY, Levels, decode, encode, span
from ..neuron import LIF, Variant
from ..pending import Pending, computed, run_with_norm
from ..reference.neuron import norm_of_tokens, returned
from .neuron import (
    HALF_DTYPES,
    allocate_parameter_gradients,
    any_given,
    check_spike_dtype,
    check_steps,
    define,
    launch,
    per_channel,
    sum_parameter_gradients,
)
from .operator import kernels, register, values_are_readable

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

NEURON_SCHEMA = (
    "float tau_value, float v_threshold_value, float? v_reset, bool decay_input, bool detach_reset, str surrogate, "
    "float alpha, str levels"
)


# --- the operators ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def lif_variant(
    tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels, norm="", detach_norm=False
):  # fmt: skip
    """Return the neuron as launchers take it."""
    flags = v_reset is None, decay_input, detach_reset
    if levels != BINARY:
        flags += decode(levels)
    return Variant(LIF, flags, (1.0 / tau, v_threshold, v_reset or 0.0), surrogate, alpha, norm, detach_norm)


def _check_values(parameters, values, dtype):
    check_neuron_values(*parameters, values[3], dtype, values[7])


_lif_call = define(LIF, ("tau", "v_threshold"), f"{NEURON_SCHEMA}, str norm, bool detach_norm", lif_variant, _check_values)


def _rate_output(x, residual, parameters, return_counts):
    dtype = torch.uint8 if return_counts else x.dtype if residual is None else residual.dtype
    if x.is_contiguous():
        return memory.empty_like(x, dtype)
    return empty_like(x.unsqueeze(0), dtype, per_channel(parameters)).squeeze(0)


def _rate(x, residual, gate, tau, v_threshold, T, *rest):
    *values, return_counts, backend = rest
    parameters = tau, v_threshold
    out = _rate_output(x, residual, parameters, return_counts)
    if x.device.type == "cpu" and any_given(parameters):
        _check_values(parameters, values, state_dtype(x.dtype))
    if x.numel():
        kernels(backend, "rate").rate_forward(lif_variant(*values), x, residual, gate, parameters, T, out, tuning.current())
    return out


def _rate_fake(x, residual, gate, tau, v_threshold, T, *rest):
    return _rate_output(x, residual, (tau, v_threshold), rest[8])


def _rate_backward_outputs(x, gate, parameters, wanted):
    dx = _rate_output(x, None, parameters, False)
    dgate = None if gate is None else memory.empty_like(dx, dx.dtype)
    return dx, dgate, allocate_parameter_gradients(parameters, wanted)


def _rate_backward(g, x, gate, tau, v_threshold, T, *rest):
    *values, wanted, backend = rest
    parameters = tau, v_threshold
    dx, dgate, d_parameters = _rate_backward_outputs(x, gate, parameters, wanted)
    if x.numel() == 0:
        return dx, dgate, *(None if d is None else d.zero_() for d in d_parameters)
    sums = kernels(backend, "rate").rate_backward(
        lif_variant(*values), g, x, gate, parameters, T, dx, dgate, wanted, tuning.current()
    )
    return dx, dgate, *sum_parameter_gradients(LIF, parameters, sums, d_parameters)


def _rate_backward_fake(g, x, gate, tau, v_threshold, T, *rest):
    dx, dgate, d_parameters = _rate_backward_outputs(x, gate, (tau, v_threshold), rest[-2])
    return dx, dgate, *d_parameters


# --- autograd ---------------------------------------------------------------------------------------------------------------


def _rate_save(ctx, inputs, output):
    x, _, gate, tau, v_threshold, *ctx.rest = inputs
    ctx.save_for_backward(x, gate, tau, v_threshold)
    ctx.set_materialize_grads(False)


def _rate_gradient(ctx, g):
    if g is None:
        return ()
    x, gate, tau, v_threshold = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_residual = g if needs[1] else None
    if not (needs[0] or needs[2] or needs[3] or needs[4]):
        return None, d_residual
    dx, dgate, dtau, dth = _rate_backward_call(g, x, gate, tau, v_threshold, *ctx.rest[:9], needs[3] or needs[4], ctx.rest[-1])
    return dx, d_residual, dgate, dtau, dth


_rate_call = register(
    f"lif_rate(Tensor x, Tensor? residual, Tensor? gate, Tensor? tau, Tensor? v_threshold, int T, {NEURON_SCHEMA}, "
    "bool return_counts, str backend) -> Tensor",
    _rate,
    _rate_fake,
    batch_axes=(0, 0, 0, None, None),
    output_axes=(0,),
    save=_rate_save,
    gradient=_rate_gradient,
)
_rate_backward_call = register(
    f"lif_rate_backward(Tensor g, Tensor x, Tensor? gate, Tensor? tau, Tensor? v_threshold, int T, {NEURON_SCHEMA}, "
    "bool parameters, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _rate_backward,
    _rate_backward_fake,
    batch_axes=(0, 0, 0, None, None),
    output_axes=(0, 0, None, None),
)


# --- the public functions ---------------------------------------------------------------------------------------------------


class Settings(TypedDict, total=False):
    """The keyword arguments of a neuron, for type checkers."""

    tau: "float | Tensor"
    v_threshold: "float | Tensor"
    v_reset: float | None
    decay_input: bool
    detach_reset: bool
    surrogate: "str | Callable[[Tensor], Tensor]"
    alpha: float | None
    levels: "Levels | tuple[int, int] | Literal['ternary'] | None"


class _Settings(Settings, total=False):
    threshold: Literal["rms", "mean"] | None
    detach_threshold: bool
    spike_dtype: torch.dtype | None


def _check_norm(x, factor, kind):
    """Check x and v_threshold where a norm of x makes the thresholds."""
    if kind not in ("rms", "mean"):
        raise ValueError(f"threshold must be None, 'rms' or 'mean', got {kind!r}")
    check_data("x", x)
    if x.dim() < 2:
        raise ValueError(f"threshold={kind!r} needs x of shape (T, .., C), got {tuple(x.shape)}")
    if isinstance(factor, Tensor) and factor.numel() != 1 and (factor.dim() < 2 or factor.shape[-1] != 1):
        raise ValueError(
            f"v_threshold is a factor where threshold={kind!r}: it must be a number, a scalar or have a value per token, "
            f"(.., L, 1), got {tuple(factor.shape)}"
        )


def _norm_fits(x, backend):
    """True if a kernel of the backend computes the norm of x. False for symbolic sizes, which a comparison would specialise."""
    T, C = x.shape[0], x.shape[-1]
    known = isinstance(T, int) and isinstance(C, int)
    return known and norm_columns(backend, T, state_dtype(x.dtype).itemsize) >= C


No = Literal[False]
Yes = Literal[True]


@functools.cache
def _norm_lif():
    from . import norm_lif  # which builds on this module

    return norm_lif


@overload
def lif(
    x: Tensor, v: Tensor | None = ..., *, return_v: No = ..., return_v_seq: No = ..., **settings: "Unpack[_Settings]"
) -> Tensor: ...
@overload
def lif(
    x: Tensor, v: Tensor | None = ..., *, return_v: Yes, return_v_seq: Yes, **settings: "Unpack[_Settings]"
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def lif(
    x: Tensor, v: Tensor | None = ..., *, return_v: Yes, return_v_seq: No = ..., **settings: "Unpack[_Settings]"
) -> tuple[Tensor, Tensor]: ...
@overload
def lif(
    x: Tensor, v: Tensor | None = ..., *, return_v: No = ..., return_v_seq: Yes, **settings: "Unpack[_Settings]"
) -> tuple[Tensor, Tensor]: ...
@overload
def lif(
    x: Tensor, v: Tensor | None = ..., *, return_v: bool = ..., return_v_seq: bool = ..., **settings: "Unpack[_Settings]"
) -> Tensor | tuple[Tensor, ...]: ...


def lif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau=2.0,
    v_threshold=1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate="atan",
    alpha: float | None = None,
    levels=None,
    threshold: str | None = None,
    detach_threshold: bool = False,
    return_v: bool = False,
    return_v_seq: bool = False,
    spike_dtype: torch.dtype | None = None,
):
    r"""Leaky integrate-and-fire neuron over T time steps, fused, forward and backward.

    For t = 0 .. T-1, with r = 1/tau and v[-1] = ``v``::

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) * r      decay_input
        h[t] = v[t-1] - (v[t-1] - v_reset) * r + x[t]        no decay_input
        s[t] = 1 where h[t] >= v_threshold, else 0
        v[t] = v_reset where s[t], else h[t]                 hard reset
        v[t] = h[t] - s[t] * v_threshold                     soft reset (v_reset=None; v_reset above is then 0)

    With ``threshold``, v_threshold is a factor, and every token has a threshold of its own at every step::

        v_threshold[t] = factor * sqrt(mean over C of x[t]^2 + 1e-6)                    "rms"
        v_threshold[t] = factor * (mean over C of |x[t]| + 1e-6)                        "mean"

    With ``levels``, spikes are ternary, or integers with a soft reset::

        s[t] = 1 where h[t] >= v_threshold, -1 where -h[t] >= v_threshold, else 0       "ternary"
        v[t] = v_reset where s[t] is 1 or -1, else h[t]; or h[t] - s[t] * v_threshold
        c[t] = round(clip(h[t] / v_threshold, lo, hi)), ties to even                    (lo, hi)
        v[t] = h[t] - c[t] * v_threshold,    s[t] = c[t] * scale

    The backward pass is back-propagation through time with the surrogate gradient, ds/dh = surrogate(h - v_threshold). Ternary
    spikes have it at both thresholds: ds/dh = surrogate(h - v_threshold) + surrogate(-h - v_threshold). Integers have
    dc/dh = 1/v_threshold where h / v_threshold is in the window, (lo, hi) with both ends by default, else 0. It
    recomputes h. For it, the forward pass keeps x, v if given, and for T > 16 the membrane potential of every 16th step.

    Args:
        x: input current, (T, ...), float32, float64, bfloat16 or float16, any strides. The arithmetic is float32, or float64
            for float64 data.
        v: membrane potential before the first step, x.shape[1:], in the dtype of x or float32 (float64). None: v_reset, or 0
            with soft reset.
        tau (float | Tensor): time constant in steps, at least 1. A number, a scalar tensor, or a tensor (C,) with one value per
            channel of x's last axis. ``math.inf`` with ``decay_input=False`` is the integrate-and-fire neuron without leak.
            Or a value per token of x, (T, .., L, C): a tensor that broadcasts to (.., L, 1), the same at every step, or to
            (T, .., L, 1).
        v_threshold (float | Tensor): firing threshold. A number or a tensor, like tau.
        v_reset: membrane potential after a spike. None subtracts the threshold instead (soft reset).
        decay_input: True: the leak divides the input by tau too.
        detach_reset: True: no gradient flows through the reset.
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        levels (Levels | tuple[int, int] | str | None): None: binary spikes. "ternary": spikes of -1, 0 and 1. (lo, hi) or
            ``Levels(lo, hi, window, scale)``: integer spikes; needs v_reset=None and no surrogate. Both need a positive
            v_threshold, and a dtype of the spikes that holds all levels exactly: bfloat16 up to 256, float16 up to 2048.
        threshold: None, "rms" or "mean": the norm of x that makes the thresholds, see above. It is computed in float32
            (float64). The kernel does it on the CPU up to C = 4096, in Triton up to C = 1024 for T <= 4, 512 for T <= 8 and 256
            for T <= 16 (float64: 512, 256 and none). For larger sizes, a pass over x does it before the kernel, and thresholds
            of shape (T, .., L, 1) are kept. Gradients reach x and the factor through the norm. A norm that is not finite counts
            as 1e30 (1e300). v_threshold must then not have a value per channel.
        detach_threshold: True: no gradient flows to x through the norm.
        return_v: also return the membrane potential after the last step, x.shape[1:], float32 (float64).
        return_v_seq: also return the membrane potential after every step, x.shape, float32 (float64).
        spike_dtype: dtype of the spikes. None: the dtype of x. For float32 x also torch.bfloat16 and torch.float16: a matrix
            multiplication under autocast then takes the spikes as they are. For inference torch.uint8 and torch.bool, with
            levels torch.uint8 and torch.int8, where a NaN becomes 0.

    Returns:
        s, with the shape of x; or a tuple (s, v), (s, v_seq) or (s, v, v_seq). Gradients reach x, v, tau and v_threshold from
        each output.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range. The op checks the values of a
            tensor tau on the CPU only.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Fang et al., SpikingJelly, Science Advances 9 (2023). The results equal SpikingJelly's LIFNode, and with levels
    ILIFNode and TernaryLIFNode. Integer spikes: Luo et al., SpikeYOLO, ECCV 2024, arXiv 2407.20708; ternary spikes: Guo et al.,
    Ternary Spike, AAAI 2024, arXiv 2312.06372.

    Example:
        >>> import torch
        >>> from sdit_kernels import lif
        >>> x = torch.tensor([[0.6], [2.0], [1.5], [1.5]])
        >>> lif(x).flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
        >>> lif(4 * x, v_reset=None, levels=(0, 4)).flatten().tolist()
        [1.0, 4.0, 3.0, 3.0]
        >>> s, v = lif(x[:2], return_v=True)
        >>> lif(x[2:], v).flatten().tolist()
        [0.0, 1.0]
    """
    if isinstance(x, Pending):
        # no genexpr, which takes 1 us
        several = isinstance(tau, Tensor) and tau.numel() > 1 or isinstance(v_threshold, Tensor) and v_threshold.numel() > 1
        if threshold is None and not several and spike_dtype not in HALF_DTYPES:
            spikes = run_with_norm(
                _norm_lif().run_norm_lif, x, v, tau=tau, v_threshold=v_threshold, v_reset=v_reset, decay_input=decay_input,
                detach_reset=detach_reset, surrogate=surrogate, alpha=alpha, levels=levels, return_v=return_v,
                return_v_seq=return_v_seq, spike_dtype=spike_dtype,
            )  # fmt: skip
            if spikes is not None:
                return spikes
        x = computed(x)
    channels = check_steps(x, {"v": v}, return_v=return_v, return_v_seq=return_v_seq)
    if threshold is not None:
        _check_norm(x, v_threshold, threshold)
    if detach_threshold is not False:
        check_flag("detach_threshold", detach_threshold)
    if detach_threshold and threshold is None:
        raise ValueError("detach_threshold=True needs threshold='rms' or 'mean', got threshold=None")
    neuron, tau_tensor, threshold_tensor = check_neuron(
        x, channels, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels, tokens=True
    )
    if spike_dtype is not None or levels is not None:
        check_spike_dtype(spike_dtype, x, v, tau_tensor, threshold_tensor, levels=levels, half=True)
    if neuron is None:
        warn_of_custom_surrogate()
    backend = dispatch.choose(x.device, neuron is not None)
    if backend == "reference":
        if values_are_readable(x):
            check_neuron_values(tau_tensor, threshold_tensor, decay_input, state_dtype(x.dtype), encode(levels))
        tau, v_threshold = (
            tau if tau_tensor is None else tau_tensor,
            v_threshold if threshold_tensor is None else threshold_tensor,
        )
        found = reference.lif(
            x, v, tau=tau, v_threshold=v_threshold, v_reset=v_reset, decay_input=decay_input, detach_reset=detach_reset,
            surrogate=surrogate, alpha=alpha, levels=levels, threshold=threshold, detach_threshold=detach_threshold,
            return_v=return_v, return_v_seq=return_v_seq, spike_dtype=spike_dtype,
        )  # fmt: skip
    else:
        if threshold is not None and not _norm_fits(x, backend):
            factor = neuron.v_threshold if threshold_tensor is None else threshold_tensor
            threshold_tensor, threshold = norm_of_tokens(x, threshold, detach_threshold) * factor, None
        parameters, values = (tau_tensor, threshold_tensor), (*neuron, threshold or "", detach_threshold)
        found = launch(_lif_call, x, (v,), parameters, values, return_v, return_v_seq, spike_dtype, backend)
        found = returned(found, single=True) if return_v or return_v_seq else found[0]
    packed.note_spikes(found[0] if isinstance(found, tuple) else found, levels)
    return found


def _check_rate_of_levels(levels, T, dtype, return_counts):
    lo, hi = span(levels)
    check_levels_fit(levels, dtype, "the dtype of the rate")
    if isinstance(T, int) and T * max(-lo, hi) > 1 << 24:  # the kernels count in float32
        raise ValueError(f"T times the greatest level must be at most 2^24, got T={T} and levels from {lo} to {hi}")
    if return_counts:
        if lo < 0:
            raise ValueError(f"return_counts gives uint8 and needs levels of at least 0, got levels from {lo} to {hi}")
        if isinstance(T, int) and T * hi > 255:
            raise ValueError(f"return_counts gives uint8 and needs T * hi <= 255, got T={T} and hi={hi}")
        if Levels(*levels).scale != 1:
            raise ValueError("return_counts gives bare counts: leave out the scale of levels")


def lif_rate(
    x: Tensor,
    T: int = 4,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    tau=2.0,
    v_threshold=1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate="atan",
    alpha: float | None = None,
    levels=None,
    return_counts: bool = False,
) -> Tensor:
    r"""Firing rate of a LIF neuron under a constant current, with optional gate and residual, in one kernel: SDiT's neuron.

    ::

        current = x, or sigmoid(gate) * x
        out     = residual + 1/T * sum over t < T of s[t],    s = lif(current repeated T times)

    The kernel reads x (and gate, residual) once and writes the output once. The backward pass keeps only x (and gate). It
    recomputes the membrane potential and propagates its derivatives forward in time along with it, so its memory does not grow
    with T.

    Args:
        x: current, any shape and strides, float32, float64, bfloat16 or float16.
        T: number of time steps, 1 to 2^24.
        residual: added to the rate. The shape of x, the dtype of x or float32 (float64). The output has the dtype of residual.
        gate: logits of a gate on the current, with the shape and dtype of x.
        tau (float | Tensor): time constant in steps, at least 1: a number, a scalar tensor, or a tensor (C,).
        v_threshold (float | Tensor): firing threshold: a number, a scalar tensor, or a tensor (C,).
        v_reset: membrane potential after a spike, as in :func:`lif`. Every call starts from v_reset (0 with soft reset).
        decay_input: True: the leak divides the input by tau too.
        detach_reset: True: no gradient flows through the reset.
        surrogate (str | Callable): surrogate gradient, as in :func:`lif`.
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        levels (Levels | tuple[int, int] | str | None): ternary or integer spikes, as in :func:`lif`; the rate is their mean.
            T = 1 and tau = 1 give a neuron without a time axis and state: scale * round(clip(x / v_threshold, lo, hi)).
        return_counts: return the number of spikes (the sum of the levels) as uint8 instead of the rate, for inference. Needs
            at most 255 of them, and no residual.

    Returns:
        A tensor with the shape of x. Gradients reach x, residual, gate, tau and v_threshold.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`lif`.

    Source: Yang et al., SDiT, arXiv 2402.11588.

    Example:
        >>> import torch
        >>> from sdit_kernels import lif_rate
        >>> lif_rate(torch.tensor([1.0, 1.1, 1.5, 2.0])).tolist()
        [0.0, 0.25, 0.5, 1.0]
    """
    check_data("x", x)
    if isinstance(T, bool) or not isinstance(T, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"T must be an int, got {type(T).__name__}")
    if not isinstance(T, (int, torch.SymInt)):
        T = int(T)
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    if T > 1 << 24:  # the kernels count in float32
        raise ValueError(f"T must be at most 2^24, got {T}")
    if residual is not None:
        check_membrane("residual", residual, x.shape, x)
    if gate is not None:
        check_data("gate", gate, x)
        if gate.dtype != x.dtype:
            raise TypeError(f"gate must have the dtype of x, {x.dtype}, got {gate.dtype}; cast it: gate.to({x.dtype})")
    channels = x.shape[-1] if x.dim() else None
    neuron, tau_tensor, threshold_tensor = check_neuron(
        x, channels, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels
    )
    check_flag("return_counts", return_counts)
    if levels is not None:
        _check_rate_of_levels(levels, T, x.dtype if residual is None else residual.dtype, return_counts)
    if return_counts:
        if T > 255:
            raise ValueError(f"return_counts gives uint8 and needs T <= 255, got {T}")
        if residual is not None:
            raise ValueError("return_counts gives bare counts: leave residual out")
        if wants_gradient(x, gate, tau_tensor, threshold_tensor):
            raise ValueError("return_counts carries no gradient: call under torch.no_grad(), or leave it out")
    if neuron is None:
        warn_of_custom_surrogate()
    backend = dispatch.choose(x.device, fused=neuron is not None)
    if backend == "reference":
        if values_are_readable(x):
            check_neuron_values(tau_tensor, threshold_tensor, decay_input, state_dtype(x.dtype), encode(levels))
        rate = reference.lif_rate(
            x, T, residual, gate, tau=tau, v_threshold=v_threshold, v_reset=v_reset, decay_input=decay_input,
            detach_reset=detach_reset, surrogate=surrogate, alpha=alpha, levels=levels, return_counts=return_counts,
        )  # fmt: skip
    else:
        rate = _rate_call(x, residual, gate, tau_tensor, threshold_tensor, T, *neuron, return_counts, backend)
    if residual is None and not return_counts:
        packed.note_spikes(rate, levels, T)
    return rate
