"""Every op and module under every tracer of PyTorch: it gives equal results, or refuses and names a way out."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import sdit_kernels
from sdit_kernels import (
    adlif,
    backend,
    cuba,
    lapicque,
    leaky,
    lif,
    lif_rate,
    nn,
    norm_lif,
    relu_squared,
    spiking_wkv,
    token_shift,
    wkv,
    wkv_step,
    wkv_step_,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore:Exporting a model"
)

C = 5
ONE = torch.linspace(0.25, 1.0, C)

# name: (function, shapes of its tensors for a batch of B)
OPS = {
    "lif": (lambda x: lif(x), lambda B: [(3, B, C)]),
    "lif, all": (
        lambda x, v: lif(x, v, tau=1 + ONE, v_threshold=ONE, return_v=True, return_v_seq=True),
        lambda B: [(18, B, C), (B, C)],
    ),
    "leaky": (lambda x: leaky(x, beta=0.5), lambda B: [(3, B, C)]),
    "leaky, all": (
        lambda x, v: leaky(x, v, beta=ONE, v_threshold=ONE, return_v=True, return_v_seq=True),
        lambda B: [(18, B, C), (B, C)],
    ),
    "lapicque": (lambda x: lapicque(x, R=ONE, C=2.0), lambda B: [(3, B, C)]),
    "norm_lif": (
        lambda x: norm_lif(x, 2 * ONE, ONE, 0.5 * ONE, ONE, training=False, eps=0.0, channel_axis=-1),
        lambda B: [(3, B, C)],
    ),
    "cuba": (lambda x: cuba(x, beta_i=0.5, beta=0.5), lambda B: [(3, B, C)]),
    "cuba, all": (
        lambda x, i, v: cuba(x, (i, v), beta_i=ONE, beta=ONE, return_state=True, return_state_seq=True),
        lambda B: [(18, B, C), (B, C), (B, C)],
    ),
    "adlif": (
        lambda x, v, w: adlif(x, (v, w), beta=0.5, beta_w=ONE, a=0.5, b=1.0, return_state=True),
        lambda B: [(3, B, C), (B, C), (B, C)],
    ),
    "lif_rate": (lambda x: lif_rate(x), lambda B: [(B, C)]),
    "lif_rate, all": (lambda x, residual, gate: lif_rate(x, 3, residual, gate, tau=1 + ONE), lambda B: [(B, C)] * 3),
    "relu_squared": (lambda x: relu_squared(x), lambda B: [(B, C)]),
    "token_shift": (lambda x: token_shift(x, ONE, ONE, norm_eps=1e-5), lambda B: [(B, 4, C)]),
    "token_shift, last": (lambda x, last: token_shift(x, ONE, last=last), lambda B: [(B, 4, C), (B, C)]),
    "wkv": (lambda k, v: wkv(ONE, ONE, k, v), lambda B: [(B, 7, C)] * 2),
    "wkv, bidirectional": (lambda k, v: wkv(None, ONE, k, v, log_decay=-ONE, bidirectional=True), lambda B: [(B, 7, C)] * 2),
    "wkv, state": (
        lambda k, v, r, ybar, lse: wkv(ONE, ONE, k, v, r=r, state=(ybar, lse), return_state=True),
        lambda B: [(B, 7, C)] * 3 + [(B, C)] * 2,
    ),
    "wkv_step": (lambda k, v, ybar, lse: wkv_step(ONE, ONE, k, v, (ybar, lse)), lambda B: [(B, C)] * 4),
    "wkv_step_": (
        lambda k, v, ybar, lse: (wkv_step_(ONE, ONE, k, v, (ybar, lse)), ybar, lse),
        lambda B: [(B, C)] * 4,
    ),
    "spiking_wkv": (lambda k, v: spiking_wkv(ONE, ONE, k, v), lambda B: [(3, B, 4, C)] * 2),
    "spiking_wkv, all": (
        lambda k, v, r, ybar, lse, membrane: spiking_wkv(
            ONE, ONE, k, v, r, scan_state=(ybar, lse), membrane=membrane, return_state=True, rate=True
        ),
        lambda B: [(3, B, 4, C)] * 3 + [(3, B, C)] * 2 + [(B, 4, C)],
    ),
    "wkv_state_from_rwkv": (
        lambda aa, bb, pp: sdit_kernels.wkv_state_from_rwkv(aa, bb.abs() + 1, pp),
        lambda B: [(B, C)] * 3,
    ),
    "wkv_state_to_rwkv": (lambda ybar, lse: sdit_kernels.wkv_state_to_rwkv(ybar, lse), lambda B: [(B, C)] * 2),
}
PLAIN = ("wkv_state_from_rwkv", "wkv_state_to_rwkv")  # these run as plain PyTorch on every backend

# name: (constructor of the module, shape of its data for a batch of B)
MODULES = {
    "LIF": (lambda: nn.LIF(store_v_seq=True), lambda B: (3, B, C)),
    "LIF, single-step": (lambda: nn.LIF(step_mode="s"), lambda B: (B, C)),
    "IF": (lambda: nn.IF(), lambda B: (3, B, C)),
    "ParametricLIF": (lambda: nn.ParametricLIF(channels=C), lambda B: (3, B, C)),
    "Leaky": (lambda: nn.Leaky(beta=0.5), lambda B: (3, B, C)),
    "Lapicque": (lambda: nn.Lapicque(C=2.0), lambda B: (3, B, C)),
    "CuBa": (lambda: nn.CuBa(beta_i=0.5, beta=0.5), lambda B: (3, B, C)),
    "AdLIF": (lambda: nn.AdLIF(beta=0.5, beta_w=0.5, a=0.5, b=1.0, store_state_seq=True), lambda B: (3, B, C)),
    "LIFRate": (lambda: nn.LIFRate(), lambda B: (B, C)),
    "OverTime": (lambda: nn.OverTime(torch.nn.Linear(C, C), torch.nn.BatchNorm1d(C)), lambda B: (3, B, C)),
    "TimeMix": (lambda: nn.TimeMix(C, norm_eps=1e-5, neuron=nn.LIFRate()), lambda B: (B, 4, C)),
    "ChannelMix": (lambda: nn.ChannelMix(C), lambda B: (B, 4, C)),
}
STATEFUL = ("LIF", "LIF, single-step", "IF", "ParametricLIF", "Leaky")
ALL = [*OPS, *MODULES]


NOT_OPS = ("Levels", "backend", "packed_spikes")


def test_the_lists_contain_every_op_and_module():
    ops = {name for name in sdit_kernels.__all__ if callable(getattr(sdit_kernels, name)) and name not in NOT_OPS}
    assert {name.split(",")[0] for name in OPS} == ops
    modules = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)}
    assert {name.split(",")[0] for name in MODULES} == modules


def data(shapes, seed=0):
    """Multiples of 1/16. With tau = 2 the arithmetic is exact, so kernels and reference agree on every spike."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-16, 49, shape, generator=generator) / 16 for shape in shapes)


class Calls(torch.nn.Module):
    """Wrap a function of up to six tensors as a module with named inputs, because some tracers read the signature."""

    def __init__(self, f, count):
        super().__init__()
        self.f = f
        self.forward = (self._one, self._two, self._three, self._four, self._five, self._six)[count - 1]

    def _one(self, a):
        return self.f(a)

    def _two(self, a, b):
        return self.f(a, b)

    def _three(self, a, b, c):
        return self.f(a, b, c)

    def _four(self, a, b, c, d):
        return self.f(a, b, c, d)

    def _five(self, a, b, c, d, e):
        return self.f(a, b, c, d, e)

    def _six(self, a, b, c, d, e, f):
        return self.f(a, b, c, d, e, f)


def example(name):
    """Return (module, function that makes its tensors for a batch of B and a seed)."""
    if name in MODULES:
        make, shape = MODULES[name]
        torch.manual_seed(0)
        return make().eval(), lambda B, seed=0: data([shape(B)], seed)
    f, shapes = OPS[name]
    return Calls(f, len(shapes(2))), lambda B, seed=0: data(shapes(B), seed)


def tensors(output):
    return [output] if isinstance(output, Tensor) else [t for part in output for t in tensors(part)]


def outputs(module, inputs):
    """Call the module without a membrane, on copies of the inputs, because wkv_step_ writes to its inputs."""
    nn.reset(module)
    found = tensors(module(*(t.clone() for t in inputs)))
    nn.reset(module)
    return found


def close(found, wanted, tolerance=1e-5):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def copies(inputs):
    return tuple(t.clone() for t in inputs)


# --- torch.jit.trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_traced_graph_records_operators_and_runs_on_other_data(name):
    """The other data has other values and another batch. torch also checks the trace by running the module twice."""
    module, inputs = example(name)
    traced = torch.jit.trace(module, copies(inputs(2)))
    operators = {"IF": "lif", "ParametricLIF": "lif", "LIFRate": "lif_rate", "TimeMix": "wkv", "ChannelMix": "token_shift"}
    stem = name.split(",")[0]
    operator = {"wkv_step": "wkv"}.get(stem) or operators.get(stem, stem.lower())
    assert name in (*PLAIN, "OverTime") or f"sdit_kernels::{operator}(" in str(traced.inlined_graph)
    for B, seed in ((2, 0), (2, 1), (3, 2)):
        wanted = outputs(module, inputs(B, seed))
        close(tensors(traced(*copies(inputs(B, seed)))), wanted, 0 if name != "OverTime" else 1e-6)


@pytest.mark.parametrize(
    "name", ["lif, all", "leaky", "lif_rate, all", "relu_squared", "token_shift", "wkv, state", "spiking_wkv"]
)
def test_a_traced_graph_has_gradients(name):
    module, inputs = example(name)
    traced = torch.jit.trace(module, copies(inputs(2)))
    for seed in range(4):  # the executor rewrites a graph after its first runs
        xs = [t.requires_grad_() for t in inputs(3, seed)]
        found, wanted = (
            torch.autograd.grad(sum(t.square().sum() for t in tensors(f(*xs))), xs, allow_unused=True) for f in (traced, module)
        )
        for a, b in zip(found, wanted):
            assert a is b is None or torch.equal(a, b)


def test_a_traced_graph_of_packed_sequences_runs_on_other_lengths():
    k, v = data([(1, 8, C)] * 2)
    traced = torch.jit.trace(lambda k, v, ends: wkv(ONE, ONE, k, v, cu_seqlens=ends), (k, v, torch.tensor([0, 3, 8])))
    for ends in ([0, 3, 8], [0, 1, 1, 8], [0, 8]):
        ends = torch.tensor(ends)
        assert torch.equal(traced(k, v, ends), wkv(ONE, ONE, k, v, cu_seqlens=ends))


def test_a_traced_network_can_be_saved_and_loaded():
    torch.manual_seed(0)
    net = torch.nn.Sequential(nn.OverTime(torch.nn.Linear(C, C)), nn.ParametricLIF(), nn.LIFRate(), nn.TimeMix(C))
    (x,) = data([(3, 2, C)])
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, x), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for seed in (1, 2):
        (y,) = data([(3, 4, C)], seed)
        nn.reset(net)
        assert torch.equal(loaded(y), net(y))


def test_tracing_warns_only_about_the_users_own_check():
    code = (
        "import torch, sdit_kernels as K; from sdit_kernels.nn import TimeMix\n"
        "x = torch.ones(3, 4, 5)\n"
        "torch.jit.trace(lambda x, v: K.lif(x, v, return_v=True), (x, x[0]))\n"
        "torch.jit.trace(TimeMix(5), x)\n"
        "torch.jit.trace(lambda x: bool(x.sum() > 0) and x, x)  # the user's own check gives one warning\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("TracerWarning") == 1, done.stderr


@pytest.mark.parametrize("name", STATEFUL)
def test_a_trace_leaves_the_membrane_unchanged(name):
    module, inputs = example(name)
    x, y, z = (inputs(2, seed)[0] for seed in range(3))
    with torch.no_grad():
        module(x)
        v = module.v
        traced = torch.jit.trace(module, y, check_trace=False)
        assert torch.equal(traced(z), lif_of(module, z, v)[0])  # the graph starts from the membrane at the time of tracing
        s, v = lif_of(module, z, v)
        assert torch.equal(module(z), s)
        torch.jit.trace(module, y)  # torch calls the module again to check the graph
        _, v = lif_of(module, y, v)
        assert torch.equal(module.v, v)
        torch.jit.trace(module, y, check_trace=False)
        module.v = torch.full_like(v, 0.25)  # a membrane set by hand must be kept as well
        assert torch.equal(module(z), lif_of(module, z, torch.full_like(v, 0.25))[0])


def lif_of(module, x, v):
    single = module.step_mode == "s"
    x = x.unsqueeze(0) if single else x
    if isinstance(module, nn.Leaky):
        s, v = sdit_kernels.leaky(x, v, beta=module.beta, return_v=True)
    else:
        s, v = lif(x, v, tau=module.tau, decay_input=module.decay_input, return_v=True)
    return (s.squeeze(0) if single else s), v


def test_a_trace_carries_the_membrane_between_steps():
    neuron = nn.LIF(step_mode="s")

    def steps(x):
        return torch.stack([neuron(x_t) for x_t in x])

    (x,), (y,) = data([(4, 2, C)]), data([(4, 2, C)], 1)
    traced = torch.jit.trace(steps, x)
    assert torch.equal(traced(y), lif(y))


@pytest.mark.parametrize("name", ALL)
def test_tensorboard_draws_every_op_and_module(name, tmp_path):
    pytest.importorskip("tensorboard", reason="SummaryWriter.add_graph needs the package tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    module, inputs = example(name)
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(module, copies(inputs(2)))
    assert any(tmp_path.iterdir())


# --- make_fx, torch.export, torch.compile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("name", ALL)
def test_make_fx_records_every_op_and_module(name, mode):
    module, inputs = example(name)
    wanted = outputs(module, inputs(3, 1))
    graph = make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(*copies(inputs(3)))
    close(tensors(graph(*copies(inputs(3, 1)))), wanted)


def test_the_reference_reads_no_values_of_fake_tensors():
    x, tau = torch.randn(3, 2, C), 1 + ONE
    with backend("reference"):
        graph = make_fx(lambda x, tau: lif(x, tau=tau), tracing_mode="symbolic")(x, tau)
        assert torch.equal(graph(x, tau), lif(x, tau=tau))


# the warning is about the membrane, which is not part of the exported program
@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("name", ALL)
def test_export_gives_equal_results(name):
    module, inputs = example(name)
    wanted = outputs(module, inputs(2, 1))
    program = torch.export.export(module, copies(inputs(2)))
    close(tensors(program.module()(*copies(inputs(2, 1)))), wanted)


@pytest.mark.parametrize("name", ALL)
def test_compiled_equals_eager(name):
    torch.compiler.reset()
    module, inputs = example(name)
    wanted = outputs(module, inputs(2, 1))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(tensors(compiled(*copies(inputs(2, 1)))), wanted)


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_symbolic_trace_is_refused(name):
    module, _ = example(name)
    with pytest.raises(
        TypeError, match=r"symbolic_trace cannot trace.*use torch.export or make_fx.*torch.fx.wrap.*is_leaf_module"
    ):
        torch.fx.symbolic_trace(module.f if name in OPS else module)


wrapped_lif = lif
torch.fx.wrap("wrapped_lif")


def test_a_leaf_module_and_wrap_allow_symbolic_trace():
    (x,) = data([(3, 2, C)])
    graph = torch.fx.symbolic_trace(lambda x: wrapped_lif(x, tau=4.0) + 1)
    assert torch.equal(graph(x), lif(x, tau=4.0) + 1)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, qualified_name):
            return m.__module__.startswith("sdit_kernels") or super().is_leaf_module(m, qualified_name)

    net = torch.nn.Sequential(nn.OverTime(torch.nn.Linear(C, C)), nn.LIF())
    graph = torch.fx.GraphModule(net, Tracer().trace(net))
    found = graph(x)
    nn.reset(net)
    assert torch.equal(found, net(x))


@pytest.mark.parametrize("name", [*sdit_kernels.__all__, *MODULES])
def test_script_is_refused(name):
    if name in ("Levels", "SURROGATES", "backend", "packed_spikes"):
        return
    message = "torch.jit.script cannot compile sdit_kernels: use torch.jit.trace"
    if name in MODULES:
        for module in (MODULES[name][0](), torch.nn.Sequential(torch.nn.Linear(C, C), MODULES[name][0]())):
            with pytest.raises(RuntimeError, match=message):
                torch.jit.script(module)
    else:
        with pytest.raises(RuntimeError, match=message):
            torch.jit.script(getattr(sdit_kernels, name))


def users_function(x: Tensor) -> Tensor:
    return relu_squared(x) + 1


def test_script_of_a_function_that_calls_an_op_is_refused():
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile sdit_kernels: use torch.jit.trace"):
        torch.jit.script(users_function)


# --- ONNX -------------------------------------------------------------------------------------------------------------------

NEEDS_OPERATORS = [name for name in ALL if name not in (*PLAIN, "OverTime")]
REFUSAL = r"has no ONNX operator: run torch.onnx.export under sdit_kernels.backend\('reference'\)"


@pytest.mark.parametrize("name", NEEDS_OPERATORS)
def test_the_older_onnx_exporter_is_refused(name):
    module, inputs = example(name)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.onnx.export(module, copies(inputs(2)), io.BytesIO(), dynamo=False)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["lif", "TimeMix"])
def test_torch_export_inside_the_onnx_exporter_is_refused(name, strict, monkeypatch):
    """With dynamo=True it calls torch.export twice: with strict=False and then with strict=True."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    module, inputs = example(name)
    with pytest.raises(Exception, match=REFUSAL):
        torch.export.export(module, copies(inputs(2)), strict=strict)


@pytest.fixture
def onnx_packages():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"torch.onnx.export and a comparison of values need the package {package}")


def test_the_onnx_exporter_is_refused(onnx_packages):
    module, inputs = example("LIF")
    with pytest.raises(Exception, match=REFUSAL):
        torch.onnx.export(module, inputs(2), io.BytesIO(), dynamo=True, verbose=False)


@pytest.mark.filterwarnings("ignore:The tensor attribute", "ignore:.*is not a registered parameter")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_the_reference_exports_to_onnx(name, dynamo, onnx_packages):
    import onnx
    import onnxruntime

    module, inputs = example(name)
    file = io.BytesIO()
    with backend("reference"):
        wanted = outputs(module, inputs(2, 1))
        torch.onnx.export(module, copies(inputs(2)), file, dynamo=dynamo, **({"verbose": False} if dynamo else {}))
    assert {node.domain for node in onnx.load_from_string(file.getvalue()).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    feed = {put.name: t.numpy() for put, t in zip(session.get_inputs(), inputs(2, 1))}
    close([torch.from_numpy(a) for a in session.run(None, feed)], wanted)


# --- torch.func transforms: a membrane does not outlive them ------------------------------------------------------------------

ENDED = r"v, the state carried over from an earlier call, has no values here: .* has ended; call reset\(\) before this call"
neurons = pytest.mark.parametrize("kind", [nn.LIF, nn.IF, nn.ParametricLIF])


def under_vmap(neuron, x):
    return torch.func.vmap(neuron)(torch.stack([x, x]))


def under_grad(neuron, x):
    return torch.func.grad(lambda x: neuron(x).sum())(x)


def under_jacrev(neuron, x):
    return torch.func.jacrev(lambda x: neuron(x).sum())(x)


def under_vmap_of_grad(neuron, x):
    return torch.func.vmap(torch.func.grad(lambda x: neuron(x).sum()))(torch.stack([x, x]))


def under_grad_of_vmap(neuron, x):
    return torch.func.grad(lambda x: torch.func.vmap(neuron)(x).sum())(torch.stack([x, x]))


def under_functional_call(neuron, x):
    weights = {name: p.detach() for name, p in neuron.named_parameters()}
    return torch.func.grad(lambda weights, x: torch.func.functional_call(neuron, weights, (x,)).sum(), argnums=1)(weights, x)


def under_fake_make_fx(neuron, x):
    return make_fx(neuron, tracing_mode="fake", _allow_non_fake_inputs=True)(x)


def under_a_fake_mode(neuron, x):
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return neuron(mode.from_tensor(x))


CONTEXTS = [
    under_vmap, under_grad, under_jacrev, under_vmap_of_grad, under_grad_of_vmap, under_functional_call, under_fake_make_fx,
    under_a_fake_mode,
]  # fmt: skip


@neurons
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_membrane_from_an_ended_transform_is_refused_until_reset(kind, context):
    (x,) = data([(3, 2, C)])
    neuron = kind()
    wanted = neuron(x)
    neuron.reset()
    context(neuron, x)
    for later in (neuron, lambda x: context(neuron, x)):
        with pytest.raises(RuntimeError, match=ENDED):
            later(x)
    neuron.reset()
    assert torch.equal(neuron(x), wanted)
    neuron.reset()
    context(neuron, x)


@neurons
def test_a_membrane_of_one_chunk_of_vmap_does_not_reach_the_next(kind):
    (x,) = data([(4, 3, 2, C)])
    neuron = kind()
    with pytest.raises(RuntimeError, match=ENDED):
        torch.func.vmap(neuron, chunk_size=2)(x)

    def from_rest(x):
        neuron.reset()
        first = neuron(x[:1])
        return torch.cat([first, neuron(x[1:])])  # within the transform the membrane is carried

    neuron.reset()
    wanted = torch.stack([lif(t, tau=neuron.tau, decay_input=neuron.decay_input) for t in x])
    assert torch.equal(torch.func.vmap(from_rest, chunk_size=2)(x), wanted)


@neurons
def test_functional_call_carries_the_membrane(kind):
    (x,) = data([(4, 2, C)])
    neuron = kind()
    found = [torch.func.functional_call(neuron, dict(neuron.named_parameters()), (part,)) for part in x.split(2)]
    assert torch.equal(torch.cat(found), lif(x, tau=neuron.tau, decay_input=neuron.decay_input))


@neurons
def test_a_module_works_after_make_fx_and_export(kind):
    (x,) = data([(3, 2, C)])
    neuron = kind()
    make_fx(neuron)(x)  # make_fx calls the module with real tensors
    neuron(x)
    neuron.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.export(neuron, (x,))
    assert torch.equal(neuron(x), lif(x, tau=neuron.tau, decay_input=neuron.decay_input))
