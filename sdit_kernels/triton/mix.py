"""Token shift and squared ReLU in Triton.

A row of a tile loops over a run of tokens and holds the previous token, normalised, in registers. A run reads one token more
than it has (and, in the backward pass, one more row of upstream gradients); the neighbouring run reads that token too. A norm
needs all channels of a token in the tile. With more than Tuning.shift_channels channels, a separate kernel first writes the
sums over each token to ``stats``. Then x is read twice, and a tile holds some of the channels. Gradients of the mixes are
summed per program and then over programs, never by atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dtypes import state_dtype
from ..layout import layout_of_step, same_strides, sequences, step_view
from .launch import launch
from .tiles import STATES, Grid, cdiv, power_of_2, tile_of_program, warps_of

_RUN, _RUN_BACK = 4, 8  # tokens per run: forward, backward

_NO_NORM, _NORM, _STATS = 0, 1, 2  # no norm; the norm of the rows of a tile; the norm from the sums in ``stats``


class Flags(NamedTuple):
    """Compile-time constants of the token_shift kernels."""

    M: int  # mixes
    RUN: int  # tokens per run
    NORM: int  # _NO_NORM, _NORM or _STATS


@triton.jit
def _load_token(x_ptr, last_ptr, b, t, L, cols, mask, x_b, x_l, last_b, STATE: tl.constexpr):
    """Load token t of sequence b. t = -1 is the token before the sequence; other tokens outside the sequence are 0."""
    x = tl.load(x_ptr + b * x_b + t.to(tl.int64) * x_l + cols, mask=mask & (t >= 0) & (t < L), other=0.0).to(STATE)
    if last_ptr is not None:
        last = tl.load(last_ptr + b * last_b + cols, mask=mask & (t == -1), other=0.0).to(STATE)
        x = tl.where(t == -1, last, x)
    return x


@triton.jit
def _normalize(x, C, mask, eps, stats_ptr, b, t, inside, L, NORM: tl.constexpr, STATE: tl.constexpr):
    """Return (normalised rows, their scale factors). A row of zeros stays a row of zeros."""
    if NORM == 0:
        return x, tl.full([x.shape[0], 1], 1.0, STATE)
    elif NORM == 1:
        inverse = 1.0 / tl.full([1, 1], C, STATE)
        centred = tl.where(mask, x - tl.sum(x, 1)[:, None] * inverse, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] * inverse + eps)
        return centred * scale, scale
    else:
        at = stats_ptr + (b * (L + 1) + t + 1) * 4
        scale = tl.load(at + 1, mask=inside, other=0.0)
        return tl.where(mask, (x - tl.load(at, mask=inside, other=0.0)) * scale, 0.0), scale


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _normalize_backward(d, normal, scale, C, stats_ptr, b, t, inside, L, NORM: tl.constexpr, STATE: tl.constexpr):
    """Return the gradient of the rows from the gradient d of the normalised rows."""
    if NORM == 0:
        return d
    elif NORM == 1:
        inverse = 1.0 / tl.full([1, 1], C, STATE)
        total, products = tl.reduce((d, d * normal), 1, _add_pairs)  # one reduction: its warps wait for each other once
        return (d - total[:, None] * inverse - normal * (products[:, None] * inverse)) * scale
    else:
        at = stats_ptr + (b * (L + 1) + t + 1) * 4
        return (d - tl.load(at + 2, mask=inside, other=0.0) - normal * tl.load(at + 3, mask=inside, other=0.0)) * scale


@triton.jit
def _split_run(r, chunks, runs, RUN: tl.constexpr):
    """Return (sequence, first token, True if the run exists) of runs r. r has 32 bits: a 64-bit division is a function call."""
    b = r // chunks
    return b.to(tl.int64), (r - b * chunks) * RUN, r < runs


@triton.jit(do_not_specialize=["L", "chunks", "runs"])
def token_shift_forward_kernel(
    inputs, mixes_ptr, outs, stats_ptr, L, C, chunks, runs, eps: "fp64",
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_b, x_l = inputs[0]
    last_ptr, last_b = inputs[1]
    M: tl.constexpr = F.M
    RUN: tl.constexpr = F.RUN
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BC + tl.arange(0, BC)[None, :]
    b, t0, exists = _split_run((pid // blocks) * BR + tl.arange(0, BR)[:, None], chunks, runs, RUN)
    mask = (cols < C) & exists
    eps_ = tl.full([], eps, STATE)
    rows = ()
    for i in tl.static_range(RUN + 1):
        rows = rows + (_load_token(x_ptr, last_ptr if i == 0 else None, b, t0 + i - 1, L, cols, mask, x_b, x_l, last_b, STATE),)
    # All rows are normalised before the first store. With stores in between, ptxas for sm_100 reloads values that it never
    # spilled.
    normal = ()
    for i in tl.static_range(RUN + 1):
        now, _ = _normalize(rows[i], C, mask, eps_, stats_ptr, b, t0 + i - 1, exists & (t0 + i <= L), L, F.NORM, STATE)
        normal = normal + (now,)
    for i in tl.static_range(RUN):
        t = t0 + i
        for m in tl.static_range(M):
            mix = tl.load(mixes_ptr + m * C + cols, mask=cols < C, other=0.0)
            out = normal[i + 1] * mix + normal[i] * (1.0 - mix)
            tl.store(outs[m] + (b * L + t) * C + cols, out.to(outs[m].dtype.element_ty), mask=mask & (t < L))


@triton.jit
def _load_g(gs, mixes_ptr, C, cols, mask, at, m: tl.constexpr, STATE: tl.constexpr):
    """Load (upstream gradient, mix) of output m."""
    g = tl.load(gs[m] + at + cols, mask=mask, other=0.0).to(STATE)
    return g, tl.load(mixes_ptr + m * C + cols, mask=cols < C, other=0.0)


@triton.jit(do_not_specialize=["L", "chunks", "runs", "group"])
def token_shift_backward_kernel(
    inputs, mixes_ptr, upstream, stats_ptr, gradients, sums_ptr, L, C, chunks, runs, group, eps: "fp64",
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_b, x_l = inputs[0]
    last_ptr, last_b = inputs[1]
    gs, g_b, g_l = upstream
    dx_ptr, dlast_ptr = gradients
    M: tl.constexpr = F.M
    RUN: tl.constexpr = F.RUN
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BC + tl.arange(0, BC)[None, :]
    block = pid // blocks
    eps_ = tl.full([], eps, STATE)
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([BR, BC], STATE),)
    for j in range(group):
        b, t0, exists = _split_run((block * group + j) * BR + tl.arange(0, BR)[:, None], chunks, runs, RUN)
        mask = (cols < C) & exists
        after = tl.zeros([BR, BC], STATE)  # gradient from the next token
        for m in tl.static_range(M):
            g, mix = _load_g(gs, mixes_ptr, C, cols, mask & (t0 + RUN < L), b * g_b + (t0 + RUN).to(tl.int64) * g_l, m, STATE)
            after += g * (1.0 - mix)
        after = tl.where(t0 + RUN < L, after, 0.0)  # past the last token g is 0, but a mix may be infinite
        x = _load_token(x_ptr, None, b, t0 + RUN - 1, L, cols, mask, x_b, x_l, last_b, STATE)
        now, scale = _normalize(x, C, mask, eps_, stats_ptr, b, t0 + RUN - 1, exists & (t0 + RUN <= L), L, F.NORM, STATE)
        for i in range(RUN):
            t = t0 + (RUN - 1 - i)
            x = _load_token(x_ptr, last_ptr, b, t - 1, L, cols, mask, x_b, x_l, last_b, STATE)
            loaded = ()
            for m in tl.static_range(M):
                loaded = loaded + (_load_g(gs, mixes_ptr, C, cols, mask & (t < L), b * g_b + t.to(tl.int64) * g_l, m, STATE),)
            before, scale_before = _normalize(x, C, mask, eps_, stats_ptr, b, t - 1, exists & (t <= L), L, F.NORM, STATE)
            d = after
            after = tl.zeros([BR, BC], STATE)
            step = tl.where(t < L, now - before, 0.0)  # past the last token g is 0, but the last token may be infinite
            total = ()
            for m in tl.static_range(M):
                g, mix = loaded[m]
                d += g * mix
                after += g * (1.0 - mix)
                total = total + (sums[m] + g * step,)
            after = tl.where(t < L, after, 0.0)
            sums = total
            dx = _normalize_backward(d, now, scale, C, stats_ptr, b, t, exists & (t < L), L, F.NORM, STATE)
            tl.store(dx_ptr + (b * L + t) * C + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask & (t < L))
            now = before
            scale = scale_before
        if dlast_ptr is not None:
            d = _normalize_backward(after, now, scale, C, stats_ptr, b, t0 - 1, exists, L, F.NORM, STATE)
            tl.store(dlast_ptr + b * C + cols, d.to(dlast_ptr.dtype.element_ty), mask=mask & (t0 == 0))
    if sums_ptr is not None:
        for m in tl.static_range(M):
            tl.store(sums_ptr + (block.to(tl.int64) * M + m) * C + cols, tl.sum(sums[m], 0)[None, :], mask=cols < C)


@triton.jit(do_not_specialize=["L"])
def token_shift_stats_kernel(
    inputs, mixes_ptr, upstream, stats_ptr, L, C, eps: "fp64", M: tl.constexpr, STATE: tl.constexpr, BC: tl.constexpr
):
    """Compute per token the mean and scale and, if M > 0, the two sums over d that the gradient of the norm needs."""
    x_ptr, x_b, x_l = inputs[0]
    last_ptr, last_b = inputs[1]
    gs, g_b, g_l = upstream
    r = tl.program_id(0)
    b = (r // (L + 1)).to(tl.int64)
    t = r % (L + 1) - 1
    total = tl.zeros([1, BC], STATE)
    for c in range(0, C, BC):
        cols = c + tl.arange(0, BC)[None, :]
        total += _load_token(x_ptr, last_ptr, b, t, L, cols, cols < C, x_b, x_l, last_b, STATE)
    inverse = 1.0 / tl.full([], C, STATE)
    mean = tl.sum(total) * inverse
    total = tl.zeros([1, BC], STATE)
    for c in range(0, C, BC):
        cols = c + tl.arange(0, BC)[None, :]
        centred = _load_token(x_ptr, last_ptr, b, t, L, cols, cols < C, x_b, x_l, last_b, STATE) - mean
        total += tl.where(cols < C, centred * centred, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(total) * inverse + tl.full([], eps, STATE))
    tl.store(stats_ptr + r.to(tl.int64) * 4, mean)
    tl.store(stats_ptr + r.to(tl.int64) * 4 + 1, scale)
    if M > 0:
        sum_d = tl.zeros([1, BC], STATE)
        sum_dx = tl.zeros([1, BC], STATE)
        for c in range(0, C, BC):
            cols = c + tl.arange(0, BC)[None, :]
            mask = cols < C
            d = tl.zeros([1, BC], STATE)
            for m in tl.static_range(M):
                g, mix = _load_g(gs, mixes_ptr, C, cols, mask & (t >= 0), b * g_b + t.to(tl.int64) * g_l, m, STATE)
                d += tl.where(t >= 0, g * mix, 0.0)
                g, mix = _load_g(gs, mixes_ptr, C, cols, mask & (t + 1 < L), b * g_b + (t + 1).to(tl.int64) * g_l, m, STATE)
                d += tl.where(t + 1 < L, g * (1.0 - mix), 0.0)
            sum_d += d
            sum_dx += d * (_load_token(x_ptr, last_ptr, b, t, L, cols, mask, x_b, x_l, last_b, STATE) - mean)
        tl.store(stats_ptr + r.to(tl.int64) * 4 + 2, tl.sum(sum_d) * inverse)
        tl.store(stats_ptr + r.to(tl.int64) * 4 + 3, tl.sum(sum_dx) * scale * inverse)


@triton.jit(do_not_specialize=["R"])
def relu_squared_forward_kernel(inputs, output, R, C, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    x_ptr, x_r = inputs
    out_ptr, out_r = output
    _, row, first, cols, mask = tile_of_program(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask & (rows < R)
    x = tl.load(x_ptr + first + rows * x_r + cols, mask=mask, other=0.0).to(STATE)
    x = tl.where(x < 0.0, 0.0, x)  # tl.maximum would drop a NaN
    tl.store(out_ptr + first + rows * out_r + cols, (x * x).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def relu_squared_backward_kernel(inputs, upstream, gradient, R, C, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    x_ptr, x_r = inputs
    g_ptr, g_r = upstream
    dx_ptr, dx_r = gradient
    _, row, first, cols, mask = tile_of_program(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask & (rows < R)
    g = tl.load(g_ptr + first + rows * g_r + cols, mask=mask, other=0.0).to(STATE)
    x = tl.load(x_ptr + first + rows * x_r + cols, mask=mask, other=0.0).to(STATE)
    dx = tl.where(x <= 0.0, 0.0, 2.0 * x * g)
    tl.store(dx_ptr + first + rows * dx_r + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# --- launchers: the same signatures as in cpu/mix.py ------------------------------------------------------------------------


class _Shift:
    """Arguments and tile sizes of both passes. A thread makes 16-byte accesses.

    ``live``: rows that a program holds in registers. If they do not fit, the norm reads its sums from ``stats``.
    ``wide``: the tensor whose dtype sets the number of elements of a 16-byte access.
    """

    def __init__(self, tuning, x, last, mixes, norm_eps, run, live, wide, gs=()):
        self.x = sequences(x)
        self.last = None if last is None else sequences(last.unsqueeze(-2)).squeeze(1)
        self.mixes, self.gs, self.M, self.run = mixes, tuple(gs), mixes.shape[0], run
        self.B, self.L, self.C = self.x.shape
        self.eps = norm_eps or 0.0
        self.STATE = STATES[mixes.dtype]
        self.chunks = cdiv(self.L, run)
        self.runs = self.B * self.chunks
        last_b = 0 if last is None else self.last.stride(0)
        self.inputs = (self.x, self.x.stride(0), self.x.stride(1)), (self.last, last_b)
        self.upstream = (self.gs, *(self.gs[0].stride()[:2] if gs else (0, 0)))
        self.stats = None
        values = 16 // wide.dtype.itemsize
        whole = power_of_2(self.C)
        fits = whole <= min(tuning.shift_channels, 1024 * values)
        fits = fits and live * values * mixes.itemsize // 4 + 48 < min(255, 65536 * values // whole)
        self.norm = _NO_NORM if norm_eps is None else _NORM if fits else _STATS
        if self.norm == _STATS:
            values = min(values, 4)  # with more, the sums of 16-bit data spill registers
        elements = tuning.elementwise_threads * values
        columns = whole if self.norm == _NORM else min(whole, elements)
        rows = elements // columns if 2 * columns < elements else 1
        self.BR, self.BC, self.warps = rows, columns, warps_of(rows * columns // values)

    def launch(self, kernel, programs, *args, **flags):
        launch(kernel, programs, self.x.device, *args, **flags, STATE=self.STATE, num_warps=self.warps)

    def find_stats(self):
        if self.norm == _STATS:
            rows = self.B * (self.L + 1)
            self.stats = torch.empty((rows, 4), dtype=self.mixes.dtype, device=self.x.device)
            self.launch(
                token_shift_stats_kernel, rows, self.inputs, self.mixes, self.upstream, self.stats, self.L, self.C, self.eps,
                M=len(self.gs), BC=self.BC,
            )  # fmt: skip

    def flags(self):
        return dict(F=Flags(self.M, self.run, self.norm), BR=self.BR, BC=self.BC)


def token_shift_forward(x, last, mixes, norm_eps, outs, tuning):
    """Fill the contiguous outs. mixes is (M, C), contiguous, in the state type. x must not be empty."""
    s = _Shift(tuning, x, last, mixes, norm_eps, _RUN, len(outs), outs[0])
    s.find_stats()
    programs = cdiv(s.runs, s.BR) * cdiv(s.C, s.BC)
    s.launch(
        token_shift_forward_kernel, programs, s.inputs, mixes, tuple(outs), s.stats, s.L, s.C, s.chunks, s.runs, s.eps,
        **s.flags(),
    )  # fmt: skip


def token_shift_backward(gs, x, last, mixes, norm_eps, dx, dlast, parameters, tuning):
    """Fill dx, and dlast if given, both contiguous. If ``parameters``, return partial sums of d mixes, (groups, M, C)."""
    gs = same_strides([sequences(g) for g in gs])
    s = _Shift(tuning, x, last, mixes, norm_eps, _RUN_BACK, 2 * len(gs) + 8, x, gs)  # wide=gs[0] makes two mixes spill
    s.find_stats()
    blocks, tiles = cdiv(s.C, s.BC), cdiv(s.runs, s.BR)
    group = cdiv(tiles * blocks, tuning.sum_programs) if parameters else 1
    groups = cdiv(tiles, group)
    sums = torch.empty((groups, s.M, s.C), dtype=mixes.dtype, device=x.device) if parameters else None
    s.launch(
        token_shift_backward_kernel, groups * blocks, s.inputs, mixes, s.upstream, s.stats, (dx, dlast), sums,
        s.L, s.C, s.chunks, s.runs, group, s.eps, **s.flags(),
    )  # fmt: skip
    return sums


def relu_squared_forward(x, out, tuning):
    """Fill out. x must not be empty."""
    layout = layout_of_step(x, out, False)
    Grid(tuning, layout, x.dtype, False).launch(
        relu_squared_forward_kernel, x.device, step_view(layout, x), step_view(layout, out), layout.R, layout.C,
        STATE=STATES[state_dtype(x.dtype)],
    )  # fmt: skip


def relu_squared_backward(g, x, dx, tuning):
    """Fill dx. x must not be empty."""
    layout = layout_of_step(x, dx, False)
    x_, g_, dx_ = (step_view(layout, t) for t in (x, g, dx))
    Grid(tuning, layout, x.dtype, False).launch(
        relu_squared_backward_kernel, x.device, x_, g_, dx_, layout.R, layout.C, STATE=STATES[state_dtype(x.dtype)]
    )
