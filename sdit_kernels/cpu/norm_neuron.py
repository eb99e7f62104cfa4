"""BatchNorm in training and a neuron on the CPU by blocks of channels, with one launch a pass.

A task takes a block of channels, small enough that its data of all steps and samples stay in a cache, and runs the kernels of
norm.py and neuron.py on it, one after the other. The sums have the order that these kernels give them, whatever the block.

The data are T x B x C x L contiguous values. A row of the neuron's kernel is a channel of a sample, or, with LONG, all channels
of the block of a sample.
"""

import functools

import torch

from ..dtypes import state_dtype
from ..surrogate import SURROGATES
from . import neuron, norm
from .compiler import inline
from .intrinsics import CODES, SIZES, replaced, state_code
from .kernel import Kernel, share, thread_count
from .launch import CHANNELS, GROUPS, ROWS, address, constants_of, placed_gradient

# For an L2 cache of 1 to 2 MiB; other sizes were not timed.
_FORWARD_BYTES, _BACKWARD_BYTES = 1 << 18, 1 << 17  # of x in the state type, per block; more only if a channel has more
_MOST_BYTES = 3 << 18  # of a channel; with more, the block is not in a cache when it is read again
_LEAST_RUN = 256  # contiguous bytes of a block


def block_of(T, layout, dtype, forward):
    """Return the number of channels of a block, a divisor of all channels, or None if blocks would have no use."""
    B, C, L = layout.B, layout.C, layout.S
    bytes_ = T * B * L * state_dtype(dtype).itemsize
    if bytes_ > _MOST_BYTES:
        return None
    threads = thread_count((1 if forward else 2) * T * B * C * L)
    fitting = max(1, min((_FORWARD_BYTES if forward else _BACKWARD_BYTES) // bytes_, -(-C // threads)))
    block = next(c for c in range(fitting, 0, -1) if C % c == 0)
    return None if block * L * dtype.itemsize < _LEAST_RUN and block < C else block


def _places_of(code, LONG):
    """Return the indices of the shift and the mean among the places of the parameters. The factor is the first."""
    each = 1 if LONG else 4
    return each, each * code[0].parameters.index("norm_mean")


def _parameter_places(variant, LONG, block):
    """Return the places of the parameters as the kernels of neurons take them. The addresses are 0 for now."""
    names, count = variant.neuron.parameters, len(variant.values)
    if LONG:
        return (0,) * count
    rows = {*range(2), names.index("norm_mean")}
    return tuple(n for i in range(count) for n in (0, 0, block if i in rows else 0, 0))


@inline
def at(address, offset):
    """Return a place in an array that may not be given, 0."""
    return address + offset if address != 0 else 0


@functools.cache
def _forward_kernel(X, O, V, M, R, W, G, code, LONG):
    """M, R, W, G: storage codes of running mean, running variance, weight and bias."""
    S = state_code(X)
    xb, ob, vb, sb, mb, rb, wb, gb = (SIZES[c] for c in (X, O, V, S, M, R, W, G))
    SHIFT, MEAN = _places_of(code, LONG)
    rows, combine = norm.rows_kernel(X).body, norm.combine_kernel(S, M, R).body
    vectors = norm.vectors_kernel(S, W, G, False).body
    run = neuron.forward_kernel(X, O, V, code, CHANNELS if LONG else ROWS).body

    def norm_neuron_forward(part, shape, blocks, x, found, running, affine, options, scratch, v, out, numbers, places):
        T, B, C, L = shape
        block, size, groups = blocks
        mean, squares, rstd = found
        running_mean, running_var = running
        weight, bias = affine
        eps, momentum, scale = options
        table, made = scratch
        s, final, seq, keep = out
        inner, step = L if LONG else 1, B * C * L
        row, wide = C * L if LONG else L, block * inner * sb
        for task in share(C // block, part):
            c, whole = task * block, (0, 1)
            means, to = table + task * groups * block * 16, made + task * 3 * wide
            sums = means + groups * block * 8
            rows(whole, 1, T * B, B, block, L, size, groups, 1, (x + c * L * xb, step, C * L, L), means, sums)
            combine(
                whole, 1, T * B, block, L, size, groups, eps, means, sums, mean + c * sb, squares + c * sb, rstd + c * sb,
                (at(running_mean, c * mb), at(running_var, c * rb)), momentum,
            )  # fmt: skip
            vectors(
                whole, block, inner, scale, rstd + c * sb, at(weight, c * wb), at(bias, c * gb),
                mean + c * sb, to,
            )  # fmt: skip
            p = replaced(replaced(replaced(places, 0, to), SHIFT, to + wide), MEAN, to + 2 * wide)
            for b in range(1 if LONG else B):
                i = c * L + b * C * L
                inputs = x + i * xb, step, row, at(v, i * vb), row
                outputs = (
                    s + i * ob, step, row, at(final, i * sb), row, at(seq, i * sb), step, row,
                    at(keep, i * sb), step, row,
                )  # fmt: skip
                if LONG:
                    run(whole, T, B, block * L, inputs, outputs, numbers, p)
                else:
                    run(whole, T, block, L, inputs, outputs, numbers, p)

    name = f"norm_neuron_forward_{X}{O}{V}{M}{R}{W}{G}{LONG:d}_{neuron.forward_kernel(X, O, V, code, CHANNELS).name}"
    return Kernel(norm_neuron_forward, name)


@functools.cache
def _backward_kernel(X, D, V, W, G, DG, code, kind, LONG):
    """D: the storage code of the neuron's gradient. W, G, DG: of weight, bias and the gradient of bias."""
    S = state_code(X)
    xb, db, vb, sb, wb, gb, hb = (SIZES[c] for c in (X, D, V, S, W, G, DG))
    (SHIFT, MEAN), LOCAL, COLUMNS = _places_of(code, LONG), D != X, neuron.BACKWARD_COLUMNS
    vectors, gradients = norm.vectors_kernel(S, W, G, False).body, norm.gradients_kernel(S, W, DG, LONG).body
    subtract = norm.backward_kernel(X, True, False).body
    run = neuron.backward_kernel(X, D, V, code, kind, CHANNELS if LONG else ROWS, True, True, False).body

    def norm_neuron_backward(part, shape, blocks, x, upstream, found, affine, scale, scratch, v, keep, out, numbers, places):
        T, B, C, L = shape
        block, group, groups = blocks
        g, g_t, g_b, g_l, g_final, g_seq = upstream
        mean, rstd = found
        weight, bias = affine
        made, sums, offset, slope, local = scratch
        dx, dv, d_weight, d_bias = out
        inner, step = L if LONG else 1, B * C * L
        row, wide = C * L if LONG else L, block * inner * sb
        chunks = 1 if LONG else (L + COLUMNS - 1) // COLUMNS
        parts = groups if LONG else B * chunks  # partial sums of a channel, or of a value of it
        for task in share(C // block, part):
            c, whole = task * block, (0, 1)
            to, sums_at = made + task * 3 * wide, sums + task * 2 * parts * wide
            vectors(
                whole, block, inner, scale, rstd + c * sb, at(weight, c * wb), at(bias, c * gb),
                mean + c * sb, to,
            )  # fmt: skip
            p = replaced(replaced(replaced(places, 0, to), SHIFT, to + wide), MEAN, to + 2 * wide)
            if LOCAL:  # a place of the thread for the gradient in the state type
                d, d_t, d_b = local + part[0] * T * B * block * L * db, B * block * L, block * L
            else:
                d, d_t, d_b = dx + c * L * db, step, C * L
            d_row = d_b if LONG else L
            for b in range(1 if LONG else B):
                i, here = c * L + b * C * L, sums_at + b * chunks * wide
                inputs = x + i * xb, step, row, at(v, i * vb), row, at(keep, i * sb), step, row
                upstream_ = (
                    g + (b * g_b + c * L * g_l) * xb, g_t, g_b if LONG else L * g_l, g_l,
                    at(g_final, i * sb), row, at(g_seq, i * sb), step, row,
                )  # fmt: skip
                into = d + b * d_b * db, d_t, d_row, at(dv, i * vb), row, here, here + parts * wide
                if LONG:
                    run(whole, T, B, block * L, group, groups, inputs, upstream_, into, numbers, p)
                else:
                    run(whole, T, block, L, block, 1, inputs, upstream_, into, numbers, p)
            gradients(
                whole, 1, 1, block, inner, parts, float(T * B * L), scale, (sums_at, sums_at + parts * wide),
                at(weight, c * wb), rstd + c * sb, at(d_weight, c * wb),
                at(d_bias, c * hb), offset + c * sb, slope + c * sb,
            )  # fmt: skip
            for b in range(B):
                i = c * L + b * C * L
                subtract(
                    whole, T, 1, block, L, (x + i * xb, step, L), (d + b * d_b * db, d_t, L), (dx + i * xb, step, L),
                    mean + c * sb, offset + c * sb, slope + c * sb,
                )  # fmt: skip

    name = neuron.backward_kernel(X, D, V, code, kind, CHANNELS, True, True, False).name
    return Kernel(norm_neuron_backward, f"norm_neuron_backward_{W}{G}{DG}{LONG:d}_{name}")


# --- launchers --------------------------------------------------------------------------------------------------------------


def _codes(dtype, *tensors):
    return (CODES[dtype if t is None else t.dtype] for t in tensors)


def norm_neuron_forward(variant, block, long_rows, x, v, affine, running, eps, momentum, scale, found, outputs):
    """Fill found, (mean, sum of squared differences, rstd), and outputs, (s, final v or None, its sequence, its checkpoint).

    variant: the neuron behind the norm. block: from ``block_of``. x: (T, B, C, L). affine, running: the norm's vectors or None.
    """
    T, B, C, L = x.shape
    dtype = state_dtype(x.dtype)
    code, numbers = constants_of(variant)
    size = -(-T * B // GROUPS)
    groups = -(-T * B // size)
    v = v if v is None else v.contiguous()
    made = torch.empty((3, C * (L if long_rows else 1)), dtype=dtype, device="cpu")
    table = torch.empty((2, groups, C), dtype=torch.float64, device="cpu")
    affine = [None if t is None else t.contiguous() for t in affine]
    codes = _codes(dtype, outputs[0], v, *running, *affine)
    kernel = _forward_kernel(CODES[x.dtype], *codes, code, long_rows)
    kernel(
        x.numel(), (T, B, C, L), (block, size, groups), x.data_ptr(), tuple(map(address, found)), tuple(map(address, running)),
        tuple(map(address, affine)), (float(eps), float(momentum), float(scale)), (table.data_ptr(), made.data_ptr()),
        address(v), tuple(map(address, outputs)), numbers, _parameter_places(variant, long_rows, block),
    )  # fmt: skip


def norm_neuron_backward(
    variant, block, long_rows, g, g_final, g_seq, x, v, affine, mean, rstd, scale, checkpoint, dx, dv, d_affine
):  # fmt: skip
    """Fill dx, and dv and the gradients of weight and bias that are given. The arguments are as in ``norm_neuron_forward``."""
    T, B, C, L = x.shape
    dtype = state_dtype(x.dtype)
    code, numbers = constants_of(variant)
    inner = L if long_rows else 1
    group = -(-B // GROUPS)
    groups = -(-B // group)
    parts = groups if long_rows else B * -(-L // neuron.BACKWARD_COLUMNS)
    made = torch.empty((3 + 2 * parts, C * inner), dtype=dtype, device="cpu")
    ends = torch.empty((2, C), dtype=dtype, device="cpu")
    local = None
    if x.dtype != dtype:
        local = torch.empty((thread_count(2 * x.numel()), T, B, block, L), dtype=dtype, device="cpu")
    g_final, g_seq = (None if t is None else t.to(dtype).contiguous() for t in (g_final, g_seq))
    v = v if v is None else v.contiguous()
    if g is None or (g.numel() > neuron.BACKWARD_COLUMNS and not any(g.stride())):
        g, (value, *_) = placed_gradient(None, g, x)
        upstream = value, 0, 0, 0
    else:
        g = g.to(x.dtype).contiguous()
        upstream = g.data_ptr(), B * C * L, C * L, 1
    affine, mean, rstd = [None if t is None else t.contiguous() for t in affine], mean.contiguous(), rstd.contiguous()
    codes = *_codes(dtype, dx if local is None else local, v), *_codes(dtype, *affine), *_codes(dtype, d_affine[1])
    kernel = _backward_kernel(CODES[x.dtype], *codes, code, SURROGATES[variant.surrogate].id, long_rows)
    kernel(
        2 * x.numel(), (T, B, C, L), (block, group, groups), x.data_ptr(), (*upstream, address(g_final), address(g_seq)),
        (mean.data_ptr(), rstd.data_ptr()), tuple(map(address, affine)), float(scale),
        (made.data_ptr(), made[3:].data_ptr(), *(t.data_ptr() for t in ends), address(local)), address(v), address(checkpoint),
        (dx.data_ptr(), address(dv), *map(address, d_affine)), numbers, _parameter_places(variant, long_rows, block),
    )  # fmt: skip
