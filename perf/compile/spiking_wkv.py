"""The calls of spiking_wkv."""

from typing import NamedTuple

import torch

from perf.compile.rows import SHAPE, Figures, Launched, Stem, count_one_turn
from perf.ops import passes
from sdit_kernels import layout
from sdit_kernels.neuron import LIF, Variant
from sdit_kernels.triton import spiking_wkv
from sdit_kernels.tuning import current


class SpikingCase(NamedTuple):
    """A call of the spiking_wkv launchers with the fused kernel, which keeps a checkpoint."""

    variant: str
    gate: bool = False
    rate: bool = False
    T: int = 4

    op = "spiking_wkv"
    load = None

    def launch(self, dtype):
        B, L, C = SHAPE
        k, v, dk, dv, r, dr = [torch.empty(self.T, *SHAPE, dtype=dtype) for _ in range(6)]
        r, dr = (r, dr) if self.gate else (None, None)
        out, g = [torch.empty(SHAPE if self.rate else (self.T, *SHAPE), dtype=dtype) for _ in range(2)]
        w, u, d_w, d_u = (torch.empty(C) for _ in range(4))
        tuning = current()._replace(spiking_min_channels_fused=0)
        rows = layout.wkv_rows(self.T * B, L, None, layout.spiking_tile(self.T, "triton", tuning))
        checkpoint = torch.empty(3, rows, C)
        variant, parameters = Variant(LIF, (False, True, False), (0.5, 1.0, 0.0), "atan", 2.0), (None, None)
        spiking_wkv.spiking_wkv_forward(
            k, v, r, w, u, True, None, None, None, parameters, variant, self.rate, out, None, None, None, checkpoint, tuning
        )
        spiking_wkv.spiking_wkv_backward(
            g, None, None, None, k, v, r, w, u, True, None, None, None, parameters, checkpoint, variant, self.rate, False,
            dk, dv, dr, d_w, d_u, None, None, None, tuning,
        )  # fmt: skip

    def figures(self, launched: Launched) -> Figures:
        """Count per element of k. The gradient of a rate, which all time steps read, counts once."""
        if launched.name == "wkv_sums":
            return Figures(
                launched.name, widths=set(launched.found["loads"])
            )  # its stores are narrow: it sums many numbers into one
        tile, backward = launched.arguments["TOKENS"], launched.direction == "backward"
        tokens = launched.arguments["HELD"] if backward else tile
        parts = tile // tokens
        count = count_one_turn(launched.found, parts)
        count["bytes"] -= (1 - 1 / parts) * 12 * self.T
        if backward and self.rate:
            count["bytes"] -= (self.T - 1) * tokens * launched.size
        tensors = passes(launched.direction, 2 + self.gate, 1 / self.T if self.rate else 1)
        return Figures(launched.name, count, self.T * tokens, tensors * launched.size + 12 / tile)


CASES = (
    SpikingCase("T=4"),
    SpikingCase("T=4, gate", gate=True),
    SpikingCase("T=4, gate, rate", gate=True, rate=True),
)

NOTES = """
How to read it:

- Columns as in compile_wkv.md, per element of k, which is per time step, token and channel. A tile is 16 pairs of time step and
  token. The *floor* is k, v, r, the spikes (with rate: one value for all steps), the gradients and the scan states, once each.
- With a gate and without states, this moves 4 tensors in the forward pass where wkv followed by lif moves 6, and 7 in the
  backward pass where they move 10.
- On gfx942 a wave of 64 lanes processes 32 channels, so half of the lanes idle.
"""

SPIKING_WKV = Stem(CASES, CASES[1:2], 1.10, False, NOTES)
