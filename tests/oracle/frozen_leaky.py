"""snnTorch's Leaky over T steps, frozen on purpose: tests compare the library with it, so it must not change with the library.

It is a copy of the definition of November 2026, with other imports. Leaky is a LIF neuron whose reset depends on the membrane
before the step. The reset has no gradient.

Every operation happens in this order, in float32 (float64 for float64 data), without fused multiply-adds. The CPU and Triton
kernels repeat it bit for bit.
"""

import torch

from .frozen_lif import _derivative, _Fire, _scalar_or_channel, state_dtype


class _FireAbove(_Fire):
    """s = 1 where z > 0, else 0."""

    @staticmethod
    def forward(z, derivative):
        return (z > 0).to(z.dtype)


class _ZeroNow(torch.autograd.Function):
    """h - (s - r) * h with a select, so that an infinite h that fires becomes 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h, s, r):
        return torch.where(s > r, 0.0, torch.where(s < r, h + h, h))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dv):
        h, s, r = ctx.saved_tensors
        return dv * (1 - s + r), -dv * h, None


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
):
    """See :func:`sdit_kernels.leaky`."""
    dtype = state_dtype(x.dtype)
    beta, v_threshold = _scalar_or_channel(beta, dtype), _scalar_or_channel(v_threshold, dtype)
    derivative = _derivative(surrogate, alpha)
    if v is None:
        v = torch.zeros(x.shape[1:], dtype=dtype, device=x.device)
    else:
        v = v.to(dtype, copy=x.shape[0] == 0)
    spikes, membrane = [], []
    for x_t in x.to(dtype).unbind(0):
        r = (v > v_threshold).to(dtype)
        h = beta * (torch.where(r > 0, 0.0, v) if reset == "zero" else v) + x_t
        if reset == "subtract":
            h = h - r * v_threshold
        s = _FireAbove.apply(h - v_threshold, derivative)
        if reset_delay or reset == "none":
            v = h
        else:
            v = h - (s - r) * v_threshold if reset == "subtract" else _ZeroNow.apply(h, s, r)
        spikes.append(s)
        membrane.append(v)
    s = (torch.stack(spikes) if spikes else x.clone()).to(x.dtype)
    out = [s]
    if return_v:
        out.append(v)
    if return_v_seq:
        out.append(torch.stack(membrane) if membrane else x.to(dtype, copy=True))
    return tuple(out) if len(out) > 1 else s
