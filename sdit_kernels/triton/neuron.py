"""Any neuron in Triton. A program holds a tile of neurons (rows x columns, columns contiguous) in registers over all steps.

neuron/printer.py prints the functions ``step``, ``record``, ``pullback`` and ``tangent`` of a neuron. The kernels here and in
rate.py and spiking_wkv.py call them by these names; ``bind`` makes a kernel for one neuron. So a kernel has the same code as if
it were written for this neuron.

The kernel issues all loads of a segment of up to K steps before it uses the first. The backward pass needs the tape of every
step, or the states before it. It recomputes them in registers, from the given states, or for T > LIF_CHECKPOINT_STEPS from the
states that the forward pass stored. Arithmetic follows the definition operation by operation, compiled without fused
multiply-adds. Parameter gradients are summed per program and then over programs, never by atomics.

With a norm (``Variant.norm``), a program holds whole rows; layout.norm_columns says how many columns a row may have.

Real numbers arrive as "fp64" and are rounded once to the state type. Triton does not specialise on sizes that change from call
to call.
"""

import functools
import itertools
import types
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dtypes import state_dtype
from ..layout import LIF_CHECKPOINT_STEPS, layout_of, row_view, sum_over_steps
from ..neuron import trace
from ..neuron.printer import ENTRIES, TRITON, load, text
from ..neuron.trace import is_condition
from ..surrogate import SURROGATES
from .surrogate import surrogate_derivative
from .tiles import (
    SINGLE,
    STEP,
    Grid,
    all_registers,
    as_bytes,
    as_tensors,
    contiguous,
    divide,
    gradient_view,
    is_per_channel,
    kind_of,
    load_parameter,
    maybe_row_view,
    maybe_step_view,
    norm_of_rows,
    power_of_2,
    slope_of_norm,
    store_sums,
    tile_of_program,
)

NORMS = {"": 0, "rms": 1, "mean": 2}
NUMBERS = 4  # real numbers that a kernel takes; a neuron's further numbers travel as tensors
step = record = pullback = None  # the printed functions of a neuron; see bind


# --- operations of printed functions -----------------------------------------------------------------------------------------


@triton.jit
def maximum(a, b):
    """The greater of a and b, NaN if one is NaN."""
    a, b = as_tensors(a, b)
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    """The lesser of a and b, NaN if one is NaN."""
    a, b = as_tensors(a, b)
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def level(z, lo, hi):
    """round(clip(z, lo, hi)), ties to even, never a negative zero: adding 1.5 * 2^23 leaves no bits behind the point."""
    clipped = tl.where(z < lo, lo, tl.where(z > hi, hi, z))
    big: tl.constexpr = 6755399441055744.0 if z.dtype == tl.float64 else 12582912.0
    return (clipped + big) - big


@triton.jit
def sign(z):
    return tl.where(z > 0.0, 1.0, tl.where(z < 0.0, -1.0, z))


@triton.jit
def share(a, b, g):
    """The part of the gradient g of max(a, b) that reaches a."""
    return tl.where(a < b, 0.0, tl.where(a == b, g * 0.5, g))


# --- kernels for one neuron --------------------------------------------------------------------------------------------------

_ENVIRONMENT = {
    "__name__": __name__, "triton": triton, "tl": tl, "divide": divide, "surrogate_derivative": surrogate_derivative,
    "maximum": maximum, "minimum": minimum, "level": level, "sign": sign, "share": share,
}  # fmt: skip
# Triton must not compile again for other values of these arguments.
_SIZES = ("T", "R", "group", "B", "L", "plane")


@functools.cache
def bind(kernel, name, neuron, flags, surrogate="atan", with_parameters=False):
    """Return a ``@triton.jit`` function for one neuron. ``kernel`` is a Python function that calls printed functions.

    Launchers give the surrogate and ``with_parameters`` to backward kernels only, because a forward kernel does not use them.

    The printed functions are globals of the result. Triton's cache keys contain the code of all functions that a kernel calls,
    so the code of an edited neuron is never mistaken for the code of another.
    """
    entries = [entry for entry in ENTRIES if entry in kernel.__code__.co_names]
    environment = _ENVIRONMENT | {"KIND": tl.constexpr(SURROGATES[surrogate].id)}
    printed = load(text(trace(neuron, flags), TRITON, with_parameters, entries), neuron.name, environment)
    bound = types.FunctionType(kernel.__code__, kernel.__globals__ | printed, name)
    bound.__annotations__, bound.__module__, bound.__qualname__ = kernel.__annotations__, kernel.__module__, name
    if triton.knobs.runtime.interpret:  # the interpreter looks the function up by the name in its source
        bound.__name__ = kernel.__name__
    return triton.jit(bound, do_not_specialize=_SIZES)


class Flags(NamedTuple):
    """Compile-time constants of the kernels of neurons."""

    KINDS: tuple[int, ...]  # for each parameter: SINGLE, CHANNEL, TOKEN or STEP, see tiles.py
    RECIPROCAL: tuple[bool, ...]  # for each parameter: a tensor holds its reciprocal
    PER_CHANNEL: bool  # one of them has several values, so columns are channels and rows are tokens
    START: tuple[int, ...]  # for each state: which parameter it starts from; -1: from 0
    SLOTS: tuple[int, ...]  # for each parameter: its place among the real numbers; -1: it is a tensor
    K: int  # steps held in registers; rate: T if the loop over steps is unrolled, else 0
    LONG: bool = False  # T > K
    HOLDS_STATES: bool = False  # the backward pass holds the states before every step, not the tape
    USES_TAPE: bool = False  # and the pullback needs the tape too: the states after the step
    COUNTS: bool = False  # rate returns the number of spikes, not their mean
    NORM: int = 0  # a parameter is a factor of the norm of a row: 1: rms, 2: mean
    NORMED: int = 0  # which parameter
    THROUGH_NORM: bool = False  # the gradient flows through the norm to x
    SUM_KINDS: tuple[int, ...] = ()  # KINDS, except that the gradient of a factor of a norm is stored per step


@triton.jit
def load_parameters(pointers, numbers, cols, mask, F: tl.constexpr, STATE: tl.constexpr):
    """Load the parameters and numbers of a neuron in the state type."""
    values = ()
    for i in tl.static_range(len(F.KINDS)):  # not of pointers: Triton 3.6 cannot count a tuple that holds None
        if F.KINDS[i] >= 2:  # see load_tokens
            p = tl.zeros([], STATE)
        else:
            p = load_parameter(pointers[i], numbers[F.SLOTS[i]] if F.SLOTS[i] >= 0 else 0.0, cols, mask, F.KINDS[i] == 1, STATE)
            if F.RECIPROCAL[i]:
                if pointers[i] is not None:
                    p = divide(1.0, p)
        values = values + (p,)
    return values


@triton.jit
def load_tokens(values, pointers, tokens, mask, KIND: tl.constexpr, F: tl.constexpr, STATE: tl.constexpr):
    """Replace the parameters of a kind, TOKEN or STEP, by their values at the indices ``tokens``, (BR, 1)."""
    found = ()
    for i in tl.static_range(len(F.KINDS)):
        if F.KINDS[i] == KIND:
            p = tl.load(pointers[i] + tokens, mask=mask, other=1.0).to(STATE)
            found = found + (divide(1.0, p) if F.RECIPROCAL[i] else p,)
        else:
            found = found + (values[i],)
    return found


@triton.jit
def replace(values, index: tl.constexpr, value):
    found = ()
    for i in tl.static_range(len(values)):
        found = found + (value if i == index else values[i],)
    return found


@triton.jit
def load_states(states, parameters, first, rows, cols, mask, F: tl.constexpr, STATE: tl.constexpr):
    """Load the states before the first step, each from (pointer, stride of a row); without a pointer, a constant."""
    values = ()
    for i in tl.static_range(len(F.START)):
        ptr, stride = states[i]
        if ptr is None:
            v = tl.zeros(mask.shape, STATE)
            if F.START[i] >= 0:
                v += parameters[F.START[i]]
        else:
            v = tl.load(ptr + first + rows * stride + cols, mask=mask, other=0.0).to(STATE)
        values = values + (v,)
    return values


@triton.jit
def as_tile(value, like):
    """Give a value of a step, perhaps a number, the shape and type of ``like``."""
    if isinstance(value, tl.tensor):
        return tl.broadcast_to(value, like.shape).to(like.dtype)
    else:
        return tl.full(like.shape, value, like.dtype)


@triton.jit
def as_tiles(values, like):
    tiles = ()
    for i in tl.static_range(len(values)):
        tiles = tiles + (as_tile(values[i], like),)
    return tiles


@triton.jit
def as_number(spike, STATE: tl.constexpr):
    """Return the spike of a step, which is a comparison or a number, as a number."""
    if spike.dtype == tl.int1:
        return tl.where(spike, 1.0, 0.0).to(STATE)
    else:
        return spike


@triton.jit
def as_integer(levels, TYPE: tl.constexpr):
    """Convert levels to an integer type. A NaN becomes 0."""
    return tl.where(levels == levels, levels, 0.0).to(tl.int32).to(TYPE)


@triton.jit
def as_output(spike, like, STATE: tl.constexpr, TYPE: tl.constexpr):
    """Convert the spike of a step to the type of the output."""
    s = as_tile(as_number(spike, STATE), like)
    if spike.dtype == tl.int1 or TYPE.is_floating():
        return s.to(TYPE)
    else:
        return as_integer(s, TYPE)


def forward_kernel(
    inputs, outputs, parameters, T, R, C, n0: "fp64", n1: "fp64", n2: "fp64", n3: "fp64",
    F: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_t, x_r = inputs[0]
    s_ptr, s_t, s_r = outputs[0]
    finals, seqs, keeps = outputs[1], outputs[2], outputs[3]
    K: tl.constexpr = F.K
    STATE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block, row, first, cols, mask_c = tile_of_program(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask_c & (rows < R)
    p = load_parameters(parameters, (n0, n1, n2, n3), first + cols, mask_c, F, STATE)
    p = load_tokens(p, parameters, rows, rows < R, 2, F, STATE)
    states = load_states(inputs[1], p, first, rows, cols, mask, F, STATE)
    segments = tl.cdiv(T, K) if F.LONG else 1
    for i in range(segments):
        segment = tl.cast(i, tl.int64)
        t0 = segment * K
        tokens = t0 * R + rows  # indices of parameters per token and step
        for j in tl.static_range(len(states)):
            keep_ptr, keep_t, keep_r = keeps[j]
            if keep_ptr is not None:
                if segment > 0:
                    tl.store(keep_ptr + first + (segment - 1) * keep_t + rows * keep_r + cols, states[j], mask=mask)
        xs = ()
        for k in tl.static_range(K):
            m = mask & (t0 + k < T) if F.LONG else mask
            xs = xs + (tl.load(x_ptr + first + (t0 + k) * x_t + rows * x_r + cols, mask=m, other=0.0),)
        for k in tl.static_range(K):
            x = xs[k].to(STATE)
            q = load_tokens(p, parameters, tokens + k * R, (rows < R) & (t0 + k < T), 3, F, STATE)
            if F.NORM:
                q = replace(q, F.NORMED, q[F.NORMED] * norm_of_rows(x, C, F.NORM))
            spike, after = step(x, states, q)
            m = mask & (t0 + k < T) if F.LONG else mask
            s = as_output(spike, x, STATE, s_ptr.dtype.element_ty)
            tl.store(s_ptr + first + (t0 + k) * s_t + rows * s_r + cols, s, mask=m)
            after = as_tiles(after, x)
            if F.LONG:
                held = ()
                for j in tl.static_range(len(states)):
                    held = held + (tl.where(m, after[j], states[j]),)
                after = held
            states = after
            for j in tl.static_range(len(states)):
                seq_ptr, seq_t, seq_r = seqs[j]
                if seq_ptr is not None:
                    tl.store(seq_ptr + first + (t0 + k) * seq_t + rows * seq_r + cols, states[j], mask=m)
    for j in tl.static_range(len(states)):
        final_ptr, final_r = finals[j]
        if final_ptr is not None:
            tl.store(final_ptr + first + rows * final_r + cols, states[j], mask=mask)


def backward_kernel(
    inputs, upstream, gradients, parameters, T, R, C, group,
    n0: "fp64", n1: "fp64", n2: "fp64", n3: "fp64", alpha: "fp64",
    F: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_t, x_r = inputs[0]
    keeps = inputs[2]
    g_ptr, g_t, g_r, g_c = upstream[0]
    g_finals, g_seqs = upstream[1], upstream[2]
    dx_ptr, dx_t, dx_r = gradients[0]
    d_states, sums = gradients[1], gradients[2]
    K: tl.constexpr = F.K
    STATE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    S: tl.constexpr = len(F.START)
    block, row, first, cols, mask_c = tile_of_program(R, C, group, BR, BC)
    p = load_parameters(parameters, (n0, n1, n2, n3), first + cols, mask_c, F, STATE)
    a = tl.full([], alpha, STATE)
    totals = ()
    if sums is not None:
        for n in tl.static_range(len(sums)):  # noqa: B007
            totals = totals + (tl.zeros([BR, BC], STATE),)
    for i in range(1 if sums is None else group):
        rows = row + i * BR + tl.arange(0, BR)[:, None]
        mask = mask_c & (rows < R)
        of_row = load_tokens(p, parameters, rows, rows < R, 2, F, STATE)
        carry = ()  # the gradients of the states
        for n in tl.static_range(S):
            g_final_ptr, g_final_r = g_finals[n]
            if g_final_ptr is None:
                carry = carry + (tl.zeros([BR, BC], STATE),)
            else:
                carry = carry + (tl.load(g_final_ptr + first + rows * g_final_r + cols, mask=mask, other=0.0),)
        # The gradients of the parameters. Elements outside of the tensors are masked per step, or if possible at the end.
        found = ()
        if sums is not None:
            for n in tl.static_range(len(sums)):
                found = found + (totals[n] if F.LONG and F.SUM_KINDS[n] <= 1 else tl.zeros([BR, BC], STATE),)
        segments = tl.cdiv(T, K) if F.LONG else 1
        for j in range(segments):
            segment = tl.cast(segments - 1 - j, tl.int64)
            t0 = segment * K
            tokens = t0 * R + rows
            states = load_states(inputs[1], of_row, first, rows, cols, mask, F, STATE)
            if F.LONG:
                kept = ()
                for n in tl.static_range(S):
                    v = states[n]
                    keep_ptr, keep_t, keep_r = keeps[n]
                    if segment > 0:
                        v = tl.load(keep_ptr + first + (segment - 1) * keep_t + rows * keep_r + cols, mask=mask, other=0.0)
                    kept = kept + (v,)
                states = kept
            # Loads compare with this, stores compare t0 + k with T. With one comparison for both, the compiler would keep the
            # masks of all steps in registers.
            steps_left = T - t0
            xs = ()
            gs = ()
            for k in tl.static_range(K):
                m = mask & (k < steps_left) if F.LONG else mask
                xs = xs + (tl.load(x_ptr + first + (t0 + k) * x_t + rows * x_r + cols, mask=m, other=0.0),)
                if g_ptr is not None:
                    gs = gs + (tl.load(g_ptr + (t0 + k) * g_t + rows * g_r + (first + cols) * g_c, mask=m, other=0.0),)
            norms = ()
            if F.NORM:
                for k in tl.static_range(K):
                    norms = norms + (norm_of_rows(xs[k].to(STATE), C, F.NORM),)
            held = ()  # the states before every step, or the tape of every step
            for k in tl.static_range(K):
                if F.HOLDS_STATES:
                    held = held + (states,)
                if not F.HOLDS_STATES or F.USES_TAPE or k < K - 1:
                    x = xs[k].to(STATE)
                    q = load_tokens(of_row, parameters, tokens + k * R, (rows < R) & (t0 + k < T), 3, F, STATE)
                    if F.NORM:
                        q = replace(q, F.NORMED, q[F.NORMED] * norms[k])
                    tape, after = record(x, states, q)
                    states = as_tiles(after, x)
                    if not F.HOLDS_STATES:
                        held = held + (tape,)
            if F.USES_TAPE:
                held = held + (states,)
            for k in tl.static_range(K - 1, -1, -1):  # backward pass
                m = mask & (t0 + k < T) if F.LONG else mask
                upstream_k = ()
                for n in tl.static_range(S):
                    d = carry[n]
                    g_seq_ptr, g_seq_t, g_seq_r = g_seqs[n]
                    if g_seq_ptr is not None:
                        d += tl.load(g_seq_ptr + first + (t0 + k) * g_seq_t + rows * g_seq_r + cols, mask=m, other=0.0)
                    upstream_k = upstream_k + (d,)
                ds = gs[k].to(STATE) if g_ptr is not None else tl.zeros([BR, BC], STATE)  # gradient of the spike
                tape = held[k + 1] if F.USES_TAPE else held[k]
                q = load_tokens(of_row, parameters, tokens + k * R, (rows < R) & (t0 + k < T), 3, F, STATE)
                if F.NORM:
                    factor = q[F.NORMED]
                    q = replace(q, F.NORMED, factor * norms[k])
                dx, before, along = pullback(tape, xs[k].to(STATE), held[k], q, ds, upstream_k, a)
                if F.NORM and len(along) > 0:
                    d_threshold = tl.sum(tl.where(m, along[F.NORMED], 0.0), 1)[:, None]
                    along = replace(along, F.NORMED, d_threshold * norms[k])
                    if F.THROUGH_NORM:
                        slope = slope_of_norm(xs[k].to(STATE), norms[k], C, F.NORM)
                        dx = as_tile(dx, ds) + d_threshold * factor * slope
                if sums is not None:
                    added = ()
                    for n in tl.static_range(len(sums)):
                        if F.SUM_KINDS[n] == 3:
                            at = sums[n] + first // BC * T * R + tokens + k * R
                            d = along[n]
                            if not F.NORM or n != F.NORMED:
                                d = tl.sum(tl.where(m, along[n], 0.0), 1)[:, None]
                            tl.store(at, d, mask=(rows < R) & (t0 + k < T))
                            added = added + (found[n],)
                        else:
                            added = added + (found[n] + (tl.where(m, along[n], 0.0) if F.LONG else along[n]),)
                    found = added
                before = as_tiles(before, ds)
                if F.LONG:
                    left = ()
                    for n in tl.static_range(S):
                        left = left + (tl.where(t0 + k < T, before[n], upstream_k[n]),)
                    before = left
                if dx_ptr is not None:
                    dx = as_tile(dx, ds).to(dx_ptr.dtype.element_ty)
                    tl.store(dx_ptr + first + (t0 + k) * dx_t + rows * dx_r + cols, dx, mask=m)
                carry = before
        for n in tl.static_range(S):
            d_ptr, d_r = d_states[n]
            if d_ptr is not None:
                tl.store(d_ptr + first + rows * d_r + cols, carry[n].to(d_ptr.dtype.element_ty), mask=mask)
        if sums is not None:
            added = ()
            for n in tl.static_range(len(sums)):
                if F.SUM_KINDS[n] == 2:
                    at = sums[n] + first // BC * R + rows
                    tl.store(at, tl.sum(tl.where(mask, found[n], 0.0), 1)[:, None], mask=rows < R)
                if F.LONG or F.SUM_KINDS[n] >= 2:
                    added = added + (found[n],)
                else:
                    added = added + (totals[n] + tl.where(mask, found[n], 0.0),)
            totals = added
    if sums is not None:
        store_sums(sums, totals, block, C, first, cols, mask_c, F)


# --- launchers: the same signatures as in cpu/neuron.py ----------------------------------------------------------------------


@functools.cache
def _flags(neuron, kinds, K, **flags):
    kinds, names = (*kinds, *[None] * len(neuron.numbers)), neuron.parameters + neuron.numbers
    reciprocal = tuple(kind is not None and name in neuron.reciprocals for name, kind in zip(names, kinds))
    start = tuple(-1 if name is None else names.index(name) for name in neuron.start)
    found = tuple(kind or SINGLE for kind in kinds)
    flags["SUM_KINDS"] = found
    if flags.get("NORM"):
        flags["NORMED"] = at = names.index("v_threshold")
        flags["SUM_KINDS"] = *found[:at], STEP, *found[at + 1 :]
    order = list(itertools.accumulate((kind is None for kind in kinds), initial=0))
    slots = tuple(n if kind is None and n < NUMBERS else -1 for kind, n in zip(kinds, order))
    return Flags(found, reciprocal, any(kinds), start, slots, K, **flags)


def flags_of(variant, parameters, K, axes=0, **flags):
    """axes: the number of axes of the data, T included, where parameters may have a value per token."""
    return _flags(variant.neuron, tuple(None if p is None else kind_of(p, axes) for p in parameters), K, **flags)


def values_of(variant, parameters, like):
    """Return (tensor or None for each parameter and number, NUMBERS real numbers), as kernels take them.

    A real number is an argument of its own, because in a tuple it would become float32. Numbers beyond NUMBERS become tensors.
    """
    dtype = state_dtype(like.dtype)
    tensors = [*map(contiguous, parameters), *[None] * len(variant.neuron.numbers)]
    numbers = []
    for i, value in enumerate(variant.values):
        if tensors[i] is None:
            if len(numbers) < NUMBERS:
                numbers.append(value)
            else:
                tensors[i] = torch.full((1,), value, dtype=dtype, device=like.device)
    return tuple(tensors), (*numbers, *[0.0] * (NUMBERS - len(numbers)))


def _views(view, layout, tensors):
    return tuple(view(layout, t) for t in tensors)


def neuron_forward(variant, x, states, parameters, s, finals, seqs, checkpoints, tuning):
    """Fill s, and per state the last one, its sequence and its checkpoint if given. x must not be empty."""
    T, per_channel = x.shape[0], variant.norm != "" or any(map(is_per_channel, parameters))
    layout = layout_of(x, s, per_channel)
    flags = flags_of(
        variant, parameters, min(T, LIF_CHECKPOINT_STEPS), x.dim(), LONG=T > LIF_CHECKPOINT_STEPS, NORM=NORMS[variant.norm]
    )
    tensors, numbers = values_of(variant, parameters, x)
    outputs = (
        row_view(layout, as_bytes(s)), _views(maybe_step_view, layout, finals), _views(maybe_row_view, layout, seqs),
        _views(maybe_row_view, layout, checkpoints),
    )  # fmt: skip
    # The divisions of integer levels need many registers in a loop over segments, and so do two states.
    divides = flags.LONG and not is_condition(trace(variant.neuron, variant.flags).spike)
    options = all_registers() if divides or (len(states) > 1 and T >= LIF_CHECKPOINT_STEPS) else {}
    Grid(tuning, layout, x.dtype, False, per_channel, whole_rows=variant.norm != "").launch(
        bind(forward_kernel, f"{variant.neuron.name}_forward_kernel", variant.neuron, variant.flags), x.device,
        (row_view(layout, x), _views(maybe_step_view, layout, states)), outputs, tensors, T, layout.R, layout.C, *numbers,
        F=flags, **options,
    )  # fmt: skip


def _backward_by_segments(variant, g, g_finals, g_seqs, x, states, parameters, checkpoints, dx, d_states, tuning):
    """Run neuron_backward on segments of LIF_CHECKPOINT_STEPS steps, from the last to the first.

    With a parameter per step, the loop over segments in the kernel would spill registers.
    """
    steps = [kind_of(p, x.dim()) == STEP for p in parameters]
    found = []
    for t0 in reversed(range(0, x.shape[0], LIF_CHECKPOINT_STEPS)):
        part = slice(t0, t0 + LIF_CHECKPOINT_STEPS)
        before = [c[t0 // LIF_CHECKPOINT_STEPS - 1] for c in checkpoints] if t0 else states
        into = [torch.empty_like(v) for v in before] if t0 else d_states
        of_part = [p[part] if step else p for p, step in zip(parameters, steps)]
        upstream = None if g is None else g[part], g_finals, [None if d is None else d[part] for d in g_seqs]
        found.insert(0, neuron_backward(
            variant, *upstream, x[part], before, of_part, [None] * len(states), None if dx is None else dx[part], into, True,
            tuning,
        ))  # fmt: skip
        g_finals = into
    return [torch.cat(parts, 1) if step else sum(parts) for step, parts in zip(steps, zip(*found))]


def neuron_backward(
    variant, g, g_finals, g_seqs, x, states, parameters, checkpoints, dx, d_states, with_parameters, tuning
):  # fmt: skip
    """Fill dx, if given, and the gradients of the states if given.

    If ``with_parameters``, return a partial sum per parameter with a gradient.
    """
    T, state, normed = x.shape[0], state_dtype(x.dtype), variant.norm != ""
    per_channel = normed or any(map(is_per_channel, parameters))
    if with_parameters and T > LIF_CHECKPOINT_STEPS and STEP in (kind_of(p, x.dim()) for p in parameters):
        return _backward_by_segments(
            variant, g, g_finals, g_seqs, x, states, parameters, checkpoints, dx, d_states, tuning
        )  # fmt: skip
    layout, differentiated = layout_of(x, x if dx is None else dx, per_channel), with_parameters or variant.differentiates_norm
    plan = trace(variant.neuron, variant.flags).plan(differentiated)
    K = min(T, LIF_CHECKPOINT_STEPS)
    flags = flags_of(
        variant, parameters, K, x.dim(), LONG=T > LIF_CHECKPOINT_STEPS, HOLDS_STATES=plan.uses_states,
        USES_TAPE=plan.uses_tape and plan.uses_states, NORM=NORMS[variant.norm], THROUGH_NORM=variant.differentiates_norm,
    )  # fmt: skip
    tensors, numbers = values_of(variant, parameters, x)
    g_finals, g_seqs = ([None if t is None else t.to(state) for t in given] for given in (g_finals, g_seqs))
    held = K * len(states)
    learnt = len(variant.neuron.learnt)
    if differentiated:  # many parameters also need registers: for their values, and two sums each
        held = 2 * held + 4 * max(0, learnt - 2)
    centred = variant.neuron.input_gradient is not None  # behind a BatchNorm: two more vectors and the difference from the mean
    if centred and flags.LONG:
        held *= 2
    if normed:  # layout.norm_columns relies on this
        held = power_of_2(K) * state.itemsize
    needs_registers = centred or (with_parameters and flags.LONG)
    grid = Grid(tuning, layout, x.dtype, with_parameters, per_channel, held=held, whole_rows=normed)
    sums = grid.partial_sums(layout, flags.SUM_KINDS[:learnt], x, T, flags.PER_CHANNEL) if with_parameters else None
    grid.launch(
        bind(
            backward_kernel, f"{variant.neuron.name}_backward_kernel", variant.neuron, variant.flags, variant.surrogate,
            differentiated,
        ),
        x.device,
        (row_view(layout, x), _views(maybe_step_view, layout, states), _views(maybe_row_view, layout, checkpoints)),
        (gradient_view(layout, g, x.dtype), _views(maybe_step_view, layout, g_finals), _views(maybe_row_view, layout, g_seqs)),
        (maybe_row_view(layout, dx), _views(maybe_step_view, layout, d_states), sums), tensors, T, layout.R, layout.C,
        grid.group, *numbers, variant.alpha, F=flags, **(all_registers() if needs_registers else {}),
    )  # fmt: skip
    if normed and with_parameters:
        at = flags.NORMED
        return *sums[:at], sum_over_steps(sums[at], parameters[at], T), *sums[at + 1 :]
    return sums
