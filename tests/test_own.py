"""sdit_kernels.neuron.define: neurons of the user as ops and modules, on every backend, and what it refuses."""

import copy
import math
import pickle
import threading

import hypothesis.strategies as st
import native_triton
import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, python
from hypothesis import given, settings
from oracle import loops
from test_lif import LAYOUTS, exact, saved, with_layout
from torch import Tensor

from sdit_kernels import SURROGATES, backend, cuba, nn
from sdit_kernels.neuron import define
from sdit_kernels.tuning import tuned

BACKENDS = ["reference", "cpu", "triton"]


def klif(x, s, p, o):
    """KLIF with a soft reset."""
    h = s.v + (x - s.v) * 0.5
    f = o.maximum(p.k * h, 0.0)
    fired = o.fire(f - 1.0)
    return fired, f - fired * 1.0


def adaptive(x, s, p, o, *, hard=False):
    """A threshold that grows with each spike: ALIF."""
    h = p.beta * s.v + x
    theta = 1.0 + p.strength * s.b
    fired = o.fire(h - theta)
    return fired, (o.where(fired, 0.0, h) if hard else h - fired * theta, p.rho * s.b + (1.0 - p.rho) * fired)


def levels(x, s, p, o):
    h = 0.5 * s.v + x
    c = o.level(h, 0, 4)
    return c, h - c


def constant(x, s, p, o):
    """No parameter, states that are numbers or come from nothing else, and functions of constants."""
    h = o.exp(-1.0) * s.v + x + o.maximum(1.0, 0.5) * o.detach(0.25) - o.abs(-0.5)
    return o.fire_above(h - o.minimum(1.0, 2.0)), (h, 0.25)


KLIF = define(klif, parameters={"k": 1.0})
ALIF = define(adaptive, ("v", "b"), ("beta", "rho", "strength"), {"b": 0.5})
SETTINGS = dict(beta=0.5, rho=0.75, strength=1.5)


def outputs_and_gradients(where, call, tensors, seed=0):
    leaves = [t.detach().clone().requires_grad_() if t.is_contiguous() else t.detach().requires_grad_() for t in tensors]
    with backend(where), tuned(SMALL), native_triton.launches() as counts:
        s, *rest = call(*leaves)
        outputs = [s, *(t for group in rest for t in group)]
        made = torch.Generator().manual_seed(seed)
        upstream = [torch.randn(o.shape, generator=made).to(o.dtype) for o in outputs]
        used = [(o, g) for o, g in zip(outputs, upstream) if o.requires_grad]  # a constant state has no gradient
        found = torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used])
    assert bool(counts) == (where == "triton" and leaves[0].numel() > 0)
    return outputs, found


def assert_equal_to_reference(where, call, tensors, seed=0, close=False):
    """Outputs are equal bit for bit. Gradients are equal up to rounding."""
    (got, gradients), (want, wanted) = (outputs_and_gradients(name, call, tensors, seed) for name in (where, "reference"))
    for o, w in zip(got, want, strict=True):
        assert o.dtype == w.dtype and torch.equal(o.nan_to_num(7.5), w.nan_to_num(7.5))
    scale = max(1.0, *(g.nan_to_num(0, 0, 0).abs().max().item() for g in wanted if g.numel()), 0.0)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}
    for g, w in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance[g.dtype], atol=tolerance[g.dtype] * scale, equal_nan=True)
    return got


# --- values and gradients -----------------------------------------------------------------------------------------------------


def test_the_reference_of_klif_equals_python():
    x, k = exact((9, 30), torch.float64, 1), 1.5
    with backend("reference"):
        s, (v,) = KLIF(x, k=k, return_state_seq=True)
    for n in range(30):
        before = 0.0
        for t in range(9):
            h = before + (x[t, n].item() - before) * 0.5
            f = max(k * h, 0.0)
            before = f - (f >= 1.0)
            assert (s[t, n].item(), v[t, n].item()) == (f >= 1.0, before)


def test_the_gradient_of_klif_is_the_chain_rule():
    """Two steps of one neuron, by hand. The first fires: f = 1.5, v = 0.5; the second does not: h = 0.375, f = 0.5625."""
    x = torch.tensor([[2.0], [0.25]], requires_grad=True)
    k = torch.tensor(1.5, requires_grad=True)
    for where in BACKENDS:
        with backend(where):
            s = KLIF(x, k=k, surrogate="fast_sigmoid", alpha=1.0)
            dx, dk = torch.autograd.grad(s.sum(), (x, k))
        g1, g2 = 1 / 1.5**2, 1 / (1 + 0.4375) ** 2
        assert s.flatten().tolist() == [1.0, 0.0]
        back = g2 * 1.5 * 0.5 * (1 - g1)  # through v = f - s
        torch.testing.assert_close(dx.flatten(), torch.tensor([(g1 + back) * 1.5 * 0.5, g2 * 1.5 * 0.5]))
        assert math.isclose(dk, (g1 + back) * 1.0 + g2 * 0.375, rel_tol=1e-6)


@pytest.mark.parametrize("where", BACKENDS[1:])
@pytest.mark.parametrize("kind, dtype, T", [("channel", torch.float32, 20), ("number", torch.float32, 4)], ids=str)
@settings(max_examples=5)
@given(data=st.data())
def test_a_neuron_of_two_states_equals_its_reference(where, kind, dtype, T, data):
    seed, shape = data.draw(st.integers(0, 99)), (T, data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([1, 17])))
    x = with_layout(exact(shape, dtype, seed), data.draw(st.sampled_from(LAYOUTS)))
    special = data.draw(st.sampled_from([None, math.nan, -0.0]))
    if special is not None:
        x[0, 0, 0] = special
    state = [exact(shape[1:], dtype, seed + j, -16, 32) for j in (1, 2)] if kind == "channel" else []
    p = [torch.full(shape[-1:], v, dtype=dtype) for v in SETTINGS.values()] if kind == "channel" else []

    def call(x, *rest):
        values = dict(zip(SETTINGS, rest[2:])) if rest else SETTINGS
        return ALIF(x, rest[:2] or None, **values, return_state=True, return_state_seq=True)

    assert_equal_to_reference(where, call, [x, *state, *p], seed)


@pytest.mark.parametrize("where", BACKENDS[1:])
def test_flags_and_constants_equal_the_reference(where):
    x = exact((4, 2, 5), torch.float32, 3)
    hard = assert_equal_to_reference(where, lambda x: ALIF(x, **SETTINGS, hard=True, return_state=True), [x])
    with backend(where):
        assert not torch.equal(hard[1], ALIF(x, **SETTINGS, return_state=True)[1][0])
    op = define(constant, ("v", "c"))
    assert_equal_to_reference(where, lambda x: op(x, return_state=True), [x])
    with backend(where):
        assert torch.equal(op(x, return_state=True)[1][1], torch.full((2, 5), 0.25))


@pytest.mark.parametrize("where", BACKENDS)
def test_levels_are_integers(where):
    x = exact((4, 30), torch.float32, 3)
    with backend(where):
        s, (v,) = define(levels)(x, return_state=True)
    assert set(s.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0} and v.abs().max() < 6


def other_cuba(x, s, p, o):
    """cuba with the default flags, written again."""
    i = p.beta_i * s.i + x
    h = p.beta * s.v + i - o.detach(o.fire_above(s.v - p.v_threshold)) * p.v_threshold
    return o.fire_above(h - p.v_threshold), (i, h)


@pytest.mark.parametrize("where", ["reference", "triton"])
def test_cuba_as_a_users_neuron_equals_cuba_and_the_loop(where):
    op = define(other_cuba, ("i", "v"), {"beta_i": 0.5, "beta": None, "v_threshold": 1.0})
    x = exact((4, 3, 5), torch.float64, 1).requires_grad_()
    beta = torch.full((5,), 0.75, dtype=torch.float64, requires_grad=True)
    with backend(where):
        found = [
            (s, *state, *torch.autograd.grad(s.square().sum() + state[1].sum(), [x, beta]))
            for s, state in (f(x, beta_i=0.5, beta=beta, return_state=True) for f in (op, cuba))
        ]
    assert all(torch.equal(a, b) for a, b in zip(*found))
    want, _ = loops.cuba(x.detach().numpy(), beta_i=0.5, beta=0.75)
    for got, w in zip(found[0], want[:3]):
        np.testing.assert_array_equal(got.detach().numpy(), w)


def test_states_start_from_start():
    op, x, v = define(klif, parameters={"k": 1.0}, start=0.75), exact((2, 6), torch.float32, 1), torch.full((6,), 0.75)
    with backend("reference"):
        want = KLIF(x, (v,), return_state=True)
        assert not torch.equal(KLIF(x, return_state=True)[1][0], want[1][0])
        found = op(x, return_state=True)
        assert torch.equal(found[0], want[0]) and torch.equal(found[1][0], want[1][0])
    for where in BACKENDS[1:]:
        assert_equal_to_reference(where, lambda x: op(x, return_state=True), [x])
        with backend(where):
            assert torch.equal(op(x[:0], return_state=True)[1][0], v)


@pytest.mark.parametrize("where", BACKENDS[1:])
def test_saved_bytes_are_inputs_and_few_states(where):
    x, long = torch.randn(4, 64, 32, requires_grad=True), torch.randn(64, 8, 32, requires_grad=True)
    with backend(where):
        assert saved(lambda: ALIF(x, **SETTINGS))[0] == x.nbytes
        assert saved(lambda: ALIF(long, **SETTINGS))[0] == long.nbytes + 2 * 3 * 8 * 32 * 4


def test_spikes_of_inference_may_be_bytes_if_they_are_0_or_1():
    x = exact((4, 6), torch.float32, 0)
    for where in ("reference", "triton"):
        with backend(where):
            assert torch.equal(KLIF(x, spike_dtype=torch.bool), KLIF(x).bool())
    with pytest.raises(ValueError, match="spike_dtype is for spikes that are 0 or 1, and levels computes others"):
        define(levels)(x, spike_dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore:a surrogate function of your own")
def test_a_users_surrogate_gives_the_gradient():
    x, entry = exact((4, 5), torch.float32, 0).requires_grad_(), SURROGATES["fast_sigmoid"]
    found = torch.autograd.grad(KLIF(x, surrogate=lambda z: entry.derivative(z, 3.0)).sum(), x)[0]
    with backend("reference"):
        want = torch.autograd.grad(KLIF(x, surrogate="fast_sigmoid", alpha=3.0).sum(), x)[0]
    torch.testing.assert_close(found, want)


# --- operators ----------------------------------------------------------------------------------------------------------------


def make(factor):
    return define(lambda x, s, p, o: (o.fire(s.v * factor + x - p.k), s.v * factor + x), parameters=("k",))


def test_equal_texts_share_an_operator_and_an_edited_step_has_another():
    a, b, c = make(0.5), make(0.5), make(0.25)
    x = torch.full((3, 1), 0.75, requires_grad=True)
    for where in BACKENDS:
        with backend(where), torch.profiler.profile() as profile:
            found = [op(x.detach(), k=1.0, return_state=True)[1][0].item() for op in (a, b, c)]
        assert found == [1.3125, 1.3125, 0.984375]
        names = {event.name for event in profile.events() if event.name.startswith("sdit_kernels::lambda_")}
        assert len(names) == (0 if where == "reference" else 2)

    def full(x, s, p, o):
        return o.fire(s.v - p.k), s.v * 0.5 + x

    def detached(x, s, p, o):  # has the same forward pass
        return o.fire(s.v - p.k), o.detach(s.v) * 0.5 + x

    detached.__name__ = "full"
    for where in ("reference", "triton"):
        with backend(where):
            ends = [define(step, parameters=("k",))(x, k=1.0, return_state=True)[1][0].sum() for step in (full, detached)]
            assert [torch.autograd.grad(end, x)[0][0].item() for end in ends] == [0.25, 0.0]


def test_several_threads_may_define_and_call_at_once():
    found, errors = [], []

    def work(i):
        try:
            op = make(0.25)
            x = exact((3, 50), torch.float32, i).requires_grad_()
            found.append(torch.autograd.grad(op(x, k=1.0).sum(), x)[0].isfinite().all().item())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6 and not errors


@pytest.mark.parametrize("where", BACKENDS[1:])
def test_the_guarantees_of_all_ops_hold(where):
    """torch.compile, torch.export, vmap, autocast, fake and meta tensors, forward mode, second derivatives."""
    from torch._subclasses import FakeTensorMode

    op, values = ALIF, SETTINGS
    x = exact((3, 4, 5), torch.float32, 1).requires_grad_()
    parameters = {n: torch.full((5,), v, requires_grad=True) for n, v in values.items()}
    leaves = [x, *parameters.values()]

    def loss(x, *p):
        s, state = op(x, **dict(zip(parameters, p)), return_state=True)
        return (s * s.detach()).sum() + sum(v.square().sum() for v in state)

    torch.compiler.reset()
    with backend(where):
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*leaves), loss(*leaves))
        for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)):
            torch.testing.assert_close(a, b)

        class Net(torch.nn.Module):
            def forward(self, x):
                return op(x, **values)

        program = torch.export.export(Net(), (x.detach(),), dynamic_shapes={"x": {1: torch.export.Dim("batch")}})
        assert torch.equal(program.module()(x[:, :2]), op(x[:, :2], **values))
        batch = torch.stack([x, x.flip(1)]).detach()
        assert torch.equal(torch.func.vmap(lambda t: op(t, **values))(batch), torch.stack([op(t, **values) for t in batch]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert op(torch.nn.functional.linear(x, torch.eye(5)), **values).dtype == torch.bfloat16
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert op(mode.from_tensor(x), **values).shape == x.shape
        assert op(x.detach().to("meta"), **values).is_meta
        assert any("sdit_kernels." in str(node.target) for node in program.graph.nodes)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(torch.autograd.grad(loss(*leaves), x, create_graph=True)[0].square().sum(), x)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda t: op(t, **values), (x.detach(),), (x.detach(),))
    with backend("reference"):
        assert torch.autograd.grad(torch.autograd.grad(loss(*leaves), x, create_graph=True)[0].square().sum(), x)
        torch.func.jvp(lambda t: op(t, **values), (x.detach(),), (x.detach(),))


@pytest.mark.parametrize("where", BACKENDS[1:])
def test_opcheck_passes(where):
    from test_contract import Recorded

    x = torch.randn(18, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    p = {n: torch.full((5,), v, requires_grad=True) for n, v in SETTINGS.items()}
    torch.use_deterministic_algorithms(False)
    with backend(where), Recorded() as mode:
        s, state = ALIF(x, (None, x[0].detach()), **p, return_state=True)
        torch.autograd.grad([s, *state], [x, *p.values()], [torch.ones_like(t) for t in (s, *state)])
    assert len(mode.calls) == 2 and "adaptive_" in mode.calls[0][0].name()
    for function, args in mode.calls:
        if "backward" not in function.name():
            args = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(function, args)


# --- modules ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", BACKENDS[:2])
def test_a_module_keeps_its_states_and_learns_its_parameters(where):
    rho, hard = torch.nn.Parameter(torch.full((5,), 0.75)), where == "reference"
    module = ALIF.module(beta=torch.tensor(0.5), rho=rho, strength=1.5, hard=hard, store_state_seq=True)
    assert dict(module.named_parameters()) == {"rho": rho} and list(dict(module.named_buffers())) == ["beta"]
    x = exact((7, 3, 5), torch.float32, 1)
    with backend(where):
        want, state, seq = ALIF(x, **SETTINGS | dict(rho=rho), hard=hard, return_state=True, return_state_seq=True)
        s = torch.cat([module(x[:3]), module(x[3:])])
        assert torch.equal(s, want) and torch.equal(module.v, state[0]) and torch.equal(module.b, state[1])
        assert torch.equal(module.b_seq, seq[1][3:])
        for a, b in zip(torch.autograd.grad(s.sum(), [rho]), torch.autograd.grad(want.sum(), [rho])):
            torch.testing.assert_close(a, b)
        nn.detach(module)
        assert module.v.grad_fn is None and module.b.grad_fn is None
        nn.reset(torch.nn.Sequential(module))
        assert module.v is module.b is module.b_seq is None
        module.step_mode = "s"
        assert torch.equal(torch.stack([module(x_t) for x_t in x]), want)
    assert repr(module).startswith(f"adaptive(beta=Tensor(), rho=Parameter(5,), strength=1.5, hard={hard}, surrogate='atan'")


def test_a_module_compiles_in_one_graph():
    torch.compiler.reset()
    module, twin = (ALIF.module(**SETTINGS) for _ in range(2))
    x = exact((4, 3, 5), torch.float32, 1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for part in x.split(2):
        assert torch.equal(compiled(part), twin(part))
    assert torch.equal(module.b, twin.b)


def test_modules_can_be_copied_and_pickled():
    x = exact((4, 3, 5), torch.float32, 1)
    module = KLIF.module(k=torch.nn.Parameter(torch.tensor(1.5)))
    module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.op._operator is KLIF._operator and torch.equal(other.v, module.v)
        assert torch.equal(other(x), copy.deepcopy(module)(x))
    local = make(0.5).module(k=1.0)  # a lambda can be copied, and Python cannot import it
    assert torch.equal(copy.deepcopy(local)(x), local(x))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(local)


@pytest.mark.process
def test_a_module_of_an_importable_step_works_in_a_spawned_process(tmp_path):
    (tmp_path / "my_neurons.py").write_text(
        "from sdit_kernels import neuron\n"
        "def step(x, s, p, o):\n    h = s.v * p.beta + x\n    fired = o.fire(h - 1.0)\n    return fired, h - fired * 1.0\n"
        "op = neuron.define(step, parameters={'beta': 0.5})\n"
    )
    code = (
        "import torch, sys, multiprocessing\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import my_neurons\n"
        "if __name__ == '__main__':\n"
        "    net = my_neurons.op.module(beta=0.25)\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        there = pool.apply(net, (torch.ones(3, 2),))\n"
        "    print(torch.equal(there, net(torch.ones(3, 2))))\n"
    )
    script = tmp_path / "main.py"
    script.write_text(code)
    done = python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 0 and done.stdout.strip().endswith("True"), done.stderr[-2000:]


# --- errors -------------------------------------------------------------------------------------------------------------------


def fires(x, s, p, o):
    return o.fire(x), s.v


REFUSED = {
    "a step that is not a function": (TypeError, "step must be a function", lambda: define("klif")),
    "too few arguments": (TypeError, r"step must take the arguments \(x, s, p, o\)", lambda: define(lambda x, s: x)),
    "a flag that is not a bool": (TypeError, "argument mode of the step", lambda: define(lambda x, s, p, o, *, mode="a": x)),
    "no flag default": (TypeError, "argument mode of the step", lambda: define(lambda x, s, p, o, *, mode: x)),
    "a state alone": (TypeError, "states must be a sequence of names", lambda: define(fires, "v")),
    "no state": (ValueError, "at least one state", lambda: define(fires, ())),
    "states that are no names": (TypeError, "states must be names, got int", lambda: define(fires, (1,))),
    "one name twice": (ValueError, "different names, got 'v' twice", lambda: define(fires, ("v",), ("v",))),
    "a start of no state": (ValueError, "start must name states, v, got w", lambda: define(fires, start={"w": 1.0})),
    "an infinite start": (ValueError, "start of v must be finite, got inf", lambda: define(fires, start=math.inf)),
    "a default that is not a number": (TypeError, "default of the parameter k", lambda: define(fires, parameters={"k": "a"})),
    "one state too many": (TypeError, "return 1 states .v., got 2", lambda: define(lambda x, s, p, o: (o.fire(x), (x, x)))),
    "no states": (TypeError, r"must return \(spike, state\)", lambda: define(lambda x, s, p, o: o.fire(x))),
    "a constant spike": (TypeError, "must return a spike that it computes", lambda: define(lambda x, s, p, o: (1.0, x))),
    "an infinite constant": (ValueError, "constants of a step must be finite, got inf",
                             lambda: define(lambda x, s, p, o: (o.fire(x), x * math.inf))),
    "a constant NaN": (ValueError, "must be finite, got nan", lambda: define(lambda x, s, p, o: (o.fire(x), math.nan))),
    "an unknown parameter": (AttributeError, "uses a name that it does not have.*its states are v, its parameters k",
                             lambda: define(lambda x, s, p, o: (o.fire(x - p.j), x), parameters=("k",))),
    "a method of tensors": (TypeError, "a symbol has no .sum", lambda: define(lambda x, s, p, o: (o.fire(x), x.sum()))),
    "another dtype": (TypeError, "a symbol has no .double", lambda: define(lambda x, s, p, o: (o.fire(x), s.v.double()))),
    "firing of a number": (TypeError, "o.fire needs a value that depends", lambda: define(lambda x, s, p, o: (o.fire(1.0), x))),
    "if": (TypeError, "if, and, or, not of a symbol", lambda: define(lambda x, s, p, o: (o.fire(x), x if x else s.v))),
    "==": (TypeError, "== of a symbol", lambda: define(lambda x, s, p, o: (o.fire(x), x == s.v))),
    "<": (TypeError, "< or > of a symbol", lambda: define(lambda x, s, p, o: (o.fire(x), x < s.v))),
    "**": (TypeError, r"\*\* of a symbol", lambda: define(lambda x, s, p, o: (o.fire(x), x**2))),
    "iteration": (TypeError, "an element of a symbol", lambda: define(lambda x, s, p, o: (o.fire(x), sum(x)))),
    "torch": (TypeError, "a torch function of a symbol", lambda: define(lambda x, s, p, o: (o.fire(x), torch.tanh(x)))),
    "numpy": (TypeError, "symbol", lambda: define(lambda x, s, p, o: (o.fire(x), np.exp(x)))),
    "a reversed window": (ValueError, "got .3, 1.", lambda: define(lambda x, s, p, o: (o.level(x, 0, 4, 1, (3, 1)), x))),
    "a number as window": (TypeError, "window of o.level", lambda: define(lambda x, s, p, o: (o.level(x, 0, 4, 1, 3), x))),
    "a unit of 0": (ValueError, "unit of o.level", lambda: define(lambda x, s, p, o: (o.level(x, 0, 4, unit=0.0), x))),
    "a huge constant": (ValueError, "must be finite", lambda: define(lambda x, s, p, o: (o.fire(x), x * 10**400))),
    "a function that does not exist": (AttributeError, "o.maximum", lambda: define(lambda x, s, p, o: (o.fire(x), o.tanh(x)))),
    "self": (ValueError, "must not be called 'self'", lambda: define(fires, parameters=("self",))),
    "a parameter twice": (ValueError, "different names, got", lambda: define(fires, parameters=("k", "k"))),
    "a NaN in a parameter": (ValueError, "k must be finite", lambda: KLIF(torch.ones(2, 3), k=torch.tensor(math.nan))),
    "a missing parameter": (TypeError, "adaptive needs its parameter rho", lambda: ALIF(torch.ones(2, 3), beta=0.5)),
    "an unknown setting": (TypeError, "klif has the settings k, got 'tau'", lambda: KLIF(torch.ones(2, 3), tau=2.0)),
    "an infinite parameter": (ValueError, "k must be finite, got inf", lambda: KLIF(torch.ones(2, 3), k=math.inf)),
    "a parameter of another shape": (ValueError, r"k must be a scalar or have shape \(3,\)",
                                     lambda: KLIF(torch.ones(2, 3), k=torch.ones(2))),
    "a flag": (TypeError, "hard must be a bool, got int", lambda: ALIF(torch.ones(2, 3), **SETTINGS, hard=1)),
    "a bare state": (TypeError, r"a tuple \(v,\) of tensors or None", lambda: KLIF(torch.ones(2, 3), torch.ones(3))),
    "a module without a parameter": (TypeError, "adaptive needs its parameter beta", lambda: ALIF.module()),
    "an unknown setting of a module": (TypeError, "klif has the settings k, got 'tau'", lambda: KLIF.module(tau=2.0)),
    "an alpha of a module": (ValueError, "alpha must be positive", lambda: KLIF.module(alpha=0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    kind, message, call = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


NAMES = [
    "x", "ds", "d_v", "d_v_x", "tape", "tape0", "t0", "t17", "tl", "sharpness", "V", "KIND", "triton", "surrogate", "alpha",
    "return_state", "spike_dtype", "state", "parameters", "keep", "k_value", "v_seq", "start_v", "g", "g_v", "checkpoint_v",
    "lambda", "class", "None", "training", "forward", "reset", "step_mode", "op", "int", "Tensor", "2v", "a-b", "_v", "v.w", "",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_code_or_ops_use_are_refused(name):
    for arguments in (dict(states=(name,)), dict(parameters=(name,))):
        with pytest.raises(ValueError, match="(must not be called|must be identifiers)"):
            define(fires, **arguments)


def test_names_that_look_dangerous_and_are_not():
    names = ("p", "o", "T", "R", "C", "n0", "group", "share", "spike", "step_")

    def step(x, s, p, o):
        h = s.s * 0.5 + x
        for name in names:
            h = h * getattr(p, name)
        return o.fire(h - 1.0), h

    op = define(step, ("s",), names)
    x, values = exact((3, 4), torch.float32, 1), dict.fromkeys(names, 0.5)
    found = []
    for where in BACKENDS:
        with backend(where):
            found.append(op(x, **values, return_state=True)[1][0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# --- what a step reads from outside ---------------------------------------------------------------------------------------


def test_a_step_keeps_what_it_read_when_it_was_defined():
    """Changing a variable later changes nothing, on any backend and in any setting, also not for an op of the same text."""
    level, ops = {"theta": 1.0}, []

    def step(x, s, p, o, *, hard=False):
        h = s.v * 0.5 + x
        fired = o.fire(h - level["theta"])
        return fired, o.where(fired, 0.0, h) if hard else h - fired * level["theta"]

    for level["theta"] in (1.0, 100.0):  # noqa: B007
        ops.append(define(step))
    x = torch.full((3, 1), 3.0)
    for name in ("reference", "cpu"):
        with backend(name):
            found = [[int(op(x, hard=hard).sum()) for op in ops] for hard in (True, False)]
        assert found == [[3, 0], [3, 0]], name
    level["theta"] = 1.0
    assert define(step)(x).sum() == 3


def test_numbers_of_numpy_work_on_both_sides():
    decay = np.exp(-1 / 20)
    left = define(lambda x, s, p, o: (o.fire(x), decay * s.v + x))
    right = define(lambda x, s, p, o: (o.fire(x), s.v * decay + x))
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(left(x, return_state=True)[1][0], right(x, return_state=True)[1][0])


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_either_of_two_spikes_is_0_or_1(name):
    op = define(lambda x, s, p, o: (o.either(o.fire(x - 1.0), o.fire(x - 2.0)), x))
    with backend(name):
        x = torch.tensor([[3.0], [1.5], [0.0]])
        assert op(x).flatten().tolist() == [1, 1, 0] and op(x, spike_dtype=torch.uint8).dtype == torch.uint8
