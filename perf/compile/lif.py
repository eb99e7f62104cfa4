"""The calls of lif, lif_rate, leaky, lapicque, cuba and adlif, and of SpikingJelly's LIF."""

from typing import NamedTuple

import torch

import sdit_kernels
from perf import peers
from perf.compile.rows import SHAPE, Figures, Launched, Stem, add_turns
from perf.ops import passes

STRETCH = 16  # time steps that a LIF kernel holds in registers; for a longer T, it loops over stretches


# op: (settings as numbers, names of its parameters)
NEURONS = {
    "lif": ({}, ("tau", "v_threshold")),
    "leaky": ({"beta": 0.5}, ("beta", "v_threshold")),
    "lapicque": ({"R": 1.0, "C": 2.0}, ("R", "C", "time_step", "v_threshold")),
    "cuba": ({"beta_i": 0.5, "beta": 0.5}, ("beta_i", "beta", "v_threshold")),
    "adlif": ({"beta": 0.5, "beta_w": 0.5, "a": 0.5, "b": 1.0}, ("beta", "beta_w", "a", "b", "v_threshold")),
}
NEURONS["lif_rate"] = NEURONS["lif"]
TWO_STATES = ("cuba", "adlif")


class Case(NamedTuple):
    """A call of a neuron's op, forward and backward."""

    variant: str
    op: str = "lif"
    T: int = 4
    v: bool = False  # with the states as input, and their gradients
    parameters: str = ""  # learnt parameters, see NEURONS: "scalar" or "channel"; "" for constants
    extras: bool = False  # lif_rate: with residual and gate
    levels: str | tuple[int, int] | None = None  # with a soft reset

    load = None

    def launch(self, dtype):
        def tensor(*leading, wanted=True):
            return torch.empty(*leading, *SHAPE, dtype=dtype, requires_grad=wanted)

        inputs = [tensor() if self.op == "lif_rate" else tensor(self.T)]
        keywords, names = NEURONS[self.op]
        keywords = keywords | ({"T": self.T} if self.op == "lif_rate" else {})
        states = [tensor() for _ in range(self.states)] if self.v else []
        if self.v:
            inputs.append(tuple(states) if self.op in TWO_STATES else states[0])
        if self.parameters:
            size = () if self.parameters == "scalar" else SHAPE[-1:]
            keywords |= {name: torch.full(size, 1.0, requires_grad=True) for name in names}
        if self.levels is not None:
            keywords |= {"levels": self.levels, "v_reset": None}
        if self.extras:
            keywords |= {"residual": tensor(wanted=False), "gate": tensor()}
        wanted = [t for t in (inputs[0], *states, *keywords.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
        with sdit_kernels.backend("triton"):
            out = getattr(sdit_kernels, self.op)(*inputs, **keywords)
            torch.autograd.grad(out, wanted, torch.empty_like(out))

    @property
    def states(self) -> int:
        return 2 if self.op in TWO_STATES else 1

    def floor(self, direction: str, size: int, rows: int = 1) -> float:
        """Return the bytes per element of x that must move.

        ``size`` is the bytes of an element; ``rows`` is the number of rows of a tile that share the parameters of a channel.
        States (a membrane input, the checkpoint) count once per neuron and stretch, vectors of parameters once per program.
        """
        backward, per_neuron, count = direction == "backward", 0, len(NEURONS[self.op][1])
        if self.T > STRETCH and self.op != "lif_rate":
            per_neuron += 4 * self.states  # the checkpoint
        if self.v:
            per_neuron += self.states * (2 * size if backward else size)
        if self.parameters == "channel":
            per_neuron += count * (8 if backward else 4) / rows  # backward: also their partial gradients
        tensors = passes(direction, 2) + (not backward) if self.extras else passes(direction, 1)  # residual
        return tensors * size + per_neuron / (1 if self.op == "lif_rate" else min(self.T, STRETCH))

    def figures(self, launched: Launched) -> Figures:
        count, widths, steps = launched.found, launched.widths, min(self.T, STRETCH)  # the code of one stretch represents all
        if self.op == "lif_rate" and self.T > STRETCH:
            steps = self.T
            count = add_turns(count, *count["loops"], self.T - 1)
        # The scalars, which all threads load, and the partial sums, one number per program, do not count.
        if self.parameters == "scalar":
            small = launched.found["loads"].get(32, 0) + launched.found["stores"].get(32, 0)
            count, widths = count | {"bytes": count["bytes"] - 4 * small}, widths - {32}
        elif not self.parameters and self.op == "adlif":  # its fifth number travels as a tensor; other loads repeat per step
            small = launched.found["loads"].get(32, 0) % steps
            count = count | {"bytes": count["bytes"] - 4 * small}
            if launched.found["loads"].get(32) == small and 32 not in launched.found["stores"]:
                widths = widths - {32}
        floor = self.floor(launched.direction, launched.size, launched.arguments.get("BR", 1))
        if self.op == "lif_rate":
            return Figures(launched.name, count, launched.neurons, floor, steps, widths)
        return Figures(launched.name, count, launched.neurons * steps, floor, widths=widths)


class SpikingJelly(NamedTuple):
    """A call of SpikingJelly's LIF. Its floor is the floor of lif without a membrane input."""

    variant: str
    T: int = 4
    op: str = "spikingjelly"

    load = staticmethod(peers.load_spikingjelly_kernels)

    def launch(self, dtype):
        peers.launch_spikingjelly(self.load(), torch.empty(self.T, *SHAPE, dtype=dtype))

    def figures(self, launched: Launched) -> Figures:
        if not launched.found["loops"]:  # the compiler unrolled the loop over time
            return Figures(
                f"spikingjelly{launched.name}",
                launched.found,
                launched.neurons * self.T,
                passes(launched.direction, 1) * launched.size,
            )
        (loop,) = launched.found["loops"]
        turns = (
            self.T * launched.neurons * (2 * launched.size + 4) / loop["bytes"]
        )  # bytes of a step: x, or h and g, and a membrane
        count = add_turns(launched.found, loop, turns - 1)
        return Figures(
            f"spikingjelly{launched.name}", count, launched.neurons * self.T, passes(launched.direction, 1) * launched.size
        )


CASES = (
    Case("T=4"),
    Case("T=16", T=16),
    Case("T=32", T=32),
    Case("T=4, v given", v=True),
    Case("T=4, learnt scalars", parameters="scalar"),
    Case("T=4, learnt channels", parameters="channel"),
    Case("T=16, learnt channels", T=16, parameters="channel"),
    Case("T=32, learnt channels", T=32, parameters="channel"),
    Case("T=4, integers", levels=(0, 4)),
    Case("T=32, integers", T=32, levels=(0, 4)),
    Case("T=4, integers, learnt channels", parameters="channel", levels=(0, 4)),
    Case("T=4, ternary", levels="ternary"),
    Case("T=4", "lif_rate"),
    Case("T=32", "lif_rate", T=32),
    Case("T=4, gate, residual", "lif_rate", extras=True),
    Case("T=1, integers", "lif_rate", T=1, levels=(0, 4)),
    Case("T=4, learnt scalars", "lif_rate", parameters="scalar"),
    Case("T=4, learnt channels", "lif_rate", parameters="channel"),
    SpikingJelly("T=4"),
    SpikingJelly("T=16", 16),
)
LEAKY_CASES = tuple(case._replace(op="leaky") for case in CASES[:6]) + (CASES[7]._replace(op="leaky"),)
QUICK = tuple(c for c in CASES if c.T == 4 and c.variant in ("T=4", "T=4, learnt channels", "T=4, gate, residual"))

LIF_NOTES = """
How to read it:

- *registers*, *spills* and *shared* (bytes per program) are the compiler's own figures. *(+n scalar)*: on AMD, scalar registers
  moved to lanes of a vector register; that costs an instruction, not memory. *resident*: warps (AMD: waves) that an SM, CU or
  WGP holds at once, and how many it could hold.
- *loads*, *stores*: width in bits x number of accesses of this width in the code of a thread.
- *bytes* per element of x (`lif`: T x neurons; `lif_rate`: neurons), beside the *floor*: each tensor is read or written once.
  With b bytes an element, `lif` moves 2 b in the forward pass and 3 b in the backward pass. A given membrane, a checkpoint per
  16 steps (T > 16), gate and residual add to that; so do, once per program, the parameters of its channels and their gradients
  (counted for a small input, where a program has one tile; on large inputs it has several).
- *instructions* and *special* (reciprocals, exponentials) per neuron and step include everything: addresses, loads, stores,
  and the work that a program does only once. On gfx1100 the scheduler's hints (`s_delay_alu`) count as instructions.
- *paper*: lower limits for an H100 SXM from these counts and its data sheet, in ms per 1e9 elements of x. *bound by* names the
  largest. This is arithmetic on paper, not a prediction.
- learnt: tau and v_threshold are tensors that require gradients. T=32 is a loop over stretches of 16 steps. Backward kernels
  that keep many values per neuron use narrower tiles, so that no register spills. Their accesses have 64 or 32 bits and are
  contiguous across the warp.
- integers: levels=(0, 4); they and ternary spikes have a soft reset. An exact division takes about ten instructions.
- `spikingjelly`: its Triton kernels for LIF with its own launch settings. They take a membrane and return one. The forward
  kernel writes the charge of every step in fp32 for the backward kernel. Their floor is the floor of `lif` without a membrane.
"""
LEAKY_NOTES = """\

- Columns as in compile_lif.md; reset "subtract", with delay. `leaky` moves as many bytes as `lif`: with b bytes an element, 2 b
  in the forward pass and 3 b in the backward pass.
"""

CUBA_CASES = (
    *(case._replace(op="cuba") for case in LEAKY_CASES), Case("T=16, learnt channels", "cuba", T=16, parameters="channel"),
    Case("T=4", "adlif"), Case("T=16", "adlif", T=16), Case("T=4, learnt channels", "adlif", parameters="channel"),
    Case("T=4", "lapicque"), Case("T=4, learnt channels", "lapicque", parameters="channel"),
)  # fmt: skip
CUBA_NOTES = """\

- Columns as in compile_lif.md; reset "subtract", with delay. `cuba` and `adlif` have two states, `lapicque` has one. They
  move as many bytes as `lif`: with b bytes an element, 2 b in the forward pass and 3 b in the backward pass. A checkpoint per
  16 steps and given states count once per state.
"""

LIF = Stem(CASES, QUICK, 1.001, True, LIF_NOTES)
LEAKY = Stem(LEAKY_CASES, LEAKY_CASES[:1], 1.001, True, LEAKY_NOTES)
CUBA = Stem(CUBA_CASES, (CUBA_CASES[0],), 1.001, True, CUBA_NOTES)
