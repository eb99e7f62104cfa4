"""The multi-step LIF neuron, frozen on purpose: tests compare the library with it, so it must not change with the library.

It is a copy of the definition of November 2026, with other imports. T simulation steps, C channels; x is (T, ..., C).

Every operation below happens in this order, in float32 (float64 for float64 data), without fused multiply-adds. The CPU and
Triton kernels repeat it bit for bit, so a recomputed forward pass repeats every spike.
"""

import torch
from torch import Tensor

from .surrogates import derivative


class _Fire(torch.autograd.Function):
    """s = 1 where z >= 0, else 0. The gradient is dS * derivative(z)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, derivative):
        return (z >= 0).to(z.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, ctx.derivative = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx, ds):
        (z,) = ctx.saved_tensors
        return ds * ctx.derivative(z), None


class _HardReset(torch.autograd.Function):
    """v = v_reset where s, else h. The select makes an infinite h reset to v_reset, where a product would give 0 * inf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h, s, v_reset):
        return torch.where(s > 0, v_reset, h)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, s, ctx.v_reset = inputs
        ctx.save_for_backward(h, s)

    @staticmethod
    def backward(ctx, dv):
        h, s = ctx.saved_tensors
        return dv * (1 - s), dv * (ctx.v_reset - h), None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the membrane and of sums over parameters: float64 for float64 data, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _derivative(surrogate, alpha):
    if callable(surrogate):
        return surrogate
    return derivative(surrogate, alpha)


def _scalar_or_channel(p, dtype):
    if not isinstance(p, Tensor):
        return p
    return p.to(dtype).reshape(()) if p.numel() == 1 else p.to(dtype)


def _step(x, v, r, v_threshold, v_reset, decay_input, detach_reset, derivative):
    """Charge, fire and reset once: (x, v) -> (s, v)."""
    rest = v if v_reset is None or v_reset == 0 else v - v_reset
    h = v + (x - rest) * r if decay_input else v - rest * r + x
    s = _Fire.apply(h - v_threshold, derivative)
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
    r = 1.0 / _scalar_or_channel(tau, dtype)
    v_threshold = _scalar_or_channel(v_threshold, dtype)
    derivative = _derivative(surrogate, alpha)
    if v is None:
        v = torch.full(x.shape[1:], 0.0 if v_reset is None else v_reset, dtype=dtype, device=x.device)
    else:
        v = v.to(dtype, copy=x.shape[0] == 0)
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
    r = 1.0 / _scalar_or_channel(tau, dtype)
    v_threshold = _scalar_or_channel(v_threshold, dtype)
    derivative = _derivative(surrogate, alpha)
    v = torch.full_like(current, 0.0 if v_reset is None else v_reset)
    counts = torch.zeros_like(current)
    for _ in range(T):
        s, v = _step(current, v, r, v_threshold, v_reset, decay_input, detach_reset, derivative)
        counts = counts + s
    if return_counts:
        return counts.to(torch.uint8)
    rate = counts / T
    return rate.to(x.dtype) if residual is None else (residual.to(dtype) + rate).to(residual.dtype)
