"""compat.rwkv: compare RUN_CUDA with a plain loop, RWKV-LM's layers with plain ones, and Hugging Face models with ours."""

import copy
import importlib
import importlib.util
import io
import math
import pickle
import random
import types

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import sdit_kernels
from sdit_kernels.compat import rwkv
from sdit_kernels.compat.rwkv import RUN_CUDA as FUSED

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def loop(w, u, k, v, aa=None, bb=None, pp=None):
    """RWKV-4's scan in float64, as its equation reads. It has no running maximum, so keys must be small."""
    w, u, k, v = (t.double() for t in (w, u, k, v))
    n = torch.zeros_like(k[:, 0]) if aa is None else aa.double() * torch.exp(pp.double())
    d = torch.zeros_like(n) if bb is None else bb.double() * torch.exp(pp.double())
    keep, y = torch.exp(-torch.exp(w)), []
    for t in range(k.shape[1]):
        now, bonus = torch.exp(k[:, t]), torch.exp(u + k[:, t])
        y.append((n + bonus * v[:, t]) / (d + bonus))
        n, d = keep * n + now * v[:, t], keep * d + now
    return torch.stack(y, 1), n, d


def rms(found, wanted):
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def inputs(B, T, C, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = (torch.randn(*shape, generator=g).to(dtype) for shape in ((C,), (C,), (B, T, C), (B, T, C)))
    return [t.requires_grad_() for t in tensors]


def state(B, C, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randn(B, C, generator=g), torch.rand(B, C, generator=g) + 0.1, torch.randn(B, C, generator=g)], -1
    ).to(dtype)


# --- RUN_CUDA ---------------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    B=st.integers(1, 3), T=st.sampled_from([1, 2, 5, 16, 17, 33]), C=st.sampled_from([1, 3, 8, 33]),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), given=st.booleans(),
)  # fmt: skip
def test_run_cuda_equals_the_loop(B, T, C, dtype, seed, given):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = inputs(B, T, C, dtype, seed)
    before = state(B, C, wide, seed).requires_grad_() if given else None
    y = FUSED(B, T, C, *tensors, *([before] if given else []))
    y, after = y if given else (y, None)
    wanted, n, d = loop(*tensors, *(before.unbind(-1) if given else ()))
    assert y.dtype == dtype and y.shape == (B, T, C)
    rounding = rms(wanted.to(dtype), wanted)
    assert rms(y, wanted) <= max(1.1 * rounding, 2e-6 if dtype != torch.float64 else 1e-13)
    g = torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed)).to(dtype)
    loss, wanted_loss = (y * g).double().sum(), (wanted * g.double()).sum()
    if given:
        assert after.shape == (B, C, 3) and after.dtype == wide
        aa, bb, pp = after.double().unbind(-1)
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close(aa * pp.exp(), n, rtol=tolerance, atol=tolerance * n.abs().max().item())
        torch.testing.assert_close(bb * pp.exp(), d, rtol=tolerance, atol=0)
        loss, wanted_loss = loss + (aa / bb + pp + bb.log()).sum(), wanted_loss + (n / d + d.log()).sum()
    over = [*tensors, before] if given else tensors
    for name, found, ours in zip(
        "wukvs", torch.autograd.grad(loss, over), torch.autograd.grad(wanted_loss, over, materialize_grads=True)
    ):
        assert found.dtype == ours.dtype
        limit = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert (found - ours).abs().max() <= limit * ours.abs().max() + limit, name


def test_run_cuda_in_slices_equals_one_call():
    """The state is passed on and carries gradients. The first slice starts from RWKV's empty state."""
    w, u, k, v = inputs(2, 12, 5, torch.float64)
    whole = FUSED(2, 12, 5, w, u, k, v)
    carried, parts = torch.tensor([0.0, 0.0, -1e38]).double().expand(2, 5, 3), []
    for a, b in ((0, 1), (1, 7), (7, 12)):
        y, carried = FUSED(2, b - a, 5, w, u, k[:, a:b], v[:, a:b], carried)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-13, atol=1e-13)
    g = torch.randn(2, 12, 5).double()
    for a, b in zip(*(torch.autograd.grad((y * g).sum(), (w, u, k, v)) for y in (whole, torch.cat(parts, 1)))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "w, k, v", [("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32"), ("float16", "bfloat16", "float32")]
)
def test_run_cuda_casts_several_dtypes(w, k, v):
    """RWKV-LM computes in float32. Here the output has k's dtype, and each gradient the dtype of its tensor."""
    dtypes = [getattr(torch, name) for name in (w, w, k, v)]
    tensors = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(inputs(2, 9, 4), dtypes)]
    y = FUSED(2, 9, 4, *tensors)
    assert y.dtype == dtypes[2]
    assert rms(y, loop(*tensors)[0]) <= 1.1 * rms(loop(*tensors)[0].to(y.dtype), loop(*tensors)[0]) + 1e-6
    y.float().sum().backward()
    assert [t.grad.dtype for t in tensors] == dtypes


def test_run_cuda_runs_on_triton():
    w, u, k, v = inputs(2, 9, 4)
    with sdit_kernels.backend("triton"):
        y, after = FUSED(2, 9, 4, w, u, k, v, state(2, 4))
        y.sum().backward()
    wanted, n, d = loop(w, u, k, v, *state(2, 4).unbind(-1))
    assert rms(y, wanted) < 2e-6 and rms(after[..., 0] / after[..., 1], n / d) < 2e-6
    assert k.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"B": 3}, ValueError, r"k must have the shape \(B, T, C\) = \(3, 4, 2\), got \(1, 4, 2\)"),
        ({"w": 1.0}, TypeError, "w must be a tensor, got float"),
        ({"u": torch.zeros(3)}, ValueError, r"time_first must have shape \(2,\)"),
        ({"v": torch.zeros(1, 3, 2)}, ValueError, "v must have the shape of k"),
        ({"k": torch.zeros(1, 4, 2).int(), "v": torch.zeros(1, 4, 2).int()}, TypeError, "k must be of a floating dtype"),
        ({"last_state": (0, 0)}, TypeError, "last_state must be a tensor or None, got tuple"),
        ({"last_state": torch.zeros(1, 3, 2)}, ValueError, r"last_state must have the shape \(B, C, 3\) = \(1, 2, 3\)"),
        ({"last_state": torch.zeros(1, 2, 3, dtype=torch.float64)}, TypeError, "must be torch.float32 for data"),
    ],
)  # fmt: skip
def test_run_cuda_names_wrong_arguments(change, error, message):
    arguments = dict(B=1, T=4, C=2, w=torch.zeros(2), u=torch.zeros(2), k=torch.zeros(1, 4, 2), v=torch.zeros(1, 4, 2))
    with pytest.raises(error, match=message):
        FUSED(**arguments | change)


# --- layers in RWKV-LM's style ----------------------------------------------------------------------------------------------


def RUN_CUDA(B, T, C, w, u, k, v):
    raise RuntimeError("the extension wkv_cuda is not compiled")


class TimeMix(nn.Module):
    """RWKV-4's time mix with RWKV-LM's names, as in its equations. With ``zero``, projections start at zero as in RWKV-LM."""

    def __init__(self, C, A=None, zero=False):
        super().__init__()
        A = A or C
        self.time_decay, self.time_first = (nn.Parameter(torch.randn(A)) for _ in range(2))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (nn.Parameter(torch.rand(1, 1, C)) for _ in range(3))
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.value, self.receptance = (nn.Linear(C, A, bias=False) for _ in range(3))
        self.output = nn.Linear(A, C, bias=False)
        if zero:
            for linear in (self.key, self.receptance, self.output):
                nn.init.zeros_(linear.weight)

    def projections(self, x):
        before = self.time_shift(x)
        mixes = self.time_mix_k, self.time_mix_v, self.time_mix_r
        return [f(x * m + before * (1 - m)) for f, m in zip((self.key, self.value, self.receptance), mixes)]

    def forward(self, x):
        k, v, r = self.projections(x)
        B, T, C = k.shape
        return self.output(torch.sigmoid(r) * RUN_CUDA(B, T, C, self.time_decay, self.time_first, k, v))


class PlainTimeMix(TimeMix):
    """The same layer without RUN_CUDA. Tests compare the fused layer with it."""

    def forward(self, x):
        k, v, r = self.projections(x)
        return self.output(torch.sigmoid(r) * loop(self.time_decay, self.time_first, k, v)[0].to(x.dtype))


class ChannelMix(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.time_mix_k, self.time_mix_r = (nn.Parameter(torch.rand(1, 1, C)) for _ in range(2))
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.receptance, self.value = nn.Linear(C, 4 * C), nn.Linear(C, C), nn.Linear(4 * C, C)

    def forward(self, x):
        before = self.time_shift(x)
        k, r = (x * m + before * (1 - m) for m in (self.time_mix_k, self.time_mix_r))
        return torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)) ** 2)


class Model(nn.Module):
    def __init__(self, mix, C=8, words=11, layers=2):
        super().__init__()
        self.emb, self.head = nn.Embedding(words, C), nn.Linear(C, words)
        self.blocks = nn.ModuleList(
            nn.ModuleList((nn.LayerNorm(C), mix(C), nn.LayerNorm(C), ChannelMix(C))) for _ in range(layers)
        )

    def forward(self, ids):
        x = self.emb(ids)
        for norm1, time, norm2, channel in self.blocks:
            x = x + time(norm1(x))
            x = x + channel(norm2(x))
        return self.head(x)


def plain_and_accelerated(dtype=torch.float64, **settings):
    """Return the plain model, an accelerated model with the same weights, and the report."""
    torch.manual_seed(0)
    plain, fused = (Model(mix, **settings).to(dtype) for mix in (PlainTimeMix, TimeMix))
    fused.load_state_dict(plain.state_dict())
    return plain, fused, rwkv.accelerate(fused)


def test_accelerated_layers_equal_the_plain_ones():
    plain, fused, report = plain_and_accelerated()
    assert str(report).splitlines() == [
        "RWKV: 4 replaced, 0 left as they were",
        "  blocks.0.1  TimeMix: fused",
        "  blocks.0.3  ChannelMix: fused",
        "  blocks.1.1  TimeMix: fused",
        "  blocks.1.3  ChannelMix: fused",
    ]
    assert isinstance(fused.blocks[0][1], TimeMix) and plain.state_dict().keys() == fused.state_dict().keys()
    ids = torch.randint(11, (2, 13))
    for a, b in zip(*([m(ids), *torch.autograd.grad(m(ids).square().sum(), list(m.parameters()))] for m in (fused, plain))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    seen = []
    fused.blocks[0][1].register_forward_hook(lambda *_: seen.append("layer"))
    fused.blocks[0][1].key.register_forward_hook(lambda *_: seen.append("key"))
    fused(ids)
    assert seen == ["key", "layer"]
    again = rwkv.accelerate(fused)
    assert again[2:] == ((), ()) and str(again) == "RWKV: 0 replaced, 0 left as they were: 4 run fused already"
    assert rwkv.restore(fused).replaced == report.replaced
    assert type(fused.blocks[0][1]) is TimeMix and type(fused.blocks[0][3]) is ChannelMix
    with pytest.raises(RuntimeError, match="not compiled"):
        fused(ids)


def test_training_gives_the_losses_of_the_plain_model():
    plain, fused, _ = plain_and_accelerated(torch.float32)
    ids, losses = torch.randint(11, (4, 17)), []
    for model in (plain, fused):
        adam, found = torch.optim.Adam(model.parameters(), lr=1e-2), []
        for _ in range(20):
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            adam.zero_grad()
            loss.backward()
            adam.step()
            found.append(loss.item())
        losses.append(torch.tensor(found))
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(*losses, rtol=2e-4, atol=0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_accelerated(way):
    _, fused, _ = plain_and_accelerated()
    if way == "deepcopy":
        twin = copy.deepcopy(fused)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    ids = torch.randint(11, (2, 5))
    assert torch.equal(twin(ids), fused(ids)) and twin.emb.weight is not fused.emb.weight
    assert type(twin.blocks[0][1]) is type(fused.blocks[0][1])
    rwkv.restore(twin)
    assert type(twin.blocks[0][1]) is TimeMix and type(fused.blocks[0][1]) is not TimeMix


def test_any_width_dtype_and_zero_weights_are_accelerated():
    """The check draws its own weights, so layers that start at zero cannot pass by accident."""
    for mix, dtype in (
        (TimeMix(6, A=10), torch.float32),
        (TimeMix(6, zero=True), torch.bfloat16),
        (ChannelMix(6), torch.float16),
    ):
        model = nn.Sequential(mix.to(dtype))
        assert len(rwkv.accelerate(model).replaced) == 1
        y = model(torch.randn(2, 5, 6, dtype=dtype))
        assert y.dtype == dtype and y.shape == (2, 5, 6)
    wide = nn.Sequential(TimeMix(6).bfloat16())  # under autocast the tokens are float32 and the parameters may not be
    rwkv.accelerate(wide)
    with torch.autocast("cpu", torch.bfloat16):
        wide(torch.randn(2, 5, 6)).sum().backward()
    assert wide[0].time_decay.grad.dtype == torch.bfloat16


def test_accelerated_models_compile_without_a_graph_break():
    _, fused, _ = plain_and_accelerated(torch.float32)
    ids = torch.randint(11, (2, 5))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), fused(ids))


def test_accelerated_models_run_on_triton():
    plain, fused, _ = plain_and_accelerated(torch.float32, layers=1)
    ids = torch.randint(11, (2, 9))
    with sdit_kernels.backend("triton"):
        torch.testing.assert_close(fused(ids), plain(ids), rtol=1e-5, atol=1e-5)


# --- layers that differ from RWKV-4's ---------------------------------------------------------------------------------------


class MoreParts(TimeMix):
    """A layer with a second path, like RWKV-LM's tiny attention."""

    def __init__(self, C):
        super().__init__(C)
        self.extra = nn.Linear(C, C)

    def forward(self, x):
        return super().forward(x) + self.extra(x)


class MorePartsAndCall(MoreParts):
    def forward(self, x, scale=2.0, *, shift=0.5):
        k, v, r = self.projections(x)
        B, T, C = k.shape
        y = RUN_CUDA(B, T, C, self.time_decay, self.time_first, k, v)
        return scale * self.output(torch.sigmoid(r) * y) + self.extra(x) + shift


class Relu(TimeMix):
    def forward(self, x):
        k, v, r = self.projections(x)
        return self.output(torch.relu(r) * loop(self.time_decay, self.time_first, k, v)[0])


class Gelu(ChannelMix):
    def forward(self, x):
        return torch.sigmoid(self.receptance(x)) * self.value(nn.functional.gelu(self.key(x)))


class Weights(ChannelMix):
    def forward(self, x):
        return self.receptance(x) @ self.receptance.weight


class NoReceptance(TimeMix):
    def __init__(self, C):
        super().__init__(C)
        del self.receptance


class Options(TimeMix):
    def forward(self, x, mask=None):
        return super().forward(x)


class Five(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.time_decay, self.time_faaaa = nn.Parameter(torch.zeros(2, C // 2)), nn.Parameter(torch.zeros(2, C // 2))


class Vision(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.spatial_decay = nn.Parameter(torch.zeros(C))

    def forward(self, x):
        return RUN_CUDA(*x.shape, self.spatial_decay / x.shape[1], self.spatial_decay, x, x)


@pytest.mark.parametrize(
    "layer, why",
    [
        (MoreParts, "it has more parts than RWKV-4: extra"),
        (Relu, "its forward computes something else than RWKV-4's"),
        (Gelu, "its forward computes something else than RWKV-4's"),
        (Weights, "its forward does not run on random values (AttributeError"),
        (NoReceptance, "it lacks receptance"),
        (Options, r"its forward takes (x, mask), RWKV-4's (x)"),
        (Five, "it belongs to another version of RWKV, or to another form of RWKV-4"),
        (Vision, "it is a layer of Vision-RWKV: use sdit_kernels.compat.vision_rwkv"),
    ],
)
def test_other_layers_are_left_with_a_reason(layer, why):
    model = nn.Sequential(layer(8))
    forward = type(model[0]).forward
    report = rwkv.accelerate(model)
    if layer is NoReceptance:  # its forward calls RUN_CUDA, and that call is replaced
        assert report.left == (("0", "NoReceptance", f"only its call of RUN_CUDA is replaced: {why}"),)
        assert len(report.replaced) == 1
        return
    ((name, cls, text),) = report.left
    assert (name, cls, report.replaced) == ("0", layer.__name__, ()) and text.startswith(why)
    assert type(model[0]) is layer and type(model[0]).forward is forward


class Tail(nn.Module):
    """Change a layer's output in some way."""

    def __init__(self, tail):
        super().__init__()
        self.tail, self.norm = tail, nn.BatchNorm1d(5, affine=False, dtype=torch.float64)

    def forward(self, y):
        self.norm(y.double())  # changes only the norm's buffers, not the output
        return self.tail(y, self.training)


def layer_with_tail(base, tail):
    """A subclass of ``base`` whose forward ends with the module ``tail`` or with ``tail(y, training)``."""

    class Layer(base):
        def __init__(self, C):
            super().__init__(C)
            self.tail = tail if isinstance(tail, nn.Module) else Tail(tail)

        def forward(self, x):
            return self.tail(super().forward(x))

    return Layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("base", [PlainTimeMix, ChannelMix])
@pytest.mark.parametrize(
    "tail, why",
    [
        (nn.Dropout(0.5), "draws random numbers, in train mode"),
        (nn.Dropout(1e-6), "draws random numbers, in train mode"),
        (lambda y, training: y * 0.5 if training else y, "computes something else than RWKV-4's, in train mode"),
        (lambda y, training: y if training else y * 0.5, "computes something else than RWKV-4's, in eval mode"),
        (lambda y, training: y if random.random() < 2 else 0, "draws random numbers"),
        (lambda y, training: y * 1.0001, "computes something else than RWKV-4's"),
        (lambda y, training: y.clamp(-30, 30), "computes something else than RWKV-4's"),
        (lambda y, training: y.clamp(-65504, 65504), "computes something else than RWKV-4's, on large values"),
        (lambda y, training: y, None),
    ],
)
def test_the_check_runs_both_modes_and_large_values(base, training, tail, why):
    layer = layer_with_tail(base, tail)(8).train(training)
    layer.tail.training = True  # the modes of a layer and of its parts may differ
    model, cls = nn.Sequential(layer).eval() if why is None else nn.Sequential(layer), type(layer)
    flags, buffers = [m.training for m in model.modules()], [b.clone() for b in model.buffers()]
    drawn = torch.random.get_rng_state(), random.getstate()
    report = rwkv.accelerate(model)
    assert torch.equal(torch.random.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert [m.training for m in model.modules()] == flags and all(map(torch.equal, model.buffers(), buffers))
    if why is None:
        assert report.replaced == (("0", "Layer"),)
        return
    assert type(layer) is cls and report.replaced == ()
    mode = why.rpartition(", in ")[2] == f"{'train' if training else 'eval'} mode"
    wanted = f"its forward {why.rpartition(', in ')[0] if mode else why}"
    assert report.left[0].reason.startswith(wanted.replace(",", ""))
    if isinstance(tail, nn.Dropout) and tail.p == 0.5:
        share = (layer.train()(torch.randn(2, 64, 8)) == 0).float().mean()
        assert 0.4 < share < 0.6


def test_run_cuda_alone_is_replaced_in_other_layers():
    layer = MorePartsAndCall(8).double()
    x = torch.randn(2, 5, 8).double()
    with pytest.raises(RuntimeError, match="not compiled"):
        layer(x)
    model = nn.Sequential(layer)
    report = rwkv.accelerate(model)
    assert report.replaced == (("0", "MorePartsAndCall"),)
    assert report.left == (
        ("0", "MorePartsAndCall", "only its call of RUN_CUDA is replaced: it has more parts than RWKV-4: extra"),
    )
    k, v, r = layer.projections(x)
    y = layer.output(torch.sigmoid(r) * loop(layer.time_decay, layer.time_first, k, v)[0])
    torch.testing.assert_close(model(x), 2 * y + layer.extra(x) + 0.5)
    torch.testing.assert_close(layer(x, 1.0, shift=0.0), y + layer.extra(x))
    assert RUN_CUDA.__module__ == __name__
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    assert torch.equal(torch.compile(model, backend="aot_eager")(x), model(x))
    with pytest.raises(Exception, match="compile without fullgraph=True, or restore the model"):
        torch.compile(model, fullgraph=True, backend="eager")(x)
    rwkv.restore(model)
    assert type(layer) is MorePartsAndCall


def layers_with(run_cuda, source):
    """Run class definitions as a module of their own, whose global RUN_CUDA is the given one."""
    space = {"RUN_CUDA": run_cuda, "TimeMix": TimeMix, "torch": torch, "__name__": __name__}
    exec(source, space)
    return space["Layer"]


def test_a_call_with_a_state_is_replaced():
    """Some copies of RWKV-LM train on pieces of a sequence and pass the state on."""
    source = """
class Layer(TimeMix):
    def forward(self, x, state):
        k, v, r = self.projections(x)
        y, state = RUN_CUDA(*k.shape, self.time_decay, self.time_first, k, v, state)
        return self.output(torch.sigmoid(r) * y), state
"""
    layer = layers_with(lambda B, T, C, w, u, k, v, last_state: None, source)(8)
    model = nn.Sequential(layer)
    (entry,) = rwkv.accelerate(model).left
    assert entry.reason == "only its call of RUN_CUDA is replaced: its forward takes (x, state), RWKV-4's (x)"
    y, after = layer(torch.randn(2, 5, 8), state(2, 8))
    assert y.shape == (2, 5, 8) and after.shape == (2, 8, 3)


def test_calls_that_cannot_be_replaced_are_named():
    source = "class Layer(TimeMix):\n    def forward(self, x):\n        return RUN_CUDA(1, 2, 3, 4, x)"
    five = layers_with(lambda B, T, C, H, x: x, source)(8)
    (entry,) = rwkv.accelerate(nn.Sequential(five)).left
    assert entry[2] == "its RUN_CUDA takes 5 arguments, RWKV-4's 7, or 8 with a state"
    source = source.replace("1, 2, 3, 4, x", "*x.shape, self.time_decay, self.time_first, x, x")
    ours = layers_with(FUSED, source)(8)
    (entry,) = rwkv.accelerate(nn.Sequential(ours)).left
    assert entry[2].startswith("its RUN_CUDA is this package's already; the rest: its forward computes something else")


def test_patched_and_scripted_layers_are_left_with_a_reason():
    hooked = TimeMix(8)
    hooked.forward = types.MethodType(lambda self, x: x, hooked)
    scripted = torch.jit.trace(ChannelMix(8), torch.randn(1, 3, 8), check_trace=False)
    model = nn.ModuleDict({"hooked": hooked, "scripted": scripted, "done": ChannelMix(8)})
    rwkv.accelerate(model["done"])
    reasons = {entry.name: entry.reason for entry in rwkv.accelerate(model).left}
    assert reasons["hooked"].startswith("its forward is replaced on the instance")
    assert reasons["scripted"].startswith("compiled by torch.jit.script or torch.jit.trace") and len(reasons) == 2


SCRIPTED = """
import os, torch
from torch import nn

class Scripted(BASE):
    def __init__(self):
        super().__init__()
        self.time_mix_k, self.time_mix_r = (nn.Parameter(torch.rand(1, 1, 8)) for _ in range(2))
        self.key, self.receptance, self.value = (nn.Linear(8, 8) for _ in range(3))

    @torch.jit.script_method
    def forward(self, x):
        return self.value(x)
"""


@pytest.mark.parametrize("file, base, way", [
    ("always", "torch.jit.ScriptModule", "derive it from torch.nn.Module, without torch.jit.script_method"),
    ("asks", "(torch.jit.ScriptModule if os.environ['RWKV_JIT_ON'] == '1' else nn.Module)", "set RWKV_JIT_ON=0"),
])  # fmt: skip
def test_scripted_layers_are_left_with_a_way_out(tmp_path, monkeypatch, file, base, way):
    """The way out depends on whether the layer's file has RWKV-LM's switch."""
    (tmp_path / f"scripted_{file}.py").write_text(SCRIPTED.replace("BASE", base))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RWKV_JIT_ON", "1")
    (entry,) = rwkv.accelerate(nn.Sequential(importlib.import_module(f"scripted_{file}").Scripted())).left
    assert entry.reason == f"its class derives from torch.jit.ScriptModule, which keeps its code: {way}"


class Tmix(nn.Module):
    """A layer of a later RWKV. Its class name shows that, but its parameters have other names."""

    def __init__(self):
        super().__init__()
        self.x_r = nn.Parameter(torch.rand(8))


def test_unknown_rwkv_layers_are_in_the_report():
    """A layer that only its class name shows is reported. The module that contains it is not."""
    net = nn.ModuleDict({"late": nn.Sequential(Tmix()), "Model": Model(TimeMix, layers=1), "linear": nn.Linear(8, 8)})
    report = rwkv.accelerate(net)
    assert [(entry.name, entry.kind) for entry in report.left] == [("late.0", "Tmix")] and len(report.replaced) == 2
    assert report.left[0].reason.startswith("it has the name of an RWKV's layer, but not the parameters of RWKV-4")


def test_a_model_without_rwkv_layers_reports_nothing_replaced():
    ours = nn.Sequential(sdit_kernels.nn.TimeMix(8), nn.Linear(8, 8))
    assert str(rwkv.accelerate(ours)) == ("RWKV: 0 replaced, 0 left as they were: nothing of RWKV was found in the model")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        rwkv.accelerate(3)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        rwkv.restore("model")


def test_accelerate_leaves_the_users_random_state_unchanged():
    model = nn.Sequential(TimeMix(8), ChannelMix(8))
    before = torch.random.get_rng_state()
    rwkv.accelerate(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_that_is_one_layer_is_accelerated():
    layer = TimeMix(8)
    assert rwkv.accelerate(layer).replaced == (("(the model)", "TimeMix"),)
    assert layer(torch.randn(2, 5, 8)).shape == (2, 5, 8)


# --- Hugging Face transformers ----------------------------------------------------------------------------------------------

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (make peers)"
)


def hugging_face(dtype=torch.float32, **changes):
    """Their model, and ours with the same random weights. All weights are random, because some initial weights are zero."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    settings = dict(vocab_size=31, hidden_size=16, num_hidden_layers=3, context_length=64, rescale_every=2, bos_token_id=0)
    theirs = RwkvForCausalLM(RwkvConfig(**settings | {"eos_token_id": None} | changes))
    for p in theirs.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p) * (p.dim() > 1)
    theirs = theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    report = rwkv.accelerate(ours)
    assert len(report.replaced) == 6 and not report.left
    return theirs, ours


def logits(model, ids, **arguments):
    return model(ids, **arguments).logits


def forbid_their_scan(monkeypatch):
    """Make every later call of their loop or their CUDA kernel an error."""
    from transformers.models.rwkv import modeling_rwkv

    def forbidden(*_, **__):
        raise AssertionError("their scan was called")

    monkeypatch.setattr(modeling_rwkv, "rwkv_linear_attention", forbidden)
    monkeypatch.setattr(modeling_rwkv, "rwkv_cuda_kernel", types.SimpleNamespace(max_seq_length=1))


@needs_transformers
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_transformers(training):
    theirs, ours = hugging_face()
    ids, found = torch.randint(31, (2, 33)), []
    for model in (theirs, ours):
        model.train(training)
        out = model(ids, labels=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
        out.loss.backward()
        found.append([out.loss, out.logits, *out.hidden_states, *out.attentions, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-7


@needs_transformers
def test_bfloat16_is_as_accurate_as_transformers():
    """Both use the same bfloat16 weights. The exact result is float32 arithmetic on these weights."""
    theirs, ours = hugging_face(torch.bfloat16)
    exact = copy.deepcopy(theirs).float()
    ids = torch.randint(31, (2, 33))
    with torch.no_grad():
        wanted, a, b = (logits(m.eval(), ids) for m in (exact, theirs, ours))
    assert b.dtype == torch.bfloat16 and rms(b, wanted) <= 1.1 * rms(a, wanted) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        found, same = (logits(m, ids, use_cache=True) for m in hugging_face())
    assert rms(same, found) < 0.03


@needs_transformers
def test_the_state_is_interchangeable_with_transformers():
    theirs, ours = hugging_face()
    theirs.eval(), ours.eval()
    ids = torch.randint(31, (2, 12))
    with torch.no_grad():
        a, b = (model(ids[:, :7], use_cache=True) for model in (theirs, ours))
        for s, t in zip(a.state[:2], b.state[:2]):
            torch.testing.assert_close(t, s, rtol=1e-5, atol=1e-5)
        for s, t in zip(*(sdit_kernels.wkv_state_from_rwkv(*out.state[2:]) for out in (a, b))):
            torch.testing.assert_close(t, s, rtol=2e-5, atol=2e-5)
        assert [s.dtype for s in a.state] == [t.dtype for t in b.state]
        # pass a state from one model to the other, with several tokens (transformers is wrong for one token of two sequences)
        wanted = logits(theirs, ids)[:, 7:]
        for model, state in ((theirs, b.state), (ours, a.state), (ours, b.state)):
            found = logits(model, ids[:, 7:], state=[s.clone() for s in state], use_cache=True)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_by_token_equals_the_whole_sequence_for_any_batch(dtype, monkeypatch):
    _, ours = hugging_face(dtype)
    forbid_their_scan(monkeypatch)
    ours.eval()
    ids, state, steps = torch.randint(31, (3, 9)), None, []
    with torch.inference_mode():
        whole = logits(ours, ids, use_cache=False)
        for t in range(9):
            out = ours(ids[:, t : t + 1], state=state, use_cache=True)
            state = out.state
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


@needs_transformers
def test_transformers_is_wrong_for_one_token_of_two_sequences():
    """The docstring of compat.rwkv says this. Change it there if transformers fixes it."""
    theirs, _ = hugging_face()
    theirs.eval()
    with torch.no_grad():
        out = theirs(torch.randint(31, (2, 5)), use_cache=True)
        assert logits(theirs, torch.randint(31, (2, 1)), state=out.state, use_cache=True).shape == (2, 2, 31)


@needs_transformers
@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True, "temperature": 1.5}])
def test_generate_equals_transformers(settings):
    theirs, ours = hugging_face()
    ids, found = torch.randint(31, (2, 5)), []
    for model in (theirs, ours):
        torch.manual_seed(3)
        found.append(model.eval().generate(ids[:1], max_new_tokens=20, pad_token_id=0, **settings))
    assert torch.equal(*found) and found[0].shape == (1, 25)
    if not settings["do_sample"]:
        both = ours.generate(ids, max_new_tokens=20, pad_token_id=0, **settings)
        alone = [ours.generate(row[None], max_new_tokens=20, pad_token_id=0, **settings)[0] for row in ids]
        assert torch.equal(both, torch.stack(alone))


@needs_transformers
def test_training_gives_the_losses_of_transformers(monkeypatch):
    theirs, ours = hugging_face()
    ids, losses = torch.randint(31, (4, 24)), []
    forbid_their_scan(monkeypatch)
    for model in (ours, theirs):
        if model is theirs:
            monkeypatch.undo()
        adam, found = torch.optim.AdamW(model.train().parameters(), lr=3e-3), []
        for _ in range(12):
            loss = model(ids, labels=ids).loss
            adam.zero_grad()
            loss.backward()
            adam.step()
            found.append(loss.item())
        losses.append(torch.tensor(found))
    assert losses[1][-1] < 0.9 * losses[1][0]
    torch.testing.assert_close(*losses, rtol=2e-4, atol=0)


@needs_transformers
def test_gradients_flow_through_the_state():
    """Two pieces with the state passed on have the gradient of the whole sequence, so backpropagation is not truncated."""
    _, ours = hugging_face(torch.float64)
    ids, found = torch.randint(31, (2, 10)), []
    ours.train()  # in evaluation mode transformers rescales weights in place
    for cut in (10, 4, 9):  # the whole, two pieces, and a piece with a single token
        first = ours(ids[:, :cut], use_cache=True)
        parts = [first.logits] + ([ours(ids[:, cut:], state=first.state, use_cache=True).logits] if cut < 10 else [])
        found.append(torch.autograd.grad(torch.cat(parts, 1).square().mean(), list(ours.parameters())))
    for a, *others in zip(*found):
        # the tolerance is that wide because the state is float32
        assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for b in others)


@needs_transformers
def test_padding_rescaling_checkpointing_and_saving_work(tmp_path):
    theirs, ours = hugging_face()
    ids, mask = torch.randint(31, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    for training in (False, True, False):  # evaluation mode divides the weights in place, training mode multiplies them back
        theirs.train(training), ours.train(training)
        with torch.no_grad():
            a, b = (logits(m, ids, attention_mask=mask) for m in (theirs, ours))
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
            assert torch.equal(b, logits(ours, ids))
        for p, q in zip(theirs.parameters(), ours.parameters()):
            assert torch.equal(p, q)
    ours.train()
    plain = torch.autograd.grad(ours(ids, labels=ids).loss, list(ours.parameters()))
    if ours.supports_gradient_checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, torch.autograd.grad(ours(ids, labels=ids).loss, list(ours.parameters()))):
        torch.testing.assert_close(a, b)
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    assert type(again.rwkv.blocks[0].attention).__name__ == "RwkvSelfAttention"
    rwkv.accelerate(again)
    assert torch.equal(logits(again.train(), ids), logits(ours, ids))


@needs_transformers
def test_accelerated_transformers_compile():
    _, ours = hugging_face()
    block = ours.rwkv.blocks[1].train()
    x = torch.randn(2, 6, 16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], block(x)[0])


def test_sequences_may_be_longer_than_5000_tokens():
    """RWKV-LM has a limit T_MAX and transformers has context_length. The fused scan has no limit."""
    T = 5000
    y = FUSED(1, T, 1, torch.full((1,), math.log(1e-3)), torch.zeros(1), torch.zeros(1, T, 1), torch.ones(1, T, 1))
    torch.testing.assert_close(y, torch.ones(1, T, 1))
