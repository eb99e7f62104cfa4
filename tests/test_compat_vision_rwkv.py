"""compat.vision_rwkv: compare RUN_CUDA with the formula, and layers and whole models with plain ones.

The plain model is perf/vision_rwkv.py. Its scan is set to a form that does not exist while an accelerated model runs, so that
a call of the plain scan fails.
"""

import contextlib
import copy
import io
import pickle
import types
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import sdit_kernels
from perf import vision_rwkv as plain_model
from perf.vision_rwkv import VisionRWKV, VRWKV_ChannelMix, VRWKV_SpatialMix
from sdit_kernels.compat import rwkv, vision_rwkv
from sdit_kernels.compat.vision_rwkv import RUN_CUDA as FUSED

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def formula(w, u, k, v, offset=1):
    """The paper's formula in float64: token i counts e^(k[i] - (|t-i| - offset) w) for token t, and e^(u + k[t]) for i = t."""
    w, u, k, v = (t.double() for t in (w, u, k, v))
    y = []
    for t in range(k.shape[1]):
        exponents = [u + k[:, i] if i == t else k[:, i] - (abs(t - i) - offset) * w for i in range(k.shape[1])]
        y.append((torch.softmax(torch.stack(exponents, 1), 1) * v).sum(1))
    return torch.stack(y, 1)


def rms(found, wanted):
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def inputs(B, T, C, dtypes=(torch.float32,) * 4, seed=0, steepness=1.0):
    g = torch.Generator().manual_seed(seed)
    w, u, k, v = (torch.randn(*shape, generator=g) for shape in ((C,), (C,), (B, T, C), (B, T, C)))
    return [t.to(dtype).requires_grad_() for t, dtype in zip((steepness * w, u, k, v), dtypes)]


@contextlib.contextmanager
def no_extension():
    """The plain scan fails, as Vision-RWKV does where the CUDA extension is not compiled."""
    before = plain_model.chosen["form"]
    plain_model.chosen["form"] = "not compiled"
    try:
        yield
    finally:
        plain_model.chosen["form"] = before


# --- RUN_CUDA ---------------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    B=st.integers(1, 2), T=st.sampled_from([1, 2, 3, 16, 17, 33, 70]), C=st.sampled_from([1, 3, 8]),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), steepness=st.sampled_from([0, 0.02, 0.5, 3.0]), four=st.booleans(),
)  # fmt: skip
def test_run_cuda_equals_the_formula(B, T, C, dtype, seed, steepness, four):
    """w has both signs."""
    tensors = inputs(B, T, C, (dtype,) * 4, seed, steepness)
    y, wanted = FUSED(*([] if four else [B, T, C]), *tensors), formula(*tensors)
    assert y.dtype == dtype and y.shape == (B, T, C)
    rounding = rms(wanted.to(dtype), wanted)
    assert rms(y, wanted) <= max(1.1 * rounding, 3e-6 if dtype != torch.float64 else 1e-13)
    g = torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed)).to(dtype)
    limit = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    losses = (y.double() * g.double()).sum(), (wanted * g.double()).sum()
    gradients = (torch.autograd.grad(loss, tensors, materialize_grads=True) for loss in losses)  # one token does not use w
    # dw is a sum over t and i of (|t - i| - 1) g p (v[i] - y[t]), so a rounded y costs up to T g of its rounding.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    of_w = (T * eps * g.double().abs().sum((0, 1)) * wanted.abs().amax((0, 1))).max().item()
    for name, found, ours in zip("wukv", *gradients):
        assert found.dtype == dtype
        most = limit * ours.double().abs().max() + limit + (of_w if name == "w" else 0)
        assert (found.double() - ours.double()).abs().max() <= most, name


@pytest.mark.parametrize("of_parameters", DTYPES)
@pytest.mark.parametrize("of_data", DTYPES)
def test_run_cuda_returns_half_precision_only_if_w_has_it(of_parameters, of_data):
    """Vision-RWKV's function asks for the dtype of w. Otherwise it returns float32, under autocast too."""
    dtypes = (of_parameters, of_parameters, of_data, of_data)
    tensors = inputs(2, 17, 3, dtypes)
    y, wanted = FUSED(2, 17, 3, *tensors), formula(*tensors)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    assert y.dtype == (of_parameters if of_parameters in (torch.float16, torch.bfloat16) else wide)
    assert rms(y, wanted) <= 1.1 * rms(wanted.to(y.dtype), wanted) + 3e-6
    y.sum().backward()
    assert [t.grad.dtype for t in tensors] == list(dtypes)


def test_run_cuda_with_another_bonus_counts_distances():
    """The CUDA kernel of Vision-RWKV does so for T <= 32: a token i counts e^(k[i] - |t-i| w)."""
    w, u, k, v = inputs(2, 21, 3, (torch.float64,) * 4, steepness=0.3)
    torch.testing.assert_close(FUSED(w, u + w, k, v), formula(w, u, k, v, offset=0), rtol=1e-12, atol=1e-12)


def test_run_cuda_reads_any_strides_and_runs_on_triton():
    w, u, k, v = inputs(2, 17, 3)
    turned = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    assert torch.equal(FUSED(w, u, *turned), FUSED(w, u, k, v))
    with sdit_kernels.backend("triton"):
        y = FUSED(2, 17, 3, w, u, k, v)
    assert rms(y, formula(w, u, k, v)) < 3e-6


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda w, k: (1, 4, 2, w, w, k), TypeError, "RUN_CUDA takes B, T, C, w, u, k, v, or w, u, k, v, got 6 arguments"),
        (lambda w, k: (3, 4, 2, w, w, k, k), ValueError, r"k must have the shape \(B, T, C\) = \(3, 4, 2\), got \(1, 4, 2\)"),
        (lambda w, k: (1.0, w, k, k), TypeError, "w must be a tensor, got float"),
        (lambda w, k: (w, w, k.int(), k), TypeError, "k must be of a floating dtype, got torch.int32"),
        (lambda w, k: (w, w[:1], k, k), ValueError, r"time_first must have shape \(2,\)"),
        (lambda w, k: (w, w, k, k[:, 1:]), ValueError, "v must have the shape of k"),
    ],
)
def test_run_cuda_names_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FUSED(*arguments(torch.zeros(2), torch.zeros(1, 4, 2)))


# --- whole models -----------------------------------------------------------------------------------------------------------

SMALL = dict(image=12, patch=2, C=12, layers=2, classes=5)


def plain_and_accelerated(dtype=torch.float64, **options):
    torch.manual_seed(0)
    plain = VisionRWKV(**SMALL, **options).to(dtype)
    fused = copy.deepcopy(plain)
    with no_extension():
        report = vision_rwkv.accelerate(fused)
    return plain, fused, report


def images(dtype=torch.float64, B=2):
    return torch.randn(B, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def loss_and_gradients(model, x):
    loss = model(x).square().sum()
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


OPTIONS = (
    {},
    {"key_norm": True},
    {"shift_pixel": 2, "channel_gamma": 1 / 6},
    {"shift_pixel": 0, "key_norm": True},
    {"with_cp": True, "key_norm": True},
)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_accelerated_model_trains_like_the_plain_model(options):
    plain, fused, report = plain_and_accelerated(**options)
    assert str(report).splitlines() == [
        "Vision-RWKV: 4 replaced, 0 left as they were",
        "  blocks.0.att  VRWKV_SpatialMix: fused",
        "  blocks.0.ffn  VRWKV_ChannelMix: fused",
        "  blocks.1.att  VRWKV_SpatialMix: fused",
        "  blocks.1.ffn  VRWKV_ChannelMix: fused",
    ]
    assert isinstance(fused.blocks[0].att, VRWKV_SpatialMix) and plain.state_dict().keys() == fused.state_dict().keys()
    x, found = images(), []
    for model, guard in ((plain, contextlib.nullcontext()), (fused, no_extension())):
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with guard:
            results = loss_and_gradients(model, x)
            for _ in range(3):
                adam.zero_grad()
                model(x).square().sum().backward()
                adam.step()
            found.append([*results, model(x), *(p.detach() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("key_norm", [False, True])
def test_bfloat16_autocast_is_as_accurate_as_the_plain_model(key_norm):
    plain, fused, _ = plain_and_accelerated(torch.float32, key_norm=key_norm)
    x = images(torch.float32, B=4)
    with torch.no_grad():
        exact = plain.double()(x.double())
    plain.float()
    errors = []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        errors.append(rms(y, exact))
    assert errors[1] <= 1.3 * errors[0] + 1e-3 and errors[1] < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_the_plain_model(dtype):
    plain, fused, _ = plain_and_accelerated(dtype, key_norm=True)
    exact = copy.deepcopy(plain).double()
    x = images(dtype, B=4)
    with torch.no_grad():
        errors = [rms(model(x), exact(x.double())) for model in (plain, fused)]
    assert fused(x).dtype == dtype and errors[1] <= 1.3 * errors[0] + 1e-3
    fused(x).sum().backward()
    assert all(p.grad.dtype == dtype for p in fused.parameters())


def test_with_cp_recomputes_in_the_backward_pass():
    _, fused, _ = plain_and_accelerated(with_cp=True)
    calls = []
    fused.blocks[0].att.key.register_forward_hook(lambda *_: calls.append(1))
    fused(images()).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        fused(images())
    assert len(calls) == 3


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_accelerated(way):
    _, fused, report = plain_and_accelerated()
    if way == "deepcopy":
        twin = copy.deepcopy(fused)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with no_extension():
        assert torch.equal(twin(images()), fused(images()))
        again = vision_rwkv.accelerate(twin)
        assert str(again) == "Vision-RWKV: 0 replaced, 0 left as they were: 4 run fused already"
    assert vision_rwkv.restore(twin).replaced == report.replaced
    assert type(twin.blocks[0].att) is VRWKV_SpatialMix and type(fused.blocks[0].att) is not VRWKV_SpatialMix
    with no_extension(), pytest.raises(KeyError, match="not compiled"):
        twin(images())


def test_accelerated_models_compile_without_a_graph_break():
    _, fused, _ = plain_and_accelerated(torch.float32, key_norm=True)
    x = images(torch.float32)
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), fused(x))


# --- layers of other models -------------------------------------------------------------------------------------------------


def RUN_CUDA(B, T, C, w, u, k, v):
    raise RuntimeError("the extension is not compiled")


class SpatialMix(VRWKV_SpatialMix):
    """A copy that calls RUN_CUDA of this file, in a function inside forward."""

    run = None

    def forward(self, x, resolution=None):
        def inner(x):
            k, v, r = self.projections(x, resolution)
            y = RUN_CUDA(*k.shape, self.spatial_decay / k.shape[1], self.spatial_first / k.shape[1], k, v)
            return self.output(torch.sigmoid(r) * y)

        return inner(x)

    def projections(self, x, resolution):
        return [f(m) for f, m in zip((self.key, self.value, self.receptance), self.mixed(x, resolution))]


def interleaved_shift(x, shift_pixel, gamma, resolution):
    """A shift of another kind: every fourth channel moves right, and the others stay."""
    image = x.unflatten(1, resolution).clone()
    image[:, :, shift_pixel:, ::4] = x.unflatten(1, resolution)[:, :, :-shift_pixel, ::4]
    return image.flatten(1, 2)


class Square(SpatialMix):
    """A copy that finds the resolution of square images itself."""

    def forward(self, x, resolution=None):
        side = int(x.shape[1] ** 0.5)
        return super().forward(x, resolution or (side, side))


class Inferred(SpatialMix):
    def projections(self, x, resolution):
        return super().projections(x, resolution or (3, 3))


class Helper(SpatialMix):
    """A copy with RUN_CUDA in a method, and more than two arguments."""

    def scan(self, k, v):
        return RUN_CUDA(*k.shape, self.spatial_decay / k.shape[1], self.spatial_first / k.shape[1], k, v)

    def forward(self, x, resolution=None, scale=1.0):
        k, v, r = self.projections(x, resolution)
        return scale * self.output(torch.sigmoid(r) * self.scan(k, v))


class RowsThenColumns(nn.Module):
    """Restore-RWKV's Re-WKV: the second scan goes along columns and reads the output of the first. No gate with a mix."""

    def __init__(self, C):
        super().__init__()
        self.spatial_decay, self.spatial_first = (nn.Parameter(torch.randn(2, C)) for _ in range(2))
        self.omni_shift = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.key, self.value, self.receptance, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(self, x, resolution, scan=None):
        scan = scan or RUN_CUDA
        B, T, C = x.shape
        x = self.omni_shift(x.transpose(1, 2).unflatten(2, resolution)).flatten(2).transpose(1, 2)
        k, v, r = self.key(x), self.value(x), self.receptance(x)
        v = scan(B, T, C, self.spatial_decay[0] / T, self.spatial_first[0] / T, k, v)
        k, v = (t.unflatten(1, resolution).transpose(1, 2).flatten(1, 2) for t in (k, v))
        v = scan(B, T, C, self.spatial_decay[1] / T, self.spatial_first[1] / T, k, v)
        v = v.unflatten(1, resolution[::-1]).transpose(1, 2).flatten(1, 2)
        return self.output(torch.sigmoid(r) * v)


def formula_with_shape(B, T, C, w, u, k, v):
    return formula(w, u, k, v)


def expected(layer, x, resolution):
    k, v, r = layer.projections(x, resolution)
    T = x.shape[1]
    return layer.output(torch.sigmoid(r) * formula(layer.spatial_decay / T, layer.spatial_first / T, k, v))


def tokens(C=8, T=12):
    return torch.randn(2, T, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("own_shift", [False, True])
def test_copies_with_other_names_and_shifts_are_fused(own_shift):
    """q_shift is replaced, and a shift of another kind is called."""
    layer, x, calls = SpatialMix(8).double(), tokens(), []

    def shift(*args):
        calls.append(1)
        return (interleaved_shift if own_shift else plain_model.q_shift)(*args)

    layer.shift_func = shift
    with pytest.raises(RuntimeError, match="not compiled"):
        layer(x, (3, 4))
    wanted = expected(layer, x, (3, 4))
    report = vision_rwkv.accelerate(layer)
    assert report.replaced == (("(the model)", "SpatialMix"),) and not report.left
    calls.clear()
    for y in (layer(x, (3, 4)), layer(x, resolution=(3, 4))):
        torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-12)
    assert len(calls) == (2 if own_shift else 0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        layer(x, size=(3, 4))


def test_without_a_resolution_a_layer_runs_its_own_code():
    layer, x = Inferred(8).double(), tokens(T=9)
    wanted = expected(layer, x, (3, 3))
    assert vision_rwkv.accelerate(layer).left == ()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-12)


def test_the_forward_of_another_class_is_not_changed():
    """super().forward calls the function of its own file."""
    ((_, _, reason),) = vision_rwkv.accelerate(Square(8)).left
    assert reason.startswith("its forward does not run on random values (RuntimeError: the extension is not compiled)")


def test_run_cuda_alone_is_replaced_in_other_layers():
    torch.manual_seed(0)
    helper, rows, x = Helper(8).double(), RowsThenColumns(8).double(), tokens()
    wanted = 2 * expected(helper, x, (3, 4)), rows(x, (3, 4), formula_with_shape)
    model = nn.ModuleDict({"helper": helper, "rows": rows})
    report = vision_rwkv.accelerate(model)
    assert report.replaced == (("helper", "Helper"), ("rows", "RowsThenColumns"))
    assert [entry.reason for entry in report.left] == [
        "only its call of RUN_CUDA is replaced: its forward takes (x, resolution, scale), Vision-RWKV's (x, patch_resolution)",
        "only its call of RUN_CUDA is replaced: it has more parts than Vision-RWKV: omni_shift",
    ]
    for twin in (model, pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin["helper"](x, (3, 4), scale=2), wanted[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(twin["rows"](x, (3, 4)), wanted[1], rtol=1e-11, atol=1e-12)
    assert torch.equal(torch.compile(rows, backend="aot_eager")(x, (3, 4)), rows(x, (3, 4)))
    with pytest.raises(Exception, match="compile without fullgraph=True, or restore the model"):
        torch.compile(helper, fullgraph=True, backend="eager")(x, (3, 4))
    assert vision_rwkv.restore(model).replaced == report.replaced
    assert type(helper) is Helper and type(rows) is RowsThenColumns


def layer_from(source, run_cuda):
    """Run a class definition as a module of its own, whose global RUN_CUDA is the given one."""
    space = {"RUN_CUDA": run_cuda, "SpatialMix": SpatialMix, "torch": torch, "__name__": __name__}
    exec(source, space)
    return space["Layer"]


NEW_CALL = """
class Layer(SpatialMix):
    def forward(self, x, patch_resolution=None):
        k, v, r = self.projections(x, patch_resolution)
        T = x.shape[1]
        return self.output(torch.sigmoid(r) * RUN_CUDA(self.spatial_decay / T, self.spatial_first / T, k, v))
"""


def test_the_call_without_shape_is_fused_and_replaced():
    """Vision-RWKV's file of 2025 calls RUN_CUDA with four arguments."""
    x = tokens()
    for source, left in ((NEW_CALL, 0), (NEW_CALL.replace("return self", "return 2 * self"), 1)):
        layer = layer_from(source, lambda w, u, k, v: None)(8).double()
        report = vision_rwkv.accelerate(layer)
        assert len(report.replaced) == 1 and len(report.left) == left
        torch.testing.assert_close(layer(x, (3, 4)), (1 + left) * expected(layer, x, (3, 4)), rtol=1e-11, atol=1e-12)


# --- layers that are left ---------------------------------------------------------------------------------------------------


class Gelu(VRWKV_ChannelMix):
    def run(self, x, patch_resolution):
        xk, xr = self.mixed(x, patch_resolution)
        return torch.sigmoid(self.receptance(xr)) * self.value(nn.functional.gelu(self.key(xk)))


class NotDividedByT(VRWKV_SpatialMix):
    def run(self, x, patch_resolution):
        k, v, r = (f(m) for f, m in zip((self.key, self.value, self.receptance), self.mixed(x, patch_resolution)))
        return self.output(torch.sigmoid(r) * formula(self.spatial_decay, self.spatial_first, k, v))


class NoReceptance(VRWKV_ChannelMix):
    def __init__(self, C):
        super().__init__(C)
        del self.receptance


class Scale(VRWKV_ChannelMix):
    def __init__(self, C):
        super().__init__(C)
        self.scale = nn.Parameter(torch.ones(C))


class VRWKV6_SpatialMix(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.time_maa_k, self.key = nn.Parameter(torch.zeros(C)), nn.Linear(C, C)


class OtherNames(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.decay, self.first = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        return RUN_CUDA(*x.shape, self.decay, self.first, x, x)


FIVE = NEW_CALL.replace("RUN_CUDA(self", "RUN_CUDA(1, self").replace("return self", "return 2 * self")


@pytest.mark.parametrize(
    "layer, why",
    [
        (Gelu(8), "its forward computes something else than Vision-RWKV's"),
        (NotDividedByT(8), "its forward computes something else than Vision-RWKV's"),
        (NoReceptance(8), "it lacks receptance"),
        (Scale(8), "it has more parts than Vision-RWKV: scale"),
        (VRWKV6_SpatialMix(8), "it has the name of an RWKV's layer, but not the parameters of Vision-RWKV"),
        (OtherNames(8), "it calls RUN_CUDA, but has no parameters spatial_decay and spatial_first"),
        (layer_from(FIVE, lambda *five: None)(8), "its RUN_CUDA takes 1 arguments, Vision-RWKV's 7, or 4 without B, T and C"),
        (layer_from(NEW_CALL.replace("return self", "return 2 * self"), FUSED)(8), "its RUN_CUDA is this package's already"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_layers_are_left_with_a_reason(layer, why):
    model, cls = nn.Sequential(layer), type(layer)
    ((name, kind, reason),) = vision_rwkv.accelerate(model).left
    assert (name, kind) == ("0", cls.__name__) and reason.startswith(why) and type(layer) is cls


class Tail(VRWKV_ChannelMix):
    """A layer whose output is changed by ``tail``."""

    tail: nn.Module

    def run(self, x, patch_resolution):
        return self.tail(super().run(x, patch_resolution))


@pytest.mark.parametrize(
    "tail, why",
    [
        (nn.Dropout(0.1), "its forward draws random numbers in train mode"),
        (nn.Hardtanh(-65504.0, 65504.0), "its forward computes something else than Vision-RWKV's on large values"),
        (nn.Identity(), None),
    ],
)
def test_the_check_runs_both_modes_and_large_values(tail, why):
    layer = Tail(8).eval()
    layer.tail = tail
    before = torch.random.get_rng_state()
    report = vision_rwkv.accelerate(layer)
    assert torch.equal(torch.random.get_rng_state(), before) and not layer.training
    assert [entry.reason for entry in report.left] == ([] if why is None else [why])


def test_patched_layers_are_left_with_a_reason():
    layer = VRWKV_ChannelMix(8)
    layer.forward = types.MethodType(lambda self, x: x, layer)
    (entry,) = vision_rwkv.accelerate(layer).left
    assert entry.reason.startswith("its forward is replaced on the instance")


def test_reports_of_other_models():
    assert str(vision_rwkv.accelerate(nn.Linear(2, 2))).endswith("nothing of Vision-RWKV was found in the model")
    plain, fused, _ = plain_and_accelerated()
    assert [entry.reason for entry in rwkv.accelerate(plain).left] == [
        "it is a layer of Vision-RWKV: use sdit_kernels.compat.vision_rwkv"
    ] * 4
    assert rwkv.accelerate(fused).left == () and rwkv.restore(fused).replaced == ()
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        vision_rwkv.accelerate(3)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        vision_rwkv.restore("model")


def test_layers_run_their_own_code_while_operations_are_counted():
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter", reason="only SpikingJelly 2 counts operations")
    layer, x = SpatialMix(8).double(), tokens()
    vision_rwkv.accelerate(layer)
    wanted = layer(x, (3, 4))
    with counters.DispatchCounterMode([counters.FlopCounter()]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = layer(x, (3, 4))
    assert any("SpatialMix runs its own code" in str(w.message) for w in caught)
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-12)
