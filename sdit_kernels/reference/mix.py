"""The definitions of token_shift and relu_squared. The arithmetic is float32 (float64 for float64 data)."""

import torch

from ..dtypes import state_dtype


def token_shift(x, *mixes, norm_eps=None, last=None, dtype=None):
    """See :func:`sdit_kernels.token_shift`."""
    out, dtype = dtype or x.dtype, state_dtype(x.dtype)
    before = x.new_zeros(*x.shape[:-2], x.shape[-1]) if last is None else last
    rows = torch.cat([before.to(dtype).unsqueeze(-2), x.to(dtype)], -2)
    if norm_eps is not None:
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm_eps)
    now, before = rows[..., 1:, :], rows[..., :-1, :]
    mixes = [m.to(dtype).reshape(-1) for m in mixes]
    return tuple((now * m + before * (1 - m)).to(out) for m in mixes)


def relu_squared(x):
    """See :func:`sdit_kernels.relu_squared`."""
    return torch.relu(x.to(state_dtype(x.dtype))).square().to(x.dtype)
