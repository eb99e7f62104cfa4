"""The calls of norm_lif: the statistics of a normalisation, and LIF neurons behind it."""

from typing import NamedTuple

import torch

import sdit_kernels
from perf.compile.rows import SHAPE, Figures, Launched, Stem, add_turns
from perf.ops import passes

STRETCH = 16  # time steps that a LIF kernel holds in registers; for a longer T, it loops over stretches
IMAGES = (2, 64, 28, 28)  # batch, channels, height and width


class NormCase(NamedTuple):
    """A call of norm_lif in training, forward and backward."""

    variant: str
    T: int = 4
    images: bool = False  # (T, B, C, H, W); otherwise (T, B, L, C)
    learnt: bool = False  # tau and v_threshold per channel are learnt

    op = "norm_lif"
    load = None

    def launch(self, dtype):
        shape, axis = (IMAGES, 2) if self.images else (SHAPE, -1)
        x = torch.empty(self.T, *shape, dtype=dtype, requires_grad=True)
        running = torch.zeros(x.shape[axis]), torch.ones(x.shape[axis])
        weight, bias, *more = (torch.full((x.shape[axis],), 2.0, requires_grad=True) for _ in range(4 if self.learnt else 2))
        with sdit_kernels.backend("triton"):
            s = sdit_kernels.norm_lif(
                x, weight, bias, *running, training=True, channel_axis=axis, **dict(zip(("tau", "v_threshold"), more))
            )
            torch.autograd.grad(s, [x, weight, bias, *more], torch.empty_like(s))

    def figures(self, launched: Launched) -> Figures:
        """Count per element of x. Vectors of channels, which a program reads once, and its partial sums do not count as bytes.

        The two kernels that combine partial sums read no data.
        """
        name, found, size = launched.name, launched.found, launched.size
        if name in ("norm_combine", "norm_gradients"):
            return Figures(name, widths={max(found["loads"])})
        if name == "norm_forward":  # a loop over tiles of rows
            loop = max(found["loops"], key=lambda loop: loop["bytes"])
            turns = loop["bytes"] / (size * launched.neurons)  # the compiler may unroll it
            count = add_turns({"instructions": 0, "bytes": 0, "special": {}}, loop, 1 / turns)
            return Figures(name, count, launched.neurons, size, widths={max(found["loads"])})
        steps = min(self.T, STRETCH)
        backward = launched.direction == "backward"
        applies = backward and launched.has("gradients", 0, 0)
        vectors = (5 if applies else 3) + 2 * self.learnt
        sums = (4 if self.learnt else 2) if backward and not applies else 0
        rows = launched.arguments["BR"]
        values = rows if self.images else launched.arguments["BC"] / found["threads"]  # of a vector, in a thread
        count = found | {"bytes": found["bytes"] - 4 * (vectors * max(1, values) + sums * max(1, values))}
        name += " (gradient)" if applies else " (sums)" if backward else ""
        moved = (2 if backward and not applies else passes(launched.direction, 1)) * size
        moved += 4 / steps if self.T > STRETCH else 0  # the checkpoint
        return Figures(name, count, launched.neurons * steps, moved, widths=launched.widths - {16, 32} or {32})


CASES = (
    NormCase("T=4"),
    NormCase("T=16", 16),
    NormCase("T=32", 32),
    NormCase("T=4, learnt channels", learnt=True),
    NormCase("T=4, images", images=True),
    NormCase("T=16, images", 16, True),
    NormCase("T=4, images, learnt channels", images=True, learnt=True),
)
NOTES = """\

- Columns as in compile_lif.md. `norm_forward` finds the statistics, `norm_combine` combines its partial results and updates
  the running statistics, `norm_lif_forward` runs the neurons. The backward kernel runs twice: for the sums per channel
  (*sums*), which `norm_gradients` combines, and for the gradient of x (*gradient*). With b bytes an element, the calls move
  3 b in the forward pass and 5 b in the backward pass.
- Vectors of channels and partial sums do not count as bytes. images: (T, B, C, H, W), otherwise (T, B, L, C).
"""
NORM_LIF = Stem(CASES, CASES[:1], 1.01, True, NOTES)
