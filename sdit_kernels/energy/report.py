"""Turn the records of a run into rows, totals and energies: which operands are spikes, and what the products cost."""

import json
import math
import numbers
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch

from ..checks import is_number
from .products import FIELDS, MAX_LEVEL, find_factor
from .recorder import FUSED_COSTS, Operand, Origin, Record, Recording

SPIKES = ("binary", "signed", "levels")
# A few floats may be integers times one factor by chance. One value always is; two are in a thousandth of cases in float32.
_ENOUGH_VALUES = 64
_ENOUGH_WITH_ONE_FACTOR = 2
_ENOUGH_ROUNDED = 16  # with one factor, in float16 and bfloat16


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
        value_bytes: bytes of a weight, a float activation and a result, whatever dtype the model runs in. Spikes take one bit,
            levels as many bits as they need.
        quantised_weight_bytes: bytes of a weight of the quantised network.
        time_steps: number of time steps of the spiking network that the quantised network replaces by one pass, with that many
            times more levels.
        step_by_step: True if every call of a layer is one time step, as in a loop over time. The quantised network then reads
            its weights once in ``time_steps`` calls. False if a call has all time steps.

    Raises:
        TypeError: a cost is not a number, time_steps is not an int, memory is not a str, or step_by_step is not a bool.
        ValueError: a cost is negative or not finite; time_steps is below 1.

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
    step_by_step: bool = False

    def __post_init__(self):
        for f in fields(self):
            name, value = f.name, getattr(self, f.name)
            if f.type in (str, bool):
                if not isinstance(value, f.type):
                    raise TypeError(f"{name} must be a {f.type.__name__}, got {value!r}")
                continue
            wanted, kind = ("an int", numbers.Integral) if f.type is int else ("a number", numbers.Real)
            if not is_number(value) or not isinstance(value, kind):
                raise TypeError(f"{name} must be {wanted}, got {value!r}")
            least = 1 if f.type is int else 0
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} must be {least} or more and finite, got {value!r}")
            object.__setattr__(self, name, f.type(value))  # numpy's numbers become Python's


@dataclass(frozen=True)
class Input:
    """One operand of a product.

    Attributes:
        kind: "binary" (0 and 1), "signed" (-1, 0 and 1), "levels" (more integers), all three times one factor per call;
            "floats"; "weights" (parameters, buffers, and what is computed from them alone); "constant" (as weights, but the
            other operand is constant too); "zeros" (every value was 0); "one value" (every value was the same); "fixed" (the
            same in every call, while the data of the model changed); "indices" (0 and 1 or levels, but computed from integers
            or masks alone, such as one-hot tokens).
        level: the largest absolute level: above 1 for "levels", 1 for "binary" and "signed", else 0.
        factor: the factor of the levels; None if it differs from call to call. Each call has its own.
        negative: True if spikes are also below 0.
        rate: fraction of values that are not 0; None for weights.
        synaptic_operations: events times fan-out. A level of n is n events.
        nonzero_operations: the same with one event per nonzero value.
        neurons, silent: number of neurons, and of neurons that never fired.
        values: number of values, over all calls. A value that is broadcast is one value; its events count once for each
            multiply-add that they take part in.
    """

    kind: str
    values: int
    level: int = 0
    factor: float | None = 1.0
    negative: bool = False
    rate: float | None = None
    synaptic_operations: int = 0
    nonzero_operations: int = 0
    neurons: int = 0
    silent: int = 0

    @property
    def is_spikes(self) -> bool:
        return self.kind in SPIKES

    def bits(self, time_steps: int = 1) -> int:
        """Return the bits of the sum of a spiking operand over time steps."""
        return math.ceil(math.log2(self.level * time_steps + 1)) + self.negative

    def __str__(self) -> str:
        times = "a factor per call" if self.factor is None else f"{self.factor:.4g}"
        if self.kind == "levels":
            return f"levels to {self.level} x {times}"
        return self.kind if self.factor == 1 else f"{self.kind} x {times}"


@dataclass(frozen=True)
class Row:
    """A product at one place of the program, over all its calls. Calls on spikes and calls on floats have a row each.

    A place is a position in the code of a module, or of a function that it calls. So a loop, a layer that is called twice, and
    a shared function of one layer are one row.

    Attributes:
        layer: name of the module that called it; "" for the model itself; "(no module)" if no module was running.
        op: the operator of PyTorch.
        shape: shapes of the operands in the first call.
        calls: number of calls.
        macs: multiply-adds of the dense product.
        inputs: the two operands, each an :class:`Input`.
        result_values: number of values of the results, over all calls.
        driver: the operand whose spikes drive the product, None if no operand is spikes.
        on_spikes: True if an operand is spikes.
        on_zeros: True if no operand is spikes, and every value of an operand was 0.
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
    def on_zeros(self) -> bool:
        """True if no operand is spikes, and every value of an operand was 0."""
        return not self.on_spikes and any(i.kind == "zeros" for i in self.inputs)

    @property
    def synaptic_operations(self) -> int:
        return self.driver.synaptic_operations if self.driver else 0

    def arithmetic(self, costs: Costs) -> float:
        return self.synaptic_operations * costs.add if self.on_spikes else self.macs * costs.mac

    def traffic(self, costs: Costs) -> float:
        """Return the energy of moving each operand and the result once per call."""
        moved = self.result_values * costs.value_bytes
        moved += sum(i.values * (i.bits() / 8 if i.is_spikes else costs.value_bytes) for i in self.inputs)
        return moved * costs.byte

    def quantised(self, costs: Costs) -> tuple[float, float]:
        """Return the energy of arithmetic and of memory if the spikes were integers of a dense network."""
        if not self.on_spikes:
            return self.arithmetic(costs), self.traffic(costs)
        T = costs.time_steps
        moved = self.result_values * costs.value_bytes / T
        for i in self.inputs:
            if i.is_spikes:
                moved += i.values / T * i.bits(T) / 8
            elif i.kind == "weights":
                moved += i.values * costs.quantised_weight_bytes / (T if costs.step_by_step else 1)
            else:
                moved += i.values / T
        return self.macs / T * (costs.int_multiply + costs.int_add), moved * costs.byte


# --- from records to rows -----------------------------------------------------------------------------------------------------


Numbers = dict[str, float]  # products.FIELDS of an operand in one call


@dataclass(frozen=True)
class Levels:
    """The calls in which an operand is on a grid of levels, each with a factor of its own."""

    most: int = 0
    factor: float | None = 1.0  # None: it differs from call to call
    calls: frozenset[int] = frozenset()


def _near_integer(x: float) -> float:
    """Return the integer next to x if x differs from it by rounding alone, else x."""
    exact = round(x)
    return exact if exact and abs(x - exact) < 1e-6 * exact else x


def _is_simple(factor: float) -> bool:
    """True if a factor or its inverse is a small integer, as for averages of spikes. Floats rarely have such a factor."""
    return any(x < 4096 and _near_integer(x) == round(x) for x in (factor, 1 / factor))


def _find_levels(calls: dict[int, tuple[Operand, Numbers]]) -> Levels:
    """Find the levels of calls that are each on a grid of their own. Calls whose grid may be chance are left out.

    Each call has its own factor. But if the factors are multiples of one, all calls together prove that they are on a grid.
    """
    if not calls:
        return Levels()
    _, common, fits = find_factor(
        torch.tensor([n["factor"] for _, n in calls.values()], dtype=torch.float64, device="cpu"), 2**-23
    )
    enough = _ENOUGH_WITH_ONE_FACTOR if all(operand.eps < 1e-5 for operand, _ in calls.values()) else _ENOUGH_ROUNDED
    together = fits and max(_most(n) for _, n in calls.values()) <= 1.001 * MAX_LEVEL * common
    if together and (_is_simple(common.item()) or sum(n["nonzero"] for _, n in calls.values()) >= enough):
        proven = {c: n for c, (_, n) in calls.items()}
    else:
        proven = {c: n for c, (_, n) in calls.items() if _is_proven(n, enough)}
    if not proven:
        return Levels()
    factors = [n["factor"] for n in proven.values()]
    same = max(factors) - min(factors) < 1e-6 * max(factors)
    return Levels(max(map(_level, proven.values())), _near_integer(max(factors)) if same else None, frozenset(proven))


def _most(n: Numbers) -> float:
    return max(-n["low"], n["high"])


def _level(n: Numbers) -> int:
    """Return the largest level of an operand in one call."""
    return round(_most(n) / n["factor"])


def _is_proven(n: Numbers, enough: int) -> bool:
    """True if the values of one call prove that they are on a grid. ``enough`` equal values do."""
    return _is_simple(n["factor"]) or n["nonzero"] >= (enough if _level(n) == 1 else _ENOUGH_VALUES)


def _kind_of_call(operand: Operand, n: Numbers | None) -> str:
    """Sort an operand by one call: "weights", "zeros", "indices", "grid" or "floats"."""
    if operand.origin is None:
        return "floats"
    if n is None or (operand.origin == Origin.FACTORY and n["nonzero"]):
        return "weights"
    if not n["nonzero"]:
        return "zeros"
    if not n["fits"]:
        return "floats"
    if operand.origin in (Origin.INDEX, Origin.LOOKUP):
        return "indices"
    pixels = operand.origin == Origin.GIVEN and _near_integer(n["factor"]) != round(n["factor"])  # for example k / 16
    return "floats" if pixels and n["low"] != n["high"] else "grid"


def _kind(calls: list[tuple[Operand, Numbers]], levels: Levels, inputs_vary: bool) -> str:
    """Decide what an operand is, from calls in which it is on a grid, is indices, or is zeros."""
    low, high = min(n["low"] for _, n in calls), max(n["high"] for _, n in calls)
    if low == high:
        return "one value" if high else "zeros"
    prints = {n["fingerprint"] for _, n in calls}
    if inputs_vary and len(calls) > 1 and len(prints) == 1:
        return "fixed"
    if all(operand.origin in (Origin.INDEX, Origin.LOOKUP) for operand, n in calls if n["nonzero"]):
        return "indices"
    elements = sum(operand.elements for operand, _ in calls)
    is_never_zero = sum(n["nonzero"] for _, n in calls) == elements and low > 0
    if is_never_zero and (elements >= _ENOUGH_VALUES or min(round(n["least"] / n["factor"]) for _, n in calls) > 1):
        return "floats"  # an offset plus levels
    if levels.most == 1:
        return "signed" if low < 0 else "binary"
    return "levels"


def _kinds(operands: list[Operand], numbers: list[Numbers | None], inputs_vary: bool) -> tuple[list[str], Levels]:
    """Return what an operand is in each call of a product, and its levels."""
    kinds = [_kind_of_call(operand, n) for operand, n in zip(operands, numbers)]

    def of(kind):
        return {c: (operands[c], n) for c, (k, n) in enumerate(zip(kinds, numbers)) if k == kind and n is not None}

    levels = _find_levels(of("grid"))
    kinds = ["floats" if kind == "grid" and c not in levels.calls else kind for c, kind in enumerate(kinds)]
    for group in ("grid", "indices", "zeros"):
        if group not in kinds:
            continue
        calls = of(group) | (of("zeros") if group == "grid" else {})
        found = _kind(list(calls.values()), levels, inputs_vary)
        if found not in SPIKES and "floats" in kinds:
            found = "floats"
        elif group == "zeros":
            others = [kind for kind in kinds if kind != "zeros"]
            if others:
                found = max(set(others), key=others.count)
            elif all(operand.origin == Origin.FACTORY for operand in operands):
                found = "weights"
        kinds = [found if c in calls else kind for c, kind in enumerate(kinds)]
    return kinds, levels


class _Side(NamedTuple):
    """One operand of a product in all calls."""

    operands: list[Operand]
    numbers: list[Numbers | None]
    kinds: list[str]
    levels: Levels
    fired: dict[int, torch.Tensor]


def _side(record: Record, i: int, inputs_vary: bool) -> _Side:
    """Copy the measurements of an operand from its device and decide what it is in each call."""
    operands = [call.operands[i] for call in record.calls]
    measured = [operand.measured for operand in operands if operand.measured is not None]
    table = iter(torch.stack(measured).tolist() if measured else ())
    numbers = [None if operand.measured is None else dict(zip(FIELDS, next(table))) for operand in operands]
    return _Side(operands, numbers, *_kinds(operands, numbers, inputs_vary), record.fired[i])


def _input(side: _Side, kind: str, calls: list[int]) -> Input:
    """Return an operand of a row, of calls in which it is of one kind."""
    operands = [side.operands[c] for c in calls]
    read = {c: n for c in calls if (n := side.numbers[c]) is not None}
    found = Input(kind, sum(operand.values for operand in operands))
    if kind in ("weights", "constant") or not read:
        return found
    found = replace(found, rate=sum(n["nonzero"] for n in read.values()) / max(sum(o.elements for o in operands), 1))
    if kind not in SPIKES:
        return found
    levels, neurons = side.levels, sum(side.fired)
    return replace(
        found, level=levels.most, factor=levels.factor, negative=any(n["low"] < 0 for n in read.values()),
        synaptic_operations=round(sum(n["magnitude"] for n in read.values())),
        nonzero_operations=round(sum(n["events"] for n in read.values())),
        neurons=neurons, silent=neurons - int(sum(some.sum().item() for some in side.fired.values())),
    )  # fmt: skip


def rows_of(record: Record, inputs_vary: bool) -> list[Row]:
    """Return the rows of a product, one for each pair of kinds that its operands had in some calls."""
    a, b = sides = [_side(record, i, inputs_vary) for i in (0, 1)]
    groups: dict[tuple[str, str], list[int]] = {}
    for c, kinds in enumerate(zip(a.kinds, b.kinds)):
        groups.setdefault(("constant", "constant") if kinds == ("weights", "weights") else kinds, []).append(c)
    rows = []
    for kinds, members in groups.items():
        first, second = (_input(side, kind, members) for side, kind in zip(sides, kinds))
        pairs = None
        if first.is_spikes and second.is_spikes:
            pairs = round(sum(n["pair_magnitude"] for c in members if (n := a.numbers[c]) is not None))
        calls = [record.calls[c] for c in members]
        macs, results = sum(call.macs for call in calls), sum(call.result_values for call in calls)
        rows.append(Row(record.layer, record.op, calls[0].shape, len(calls), macs, (first, second), results, pairs))
    return rows


def _data_varies(modules: dict[str, list[dict]]) -> bool:
    """True if the data changed: the first argument of some module that modules did not compute themselves, such as a state.

    The first argument decides, because a model may be given one batch again and again, next to a time or a state that changes.
    """
    for calls in modules.values():
        computed = {argument for call in calls for argument, value in call.items() if value is None}
        data = next((argument for argument in calls[0] if argument not in computed), None)
        if len({call[data].item() for call in calls if data in call}) > 1:
            return True
    return False


# --- the report ---------------------------------------------------------------------------------------------------------------


class Report:
    """What a run costs: one row per product, totals and three energies. ``print(report)`` prints the table.

    ``energy.count`` makes it. All numbers are sums over everything that was counted: divide by the number of samples yourself.

    Attributes:
        costs: the energy constants and assumptions, a :class:`Costs`.
        batches: number of calls of the model itself; 0 if only its methods or submodules were called.
        rows: a :class:`Row` per product, in the order of their first calls.
        unknown: {operator: {layer: calls}} of operators that may contain products and were not counted.
        fused: {operator: {layer: elements}} of the elementwise work of this package's operators. Not in the totals.

    A report can be pickled and copied. It does not keep the model.

    Example:
        >>> import torch
        >>> from sdit_kernels import energy
        >>> net = torch.nn.Linear(100, 10)
        >>> report = energy.count(net, (torch.rand(4, 100) < 0.2).float())
        >>> report.macs, report.products, report.products_on_spikes
        (4000, 1, 1)
    """

    def __init__(self, recording: Recording, costs: Costs):
        self.costs = costs
        self._recording = recording
        self._rows: tuple[int, list[Row]] = (-1, [])

    def __getstate__(self):
        found = replace(self._recording, records={}, inputs={})  # without the places in the program, which cannot be pickled
        return {"costs": self.costs, "_recording": found, "_rows": (0, self.rows)}

    def with_costs(self, costs: Costs) -> "Report":
        """Return a report of the same run with other energy constants. The model does not run again."""
        report = Report(self._recording, check_costs(costs))
        report._rows = self._rows
        return report

    @property
    def batches(self) -> int:
        return self._recording.batches

    @property
    def rows(self) -> list[Row]:
        records = self._recording.records.values()
        calls = sum(len(record.calls) for record in records)
        if self._rows[0] != calls:  # reading the rows waits for the device, so keep them
            vary = _data_varies(self._recording.inputs)
            self._rows = calls, [row for record in records for row in rows_of(record, vary)]
        return self._rows[1]

    @property
    def unknown(self) -> dict[str, dict[str, int]]:
        return _nested(self._recording.unknown)

    @property
    def fused(self) -> dict[str, dict[str, int]]:
        return _nested(self._recording.fused)

    @property
    def macs(self) -> int:
        """Multiply-adds of all products, counted as if they were dense."""
        return sum(row.macs for row in self.rows)

    @property
    def macs_on_floats(self) -> int:
        """Multiply-adds of all other products: without spikes, and without an operand that is zeros.

        Their operands are floats, fixed values, indices, one value, or weights alone.
        """
        return self.macs - self.macs_on_zeros - sum(row.macs for row in self.rows if row.on_spikes)

    @property
    def macs_on_zeros(self) -> int:
        """Multiply-adds of the products without spikes that see zeros, such as the output of a layer that never fires.

        In the energies they cost as much as on floats.
        """
        return sum(row.macs for row in self.rows if row.on_zeros)

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
        found = {}
        for op, layers in self.fused.items():
            n = sum(layers.values())
            macs, adds = (n * each for each in FUSED_COSTS[op])
            energy = macs * self.costs.mac + adds * self.costs.add
            found[op] = {"elements": n, "macs": macs, "additions": adds, "energy_pj": energy}
        return found

    def to_dict(self) -> dict:
        """Return all figures, under the names of the attributes, as what JSON has: numbers, strings, lists, dicts and None."""
        rows = []
        for row in self.rows:
            derived = {"on_spikes": row.on_spikes, "on_zeros": row.on_zeros, "synaptic_operations": row.synaptic_operations}
            rows.append(asdict(row) | {"inputs": [asdict(i) for i in row.inputs]} | derived)
        return {
            "macs": self.macs,
            "synaptic_operations": self.synaptic_operations,
            "energy_pj": self.energy_pj,
            "products": self.products,
            "products_on_spikes": self.products_on_spikes,
            "macs_on_floats": self.macs_on_floats,
            "macs_on_zeros": self.macs_on_zeros,
            "energy_parts_pj": self.energy_parts_pj,
            "costs": asdict(self.costs),
            "batches": self.batches,
            "rows": rows,
            "unknown": self.unknown,
            "fused": self.fused,
            "fused_work": self.fused_work(),
        }

    def to_json(self, **options) -> str:
        """Return ``to_dict()`` as JSON. options: of ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    def table(self) -> str:
        """Return the table of the products, then the totals."""
        return "\n".join([*self._product_lines(), *self._float_lines(), *self._other_lines(), *self._energy_lines()])

    __str__ = table

    def __repr__(self) -> str:
        return (
            f"<Report: {_many(self.products, 'product')}, {self.products_on_spikes} on spikes; "
            f"{_many(self.macs, 'multiply-add')}, {_many(self.synaptic_operations, 'synaptic operation')}>"
        )

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Report) else NotImplemented

    __hash__ = object.__hash__

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
        counted = f" ({_many(self.batches, 'batch', 'batches')})" if self.batches else ""
        see = "sees" if self.products == 1 else "see"
        lines = ["", f"{self.products_on_spikes} of {_many(self.products, 'product')} {see} spikes{counted}"]
        dense = [f"{r.layer or '(model)'}: {r.op} ({', '.join(map(str, r.inputs))})" for r in self.rows if not r.on_spikes]
        if not self._recording.saw_operators:
            lines.append("NOTHING RAN while this was counted")
        if dense:
            lines += ["products that do not see spikes:", *(f"  {line}" for line in dense)]
        if self.batches == 1 and self.products_on_spikes:
            lines.append("counted on one batch: a fixed pattern of 0 and 1 looks like spikes, so count several batches")
        return lines

    def _other_lines(self) -> list[str]:
        lines = []
        if self.unknown:
            lines += ["", "NOT COUNTED, may contain products:"]
            for op, layers in self.unknown.items():
                lines += [f"  {op} in {layer or '(model)'}: {_many(n, 'call')}" for layer, n in layers.items()]
        work = self.fused_work()
        if work:
            lines += ["", "elementwise work of fused operators, not in the totals:"]
            lines += [
                f"  {op}: {_many(int(w['elements']), 'element')}, {w['macs']:,} multiply-adds, {w['additions']:,} additions, "
                f"{_joules(w['energy_pj'])}"
                for op, w in work.items()
            ]
        return lines

    def _energy_lines(self) -> list[str]:
        c, energy, parts = self.costs, self.energy_pj, self.energy_parts_pj["quantised"]
        steps = f"{c.time_steps} time step(s) in one pass" + (" instead of one a call" if c.step_by_step else "")
        if self._recording.saw_meta:
            return [
                "",
                f"multiply-adds {self.macs:,}",
                "neither synaptic operations nor energies: on the meta device tensors have no values, so spikes are not known",
            ]
        return [
            "",
            f"multiply-adds {self.macs:,}, of them on floats {self.macs_on_floats:,}, on zeros {self.macs_on_zeros:,}; "
            f"synaptic operations {self.synaptic_operations:,}",
            f"energy, arithmetic alone:        {_joules(energy['arithmetic']):>12s}   {c.mac} pJ a multiply-add, {c.add} pJ an "
            "addition (float32)",
            f"energy, with memory:             {_joules(energy['with_memory']):>12s}   {c.byte} pJ a byte ({c.memory}); "
            f"operands and results move once a call, {c.value_bytes:g} bytes a value, spikes as bits",
            f"energy of the quantised network: {_joules(energy['quantised']):>12s}   integers of the same levels instead of "
            f"spikes, {steps}, {c.int_multiply} + {c.int_add} pJ a multiply-add; of it memory {_joules(parts['memory'])}",
        ]


def _first_shown(r: Row) -> Input:
    return next((i for i in r.inputs if i.kind not in ("weights", "constant")), r.inputs[0])


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Return {operator: {layer: number}}."""
    found: dict[str, dict[str, int]] = {}
    for (op, layer), n in counts.items():
        found.setdefault(op, {})[layer] = n
    return found


def _aligned(cells: Iterable[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    columns = list(zip(*cells))
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in zip(*columns)
    ]


def _many(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _joules(pj: float) -> str:
    for unit, size in (("J", 1e12), ("mJ", 1e9), ("uJ", 1e6), ("nJ", 1e3)):
        if pj >= size:
            return f"{pj / size:.4g} {unit}"
    return f"{pj:.4g} pJ"


def check_costs(costs: Costs) -> Costs:
    if not isinstance(costs, Costs):
        raise TypeError(f"costs must be a sdit_kernels.energy.Costs, got {type(costs).__name__}")
    return costs
