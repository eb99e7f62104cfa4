"""The neurons of the library: each is its step."""

from typing import Literal

from .trace import Neuron


def lif(x, s, p, o, *, soft=False, decay=True, detach=False):
    """Leaky integrate-and-fire. soft: the reset subtracts the threshold. decay: the leak divides the input too."""
    rest = s.v if soft else s.v - p.v_reset
    h = s.v + (x - rest) * p.r if decay else s.v - rest * p.r + x
    fired = o.fire(h - p.v_threshold)
    gate = o.detach(fired) if detach else fired
    return fired, h - gate * p.v_threshold if soft else o.where(gate, p.v_reset, h)


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


LIF = Neuron("lif", lif, parameters=("r", "v_threshold"), numbers=("v_reset",), start=("v_reset",), reciprocals=("r",))
LEAKY = Neuron("leaky", leaky, parameters=("beta", "v_threshold"))
NEURONS = {neuron.name: neuron for neuron in (LIF, LEAKY)}
