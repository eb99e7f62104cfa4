"""A neuron's step as symbols: its derivatives against autograd, its code, what it refuses. Then neurons on every backend."""

import functools
import linecache
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import hypothesis.strategies as st
import native_triton
import pytest
import torch
from helpers import ROOT, python
from hypothesis import given, settings
from test_lif import BACKENDS, DIMENSION, LAYOUTS, with_layout
from torch import Tensor

from sdit_kernels import SURROGATES, backend
from sdit_kernels.neuron import NEURONS, Neuron, Trace, Variant
from sdit_kernels.neuron import __main__ as command_line
from sdit_kernels.neuron.printer import LANGUAGES, TORCH, load, text
from sdit_kernels.ops.neuron import define
from sdit_kernels.reference.neuron import bind

F64 = torch.float64


def ilif(x, s, p, o):
    """Integer firing with a soft reset."""
    h = p.beta * s.v + x
    c = o.level(h / p.theta, 0, 4)
    return c, h - c * p.theta


def ternary(x, s, p, o):
    h = s.v + (x - s.v) * p.r
    c = o.where(o.fire(h - p.theta), 1.0, 0.0) - o.where(o.fire(-h - p.theta), 1.0, 0.0)
    return c, h - c * p.theta


def synaptic(x, s, p, o):
    """snnTorch's Synaptic, reset "subtract"."""
    i = p.alpha_ * s.i + x
    v = p.beta * s.v + i - o.detach(o.fire_above(s.v - p.theta)) * p.theta
    return o.fire_above(v - p.theta), (i, v)


def adlif(x, s, p, o):
    """A membrane with an adaptation current."""
    v = p.beta * s.v + (x - s.w) * (1.0 - p.beta)
    fired = o.fire(v - p.theta)
    return fired, (o.where(fired, 0.0, v), p.rho * s.w + p.a * v + fired * p.b)


def eif(x, s, p, o):
    """An exponential integrate-and-fire neuron."""
    h = s.v + 0.3 * (x - s.v + p.sharp * o.exp((s.v - p.knee) / p.sharp))
    fired = o.fire(h - 1.0)
    return fired, o.where(fired, 0.0, h)


def everything(x, s, p, o):
    """Every operation once."""
    h = -o.maximum(s.v, 0.25 * x) + o.minimum(p.a, o.abs(x)) / (2.0 + o.exp(-o.abs(s.v)))
    fired = o.fire(h - p.a)
    gate = o.where(o.detach(fired), h, 1.0 - h)
    return gate * fired, o.detach(h) * p.a - fired * gate + 3


def both(x, s, p, o):
    """One kind of spike at two thresholds."""
    h = s.v + x
    fired = o.either(o.fire(h - p.theta), o.fire_above(-h - p.theta))
    return fired, o.where(fired, 0.25, h)


STEPS = {
    "both": Neuron("both", both, parameters=("theta",)),
    "ilif": Neuron("ilif", ilif, parameters=("beta", "theta")),
    "ternary": Neuron("ternary", ternary, parameters=("r", "theta")),
    "synaptic": Neuron("synaptic", synaptic, ("i", "v"), ("alpha_", "beta", "theta"), start=(None, None)),
    "adlif": Neuron("own_adlif", adlif, ("v", "w"), ("beta", "theta", "rho", "a", "b"), start=(None, None)),
    "eif": Neuron("eif", eif, parameters=("sharp", "knee")),
    "everything": Neuron("everything", everything, parameters=("a",)),
}
CASES = [(n, {}) for n in STEPS.values()]
CASES += [
    (NEURONS["lif"], dict(soft=soft, decay=decay, detach=detach))
    for soft in (False, True)
    for decay in (False, True)
    for detach in (False, True)
]
CASES += [
    (NEURONS["lif"], dict(soft=True, levels="integer", span=(-1, 3))),
    (NEURONS["lif"], dict(soft=True, decay=False, detach=True, levels="integer", span=(0, 4), window=(-0.5, 4.5), scale=0.3)),
]
CASES += [
    (NEURONS["lif"], dict(soft=soft, detach=detach, levels="ternary")) for soft in (False, True) for detach in (False, True)
]
RESETS = ("subtract", "zero", "none")
CASES += [(NEURONS[name], dict(reset=r, delay=d)) for name in ("leaky", "cuba") for r in RESETS for d in (False, True)]
CASES += [(NEURONS["lapicque"], dict(reset=r)) for r in RESETS] + [(NEURONS["adlif"], {})]
NAMES = [f"{n.name}-{'-'.join(map(str, flags.values()))}" for n, flags in CASES]


def derivative(z, alpha=2.0):
    return SURROGATES["atan"].derivative(z, alpha)


def code_of(neuron, flags, with_parameters):
    code = text(Trace(neuron, flags), TORCH, with_parameters)
    return load(code, neuron.name, {"torch": torch, "surrogate_derivative": derivative})


def inputs(neuron, requires_grad=True):
    generator = torch.Generator().manual_seed(0)

    def draw(scale, shift):
        t = torch.randn(999, generator=generator, dtype=F64) * scale + shift
        return t.requires_grad_(requires_grad)

    states = [draw(1.0, 0.3) for _ in neuron.states]
    values = [draw(0.05, 0.6) for _ in neuron.parameters] + [-0.1 for _ in neuron.numbers]
    return draw(2.0, 0.3), states, values


@pytest.mark.parametrize("with_parameters", [False, True], ids=["", "parameters"])
@pytest.mark.parametrize("neuron, flags", CASES, ids=NAMES)
def test_the_printed_step_and_pullback_equal_the_definition_and_autograd(neuron, flags, with_parameters):
    x, states, values = inputs(neuron)
    learnt = [v for v in values if isinstance(v, Tensor)] if with_parameters else []
    spike, after = bind(neuron, values, derivative, **flags)(x, states)
    upstream = [torch.randn(999, dtype=F64) for _ in range(1 + len(after))]
    wanted = [x, *states, *learnt]
    want = torch.autograd.grad(
        [spike, *after], wanted, upstream, allow_unused=True, materialize_grads=True
    )  # fmt: skip
    functions, trace = code_of(neuron, flags, with_parameters), Trace(neuron, flags)
    with torch.no_grad():
        values = [v if isinstance(v, Tensor) else torch.full((), v, dtype=F64) for v in values]
        got, got_after = functions["step"](x, states, values)
        for a, b in zip((got, *got_after), (spike, *after)):
            assert torch.equal(a.expand_as(b), b)
        tape, recorded = functions["record"](x, states, values)
        assert all(torch.equal(a.expand_as(b), b) for a, b in zip(recorded, after))
        plan = trace.plan(with_parameters)
        given = (x if plan.uses_x else None), (states if plan.uses_states else None)
        dx, d_states, d_parameters = functions["pullback"](tape, *given, values, upstream[0], upstream[1:], 2.0)
    assert len(d_parameters) == len(learnt) and len(tape) == len(neuron.states)
    for g, w in zip((dx, *d_states, *d_parameters), want):
        torch.testing.assert_close(torch.as_tensor(g, dtype=F64).expand_as(w), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("neuron, flags", CASES, ids=NAMES)
def test_the_printed_forward_derivative_equals_the_reference_along_every_input(neuron, flags):
    """torch.func.jvp through the definition, in the direction of one input and with derivatives of the states before."""
    x, states, values = inputs(neuron, requires_grad=False)
    tangents = code_of(neuron, flags, True)["tangent"]
    numbers = values[len(neuron.parameters) :]
    learnt = values[: len(neuron.parameters)]
    d_states = [[torch.randn(999, dtype=F64) for _ in states] for _ in range(1 + len(learnt))]
    full = [*learnt, *(torch.full((), n, dtype=F64) for n in numbers)]
    after, ds, d_after = tangents(x, states, full, [t for d in d_states for t in d], 2.0)

    def step(x, states, learnt):
        spike, after = bind(neuron, [*learnt, *numbers], derivative, **flags)(x, states)
        return spike, *after

    for j in range(1 + len(learnt)):
        moved = [torch.ones_like(t) if i == j else torch.zeros_like(t) for i, t in enumerate((x, *learnt))]
        directions = moved[0], d_states[j], moved[1:]
        (_, *want_after), (want, *want_d) = torch.func.jvp(step, (x, states, learnt), directions)
        found = [ds[j], *d_after[j * len(states) : (j + 1) * len(states)]]
        for a, b in zip((*found, *after), (want, *want_d, *want_after)):
            torch.testing.assert_close(torch.as_tensor(a, dtype=F64).expand_as(b), b, rtol=1e-12, atol=1e-12)


def test_the_tape_is_what_costs_least():
    """lif keeps its charge alone, because the pullback needs nothing else; for the parameters, the states and x."""
    plan = Trace(NEURONS["lif"]).plan(False)
    assert not plan.keeps_states and plan.uses_tape and not plan.uses_x and not plan.uses_states
    plan = Trace(NEURONS["lif"]).plan(True)
    assert plan.keeps_states and plan.uses_x and plan.uses_states
    plan = Trace(NEURONS["leaky"]).plan(False)  # without a reset at once, the membrane after the step is the charge
    assert plan.keeps_states and plan.uses_tape and not plan.uses_x and not plan.uses_states


def trace_of(step, states=("v",), parameters=("a",)):
    return Trace(Neuron("test", step, states, parameters, start=(None,) * len(states)))


def test_a_step_keeps_what_is_not_exact_and_drops_what_is():
    def kept(x, s, p, o):
        return o.fire(x), x * 0.0 + (s.v + 0.0) * 1.0 - 0.0

    (after,) = trace_of(kept).after
    assert after.op == "+" and after.args[0].op == "*" and after.args[1].op == "+"
    zero = torch.tensor([-0.0, math.nan, math.inf], dtype=F64)
    functions = load(text(trace_of(kept), TORCH, False), "kept", {"torch": torch, "surrogate_derivative": derivative})
    _, (got,) = functions["step"](zero, (zero,), (zero,))
    assert torch.equal(got.isnan(), torch.tensor([False, True, True]))


REFUSED = {
    "if": lambda x, s, p, o: (o.fire(x), x if x else s.v),
    "and": lambda x, s, p, o: (o.fire(x), x and s.v),
    "<": lambda x, s, p, o: (o.fire(x), o.where(x < s.v, x, s.v)),
    "==": lambda x, s, p, o: (o.fire(x), o.where(x == s.v, x, s.v)),
    "**": lambda x, s, p, o: (o.fire(x), x**2),
    "%": lambda x, s, p, o: (o.fire(x), x % 2),
    "abs": lambda x, s, p, o: (o.fire(x), abs(x)),
    "round": lambda x, s, p, o: (o.fire(x), round(x)),
    "float": lambda x, s, p, o: (o.fire(x), math.exp(x)),
    "an element": lambda x, s, p, o: (o.fire(x), x[0]),
    "iteration": lambda x, s, p, o: (o.fire(x), sum(x)),
    "torch": lambda x, s, p, o: (o.fire(x), torch.exp(x)),
    "a tensor": lambda x, s, p, o: (o.fire(x), torch.ones(()) * x),
    "a method": lambda x, s, p, o: (o.fire(x), x.exp()),
    "a string": lambda x, s, p, o: (o.fire(x), o.where(o.fire(x), "v", x)),
    "a number as a condition": lambda x, s, p, o: (o.fire(x), o.where(x, x, s.v)),
    "too few outputs": lambda x, s, p, o: o.fire(x),
    "too many states": lambda x, s, p, o: (o.fire(x), (x, x)),
    "levels that are no integers": lambda x, s, p, o: (o.level(x, 0, 1.5), x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_a_type_error(name):
    with pytest.raises(TypeError, match="step|o.where|o.level"):
        trace_of(REFUSED[name])


def test_other_errors_name_what_came():
    with pytest.raises(AttributeError, match="b"):
        trace_of(lambda x, s, p, o: (o.fire(x), p.b))
    with pytest.raises(ValueError, match="lo=4, hi=0"):
        trace_of(lambda x, s, p, o: (o.level(x, 4, 0), x))
    with pytest.raises(ValueError, match="soft, decay, detach, levels, span, window, scale, got hard"):
        Trace(NEURONS["lif"], {"hard": True})
    with pytest.raises(ValueError, match="'subtract', 'zero', 'none', got 'one'"):
        Trace(NEURONS["leaky"], {"reset": "one"})
    kept = []
    trace_of(lambda x, s, p, o: (kept.append(x) or o.fire(x), x))
    with pytest.raises(TypeError, match="another trace"):
        trace_of(lambda x, s, p, o: (o.fire(x), x + kept[0]))


def test_a_long_step_traces_at_once():
    """100 nodes, with all derivatives and the choice of the tape, in under 0.1 s of this process's time."""

    def long(x, s, p, o):
        v = s.v
        for i in range(30):
            v = v * p.a + (x - s.w) * (1.0 + i)
        fired = o.fire(v - p.theta)
        return fired, (o.where(fired, 0.0, v), v * p.b + s.w)

    neuron = Neuron("long", long, ("v", "w"), ("a", "b", "theta"), start=(None, None))

    def seconds():
        start = time.process_time()
        trace = Trace(neuron)
        assert len(trace.graph.nodes) > 100
        trace.plan(True)
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.1


def test_code_has_a_name_of_its_content():
    """An edited step has other names, the same text has the same names, and its lines can be read back."""

    def names(factor):
        neuron = Neuron("edited", lambda x, s, p, o: (o.fire(x), s.v * factor), parameters=("a",))
        found = load(text(Trace(neuron), TORCH, False), "edited", {"torch": torch, "surrogate_derivative": derivative})
        return {entry: f.__name__ for entry, f in found.items()}, found

    one, functions = names(0.5)
    assert one == names(0.5)[0] and not set(one.values()) & set(names(0.25)[0].values())
    name = functions["step"].__code__.co_filename
    assert name.startswith("<sdit_kernels.neuron edited_") and "0.5" in "".join(linecache.getlines(name))


def test_the_command_prints_the_code_of_a_neuron(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["neuron", *arguments])
        command_line.main()
        return capsys.readouterr().out

    command = [sys.executable, "-m", "sdit_kernels.neuron", "leaky", "--flags", "reset=zero"]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout == run("leaky", "--flags", "reset=zero")
    for language in LANGUAGES:
        out = run("leaky", "--backend", language, "--flags", "reset=zero,delay=False", "--parameters")
        assert all(f"def {entry}(" in out for entry in ("step", "record", "pullback", "tangent"))
    out = run("lif", "--backend", "triton", "--flags", "soft,detach", "--only", "pullback")
    assert out.startswith("@triton.jit\ndef pullback(") and out.count("def ") == 1
    out = run("lif", "--backend", "triton", "--flags", "soft,levels=integer,span=(-1,4),scale=0.25", "--only", "step")
    assert "level(t3, -1.0, 4.0)" in out and "* 0.25" in out
    for flags, message in (
        ("levels=integer", "need a soft reset"),
        ("levels=many", "'binary', 'integer', 'ternary'"),
        ("hard", "soft, decay, detach"),
        ("soft=3", "must be a bool"),
        ("reset=one", "must name some"),
    ):
        with pytest.raises(SystemExit) as failed:
            run("lif", "--flags", flags)
        assert failed.value.code == 2 and message in capsys.readouterr().err


def test_the_code_can_be_written_to_a_folder(tmp_path):
    code = (
        "from sdit_kernels.neuron import NEURONS, Trace; from sdit_kernels.neuron.printer import TORCH, load, text;"
        "load(text(Trace(NEURONS['lif']), TORCH, False), 'lif', {})"
    )
    assert python(code, SDIT_KERNELS_DUMP=str(tmp_path)).returncode == 0
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("lif_") and "def lif_step_" in written.read_text()
    assert python(code).returncode == 0 and len(list(tmp_path.iterdir())) == 1


def test_states_and_parameters_reach_the_step_by_name():
    seen = SimpleNamespace()

    def step(x, s, p, o):
        seen.s, seen.p = vars(s), vars(p)
        return o.fire(x - p.a), (s.v, s.w)

    Trace(Neuron("named", step, ("v", "w"), ("a",), ("n",), (None, None)))
    assert list(seen.s) == ["v", "w"] and list(seen.p) == ["a", "n"]


# --- neurons that the library does not have, on every backend ----------------------------------------------------------------


@functools.cache
def operator(neuron):
    """Make a neuron an operator with one list of numbers."""
    return define(
        neuron,
        neuron.parameters,
        "float[] values, str surrogate, float alpha",
        lambda values, surrogate, alpha: Variant(neuron, (), tuple(values), surrogate, alpha),
        lambda *_: None,
    )


def run_operator(name, neuron, x, states, parameters, values):
    """Return (spikes, last states, sequences of the states)."""
    n = len(neuron.states)
    keep = x.shape[0] > 16
    with backend(name), native_triton.launches() as counts:
        found = operator(neuron)(x, *states, *parameters, list(values), "atan", 2.0, True, True, None, keep, name)
    assert bool(counts) == (name == "triton")
    return found[0], found[1 : 1 + n], found[1 + n : 1 + 2 * n]


def run_definition(neuron, x, states, parameters, values):
    step = bind(neuron, [v if p is None else p for p, v in zip(parameters, values)], derivative)
    states = [torch.zeros_like(x[0]) if v is None else v for v in states]
    spikes, sequence = [], []
    for x_t in x:
        s, states = step(x_t, states)
        spikes.append(s)
        sequence.append(states)
    return torch.stack(spikes), states, [torch.stack(column) for column in zip(*sequence)]


VALUES = {
    "eif": (0.25, 0.5),
    "own_adlif": (0.8, 1.0, 0.9, 0.1, 0.3),
    "synaptic": (0.7, 0.9, 1.0),
    "ilif": (0.75, 1.0),
    "ternary": (0.5, 1.0),
}


def compare_with_definition(name, neuron, x, given_states, kinds, seed=0):
    """Compare all outputs and gradients in float64. kinds: "number", "scalar" or "channel" per parameter."""
    values = VALUES[neuron.name]
    generator = torch.Generator().manual_seed(seed)
    states = [
        torch.randn(x.shape[1:], generator=generator, dtype=F64).requires_grad_() if given_states else None
        for _ in neuron.states
    ]
    shapes = {"scalar": (), "channel": x.shape[-1:]}
    parameters = [
        None if kind == "number" else torch.full(shapes[kind], value, dtype=F64, requires_grad=True)
        for kind, value in zip(kinds, values)
    ]
    x = x.detach().requires_grad_()
    leaves = [t for t in (x, *states, *parameters) if t is not None]
    results = []
    for function in (functools.partial(run_operator, name), run_definition):
        s, last, sequence = function(neuron, x, states, parameters, values)
        outputs = [s, *last, *sequence]
        upstream = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i), dtype=F64) for i, o in enumerate(outputs)]
        results.append((outputs, torch.autograd.grad(outputs, leaves, upstream)))
    (outputs, gradients), (want, want_gradients) = results
    assert torch.equal(outputs[0], want[0])
    for a, b in zip(outputs, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)
    for a, b in zip(gradients, want_gradients):
        scale = b.nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * max(1.0, scale), equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kinds", [("number", "number"), ("scalar", "channel")], ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_a_neuron_of_the_user_equals_autograd_on_every_backend(name, kinds, data):
    """eif, an exponential integrate-and-fire neuron with two learnt parameters."""
    shape = (data.draw(st.sampled_from([1, 4, 17, 40])), *data.draw(st.lists(DIMENSION, min_size=1, max_size=2)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = with_layout(2 * torch.randn(shape, generator=generator, dtype=F64), data.draw(st.sampled_from(LAYOUTS)))
    special = data.draw(st.sampled_from([None, None, math.nan, math.inf, -math.inf]))
    if special is not None and x.numel():
        x[0].flatten()[:1].fill_(special) if x[0].is_contiguous() else x.select(0, 0).fill_(special)
    compare_with_definition(name, STEPS["eif"], x, data.draw(st.booleans()), kinds)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("neuron, learnt", [("adlif", True), ("synaptic", False), ("ilif", True), ("ternary", False)])
def test_two_states_and_levels_equal_autograd_on_every_backend(name, neuron, learnt):
    """Each variant compiles its own kernels, so there are few."""
    kinds = ["scalar", "channel", "number", "channel", "scalar"][: len(VALUES[STEPS[neuron].name])]
    for T in (3, 18):
        x = 2 * torch.randn(T, 3, 11, generator=torch.Generator().manual_seed(1), dtype=F64)
        compare_with_definition(name, STEPS[neuron], x, T > 16, kinds if learnt else ["number"] * len(kinds))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_neuron_of_the_user_in_float32_and_bfloat16(name, dtype):
    """Spikes are equal wherever the membrane stays away from the threshold in float64."""
    x = (2 * torch.randn(20, 600, generator=torch.Generator().manual_seed(2))).to(dtype)
    s, (v,), _ = run_operator(name, STEPS["eif"], x, [None], [None, None], VALUES["eif"])
    assert s.dtype == dtype and v.dtype == torch.float32
    wide = x.double()
    want, _, (v_seq,) = run_definition(STEPS["eif"], wide, [None], [None, None], VALUES["eif"])
    before = torch.cat([torch.zeros_like(wide[:1]), v_seq[:-1]])
    h = before + 0.3 * (wide - before + 0.25 * torch.exp((before - 0.5) / 0.25))
    clear = ((h - 1).abs() > 1e-4).all(0)
    assert clear.float().mean() > 0.9 and torch.equal(s[:, clear].double(), want[:, clear])
