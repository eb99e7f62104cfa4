"""Accelerated models inside other tools: lookups by class, counters of operations, torch.compile, torch.fx and copies."""

import copy
import functools
import importlib.util
import pickle
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import python
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdit_kernels.compat import rwkv
from sdit_kernels.compat import snntorch as compat_snn
from sdit_kernels.compat import spikingjelly as compat_jelly

KINDS = ("LIFNode", "IFNode", "ParametricLIFNode")
SNN_OPTIONS = (
    {"reset_mechanism": "subtract", "learn_beta": True}, {"reset_mechanism": "zero"}, {"reset_mechanism": "none"},
    {"init_hidden": True}, {"init_hidden": True, "output": True, "learn_threshold": True}, {"reset_delay": False},
)  # fmt: skip


@pytest.fixture(scope="module")
def jelly():
    pytest.importorskip("spikingjelly", reason="spikingjelly is not installed (make peers)")
    return jelly_modules()


def jelly_modules():
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    return types.SimpleNamespace(functional=functional, layer=layer, neuron=neuron, surrogate=surrogate)


@pytest.fixture(scope="module")
def snn():
    return pytest.importorskip("snntorch", reason="snntorch is not installed (make peers)")


@pytest.fixture(scope="module")
def counters(jelly):
    return pytest.importorskip("spikingjelly.activation_based.op_counter", reason="only SpikingJelly 2 counts operations")


class ChannelMix(nn.Module):
    """RWKV-LM's layer."""

    def __init__(self, C=8):
        super().__init__()
        self.time_mix_k, self.time_mix_r = (nn.Parameter(torch.rand(1, 1, C)) for _ in range(2))
        self.key, self.receptance, self.value = (nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x):
        last = nn.functional.pad(x, (0, 0, 1, -1))
        k, r = (x * m + last * (1 - m) for m in (self.time_mix_k, self.time_mix_r))
        return torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)) ** 2)


def flat(found):
    return [*found] if isinstance(found, tuple) else [found]


def two_calls_and_gradient(function, x, *rest):
    """Return the outputs of two calls and the gradient of x."""
    x = x.clone().requires_grad_()
    outputs = [*flat(function(x, *rest)), *flat(function(x, *rest))]
    return [*outputs, torch.autograd.grad(sum(t.sum() for t in outputs), x)[0]]


# ---- lookups by class ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_type_returns_the_librarys_class(jelly, kind):
    cls = getattr(jelly.neuron, kind)
    node, other = cls(), cls()
    compat_jelly.accelerate(node)
    assert type(node) is cls and {cls: "found"}[type(node)] == "found" and "fused" in repr(node) and "fused" not in repr(other)
    x, steps = torch.rand(3, 8) * 3, []
    for m in (node, other):
        assert compat_jelly.restore(m).replaced == ((("(the model)", kind),) if m is node else ())
        steps.append(m(x))
    assert torch.equal(*steps) and "_sdit_kernels" not in vars(node)


def test_a_subclass_of_a_neuron_keeps_its_class(jelly, snn):
    class Wide(jelly.neuron.LIFNode):
        def extra_repr(self):
            return super().extra_repr() + ", wide"

    class Quiet(snn.Leaky):
        def __init__(self):
            super().__init__(0.5, threshold=2.0, init_hidden=True)

    net = nn.ModuleList([Wide(), Quiet(), jelly.neuron.LIFNode()])
    assert len(compat_jelly.accelerate(net).replaced) == 2 and len(compat_snn.accelerate(net).replaced) == 1
    assert type(net[0]) is Wide and type(net[1]) is Quiet
    assert [repr(m).count("fused by sdit_kernels") for m in net] == [1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat_snn.unroll(net[1], torch.rand(3, 2, 4))


def test_nir_exports_an_accelerated_net_like_the_original(jelly):
    pytest.importorskip("nirtorch", reason="nir and nirtorch are not installed")
    from spikingjelly.activation_based import nir_exchange

    def graph(net):
        nodes = nir_exchange.export_to_nir(net, torch.randn(1, 8), dt=1e-4).nodes
        return {name: {k: str(v) for k, v in vars(node).items()} for name, node in nodes.items()}

    for kind in KINDS:
        net = nn.Sequential(nn.Linear(8, 6), getattr(jelly.neuron, kind)())
        before = graph(net)
        compat_jelly.accelerate(net)
        accelerated = graph(net)
        compat_jelly.restore(net)
        assert before == accelerated == graph(net)


def test_spikingjellys_precision_table_finds_an_accelerated_neuron(jelly):
    """SpikingJelly looks up multi-step neurons by class to set their precision. The following steps would need Triton."""
    precision = pytest.importorskip("spikingjelly.activation_based.precision.convert", reason="only SpikingJelly 2 has it")
    node = jelly.neuron.LIFNode(step_mode="m")
    compat_jelly.accelerate(node)
    node._neuron_precision = "to be removed"
    precision._configure_triton_neurons(node, types.SimpleNamespace(neuron_storage=None), "cpu")
    assert node._neuron_precision is None


# ---- counters of operations ------------------------------------------------------------------------------------------


def all_counts(counters, jelly, net, x):
    found = {}
    for name in ("FlopCounter", "SynOpCounter", "ACCounter", "MACCounter", "MemoryAccessCounter", "NeuronStateCounter"):
        for backward in (False, True):
            jelly.functional.reset_net(net)
            counter = getattr(counters, name)()
            with counters.DispatchCounterMode([counter]) as mode:
                y = net(x)
                if backward:
                    y.sum().backward()
            if not (backward and name == "NeuronStateCounter"):  # it identifies tensors by address, and addresses are reused
                found[name, backward] = counter.get_total(), counter.get_counts(), mode.get_unsupported(counter)
    for name in ("simple", "lemaire", "neuromc_runtime", "spikesim"):
        jelly.functional.reset_net(net)
        try:
            found[name] = getattr(counters, f"estimate_{name}_energy")(net, x)
        except ValueError as error:  # two of them do not support ParametricLIFNode
            found[name] = str(error)
    jelly.functional.reset_net(net)
    counter = counters.NeuromorphicMemoryAccessCounter()
    with counters.ModuleCounterMode([counter], model=net):
        net(x)
    return found | {"neuromorphic": counter.get_counts()}


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("kind", KINDS)
def test_counters_of_spikingjelly_give_the_librarys_numbers(counters, jelly, kind, mode):
    """Operations, memory, state and energy are counted on SpikingJelly's own code. Afterwards the neurons are fused again."""
    torch.manual_seed(0)
    net = nn.Sequential(jelly.layer.Conv2d(1, 2, 3, step_mode=mode), getattr(jelly.neuron, kind)(step_mode=mode)).eval()
    fused, x = copy.deepcopy(net), (torch.rand(4, 5, 1, 6, 6) > 0.5).float()[0 if mode == "s" else slice(None)]
    compat_jelly.accelerate(fused)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        own, ours = all_counts(counters, jelly, net, x), all_counts(counters, jelly, fused, x)
    assert own == ours and own["NeuronStateCounter", False][0] > 1000
    refused = [name for name, figure in own.items() if isinstance(figure, str)]
    assert refused == (["lemaire", "spikesim"] if kind == "ParametricLIFNode" else [])
    said = {str(entry.message).partition(" counts")[0] for entry in seen if entry.category is UserWarning}
    assert {f"{kind} runs SpikingJelly's own code: {name}" for name in ("DispatchCounterMode", "_TraceMode")} <= said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(x)


def test_counter_rules_by_class_are_used(counters, jelly):
    node, asked = jelly.neuron.LIFNode(step_mode="m"), []
    compat_jelly.accelerate(node)
    counter = counters.NeuronStateCounter(extra_state_rules={jelly.neuron.LIFNode: lambda module, *_: asked.append(module)})
    with counters.DispatchCounterMode([counter]), pytest.warns(UserWarning, match="a fused kernel would count as nothing"):
        node(torch.rand(4, 3))
    assert asked and all(module is node for module in asked)


def test_counters_of_functions_give_the_librarys_numbers(counters, jelly):
    totals = []
    for accelerated in (False, True):
        node = jelly.neuron.LIFNode()
        if accelerated:
            compat_jelly.accelerate(node)
        counter = counters.BaseCounter()
        counter.rules[torch.Tensor.sub] = lambda args, kwargs, out: out.numel()
        with warnings.catch_warnings(), counters.FunctionCounterMode([counter]) as mode:
            warnings.simplefilter("ignore")
            node(torch.rand(5, 3))
        totals.append((counter.get_total(), mode.get_unsupported(counter)))
    assert totals[0] == totals[1]


def test_counters_work_on_snntorch_and_rwkv(counters, snn):
    leaky = nn.Sequential(nn.Linear(8, 8), snn.Leaky(0.8, init_hidden=True))
    for net, drop_in in ((leaky, compat_snn), (nn.Sequential(ChannelMix()), rwkv)):
        fused, found = copy.deepcopy(net), []
        drop_in.accelerate(fused)
        for m in (net, fused):
            counter = counters.FlopCounter()
            with warnings.catch_warnings(record=True) as seen, counters.DispatchCounterMode([counter]) as mode:
                warnings.simplefilter("always")
                m(torch.rand(2, 5, 8)).sum().backward()
            found.append((counter.get_counts(), mode.get_unsupported(counter)))
        assert found[0] == found[1]
        assert ["a fused kernel would count as nothing" in str(entry.message) for entry in seen] == [True]


def test_pytorchs_flop_counter_gives_the_same_number(jelly, snn):
    """It counts matrix multiplications. The fused ops contain none."""
    nets = (
        (nn.Sequential(nn.Linear(8, 8), jelly.neuron.LIFNode()), compat_jelly),
        (nn.Sequential(nn.Linear(8, 8), snn.Leaky(0.8, init_hidden=True)), compat_snn),
        (nn.Sequential(ChannelMix()), rwkv),
    )
    for net, drop_in in nets:
        found = []
        for _ in range(2):
            with FlopCounterMode(display=False) as mode:
                copy.deepcopy(net)(torch.rand(2, 5, 8)).sum().backward()
            found.append(mode.get_total_flops())
            assert len(drop_in.accelerate(net).replaced) == (len(found) == 1)
        assert found[0] == found[1] > 0


# ---- unknown neurons are named ---------------------------------------------------------------------------------------


def make_class(name, module, base=nn.Module):
    return type(name, (base,), {"__module__": module})


@pytest.mark.parametrize("drop_in, known", [
    (
        compat_jelly,
        "LIFNode, IFNode, ParametricLIFNode, ILIFNode or a ternary neuron of SpikingJelly, activation_based or clock_driven",
    ),
    (compat_snn, "snntorch.Leaky, Synaptic or Lapicque"),
])  # fmt: skip
def test_neurons_of_unknown_libraries_are_left_with_a_reason(drop_in, known):
    copied = make_class("MultiStepLIFNode", "src.spikingjelly.clock_driven.neuron")
    inner = nn.Sequential(nn.Linear(2, 2), copied())
    net = nn.ModuleDict({
        "copy": copied(), "psn": make_class("PSN", "my.neurons")(), "own": make_class("TernaryIF", "__main__")(),
        "derived": make_class("Mine", "__main__", make_class("SpikingNeuron", "somewhere"))(),
        "norse": make_class("LIFCell", "norse.torch.module.lif")(),
        "other": make_class("Leaky", "snntorch_copy._neurons.leaky")(),
    })  # fmt: skip
    quiet = nn.ModuleDict({"aifi": make_class("AIFI", "m")(), "sift": make_class("SIFTDiff", "m")(), "relu": nn.LeakyReLU(),
                           "neural": make_class("NeuronsMixture", "m")()})  # fmt: skip
    block = make_class("LIFBlock", "m")()  # contains a neuron, so it is not one itself
    block.inner = inner
    report = drop_in.accelerate(nn.ModuleList([net, quiet, block]))
    assert report.replaced == ()
    assert {entry.name for entry in report.left} == {f"0.{name}" for name in net} | {"2.inner.1"}
    name = "src.spikingjelly.clock_driven.neuron.MultiStepLIFNode"
    assert report.left[0].reason == f"it looks like a spiking neuron, {name}, but does not derive from {known}"


def test_each_compat_module_names_the_other(jelly, snn):
    net = nn.ModuleList([jelly.neuron.LIFNode(), snn.Leaky(0.5)])
    (other,) = copy.deepcopy(compat_jelly.accelerate(net)).left
    assert other.reason.endswith("; for that library there is sdit_kernels.compat.snntorch")
    assert compat_snn.accelerate(net).left == ()  # both are fused now
    assert str(compat_jelly.accelerate(net)) == "SpikingJelly: 0 replaced, 0 left as they were: 2 run fused already"
    compat_jelly.restore(net)
    assert compat_snn.restore(net).replaced == (("1", "Leaky"),)
    (other,) = compat_snn.accelerate(net).left
    assert other.reason.endswith("; for that library there is sdit_kernels.compat.spikingjelly")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(function, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("kind", KINDS)
def test_spikingjelly_neurons_compile_to_one_graph(jelly, kind, mode):
    node = getattr(jelly.neuron, kind)(step_mode=mode)
    compat_jelly.accelerate(node)
    twin = copy.deepcopy(node)
    x = (torch.rand(4, 3, 8) * 3)[0 if mode == "s" else slice(None)]
    torch.testing.assert_close(two_calls_and_gradient(compiled(node), x), two_calls_and_gradient(twin, x))
    torch.testing.assert_close(node.v, twin.v)


def test_neurons_that_are_not_fused_compile_to_one_graph(jelly):
    """One neuron is not accelerated, one is fused, and one is accelerated but runs the library's own code."""
    x = torch.rand(4, 3, 8) * 3
    nodes = [jelly.neuron.LIFNode(step_mode="m", surrogate_function=jelly.surrogate.Sigmoid()) for _ in range(3)]
    for node in nodes[1:]:
        compat_jelly.accelerate(node)
    nodes[2].surrogate_function.set_spiking_mode(False)
    with pytest.warns(UserWarning, match="spiking=False"):
        found = [two_calls_and_gradient(compiled(node, "eager"), x) for node in nodes]
    torch.testing.assert_close(found[1], found[0])
    with pytest.warns(UserWarning, match="spiking=False"):
        jelly.functional.reset_net(nodes[2])
        torch.testing.assert_close(two_calls_and_gradient(nodes[2], x), found[2])


@pytest.mark.parametrize("options", SNN_OPTIONS, ids=str)
def test_snntorch_neurons_compile_to_one_graph(snn, options):
    """Test a step of an accelerated neuron, and unroll with and without acceleration."""
    neuron = snn.Leaky(0.8, **options)
    x = torch.rand(3, 2, 4) * 2
    rest = () if neuron.init_hidden else (torch.rand(2, 4),)
    for accelerated in (False, True):
        if accelerated:
            compat_snn.accelerate(neuron)
        step, whole, twin, loop = (copy.deepcopy(neuron) for _ in range(4))
        if accelerated:
            torch.testing.assert_close(
                two_calls_and_gradient(compiled(step), x[0], *rest), two_calls_and_gradient(twin, x[0], *rest)
            )
        got = two_calls_and_gradient(compiled(functools.partial(compat_snn.unroll, whole)), x, *rest)
        torch.testing.assert_close(got, two_calls_and_gradient(functools.partial(compat_snn.unroll, loop), x, *rest))


def test_a_compiled_neuron_uses_a_changed_surrogate(snn):
    def gradient(function):
        x = torch.linspace(0, 2, 8).requires_grad_()
        return torch.autograd.grad(function(x, torch.zeros(8))[0].sum(), x)[0]

    neuron = snn.Leaky(0.8, spike_grad=snn.surrogate.atan(alpha=2.0))
    compat_snn.accelerate(neuron)
    function, seen = compiled(neuron, "eager"), []
    for surrogate in (snn.surrogate.atan(alpha=2.0), snn.surrogate.atan(alpha=5.0), snn.surrogate.sigmoid(slope=25)):
        neuron.spike_grad = surrogate
        seen.append(gradient(function))
        assert torch.equal(seen[-1], gradient(neuron))
    assert not torch.equal(seen[0], seen[1])
    neuron.spike_grad = snn.surrogate.triangular()
    with pytest.warns(UserWarning, match="surrogate triangular has no formula here"):
        torch.testing.assert_close(gradient(function), gradient(neuron))


def test_snntorch_networks_compile_to_one_graph(snn):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), snn.Leaky(0.8, init_hidden=True), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(8, 4), snn.Leaky(0.7, init_hidden=True, output=True),
        )  # fmt: skip

    nets, x = [net(), net()], torch.rand(5, 3, 1, 6, 6) * 2
    for m in nets:
        compat_snn.accelerate(m)
    got = two_calls_and_gradient(compiled(lambda x: compat_snn.unroll(nets[0], x)), x)
    torch.testing.assert_close(got, two_calls_and_gradient(lambda x: compat_snn.unroll(nets[1], x), x))
    shared = nn.Sequential(*[snn.Leaky(0.8, init_hidden=True)] * 2)
    with pytest.warns(UserWarning, match="its Leaky is reached more than once"):
        compiled(lambda x: compat_snn.unroll(shared, x), "eager")(x)


def test_accelerated_models_run_under_inductor(jelly, snn):
    """The other tests use backends that do not compile."""
    node, neuron, x = jelly.neuron.LIFNode(step_mode="m"), snn.Leaky(0.8, init_hidden=True), torch.rand(4, 3, 8) * 3
    compat_jelly.accelerate(node), compat_snn.accelerate(neuron)
    mix = nn.Sequential(ChannelMix())
    rwkv.accelerate(mix)

    def once(function):
        xs = x.clone().requires_grad_()
        outputs = function(xs)
        return *outputs, torch.autograd.grad(sum(y.sum() for y in outputs), xs)[0]

    def function(x):
        return mix(node(x)), compat_snn.unroll(neuron, x)

    wanted = once(function)
    jelly.functional.reset_net(node), neuron.reset_mem()
    torch.testing.assert_close(once(compiled(function, "inductor")), wanted)


# ---- torch.fx and copies ---------------------------------------------------------------------------------------------


def test_torch_fx_is_refused_with_a_way_out(jelly, snn):
    leaky, x = snn.Leaky(0.8, init_hidden=True), torch.rand(2, 5, 8)
    for layer, drop_in in ((jelly.neuron.LIFNode(), compat_jelly), (leaky, compat_snn), (ChannelMix(), rwkv)):
        net = nn.Sequential(nn.Linear(8, 8), layer)
        assert len(drop_in.accelerate(net).replaced) == 1
        with pytest.raises(TypeError, match=f"torch.fx cannot trace through a fused {type(layer).__name__}: use a torch.fx.Tr"):
            torch.fx.symbolic_trace(net)

        class Tracer(torch.fx.Tracer):
            leaf = layer

            def is_leaf_module(self, module, name):
                return module is self.leaf or super().is_leaf_module(module, name)

        traced = torch.fx.GraphModule(net, Tracer().trace(net))
        wanted = copy.deepcopy(net)(x)
        assert torch.equal(traced(x), wanted)


def test_copies_have_their_own_state(jelly, snn):
    """Also test the copy DataParallel makes, which takes over another object's attributes."""
    x = torch.rand(3, 8) * 3
    for neuron, drop_in, state in (
        (jelly.neuron.LIFNode(), compat_jelly, "v"),
        (snn.Leaky(0.8, init_hidden=True), compat_snn, "mem"),
    ):
        drop_in.accelerate(neuron)
        for twin in (copy.copy(neuron), copy.deepcopy(neuron), neuron._replicate_for_data_parallel()):
            assert "fused" in repr(twin) and type(twin) is type(neuron)
            twin = copy.deepcopy(twin)
            twin(x)
            assert getattr(twin, state) is not getattr(neuron, state) and torch.is_tensor(getattr(twin, state))
            assert len(drop_in.restore(twin).replaced) == 1 and "fused" in repr(neuron)


def test_a_pickle_is_fused_in_another_process(jelly, tmp_path):
    """The other process did not call accelerate."""
    node = jelly.neuron.LIFNode()
    compat_jelly.accelerate(node)
    (tmp_path / "node").write_bytes(pickle.dumps(node))
    program = (
        "import pickle, sys, torch\n"
        "from unittest import mock\n"
        "node = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "import sdit_kernels.compat.lif_nodes as compat\n"
        "with mock.patch.object(compat, 'lif', side_effect=compat.lif) as lif:\n"
        "    node(torch.ones(3)), type(node)()(torch.ones(3))\n"
        "print(lif.call_count, 'fused' in repr(node))\n"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "node"], capture_output=True, text=True)
    assert run.stdout == "1 True\n", run.stderr


# ---- all uses of a net of SpikingJelly, without the kernels, with accelerate and with install -----------------------


def record_uses(jelly, prepare):
    """Use a net in many ways. prepare: what makes its neurons run on the kernels. Return all results and which code ran."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("tensorboard") is None:  # SpikingJelly's monitor of the GPU, not used here, needs it
            patch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=None))
        from spikingjelly.activation_based import monitor, nir_exchange

    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, dtype=torch.float64).requires_grad_()
    neurons = [jelly.neuron.LIFNode(store_v_seq=True), jelly.neuron.ParametricLIFNode(store_v_seq=True)]
    net = nn.Sequential(jelly.layer.Linear(6, 5), neurons[0], jelly.layer.Linear(5, 6), neurons[1]).double()
    found = {"nir": {}}
    for name, node in nir_exchange.export_to_nir(copy.deepcopy(net).float(), torch.randn(1, 6), dt=1e-4).nodes.items():
        found["nir"][name] = {key: str(value) for key, value in vars(node).items()}
    prepare(net)
    jelly.functional.set_step_mode(net, "m")
    kinds = monitor.OutputMonitor, monitor.InputMonitor, monitor.GradOutputMonitor, monitor.GradInputMonitor
    monitors = [kind(net, jelly.neuron.BaseNode) for kind in kinds]
    monitors += [monitor.AttributeMonitor(name, False, net, jelly.neuron.BaseNode) for name in ("v_seq", "v")]
    y = net(2 * x)
    y.square().sum().backward()
    for n, watcher in enumerate(monitors):
        found[f"{n} {type(watcher).__name__} of {watcher.monitored_layers}"] = list(watcher.records)
        watcher.remove_hooks()
    found["grads"] = [p.grad for p in net.parameters()]
    with torch.no_grad():
        jelly.functional.reset_net(net)
        net(2 * x)
        twins = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        found["twins"] = [(twin(x), twin[1].v) for twin in (*twins, net)]
    jelly.functional.reset_net(net)
    jelly.functional.set_step_mode(net, "s")
    found["single steps"] = [net(step) for step in x]
    net.append(jelly.neuron.IFNode().double())  # a module that is made later
    jelly.functional.reset_net(net)
    prepare(net)
    jelly.functional.set_step_mode(net, "m")
    later = net(2 * x)
    later.sum().backward()
    found["later"] = later, net[4].v, [p.grad for p in net.parameters()]
    jelly.functional.reset_net(net)
    found["compiled"] = [t.detach() for t in two_calls_and_gradient(compiled(net), x.detach())]
    return found, type(net[4](x).grad_fn).__name__


def test_every_use_of_a_net_gives_the_librarys_results(jelly, tmp_path):
    """install changes classes, so it runs in another process."""
    pytest.importorskip("nirtorch", reason="nir and nirtorch are not installed")
    wanted, own = record_uses(jelly, lambda net: None)
    found, fused = record_uses(jelly, compat_jelly.accelerate)
    assert (own, fused) == ("StackBackward0", "AutogradBackward")
    code = (
        "import sys, types, torch\n"
        "from sdit_kernels.compat import install\n"
        "install()\n"
        "sys.path[:0] = ['tests']\n"
        "import test_compat_tools as tools\n"
        "torch.save(tools.record_uses(tools.jelly_modules(), lambda net: None), sys.argv[1])\n"
    )
    done = python(code, str(tmp_path / "found"))
    assert done.returncode == 0, done.stderr
    installed, fused = torch.load(tmp_path / "found", weights_only=False)
    assert fused == "AutogradBackward"
    for results in (found, installed):
        assert results.keys() == wanted.keys() and results.pop("nir") == wanted["nir"]
        for name, values in results.items():
            torch.testing.assert_close(
                values, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_set_backend_of_the_older_version(jelly):
    """Version 2 has no backends. Before, set_backend refuses a backend whose library is missing, with and without kernels."""
    if not hasattr(jelly.functional, "set_backend"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'backend'"):
            jelly.neuron.LIFNode(backend="cupy")
        return
    node, fused = (jelly.neuron.LIFNode(step_mode="m") for _ in range(2))
    compat_jelly.accelerate(fused)
    errors = []
    for module in (node, fused):
        try:
            jelly.functional.set_backend(module, "cupy")
            errors.append(None)
        except (ImportError, AssertionError, NotImplementedError) as error:
            errors.append(str(error))
    assert errors[0] == errors[1] and node.backend == fused.backend
    x = torch.rand(4, 3)
    if errors[0] is not None:
        assert torch.equal(fused(x), node(x))


DDP = """
import copy, os, sys, torch
sys.path[:0] = ["tests"]
import test_compat_tools as tools
from sdit_kernels.compat import clock_driven, install, spikingjelly
from torch import distributed, nn
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
neuron = tools.jelly_modules().neuron
x = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2

def net(*nodes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5), nodes[0], nn.Linear(5, 3), nodes[1]).double()

def grads(net, x):
    net(x).sum().backward()
    return [p.grad for p in net.parameters()]

def jelly():
    return net(neuron.LIFNode(step_mode="m"), neuron.ParametricLIFNode(step_mode="m"))

wanted = grads(jelly(), x)
accelerated = jelly()
spikingjelly.accelerate(accelerated)
served = net(clock_driven.MultiStepLIFNode(backend="cupy"), clock_driven.MultiStepParametricLIFNode())
install()
for module in (accelerated, served, jelly()):
    module = nn.parallel.DistributedDataParallel(module)
    found = grads(module, x[:, :2] if rank else x[:, 2:])  # unequal parts of the batch
    for mean, total in zip(found, wanted, strict=True):
        torch.testing.assert_close(2 * mean, total, rtol=1e-9, atol=1e-9)
print("equal", rank)
distributed.destroy_process_group()
"""


@pytest.mark.process
def test_two_ddp_processes_give_the_gradients_of_one(jelly, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda rank: python(DDP, rank, str(tmp_path / "store")), "01"))
    assert [run.stdout for run in runs] == ["equal 0\n", "equal 1\n"], [run.stderr for run in runs]


# ---- documented differences ------------------------------------------------------------------------------------------


def test_a_learnt_threshold_gets_a_gradient(jelly, snn):
    """SpikingJelly 2 gives it no gradient, as the docstring says. snnTorch gives the same gradient as the kernels."""
    x = (torch.rand(4, 3, 8) * 3).requires_grad_()
    for mode in "sm":
        node = jelly.neuron.LIFNode(step_mode=mode)
        node.v_threshold = nn.Parameter(torch.tensor(1.0))
        fused = copy.deepcopy(node)
        compat_jelly.accelerate(fused)
        for m in (node, fused):
            m(x if mode == "m" else x[0]).sum().backward()
        assert fused.v_threshold.grad.abs() > 1
        assert not hasattr(node, "materialize_states") or node.v_threshold.grad is None
    neuron = snn.Leaky(0.8, learn_threshold=True)
    fused = copy.deepcopy(neuron)
    compat_snn.accelerate(fused)
    for m in (neuron, fused):
        spikes, mem = compat_snn.unroll(m, x) if m is fused else (None, None)
        if m is neuron:
            steps, mem = [], m.init_leaky()
            for x_t in x:
                spike, mem = m(x_t, mem)
                steps.append(spike)
            spikes = torch.stack(steps)
        spikes.sum().backward()
    torch.testing.assert_close(fused.threshold.grad, neuron.threshold.grad)
