"""A row of figures for every kernel that a call launches, per element of its data."""

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
    """What the report knows of a stem: its calls, and what its kernels may do."""

    cases: tuple
    quick: tuple  # the cases of --quick
    spare: float  # bytes allowed, over the floor
    wide: bool  # accesses of 128 bits are wanted; else an access is as wide as an element
    notes: str  # how to read its tables


class Figures(NamedTuple):
    """What a case finds in a launch of its own."""

    name: str
    count: dict | None = None  # instructions, bytes, {special operation: number} of so many elements; None: not per element
    elements: float = 0
    floor: float = 0  # bytes per element that must move
    steps: int = 1  # of an element: instructions are given per step
    widths: set | None = None  # of its accesses in bits, where not all of them count


class Launched(NamedTuple):
    """A kernel as compiled for one launch."""

    found: dict  # of code.inspect
    arguments: dict  # of the kernel

    @property
    def name(self) -> str:
        return self.found["kernel"].removesuffix("_kernel")

    @property
    def direction(self) -> str:
        return "backward" if "backward" in self.name else "forward"

    @property
    def neurons(self) -> float:
        """Neurons, or channels, that a thread holds."""
        tile = next(self.arguments[name] for name in ("BC", "BLOCK", "BLOCK_SIZE_C") if name in self.arguments)
        return tile * self.arguments.get("BR", 1) / self.found["threads"]

    @property
    def size(self) -> int:
        """Bytes of an element of the data; 4 where a kernel reads none."""
        data = next((self.arguments[name] for name in ("inputs", "k_ptr", "x_ptr", "gs_ptr") if name in self.arguments), None)
        while isinstance(data, tuple):
            data = data[0]
        return 4 if data is None else data.element_size()

    @property
    def widths(self) -> set:
        """Of its accesses, in bits."""
        return {*self.found["loads"], *self.found["stores"]}

    def has(self, name: str, *places: int) -> bool:
        """True if a tensor is given, in the argument of that name or in its tuples at these places."""
        return functools.reduce(operator.getitem, places, self.arguments[name]) is not None


def more_turns(whole: dict, loop: dict, turns: float) -> dict:
    """Counts of the whole, with a loop that runs so many times more often than it stands in the code."""
    count = {key: whole[key] + turns * loop[key] for key in ("instructions", "bytes")}
    special = whole["special"].keys() | loop["special"].keys()
    return count | {"special": {k: whole["special"].get(k, 0) + turns * loop["special"].get(k, 0) for k in special}}


def one_turn(found: dict, parts: int) -> dict:
    """Counts of one turn of the outermost loop. In the backward pass, inner loops recompute the states of a part of a tile over
    the other parts of the tile, (parts - 1) / 2 turns on average; they read from a cache, which does not count as bytes."""
    outer = max(found["outer"], key=lambda loop: loop["instructions"])
    count = {"instructions": outer["instructions"], "special": dict(outer["special"]), "bytes": outer["bytes"]}
    apart = outer in found["loops"]  # the compiler has placed the inner loops behind it
    turns = (parts - 1) / 2 - (not apart)
    for loop in found["loops"]:
        if loop == outer or any("rsq" in operation.lower() for operation in loop["special"]):
            continue  # not an inner loop: the body, with another jump back
        count["instructions"] += loop["instructions"] * turns
        count["bytes"] -= 0 if apart else loop["bytes"]
        for k, n in loop["special"].items():
            count["special"][k] += n * turns
    return count


def row_of(case, compiled, arguments: dict) -> dict:
    """The row of one launch."""
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
    """What the launches of one call move and do together, where there are several, against the floor of a single pass."""
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
    """A row for every kernel that the cases launch on one target; where a peer is missing or fails, its row has a `note`."""
    rows = []
    for case in cases:
        for name, dtype in TYPES.items():
            try:
                if case.load:  # before the stub driver is active: a peer looks for its device when it is imported
                    if reason := harness.missing(case.op):
                        raise ModuleNotFoundError(reason)
                    case.load()
                with launch.launches(target) as found:
                    case.launch(dtype)
            except Exception as error:
                if not case.load:
                    raise  # only another library may fail: it may be of any version
                reason = str(error) if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
                row = {"kernel": case.op, "variant": case.variant, "data": name, "target": target}
                rows.append(row | {"note": f"skipped: {reason}"})
                continue
            new = [row_of(case, compiled, arguments) for compiled, arguments in found]
            rows += new + (_calls(case, new) if hasattr(case, "floor_of_call") else [])
    return rows
