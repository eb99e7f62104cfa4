"""The calls of token_shift and relu_squared."""

from typing import NamedTuple

import torch

from perf.compile.rows import SHAPE, Figures, Launched, Stem, add_turns
from perf.ops import EPS, passes
from sdit_kernels.triton import mix
from sdit_kernels.tuning import current


class MixCase(NamedTuple):
    """A call of the launchers of token_shift with learnt mixes; with mixes=0, of the launchers of relu_squared."""

    variant: str
    mixes: int = 1
    norm: bool = False
    C: int = SHAPE[-1]
    autocast: bool = False  # results in bf16 for any dtype of x

    op = "mix"
    load = None

    def launch(self, dtype):
        x, dx, *outs = (torch.empty(*SHAPE[:2], self.C, dtype=dtype) for _ in range(2 + self.mixes))
        outs = [out.bfloat16() for out in outs] if self.autocast else outs
        mixes, eps, tuning = torch.empty(self.mixes, self.C), EPS if self.norm else None, current()
        if self.mixes:
            mix.token_shift_forward(x, None, mixes, eps, outs, tuning)
            mix.token_shift_backward(outs, x, None, mixes, eps, dx, None, True, tuning)
        else:
            mix.relu_squared_forward(x, dx, tuning)
            mix.relu_squared_backward(x, x, dx, tuning)

    def floor_of_call(self, direction: str, last: dict) -> float:
        return last["floor"]

    def figures(self, launched: Launched) -> Figures:
        """Count per element of x, in a program with one run of tokens.

        Reads from a cache do not count as bytes: the token and the gradients that the next run also reads, repeated reads of a
        token in the same program, mixes, sums of a norm. The sums over tokens, which a program writes after its runs, do not
        count either.
        """
        name, size, values, M = launched.name, launched.size, int(launched.neurons), self.mixes
        mixed = 2 if self.autocast else size  # bytes of an element of a result or its gradient
        if name.startswith("relu"):
            return Figures(name, launched.found, values, passes(launched.direction, 1) * size)
        if name.endswith("stats"):
            M = launched.arguments["M"]
            count = {"instructions": 0, "bytes": 0, "special": {}}
            # Loops for the sum, the sum of squares and products with the gradients; the compiler may unroll them.
            for i, loop in enumerate(launched.found["loops"]):
                read = size if i < 2 else size + 2 * M * mixed + 4 * M
                count = add_turns(count, loop, 1 / max(1, loop["bytes"] // (read * values)))
            cached_bytes = (size + M * mixed + 4 * M if M else 0) + size
            count["bytes"] -= values * cached_bytes
            name = f"{name} ({'backward' if M else 'forward'})"
            return Figures(name, count, values, size + M * mixed, widths=set(launched.found["loads"]))
        run, normed, backward = launched.arguments["RUN"], launched.arguments["NORM"] == 2, launched.direction == "backward"
        count, cached_bytes = dict(launched.found), size + backward * M * mixed + (run + backward) * 4 * M
        if backward:  # a loop over the tokens of a run; the compiler may move tokens out of it, or put several in one turn
            body = max(launched.found["loops"], key=lambda loop: loop["instructions"])
            stored, in_loop = (sum(width * n for width, n in part["stores"].items()) // 8 for part in (launched.found, body))
            count = add_turns(launched.found, body, (run * values * size + 4 * M * values - stored) / in_loop)
            cached_bytes += 4 * M
        scalars = normed * 4 * ((4 if backward else 2) * run + 2)
        count["bytes"] -= values * cached_bytes + scalars
        widths = launched.widths - ({32} if normed else set())
        return Figures(name, count, run * values, passes(launched.direction, size, M * mixed), widths=widths)


CASES = (
    MixCase("relu_squared", 0),
    MixCase("1 mix"),
    MixCase("2 mixes", 2),
    MixCase("3 mixes", 3),
    MixCase("1 mix, norm", norm=True),
    MixCase("2 mixes, norm", 2, True),
    MixCase("3 mixes, norm", 3, True),
    MixCase("3 mixes, norm, bf16 results", 3, True, autocast=True),
    MixCase("3 mixes, C=8192", 3, C=8192),
    MixCase("3 mixes, norm, C=8192", 3, True, 8192),
)

NOTES = """
How to read it:

- Columns as in compile_lif.md; *bytes*, *instructions* and *special* per element of x, in a program with one run of tokens (4
  forward, 8 backward), for whole tiles. C = 384 fills three quarters of a tile.
- *floor*: in the forward pass x and an output per mix, in the backward pass x, a gradient per mix and dx, once each. Repeated
  reads from a cache do not count as bytes: the token (and the gradients) that a run shares with its neighbour, the mixes, the
  channels of a token that `token_shift_stats` reads two or three times, and the four numbers that it writes per token. The sums
  for the gradients of the mixes, one row a program, do not count either.
- A norm over more channels than registers hold (forward 4096, backward fewer) takes its sums from `token_shift_stats`. So x,
  and in the backward pass the gradients, are read twice: see *(call)*, beside the floor of one pass.
- In the backward pass, the loop over the tokens of a run is counted by its stores: compilers move tokens out of it, or
  process two in one turn.
"""

MIX = Stem(CASES, CASES[6:7], 1.001, True, NOTES)
