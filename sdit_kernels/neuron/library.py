"""The neurons of the library: each is its step."""

from typing import Literal

from .trace import Neuron


def lif(
    x, s, p, o, *, soft=False, decay=True, detach=False,
    levels: Literal["binary", "integer", "ternary"] = "binary", span=(0, 1), window=(), scale=1.0,
):  # fmt: skip
    """Leaky integrate-and-fire. soft: the reset subtracts the threshold. decay: the leak divides the input too.

    Of integer levels, span: the least and the greatest; window: where they have a gradient, (): the span; scale: of the output.
    """
    rest = s.v if soft else s.v - p.v_reset
    h = s.v + (x - rest) * p.r if decay else s.v - rest * p.r + x
    if levels == "integer":
        return _integer(h, p, o, soft, detach, span, window, scale)
    if levels == "ternary":
        return _ternary(h, p, o, soft, detach)
    fired = o.fire(h - p.v_threshold)
    gate = o.detach(fired) if detach else fired
    return fired, h - gate * p.v_threshold if soft else o.where(gate, p.v_reset, h)


def _integer(h, p, o, soft, detach, span, window, scale):
    if not soft:
        raise ValueError("integer levels need a soft reset")
    count = o.level(h, *span, p.v_threshold, window)
    return count * scale, h - (o.detach(count) if detach else count) * p.v_threshold


def _ternary(h, p, o, soft, detach):
    up, down = o.fire(h - p.v_threshold), o.fire(-h - p.v_threshold)
    spike, fired = up - down, o.either(up, down)
    if soft:
        return spike, h - (o.detach(spike) if detach else spike) * p.v_threshold
    return spike, o.where(o.detach(fired) if detach else fired, p.v_reset, h)


def leaky(x, s, p, o, *, reset: Literal["subtract", "zero", "none"] = "subtract", delay=True):
    """snnTorch's Leaky: the membrane before the step decides its reset. delay: a spike resets in the next step only."""
    ago = o.detach(o.fire_above(s.v - p.v_threshold))
    h = p.beta * (o.where(ago, 0.0, s.v) if reset == "zero" else s.v) + x
    if reset == "subtract":
        h = h - ago * p.v_threshold
    fired = o.fire_above(h - p.v_threshold)
    if delay or reset == "none":
        return fired, h
    if reset == "subtract":
        return fired, h - (fired - ago) * p.v_threshold
    return fired, o.where(fired, o.where(ago, h, 0.0), o.where(ago, h + h, h))  # h - (fired - ago) * h, for an infinite h too


def lapicque(x, s, p, o, *, reset: Literal["subtract", "zero", "none"] = "subtract"):
    """snnTorch's Lapicque: a circuit of a resistor and a capacitor. The membrane before the step decides its reset."""
    ago = o.detach(o.fire_above(s.v - p.v_threshold))
    h = x * p.R * (1.0 / (p.R * p.C)) * p.time_step + (1.0 - p.time_step / (p.R * p.C)) * s.v
    if reset == "subtract":
        h = h - ago * p.v_threshold
    elif reset == "zero":
        h = o.where(ago, 0.0, h)
    return o.fire_above(h - p.v_threshold), h


def cuba(x, s, p, o, *, reset: Literal["subtract", "zero", "none"] = "subtract", delay=True):
    """snnTorch's Synaptic: a leaky membrane driven by a leaky synaptic current. delay: as in leaky."""
    ago = o.detach(o.fire_above(s.v - p.v_threshold))
    i = p.beta_i * s.i + x
    v = p.beta * s.v + i
    if reset == "subtract":
        v = v - ago * p.v_threshold
    elif reset == "zero":
        v = o.where(ago, 0.0, v)
    fired = o.fire_above(v - p.v_threshold)
    if delay or reset == "none":
        return fired, (i, v)
    return fired, (i, v - (fired - ago) * p.v_threshold if reset == "subtract" else o.where(fired, 0.0, v))


def adlif(x, s, p, o):
    """Adaptive LIF: a second state w, driven by the membrane and the spikes, acts against the input (symplectic Euler)."""
    h = p.beta * s.v + (1.0 - p.beta) * (x - s.w)
    fired = o.fire(h - p.v_threshold)
    v = o.where(fired, 0.0, h)
    return fired, (v, p.beta_w * s.w + (1.0 - p.beta_w) * (p.a * v + fired * p.b))


LIF = Neuron("lif", lif, parameters=("r", "v_threshold"), numbers=("v_reset",), start=("v_reset",), reciprocals=("r",))
LEAKY = Neuron("leaky", leaky, parameters=("beta", "v_threshold"))
LAPICQUE = Neuron("lapicque", lapicque, parameters=("R", "C", "time_step", "v_threshold"))
CUBA = Neuron("cuba", cuba, ("i", "v"), ("beta_i", "beta", "v_threshold"), start=(None, None))
ADLIF = Neuron("adlif", adlif, ("v", "w"), ("beta", "beta_w", "a", "b", "v_threshold"), start=(None, None))
NEURONS = {neuron.name: neuron for neuron in (LIF, LEAKY, LAPICQUE, CUBA, ADLIF)}
