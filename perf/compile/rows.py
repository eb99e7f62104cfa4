"""Make a row of figures per element of the data for every kernel that a call launches."""

import functools
import operator
from typing import NamedTuple

import torch

from perf import harness
from perf.compile import code, launch

SHAPE = (2, 394, 384)  # batch, tokens, channels of SDiT
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD = ("registers", "spills", "spill_bytes", "shared", "warps_resident", "warps_max", "limited_by", "loads", "stores")


class Stem(NamedTuple):
    """The calls of a stem, and the limits of its kernels."""

    cases: tuple
    quick: tuple  # the cases of --quick
    spare: float  # allowed bytes / floor
    wide: bool  # True: accesses should have 128 bits; False: an access is as wide as an element
    notes: str  # how to read the tables of the stem


class Figures(NamedTuple):
    """The figures of one launch of a case."""

    name: str
    count: dict | None = None  # instructions, bytes, {special operation: number}; None if not per element
    elements: float = 0  # number of elements that count covers
    floor: float = 0  # bytes per element that must move
    steps: int = 1  # time steps of an element; instructions are reported per step
    widths: set | None = None  # widths in bits of the accesses that count; None: all


class Launched(NamedTuple):
    """A kernel as compiled for one launch."""

    found: dict  # the row of code.inspect
    arguments: dict  # arguments of the kernel

    @property
    def name(self) -> str:
        return self.found["kernel"].removesuffix("_kernel")

    @property
    def direction(self) -> str:
        return "backward" if "backward" in self.name else "forward"

    @property
    def neurons(self) -> float:
        """Number of neurons or channels that a thread holds."""
        tile = next(self.arguments[name] for name in ("BC", "BLOCK", "BLOCK_SIZE_C") if name in self.arguments)
        return tile * self.arguments.get("BR", 1) / self.found["threads"]

    @property
    def size(self) -> int:
        """Bytes of an element of the data; 4 if a kernel reads no data."""
        data = next(
            (self.arguments[name] for name in ("inputs", "k_ptr", "x_ptr", "gs_ptr", "out_ptr") if name in self.arguments), None
        )
        while isinstance(data, tuple):
            data = data[0]
        return 4 if data is None else data.element_size()

    @property
    def widths(self) -> set:
        """Widths of its memory accesses, in bits."""
        return {*self.found["loads"], *self.found["stores"]}

    def has(self, name: str, *places: int) -> bool:
        """Return True if the argument, or the element of its nested tuples at these places, is not None."""
        return functools.reduce(operator.getitem, places, self.arguments[name]) is not None


def add_turns(whole: dict, loop: dict, turns: float) -> dict:
    """Add ``turns`` further turns of a loop to the counts of a whole kernel."""
    count = {key: whole[key] + turns * loop[key] for key in ("instructions", "bytes")}
    special = whole["special"].keys() | loop["special"].keys()
    return count | {"special": {k: whole["special"].get(k, 0) + turns * loop["special"].get(k, 0) for k in special}}


def count_one_turn(found: dict, parts: int) -> dict:
    """Return the counts of one turn of the outermost loop.

    In the backward pass, inner loops recompute the states of one part of a tile from the earlier parts, in (parts - 1) / 2
    turns on average. They read from a cache, so these reads do not count as bytes.
    """
    outer = max(found["outer"], key=lambda loop: loop["instructions"])
    count = {"instructions": outer["instructions"], "special": dict(outer["special"]), "bytes": outer["bytes"]}
    apart = outer in found["loops"]  # the compiler has placed the inner loops behind it
    turns = (parts - 1) / 2 - (not apart)
    for loop in found["loops"]:
        if loop == outer or any("rsq" in operation.lower() for operation in loop["special"]):
            continue  # not an inner loop, but the body with a second jump back
        count["instructions"] += loop["instructions"] * turns
        count["bytes"] -= 0 if apart else loop["bytes"]
        for k, n in loop["special"].items():
            count["special"][k] += n * turns
    return count


def row_of(case, compiled, arguments: dict) -> dict:
    """Return the row of one launch."""
    launched = Launched(code.inspect(compiled), arguments)
    found, figures = launched.found, case.figures(launched)
    data = "fp32" if launched.size == 4 else "bf16"
    row = {"kernel": figures.name, "variant": case.variant, "data": data, "target": found["target"]}
    row |= {"neurons_per_thread": launched.neurons} | {key: found[key] for key in HEAD}
    row |= {"scalar_spills": found.get("scalar_spills"), "narrowest": min(figures.widths or launched.widths)}
    row |= dict.fromkeys(("bytes_per_element", "floor", "instructions_per_step", "special_per_step"))
    if figures.count:
        per = code.per_element(figures.count, figures.elements)
        row |= {"bytes_per_element": per["bytes_per_element"], "floor": figures.floor}
        row |= {f"{key}_per_step": per[f"{key}_per_element"] / figures.steps for key in ("instructions", "special")}
        if found["target"] == "cuda:90":
            row |= code.limits_h100(per)
    return row


def _calls(case, rows: list[dict]) -> list[dict]:
    """Sum the rows of the launches of one call, if there are several, and compare the sum with the floor of a single pass."""
    found = []
    counted = [row for row in rows if row["bytes_per_element"] is not None]
    for direction in ("forward", "backward"):
        parts = [row for row in counted if ("backward" in row["kernel"]) == (direction == "backward")]
        if len(parts) < 2:
            continue
        first, last = parts[0], parts[-1]
        total = {"kernel": f"{last['kernel'].split(f'_{direction}')[0]}_{direction} (call)"}
        total |= {key: first[key] for key in ("variant", "data", "target")}
        keys = ("bytes_per_element", "instructions_per_step", "special_per_step")
        total |= {key: sum(row[key] for row in parts) for key in keys} | {"floor": case.floor_of_call(direction, last)}
        if total["target"] == "cuda:90":
            per = {key.replace("_step", "_element"): total[key] for key in keys}
            total |= code.limits_h100(per)
        found.append(total)
    return found


def rows_of(target: str, cases) -> list[dict]:
    """Return a row per kernel that the cases launch on one target. The row of a missing or failing peer has a `note`."""
    rows = []
    for case in cases:
        for name, dtype in TYPES.items():
            try:
                if case.load:  # before the stub driver is active, because a peer looks for its device at import
                    if reason := harness.reason_if_missing(case.op):
                        raise ModuleNotFoundError(reason)
                    case.load()
                with launch.launches(target) as found:
                    case.launch(dtype)
            except Exception as error:
                if not case.load:
                    raise  # only another library may fail, because it may have any version
                reason = str(error) if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
                row = {"kernel": case.op, "variant": case.variant, "data": name, "target": target}
                rows.append(row | {"note": f"skipped: {reason}"})
                continue
            new = [row_of(case, compiled, arguments) for compiled, arguments in found]
            rows += new + (_calls(case, new) if hasattr(case, "floor_of_call") else [])
    return rows
