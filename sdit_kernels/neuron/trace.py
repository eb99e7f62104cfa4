"""Trace a neuron's step once with symbols, and differentiate the trace in reverse and in forward mode.

A step is a Python function ``step(x, s, p, o, **flags)`` that returns (spike, states after the step). x is the input current.
s and p have the states before the step and the parameters as attributes. o has the operations besides + - * /::

    o.fire(z)         1 where z >= 0, else 0, with the surrogate gradient
    o.fire_above(z)   1 where z > 0, else 0, with the surrogate gradient
    o.either(c, d)    1 where c or d fires, of two spikes that never fire together; the gradient reaches both
    o.level(z, lo, hi, unit=1, window=(lo, hi))
                      round(clip(z / unit, lo, hi)), ties to even, never a negative zero; the derivative with respect to
                      z / unit is 1 inside the window, ends included, else 0
    o.where(c, a, b)  a where c, else b. c is a spike or a detached spike; the gradient reaches it as (a - b) times the upstream
    o.maximum(a, b), o.minimum(a, b), o.abs(a), o.exp(a)
    o.detach(a)       a without gradient

The same function runs on symbols here and on tensors in ../reference/neuron.py. On symbols, every operation makes a node of a
graph. Equal nodes are one object. In the step only exact simplifications are allowed (x * 1, x - 0, x / 1), because the kernels
repeat the reference bit for bit: x * 0 would lose a NaN, and x + 0 a negative zero. In derivatives all are allowed.
"""

import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args


@dataclass(frozen=True, eq=False)  # compared by identity, because kernels are looked up by it at every call
class Neuron:
    """A neuron: its step, and the names of the states and parameters that the step uses."""

    name: str
    step: Callable[..., Any]
    states: tuple[str, ...] = ("v",)
    parameters: tuple[str, ...] = ()  # numbers or tensors, with gradients
    numbers: tuple[str, ...] = ()  # numbers only, without gradients
    start: tuple[str | None, ...] = (None,)  # per state, its value before the first step: the name of a number, or None for 0
    reciprocals: tuple[str, ...] = ()  # the parameters that users give as their reciprocals: r as tau
    fixed: tuple[str, ...] = ()  # the last of the parameters, if they have no gradient
    # (gradient of x, x, p) -> what the backward pass writes as the gradient of x; None: the gradient
    input_gradient: Callable[..., Any] | None = None

    @property
    def learnt(self) -> tuple[str, ...]:
        """The parameters with gradients."""
        return self.parameters[: len(self.parameters) - len(self.fixed)]

    @property
    def flags(self) -> dict[str, Any]:
        """The keyword arguments of the step and their defaults. Each setting of them is a trace of its own."""
        found = inspect.signature(self.step).parameters.values()
        return {f.name: f.default for f in found if f.kind is f.KEYWORD_ONLY}


class Values:
    """The states or the parameters of a step, by name. torch.compile can trace it, which it cannot do with SimpleNamespace."""

    def __init__(self, names, values):
        for name, value in zip(names, values):
            setattr(self, name, value)


def _refuse(protocol):
    def refuse(self, *_, **__):
        raise TypeError(
            f"a step is traced with symbols, and {protocol} of a symbol has no value: use the operations that the step is "
            "given, o.where(o.fire(a - b), ..) for a comparison, o.abs, o.exp, o.maximum, .. for functions"
        )

    return refuse


class Symbol:
    """A node of the graph: an operation and its arguments, which are nodes."""

    __slots__ = ("args", "graph", "id", "op", "value")

    def __init__(self, graph, op, args, value=None):
        self.graph, self.op, self.args, self.value, self.id = graph, op, args, value, len(graph.nodes)

    def __add__(self, other):
        return self.graph.binary("+", self, other)

    def __radd__(self, other):
        return self.graph.binary("+", other, self)

    def __sub__(self, other):
        return self.graph.binary("-", self, other)

    def __rsub__(self, other):
        return self.graph.binary("-", other, self)

    def __mul__(self, other):
        return self.graph.binary("*", self, other)

    def __rmul__(self, other):
        return self.graph.binary("*", other, self)

    def __truediv__(self, other):
        return self.graph.binary("/", self, other)

    def __rtruediv__(self, other):
        return self.graph.binary("/", other, self)

    def __neg__(self):
        return self.graph.negative(self)

    def __pos__(self):
        return self

    def __hash__(self):
        return self.id

    def __repr__(self):
        return f"<symbol {self.op} {self.value if self.value is not None else ''}>"

    __bool__ = _refuse("if, and, or, not")
    __eq__ = __ne__ = _refuse("==")
    __lt__ = __le__ = __gt__ = __ge__ = _refuse("< or >")
    __pow__ = __rpow__ = _refuse("**")
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __divmod__ = _refuse("% or //")
    __matmul__ = __rmatmul__ = _refuse("@")
    __and__ = __or__ = __xor__ = __invert__ = _refuse("& | ^ ~")
    __rand__ = __ror__ = __rxor__ = __lshift__ = __rshift__ = _refuse("& | ^ ~")
    __abs__ = _refuse("abs")
    __round__ = __floor__ = __ceil__ = __trunc__ = _refuse("round")
    __float__ = __int__ = __index__ = __complex__ = _refuse("float or int")
    __iter__ = __len__ = __getitem__ = __contains__ = _refuse("an element")
    __call__ = _refuse("a call")
    __array__ = _refuse("a numpy array")
    __torch_function__ = classmethod(_refuse("a torch function"))

    def __array_ufunc__(self, ufunc, method, *inputs, **_):
        """A number of numpy times a symbol comes here."""
        op = _NUMPY.get(ufunc.__name__)
        return self.graph.binary(op, *inputs) if op and method == "__call__" else _refuse(f"np.{ufunc.__name__}")(self)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(
            f"a step is traced with symbols, and a symbol has no .{name}: use the operations that the step is given"
        )


CONDITIONS = ("fire", "fire_above")  # the argument is compared with 0
_NUMPY = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "true_divide": "/"}
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_POLYNOMIAL = (*CONDITIONS, "either", "input", "number", "+", "-", "*", "neg", "select", "detach")
_SMOOTH = ("+", "-", "*", "/", "neg", "exp")


class Graph:
    """All nodes of a trace. ``exact``: only exact simplifications, as in a step."""

    def __init__(self):
        self.nodes, self.exact = {}, True
        self.zero, self.one = self.number(0.0), self.number(1.0)

    def node(self, op, *args, value=None):
        key = (op, value, *(a.id for a in args))
        if key not in self.nodes:
            self.nodes[key] = Symbol(self, op, args, value)
        return self.nodes[key]

    def input(self, name):
        return self.node("input", value=name)

    def number(self, value):
        return self.node("number", value=repr(float(value)))

    def symbol(self, value):
        """Return a node for a value that a step uses."""
        if isinstance(value, Symbol):
            if value.graph is not self:
                raise TypeError("a step used a symbol of another trace: a step must not keep values from call to call")
            return value
        if is_number(value):
            try:
                finite = math.isfinite(value)
            except OverflowError:  # an int
                finite = False
            if not finite:
                raise ValueError(f"the constants of a step must be finite, got {value}")
            return self.number(value)
        raise TypeError(f"a step must compute with numbers, its inputs and their results, got {type(value).__name__}")

    def arithmetic(self, value):
        """As ``symbol``, and a condition becomes 1 or 0."""
        node = self.symbol(value)
        return self.select(node, self.one, self.zero) if is_condition(node) else node

    def binary(self, op, a, b):
        a, b = self.symbol(a), self.symbol(b)
        if op == "*":  # a spike times a value is a select: the value of a neuron that does not fire may be infinite
            if is_condition(a):
                return self.select(a, self.arithmetic(b), self.zero)
            if is_condition(b):
                return self.select(b, a, self.zero)
        a, b = self.arithmetic(a), self.arithmetic(b)
        zero, one = self.zero, self.one
        if op == "*" and a is one:
            return b
        if (op in "*/" and b is one) or (op == "-" and b is zero):
            return a
        if not self.exact and (simple := self._simplified(op, a, b)) is not None:
            return simple
        return self.node(op, a, b)

    def _simplified(self, op, a, b):
        zero = self.zero
        if a.op == b.op == "number" and not (op == "/" and b is zero):
            value = _ARITHMETIC[op](float(a.value), float(b.value))
            return self.number(value) if math.isfinite(value) else None
        if op == "*":
            if a is zero or b is zero:
                return zero
            for g, factor in ((a, b), (b, a)):  # select last: the factor may be infinite where the select hides it
                if g.op == "inside":
                    return self.inside(*g.args[:-1], g.args[-1] * factor)
            if a.op == "neg":
                return self.negative(a.args[0] * b)
            if b.op == "neg":
                return self.negative(a * b.args[0])
        if op == "/":
            if a is zero:
                return zero
            if a.op == "inside":
                return self.inside(*a.args[:-1], a.args[-1] / b)
            if a.op == "neg":
                return self.negative(a.args[0] / b)
        if op == "+":
            if a is zero or b is zero:
                return b if a is zero else a
            if b.op == "neg":
                return a - b.args[0]
            if a.op == "neg":
                return b - a.args[0]
            if a.op == b.op == "select" and a.args[0] is b.args[0]:
                sums = [self._simplified("+", p, q) for p, q in zip(a.args[1:], b.args[1:])]
                if all(total is not None for total in sums):
                    return self.select(a.args[0], *sums)
            if a.op == "+" and (rest := self._simplified("+", a.args[1], b)) is not None:
                return a.args[0] + rest
        if op == "-":
            if a is b:
                return zero
            if a is zero:
                return self.negative(b)
            if a.op == "neg":
                return self.negative(a.args[0] + b)
            if b.op == "neg":
                return a + b.args[0]
            if b.op in "*+" and any(n is a for n in b.args):
                c = b.args[1 if b.args[0] is a else 0]
                if b.op == "+":  # e - (e + c)
                    return self.negative(c)
                return a * (self.one - c)  # e - e c = e (1 - c), because c is often the same at every step
            if a.op == b.op == "select" and a.args[0] is b.args[0]:
                return self.select(a.args[0], a.args[1] - b.args[1], a.args[2] - b.args[2])
        return None

    def negative(self, a):
        a = self.arithmetic(a)
        if not self.exact:
            if a is self.zero:
                return a
            if a.op == "neg":
                return a.args[0]
            if a.op == "-":
                return a.args[1] - a.args[0]
        return self.node("neg", a)

    def select(self, condition, a, b):
        if not self.exact:
            if a is b:
                return a
            if a.op == "neg" and b is self.zero:
                return self.negative(self.select(condition, a.args[0], b))
            if b.op == "neg" and a is self.zero:
                return self.negative(self.select(condition, a, b.args[0]))
        return self.node("select", condition, a, b)

    def through(self, slope, g):
        """g * slope, and 0 where the slope is 0, also for an infinite g: a reset hides an infinite membrane."""
        return self.zero if g is self.zero else self.node("through", slope, g)

    def inside(self, z, lo, hi, g):
        """g where lo <= z <= hi, else 0."""
        return self.zero if g is self.zero else self.node("inside", z, lo, hi, g)


def is_number(value):
    """True for a number that a step may use as a constant."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_condition(node):
    return node.op in (*CONDITIONS, "either") or (node.op == "detach" and is_condition(node.args[0]))


def comparisons_of(condition):
    """Return the comparisons of a condition: one, or two of ``either``."""
    if condition.op in CONDITIONS:
        return [condition]
    return [c for a in condition.args for c in comparisons_of(a)]


class Operations:
    """The operations of a step, on symbols. Functions of constants alone are constants, as with Python's own functions."""

    def __init__(self, graph):
        self._graph = graph

    def _computed(self, operation, z):
        if is_number(z):
            raise TypeError(f"{operation} needs a value that depends on x, a state or a parameter, got the number {z}")
        return self._graph.arithmetic(z)

    def fire(self, z):
        return self._graph.node("fire", self._computed("o.fire", z))

    def fire_above(self, z):
        return self._graph.node("fire_above", self._computed("o.fire_above", z))

    def either(self, c, d):
        for condition in (c, d):
            if not (isinstance(condition, Symbol) and condition.op in CONDITIONS):
                raise TypeError("o.either takes two of o.fire(a - b) and o.fire_above(a - b)")
        return self._graph.node("either", c, d)

    def level(self, z, lo, hi, unit=1.0, window=None):
        if is_number(unit) and not (unit != 0 and math.isfinite(unit)):
            raise ValueError(f"unit of o.level must be finite and not 0, got {unit}")
        if window not in (None, ()):
            if not (isinstance(window, (tuple, list)) and len(window) == 2 and all(map(is_number, window))):
                raise TypeError(f"window of o.level must be None or a pair of numbers, got {window!r}")
            if not window[0] <= window[1]:
                raise ValueError(f"window of o.level must be (a, b) with a <= b, got {window!r}")
        for name, value in (("lo", lo), ("hi", hi)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{name} of o.level must be an int, got {type(value).__name__}")
        if not lo < hi:
            raise ValueError(f"lo of o.level must be less than hi, got lo={lo}, hi={hi}")
        limits = map(self._graph.number, (lo, hi, *(window or (lo, hi))))
        return self._graph.node("level", self._graph.binary("/", self._computed("o.level", z), unit), *limits)

    def where(self, condition, a, b):
        if not (isinstance(condition, Symbol) and is_condition(condition)):
            raise TypeError("the condition of o.where must be o.fire(a - b), o.fire_above(a - b), o.either or o.detach of one")
        return self._graph.select(condition, self._graph.arithmetic(a), self._graph.arithmetic(b))

    def maximum(self, a, b):
        if is_number(a) and is_number(b):
            return max(a, b)
        return self._graph.node("maximum", self._graph.arithmetic(a), self._graph.arithmetic(b))

    def minimum(self, a, b):
        if is_number(a) and is_number(b):
            return min(a, b)
        return self._graph.node("minimum", self._graph.arithmetic(a), self._graph.arithmetic(b))

    def abs(self, a):
        return abs(a) if is_number(a) else self._graph.node("abs", self._graph.arithmetic(a))

    def exp(self, a):
        return math.exp(a) if is_number(a) else self._graph.node("exp", self._graph.arithmetic(a))

    def detach(self, a):
        return a if is_number(a) else self._graph.node("detach", self._graph.symbol(a))


def in_order(roots: Iterable[Symbol], given=()) -> list[Symbol]:
    """Return all nodes that the roots depend on, arguments first. Nodes in ``given`` (a set of ids) have no arguments."""
    seen, found, stack = set(), [], [(r, False) for r in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            found.append(node)
        elif node.id not in seen:
            seen.add(node.id)
            stack.append((node, True))
            if node.id not in given:
                stack.extend((a, False) for a in reversed(node.args))
    return found


# Callers of a tangent bound x by this number, float32 or float64. There every surrogate gradient is 0 as at infinity, but the
# states stay finite, so that 0 times a state is 0.
HUGE = 1e30, 1e300
THRESHOLD_EPS = 1e-6  # in the norm that makes the thresholds; it keeps the threshold of a token of zeros positive


def _is_polynomial(n: Symbol) -> bool:
    """True if the value is finite wherever the inputs are."""
    return all(m.op in _POLYNOMIAL for m in in_order((n,)))


class Plan(NamedTuple):
    """What the backward pass keeps of every step when it recomputes the forward pass."""

    tape: tuple[Symbol, ...]  # the values that it keeps, one per state
    keeps_states: bool  # they are the states after the step, so the states before a step are known too
    uses_tape: bool  # the pullback of a step needs the tape of this step
    uses_x: bool  # the pullback needs the current
    uses_states: bool  # the pullback needs the states before the step; only with keeps_states


class Trace:
    """The graph of one step under one setting of its flags, and its derivatives.

    ``constants``: numbers that are known when the code is generated, for example a v_reset of 0.
    """

    def __init__(self, neuron: Neuron, flags: dict[str, Any] | None = None, constants: dict[str, float] | None = None):
        self.neuron, self.flags, self.constants = neuron, neuron.flags | (flags or {}), constants or {}
        if unknown := self.flags.keys() - neuron.flags.keys():
            raise ValueError(
                f"{neuron.name} has the flags {', '.join(neuron.flags) or 'none'}, got {', '.join(sorted(unknown))}"
            )
        for name, flag in inspect.signature(neuron.step).parameters.items():
            allowed = get_args(flag.annotation)  # of a Literal
            if name in self.flags and allowed and self.flags[name] not in allowed:
                names = ", ".join(map(repr, allowed))
                raise ValueError(f"the flag {name} of {neuron.name} must be one of {names}, got {self.flags[name]!r}")
        self.graph = graph = Graph()
        self.x = graph.input("x")
        self.states = tuple(map(graph.input, neuron.states))
        self.parameters = tuple(map(graph.input, neuron.parameters))
        self.numbers = tuple(
            graph.number(self.constants[name]) if name in self.constants else graph.input(name) for name in neuron.numbers
        )
        s = Values(neuron.states, self.states)
        p = Values((*neuron.parameters, *neuron.numbers), (*self.parameters, *self.numbers))
        self._values = p
        self.spike, self.after = self._outputs(neuron.step(self.x, s, p, Operations(graph), **self.flags))
        graph.exact = False  # everything from here on is a derivative
        self.d_spike = graph.input("ds")
        self.d_after = tuple(graph.input(f"d_{name}") for name in neuron.states)
        self._pullbacks, self._plans = {}, {}

    def _outputs(self, outputs):
        name, states = self.neuron.name, self.neuron.states
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            raise TypeError(f"the step of {name} must return (spike, state), or (spike, (state, state, ..)), got {outputs!r}")
        spike, after = outputs
        after = after if isinstance(after, tuple) else (after,)
        if len(after) != len(states):
            raise TypeError(f"the step of {name} must return {len(states)} states ({', '.join(states)}), got {len(after)}")
        if not isinstance(spike, Symbol):
            raise TypeError(f"the step of {name} must return a spike that it computes, such as o.fire(..), got {spike!r}")
        spike = self.graph.symbol(spike)
        if is_condition(spike) and len(comparisons_of(spike)) > 1:  # kernels store the result of one comparison, or a number
            spike = self.graph.arithmetic(spike)
        return spike, tuple(map(self.graph.arithmetic, after))

    def pullback(self, with_parameters: bool) -> list[Symbol]:
        """Return the gradients with respect to x, the states and, if asked for, the parameters."""
        if with_parameters not in self._pullbacks:
            x, *parameters = self.directions(with_parameters)
            wanted = (x, *self.states, *parameters)
            found = self._pull((self.spike, *self.after), (self.d_spike, *self.d_after), wanted)
            if self.neuron.input_gradient is not None:
                found[0] = self.neuron.input_gradient(found[0], self.x, self._values)
            self._pullbacks[with_parameters] = found
        return self._pullbacks[with_parameters]

    def _pull(self, outputs, upstream, wanted):
        graph = self.graph
        zero, select, node = graph.zero, graph.select, graph.node
        gradient: dict[int, Symbol] = {}

        def give(n, g):
            if g is not zero and n.op != "number":
                gradient[n.id] = gradient[n.id] + g if n.id in gradient else g

        for output, g in zip(outputs, upstream):
            give(output, g)
        fixed = {n.id for n in (*self.parameters, *self.numbers)}
        for n in reversed(in_order(outputs)):
            g = gradient.get(n.id)
            if g is None or not n.args:
                continue
            a = n.args[0]
            b = n.args[1] if len(n.args) > 1 else None
            if n.op == "+":
                give(a, g)
                give(b, g)
            elif n.op == "-":
                give(a, g)
                give(b, -g)
            elif n.op == "*":
                give(a, g * b)
                give(b, g * a)
            elif n.op == "/":
                if b.id in fixed:  # the compiler computes 1 / b once for all steps
                    give(a, g * (graph.one / b))
                    give(b, -(g * (n * (graph.one / b))))
                else:
                    give(a, g / b)
                    give(b, -(g * (n / b)))
            elif n.op == "neg":
                give(a, -g)
            elif n.op == "exp":
                give(a, g * n)
            elif n.op == "abs":
                give(a, g * node("sign", a))
            elif n.op == "maximum":
                give(a, node("share", a, b, g))
                give(b, node("share", b, a, g))
            elif n.op == "minimum":
                give(a, node("share", b, a, g))
                give(b, node("share", a, b, g))
            elif n.op in CONDITIONS:
                give(a, graph.through(node("slope", a), g))
            elif n.op == "either":
                give(a, g)
                give(b, g)
            elif n.op == "level":
                give(a, graph.inside(a, *n.args[3:], g))
            elif n.op == "select":
                condition, a, b = n.args
                give(a, select(condition, g, zero))
                give(b, select(condition, zero, g))
                if condition.op != "detach":
                    give(condition, g * (a - b))
        return [gradient.get(n.id, zero) for n in wanted]

    def directions(self, with_parameters: bool) -> list[Symbol]:
        """Return the inputs along which ``tangent`` differentiates."""
        return [self.x, *(self.parameters[: len(self.neuron.learnt)] if with_parameters else ())]

    def tangent(self, direction: Symbol) -> tuple[list[Symbol], list[Symbol]]:
        """Differentiate along one input in forward mode. Return (d_states, [ds, *d_after]). x must be finite, see HUGE.

        The states before the step depend on that input too: d_states are new inputs, their derivatives.
        """
        graph = self.graph
        zero, node = graph.zero, graph.node
        d_states = [graph.input(f"d_{s.value}_{direction.value}") for s in self.states]
        inputs = (direction, *self.states)
        d = {direction.id: graph.one} | {s.id: t for s, t in zip(self.states, d_states)}
        outputs = (self.spike, *self.after)
        smooth = {n.id for n in in_order(outputs) if not n.args}
        for n in in_order(outputs):
            if n.id in d or not n.args:
                continue
            if n.op in _SMOOTH and all(a.id in smooth for a in n.args):
                # Sum the partial derivatives: d_v (1 - r) + r takes fewer operations than d_v + (1 - d_v) r.
                smooth.add(n.id)
                t = zero
                for i, partial in zip((*inputs[1:], direction), self._pull((n,), (graph.one,), (*inputs[1:], direction))):
                    t = t + d[i.id] * partial
                d[n.id] = t
                continue
            a = n.args[0]
            b = n.args[1] if len(n.args) > 1 else None
            da, db = d.get(a.id, zero), zero if b is None else d.get(b.id, zero)
            if n.op == "+":
                t = da + db
            elif n.op == "-":
                t = da - db
            elif n.op == "*":
                t = da * b + a * db
            elif n.op == "/":
                t = (da - n * db) / b
            elif n.op == "neg":
                t = -da
            elif n.op == "exp":
                t = n * da
            elif n.op == "abs":
                t = node("sign", a) * da
            elif n.op == "maximum":
                t = node("share", a, b, da) + node("share", b, a, db)
            elif n.op == "minimum":
                t = node("share", b, a, da) + node("share", a, b, db)
            elif n.op in CONDITIONS:
                t = node("slope", a) * da
            elif n.op == "either":
                t = da + db
            elif n.op == "level":
                t = graph.inside(a, *n.args[3:], da)
            elif n.op == "select":
                condition, a, b = n.args
                t = graph.select(condition, d.get(a.id, zero), d.get(b.id, zero))
                for fired in () if condition.op == "detach" else comparisons_of(condition):
                    z = fired.args[0]
                    slope, dz, jump = node("slope", z), d.get(z.id, zero), a - b
                    # slope * dz is the tangent of the spike, which is known already. The slope is 0 where the jump is infinite.
                    t = t + (jump if _is_polynomial(jump) else node("unless_zero", slope, jump)) * (slope * dz)
            else:  # detach
                t = zero
            d[n.id] = t
        return d_states, [d.get(n.id, zero) for n in outputs]

    def replay(self, x, s, p, o):
        """Run the traced step on tensors or on symbols. It takes and returns what ``neuron.step`` does."""
        names = {name: vars_ for vars_, group in ((s, self.neuron.states), (p, self.neuron.parameters)) for name in group}
        found = {}
        for n in in_order((self.spike, *self.after)):
            a = [found[m.id] for m in n.args]
            if n.op == "input":
                found[n.id] = x if n.value == "x" else getattr(names[n.value], n.value)
            elif n.op == "number":
                found[n.id] = float(n.value)
            elif n.op in _ARITHMETIC:
                found[n.id] = _ARITHMETIC[n.op](*a)
            elif n.op == "neg":
                found[n.id] = -a[0]
            elif n.op == "select":
                found[n.id] = o.where(*a)
            elif n.op == "level":
                z, unit = (found[m.id] for m in n.args[0].args) if n.args[0].op == "/" else (a[0], 1.0)
                found[n.id] = o.level(z, int(a[1]), int(a[2]), unit, (a[3], a[4]))
            else:  # fire, fire_above, either, maximum, minimum, abs, exp, detach
                found[n.id] = getattr(o, n.op)(*a)
        after = tuple(found[n.id] for n in self.after)
        return found[self.spike.id], after if len(after) > 1 else after[0]

    def plan(self, with_parameters: bool) -> Plan:
        """Choose what the backward pass keeps: what makes the pullback cheapest. The states always suffice."""
        if with_parameters not in self._plans:  # every launch asks
            self._plans[with_parameters] = self._plan(with_parameters)
        return self._plans[with_parameters]

    def _plan(self, with_parameters):
        roots = self.pullback(with_parameters)
        fixed = {n.id for n in (*self.parameters, *self.numbers, self.d_spike, *self.d_after)}
        states = {s.id for s in self.states}
        forward = {n.id for n in in_order((self.spike, *self.after))}
        used = (a for n in in_order(roots) if n.id not in forward for a in n.args if a.id in forward)
        inside = [n for n in dict.fromkeys(used) if n.args and not is_condition(n) and n.op != "detach"]
        found = [(self._cost(roots, fixed, self.after), True, self.after)]
        for j in range(len(states)):
            for n in inside:
                tape = (*self.after[:j], n, *self.after[j + 1 :])
                cost = self._cost(roots, fixed, tape)
                if not cost[1] & states:
                    found.append((cost, all(a is b for a, b in zip(tape, self.after)), tape))
        (_, needed, uses_tape), keeps_states, tape = min(found, key=lambda f: (f[0][0] + len(f[0][1]), not f[1]))
        return Plan(tape, keeps_states, uses_tape, self.x.id in needed, bool(needed & states))

    def _cost(self, roots, fixed, tape):
        """Return (number of operations, inputs of the step that are needed, whether the tape is needed) of a pullback."""
        taped = {n.id for n in tape}
        given = fixed | taped
        nodes = in_order(roots, given)
        inputs = {n.id for n in nodes} & {n.id for n in (self.x, *self.states)}
        work = sum(n.id not in given and bool(n.args) for n in nodes)
        # The pullback compares fire's argument with 0. If the step did too, a compiler would keep the result for all steps.
        compared = sum(n.args[0].id in taped for n in in_order((self.spike, *self.after)) if n.op in CONDITIONS)
        return work + 2 * compared, inputs, any(n.id in taped for n in nodes)
