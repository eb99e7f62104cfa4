"""The definition of RWKV-4's WKV scan. B batch, L tokens, C channels.

The recurrence carries N = a e^o and D = b e^o with a running maximum o. The result does not depend on o, so no gradient flows
through it. The arithmetic is float32 (float64 for float64 data). This loop over tokens is slow; the tests compare the kernels
with it in float64.
"""

import math

import torch
from torch import Tensor

from ..dtypes import state_dtype

# A smaller log decay, also -inf, is raised to this: its product with 0 or with many tokens must be finite.
MIN_LOG_DECAY = -1e20


def _replace_minus_inf(o):
    """Return an exponent that can be subtracted: 0 for an empty state, whose exponent is -inf; -inf - (-inf) is NaN."""
    return torch.where(o == -torch.inf, 0.0, o)


class _State:
    """The sums over the tokens so far, N = a e^o and D = b e^o."""

    def __init__(self, ybar, lse):
        self.o = lse.detach()
        self.b = torch.exp(lse - _replace_minus_inf(self.o))  # 1, or 0 if empty; written so that the gradient of lse flows
        self.a = ybar * self.b

    def decay_and_add(self, w, k, v):
        """N <- e^w N + e^k v, D <- e^w D + e^k."""
        old, self.o = self.o, torch.maximum(w.detach() + self.o, k.detach())
        o = _replace_minus_inf(self.o)
        keep, new = torch.exp(w + old - o), torch.exp(k - o)
        self.a, self.b = keep * self.a + new * v, keep * self.b + new

    def user(self):
        """Return (ybar, lse) = (N/D, log D); (0, -inf) for an empty state."""
        is_nonempty = self.b != 0  # keeps a NaN
        b = torch.where(is_nonempty, self.b, 1.0)
        return torch.where(is_nonempty, self.a / b, 0.0), torch.where(is_nonempty, self.o + torch.log(b), -torch.inf)

    def snapshot(self):
        return self.a, self.b, self.o


def _output(states, k_u, v):
    """Return (sum of the states' N + e^(u+k) v) / (sum of D + e^(u+k)); 0 if every key is masked."""
    o = k_u.detach()
    for _, _, exponent in states:
        o = torch.maximum(o, exponent)
    o = _replace_minus_inf(o)
    e = torch.exp(k_u - o)
    n, z = e * v, e
    for a, b, exponent in states:
        scale = torch.exp(exponent - o)
        n, z = n + a * scale, z + b * scale
    is_nonempty = z != 0  # keeps a NaN
    return torch.where(is_nonempty, n / torch.where(is_nonempty, z, 1.0), 0.0)


def _scan(w, u, k, v, ybar, lse, bidirectional):
    """Scan k, v (B, L, C), in the state type. Return (y, ybar, lse)."""
    L = k.shape[1]
    state, before = _State(ybar, lse), []
    for t in range(L):
        before.append([state.snapshot()])
        state.decay_and_add(w, k[:, t], v[:, t])
    if bidirectional:
        right = _State(ybar, lse)
        for t in reversed(range(L)):
            before[t].append(right.snapshot())
            right.decay_and_add(w, k[:, t], v[:, t])
    y = [_output(before[t], u + k[:, t], v[:, t]) for t in range(L)]
    return (torch.stack(y, 1) if y else torch.zeros_like(v)), *state.user()


def _log_decay(time_decay, log_decay, dtype):
    if log_decay is None:
        return -torch.exp(time_decay.to(dtype).clamp_max(math.log(-MIN_LOG_DECAY)))
    return log_decay.to(dtype).clamp_min(MIN_LOG_DECAY)


def wkv(
    time_decay,
    time_first,
    k,
    v,
    r=None,
    *,
    state=None,
    return_state=False,
    bidirectional=False,
    log_decay=None,
    cu_seqlens=None,
    max_seqlen=None,  # this and algorithm are unused; they make the signature equal to sdit_kernels.wkv
    algorithm="auto",
):
    """See :func:`sdit_kernels.wkv`."""
    dtype = state_dtype(k.dtype)
    w, u = _log_decay(time_decay, log_decay, dtype), time_first.to(dtype)
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if state is None:
        ybar = torch.zeros(sequences, k.shape[2], dtype=dtype, device=k.device)
        state = ybar, torch.full_like(ybar, -torch.inf)
    ybar, lse = (s.to(dtype) for s in state)
    k_, v_ = k.to(dtype), v.to(dtype)
    if cu_seqlens is None:
        y, ybar, lse = _scan(w, u, k_, v_, ybar, lse, bidirectional)
    else:
        bounds = cu_seqlens.tolist()
        parts = [
            _scan(w, u, k_[:, a:b], v_[:, a:b], ybar[i : i + 1], lse[i : i + 1], bidirectional)
            for i, (a, b) in enumerate(zip(bounds, bounds[1:]))
        ]
        y, ybar, lse = (
            torch.cat([p[i] for p in parts], axis) if parts else empty
            for i, axis, empty in ((0, 1, torch.zeros_like(v_)), (1, 0, ybar), (2, 0, lse))
        )
    if r is not None:
        y = torch.sigmoid(r.to(dtype)) * y
    y = y.to(k.dtype)
    return (y, (ybar, lse)) if return_state else y


def wkv_step(time_decay, time_first, k, v, state=None, *, r=None, log_decay=None):
    """See :func:`sdit_kernels.wkv_step`."""
    out, state = wkv(
        time_decay, time_first, k[:, None], v[:, None], r=None if r is None else r[:, None], state=state, return_state=True,
        log_decay=log_decay,
    )  # fmt: skip
    return out[:, 0], state


def wkv_step_(time_decay, time_first, k, v, state, *, r=None, log_decay=None):
    """See :func:`sdit_kernels.wkv_step_`."""
    out, new = wkv_step(time_decay, time_first, k, v, state, r=r, log_decay=log_decay)
    for old, value in zip(state, new):
        old.copy_(value)
    return out


def wkv_state_from_rwkv(aa: Tensor, bb: Tensor, pp: Tensor):
    """See :func:`sdit_kernels.wkv_state_from_rwkv`."""
    is_nonempty = bb > 0
    b = torch.where(is_nonempty, bb, 1.0)
    return torch.where(is_nonempty, aa / b, 0.0), torch.where(is_nonempty, pp + torch.log(b), -torch.inf)


def wkv_state_to_rwkv(ybar: Tensor, lse: Tensor):
    """See :func:`sdit_kernels.wkv_state_to_rwkv`."""
    is_nonempty = lse > -torch.inf
    return (
        torch.where(is_nonempty, ybar, 0.0),
        is_nonempty.to(ybar.dtype),
        torch.where(is_nonempty, lse, -1e38),
    )  # RWKV's value for an empty state
