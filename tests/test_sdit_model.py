"""The network: golden numbers, the research model's equations, both forms, options, checkpoints and costs."""

import argparse
import doctest
import math

import pytest
import torch
import torch.nn.functional as F

import sdit.checkpoint
import sdit.config
import sdit.info
import sdit.model
import sdit.research
import sdit_kernels
from sdit import PRESETS, Config, SDiT
from sdit.info import info
from sdit.model import RecordedRate
from sdit.research import from_research, load_research
from sdit_kernels import energy

SMALL = Config(8, 1, 2, dim=24, depth=4, num_classes=10)
THRESHOLDS = (16 / 15, 4 / 3, 2.0)  # where the rate at T = 4 and tau = 2 rises to 1/4, 1/2 and 1


@pytest.fixture(autouse=True)
def numba_kernels():
    with sdit_kernels.backend("cpu"):
        yield


def build(dtype=torch.float64, seed=0, **overrides):
    """Build a small model in which every layer has firing neurons and every parameter has a gradient."""
    torch.manual_seed(seed)
    model = SDiT(SMALL, **overrides).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p))
            if name.endswith(("attention.output.weight", "mlp.value.weight")):
                torch.nn.init.normal_(p, std=4 / math.sqrt(p.shape[1]))
            if model.config.spiking == "wkv" and name.endswith("attention.value.weight"):
                torch.nn.init.normal_(p, std=30 / math.sqrt(p.shape[1]))
    return model


def batch(model, n=3, dtype=torch.float64, seed=1):
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c.channels, c.image_size, c.image_size, generator=generator, dtype=dtype)
    return x, torch.tensor([0, 10, 999])[:n], torch.tensor([3, 0, c.num_classes])[:n]


def gradients(f, parameters, x, t, y):
    """Return the output and the gradients of x and of the parameters. The upstream gradient is not constant."""
    x = x.clone().requires_grad_()
    out = f(x, t, y)
    g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).sin()
    return out.detach(), torch.autograd.grad(out, (x, *parameters), g)


def assert_close(got, want, tolerance):
    """Compare outputs and gradients, each relative to its largest element."""
    for a, b in zip((got[0], *got[1]), (want[0], *want[1])):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---- golden numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, blocks, multiply_adds",
    [
        ("mnist", 11_667_259, 5, "4.045"),
        ("fashion_mnist", 11_667_259, 5, None),
        ("cifar10_28", 36_052_047, 9, "12.859"),
        ("cifar10", 36_912_747, 9, "16.92"),
    ],
)
def test_parameters_and_multiply_adds_equal_the_golden_numbers(name, parameters, blocks, multiply_adds, monkeypatch):
    # the scan contains no layer that is counted, and its loop over tokens would take most of the time
    monkeypatch.setattr(sdit_kernels.reference, "wkv", lambda w, u, k, v, *_, **__: torch.empty_like(k))
    with torch.device("meta"):
        model = SDiT(PRESETS[name])
        x, t, y = torch.empty(1, 3, *[model.config.image_size] * 2), torch.empty(1), torch.empty(1, dtype=torch.int64)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.blocks) == blocks
    if name == "mnist":
        assert len(model.state_dict()) == 111
    if multiply_adds:
        with energy.count(model) as report, sdit.info._plain_form(model), torch.no_grad():
            assert model(x, t, y).shape == (1, 6, *x.shape[2:])
        total, final = report.macs / 1e9, next(row.macs for row in report.rows if row.layer == "final") / 1e9
        assert f"{total:.{len(multiply_adds.split('.')[1])}f}" == multiply_adds
        without = {"mnist": "4.043", "cifar10_28": "12.857"}.get(name)
        assert without is None or f"{total - final:.3f}" == without


# ---- the research model's equations, with its parameter names --------------------------------------------------------


def research_shapes(C, depth, image, patch, channels, classes, out):
    L = (image // patch) ** 2 + 1
    shapes = {
        "x_embedder.proj.weight": (C, channels, patch, patch), "x_embedder.proj.bias": (C,),
        "t_embedder.mlp.0.weight": (C, 256), "t_embedder.mlp.0.bias": (C,),
        "t_embedder.mlp.2.weight": (C, C), "t_embedder.mlp.2.bias": (C,),
        "y_embedder.embedding_table.weight": (classes + 1, C), "pos_embed": (1, L, C),
        "conv.weight": (out, out, 3, 3), "conv.bias": (out,),
        "final_layer.linear.weight": (patch * patch * out, C), "final_layer.linear.bias": (patch * patch * out,),
    }  # fmt: skip
    for prefix in research_blocks(depth):
        shapes |= {f"{prefix}att.time_mix_{n}": (1, 1, C) for n in "kvr"} | {
            f"{prefix}ffn.time_mix_{n}": (1, 1, C) for n in "kr"
        }
        shapes |= {f"{prefix}att.{n}": (C,) for n in ("time_decay", "time_first")}
        shapes |= {f"{prefix}att.{n}.weight": (C, C) for n in ("key", "value", "receptance", "output")}
        shapes |= {f"{prefix}ffn.key.weight": (4 * C, C), f"{prefix}ffn.receptance.weight": (C, C)}
        shapes |= {f"{prefix}ffn.value.weight": (C, 4 * C), f"{prefix}restruction_token": (1, L, C)}
        shapes |= {f"{prefix}restruction_token_MLP.weight": (L, C), f"{prefix}restruction_token_MLP.bias": (L,)}
        shapes |= {f"{prefix}another_MLP.weight": (C, L), f"{prefix}another_MLP.bias": (C,)}
        if prefix.startswith("out"):
            shapes |= {f"{prefix}skip_linear.weight": (C, 2 * C), f"{prefix}skip_linear.bias": (C,)}
    return shapes


def research_blocks(depth):
    half = range(depth // 2)
    return [*(f"in_blocks.{i}." for i in half), "mid_block.", *(f"out_blocks.{i}." for i in half)]


def research_weights(C=16, depth=4, image=8, patch=2, channels=3, classes=10, out=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, shape in research_shapes(C, depth, image, patch, channels, classes, out).items():
        w = torch.randn(shape, generator=generator, dtype=dtype)
        strong = 4 if name.endswith(("att.output.weight", "ffn.value.weight")) else 1  # so that neurons fire
        if "time_mix" in name:
            w = torch.sigmoid(w)
        elif w.dim() > 1 and "token." not in name:
            w = w * strong / math.sqrt(w[0].numel())
        weights[name] = w.requires_grad_()
    return weights


def research(w, x, t, y, patch=2):
    """Compute the research model from its equations, token by token and step by step, without code of the package."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return (z >= 0).to(z.dtype)

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return g / (1 + (math.pi * z).square())

    def rate(z):
        v, spikes = torch.zeros_like(z), []
        for _ in range(4):
            h = v + (z - v) / 2
            s = Spike.apply(h - 1)
            v = h * (1 - s)
            spikes.append(s)
        return sum(spikes) / 4

    def mixed(x, m):
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return x * w[m] + before * (1 - w[m])

    def attention(x, p):
        k, v = linear(mixed(x, p + "time_mix_k"), p + "key"), linear(mixed(x, p + "time_mix_v"), p + "value")
        r = torch.sigmoid(linear(mixed(x, p + "time_mix_r"), p + "receptance"))
        n = d = torch.zeros_like(k[:, 0])
        out = []
        for i in range(k.shape[1]):  # numbers are small here, so no running maximum is needed
            e = torch.exp(w[p + "time_first"] + k[:, i])
            out.append((n + e * v[:, i]) / (d + e))
            decay, e = torch.exp(-torch.exp(w[p + "time_decay"])), torch.exp(k[:, i])
            n, d = decay * n + e * v[:, i], decay * d + e
        return linear(r * torch.stack(out, 1), p + "output")

    def mlp(x, p):
        k = torch.relu(linear(mixed(x, p + "time_mix_k"), p + "key")) ** 2
        return torch.sigmoid(linear(mixed(x, p + "time_mix_r"), p + "receptance")) * linear(k, p + "value")

    def block(x, p):
        n = x.shape[1]
        x = torch.cat([x, w[p + "restruction_token"].repeat(len(x), 1, 1)], 1)
        x = x + rate(attention(norm(x), p + "att."))
        x = x + rate(mlp(norm(x), p + "ffn."))
        x, r = x[:, :n], x[:, n:]
        return x + x * linear(linear(r, p + "restruction_token_MLP").transpose(1, 2), p + "another_MLP")

    angle = t.to(x.dtype)[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    c = linear(F.silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = c + w["y_embedder.embedding_table.weight"][y]
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    h = torch.cat([c[:, None], tokens], 1) + w["pos_embed"]
    kept, blocks = [], [name for name in w if name.endswith("restruction_token")]
    for name in blocks:
        p = name.removesuffix("restruction_token")
        if p.startswith("out"):
            h = linear(torch.cat([h, kept.pop()], -1), p + "skip_linear")
        h = block(h, p)
        if p.startswith("in"):
            kept.append(h)
    h = linear(norm(h), "final_layer.linear")[:, 1:]
    side, out = x.shape[-1] // patch, w["conv.bias"].numel()
    image = h.reshape(-1, side, side, patch, patch, out)
    image = torch.einsum("nhwpqc->nchpwq", image).reshape(-1, out, side * patch, side * patch)
    return F.conv2d(image, w["conv.weight"], w["conv.bias"], padding=1)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"patch": 4, "channels": 1, "out": 1, "depth": 2, "C": 20}, {"image": 12, "patch": 3, "channels": 1, "out": 2}],
)
def test_research_checkpoints_give_the_research_models_results(sizes):
    w = research_weights(**sizes)
    model = from_research({name: t.detach() for name, t in w.items()})
    c = model.config
    assert (c.dim, c.depth, c.image_size, c.patch_size) == (
        sizes.get("C", 16), sizes.get("depth", 4), sizes.get("image", 8), sizes.get("patch", 2),
    )  # fmt: skip
    assert c.variant == "faithful" and c.out_channels == sizes.get("out", 6)
    inputs = batch(model)
    with model.record() as rates:
        model(*inputs)
    assert all(0.005 < rate < 0.9 for rate in rates.values())
    ours = {sdit.research.research_name(name, c.depth // 2): p for name, p in model.named_parameters()}
    assert list(sorted(ours)) == list(sorted(w))
    got = gradients(model, [ours[name] for name in w], *inputs)
    want = gradients(lambda *a: research(w, *a, patch=c.patch_size), list(w.values()), *inputs)
    got = got[0], [g.reshape(v.shape) for g, v in zip(got[1], want[1])]
    assert_close(got, want, 1e-10)


def test_wrong_research_weights_are_named_in_one_error():
    w = {name: t.detach() for name, t in research_weights().items()}
    w["optimizer"] = w.pop("mid_block.att.key.weight")
    w["conv.bias"] = torch.zeros(5)
    w["in_blocks.0.att.time_first"] = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ValueError) as error:
        from_research(w)
    for part in (
        "missing mid_block.att.key.weight", "unknown optimizer", "conv.bias has shape (5,) where (6,) is wanted",
        "in_blocks.0.att.time_first is torch.int64",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ValueError, match="missing x_embedder.proj.weight; missing pos_embed"):
        from_research({})
    w = research_weights() | {"pos_embed": torch.zeros(1, 19, 16)}
    with pytest.raises(ValueError, match="19 tokens, not a square number"):
        from_research(w)
    with pytest.raises(TypeError, match="must be a dict"):
        from_research([1])
    missing = {name: t for name, t in research_weights().items() if not name.startswith("out_blocks.1.")}
    with pytest.raises(ValueError, match="missing out_blocks.1.restruction_token"):
        from_research(missing)


def test_research_files_are_read_or_refused(tmp_path):
    w = {name: t.detach().float() for name, t in research_weights(depth=2).items()}
    torch.save({"model": w, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pt")
    model = load_research(tmp_path / "a.pt")
    assert torch.equal(model.final.weight, w["final_layer.linear.weight"]) and model.final.weight.requires_grad
    torch.save(w, tmp_path / "b.pt")
    with pytest.raises(ValueError, match='b.pt must hold {"model": state dict'):
        load_research(tmp_path / "b.pt")
    torch.save({"model": {k: v for k, v in w.items() if k != "conv.bias"}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: .*missing conv.bias"):
        load_research(tmp_path / "c.pt")
    torch.save({"model": w, "extra": doctest.DocTestParser()}, tmp_path / "d.pt")  # would run code when unpickled
    (tmp_path / "e.pt").write_bytes(b"no checkpoint")
    (tmp_path / "f.pt").write_bytes(b"")
    for name in "def":
        with pytest.raises(ValueError, match=f"{name}.pt is not a checkpoint"):
            load_research(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError):
        load_research(tmp_path / "none.pt")


# ---- the plain form and the fused form -------------------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "faithful": {"variant": "faithful", "depth": 2},
    "no reconstruction": {"reconstruction": False, "depth": 2},
    "bidirectional": {"bidirectional": True, "depth": 2},
    "spiking wkv": {"spiking": "wkv", "depth": 2},
    "spiking wkv, no reconstruction": {"spiking": "wkv", "reconstruction": False, "depth": 1, "channels": 3},
    "scan four, every token": {"scan": "four", "condition": "every", "reconstruction": False},
    "scan four, every token, reconstruction": {"scan": "four", "condition": "every"},
    "other neuron": {"T": 6, "tau": 3.0, "v_threshold": 0.7, "alpha": 3.0, "depth": 2},
    "other image": {"image_size": 15, "patch_size": 5, "channels": 3, "learn_sigma": False, "depth": 3},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_plain_form_equals_the_fused_form(option):
    model = build(**OPTIONS[option])
    inputs, parameters = batch(model), list(model.parameters())
    got = gradients(model, parameters, *inputs)
    assert all(g.abs().max() > 0 for g in got[1])
    with model.record() as rates:
        model(*inputs)
    assert all(0.005 < rate < 0.9 for rate in rates.values())
    model.plain = True
    with sdit_kernels.backend("reference"):
        want = gradients(model, parameters, *inputs)
    assert_close(got, want, 1e-10)
    assert_close(gradients(model, parameters, *inputs), want, 1e-10)  # the plain form with the CPU kernels
    model.plain = False
    with sdit_kernels.backend("reference"):
        assert_close(gradients(model, parameters, *inputs), want, 1e-10)
    with model.frozen(), torch.no_grad():
        for _ in range(2):
            assert (model(*inputs) - want[0]).abs().max() <= 1e-10 * want[0].abs().max()


def changed_patches(model, patch):
    """Return the patches of the output that change when one patch of the image changes."""
    P, (x, t, y) = model.config.patch_size, batch(model, n=1)
    side = model.config.image_size // P
    row, column = divmod(patch, side)
    other = x.clone()
    other[..., row * P : (row + 1) * P, column * P : (column + 1) * P] += 1
    with torch.no_grad():
        model.smooth = torch.nn.Identity()  # the final convolution would mix neighbouring patches
        change = (model(x, t, y) - model(other, t, y))[0].abs().amax(0)
    return set(change.unfold(0, P, P).unfold(1, P, P).amax((-2, -1)).flatten().nonzero().flatten().tolist())


class Pass(torch.nn.Module):
    frozen = None

    def forward(self, x, kept=None):
        return x


@pytest.mark.parametrize("spiking", ["rate", "wkv"])
@pytest.mark.parametrize("block", range(5))
def test_a_block_sees_the_patches_before_in_its_scan(block, spiking):
    """A changed patch changes itself and only later patches in the order of the block's scan."""
    grid = torch.arange(9).view(3, 3)
    four = [grid.flatten(), grid.flatten().flip(0), grid.t().flatten(), grid.t().flatten().flip(0)]
    for scan, order in (("rows", four[0]), ("four", four[block % 4])):
        model = build(scan=scan, image_size=6, reconstruction=False, spiking=spiking)
        for i in set(range(5)) - {block}:
            model.blocks[i] = Pass()
        for patch in (0, 5, 7):
            place = order.tolist().index(patch)
            found = changed_patches(model, patch)
            assert {patch} <= found <= set(order[place:].tolist())
            assert len(found) >= min(9 - place, 2)


def test_with_four_scans_every_patch_sees_all_others():
    for scan, shown in (("rows", set(range(15, 16))), ("four", set(range(16)))):
        assert changed_patches(build(scan=scan, reconstruction=False), 15) == shown


def test_a_checkpoint_keeps_its_scan_and_condition(tmp_path):
    model = build(torch.float32, scan="four", condition="every", prediction="v").eval()
    sdit.checkpoint.save_model(tmp_path / "a.safetensors", model)
    loaded = sdit.checkpoint.load_model(tmp_path / "a.safetensors")
    inputs = batch(model, dtype=torch.float32)
    assert loaded.config == model.config and torch.equal(loaded(*inputs), model(*inputs))
    old = {k: v for k, v in SMALL.to_dict().items() if k not in ("prediction", "weighting", "times", "condition", "scan")}
    assert Config.from_dict(old) == SMALL  # a checkpoint from before these fields existed


def test_a_condition_on_every_token_equals_a_bias_of_the_patches():
    model = build(condition="every", reconstruction=False)
    x, t, y = batch(model, n=1)
    got = model(x, t, y)
    first = build(condition="first", reconstruction=False)
    first.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("condition_to_patches.")})
    assert not torch.allclose(first(x, t, y), got)
    with torch.no_grad():
        c = first.time(sdit.model._sinusoid(t, x.dtype)) + first.labels(y)
        first.patches.bias += model.condition_to_patches(F.layer_norm(c, (24,), eps=sdit.model.EPS))[0]
    torch.testing.assert_close(first(x, t, y), got, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("option", ["default", "no reconstruction", "bidirectional", "spiking wkv"])
def test_blocks_equal_the_plain_form_in_float32(option):
    model = build(torch.float32, seed=3, **OPTIONS[option])
    inputs, currents = [], []
    hooks = [b.register_forward_pre_hook(lambda block, args: inputs.append((block, args))) for b in model.blocks]
    hooks += [
        m.register_forward_pre_hook(lambda _, args: currents.append(args))
        for m in model.modules()
        if isinstance(m, RecordedRate)
    ]
    model(*batch(model, dtype=torch.float32))
    for hook in hooks:
        hook.remove()
    for z in (x if gate is None else torch.sigmoid(gate) * x for x, _, gate in currents):
        assert min((z - threshold).abs().min() for threshold in THRESHOLDS) > 2e-6, "the seed puts a neuron at its threshold"
    for block, args in inputs:
        args = [a.detach().requires_grad_() for a in args]
        parameters = list(block.parameters())
        out = block(*args)
        g = torch.randn_like(out)
        got = torch.autograd.grad(out, (*args, *parameters), g)
        model.plain = True
        with sdit_kernels.backend("reference"):
            want = block(*args)
        model.plain = False
        assert (out - want).abs().max() <= 1e-5 * want.abs().max()
        for a, b in zip(got, torch.autograd.grad(want, (*args, *parameters), g)):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_backend_does_not_change_the_form():
    model, rows = build(torch.float32, depth=1), []
    model.blocks[0].attention.key.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for plain, calls in ((False, [3, 3, 1]), (True, [3])):
        model.plain = plain
        for name in ("cpu", "reference"):
            rows.clear()
            with sdit_kernels.backend(name):
                model(*batch(model, dtype=torch.float32))
            assert rows == calls and model.plain is plain


def test_values_shared_by_the_batch_are_computed_once(monkeypatch):
    model = build(torch.float32, depth=2)
    rows, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: (rows.append((x.shape, w.shape)), linear(x, w, b))[1])
    C, L, B = 24, 17, 3

    def rows_of_projections():
        """Return the number of rows of every matrix multiplication with a (C, C) weight, over all three blocks."""
        return [math.prod(x[:-1]) for x, w in rows if w == (C, C)]

    inputs = batch(model, B, torch.float32)
    model(*inputs)
    per_block = [B * L] * 3 + [B] * 3 + [L - 1] * 3 + [B * L] * 2 + [B * L] * 2  # k, v, r of image, first, rest; output; gates
    assert sorted(rows_of_projections()) == sorted(
        per_block * 3 + [B, B * L]
    )  # and the second Linear of the time, and a half of skip
    with model.frozen(), torch.no_grad():
        model(*inputs)
        rows.clear()
        model(*inputs)
    assert L - 1 not in rows_of_projections() and len(rows_of_projections()) == 3 * 10 + 2


def test_the_spiking_output_matrix_of_the_plain_form_sees_spikes():
    model = build(spiking="wkv", depth=1)
    seen = []
    model.blocks[0].attention.output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for module in ("key", "value", "receptance"):
        getattr(model.blocks[0].attention, module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.plain = True
    model(*batch(model))
    assert len(seen) == 4 and all(s.shape == (4, 3, 34, 24) and ((s == 0) | (s == 1)).all() for s in seen)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["default", "spiking wkv", "bidirectional"])
def test_the_model_compiles_to_one_graph(option):
    model = build(torch.float32, **OPTIONS[option] | {"depth": 2})
    inputs, parameters = batch(model, dtype=torch.float32), list(model.parameters())
    want = gradients(model, parameters, *inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, parameters, *inputs), want, 1e-5)


@pytest.mark.parametrize("option", ["default", "spiking wkv", "bidirectional", "no reconstruction"])
def test_bf16_autocast_runs_fused(option, monkeypatch):
    model = build(torch.float32, **OPTIONS[option])
    inputs = batch(model, dtype=torch.float32)
    for p in model.parameters():  # other rounding can change spikes, so prevent spikes
        p.data.mul_(0.2 if p.dim() == 2 and option != "spiking wkv" else 1)
    want = model(*inputs)
    monkeypatch.setattr(sdit_kernels.reference, "wkv", None)
    seen = []
    for block in model.blocks:
        block.attention.output.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*inputs)
        with model.frozen(), torch.no_grad():
            assert torch.equal(model(*inputs), out)
    assert out.dtype == torch.float32 and set(seen) == {torch.bfloat16}
    assert (out - want).norm() < (0.5 if option == "spiking wkv" else 0.02) * want.norm()
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_only_memory():
    model = build(torch.float32)
    inputs, parameters = batch(model, dtype=torch.float32), list(model.parameters())
    want, kept = gradients(model, parameters, *inputs), sdit.info._saved_bytes(model, inputs)
    model.checkpointing = True
    got = gradients(model, parameters, *inputs)
    assert all(torch.equal(a, b) for a, b in zip((got[0], *got[1]), (want[0], *want[1])))
    assert sdit.info._saved_bytes(model, inputs) < kept / 4


@pytest.mark.parametrize("spiking", ["rate", "wkv"])
@pytest.mark.parametrize("settings", [{"T": 8}, {"tau": 1.5}, {"v_threshold": 0.5}])
def test_neurons_may_be_changed_for_sampling(settings, spiking):
    model = build(depth=2, spiking=spiking)
    other = SDiT(model.config, **settings).double()
    other.load_state_dict(model.state_dict())
    inputs = batch(model)
    with torch.no_grad():
        before, want = model(*inputs), other(*inputs)
        for module in model.modules():
            if isinstance(module, RecordedRate):
                for name, value in settings.items():
                    setattr(module, name, value)
        with model.frozen():
            assert torch.equal(model(*inputs), want) and not torch.equal(before, want)


def test_frozen_keeps_values_and_notices_changes():
    model = build(torch.float32, depth=1, spiking="wkv")
    inputs = batch(model, dtype=torch.float32)
    with model.frozen():
        with pytest.raises(RuntimeError, match="under torch.no_grad"):
            model(*inputs)
        with torch.no_grad():
            first = model(*inputs)
            for p in model.parameters():
                p.mul_(1.5)
            with model.frozen():  # an inner frozen block keeps its own values
                inner = model(*inputs)
            assert not torch.equal(inner, first)
            model.blocks[0].attention.neuron.v_threshold = 0.9  # the saved values belong to another threshold
            changed = model(*inputs)
    with torch.no_grad():
        assert torch.equal(model(*inputs), changed)
    model(*inputs).sum().backward()


def test_recorded_rates_equal_those_of_the_neurons():
    model = build(torch.float32, depth=1)
    inputs = batch(model, dtype=torch.float32)
    seen = []
    model.blocks[0].mlp.neuron.register_forward_pre_hook(lambda _, args: seen.append(torch.sigmoid(args[2]) * args[0]))
    with model.record() as rates:
        model(*inputs)
        model(*inputs)
    assert list(rates) == ["blocks.0.attention", "blocks.0.mlp"]
    z = torch.cat([z.flatten() for z in seen])
    staircase = sum(step * (z >= at) for step, at in zip((0.25, 0.25, 0.5), THRESHOLDS))
    assert isinstance(rates["blocks.0.mlp"], torch.Tensor)
    assert rates["blocks.0.mlp"] == pytest.approx(staircase.mean().item(), rel=1e-6)
    before = dict(rates)
    model(*inputs)
    assert rates == before and model.blocks[0].mlp.neuron.recorder is None
    spiking = build(torch.float32, depth=1, spiking="wkv")
    with spiking.record() as rates:
        spiking(*batch(spiking, dtype=torch.float32))
    assert list(rates) == [f"blocks.0.attention.{n}" for n in ("key", "value", "receptance", "output")] + ["blocks.0.mlp"]


# ---- initial values --------------------------------------------------------------------------------------------------


def test_faithful_initial_values_have_the_documented_sizes():
    torch.manual_seed(0)
    model = SDiT(PRESETS["mnist"], dim=64, depth=6)
    C, depth = 64, 6
    c = torch.arange(C, dtype=torch.float64)
    for block, i in zip(model.blocks, [0, 1, 2, 3, 0, 1, 2]):
        a, b = i / (depth - 1), 1 - i / depth
        att, mlp = block.attention, block.mlp
        for got, want in (
            (att.time_decay, -5 + 8 * (c / (C - 1)) ** (0.7 + 1.3 * a)),
            (att.time_first, math.log(0.3) + 0.5 * ((c + 1) % 3 - 1)),
            (att.time_mix_k, (c / C) ** b),
            (att.time_mix_v, (c / C) ** b + 0.3 * a),
            (att.time_mix_r, (c / C) ** (b / 2)),
            (mlp.time_mix_k, (c / C) ** b),
            (mlp.time_mix_r, (c / C) ** b),
        ):
            assert torch.allclose(got.flatten().double(), want, atol=1e-6)
        for linear in (att.key, att.value, att.receptance, att.output, mlp.key, mlp.receptance, mlp.value):
            bound = linear.in_features**-0.5
            assert 0.97 * bound < linear.weight.abs().max() <= bound
        for linear in (block.tokens_in, block.tokens_out, *([block.skip] if block.skip else [])):
            bound = math.sqrt(6 / sum(linear.weight.shape))
            assert 0.97 * bound < linear.weight.abs().max() <= bound and (linear.bias == 0).all()
        assert (block.reconstruction == 1).all()
    assert (model.position == 0).all() and (model.final.weight == 0).all() and (model.final.bias == 0).all()
    for linear in (model.time[0], model.time[2], model.labels):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.patches.weight.abs().max() <= math.sqrt(6 / (64 + 12)) and (model.patches.bias == 0).all()
    assert model.smooth.bias.abs().max() > 0


@pytest.mark.parametrize("name, spiking", [("digits", "rate"), ("digits", "wkv"), ("fashion_tiny", "rate")])
def test_improved_initial_values_close_gates_and_let_neurons_fire(name, spiking):
    torch.manual_seed(0)
    model = SDiT(PRESETS[name], spiking=spiking)
    c = model.config
    x = torch.randn(16, c.channels, c.image_size, c.image_size)
    t, y = torch.randint(0, 1000, (16,)), torch.randint(0, 10, (16,))
    gates = []
    gated = [block.tokens_out for block in model.blocks if c.reconstruction]
    hooks = [layer.register_forward_hook(lambda *args: gates.append(args[2])) for layer in gated]
    with torch.no_grad(), model.record() as rates:
        assert (model(x, t, y) == 0).all()
    for hook in hooks:
        hook.remove()
    assert len(gates) == len(gated) and all((gate == 0).all() for gate in gates)  # every gate is closed
    assert all(0.005 < rate < 0.5 for rate in rates.values()), rates  # and every layer fires
    assert [block.attention.layer for block in model.blocks] == list(range(2 * (c.depth // 2) + 1))
    torch.nn.init.normal_(model.final.weight)
    loss = model(x, t, y).square().mean()
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None
    )


@pytest.mark.slow
def test_both_kinds_of_spikes_learn_digits():
    from sdit import data
    from sdit.diffusion import training_loss

    images = data.load("digits")
    for spiking in ("rate", "wkv"):
        torch.manual_seed(0)
        model = SDiT(PRESETS["digits"], dim=32, depth=2, spiking=spiking)
        x, y = data.to_batch(images.images[:512], model.config), torch.as_tensor(images.labels[:512])
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(50):
            chosen = torch.randint(0, 512, (32,), generator=generator)
            found = training_loss(model, x[chosen], y[chosen], generator)
            optimizer.zero_grad()
            found["loss"].backward()
            optimizer.step()
            losses.append(found["mse"].item())
        assert sum(losses[-10:]) / 10 < 0.35 < 0.8 < losses[0], spiking
    costs = info(model, (x[:4], torch.tensor([0, 100, 500, 999]), y[:4]))
    assert len(costs.synaptic_operations) == 3 * 4 and all(n > 0 for n in costs.synaptic_operations.values())


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_info_counts_parameters_and_multiply_adds():
    model = SDiT(SMALL, depth=2)
    found = info(model, batch(model, dtype=torch.float32))
    C, L = 24, 17
    tokens = C * L * 2 * L
    want = {
        "time": 256 * C + C * C, "patches": (L - 1) * 4 * C, "blocks: attention": 3 * 4 * C * C * 2 * L,
        "blocks: mlp": 3 * 9 * C * C * 2 * L, "blocks: tokens": 3 * tokens, "blocks: skip": 2 * C * C * L,
        "final": (L - 1) * C * 8, "smooth": 2 * 2 * 9 * 64,
    }  # fmt: skip
    assert found.multiply_adds == want and found.parameters == sum(p.numel() for p in model.parameters())
    # keys, values and receptances of three blocks are computed once instead of three times
    shared = 3 * 3 * C * C * (L - 1) * 2 / 3
    assert found.total - found.computed_multiply_adds == pytest.approx(shared, abs=1)
    assert found.saved_bytes < found.plain_saved_bytes / 2
    assert set(found.rates) == {f"blocks.{i}.{n}" for i in range(3) for n in ("attention", "mlp")}
    assert (
        not found.synaptic_operations
        and found.energy["mac"] == pytest.approx(found.energy["arithmetic"]) == found.total * 4.6e-9
    )
    text = str(found)
    assert "0 synaptic operations" in text and "MAC, million" in text and "AC, million" in text
    assert found.neurons == 6 * C and set(found.silent) == set(found.rates)


def test_info_counts_silent_neurons():
    """A neuron is silent if its current is never above 0. The test sets the weights and bias of three neurons to 0."""
    torch.manual_seed(0)
    model = SDiT(SMALL, depth=2)
    inputs, last, fired = batch(model, dtype=torch.float32), model.blocks[1].mlp.value, {}
    with torch.no_grad(), model.record(fired):
        model(*inputs)
    before = fired["blocks.1.mlp"]
    assert info(model, inputs).silent["blocks.1.mlp"] == (~before).sum() and before[5:8].any()
    with torch.no_grad():
        for p in last.parameters():
            p[5:8] = 0
    found = info(model, inputs)
    assert found.silent["blocks.1.mlp"] == (~before).sum() + before[5:8].sum()
    assert f"{sum(found.silent.values())} of 144 neurons fire nowhere" in str(found)


def test_info_counts_synaptic_operations_of_spikes():
    model = build(torch.float32, spiking="wkv", depth=1)
    found = info(model, batch(model, dtype=torch.float32))
    per_matrix = 4 * 24 * 24 * 34
    assert found.spiking_multiply_adds == 4 * per_matrix == found.multiply_adds["blocks: attention"]
    for part in ("key", "value", "receptance", "output"):
        name = f"blocks.0.attention.{part}"
        assert found.synaptic_operations[name] == pytest.approx(found.rates[name] * per_matrix)
    spikes = sum(found.synaptic_operations.values())
    assert found.energy["arithmetic"] == pytest.approx(((found.total - 4 * per_matrix) * 4.6 + spikes * 0.9) * 1e-9)
    assert "0 synaptic operations:" not in str(found) and "4 of " in str(found).splitlines()[-1]
    assert set(found.energy) == {"mac", "arithmetic", "with_memory", "quantised"}
    assert {row.layer for row in found.report.rows if row.on_spikes} == set(found.synaptic_operations)


# ---- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 24.0}, TypeError, "dim must be an int, got 24.0"),
        ({"depth": True}, TypeError, "depth must be an int, got True"),
        ({"patch_size": 3}, ValueError, "image_size must be a multiple of patch_size, 3, got 8"),
        ({"T": 0}, ValueError, "T must be at least 1"),
        ({"tau": 0.5}, ValueError, "tau must be at least 1"),
        ({"tau": "2"}, TypeError, "tau must be a number"),
        ({"v_threshold": math.inf}, ValueError, "v_threshold must be finite"),
        ({"alpha": 0}, ValueError, "alpha must be positive"),
        ({"dropout_label": 1.0}, ValueError, "dropout_label must be a probability below 1"),
        ({"learn_sigma": 1}, TypeError, "learn_sigma must be true or false"),
        ({"spiking": "lif"}, ValueError, "spiking must be 'rate' or 'wkv' or 'pure', got 'lif'"),
        ({"variant": ""}, ValueError, "variant must be 'improved' or 'faithful'"),
        ({"spiking": "wkv", "bidirectional": True}, ValueError, "bidirectional must be false"),
        ({"condition": "all"}, ValueError, "condition must be 'first' or 'every', got 'all'"),
        ({"scan": "columns"}, ValueError, "scan must be 'rows' or 'four', got 'columns'"),
        ({"prediction": "x0"}, ValueError, "prediction must be 'epsilon' or 'v' or 'flow', got 'x0'"),
        ({"weighting": "snr"}, ValueError, "weighting must be 'uniform' or 'min_snr', got 'snr'"),
        ({"times": "normal"}, ValueError, "times must be 'uniform' or 'logit_normal', got 'normal'"),
        ({"prediction": "flow"}, ValueError, "learn_sigma must be false with prediction='flow'"),
        ({"dataset": 3}, TypeError, "dataset must be a name or None"),
        ({"width": 3}, TypeError, "a Config does not have the fields width"),
    ],
)
def test_wrong_fields_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        SDiT(SMALL, **fields)


def test_a_config_converts_from_and_to_a_dict():
    for config in PRESETS.values():
        assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown fields of a Config: width"):
        Config.from_dict(SMALL.to_dict() | {"width": 3})
    with pytest.raises(ValueError, match="a Config needs dim, depth, num_classes"):
        Config.from_dict({"image_size": 8, "channels": 1, "patch_size": 2})
    with pytest.raises(TypeError, match="values must be a dict"):
        Config.from_dict([])
    with pytest.raises(TypeError, match="config must be a Config"):
        SDiT("digits")


def test_wrong_inputs_are_refused():
    model = build(torch.float32, depth=1)
    x, t, y = batch(model, dtype=torch.float32)
    for args, error, message in (
        ((x[:, :, :7], t, y), ValueError, r"x must have shape \(B, 1, 8, 8\), B > 0, got \(3, 1, 7, 8\)"),
        ((x[:0], t[:0], y[:0]), ValueError, r"B > 0, got \(0, 1, 8, 8\)"),
        ((x.long(), t, y), TypeError, "x must be a floating tensor, got torch.int64"),
        ((x, 3, y), TypeError, "t must be a tensor, got int"),
        ((x, t[:2], y), ValueError, r"t must have shape \(3,\), one per image, got \(2,\)"),
        ((x, t, y.float()), TypeError, "y must be labels, int64 or int32, got torch.float32"),
        ((x, t, y + 1), ValueError, "y must be labels 0 .. 10, the last the null label, got 1 .. 11"),
    ):
        with pytest.raises(error, match=message):
            model(*args)


@pytest.mark.parametrize(
    "module", [sdit.config, sdit.model, sdit.info, sdit.checkpoint, sdit.research], ids=lambda m: m.__name__
)
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
