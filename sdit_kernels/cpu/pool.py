"""Max-pooling over windows that lie side by side, on the CPU; reference/pool.py defines the packed places.

A task computes a group of rows of windows of one plane.
"""

import functools

from ..reference.pool import MOST, group_rows, per_byte
from .intrinsics import CODES, SIZES, U8, load, load_input, num, state_code, store, store_output, tile
from .kernel import Kernel, share


@functools.cache
def _forward_kernel(X, KH, KW):
    S, xb, PER = state_code(X), SIZES[X], per_byte((KH, KW))
    BASE, TILE, sb = 256 ** (1 / PER), MOST + PER, SIZES[S]

    def max_pool_forward(part, planes, group, OH, OW, H, W, x, y, codes):
        groups, bytes_ = (OH + group - 1) // group, (group * OW + PER - 1) // PER
        for task in share(planes * groups, part):
            plane = task // groups
            top = (task - plane * groups) * group
            places = tile(TILE, S)
            n = min(group, OH - top) * OW
            for i in range(min(group, OH - top)):
                source, target = x + ((plane * H + (top + i) * KH) * W) * xb, y + (plane * OH + top + i) * OW * xb
                for j in range(OW):
                    best, place = load_input(source, j * KW, X), num(0.0, S)
                    for a in range(KH):
                        for b in range(KW):
                            if a + b > 0:
                                v = load_input(source, a * W + j * KW + b, X)
                                better = (v > best) | (v != v)
                                best = v if better else best
                                place = num(a * KW + b, S) if better else place
                    store_output(target, j, best, X)
                    store_output(places + i * OW * sb, j, place, S)
            for j in range(n, bytes_ * PER):
                store(places, j, num(0.0, S), S)
            for q in range(bytes_):
                code = load(places, q, S)
                for k in range(1, PER):
                    code += load(places, q + k * bytes_, S) * num(BASE**k, S)
                store(codes + task * bytes_, q, code, U8)

    return Kernel(max_pool_forward, f"max_pool_forward_{X}{KH}_{KW}")


@functools.cache
def _backward_kernel(X, KH, KW):
    S, xb, PER = state_code(X), SIZES[X], per_byte((KH, KW))
    BITS, MASK, TILE, sb = 8 // PER, 256 ** (1 / PER) - 1, MOST + PER, SIZES[S]
    MASK = int(MASK)

    def max_pool_backward(part, planes, group, OH, OW, H, W, g, codes, dx):
        groups, bytes_ = (OH + group - 1) // group, (group * OW + PER - 1) // PER
        for task in share(planes * groups, part):
            plane = task // groups
            top = (task - plane * groups) * group
            places, zero = tile(TILE, S), num(0.0, S)
            for q in range(bytes_):
                code = int(load(codes + task * bytes_, q, U8))
                for k in range(PER):
                    store(places, q + k * bytes_, num((code >> (k * BITS)) & MASK, S), S)
            for i in range(min(group, OH - top)):
                upstream, target = g + (plane * OH + top + i) * OW * xb, dx + ((plane * H + (top + i) * KH) * W) * xb
                for a in range(KH):
                    for j in range(OW):
                        d, place = load_input(upstream, j, X), load_input(places + i * OW * sb, j, S)
                        for b in range(KW):
                            store_output(target, a * W + j * KW + b, d if place == num(a * KW + b, S) else zero, X)
                    for w in range(OW * KW, W):
                        store(target, a * W + w, zero, X)
            if top + group >= OH:
                rest = dx + (plane * H + OH * KH) * W * xb
                for w in range((H - OH * KH) * W):
                    store(rest, w, zero, X)

    return Kernel(max_pool_backward, f"max_pool_backward_{X}{KH}_{KW}")


# --- launchers --------------------------------------------------------------------------------------------------------------


def _launch(kernel, window, large, small, *addresses):
    planes, (H, W), (OH, OW) = large.shape[0], large.shape[1:], small.shape[1:]
    kernel(CODES[large.dtype], *window)(large.numel(), planes, group_rows(OH, OW), OH, OW, H, W, *addresses)


def max_pool_forward(x, window, y, codes, tuning):
    """Fill y and codes. x: (planes, H, W), contiguous and not empty."""
    _launch(_forward_kernel, window, x, y, x.data_ptr(), y.data_ptr(), codes.data_ptr())


def max_pool_backward(g, codes, window, dx, tuning):
    """Fill dx."""
    _launch(_backward_kernel, window, dx, g, g.data_ptr(), codes.data_ptr(), dx.data_ptr())
