"""What a neuron's spikes are: binary, ternary or integers. ``Levels`` are the integers, with their gradient and their size."""

import ast
import functools
import math
import numbers
from typing import Any, NamedTuple

from ._torch import assume_constant_result

LIMIT = 1 << 22  # the kernels round to integers by adding 1.5 * 2^23 in float32
BINARY = "binary"


class Levels(NamedTuple):
    """Integer spikes: c = round(clip(h / v_threshold, lo, hi)), ties to even.

    Args:
        lo: the least integer, for example 0, or -2 for signed spikes.
        hi: the greatest integer, above lo.
        window: (a, b): dc/dh = 1/v_threshold where a <= h/v_threshold <= b, else 0. None: (lo, hi).
        scale: the op returns c * scale. The reset subtracts c * v_threshold.

    A plain pair (lo, hi) is the same as ``Levels(lo, hi)``.

    Source: Luo et al., SpikeYOLO, ECCV 2024, arXiv 2407.20708; Yao et al., Spike-driven Transformer V3, arXiv 2411.16061.

    Example:
        >>> import torch
        >>> from sdit_kernels import Levels, lif
        >>> x = torch.tensor([[0.4, 1.6, 2.5, 9.0]])
        >>> lif(x, tau=1.0, v_reset=None, levels=Levels(0, 4)).tolist()
        [[0.0, 2.0, 2.0, 4.0]]
        >>> lif(x, tau=1.0, v_reset=None, levels=Levels(0, 4, scale=0.25)).tolist()
        [[0.0, 0.5, 0.5, 1.0]]
    """

    lo: int
    hi: int
    window: tuple[float, float] | None = None
    scale: float = 1.0


def _is_finite(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def encode(levels: Any) -> str:
    """Check ``levels`` and return it as operators take it: "binary", "ternary", or the text of a tuple."""
    return _encode(tuple(levels) if isinstance(levels, (tuple, list)) else levels)


@assume_constant_result  # torch.compile need not trace it
def _encode(levels):
    try:  # the checks take 6 us
        return _check_once(levels, *(map(type, levels) if isinstance(levels, tuple) else ()))
    except TypeError:  # wrong, or a window that is a list
        return _check(levels)


def _check(levels):
    if levels is None:
        return BINARY
    if isinstance(levels, str):
        if levels != "ternary":
            raise ValueError(f"levels must be None, (lo, hi), Levels(..) or 'ternary', got {levels!r}")
        return levels
    if not isinstance(levels, tuple):
        raise TypeError(f"levels must be None, (lo, hi), Levels(..) or 'ternary', got {type(levels).__name__}")
    if not 2 <= len(levels) <= 4:
        raise ValueError(f"levels must be a pair (lo, hi) or Levels(lo, hi, window, scale), got {levels!r}")
    lo, hi, window, scale = Levels(*levels)
    for name, value in (("lo", lo), ("hi", hi)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} of levels must be an int, got {value!r}")
    if not lo < hi:
        raise ValueError(f"lo of levels must be less than hi, got {(lo, hi)}")
    if max(-lo, hi) > LIMIT:
        raise ValueError(f"levels must be between -2^22 and 2^22, got {(lo, hi)}")
    if window is not None:
        if not (isinstance(window, (tuple, list)) and len(window) == 2 and all(map(_is_finite, window))):
            raise TypeError(f"window of levels must be None or a pair of finite numbers, got {window!r}")
        if not window[0] <= window[1]:
            raise ValueError(f"window of levels must be (a, b) with a <= b, got {window!r}")
    if not (_is_finite(scale) and scale > 0):
        raise ValueError(f"scale of levels must be a positive finite number, got {scale!r}")
    window = () if window is None or tuple(window) == (lo, hi) else (float(window[0]), float(window[1]))
    return repr((int(lo), int(hi), window, float(scale)))


@functools.lru_cache(maxsize=256)
def _check_once(levels, *types):
    return _check(levels)


@assume_constant_result
@functools.cache
def decode(levels: str) -> tuple:
    """Return the flags ``levels``, ``span``, ``window`` and ``scale`` of a neuron's step from the result of ``encode``."""
    if not levels.startswith("("):
        return (levels,)
    lo, hi, window, scale = ast.literal_eval(levels)
    return "integer", (lo, hi), window, scale


def span(levels: Any) -> tuple[int, int]:
    """Return the least and the greatest of levels that ``encode`` accepts."""
    return (-1, 1) if levels == "ternary" else (levels[0], levels[1])
