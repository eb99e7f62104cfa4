"""The definition of snnTorch's Leaky over T time steps: the membrane before a step decides its reset, without a gradient.

The operations run in this order, in float32 (float64 for float64 data), without fused multiply-adds. The CPU and Triton kernels
repeat them bit for bit.
"""

import torch

from ..dtypes import state_dtype
from .lif import Fire, as_parameter, surrogate_function


class _FireAbove(Fire):
    """s = 1 where z > 0, else 0, with the surrogate gradient of Fire."""

    @staticmethod
    def forward(z, derivative):
        return (z > 0).to(z.dtype)


class _ZeroNow(torch.autograd.Function):
    """h - (s - r) * h, computed with torch.where, so that an infinite h that fires becomes 0 and not NaN."""

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
        return torch.where(s > r, 0.0, torch.where(s < r, dv + dv, dv)), -dv * h, None


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
    beta, v_threshold = as_parameter(beta, dtype), as_parameter(v_threshold, dtype)
    derivative = surrogate_function(surrogate, alpha)
    if v is None:
        v = torch.zeros(x.shape[1:], dtype=dtype, device=x.device)
    else:
        v = v.to(dtype, copy=bool(x.shape[0] == 0))  # under torch.jit.trace, shape[0] is a tensor
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
