"""The calls of wkv, and of flash-linear-attention's RWKV-4."""

from typing import NamedTuple

import torch

from perf import peers
from perf.compile.rows import SHAPE, Figures, Launched, Stem, count_one_turn
from perf.ops import passes
from sdit_kernels import layout
from sdit_kernels.triton import wkv
from sdit_kernels.tuning import current


class WkvCase(NamedTuple):
    """A call of the WKV launchers that keeps a checkpoint."""

    variant: str
    algorithm: str = "serial"
    gate: bool = False
    state: bool = False  # with a state as input, and its gradient
    bidirectional: bool = False
    packed: bool = False

    op = "wkv"
    load = None

    def launch(self, dtype):
        B, L, C = (1, SHAPE[0] * SHAPE[1], SHAPE[2]) if self.packed else SHAPE
        data = [torch.empty(B, L, C, dtype=dtype) for _ in range(8)]
        k, v, out, g, dk, dv, r, dr = data if self.gate else (*data[:6], None, None)
        w, u, d_w, d_u = (torch.empty(C) for _ in range(4))
        states = [torch.empty(SHAPE[0], C) if self.state else None for _ in range(8)]
        ybar, lse, ybar_out, lse_out, g_ybar, g_lse, d_ybar, d_lse = states
        cu = torch.empty(SHAPE[0] + 1, dtype=torch.int32) if self.packed else None
        tuning = current()
        rows = layout.wkv_rows(B, L, SHAPE[0] if self.packed else None, tuning.wkv_checkpoint_tokens)
        checkpoint = torch.empty(1 + self.bidirectional, 3, rows, C)
        how = (cu, 0, self.bidirectional, self.algorithm)
        wkv.wkv_forward(k, v, r, w, u, True, ybar, lse, *how, out, ybar_out, lse_out, checkpoint, tuning)
        wkv.wkv_backward(
            g, g_ybar, g_lse, k, v, r, w, u, True, ybar, lse, checkpoint, *how, dk, dv, dr, d_w, d_u, d_ybar, d_lse,
            tuning,
        )  # fmt: skip

    def floor_of_call(self, direction: str, last: dict) -> float:
        """Return the bytes per element of the whole call: one pass over the data, and 12 bytes of state per 16 tokens."""
        return passes(direction, 2 + self.gate) * (4 if last["data"] == "fp32" else 2) + 12 / 16

    def figures(self, launched: Launched) -> Figures:
        """Count one turn of the loop over tokens. The backward pass reads the checkpoint once per part of a tile. All reads
        except the first come from a cache and do not count as bytes."""
        if launched.name == "wkv_sums":
            # Its stores and its load of the decay are narrow: it sums many numbers into one per channel.
            return Figures(launched.name, widths={max(launched.found["loads"])})
        if launched.name == "wkv_combine":
            return Figures(f"{launched.name} ({'carries' if launched.arguments['CARRY'] else 'states'})")
        tile, backward = launched.arguments["TILE"], launched.direction == "backward"
        tokens = launched.arguments["HELD"] if backward else tile
        parts, gate, both = tile // tokens, launched.has("inputs", 2, 0), launched.has("entering", 1)
        out = launched.has("gradients" if backward else "outputs", 0, 0)
        states = (1 + both if backward or both else 0) + (not backward and launched.has("outputs", 1, 2))
        count = count_one_turn(launched.found, parts)
        if backward:
            count["bytes"] -= (1 - 1 / parts) * 12 * states
        tensors = 2 + (backward and launched.has("upstream", 0, 0)) + gate + out * (1 + backward * (1 + gate))
        floor = tensors * launched.size + 12 * states / tile
        if backward and both:
            floor += (16 if out else 8) / tokens  # carries
        role = "" if out else " (summary)" if launched.has(*(("carries", 3) if backward else ("outputs", 1, 3))) else " (walk)"
        role += " leftwards" if launched.arguments["LEFTWARDS"] else " rightwards" if launched.arguments["RIGHTWARDS"] else ""
        return Figures(launched.name + role, count, tokens, floor)


class Fla(NamedTuple):
    """A call of the launchers of flash-linear-attention's fused_recurrent_rwkv4, with a state in and out."""

    variant: str = "serial"
    op: str = "fla"

    load = staticmethod(peers.load_fla_kernels)

    def launch(self, dtype):
        k, v = (torch.empty(SHAPE, dtype=dtype) for _ in range(2))
        peers.launch_fla(self.load(), *torch.empty(2, SHAPE[-1]), k, v)

    def figures(self, launched: Launched) -> Figures:
        """Count one turn of its loop, which covers one token, or several if the compiler unrolled it. The floor is the floor of
        our serial call. The kernel writes the fp32 state after every token and reads it in the backward pass."""
        loop = max(launched.found["loops"], key=lambda loop: loop["instructions"])
        tokens = round(loop["bytes"] / (5 * launched.size + 12 if launched.direction == "backward" else 6 * launched.size))
        return Figures(f"fla {launched.name}", loop, tokens, passes(launched.direction, 2) * launched.size + 12 / 16)


CASES = (
    WkvCase("serial"),
    WkvCase("serial, gate", gate=True),
    WkvCase("serial, state", state=True),
    WkvCase("serial, gate, state, packed", gate=True, state=True, packed=True),
    WkvCase("chunked, gate", "chunked", gate=True),
    WkvCase("bidirectional, gate", gate=True, bidirectional=True),
    Fla(),
)

NOTES = """
How to read it:

- *registers*, *spills*, *shared*, *resident*, *loads*, *stores*: as in compile_lif.md. A thread holds one channel, so that an
  access is as wide as an element and the accesses of a warp are side by side.
- *bytes* per element of k, beside the *floor*: k, v, r, g, the outputs and the states (12 bytes per tile; twice as much in two
  directions), once each. *instructions* and *special* (exponentials, reciprocals) per token and channel, in the loop over
  tokens. The backward pass holds 8 tokens and recomputes their states from the states of the tile. So it takes half of the
  tokens twice, which counts as instructions; it has read their k and v just before, which does not count as bytes.
  The code contains the loop of the forward pass twice: for full tiles, which are counted, and with masks for the last tile.
  *loads* and *stores* show both.
- "chunked" launches the kernel of "serial", and kernels that make summaries and scan them (`wkv_combine`, per chunk).
  "bidirectional" also launches kernels that make the states (forward) and carries (backward) that enter each tile. *(call)* is
  all of them together, beside the floor of one pass: k and v are read once more for the summaries ("chunked": twice in all) or
  for the states of either direction (three times), and in the backward pass g and r with them. Where L is short the later reads
  come from the L2 cache: (8, 394, 384) in fp32 is 4.8 MB a tensor, an H100's L2 50 MB; no measurement backs that.
- Bidirectional backward kernels read one exponent of the neighbouring tile (0.5 bytes) above their floor.
- *paper*: lower limits for an H100 SXM from these counts and its data sheet, in ms per 1e9 elements of k. *bound by* names the
  largest. This is arithmetic on paper, not a prediction.
- `fla`: flash-linear-attention's fused_recurrent_rwkv4 with its own launch settings. It writes the state after every token and
  reads it again in the backward pass; these figures leave out the copy that it makes of all states in between.
- For comparison: RWKV's CUDA forward kernel has 33 instructions per token on sm_90 with fast math, 72 without, 5 of them
  special; its backward kernel keeps 48 KiB of local memory per thread.
"""

WKV = Stem(CASES, (CASES[1], CASES[-1]), 1.10, False, NOTES)
