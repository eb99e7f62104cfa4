"""A neuron behind a normalisation: its step takes the normalised current, so the kernels of the neuron normalise as they read.

    step of the new neuron = step((x - norm_mean) * norm_scale + norm_shift, ..)

The backward pass of a normalisation in training needs two sums over all data of a channel before it can write a gradient. So a
kernel first sums the gradients of norm_scale and norm_shift. Then the gradient of x is::

    dx - norm_offset - (x - norm_mean) * norm_slope
"""

import dataclasses
import functools

from .trace import Neuron

NAMES = ("norm_scale", "norm_shift")  # the parameters with gradients, in front of the parameters of the neuron
FIXED = ("norm_mean", "norm_offset", "norm_slope")  # the parameters without, behind them


def _centred(dx, x, p):
    return dx - p.norm_offset - (x - p.norm_mean) * p.norm_slope


@functools.cache
def after_norm(neuron: Neuron, learnt: bool, centred: bool = False) -> Neuron:
    """Return the neuron behind a normalisation.

    learnt: its own parameters have gradients too. centred: the gradient of x is the gradient in training, and needs the last
    two of FIXED.
    """

    @functools.wraps(neuron.step)
    def step(x, s, p, o, **flags):
        return neuron.step((x - p.norm_mean) * p.norm_scale + p.norm_shift, s, p, o, **flags)

    parameters = *NAMES, *neuron.parameters, *(FIXED if centred else FIXED[:1])
    return dataclasses.replace(
        neuron,
        name=f"norm_{neuron.name}",
        step=step,
        parameters=parameters,
        fixed=parameters[len(NAMES) + (len(neuron.parameters) if learnt else 0) :],
        input_gradient=_centred if centred else None,
    )
