"""The definition of the LIF neuron over T time steps; x is (T, ..., C) with C channels.

The operations run in this order, in float32 (float64 for float64 data), without fused multiply-adds. The CPU and Triton kernels
repeat them bit for bit, so the backward pass recomputes every spike exactly.
"""

import torch
from torch import Tensor

from ..dtypes import state_dtype
from ..surrogate import SURROGATES


class Fire(torch.autograd.Function):
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
        return Fire.backward(ctx, dz)[0]


class _HardReset(torch.autograd.Function):
    """v = v_reset where s, else h, computed with torch.where, so that an infinite h gives v_reset and not 0 * inf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h, s, v_reset):
        return torch.where(s > 0, v_reset, h)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, s, ctx.v_reset = inputs
        ctx.save_for_backward(h, s)
        ctx.save_for_forward(h, s)

    @staticmethod
    def backward(ctx, dv):
        h, s = ctx.saved_tensors
        return torch.where(s > 0, 0.0, dv), dv * (ctx.v_reset - h), None

    @staticmethod
    def jvp(ctx, dh, ds, _):
        h, s = ctx.saved_tensors
        return torch.where(s > 0, 0.0, dh) + ds * (ctx.v_reset - h)


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


def _step(x, v, r, v_threshold, v_reset, decay_input, detach_reset, derivative):
    """Charge, fire and reset once: (x, v) -> (s, v)."""
    rest = v if v_reset is None or v_reset == 0 else v - v_reset
    h = v + (x - rest) * r if decay_input else v - rest * r + x
    s = Fire.apply(h - v_threshold, derivative)
    gate = s.detach() if detach_reset else s
    return s, h - gate * v_threshold if v_reset is None else _HardReset.apply(h, gate, v_reset)


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
    return_v=False,
    return_v_seq=False,
    spike_dtype=None,
):
    """See :func:`sdit_kernels.lif`."""
    dtype = state_dtype(x.dtype)
    r = 1.0 / as_parameter(tau, dtype)
    v_threshold = as_parameter(v_threshold, dtype)
    derivative = surrogate_function(surrogate, alpha)
    if v is None:
        v = torch.full(x.shape[1:], 0.0 if v_reset is None else v_reset, dtype=dtype, device=x.device)
    else:
        v = v.to(dtype, copy=bool(x.shape[0] == 0))  # under torch.jit.trace, shape[0] is a tensor
    spikes, membrane = [], []
    for x_t in x.to(dtype).unbind(0):
        s, v = _step(x_t, v, r, v_threshold, v_reset, decay_input, detach_reset, derivative)
        spikes.append(s)
        membrane.append(v)
    s = (torch.stack(spikes) if spikes else x.clone()).to(spike_dtype or x.dtype)
    out = [s]
    if return_v:
        out.append(v)
    if return_v_seq:
        out.append(torch.stack(membrane) if membrane else x.to(dtype, copy=True))
    return tuple(out) if len(out) > 1 else s


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
    return_counts=False,
):
    """See :func:`sdit_kernels.lif_rate`."""
    dtype = state_dtype(x.dtype)
    current = x.to(dtype) if gate is None else torch.sigmoid(gate.to(dtype)) * x.to(dtype)
    r = 1.0 / as_parameter(tau, dtype)
    v_threshold = as_parameter(v_threshold, dtype)
    derivative = surrogate_function(surrogate, alpha)
    v = torch.full_like(current, 0.0 if v_reset is None else v_reset)
    counts = torch.zeros_like(current)
    for _ in range(T):
        s, v = _step(current, v, r, v_threshold, v_reset, decay_input, detach_reset, derivative)
        counts = counts + s
    if return_counts:
        return counts.to(torch.uint8)
    rate = counts / T
    return rate.to(x.dtype) if residual is None else (residual.to(dtype) + rate).to(residual.dtype)
