"""Print a trace as code: for torch, numba (numbers or vectors) and Triton.

The code has these functions. States, tapes, gradients and parameters are tuples; the numbers of a neuron stand behind its
parameters::

    step(x, states, parameters)                                   -> spike, states after the step
    record(x, states, parameters)                                 -> tape, states after the step
    pullback(tape, x, states, parameters, ds, d_after, sharpness) -> dx, d_states, d_parameters
    tangent(x, states, parameters, d_states, sharpness)           -> states after the step, ds, d_after

sharpness is the alpha of the surrogate. ``pullback`` ignores what its plan does not use. ``tangent`` differentiates along x
and, if asked for, along each parameter: ds has one value per direction, d_states and d_after have the states of the first
direction, then the states of the next, ...

``step`` and ``record`` compare a with b where the definition says ``fire(a - b)``. The derivatives compare the difference with
0. With the same expression in both, a compiler keeps the comparisons of all T steps in registers.
"""

import hashlib
import linecache
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .trace import CONDITIONS, Symbol, Trace, comparisons_of, in_order, is_condition

ENTRIES = ("step", "record", "pullback", "tangent")
_NAMES = re.compile(r"[A-Za-z_]\w*")
_DEFINITION = re.compile(r"^def (\w+)\(", re.MULTILINE)
_INFIX = {op: f"{{0}} {op} {{1}}" for op in "+-*/"} | {"neg": "-{0}"}


class Language(NamedTuple):
    """How a backend writes code. {0}, {1}, .. stand for the arguments of an operation."""

    head: str  # the line before a function
    forms: dict  # operations
    select: dict  # from comparison to the form of a select: {0} and {1} are compared, {2} and {3} are the values
    spike: dict  # from comparison to the form of a spike that a step returns
    number: str  # a number that float32 holds exactly
    wide_number: str  # any other number; {1} has the type of the arithmetic
    typed: str  # a select of two numbers; {1} has the type of the arithmetic
    fused: bool = False  # write a + b * c inside the surrogate's chain as one operation, with few operations behind an adjoint


TORCH = Language(
    head="",
    forms=_INFIX
    | {
        "exp": "torch.exp({0})",
        "abs": "torch.abs({0})",
        "maximum": "torch.maximum({0}, {1})",
        "minimum": "torch.minimum({0}, {1})",
        "level": "torch.clamp({0}, {1}, {2}).round() + 0.0",
        "slope": "surrogate_derivative({0}, sharpness)",
        "through": "torch.where({0} == 0, 0.0, {1} * {0})",
        "unless_zero": "torch.where({0} == 0, 0.0, {1})",
        "inside": "torch.where(({0} >= {1}) & ({0} <= {2}), {3}, 0.0)",
        "sign": "torch.sign({0})",
        "share": "torch.where({0} < {1}, 0.0, torch.where({0} == {1}, {2} / 2, {2}))",
    },
    select={"fire": "torch.where({0} >= {1}, {2}, {3})", "fire_above": "torch.where({0} > {1}, {2}, {3})"},
    spike={"fire": "({0} >= {1}).to(x.dtype)", "fire_above": "({0} > {1}).to(x.dtype)"},
    number="{0}",
    wide_number="{0}",
    typed="{0}.to({1}.dtype)",
)
TRITON = Language(
    head="@triton.jit",
    forms=_INFIX
    | {
        "/": "divide({0}, {1})",
        "exp": "tl.exp({0})",
        "abs": "tl.abs({0})",
        "maximum": "maximum({0}, {1})",
        "minimum": "minimum({0}, {1})",
        "level": "level({0}, {1}, {2})",
        "slope": "surrogate_derivative({0}, sharpness, KIND)",
        "through": "tl.where({0} == 0.0, 0.0, {1} * {0})",
        "unless_zero": "tl.where({0} == 0.0, 0.0, {1})",
        "inside": "tl.where(({0} >= {1}) & ({0} <= {2}), {3}, 0.0)",
        "sign": "sign({0})",
        "share": "share({0}, {1}, {2})",
    },
    select={"fire": "tl.where({0} >= {1}, {2}, {3})", "fire_above": "tl.where({0} > {1}, {2}, {3})"},
    spike={"fire": "{0} >= {1}", "fire_above": "{0} > {1}"},
    number="{0}",
    wide_number="tl.full([], {0}, {1}.dtype)",
    typed="{0}.to({1}.dtype)",
)
NUMBA = Language(
    head="@inline",
    forms=_INFIX
    | {
        "exp": "exp({0}, V)",
        "abs": "absolute({0})",
        "maximum": "maximum({0}, {1})",
        "minimum": "minimum({0}, {1})",
        "level": "level({0}, {1}, {2}, V)",
        "slope": "surrogate_derivative(KIND, {0}, sharpness, V)",
        "through": "where_equal({0}, vset(0.0, V), vset(0.0, V), {1})",
        "unless_zero": "where_equal({0}, vset(0.0, V), vset(0.0, V), {1})",
        "inside": "inside({0}, {1}, {2}, {3}, V)",
        "sign": "sign({0}, V)",
        "share": "share({0}, {1}, {2}, V)",
    },
    select={"fire": "where_at_least({0}, {1}, {2}, {3})", "fire_above": "where_less({1}, {0}, {2}, {3})"},
    spike={"fire": "{0} >= {1}", "fire_above": "{0} > {1}"},
    number="vset({0}, V)",
    wide_number="vset({0}, V)",
    typed="{0}",
    fused=True,
)
NUMBA_VECTORS = NUMBA._replace(
    spike={
        "fire": "where_at_least({0}, {1}, vset(1.0, V), vset(0.0, V))",
        "fire_above": "where_less({1}, {0}, vset(1.0, V), vset(0.0, V))",
    }
)
LANGUAGES = {"torch": TORCH, "triton": TRITON, "numba": NUMBA, "numba-vectors": NUMBA_VECTORS}


class _Lines:
    """The lines of one function."""

    def __init__(self, language: Language, given: dict[int, str], like: str, compare: bool):
        self._language, self._names, self._like, self._compare, self.lines = language, dict(given), like, compare, []

    def add(self, roots: Iterable[Symbol]) -> list[str]:
        """Write what the roots need, and return their names. A condition has no name: it is written where it is used."""
        roots = list(roots)
        for node in in_order(roots, self._names):
            if node.id in self._names or node.op == "number" or is_condition(node):
                continue
            if node.op == "detach":
                self._names[node.id] = self._word(node.args[0])
            elif not (self._compare and self._only_compared(node, roots)):
                self._assign(node, self._expression(node))
        return [self._word(root) for root in roots]

    def _only_compared(self, node, roots):
        """True for the difference in fire(a - b) where nothing else uses it."""
        if node.op != "-" or any(node is root for root in roots):
            return False
        users = [n for n in in_order(roots, self._names) if any(a is node for a in n.args)]
        return all(n.op in CONDITIONS for n in users)

    def _assign(self, node, expression):
        self._names[node.id] = f"t{len(self.lines)}"
        self.lines.append(f"t{len(self.lines)} = {expression}")

    def _word(self, node):
        if node.op == "number":
            value = float(node.value)
            exact = struct.unpack("f", struct.pack("f", value))[0] == value if abs(value) < 3e38 else False
            form = self._language.number if exact else self._language.wide_number
            return form.format(node.value, self._like)
        if is_condition(node):
            (comparison,) = comparisons_of(node)
            return self._language.spike[comparison.op].format(*self._compared(comparison))
        return self._names[node.id]

    def _compared(self, comparison):
        (z,) = comparison.args
        if z.op == "-" and self._compare and z.id not in self._names:
            return [self._word(a) for a in z.args]
        return self._word(z), self._language.number.format("0.0")

    def _select(self, condition, a, b):
        for comparison in reversed(comparisons_of(condition)):
            b = self._language.select[comparison.op].format(*self._compared(comparison), a, b)
        return b

    def _expression(self, node):
        language, args = self._language, node.args
        if node.op == "select":
            condition, a, b = args
            text = self._select(condition, self._word(a), self._word(b))
            return language.typed.format(text, self._like) if a.op == b.op == "number" else text
        if node.op == "-" and args[1].op == "select" and args[1].args[2] is node.graph.zero and args[1].args[1].op != "number":
            condition, e, _ = args[1].args  # a - (e where c, else 0) is (a - e where c, else a): the same bits
            a = self._word(args[0])
            return self._select(condition, language.forms["-"].format(a, self._word(e)), a)
        if node.op == "through" and language.fused:
            return language.forms["through"].format(self._word(args[0]), self._chain(*args))
        return language.forms[node.op].format(*map(self._word, args))

    def _chain(self, slope, g):
        """Return the text of g * slope. g = a + b c, b an adjoint from the next step: b waits for one operation only."""
        slope_ = self._word(slope)
        if g.op in "+-" and len(g.args) == 2 and g.args[1].op == "*":
            a, (b, c) = g.args[0], g.args[1].args
            if c.op == "input" and c.value.startswith("d_"):
                b, c = c, b
            minus = "-" if g.op == "-" else ""
            return f"fma({self._word(b)}, {minus}{self._word(c)} * {slope_}, {self._word(a)} * {slope_})"
        return f"{self._word(g)} * {slope_}"


def _tuple(words):
    return f"({', '.join(words)}{',' if len(words) == 1 else ''})"


def _function(language, name, arguments, like, compare, outputs):
    """Return the text of one function. arguments: {name: node, or list of nodes}; outputs: nodes, and lists of nodes."""
    given, lines = {}, []
    for argument, nodes in arguments.items():
        if isinstance(nodes, Symbol):
            given[nodes.id] = argument
            continue
        for i, node in enumerate(nodes):
            if node.op != "number" and node.id not in given:
                # the underscore keeps a parameter called alpha apart from the sharpness of the surrogate
                given[node.id] = f"{node.value}_" if node.op == "input" else f"{argument}{i}"
                lines.append(f"{given[node.id]} = {argument}[{i}]")
    writer = _Lines(language, given, like, compare)
    words = iter(writer.add([n for o in outputs for n in (o if isinstance(o, list) else [o])]))
    results = [_tuple([next(words) for _ in o]) if isinstance(o, list) else next(words) for o in outputs]
    kept = [f"return {', '.join(results)}"]
    used = set(_NAMES.findall(kept[0]))
    for line in reversed([*lines, *writer.lines]):
        target, _, expression = line.partition(" = ")
        if target in used:
            used |= set(_NAMES.findall(expression))
            kept.append(line)
    head = [language.head] if language.head else []
    return "\n".join([*head, f"def {name}({', '.join(arguments)}):", *("    " + line for line in reversed(kept))])


def text(trace: Trace, language: Language, with_parameters: bool, entries: Iterable[str] = ENTRIES) -> str:
    """Return the code of a trace. with_parameters: pullback and tangent differentiate along the parameters too."""
    t, plan, n = trace, trace.plan(with_parameters), 1 + len(trace.states)
    after, tape, gradients = list(t.after), list(plan.tape), t.pullback(with_parameters)
    before: dict[str, Any] = {"x": t.x, "states": list(t.states), "parameters": [*t.parameters, *t.numbers]}
    known = {"tape": tape} | before | {"ds": t.d_spike, "d_after": list(t.d_after), "sharpness": []}
    along = [t.tangent(direction) for direction in t.directions(with_parameters)]
    moving = before | {"d_states": [d for d_states, _ in along for d in d_states], "sharpness": []}
    tangents = [after, [ds for _, (ds, *_) in along], [d for _, (_, *d_after) in along for d in d_after]]
    found = {
        "step": (before, "x", True, [t.spike, after]),
        "record": (before, "x", True, [tape, after]),
        "pullback": (known, "ds", False, [gradients[0], gradients[1:n], gradients[n:]]),
        "tangent": (moving, "x", False, tangents),
    }
    return "\n\n\n".join(_function(language, entry, *found[entry]) for entry in entries) + "\n"


def load(code: str, stem: str, environment: dict[str, Any]) -> dict[str, Any]:
    """Run generated code. Return its functions by their entry.

    The name of a function contains a digest of the code. So compilers that cache on disk by name never run the code of an
    edited neuron. ``SDIT_KERNELS_DUMP=DIR`` writes the code to a file.
    """
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    code = _DEFINITION.sub(rf"def {stem}_\1_{digest}(", code)
    name = f"<sdit_kernels.neuron {stem}_{digest}>"
    if directory := os.environ.get("SDIT_KERNELS_DUMP"):
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, f"{stem}_{digest}.py").write_text(code)
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # for inspect.getsource and tracebacks
    environment = dict(environment)
    exec(compile(code, name, "exec"), environment)
    return {entry: environment[f"{stem}_{entry}_{digest}"] for entry in _entries(code, digest)}


def _entries(code, digest):
    return [e for e in ENTRIES if f"_{e}_{digest}(" in code]
