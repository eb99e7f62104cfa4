"""The operations of a neuron's step on tensors, and the loop over T time steps: every neuron's definition in plain PyTorch.

The operations run in the order of the step, in float32 (float64 for float64 data), without fused multiply-adds. The kernels
repeat them bit for bit, so the backward pass recomputes every spike exactly.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..dtypes import state_dtype
from ..levels import decode, encode
from ..neuron import ADLIF, CUBA, LAPICQUE, LEAKY, LIF, Neuron, Values
from ..neuron.trace import HUGE, THRESHOLD_EPS
from ..surrogate import SURROGATES


class _Fire(torch.autograd.Function):
    """s = 1 where z >= 0, else 0, with the surrogate gradient: dz = ds * derivative(z).

    dz is 0 where the derivative is 0. At an infinite h, ds is infinite, and the product would be NaN, although the reset hides
    that h.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z, derivative):
        return (z >= 0).to(z.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, ctx.derivative = inputs
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)

    @staticmethod
    def backward(ctx, ds):
        (z,) = ctx.saved_tensors
        slope = ctx.derivative(z)
        return torch.where(slope == 0, 0.0, ds * slope), None

    @staticmethod
    def jvp(ctx, dz, _):
        return _Fire.backward(ctx, dz)[0]


class _FireAbove(_Fire):
    """s = 1 where z > 0, else 0."""

    @staticmethod
    def forward(z, derivative):
        return (z > 0).to(z.dtype)


class _Where(torch.autograd.Function):
    """a where s, else b. So an infinite h that fires gives a, and not 0 * inf. s receives the gradient (a - b) * upstream."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s, a, b):
        return torch.where(s > 0, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in inputs]
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _inputs(ctx):
        tensors = iter(ctx.saved_tensors)
        return [next(tensors) if number is None else number for number in ctx.numbers]

    @staticmethod
    def backward(ctx, g):
        s, a, b = _Where._inputs(ctx)
        needs_s, needs_a, needs_b = ctx.needs_input_grad
        return (
            g * (a - b) if needs_s else None,
            torch.where(s > 0, g, 0.0) if needs_a else None,
            torch.where(s > 0, 0.0, g) if needs_b else None,
        )

    @staticmethod
    def jvp(ctx, ds, da, db):
        s, a, b = _Where._inputs(ctx)
        t = torch.where(s > 0, 0.0 if da is None else da, 0.0 if db is None else db)
        return t if ds is None else t + ds * (a - b)


class _Level(torch.autograd.Function):
    """round(clip(z, lo, hi)) with z = h / unit, ties to even; dz is the upstream gradient from low to high, ends included.

    Outside, h and unit have the gradient 0, also where z is infinite.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h, unit, lo, hi, low, high):
        return (h / unit).clamp(lo, hi).round() + 0.0  # a negative zero becomes 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, unit, *_, ctx.low, ctx.high = inputs
        ctx.save_for_backward(h, unit)
        ctx.save_for_forward(h, unit)

    @staticmethod
    def _inside(ctx, z, g):
        return torch.where((z >= ctx.low) & (z <= ctx.high), g, 0.0)

    @staticmethod
    def backward(ctx, g):
        h, unit = ctx.saved_tensors
        z = h / unit
        return _Level._inside(ctx, z, g / unit), _Level._inside(ctx, z, -g * z / unit), *[None] * 4

    @staticmethod
    def jvp(ctx, dh, dunit, *_):
        h, unit = ctx.saved_tensors
        z = h / unit
        return _Level._inside(ctx, z, ((0.0 if dh is None else dh) - z * (0.0 if dunit is None else dunit)) / unit)


class TensorOperations:
    """The operations of a step, on tensors. neuron/trace.py lists them."""

    def __init__(self, derivative: Callable[[Tensor], Tensor]):
        self._derivative = derivative

    def fire(self, z):
        return _Fire.apply(z, self._derivative)

    def fire_above(self, z):
        return _FireAbove.apply(z, self._derivative)

    def either(self, c, d):
        return c + d - (c * d).detach()

    def level(self, z, lo, hi, unit=1.0, window=None):
        unit = unit if isinstance(unit, Tensor) else torch.full((), unit, dtype=z.dtype, device=z.device)
        return _Level.apply(z, unit.expand_as(z), lo, hi, *(window or (lo, hi)))

    def where(self, condition, a, b):
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            a = torch.full((), a, dtype=condition.dtype, device=condition.device)
        given = condition, a, b
        shape = torch.broadcast_shapes(*(t.shape for t in given if isinstance(t, Tensor)))
        return _Where.apply(*(t.expand(shape) if isinstance(t, Tensor) and t.shape != shape else t for t in given))

    def maximum(self, a, b):
        return torch.maximum(*_tensors(a, b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else max(a, b)

    def minimum(self, a, b):
        return torch.minimum(*_tensors(a, b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else min(a, b)

    def abs(self, a):
        return abs(a)

    def exp(self, a):
        return a.exp() if isinstance(a, Tensor) else math.exp(a)

    def detach(self, a):
        return a.detach() if isinstance(a, Tensor) else a


def _tensors(a, b):
    like = a if isinstance(a, Tensor) else b
    return [t if isinstance(t, Tensor) else torch.full((), t, dtype=like.dtype, device=like.device) for t in (a, b)]


def surrogate_function(surrogate, alpha):
    if callable(surrogate):
        return surrogate
    entry = SURROGATES[surrogate]
    a = entry.alpha if alpha is None else float(alpha)
    return lambda z: entry.derivative(z, a)


def as_parameter(p, dtype):
    if not isinstance(p, Tensor):
        return p
    return p.to(dtype).reshape(()) if p.numel() == 1 else p.to(dtype)


def bind(neuron: Neuron, values, derivative, **flags):
    """Return the step of a neuron as a function (x, states, t) -> (spike, states). values: its parameters, then its numbers.

    A parameter with more axes than x has a value for every step t.
    """
    names, o = (*neuron.parameters, *neuron.numbers), TensorOperations(derivative)

    def step(x, states, t=0):
        p = Values(names, [p[t] if isinstance(p, Tensor) and p.dim() > x.dim() else p for p in values])
        s, after = neuron.step(x, Values(neuron.states, states), p, o, **flags)
        return s, after if isinstance(after, tuple) else (after,)

    return step


def simulate(step, x, states, starts, return_state, return_state_seq, spike_dtype=None):
    """Run a neuron over the steps of x, (T, ...). states: before the first step; a state that is None starts from its start.

    Return (s, last states, their sequences). What is not requested is None.
    """
    dtype = state_dtype(x.dtype)
    empty = bool(x.shape[0] == 0)  # under torch.jit.trace, shape[0] is a tensor
    states = tuple(
        torch.full(x.shape[1:], start, dtype=dtype, device=x.device) if v is None else v.to(dtype, copy=empty)
        for v, start in zip(states, starts)
    )
    spikes, sequences = [], [[] for _ in states]
    for t, x_t in enumerate(x.to(dtype).unbind(0)):
        s, states = step(x_t, states, t)
        spikes.append(_filling(x_t, s))
        states = tuple(_filling(x_t, v) for v in states)
        for sequence, v in zip(sequences, states):
            sequence.append(v)
    s = torch.stack(spikes) if spikes else x.clone()
    if spike_dtype in (torch.uint8, torch.int8):
        s = s.detach().nan_to_num(nan=0.0)
    s = s.to(spike_dtype or x.dtype)
    seqs = tuple(torch.stack(seq) if seq else x.to(dtype, copy=True) for seq in sequences) if return_state_seq else None
    return s, states if return_state else None, seqs


def _filling(x, value):
    """Return a value of a step in the shape of x: it may be a number, or come from parameters alone."""
    if not isinstance(value, Tensor):
        return torch.full_like(x, value)
    return value if value.shape == x.shape else value.expand(x.shape)


def returned(found, single=False):
    """Return what an op returns: s, or s and what was requested. single: the neuron has one state, which is not in a tuple."""
    s, *states = found
    states = [v[0] if single else v for v in states if v is not None]
    return (s, *states) if states else s


def run(neuron, x, states, values, flags, surrogate, alpha, return_state, return_state_seq, spike_dtype, numbers=()):
    """Run the definition of a neuron. values: its parameters, numbers or tensors; numbers: its numbers.

    A parameter that is a number becomes a tensor: arithmetic on two parameters rounds as it does in the kernels.
    """
    dtype = state_dtype(x.dtype)
    values = [p if isinstance(p, Tensor) else torch.full((), float(p), dtype=dtype, device=x.device) for p in values]
    values = [*(as_parameter(p, dtype) for p in values), *numbers]
    known = dict(zip((*neuron.parameters, *neuron.numbers), values))
    step = bind(neuron, values, surrogate_function(surrogate, alpha), **flags)
    starts = [0.0 if name is None else known[name] for name in neuron.start]
    return simulate(step, x, states, starts, return_state, return_state_seq, spike_dtype)


def norm_of_tokens(x, kind, detach):
    """Return the norm over the channels of x, (T, .., C), that scales thresholds, as (T, .., 1). See lif's ``threshold``."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        dtype = state_dtype(x.dtype)
        norm = torch.linalg.vector_norm(x, 2 if kind == "rms" else 1, dim=-1, keepdim=True, dtype=dtype)
        norm = norm * norm if kind == "rms" else norm
        norm = torch.sqrt(norm / x.shape[-1] + THRESHOLD_EPS) if kind == "rms" else norm / x.shape[-1] + THRESHOLD_EPS
        huge = HUGE[dtype == torch.float64]
        return torch.where(norm < huge, norm, huge)  # a token that is not finite, or overflows, has a finite threshold too


def _bind_lif(dtype, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels):
    values = 1.0 / as_parameter(tau, dtype), as_parameter(v_threshold, dtype), v_reset or 0.0
    flags = dict(zip(LIF.flags, (v_reset is None, decay_input, detach_reset, *decode(encode(levels)))))
    return bind(LIF, values, surrogate_function(surrogate, alpha), **flags)


def lif(
    x,
    v=None,
    *,
    tau=2.0,
    v_threshold=1.0,
    v_reset=0.0,
    decay_input=True,
    detach_reset=False,
    surrogate="atan",
    alpha=None,
    levels=None,
    threshold=None,
    detach_threshold=False,
    return_v=False,
    return_v_seq=False,
    spike_dtype=None,
):
    """See :func:`sdit_kernels.lif`."""
    if threshold is not None:
        v_threshold = norm_of_tokens(x, threshold, detach_threshold) * v_threshold
    step = _bind_lif(state_dtype(x.dtype), tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels)
    return returned(simulate(step, x, (v,), (v_reset or 0.0,), return_v, return_v_seq, spike_dtype), True)


def lif_rate(
    x,
    T=4,
    residual=None,
    gate=None,
    *,
    tau=2.0,
    v_threshold=1.0,
    v_reset=0.0,
    decay_input=True,
    detach_reset=False,
    surrogate="atan",
    alpha=None,
    levels=None,
    return_counts=False,
):
    """See :func:`sdit_kernels.lif_rate`."""
    dtype = state_dtype(x.dtype)
    current = x.to(dtype) if gate is None else torch.sigmoid(gate.to(dtype)) * x.to(dtype)
    step = _bind_lif(dtype, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels)
    v = torch.full_like(current, v_reset or 0.0)
    counts = torch.zeros_like(current)
    for _ in range(T):
        s, (v,) = step(current, (v,))
        counts = counts + s
    if return_counts:
        return counts.nan_to_num(nan=0.0).to(torch.uint8)
    rate = counts / T
    return rate.to(x.dtype) if residual is None else (residual.to(dtype) + rate).to(residual.dtype)


def leaky(
    x,
    v=None,
    *,
    beta,
    v_threshold=1.0,
    reset="subtract",
    reset_delay=True,
    surrogate="atan",
    alpha=None,
    return_v=False,
    return_v_seq=False,
    spike_dtype=None,
):
    """See :func:`sdit_kernels.leaky`."""
    flags = dict(reset=reset, delay=reset_delay or reset == "none")
    values = beta, v_threshold
    return returned(run(LEAKY, x, (v,), values, flags, surrogate, alpha, return_v, return_v_seq, spike_dtype), True)


def lapicque(
    x,
    v=None,
    *,
    R=1.0,
    C,
    time_step=1.0,
    v_threshold=1.0,
    reset="subtract",
    surrogate="atan",
    alpha=None,
    return_v=False,
    return_v_seq=False,
    spike_dtype=None,
):
    """See :func:`sdit_kernels.lapicque`."""
    values = R, C, time_step, v_threshold
    found = run(LAPICQUE, x, (v,), values, dict(reset=reset), surrogate, alpha, return_v, return_v_seq, spike_dtype)
    return returned(found, True)


def cuba(
    x,
    state=None,
    *,
    beta_i,
    beta,
    v_threshold=1.0,
    reset="subtract",
    reset_delay=True,
    surrogate="atan",
    alpha=None,
    return_state=False,
    return_state_seq=False,
    spike_dtype=None,
):
    """See :func:`sdit_kernels.cuba`."""
    flags, values = dict(reset=reset, delay=reset_delay or reset == "none"), (beta_i, beta, v_threshold)
    states = (None, None) if state is None else state
    return returned(run(CUBA, x, states, values, flags, surrogate, alpha, return_state, return_state_seq, spike_dtype))


def adlif(
    x,
    state=None,
    *,
    beta,
    beta_w,
    a,
    b,
    v_threshold=1.0,
    surrogate="atan",
    alpha=None,
    return_state=False,
    return_state_seq=False,
    spike_dtype=None,
):
    """See :func:`sdit_kernels.adlif`."""
    states, values = (None, None) if state is None else state, (beta, beta_w, a, b, v_threshold)
    return returned(run(ADLIF, x, states, values, {}, surrogate, alpha, return_state, return_state_seq, spike_dtype))
