"""WKV scans that drive LIF neurons, in Triton. A thread holds one channel and the scan states of all T steps.

A thread loops over tiles of tokens. A tile is a number of pairs (time step, token). The kernel issues all loads of a tile
before it uses the first. At the start of a tile, the states are rounded to the form in which a checkpoint stores them,
(a, b, o). The backward pass starts each tile from the checkpoint, so it continues with the numbers that the forward pass used.
Both passes compute a current by the same operations, without implicit fused multiply-adds. So the backward pass recomputes
every spike bit for bit.

The arithmetic is the arithmetic of triton/wkv.py with one difference: both exponents of a token come from q = k - o, as u + q
and q - w. So the backward pass needs three numbers per token and step, (a, b, q). They stay in registers for 8 pairs; 16 pairs
would take all 255 registers and spill. The backward pass recomputes the states over the earlier tokens of the tile. It
recomputes membranes and currents token by token, the last token first.

One thread per channel of each sequence leaves the GPU idle if B * C is small. Below Tuning.spiking_min_channels_fused, the
launchers run the kernels of wkv, which also split the tokens into chunks, and the kernels of lif. The current between them has
the precision of the state and is freed at the end of the call.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dtypes import state_dtype
from ..layout import spiking_tile, wkv_rows
from ..neuron import trace
from . import neuron, wkv
from .launch import launch
from .neuron import as_number, as_tile, bind, load_parameters
from .tiles import STATES, cdiv, divide, warps_of
from .wkv import (
    LOG2E,
    at_least_tiny,
    load_decay_and_bonus,
    load_state,
    load_user_state,
    own_weight,
    pair_weights,
    reciprocal,
    rounded_exponent,
    rounded_state,
    store_three,
)

step = record = pullback = None  # the printed functions of a neuron; see bind


class Flags(NamedTuple):
    """Compile-time constants of the spiking_wkv kernels."""

    BC: int  # channels per program
    T: int  # time steps
    TOKENS: int  # tokens per tile
    RATE: bool  # the output is the mean of the spikes over T
    LOG_OF_RATE: bool  # w is -exp(time_decay)
    KINDS: tuple[int, ...]  # these four as in neuron.Flags
    RECIPROCAL: tuple[bool, ...]
    START: tuple[int, ...]
    SLOTS: tuple[int, ...]
    HELD: int = 0  # tokens that the backward pass holds in registers
    HOLDS_STATES: bool = False  # the backward pass holds the membranes before every step, not the tape
    USES_TAPE: bool = False  # and the pullback needs the tape too: the membrane after the step


@triton.jit
def _include_token(k, v, state, w):
    """Return (state after the token, q)."""
    a, b, ka, n = state
    q = tl.fma(-n, w, k - ka)
    d = q - w
    A, E = pair_weights(d)
    return (A * a + E * v, A * b + E, tl.where(d > 0.0, k, ka), tl.where(d > 0.0, 0.0, n + 1.0)), q


@triton.jit
def _weighted_mean(a, b, q, v, u2):
    """Return y, the weight of the state in y (per unit of b), and the weight of the token in y."""
    own = own_weight(q, u2)
    inverse = reciprocal(at_least_tiny(b + own))
    return (a + own * v) * inverse, inverse, own * inverse


@triton.jit
def _sigmoid(r):
    return reciprocal(1.0 + tl.exp2(-LOG2E * r))


@triton.jit
def _locate_program(C, BC: tl.constexpr):
    """Return (sequence, channels, mask) of this program."""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BC + tl.arange(0, BC)
    return (pid // blocks).to(tl.int64), cols, cols < C


@triton.jit
def _opaque_first_token(tile, L, TOKENS: tl.constexpr):
    """Return tile * TOKENS. The xor with 0 hides from LLVM that the value grows by a constant step.

    LLVM would otherwise carry one pointer per load and store of a tile through the loop, which takes more registers than a
    thread has.
    """
    return (tile * TOKENS ^ (L >> 31)).to(tl.int64)


@triton.jit
def _load_tile(ptr, x_t, x_l, t0, left, mask, other, T: tl.constexpr, TOKENS: tl.constexpr):
    """Load the values of all steps and tokens of a tile, ordered by token."""
    xs = ()
    x_t = tl.cast(x_t, tl.int64)
    for j in tl.static_range(TOKENS):
        for t in tl.static_range(T):
            xs = xs + (tl.load(ptr + t * x_t + (t0 + j) * x_l, mask=mask & (j < left), other=other),)
    return xs


def spiking_wkv_forward_kernel(
    inputs, parameters, states_in, outputs, B, L, C, plane, n0: "fp64", n1: "fp64", n2: "fp64", n3: "fp64",
    F: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Scan and fire. keep receives the states at the start of each tile, (3, T, B, tiles, C)."""
    k_ptr, k_t, k_b, k_l = inputs[0]
    v_ptr, v_t, v_b, v_l = inputs[1]
    r_ptr, r_t, r_b, r_l = inputs[2]
    m_ptr, m_b, m_l = inputs[3]
    w_ptr, u_ptr, neuron_ptrs = parameters
    ybar_ptr, lse_ptr = states_in
    out_ptr, ybar_out_ptr, lse_out_ptr, m_out_ptr, keep_ptr = outputs
    T: tl.constexpr = F.T
    TOKENS: tl.constexpr = F.TOKENS
    sequence, cols, mask = _locate_program(C, F.BC)
    w, u2 = load_decay_and_bonus(w_ptr, u_ptr, cols, mask, F.LOG_OF_RATE, STATE)
    constants = load_parameters(neuron_ptrs, (n0, n1, n2, n3), cols, mask, F, STATE)
    start = constants[F.START[0]] if F.START[0] >= 0 else 0.0
    tiles = tl.cdiv(L, TOKENS)
    steps_apart = tl.cast(B, tl.int64) * L * C
    states = ()
    for t in tl.static_range(T):
        states = states + (load_user_state(ybar_ptr, lse_ptr, (t * B + sequence) * C + cols, mask, w),)
    for i in range(tiles):
        t0 = _opaque_first_token(i, L, TOKENS)
        left = L - t0
        ks = _load_tile(k_ptr + sequence * k_b + cols, k_t, k_l, t0, left, mask, -float("inf"), T, TOKENS)
        vs = _load_tile(v_ptr + sequence * v_b + cols, v_t, v_l, t0, left, mask, 0.0, T, TOKENS)
        if r_ptr is not None:
            rs = _load_tile(r_ptr + sequence * r_b + cols, r_t, r_l, t0, left, mask, 0.0, T, TOKENS)
        if m_ptr is not None:
            ms = _load_tile(m_ptr + sequence * m_b + cols, 0, m_l, t0, left, mask, 0.0, 1, TOKENS)
        entering = ()
        for t in tl.static_range(T):
            a, b, o = rounded_state(states[t], w)
            if keep_ptr is not None:
                store_three(keep_ptr, ((t * B + sequence) * tiles + i) * C + cols, plane, mask, a, b, o)
            entering = entering + ((a, b, o, tl.zeros_like(a)),)
        states = entering
        for j in tl.static_range(TOKENS):
            m = mask & (j < left)
            at = (sequence * L + t0 + j) * C + cols
            x = ms[j].to(STATE) if m_ptr is not None else tl.zeros_like(w) + start
            count = tl.zeros_like(w)
            after = ()
            for t in tl.static_range(T):
                k, v = ks[j * T + t].to(STATE), vs[j * T + t].to(STATE)
                state, q = _include_token(k, v, states[t], w)
                after = after + (state,)
                y, _, _ = _weighted_mean(states[t][0], states[t][1], q, v, u2)
                if r_ptr is not None:
                    y = _sigmoid(rs[j * T + t].to(STATE)) * y
                spike, membrane = step(y, (x,), constants)
                spike = as_number(spike, STATE)
                x = as_tile(membrane[0], y)
                if F.RATE:
                    count += spike
                else:
                    tl.store(out_ptr + t * steps_apart + at, spike.to(out_ptr.dtype.element_ty), mask=m)
            states = after
            if F.RATE:
                rate = count * (1.0 / T) if (T & (T - 1)) == 0 else divide(count, tl.zeros_like(w) + T)
                tl.store(out_ptr + at, rate.to(out_ptr.dtype.element_ty), mask=m)
            if m_out_ptr is not None:
                tl.store(m_out_ptr + at, x, mask=m)
    if ybar_out_ptr is not None:
        behind = (tiles * TOKENS - L).to(STATE)  # tokens of the last tile that are past the end
        for t in tl.static_range(T):
            a, b, ka, n = states[t]
            seen = b != 0.0
            b = tl.where(seen, b, 1.0)
            at = (t * B + sequence) * C + cols
            tl.store(ybar_out_ptr + at, tl.where(seen, a / b, 0.0), mask=mask)
            tl.store(lse_out_ptr + at, tl.where(seen, tl.fma(n - behind, w, ka) + tl.log(b), -float("inf")), mask=mask)


def spiking_wkv_backward_kernel(
    upstream, inputs, parameters, gradients, sums, B, L, C, plane,
    n0: "fp64", n1: "fp64", n2: "fp64", n3: "fp64", alpha: "fp64", F: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    g_ptr, g_t, g_b, g_l = upstream[0]
    g_ybar_ptr, g_lse_ptr, g_m_ptr = upstream[1]
    k_ptr, k_t, k_b, k_l = inputs[0]
    v_ptr, v_t, v_b, v_l = inputs[1]
    r_ptr, r_t, r_b, r_l = inputs[2]
    m_ptr, m_b, m_l = inputs[3]
    keep_ptr = inputs[4]
    w_ptr, u_ptr, neuron_ptrs = parameters
    dk_ptr, dv_ptr, dr_ptr, d_ybar_ptr, d_lse_ptr, dm_ptr = gradients
    dw_ptr, du_ptr, d_neuron_ptrs = sums
    T: tl.constexpr = F.T
    TOKENS: tl.constexpr = F.TOKENS
    HELD: tl.constexpr = F.HELD
    sequence, cols, mask = _locate_program(C, F.BC)
    w, u2 = load_decay_and_bonus(w_ptr, u_ptr, cols, mask, F.LOG_OF_RATE, STATE)
    constants = load_parameters(neuron_ptrs, (n0, n1, n2, n3), cols, mask, F, STATE)
    start = constants[F.START[0]] if F.START[0] >= 0 else 0.0
    a_ = tl.full([], alpha, STATE)
    tiles = tl.cdiv(L, TOKENS)
    steps_apart = tl.cast(B, tl.int64) * L * C
    zero = tl.zeros_like(w)
    sum_w, sum_u = zero, zero
    totals = ()
    if d_neuron_ptrs is not None:
        for n in tl.static_range(len(d_neuron_ptrs)):  # noqa: B007
            totals = totals + (zero,)
    adjoint = ()  # P and Q
    for t in tl.static_range(T):  # noqa: B007
        adjoint = adjoint + ((zero, zero),)
    PARTS: tl.constexpr = TOKENS // HELD
    for i in range(tiles * PARTS):
        part = tiles * PARTS - 1 - i
        tile = part // PARTS
        t0 = _opaque_first_token(part, L, HELD)
        left = L - t0
        ks = _load_tile(k_ptr + sequence * k_b + cols, k_t, k_l, t0, left, mask, -float("inf"), T, HELD)
        vs = _load_tile(v_ptr + sequence * v_b + cols, v_t, v_l, t0, left, mask, 0.0, T, HELD)
        states = ()
        for t in tl.static_range(T):
            states = states + (load_state(keep_ptr, ((t * B + sequence) * tiles + tile) * C + cols, plane, mask),)
        for earlier in range(tile * PARTS, part):
            t1 = _opaque_first_token(earlier, L, HELD)
            ks_ = _load_tile(k_ptr + sequence * k_b + cols, k_t, k_l, t1, L - t1, mask, -float("inf"), T, HELD)
            vs_ = _load_tile(v_ptr + sequence * v_b + cols, v_t, v_l, t1, L - t1, mask, 0.0, T, HELD)
            for j in tl.static_range(HELD):
                after = ()
                for t in tl.static_range(T):
                    state, _ = _include_token(ks_[j * T + t].to(STATE), vs_[j * T + t].to(STATE), states[t], w)
                    after = after + (state,)
                states = after
        past = ()
        for j in tl.static_range(HELD):
            after = ()
            for t in tl.static_range(T):
                state, q = _include_token(ks[j * T + t].to(STATE), vs[j * T + t].to(STATE), states[t], w)
                after = after + (state,)
                past = past + ((states[t][0], states[t][1], q),)
            states = after
        entered = ()
        for t in tl.static_range(T):
            P, Q = adjoint[t]
            a, b, _, _ = states[t]
            o, rest = rounded_exponent(states[t], w)
            rest = tl.where(part % PARTS == PARTS - 1, tl.where(b != 0.0, rest, 0.0), 1.0)
            P *= rest
            Q *= rest
            if g_ybar_ptr is not None:
                final = (i == 0) & (b != 0.0)
                b = tl.where(final, b, 1.0)
                at = (t * B + sequence) * C + cols
                g_ybar = tl.load(g_ybar_ptr + at, mask=mask & (i == 0), other=0.0)
                g_lse = tl.load(g_lse_ptr + at, mask=mask & (i == 0), other=0.0)
                P = tl.where(final, g_ybar / b, P)
                Q = tl.where(final, (g_lse - g_ybar * (a / b)) / b, Q)
            entered = entered + ((P, Q),)
        adjoint = entered
        for j in tl.static_range(HELD - 1, -1, -1):
            m = mask & (j < left)
            at = (sequence * L + t0 + j) * C + cols
            if m_ptr is not None:
                x = tl.load(m_ptr + sequence * m_b + (t0 + j) * m_l + cols, mask=m, other=0.0).to(STATE)
            else:
                x = zero + start
            if g_m_ptr is not None:
                carry = tl.load(g_m_ptr + at, mask=m, other=0.0)
            else:
                carry = zero
            steps = ()
            held = ()  # the membrane before every step, or the tape of every step
            for t in tl.static_range(T):  # recompute the neuron
                a, b, q = past[j * T + t]
                y, seen, own = _weighted_mean(a, b, q, vs[j * T + t].to(STATE), u2)
                p = zero
                current = y
                if r_ptr is not None:
                    r = tl.load(r_ptr + sequence * r_b + t * tl.cast(r_t, tl.int64) + (t0 + j) * r_l + cols, mask=m, other=0.0)
                    p = _sigmoid(r.to(STATE))
                    current = p * y
                tape, membrane = record(current, (x,), constants)
                held = held + ((x,) if F.HOLDS_STATES else tape,)
                x = as_tile(membrane[0], current)
                steps = steps + ((current, seen, own, p),)
            held = held + ((x,),)
            before = ()
            for t in tl.static_range(T - 1, -1, -1):
                current, seen, own, p = steps[t]
                a, b, q = past[j * T + t]
                v = vs[j * T + t].to(STATE)
                y = tl.where(j < left, seen * a + own * v, 0.0)  # y may be infinite past the last token
                ds = zero  # gradient of the spike
                if g_ptr is not None:
                    g = tl.load(
                        g_ptr + sequence * g_b + t * tl.cast(g_t, tl.int64) + (t0 + j) * g_l + cols, mask=m, other=0.0
                    ).to(STATE)
                    ds += g * (1.0 / T) if F.RATE else g
                tape = held[t + 1] if F.USES_TAPE else held[t]
                dy, d_membrane, along = pullback(tape, current, held[t], constants, ds, (carry,), a_)
                carry = as_tile(d_membrane[0], ds)
                if d_neuron_ptrs is not None:
                    added = ()
                    for n in tl.static_range(len(d_neuron_ptrs)):
                        added = added + (totals[n] + tl.where(m, along[n], 0.0),)
                    totals = added
                if r_ptr is not None:
                    dy *= p
                    tl.store(dr_ptr + t * steps_apart + at, (dy * y * (1.0 - p)).to(dr_ptr.dtype.element_ty), mask=m)
                A, E = pair_weights(q - w)
                P, Q = adjoint[t]
                seen *= dy
                own *= dy
                dk = own * (v - y)
                sum_u += dk
                tl.store(dv_ptr + t * steps_apart + at, (own + E * P).to(dv_ptr.dtype.element_ty), mask=m)
                tl.store(dk_ptr + t * steps_apart + at, (dk + E * (P * v + Q)).to(dk_ptr.dtype.element_ty), mask=m)
                sum_w += tl.where(j < left, A * (P * a + Q * b), 0.0)
                before = ((A * P + seen, A * Q - seen * y),) + before
            adjoint = before
            if dm_ptr is not None:
                tl.store(dm_ptr + at, carry.to(dm_ptr.dtype.element_ty), mask=m)
    if d_ybar_ptr is not None:
        for t in tl.static_range(T):
            P, Q = adjoint[t]
            a, b, _, _ = load_state(keep_ptr, (t * B + sequence) * tiles * C + cols, plane, mask)
            tl.store(d_ybar_ptr + (t * B + sequence) * C + cols, tl.where(b != 0.0, P, 0.0), mask=mask)
            tl.store(d_lse_ptr + (t * B + sequence) * C + cols, tl.where(b != 0.0, P * a + Q, 0.0), mask=mask)
    at = sequence * C + cols
    tl.store(dw_ptr + at, sum_w, mask=mask)
    tl.store(du_ptr + at, sum_u, mask=mask)
    if d_neuron_ptrs is not None:
        for n in tl.static_range(len(d_neuron_ptrs)):
            tl.store(d_neuron_ptrs[n] + at, totals[n], mask=mask)


# --- launchers: the same signatures as in cpu/spiking_wkv.py ----------------------------------------------------------------


def _with_strides(t, axes=3):
    """Return (tensor, strides of all its axes except the channels), with contiguous channels."""
    if t is None:
        return None, *[0] * axes
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        t = t.contiguous()
    return t, *t.stride()[:-1]


def _launch(kernel, k, flags, tuning, *args):
    (_, B, _, C), threads = k.shape, tuning.spiking_threads
    launch(
        kernel, B * cdiv(C, threads), k.device, *args, F=flags, STATE=STATES[state_dtype(k.dtype)],
        num_warps=warps_of(threads), enable_fp_fusion=False,
    )  # fmt: skip


def _flags(tuning, variant, parameters, T, rate, decay_is_log_of_rate, **flags):
    f, tokens = neuron.flags_of(variant, parameters, T), spiking_tile(T, "triton", tuning)
    rules = f.KINDS, f.RECIPROCAL, f.START, f.SLOTS
    return Flags(tuning.spiking_threads, T, tokens, rate, decay_is_log_of_rate, *rules, **flags)


def _steps_as_batch(*tensors):
    """Reshape (T, B, ...) to (T B, ...)."""
    return [None if t is None else t.flatten(0, 1) for t in tensors]


def _run_wkv_kernels(k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, y, ybar_out, lse_out, checkpoint, tuning):
    """Compute y and the states with the kernels of wkv. Their checkpoint needs fewer rows; it is a slice of ``checkpoint``."""
    T, B, L, _ = k.shape
    if checkpoint is not None:
        checkpoint = checkpoint[None, :, : wkv_rows(T * B, L, None, tuning.wkv_checkpoint_tokens)]
    k, v, r, ybar, lse, y, ybar_out, lse_out = _steps_as_batch(k, v, r, ybar, lse, y, ybar_out, lse_out)
    wkv.wkv_forward(
        k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, None, 0, False, "auto", y, ybar_out, lse_out, checkpoint, tuning
    )
    return checkpoint


def spiking_wkv_forward(
    k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, membrane, parameters, variant, rate, out, ybar_out, lse_out,
    membrane_out, checkpoint, tuning,
):  # fmt: skip
    """Fill out, and the final states and the checkpoint if given. k must not be empty."""
    T, B, L, C = k.shape
    channels = B * C
    if channels < tuning.spiking_min_channels_fused:
        y = torch.empty(k.shape, dtype=state_dtype(k.dtype), device=k.device)
        _run_wkv_kernels(k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, y, ybar_out, lse_out, checkpoint, tuning)
        spikes = torch.empty_like(y, dtype=out.dtype) if rate else out
        neuron.neuron_forward(variant, y, (membrane,), parameters, spikes, (membrane_out,), (None,), (None,), tuning)
        if rate:
            out.copy_(spikes.sum(0, dtype=y.dtype).div_(T))
        return
    ybar, lse = (None if s is None else s.contiguous() for s in (ybar, lse))
    tensors, numbers = neuron.values_of(variant, parameters, k)
    _launch(
        bind(spiking_wkv_forward_kernel, "spiking_wkv_forward_kernel", variant.neuron, variant.flags), k,
        _flags(tuning, variant, parameters, T, rate, decay_is_log_of_rate), tuning,
        (_with_strides(k), _with_strides(v), _with_strides(r), _with_strides(membrane, 2)),
        (decay.contiguous(), bonus.contiguous(), tensors), (ybar, lse), (out, ybar_out, lse_out, membrane_out, checkpoint),
        B, L, C, 0 if checkpoint is None else checkpoint.stride(0), *numbers,
    )  # fmt: skip


def spiking_wkv_backward(
    g, g_ybar, g_lse, g_membrane, k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, membrane, parameters,
    checkpoint, variant, rate, with_parameters, dk, dv, dr, d_decay, d_bonus, d_ybar, d_lse, d_membrane, tuning,
):  # fmt: skip
    """Fill the gradients that are given. Return partial sums of d 1/tau and d v_threshold, or None. k must not be empty."""
    T, B, L, C = k.shape
    state, channels = state_dtype(k.dtype), B * C
    upstream = g_ybar, g_lse, g_membrane
    g_ybar, g_lse, g_membrane = (None if t is None else t.to(state).contiguous() for t in upstream)
    if channels < tuning.spiking_min_channels_fused:
        y = torch.empty(k.shape, dtype=state, device=k.device)
        # Recompute the current of the forward pass, bit for bit.
        checkpoint = _run_wkv_kernels(k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, y, None, None, checkpoint, tuning)
        if g is not None:
            g = (g.to(state) / T if rate else g).expand(k.shape)
        dy = torch.empty_like(y)
        sums = neuron.neuron_backward(
            variant, g, (g_membrane,), (None,), y, (membrane,), parameters, (y.new_empty(0),), dy, (d_membrane,),
            with_parameters, tuning,
        )  # fmt: skip
        del y
        dy, g_ybar, g_lse, k, v, r, ybar, lse, dk, dv, dr, d_ybar, d_lse = _steps_as_batch(
            dy, g_ybar, g_lse, k, v, r, ybar, lse, dk, dv, dr, d_ybar, d_lse
        )
        wkv.wkv_backward(
            dy, g_ybar, g_lse, k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, checkpoint, None, 0, False, "auto",
            dk, dv, dr, d_decay, d_bonus, d_ybar, d_lse, tuning,
        )  # fmt: skip
        return sums
    plan = trace(variant.neuron, variant.flags).plan(with_parameters)
    flags = _flags(
        tuning, variant, parameters, T, rate, decay_is_log_of_rate,
        HELD=min(spiking_tile(T, "triton", tuning), max(1, tuning.spiking_held_pairs // T)),
        HOLDS_STATES=plan.uses_states, USES_TAPE=plan.uses_states and plan.uses_tape,
    )  # fmt: skip
    # Separate tensors, so that each is aligned.
    dw, du, *sums = (k.new_empty(B, C, dtype=state) for _ in range(2 + len(parameters) * with_parameters))
    g = None if g is None else g.to(k.dtype).expand(k.shape)
    if g_ybar is not None or g_lse is not None:
        g_ybar, g_lse = (k.new_zeros(T, B, C, dtype=state) if s is None else s for s in (g_ybar, g_lse))
    decay, (tensors, numbers) = decay.contiguous(), neuron.values_of(variant, parameters, k)
    kernel = bind(
        spiking_wkv_backward_kernel, "spiking_wkv_backward_kernel", variant.neuron, variant.flags, variant.surrogate,
        with_parameters,
    )  # fmt: skip
    _launch(
        kernel, k, flags, tuning, (_with_strides(g), (g_ybar, g_lse, g_membrane)),
        (_with_strides(k), _with_strides(v), _with_strides(r), _with_strides(membrane, 2), checkpoint),
        (decay, bonus.contiguous(), tensors), (dk, dv, dr, d_ybar, d_lse, d_membrane), (dw, du, tuple(sums) or None),
        B, L, C, checkpoint.stride(0), *numbers, variant.alpha,
    )  # fmt: skip
    wkv.parameter_sums(dw, du, decay, decay_is_log_of_rate, d_decay, d_bonus, tuning)
    return sums or None
