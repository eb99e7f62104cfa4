"""accelerate(fuse=True): a norm and the neuron that gets its output compute as one, whatever lies between them."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sdit_kernels
import sdit_kernels.ops.norm_lif as norm_lif_module
from sdit_kernels import energy, packed, packed_spikes
from sdit_kernels.compat import handwritten
from sdit_kernels.compat.spikingjelly import accelerate, restore
from sdit_kernels.nn import IF, LIF, OverTime
from sdit_kernels.nn import reset as reset_net
from sdit_kernels.ops.neuron import NeuronOp
from sdit_kernels.pending import Pending, waiting

T, B, C = 4, 3, 6


@pytest.fixture
def fused_calls(monkeypatch):
    """Return a list that gets an entry for each norm and neuron that run as one."""
    calls, own = [], norm_lif_module.run_norm_lif

    def counted(x, norm, *args, **kwargs):
        calls.append(norm.channel_axis)
        return own(x, norm, *args, **kwargs)

    monkeypatch.setattr(norm_lif_module, "run_norm_lif", counted)
    return calls


class Net(nn.Module):
    """A convolution, its norm and neurons, then ``path`` from the norm to the neurons."""

    def __init__(self, path, norm=None, conv=None):
        super().__init__()
        self.conv = nn.Conv2d(2, C, 3, padding=1) if conv is None else conv
        self.norm = nn.BatchNorm2d(C) if norm is None else norm
        self.neuron = LIF(detach_reset=True)
        self.path = path

    def forward(self, x):
        return self.path(self, self.conv(x))


def direct(net, y):
    return net.neuron(net.norm(y).reshape(T, B, C, 5, 7))


def residual_first(net, y):
    return net.neuron((net.norm(y) + y).view(T, B, C, 5, 7))


def used_twice(net, y):
    z = net.norm(y).reshape(T, B, C, 5, 7)
    return net.neuron(z) + z


def used_before(net, y):
    z = net.norm(y).reshape(T, B, C, 5, 7)
    return z * 2 + net.neuron(z)


def two_neurons(net, y):
    z = net.norm(y).unflatten(0, (T, B))
    return net.neuron(z) + 2 * IF()(z)


def two_views(net, y):
    z = net.norm(y)
    return net.neuron(z.view(T, B, C, 5, 7)).flatten(3) + IF()(z.view(T, B, C, 35))


def in_place(net, y):
    z = net.norm(y).reshape(T, B, C, 5, 7)
    z += 0.5
    return net.neuron(z)


def in_place_of_a_view(net, y):
    z = net.norm(y)
    F.relu(z.view(T, B, C, 35), inplace=True)
    return net.neuron(z.view(T, B, C, 5, 7))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0].abs() < 1.5)


def own_function(net, y):
    return Rounded.apply(net.norm(y)).view(T, B, C, 5, 7)


def sliced(net, y):
    return net.neuron(net.norm(y).view(T, B, C, 5, 7)[:, :, 1:4])


def channels_in_tokens(net, y):  # the view tears the channels apart
    return net.neuron(net.norm(y).view(T, B, 2, C // 2, 5, 7).transpose(3, 4).flatten(2, 3))


def channels_first(net, y):
    return net.neuron(net.norm(y).view(T * B, C, 35).permute(1, 0, 2))


PATHS = {  # how often a norm and a neuron run as one
    direct: 1, residual_first: 0, used_twice: 1, used_before: 0, two_neurons: 2, two_views: 2, in_place: 0,
    in_place_of_a_view: 0, own_function: 0, sliced: 0, channels_in_tokens: 0, channels_first: 0,
}  # fmt: skip


def run(net, x, seed=0):
    """Return the outputs, the gradients and the buffers of two steps."""
    found = []
    for _ in range(2):
        reset_net(net)
        y = net(x)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        inputs = [x, *net.parameters()]
        found += [y, *torch.autograd.grad(y, inputs, g, allow_unused=True)]
    return [t for t in (*found, *net.buffers()) if t is not None]


def same(a, b, tolerance=1e-9):
    assert len(a) == len(b)
    for s, t in zip(a, b):
        assert type(s) is type(t) is torch.Tensor or isinstance(s, nn.Parameter)
        torch.testing.assert_close(s, t, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", PATHS, ids=lambda f: f.__name__)
def test_every_path_from_a_norm_to_a_neuron(path, training, fused_calls):
    net = Net(path).double().train(training)
    x = torch.randn(T * B, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    fused = copy.deepcopy(net)
    assert ("norm", "BatchNorm2d") in accelerate(fused, fuse=True).replaced
    wanted = run(net, x)
    same(run(fused, x), wanted)
    assert len(fused_calls) == 2 * PATHS[path]


def q_of_spikformer(net, y):
    z = net.norm(net.linear(y).transpose(-1, -2)).transpose(-1, -2).reshape(T, B, 10, C).contiguous()
    return net.neuron(z).reshape(T, B, 10, 2, C // 2).permute(0, 1, 3, 2, 4)


def conv1d_of_spikformer(net, y):
    return net.neuron(net.norm(net.linear(y).transpose(-1, -2)).reshape(T, B, C, 10).contiguous())


def folded(net, y):
    return net.neuron(OverTime(net.norm)(net.linear(y).view(T, B * 10, C)))


def rows_of_features(net, y):
    return net.neuron(net.norm(net.linear(y).flatten(0, 1)).view(T, B, 10, C).movedim(3, 1).unsqueeze(1))


@pytest.mark.parametrize("path, axis", [(q_of_spikformer, 3), (conv1d_of_spikformer, 2), (folded, 2), (rows_of_features, 2)])
def test_transposes_lead_to_the_axis_of_the_channels(path, axis, fused_calls):
    net = Net(path, nn.BatchNorm1d(C), nn.Identity()).double()
    net.linear = nn.Linear(5, C).double()
    x = torch.randn(T * B, 10, 5, dtype=torch.float64, requires_grad=True)
    fused = copy.deepcopy(net)
    accelerate(fused, fuse=True)
    wanted = run(net, x)
    same(run(fused, x), wanted)
    assert fused_calls == [axis] * 2


@pytest.mark.parametrize(
    "settings",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.7}],
    ids=str,
)  # fmt: skip
def test_settings_of_a_norm(settings, fused_calls):
    for training in (True, False):
        net = Net(direct, nn.BatchNorm2d(C, **settings)).double().train(training)
        x = torch.randn(T * B, 2, 5, 7, dtype=torch.float64, requires_grad=True)
        fused = copy.deepcopy(net)
        accelerate(fused, fuse=True)
        same(run(fused, x), run(net, x))
    assert len(fused_calls) == 4


def test_a_norm_without_a_reader_updates_its_statistics():
    norm = nn.BatchNorm2d(C).double()
    fused = copy.deepcopy(norm)
    accelerate(fused, fuse=True)
    x = torch.randn(5, C, 3, 3, dtype=torch.float64, requires_grad=True)
    norm(x)
    norm(x)
    with waiting():
        fused(x)  # its output is gone
        y = fused(x)
        assert isinstance(y, Pending)
        same([fused.running_mean, fused.running_var, fused.num_batches_tracked], list(norm.buffers()))
        norm(x)
        y = fused(x)
    same(list(fused.buffers()), list(norm.buffers()))
    norm(x)
    with pytest.raises(KeyError), waiting():
        y = fused(x)
        raise KeyError
    with waiting():  # evaluation reads what training has not yet updated
        fused(x)
        z = fused.eval()(x)
    fused.train()
    norm(x)
    same([z + 0], [norm.eval()(x)])
    norm.train()
    same(list(fused.buffers()), list(norm.buffers()))
    same([y + 0], [norm(x)])
    assert fused.num_batches_tracked == 5


def test_a_pending_tensor_looks_like_a_tensor():
    norm = nn.BatchNorm2d(C)
    wanted_norm = copy.deepcopy(norm)
    accelerate(norm, fuse=True)
    last = torch.randn(5, C, 3, 4).to(memory_format=torch.channels_last)
    many = torch.randn(5, 1, 3, 4).expand(5, C, 3, 4)
    for x in (torch.randn(5, C, 3, 4), torch.randn(5, C, 3, 8)[..., ::2], torch.randn(5, C, 4, 3).mT, last, many):
        x.requires_grad_()
        wanted = wanted_norm(x)
        with waiting():
            y = norm(x)
            assert isinstance(y, torch.Tensor) and y.shape == x.shape and y.dim() == 4 and len(y) == 5 and y.requires_grad
            assert y.stride() == wanted.stride() and y.is_contiguous() == wanted.is_contiguous()
            assert y._place.call.output is None  # nobody has read it
            for view in ((5, C, -1), (-1,), (5, -1), (1, 5, C, 3, 4), (5 * C, 12)):
                results = []
                for t in (y, wanted):
                    try:
                        results.append(t.view(view).shape)
                    except RuntimeError as error:
                        results.append(str(error))
                assert results[0] == results[1]
            y = norm(x)
            assert torch.equal(y.detach(), wanted.detach()) and repr(norm(x)) == repr(wanted)
            assert torch.equal(copy.deepcopy(norm(x).detach()), wanted) and norm(x).detach().numpy().shape == x.shape
            assert torch.equal(torch.stack([norm(x), x])[0], wanted) and norm(x).tolist() == wanted.tolist()
            assert torch.equal(pickle.loads(pickle.dumps(norm(x).detach())), wanted)
            for a, b in zip(norm(x), wanted):
                assert torch.equal(a, b)
        wanted_norm = copy.deepcopy(wanted_norm).train()


# --- what a model may do between a norm and its neurons ----------------------------------------------------------------------


def linear_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), LIF()).double()


def both(net):
    fused = copy.deepcopy(net)
    accelerate(fused, fuse=True)
    return net, fused


class Calls(nn.Module):
    """Run ``function(parts, x)`` as the forward pass of a model with these parts."""

    def __init__(self, parts, function):
        super().__init__()
        self.parts, self.function = parts, function

    def forward(self, x):
        return self.function(self.parts, x)


def results_of(function, x, net=None, training=True):
    found = []
    for net_ in both(Calls(net or linear_net(), function).train(training)):
        y = net_(x)
        assert not any(isinstance(t, Pending) for t in (y if isinstance(y, tuple) else (y,)))
        found.append((net_, y))
    return found


def test_the_output_of_a_model_does_not_change_later():
    x = torch.randn(12, 6, dtype=torch.float64)
    outputs = []
    with torch.no_grad():
        for net, y in results_of(lambda parts, x: parts[1](parts[0](x)), x, training=False):
            net.parts[1].weight.mul_(0.9)
            net.train()(x)
            outputs.append(y + 0)
    assert torch.equal(*outputs)
    kept = {}

    def keeps(parts, x):
        h = kept[id(parts)] = parts[1](parts[0](x))
        return parts[2](h.view(4, 3, 8))

    for net, y in results_of(keeps, x):
        y.sum().backward()
        with torch.no_grad():
            net.parts[1].weight.mul_(2)
    same([t + 0 for t in list(kept.values())[:1]], [t + 0 for t in list(kept.values())[1:]])


@pytest.mark.parametrize("what", ["input", "weight"])
def test_changes_in_place_before_the_neuron_are_errors(what):
    def changes(parts, x):
        c = x.clone()
        y = parts[1](c)
        (c if what == "input" else parts[1].weight.detach()).mul_(-1)
        return parts[2](y.view(4, 3, 8))

    _, net = both(Calls(linear_net(), changes).eval())
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="the input, weight, bias or running statistics of a fused BatchNorm were changed"),
    ):
        net(torch.randn(12, 8, dtype=torch.float64))


class Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, module):
        return module(q)

    @staticmethod
    def backward(ctx, g):
        return 3 * g, None


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q):
        ctx.mark_dirty(q)
        q.mul_(2)
        return q

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_functions_of_autograd_keep_their_gradients():
    def reentrant(parts, x):
        h = torch.utils.checkpoint.checkpoint(lambda q: parts[1](parts[0](q)), x, use_reentrant=True)
        return parts[2](h.view(4, 3, 8)) + h.view(4, 3, 8)

    def own(parts, x):
        return parts[2](Passes.apply(parts[0](x), parts[1]).view(4, 3, 8))

    def own_read(parts, x):
        return Passes.apply(parts[0](x), parts[1]) ** 3

    def dirty(parts, x):
        y = parts[1](parts[0](x))
        Doubles.apply(y)
        return y**3

    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    for function in (reentrant, own, own_read, dirty):
        found = []
        for net, y in results_of(function, x):
            net.zero_grad()
            x.grad = None
            y.square().sum().backward()
            found.append([y, x.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
        same(*found)


def test_running_statistics_are_updated_at_the_call():
    def looks(parts, x):
        y = parts[1](parts[0](x))
        seen = parts[1].running_mean.clone()
        first = parts[1](parts[0](x + 1))
        parts[2](first.view(4, 3, 8))
        parts[2](y.view(4, 3, 8))
        after = parts[1].running_mean.clone()
        parts[1].reset_running_stats()
        return seen, after, parts[2](y.view(4, 3, 8))

    (plain, wanted), (fused, found) = results_of(looks, torch.randn(12, 6, dtype=torch.float64))
    same(list(found), list(wanted))
    same(list(fused.buffers()), list(plain.buffers()))


def test_hooks_on_the_output_after_the_neuron_are_errors():
    def hooks(parts, x):
        h = parts[1](parts[0](x))
        parts[2](h.view(4, 3, 8))
        h.register_hook(lambda g: g * 0)

    _, net = both(Calls(linear_net(), hooks))
    with pytest.raises(RuntimeError, match="register_hook on the output of a fused BatchNorm has no effect after a neuron"):
        net(torch.randn(12, 6, dtype=torch.float64))


def test_a_norm_outside_of_the_model_runs_its_own_code():
    _, net = both(linear_net())
    y = net[1](net[0](torch.randn(12, 6, dtype=torch.float64)))
    assert type(y) is torch.Tensor


def test_views_that_merge_time_or_channels():
    x = torch.randn(12, 6, dtype=torch.float64)
    net = linear_net()
    net[2] = IF(v_reset=None)

    def fresh(parts, x):
        parts[2].reset()
        y = parts[1](parts[0](x)).unflatten(0, (4, 3))
        first = parts[2](y.view(4, -1))
        parts[2].reset()
        return first + parts[2](y.view(4, 3, -1)).view(4, -1) + y.view(-1).view(4, -1)

    (_, wanted), (_, found) = results_of(fresh, x, net)
    same([found], [wanted])


def test_a_momentum_that_norm_lif_refuses_runs_the_norms_own_code():
    net = linear_net()
    net[1].momentum = 1.5
    (_, wanted), (_, found) = results_of(lambda parts, x: parts[2](parts[1](parts[0](x)).view(4, 3, 8)),
                                         torch.randn(12, 6, dtype=torch.float64), net)  # fmt: skip
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_other_ops_take_a_pending_tensor(backend, monkeypatch):
    monkeypatch.setenv("SDIT_KERNELS_BACKEND", backend)
    ops = (
        sdit_kernels.relu_squared,
        lambda x: sdit_kernels.lif_rate(x, 4),
        lambda x: sdit_kernels.leaky(x, beta=0.9),
        lambda x: sdit_kernels.cuba(x, beta_i=0.8, beta=0.9),
        lambda x: sdit_kernels.lif(x, threshold="rms"),
        lambda x: sdit_kernels.lif(x, tau=torch.full((7,), 3.0, dtype=x.dtype)),
    )
    norm = nn.BatchNorm2d(C).double()
    x = torch.randn(T * B, C, 5, 7, dtype=torch.float64, requires_grad=True)
    for op in ops:
        results = []
        for n in (norm, copy.deepcopy(norm)):
            if n is not norm:
                accelerate(n, fuse=True)
            with waiting():
                y = op(n(x).unflatten(0, (T, B)))
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *n.parameters()]), *n.buffers()])
        same(*results)


def klif(x, s, p, o):
    f = o.maximum(p.k * (s.v + (x - s.v) * 0.5), 0.0)
    fired = o.fire(f - 1.0)
    return fired, f - fired * 1.0


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_neuron_with_one_state_fuses(backend, monkeypatch):
    monkeypatch.setenv("SDIT_KERNELS_BACKEND", backend)
    op = sdit_kernels.neuron.define(klif, parameters={"k": 1.0})
    k = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    neurons = {
        "leaky": lambda x: sdit_kernels.leaky(x, beta=0.9, return_v=True),
        "lapicque": lambda x: sdit_kernels.lapicque(x, C=2.0, return_v_seq=True),
        "own": lambda x: op(x, k=k),
        "own, states": lambda x: (lambda s, v: (s, v[0]))(*op(x, k=k, return_state=True)),
    }
    monkeypatch.setattr(sdit_kernels.pending._Call, "compute", None)  # nothing computes the norm alone
    for T_ in (4, 18):
        x = torch.randn(T_ * B, C, 5, 3, dtype=torch.float64, requires_grad=True)
        norm = nn.BatchNorm2d(C).double()
        for name, neuron in neurons.items():
            results = []
            for n in (norm, copy.deepcopy(norm)):
                if n is not norm:
                    accelerate(n, fuse=True)
                with waiting():
                    ys = neuron(n(x).unflatten(0, (T_, B)))
                ys = ys if isinstance(ys, tuple) else (ys,)
                inputs = [x, *n.parameters(), *([k] if "own" in name else [])]
                results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), inputs), *n.buffers()])
            same(*results)
        settings = dict(training=True, k=k, return_state=True)
        s, (v,) = op.after_norm(x.unflatten(0, (T_, B)), norm.weight, norm.bias, **settings)
        wanted, (v_wanted,) = op(norm(x).unflatten(0, (T_, B)), k=k, return_state=True)
        same([s, v, *torch.autograd.grad(v.sum(), [x, k])], [wanted, v_wanted, *torch.autograd.grad(v_wanted.sum(), [x, k])])


def test_errors_of_after_norm():
    op = sdit_kernels.neuron.define(klif, parameters={"k": 1.0})
    x = torch.randn(4, 3, C, 5)
    for message, change in {
        "running_mean and running_var must be given where training=False": dict(training=False),
        r"weight must have shape \(6,\), one per channel": dict(weight=torch.ones(5)),
        "klif has the settings k, got 'j'": dict(j=1.0),
        r"k must be a scalar or have shape \(6,\), one per channel": dict(k=torch.ones(5)),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            op.after_norm(x, **{"training": True} | change)

    def two(x, s, p, o):
        return o.fire(s.v), (s.v + s.w, x)

    with pytest.raises(TypeError, match="after_norm is for neurons with one state, and two has v, w"):
        sdit_kernels.neuron.define(two, states=("v", "w")).after_norm(x, training=True)


class Hooked(Net):
    def __init__(self):
        super().__init__(direct)
        self.norm.register_forward_hook(lambda module, args, y: y * 2)


class Shared(Net):
    def __init__(self):
        super().__init__(direct)
        self.again = self.norm


class Parametrized(Net):
    def __init__(self):
        super().__init__(direct)
        nn.utils.parametrizations.weight_norm(self.norm, dim=None)


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "make, reason",
    [
        (Hooked, "it has hooks"),
        (Shared, "it is shared: the model holds it as norm and again"),
        (Parametrized, "it is parametrized"),
        (lambda: Net(direct, OwnForward(C)), "OwnForward overrides forward of BatchNorm2d"),
        (lambda: Net(direct, nn.SyncBatchNorm(C)), "a SyncBatchNorm has no fused form here"),
        (lambda: Net(direct, nn.LazyBatchNorm2d()), "a LazyBatchNorm2d has no fused form here"),
    ],
)
def test_norms_that_stay_as_they_are(make, reason, fused_calls):
    net = make().eval()
    report = accelerate(net, fuse=True)
    assert not any(name == "norm" for name, _ in report.replaced)
    assert [r for name, _, r in report.left if name == "norm"][0].startswith(reason)
    if "Lazy" not in reason:
        net(torch.randn(T * B, 2, 5, 7))
    assert not fused_calls


def test_a_hook_that_comes_later_sees_the_output(fused_calls):
    net = Net(direct)
    accelerate(net, fuse=True)
    seen = []
    handle = net.norm.register_forward_hook(lambda module, args, y: seen.append(y))
    x = torch.randn(T * B, 2, 5, 7)
    net(x)
    assert type(seen[0]) is torch.Tensor and not fused_calls
    handle.remove()
    net.neuron.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean()))
    net(x)
    assert not fused_calls and seen[1].abs() < 1e-5


def test_the_path_may_change_after_accelerate(fused_calls):
    net = Net(direct).double()
    x = torch.randn(T * B, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    fused = copy.deepcopy(net)
    accelerate(fused, fuse=True)
    for path in (direct, residual_first, used_twice, direct):
        net.path = fused.path = path
        same(run(fused, x), run(net, x))
    assert len(fused_calls) == 6


def test_copies_pickles_keys_and_restore(fused_calls):
    net = Net(direct)
    x = torch.randn(T * B, 2, 5, 7)
    keys, wanted = list(net.state_dict()), net(x)
    accelerate(net, fuse=True)
    assert list(net.state_dict()) == keys and isinstance(net.norm, nn.BatchNorm2d) and type(net.norm).__name__ == "BatchNorm2d"
    net.load_state_dict(net.state_dict())
    for n in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        n.neuron.reset()
        assert torch.equal(n(x), wanted)
    assert len(fused_calls) == 3
    assert accelerate(net, fuse=True).replaced == ()
    assert restore(net).replaced == (("(the model)", "Net"), ("norm", "BatchNorm2d")) and type(net.norm) is nn.BatchNorm2d
    net.neuron.reset()
    assert torch.equal(net(x), wanted) and len(fused_calls) == 3


class Reads(nn.Module):
    """Neurons and a layer that reads their spikes; ``turned``: from a copy that is not contiguous."""

    def __init__(self, layer, turned):
        super().__init__()
        self.neuron, self.layer, self.turned = LIF(), layer, turned

    def forward(self, x):
        s = self.neuron(x)
        s = s.flatten(0, 1) if s.dim() == 5 else s
        return self.layer(s.transpose(-1, -2).contiguous().transpose(-1, -2) if self.turned else s)


class ReadsSteps(Reads):
    def forward(self, x):
        return self.layer(self.neuron(x))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(
    "kind, shape", [("Linear(16, 8)", (4, 8, 8, 16)), ("Conv2d(4, 8, 3)", (4, 8, 4, 16, 16)), ("Conv1d(8, 4, 3)", (8, 8, 64))]
)
def test_layers_that_read_spikes_hide_their_operators_from_packed_spikes(kind, shape, cast, turned, monkeypatch):
    """A cast or a copy of spikes stays visible, because the layer keeps it, as bits."""
    kept, seen, pack, dispatch = [], [], packed._pack_storage, packed._Mode.__torch_dispatch__

    def watched(self, function, *args):
        seen.append(str(function))
        return dispatch(self, function, *args)

    own, x = Reads(eval(f"nn.{kind}"), turned), 3 * torch.randn(shape)
    net, found = copy.deepcopy(own), []
    assert accelerate(net, packed=True).replaced == (("(the model)", "Reads"),)
    cls = type(net.layer)
    assert accelerate(net, packed=True).replaced == () and type(net.layer) is cls
    assert cls is not type(own.layer) and issubclass(cls, type(own.layer))
    assert type(copy.deepcopy(net).layer) is type(pickle.loads(pickle.dumps(net.layer))) is cls
    monkeypatch.setattr(packed, "_pack_storage", lambda *args: kept.append(args[1].dtype) or pack(*args))
    monkeypatch.setattr(packed._Mode, "__torch_dispatch__", watched)
    for n in (own, net):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = n(x)
        y.float().square().sum().backward()
        found.append((y, n.layer.weight.grad))
    assert all(map(torch.equal, *found)) and kept == [torch.bfloat16 if cast else torch.float32]
    assert any("mm" in name or "convolution" in name for name in seen) == (turned or cast)
    assert restore(net).replaced == (("(the model)", "Reads"),) and type(net.layer) is type(own.layer)


@pytest.mark.parametrize(
    "kind, shape",
    [
        ("Conv2d(4, 8, 3, stride=2, bias=False, step_mode='m')", (4, 8, 4, 16, 16)),
        ("Conv2d(4, 8, 3, groups=2, padding_mode='circular', padding=1, step_mode='m')", (4, 8, 4, 16, 16)),
        ("Conv1d(8, 4, 3, step_mode='m')", (4, 8, 8, 64)),
        ("Conv3d(2, 4, 3, step_mode='m')", (4, 8, 2, 4, 16, 16)),
        ("Conv1d(8, 4, 3)", (8, 8, 64)),
        ("AvgPool2d(2, step_mode='m')", (4, 8, 4, 16, 16)),
        ("AdaptiveAvgPool2d(1, step_mode='m')", (4, 8, 4, 16, 16)),
    ],
)
def test_layers_of_spikingjelly_that_read_spikes(kind, shape, monkeypatch):
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    seen, dispatch, found = [], packed._Mode.__torch_dispatch__, []

    def watched(self, function, *args):
        seen.append(str(function))
        return dispatch(self, function, *args)

    own = ReadsSteps(eval(f"layer.{kind}", {"layer": layer}), False)
    net = copy.deepcopy(own)
    accelerate(net, packed=True)
    monkeypatch.setattr(packed._Mode, "__torch_dispatch__", watched)
    for n in (own, net):
        x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
        y = n(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in n.parameters())])
    assert all(map(torch.equal, *found)) and found[0][0].stride() == found[1][0].stride()
    assert "circular" in kind or not any("convolution" in name or "pool" in name for name in seen)
    wrong = torch.zeros(shape[1:] if "step_mode" in kind else (2, 2, *shape))
    with pytest.raises(Exception) as wanted:
        own.layer(wrong)
    with packed_spikes(), pytest.raises(type(wanted.value), match=re.escape(str(wanted.value))):
        net.layer(wrong)


def test_autocast_and_checkpointing(fused_calls):
    from torch.utils.checkpoint import checkpoint

    net = Net(direct)
    x = torch.randn(T * B, 2, 5, 7)
    fused = copy.deepcopy(net)
    accelerate(fused, fuse=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = net(x), fused(x)
    assert found.dtype == wanted.dtype == torch.bfloat16 and (found != wanted).float().mean() < 0.02 and len(fused_calls) == 1
    for reentrant in (True, False):
        results = []
        for n in (net, fused):
            x = torch.randn(T * B, 2, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()

            def call(x, n=n):
                n.neuron.reset()
                return n(x)

            n.zero_grad()
            y = checkpoint(call, x, use_reentrant=reentrant)
            y.sum().backward()
            results.append([y, x.grad, *(p.grad for p in n.parameters()), *n.buffers()])
        same(*results, 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packs", [False, True])
def test_checkpointing_of_a_part_of_the_model(reentrant, training, packs, fused_calls):
    """The backward pass repeats the part outside of the model's forward pass."""
    from torch.utils.checkpoint import checkpoint

    class Part(Net):
        def forward(self, x):
            def part(h):
                self.neuron.reset()
                return direct(self, self.again(h))

            return checkpoint(part, self.conv(x), use_reentrant=reentrant) * 2

    net = Part(direct)
    net.again = nn.Conv2d(C, C, 3, padding=1)
    net, results = net.double().train(training), []
    fused = copy.deepcopy(net)
    accelerate(fused, fuse=True, packed=packs)
    for n in (net, fused):
        x = torch.randn(T * B, 2, 5, 7, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        y = n(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in n.parameters()), *n.buffers()])
    same(*results)
    assert len(fused_calls) == 2 and fused.norm.num_batches_tracked == 2 * training


def test_a_norm_without_gradients_passes_none_on(fused_calls):
    class Frozen(Net):
        def forward(self, x):
            y = self.conv(x)
            with torch.no_grad():
                y = self.norm(y)
            assert not y.requires_grad
            return self.again(self.neuron(y.reshape(T, B, C, 5, 7)).flatten(0, 1))

    net, results = Frozen(direct), []
    net.again = nn.Conv2d(C, C, 3)
    net = net.double()
    fused = copy.deepcopy(net)
    accelerate(fused, fuse=True)
    x = torch.randn(T * B, 2, 5, 7, dtype=torch.float64)
    for n in (net, fused):
        y = n(x)
        y.square().sum().backward()
        assert n.norm.weight.grad is None and n.conv.weight.grad is None
        results.append([y, n.again.weight.grad, *n.buffers()])
    same(*results)
    with torch.no_grad():
        same([net(x)], [fused(x)])
    assert len(fused_calls) == 1


@pytest.mark.parametrize("write", [lambda n: n.load_state_dict(n.state_dict()), lambda n: [b.zero_() for b in n.buffers()]])
def test_running_statistics_that_change_before_the_neuron(write):
    norm = nn.BatchNorm2d(C)
    accelerate(norm, fuse=True)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="or running statistics of a fused BatchNorm were changed"),
        waiting(),
    ):
        y = norm(torch.randn(5, C, 3, 3))
        write(norm)
        y + 0


def test_an_error_of_the_model_is_not_hidden():
    norm = nn.BatchNorm2d(C)
    accelerate(norm, fuse=True)
    x = torch.randn(5, C, 3, 3)
    with torch.no_grad(), pytest.raises(KeyError), waiting():
        norm(x)
        x.relu_()
        raise KeyError


def test_a_compiled_model_runs_the_norms_own_code(fused_calls):
    net = Net(direct).double()
    accelerate(net, fuse=True)
    x = torch.randn(T * B, 2, 5, 7, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    found = compiled(x)
    assert not fused_calls
    same([found], [net(x)])


@pytest.mark.parametrize("use", [
    lambda z: torch.func.vmap(torch.sum)(z), lambda z: torch.func.vmap(lambda row: row * 2)(z[..., :2]),
    lambda z: torch.func.grad(lambda t: t.square().sum())(z), lambda z: torch.func.jacrev(torch.sum)(z),
    lambda z: torch.func.vmap(lambda row: (row + z.sum()).sum())(torch.ones(2, 3)),
])  # fmt: skip
def test_transforms_of_torch_func_read_the_output_of_a_norm(use):
    """Inside a transform the output has no graph. The neuron, which gets it later, must not miss it."""

    def path(net, y):
        z = net.norm(y).view(T, B, C, 5, 7)
        read = use(z)
        return net.neuron(z) + 0.01 * read.square().mean() + z.square().mean()

    fused = Net(path).double()
    plain, x = copy.deepcopy(fused), torch.randn(T * B, 2, 5, 7, dtype=torch.float64)
    accelerate(fused, fuse=True)
    found, wanted = fused(x), plain(x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(y, list(n.parameters()), weights) for y, n in ((found, fused), (wanted, plain))]
    for f, w in zip(*gradients, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-9)
    for f, w in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-12, atol=1e-12)


def test_transforms_of_torch_func():
    net = Net(direct).double().eval()
    accelerate(net, fuse=True)
    x = torch.randn(T * B, 2, 5, 7, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def loss(p):
        reset_net(net)
        return torch.func.functional_call(net, p, (x,)).sum()

    found = torch.func.grad(loss)(parameters)
    restore(net)
    reset_net(net)
    wanted = torch.autograd.grad(net(x).sum(), list(parameters.values()))
    same([found[name] for name in parameters], list(wanted))


def test_errors():
    net = Net(direct)
    with pytest.raises(TypeError, match="fuse must be a bool, got int"):
        accelerate(net, fuse=1)
    accelerate(net, fuse=True)
    for shape in ((4, C), (2, C + 1, 5, 5), (1, C, 1, 1)):
        with pytest.raises(Exception) as wanted:
            nn.BatchNorm2d(C)(torch.randn(shape))
        with waiting(), pytest.raises(type(wanted.value)) as found:
            net.norm(torch.randn(shape))
        assert str(found.value) == str(wanted.value)


def test_nothing_of_the_size_of_the_currents_is_kept():
    net = Net(direct)
    accelerate(net, fuse=True)
    x, kept = torch.randn(T * B, 2, 5, 7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(x)
    assert sum(t.numel() == T * B * C * 35 for t in kept) == 1  # what the convolution gave


# --- SpikingJelly -------------------------------------------------------------------------------------------------------------


def jelly_nets():
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    from spikingjelly.activation_based import functional, neuron

    def net(norm, **settings):
        n = nn.Sequential(layer.Conv2d(2, C, 3, bias=False), norm, neuron.LIFNode(detach_reset=True))
        functional.set_step_mode(n, "m")
        return n

    container = layer.SeqToANNContainer(nn.Conv2d(2, C, 3, bias=False), nn.BatchNorm2d(C))
    found = {
        "BatchNorm2d": net(layer.BatchNorm2d(C)),
        "container": nn.Sequential(container, neuron.ParametricLIFNode(step_mode="m")),
        "tdBN": net(layer.ThresholdDependentBatchNorm2d(1.0, 1.0, C)),
        "integers": nn.Sequential(container, neuron.ILIFNode(tau=2.0, step_mode="m")) if hasattr(neuron, "ILIFNode") else None,
        "TEBN": net(layer.TemporalEffectiveBatchNorm2d(T, C)) if hasattr(layer, "TemporalEffectiveBatchNorm2d") else None,
        "BNTT": net(layer.BatchNormThroughTime2d(T, C)) if hasattr(layer, "BatchNormThroughTime2d") else None,
    }
    return {name: n for name, n in found.items() if n is not None}, functional.reset_net


@pytest.mark.peers
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["BatchNorm2d", "container", "tdBN", "integers", "TEBN", "BNTT"])
def test_norms_of_spikingjelly(name, training, fused_calls):
    nets, reset = jelly_nets()
    if name not in nets:
        pytest.skip(f"this SpikingJelly has no {name}")
    net = copy.deepcopy(nets[name]).double().train(training)
    x = torch.randn(T, B, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    for module in net.modules():  # values that differ
        for p in [
            p for key, p in module.named_parameters(recurse=False) if key in ("weight", "bias", "scale") and p.dim() == 1
        ]:
            p.data += 0.5 * torch.rand_like(p)
    fused = copy.deepcopy(net)
    accelerate(fused, fuse=True)
    results = []
    for n in (net, fused):
        found = []
        for _ in range(2):
            reset(n)
            y = n(x)
            found += [y, n[-1].v, *torch.autograd.grad(y.square().sum(), [x, *n.parameters()])]
        results.append([t for t in (*found, *n.buffers()) if t is not None])
    same(*results)
    assert len(fused_calls) == 2


@pytest.mark.peers
def test_v_seq_after_a_fused_call(fused_calls):
    from sdit_kernels.compat.clock_driven import neuron

    norm = nn.BatchNorm2d(C).double()
    net = nn.ModuleList([norm, neuron.MultiStepLIFNode(tau=2.0)])
    x = torch.randn(T * B, C, 5, 7, dtype=torch.float64)
    wanted = nn.BatchNorm2d(C).double()(x).view(T, B, C, 5, 7)
    plain = neuron.MultiStepLIFNode(tau=2.0)
    plain(wanted)
    accelerate(net, fuse=True)
    with waiting():
        net[1](net[0](x).view(T, B, C, 5, 7))
    before = norm.running_mean.clone()
    torch.testing.assert_close(net[1].v_seq, plain.v_seq, rtol=1e-9, atol=1e-9)
    assert len(fused_calls) == 2 and torch.equal(norm.running_mean, before)


class HandWritten(nn.Module):
    def forward(self, x):
        v, spikes = 0.0, []
        for t in range(x.shape[1]):
            v = 0.5 * v + x[:, t]
            s = Threshold.apply(v - 1)
            v = v * (1 - s)
            spikes.append(s)
        return torch.stack(spikes, 1)


class Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0].abs() < 0.5)


def test_hand_written_neurons(monkeypatch):
    leaky_calls, own = [], NeuronOp.after_norm

    def counted(*args, **kwargs):
        leaky_calls.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(NeuronOp, "after_norm", counted)

    def path(net, y):
        return net.neuron(net.norm(y).view(B, T, C, 5, 7))

    net = Net(path).double()
    net.neuron = HandWritten()
    x = torch.randn(B * T, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    fused = copy.deepcopy(net)
    assert handwritten.accelerate(fused).replaced
    accelerate(fused, fuse=True)
    same(run(fused, x), run(net, x))
    assert len(leaky_calls) == 2


@pytest.mark.peers
def test_networks_of_clock_driven(fused_calls):
    from perf import networks
    from sdit_kernels.compat import clock_driven

    for make, least in ((networks.Spikformer, 15), (networks.SEWResNet, 8), (networks.QKFormer, 15)):
        torch.manual_seed(0)
        net = make(clock_driven, T, 32).double()
        x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
        fused = copy.deepcopy(net)
        accelerate(fused, fuse=True)
        results = []
        for n in (net, fused):
            clock_driven.functional.reset_net(n)
            y = n(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(n.parameters())), *n.buffers()])
        same(*results, 1e-8)
        assert len(fused_calls) >= least, (make, len(fused_calls))
        fused_calls.clear()


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = Net(direct)
        accelerate(net, fuse=True)
        net(torch.randn(T * B, 2, 5, 7)).sum().backward()


def test_the_energy_counter_sees_fused_layers():
    net, x = Net(direct), torch.randn(T * B, 2, 5, 7)
    found = []
    for _ in range(2):
        reset_net(net)
        report = energy.count(net, x)
        found.append((report.macs, report.synaptic_operations, sorted(report.fused)))
        accelerate(net, fuse=True)
    assert found[0][:2] == found[1][:2] and found[0][2] == ["lif"] and found[1][2] == ["norm_lif"]
