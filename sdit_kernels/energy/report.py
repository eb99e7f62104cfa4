"""Turn the records of a run into rows, totals and energies: which operands are spikes, and what the products cost."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch

from .products import FIELDS, MAX_LEVEL, find_factor
from .recorder import FUSED_COSTS, Operand, Origin, Record, Recorder

SPIKES = ("binary", "signed", "levels")
_ENOUGH_VALUES = 64  # a few floats may be integers times one factor by chance


@dataclass(frozen=True)
class Costs:
    """The energy of each operation, in picojoules, and the assumptions of the estimate. Every value may be replaced.

    Attributes:
        mac: a float32 multiply-add.
        add: a float32 addition: a synaptic operation.
        int_multiply: an 8-bit integer multiplication, in the quantised network.
        int_add: a 32-bit integer addition, in the quantised network.
        byte: reading or writing a byte of ``memory``.
        memory: name of the memory that holds weights and activations, for the report.
        value_bytes: bytes of a weight, a float activation and a result. Spikes take one bit, levels as many bits as they need.
        quantised_weight_bytes: bytes of a weight of the quantised network.
        time_steps: number of time steps of the spiking network that the quantised network replaces by one pass, with that many
            times more levels.

    Raises:
        TypeError, ValueError: a cost is not a number, or is negative or not finite; time_steps is below 1.

    Source: Horowitz, Computing's energy problem, ISSCC 2014 (45 nm; 100 pJ for 64 bits of a memory of 1 MB).

    Example:
        >>> from sdit_kernels.energy import Costs
        >>> Costs(byte=2.5, memory="32 KB SRAM").byte
        2.5
    """

    mac: float = 4.6
    add: float = 0.9
    int_multiply: float = 0.2
    int_add: float = 0.1
    byte: float = 12.5
    memory: str = "1 MB SRAM"
    value_bytes: float = 4
    quantised_weight_bytes: float = 1
    time_steps: int = 1

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "memory":
                if not isinstance(value, str):
                    raise TypeError(f"memory must be a str, got {type(value).__name__}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{f.name} must be a number, got {value!r}")
            elif not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{f.name} must be 0 or more and finite, got {value!r}")
        if self.time_steps < 1:
            raise ValueError(f"time_steps must be at least 1, got {self.time_steps!r}")


@dataclass(frozen=True)
class Input:
    """One operand of a product.

    Attributes:
        kind: "binary" (0 and 1), "signed" (-1, 0 and 1), "levels" (integers times one factor), "floats", "weights" (parameters,
            buffers, and what is computed from them alone), "constant" (as weights, but the other operand is constant too),
            "zeros" (every value was 0), "one value" (every value was the same), "fixed" (the same in every batch, while the
            inputs of the model differed), "indices" (0 and 1 or levels, but computed from integers or masks alone, such as
            one-hot tokens).
        level: the largest absolute level, of "levels"; else 1 for spikes, 0.
        factor: the factor of the levels.
        rate: fraction of values that are not 0; None for weights.
        synaptic_operations: events times fan-out. A level of n is n events.
        nonzero_operations: the same with one event per nonzero value.
        neurons, silent: number of neurons, and of neurons that never fired.
        values: number of values, over all calls.
    """

    kind: str
    values: int
    level: int = 0
    factor: float = 1.0
    rate: float | None = None
    synaptic_operations: int = 0
    nonzero_operations: int = 0
    neurons: int = 0
    silent: int = 0

    @property
    def is_spikes(self) -> bool:
        return self.kind in SPIKES

    @property
    def bits(self) -> int:
        """Return the bits of a value of a spiking operand."""
        return math.ceil(math.log2(self.level + 1)) + (self.kind == "signed")

    def __str__(self) -> str:
        return f"levels to {self.level} x {self.factor:.4g}" if self.kind == "levels" else self.kind


@dataclass(frozen=True)
class Row:
    """A product at one place of the program, over all its calls.

    Attributes:
        layer: name of the module that called it.
        op: the operator of PyTorch.
        shape: shapes of the operands in the first call.
        calls: number of calls.
        macs: multiply-adds of the dense product.
        inputs: the two operands.
        synaptic_operations: additions of an event-driven product; 0 if no operand is spikes. If both are spikes, the operand
            with the smaller number drives the product.
        pairs: number of pairs of events that meet, if both operands are spikes; else None.
    """

    layer: str
    op: str
    shape: str
    calls: int
    macs: int
    inputs: tuple[Input, Input]
    result_values: int
    pairs: int | None = None

    @property
    def driver(self) -> Input | None:
        """Return the operand whose spikes drive the product."""
        return min((i for i in self.inputs if i.is_spikes), key=lambda i: i.synaptic_operations, default=None)

    @property
    def on_spikes(self) -> bool:
        return self.driver is not None

    @property
    def synaptic_operations(self) -> int:
        return self.driver.synaptic_operations if self.driver else 0

    def arithmetic(self, costs: Costs) -> float:
        return self.synaptic_operations * costs.add if self.on_spikes else self.macs * costs.mac

    def traffic(self, costs: Costs) -> float:
        """Return the energy of moving each operand and the result once per call."""
        moved = self.result_values * costs.value_bytes
        moved += sum(i.values * (i.bits / 8 if i.is_spikes else costs.value_bytes) for i in self.inputs)
        return moved * costs.byte

    def quantised(self, costs: Costs) -> tuple[float, float]:
        """Return the energy of arithmetic and of memory if the spikes were integers of a dense network."""
        if not self.on_spikes:
            return self.arithmetic(costs), self.traffic(costs)
        T = costs.time_steps
        moved = self.result_values * costs.value_bytes / T
        for i in self.inputs:
            if i.is_spikes:
                moved += i.values / T * (math.ceil(math.log2(i.level * T + 1)) + (i.kind == "signed")) / 8
            else:
                moved += i.values * (costs.quantised_weight_bytes if i.kind == "weights" else 1 / T)
        return self.macs / T * (costs.int_multiply + costs.int_add), moved * costs.byte


# --- from records to rows -----------------------------------------------------------------------------------------------------


def _levels(numbers: dict[str, list[float]]) -> tuple[int, float, list[int]]:
    """Return the largest level, the factor, and for each call how many of these factors its own factor is.

    The calls share a factor if their values allow it. Else each has its own, and if a call has few values that proves nothing:
    the level is then above MAX_LEVEL.
    """
    used = [f for f, n in zip(numbers["factor"], numbers["nonzero"]) if n]
    fewest = min(n for n in numbers["nonzero"] if n)
    most = max(map(abs, (*numbers["low"], *numbers["high"])))
    _, common, fits = find_factor(torch.tensor(used, dtype=torch.float32, device="cpu"))
    if fits and most <= 1.001 * MAX_LEVEL * common:
        factor = common.item()
        exact = round(factor)
        factor = exact if exact and abs(factor - exact) < 1e-6 * exact else factor
        return round(most / factor), factor, [round(f / factor) for f in numbers["factor"]]
    ones = [1] * len(numbers["factor"])
    if fewest < _ENOUGH_VALUES:
        return MAX_LEVEL + 1, max(used), ones
    each = (max(-low, high) / f for low, high, f in zip(numbers["low"], numbers["high"], numbers["factor"]))
    return round(max(each)), max(used), ones


def _kind(operand: Operand, numbers: dict[str, list[float]], inputs_vary: bool) -> str:
    """Decide what an operand is. The order of the questions is the rule that docs/energy.md explains."""
    low, high = min(numbers["low"]), max(numbers["high"])
    if not any(numbers["nonzero"]):
        return "zeros"
    if low == high:
        return "one value"
    if not all(fits for fits, n in zip(numbers["fits"], numbers["nonzero"]) if n):
        return "floats"
    prints = numbers["fingerprint"]
    if inputs_vary and len(prints) > 1 and len(set(prints)) == 1:
        return "fixed"
    if operand.origin in (Origin.INDEX, Origin.LOOKUP):
        return "indices"
    level, factor, _ = _levels(numbers)
    has_zero = sum(numbers["nonzero"]) < operand.values
    if not has_zero and low > 0 and (operand.values >= _ENOUGH_VALUES or round(min(numbers["least"]) / factor) > 1):
        return "floats"  # an offset plus levels
    if operand.origin == Origin.GIVEN and factor != round(factor):
        return "floats"  # pixels, for example k / 16
    if level == 1 and factor == 1:
        return "signed" if low < 0 else "binary"
    return "levels" if level <= MAX_LEVEL else "floats"


def _read(operand: Operand) -> dict[str, list[float]]:
    """Copy the measurements of an operand from its device: {field: value per call}."""
    table = torch.stack(operand.measured).cpu()
    return {name: table[:, i].tolist() for i, name in enumerate(FIELDS)}


def _input(operand: Operand, other: Operand, inputs_vary: bool) -> tuple[Input, dict[str, list[float]], list[int]]:
    """Return an operand of a row, its measurements per call, and its levels per measured level for each call."""
    if operand.origin is None:
        return Input("floats", operand.values), {}, []
    if operand.origin < Origin.INDEX:
        constant = other.origin is not None and other.origin < Origin.INDEX
        return Input("constant" if constant else "weights", operand.values), {}, []
    numbers = _read(operand)
    kind = _kind(operand, numbers, inputs_vary)
    nonzero = sum(numbers["nonzero"])
    fired = [fired.sum().item() for fired in operand.fired.values()]
    neurons = sum(operand.fired)
    level, factor, per_level = _levels(numbers) if kind in SPIKES else (0, 1.0, [])
    found = Input(
        kind=kind, values=operand.values, level=level, factor=float(factor), rate=nonzero / max(operand.values, 1),
        synaptic_operations=round(sum(m * n for m, n in zip(numbers["magnitude"], per_level))),
        nonzero_operations=round(sum(numbers["events"])) if kind in SPIKES else 0,
        neurons=neurons, silent=neurons - int(sum(fired)),
    )  # fmt: skip
    return found, numbers, per_level


def row(record: Record, inputs_vary: bool) -> Row:
    (a, numbers, a_levels), (b, _, b_levels) = (
        _input(operand, other, inputs_vary) for operand, other in zip(record.operands, reversed(record.operands))
    )
    pairs = None
    if a.is_spikes and b.is_spikes:
        pairs = round(sum(p * m * n for p, m, n in zip(numbers["pair_magnitude"], a_levels, b_levels)))
    return Row(
        record.layer, record.op, record.shape, record.calls, record.macs, (a, b), record.result_values, pairs,
    )  # fmt: skip


def _differ(batches: list[list[torch.Tensor]]) -> bool:
    """True if the model was given different tensors in different batches."""
    values = {tuple(t.item() for t in batch) for batch in batches if batch}
    return len(values) > 1


# --- the report ---------------------------------------------------------------------------------------------------------------


class Report:
    """What a run costs: one row per product, totals and three energies. ``print(report)`` prints the table.

    ``energy.count`` makes it. All numbers are sums over everything that was counted: divide by the number of samples yourself.

    Attributes:
        costs: the energy constants and assumptions, a :class:`Costs`.
        batches: number of calls of the model.
        rows: a :class:`Row` per product, in the order of their first calls.
        unknown: {(operator, layer): calls} of operators that may contain products and were not counted.
        fused: {(operator, layer): elements} of the elementwise work of this package's operators. Not in the totals.

    Example:
        >>> import torch
        >>> from sdit_kernels import energy
        >>> net = torch.nn.Linear(100, 10)
        >>> report = energy.count(net, (torch.rand(4, 100) < 0.2).float())
        >>> report.macs, report.products, report.products_on_spikes
        (4000, 1, 1)
    """

    def __init__(self, recorder: Recorder, costs: Costs):
        self.costs = costs
        self._recorder = recorder
        self._rows: tuple[int, list[Row]] = (-1, [])

    def with_costs(self, costs: Costs) -> "Report":
        """Return a report of the same run with other energy constants. The model does not run again."""
        return Report(self._recorder, check_costs(costs))

    @property
    def batches(self) -> int:
        return self._recorder.batches

    @property
    def rows(self) -> list[Row]:
        recorder = self._recorder
        calls = sum(record.calls for record in recorder.records.values())
        if self._rows[0] != calls:  # reading the rows waits for the device, so keep them
            vary = _differ(recorder.inputs)
            self._rows = calls, [row(record, vary) for record in recorder.records.values()]
        return self._rows[1]

    @property
    def unknown(self) -> dict[tuple[str, str], int]:
        return dict(self._recorder.unknown)

    @property
    def fused(self) -> dict[tuple[str, str], int]:
        return dict(self._recorder.fused)

    @property
    def macs(self) -> int:
        """Multiply-adds of all products, counted as if they were dense."""
        return sum(row.macs for row in self.rows)

    @property
    def macs_on_floats(self) -> int:
        """Multiply-adds of the products that see floats."""
        return sum(row.macs for row in self.rows if not row.on_spikes)

    @property
    def synaptic_operations(self) -> int:
        """Additions of the products on spikes."""
        return sum(row.synaptic_operations for row in self.rows)

    @property
    def products(self) -> int:
        return len(self.rows)

    @property
    def products_on_spikes(self) -> int:
        return sum(row.on_spikes for row in self.rows)

    @property
    def energy_parts_pj(self) -> dict[str, dict[str, float]]:
        """Arithmetic and memory of the spiking network and of the quantised network, in picojoules."""
        quantised = [row.quantised(self.costs) for row in self.rows]
        return {
            "spiking": {
                "arithmetic": sum(row.arithmetic(self.costs) for row in self.rows),
                "memory": sum(row.traffic(self.costs) for row in self.rows),
            },
            "quantised": {"arithmetic": sum(a for a, _ in quantised), "memory": sum(m for _, m in quantised)},
        }

    @property
    def energy_pj(self) -> dict[str, float]:
        """Three estimates in picojoules: "arithmetic"; "with_memory"; "quantised", the dense network with its memory."""
        parts = self.energy_parts_pj
        return {
            "arithmetic": parts["spiking"]["arithmetic"],
            "with_memory": sum(parts["spiking"].values()),
            "quantised": sum(parts["quantised"].values()),
        }

    def fused_work(self) -> dict[str, dict[str, float]]:
        """Return {operator: elements, multiply-adds, additions, energy} of this package's operators."""
        elements: Counter[str] = Counter()
        for (op, _), n in self.fused.items():
            elements[op] += n
        found = {}
        for op, n in elements.items():
            macs, adds = (n * each for each in FUSED_COSTS[op])
            energy = macs * self.costs.mac + adds * self.costs.add
            found[op] = {"elements": n, "macs": macs, "additions": adds, "energy_pj": energy}
        return found

    def to_dict(self) -> dict:
        """Return all figures as plain numbers, strings, lists and dicts."""
        return {
            "macs": self.macs,
            "synaptic_operations": self.synaptic_operations,
            "energy_pj": self.energy_pj,
            "products": self.products,
            "products_on_spikes": self.products_on_spikes,
            "macs_on_floats": self.macs_on_floats,
            "energy_parts_pj": self.energy_parts_pj,
            "costs": asdict(self.costs),
            "batches": self.batches,
            "rows": [
                asdict(row) | {"on_spikes": row.on_spikes, "synaptic_operations": row.synaptic_operations} for row in self.rows
            ],
            "fused": self.fused_work(),
            "unknown": [{"op": op, "layer": layer, "calls": n} for (op, layer), n in self.unknown.items()],
        }

    def to_json(self, **options) -> str:
        """Return ``to_dict()`` as JSON. options: of ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    def table(self) -> str:
        """Return the table of the products, then the totals."""
        return "\n".join([*self._product_lines(), *self._float_lines(), *self._other_lines(), *self._energy_lines()])

    __str__ = table

    def _product_lines(self) -> list[str]:
        heads = ("layer", "product", "shape", "calls", "multiply-adds", "input", "nonzero", "synaptic operations", "silent")
        cells = [heads]
        for r in self.rows:
            for i in r.inputs:
                if i.kind in ("weights", "constant") and not (r.inputs[0].kind == r.inputs[1].kind and i is r.inputs[0]):
                    continue
                first = i is _first_shown(r)
                cells.append((
                    *((r.layer or "(model)", r.op, r.shape, f"{r.calls:,}", f"{r.macs:,}") if first else ("",) * 5),
                    str(i), "" if i.rate is None else f"{i.rate:.4f}", f"{i.synaptic_operations:,}" if i.is_spikes else "",
                    f"{i.silent:,} of {i.neurons:,}" if i.is_spikes else "",
                ))  # fmt: skip
            if r.pairs is not None:
                cells.append(("",) * 5 + ("pairs of events", "", f"{r.pairs:,}", ""))
        return _aligned(cells, left=(0, 1, 2, 5))

    def _float_lines(self) -> list[str]:
        counted = "1 batch" if self.batches == 1 else f"{self.batches:,} batches"
        lines = ["", f"{self.products_on_spikes} of {self.products} products see spikes ({counted})"]
        dense = [f"{r.layer or '(model)'}: {r.op} ({', '.join(map(str, r.inputs))})" for r in self.rows if not r.on_spikes]
        if dense:
            lines += ["products that do not see spikes:", *(f"  {line}" for line in dense)]
        if self.batches < 2 and self.products_on_spikes:
            lines.append("counted on one batch: a fixed pattern of 0 and 1 looks like spikes, so count several batches")
        return lines

    def _other_lines(self) -> list[str]:
        lines = []
        if self.unknown:
            lines += ["", "NOT COUNTED, may contain products:"]
            lines += [f"  {op} in {layer or '(model)'}: {n:,} calls" for (op, layer), n in self.unknown.items()]
        work = self.fused_work()
        if work:
            lines += ["", "elementwise work of fused operators, not in the totals:"]
            lines += [
                f"  {op}: {w['elements']:,} elements, {w['macs']:,} multiply-adds, {w['additions']:,} additions, "
                f"{_joules(w['energy_pj'])}"
                for op, w in work.items()
            ]
        return lines

    def _energy_lines(self) -> list[str]:
        c, energy, parts = self.costs, self.energy_pj, self.energy_parts_pj["quantised"]
        return [
            "",
            f"multiply-adds {self.macs:,}, of them on floats {self.macs_on_floats:,}; "
            f"synaptic operations {self.synaptic_operations:,}",
            f"energy, arithmetic alone:        {_joules(energy['arithmetic']):>12s}   {c.mac} pJ a multiply-add, {c.add} pJ an "
            "addition (float32)",
            f"energy, with memory:             {_joules(energy['with_memory']):>12s}   {c.byte} pJ a byte ({c.memory}); "
            f"operands and results move once a call, {c.value_bytes:g} bytes a value, spikes as bits",
            f"energy of the quantised network: {_joules(energy['quantised']):>12s}   integers of the same levels instead of "
            f"spikes, {c.time_steps} time step(s) in one pass, {c.int_multiply} + {c.int_add} pJ a multiply-add; of it memory "
            f"{_joules(parts['memory'])}",
        ]


def _first_shown(r: Row) -> Input:
    return next((i for i in r.inputs if i.kind not in ("weights", "constant")), r.inputs[0])


def _aligned(cells: Iterable[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    columns = list(zip(*cells))
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in zip(*columns)
    ]


def _joules(pj: float) -> str:
    for unit, size in (("J", 1e12), ("mJ", 1e9), ("uJ", 1e6), ("nJ", 1e3)):
        if pj >= size:
            return f"{pj / size:.4g} {unit}"
    return f"{pj:.4g} pJ"


def check_costs(costs: Costs) -> Costs:
    if not isinstance(costs, Costs):
        raise TypeError(f"costs must be a sdit_kernels.energy.Costs, got {type(costs).__name__}")
    return costs
