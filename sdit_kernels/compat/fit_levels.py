"""Recognise hand-written neurons whose spikes are integers, by what they compute: with a membrane, or without state.

::

    h[t] = decay * v[t-1] + x[t]                            or    h = x, without a time axis
    c[t] = round(clip(h[t] / threshold, lo, hi))
    v[t] = h[t] - c[t] * threshold
    s[t] = c[t] * scale

fit_lif.py explains the probe, the layouts and the check on fresh inputs.
"""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..levels import Levels
from ..ops.lif import lif, lif_rate
from .fit_lif import (
    NOT_BINARY,
    SECONDS,
    Cannot,
    Found,
    Layout,
    Probe,
    copy_of,
    dtypes_of,
    first_input,
    first_look,
    isolated,
    layouts,
    near,
    rounded,
    verify,
)

_MOST = 256  # levels; bfloat16 holds no more


class LevelForm(NamedTuple):
    """The equation of a neuron whose spikes are integers."""

    decay: float | None  # None: no state
    threshold: float
    levels: Levels
    detach: bool  # no gradient flows through the reset
    unused: tuple[str, ...] = ()

    def __str__(self):
        state = "no state" if self.decay is None else f"decay {self.decay:g}, soft reset"
        return f"{state}, threshold {self.threshold:g}, integers from {self.levels.lo} to {self.levels.hi}"

    def run(self, x: Tensor, parameters) -> Tensor:
        """Return the spikes of the neuron for x, (T, ...)."""
        if self.decay is None:
            return lif_rate(x, 1, tau=1.0, v_threshold=self.threshold, v_reset=None, levels=self.levels)
        tau = math.inf if self.decay == 1 else 1 / (1 - self.decay)
        return lif(
            x,
            tau=tau,
            decay_input=False,
            v_threshold=self.threshold,
            v_reset=None,
            detach_reset=self.detach,
            levels=self.levels,
        )


class _Stairs(NamedTuple):
    """The spike of the first step, as a function of the input."""

    threshold: float
    levels: Levels
    first: float  # the smallest input with a spike above the least


def _measure_stairs(probe: Probe, known: list[float]) -> _Stairs:
    """Read the threshold, the levels and the window of the gradient from the first step."""

    def spikes(x):
        return probe.run(probe.rows((), x))[0].detach()

    bottom, top = spikes([-(2.0**40), 2.0**40]).tolist()
    if not bottom < top < math.inf or bottom == -math.inf:
        raise Cannot(1, NOT_BINARY)
    low, first = first_input(lambda x: (spikes(x) > bottom).tolist(), "its least spike")
    _, last = first_input(lambda x: (spikes(x) >= top).tolist(), "its greatest spike")
    size = spikes([first]).item() - bottom
    steps = (top - bottom) / size
    if not near(steps, round(steps)) or not 2 <= steps <= _MOST:
        raise Cannot(1, NOT_BINARY)
    steps = round(steps)
    threshold = rounded((last - first) / (steps - 1), known)
    lo = round(first / threshold - 0.5)
    scale = rounded(top / (lo + steps) if lo + steps else bottom / lo, [*known, *(1 / a for a in known if a)])
    if not near(first, (lo + 0.5) * threshold) or not near(low, (lo + 0.5) * threshold) or abs(bottom - lo * scale) > 1e-9:
        raise Cannot(2, "its spikes are not the rounded multiples of a threshold")
    hi = lo + steps
    return _Stairs(threshold, Levels(lo, hi, _measure_window(probe, threshold, lo, hi, scale, known), scale), first)


def _measure_window(probe: Probe, threshold, lo, hi, scale, known) -> tuple[float, float]:
    """Return where the spike of the first step has a gradient, in units of the threshold."""
    centre = threshold * (lo + hi) / 2

    def slopes(x):
        return probe.slopes((), x, 0)

    if not near(slopes([centre]).item(), scale / threshold, 1e-7):
        raise Cannot(4, "its gradient is not one over the threshold in the middle of its integers", final=True)
    ends = []
    for sign in (-1, 1):

        def leaves(distances, sign=sign):
            return [g == 0 for g in slopes([centre + sign * max(d, 0.0) for d in distances]).tolist()]

        try:
            inside, _ = first_input(leaves, "its gradient")
        except Cannot:
            raise Cannot(4, "its gradient does not end at a distance from its integers", final=True) from None
        end = rounded((centre + sign * inside) / threshold, [*known, float(lo), float(hi)])
        end = 0.0 if abs(end) < 1e-12 else end
        if slopes([end * threshold]).item() == 0:
            end = _inside(end, (lo + hi) / 2)
            if slopes([end * threshold]).item() == 0:
                raise Cannot(4, "its gradient is 0 near the ends of its window", final=True)
        ends.append(end)
    return ends[0], ends[1]


def _inside(end: float, centre: float) -> float:
    """Return the float32 next to the end of a window, inside it: the window does not contain its ends.

    torch.clamp has the gradient 1 at its bounds before PyTorch 2.14, and 0 from then on.
    """
    if end == 0:
        return math.copysign(2.0**-100, centre)
    ends = (torch.tensor(a, dtype=torch.float32, device="cpu") for a in (end, centre))
    return torch.nextafter(*ends).item()


def _measure_reset(probe: Probe, stairs: _Stairs, known: list[float]) -> tuple[float, bool]:
    """Read the decay and whether the reset has a gradient from the second step."""
    threshold, levels = stairs.threshold, stairs.levels
    if not levels.lo <= 0 <= levels.hi or stairs.first <= 0 and levels.lo == 0:
        raise Cannot(3, "it spikes without input")
    bottom = levels.lo * levels.scale
    rest = threshold / 4  # rounds to 0, so the membrane keeps it

    def spikes(x):
        return (probe.run(probe.rows((rest,), x))[1].detach() > bottom + levels.scale / 2).tolist()

    _, second = first_input(spikes, "its second spike")
    decay = (stairs.first - second) / rest
    if abs(decay) <= 1e-6:
        raise Cannot(2, "it keeps no membrane potential from step to step")
    if not 0 < decay <= 1 + 1e-12:
        raise Cannot(3, f"its decay is {decay:g}, and the kernels take 0 to 1")
    decay = 1.0 if near(decay, 1, 1e-12) else rounded(decay, [*known, *(1 - 1 / a for a in known if a)])
    low, high = levels.window or (levels.lo, levels.hi)
    z = low + 0.6 * (high - low)  # inside the window in both steps
    count = max(levels.lo, min(levels.hi, round(z)))
    current = threshold * (z - decay * (z - count))
    (through,) = probe.slopes((threshold * z,), [current], 0).tolist()
    return decay, near(through, decay * levels.scale / threshold, 1e-6)


def _check_ties(probe: Probe, form: LevelForm):
    """Compare the first step exactly between two integers, and at the ends of the window."""
    lo, hi, window, _ = form.levels
    z = [n + 0.5 for n in range(lo - 1, hi + 1)] + [float(lo), float(hi), *(window or ())]
    rows = probe.rows((), [form.threshold * a for a in z])
    wanted = probe.run(rows)[0].detach()
    found = form.run(rows, {})[0]
    if not torch.allclose(found, wanted.to(found.dtype), rtol=1e-9):
        raise Cannot(4, "it does not round halves to the even integer")


def fit_levels(module: nn.Module, device: str, numbers: list) -> Found:
    """Return the neuron with integer spikes that a module computes, or raise Cannot. Arguments as in ``fit_lif``."""
    with isolated(device):
        return _fit(module, device, numbers)


def _fit(module, device, numbers):
    twin = copy_of(module).to(device).double().requires_grad_().train()
    if next(twin.parameters(), None) is not None:
        raise Cannot(1, f"{NOT_BINARY}; integers are recognised of neurons without parameters")
    known = [float(value) for value in numbers if type(value) in (int, float) and math.isfinite(value)]
    until = time.monotonic() + SECONDS
    best = Cannot(-1, "")
    for layout in (Layout("none", 0, 1), *layouts(numbers)):
        for rank in (4, 3, 5) if layout.axis == 1 else (4, 3, 5, 2):
            probe = Probe(twin, layout, rank, device, until)
            try:
                first_look(probe, binary=False)
                stairs = _measure_stairs(probe, known)
                if layout.kind == "none":
                    form = LevelForm(None, stairs.threshold, stairs.levels, False)
                else:
                    decay, detach = _measure_reset(probe, stairs, known)
                    form = LevelForm(decay, stairs.threshold, stairs.levels, detach)
                _check_ties(probe, form)
                form = verify(probe, form, stairs.threshold, True)
            except Cannot as reason:
                if reason.final:
                    raise best if reason.progress < best.progress else reason from None
                twin.train()
                best = max(best, reason, key=lambda r: r.progress)
                continue
            ranks = [rank]
            for other in {2, 3, 4, 5} - {rank}:
                try:
                    verify(Probe(twin, layout, other, device, until), form, stairs.threshold, False)
                    ranks.append(other)
                except Cannot:
                    continue
            most = max(-form.levels.lo, form.levels.hi)
            dtypes = tuple(pair for pair in dtypes_of(probe, module) if most <= 2 / torch.finfo(pair[1]).eps)
            return Found(form, layout, tuple(sorted(ranks)), dtypes)
    raise best
