"""SDiT in spikes alone: every product sees spikes, spike by spike gives the integer pass, and an oracle from the equations."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import sdit_kernels
from sdit import PRESETS, Config, SDiT
from sdit.checkpoint import load_model, save_model
from sdit.diffusion import draw, training_loss
from sdit.info import info
from sdit.pure import BitPlanes, SpikeLinear, Spikes, TimeTable, slots_of
from sdit.sample import sample
from sdit_kernels import energy

SMALL = Config(
    8, 1, 2, dim=24, depth=4, num_classes=10, spiking="pure", reconstruction=False, condition="every", scan="four",
    learn_sigma=False, prediction="v",
)  # fmt: skip


@pytest.fixture(autouse=True)
def numba_kernels():
    with sdit_kernels.backend("cpu"):
        yield


def build(dtype=torch.float64, **overrides):
    """Build a small model in which no parameter is 0."""
    torch.manual_seed(0)
    model = SDiT(SMALL, **overrides).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(model, n=4, seed=1):
    c, dtype = model.config, model.position.dtype
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c.channels, c.image_size, c.image_size, generator=g, dtype=dtype)
    return x, torch.randint(1000, (n,), generator=g), torch.randint(c.num_classes + 1, (n,), generator=g)


# ---- every product sees spikes -----------------------------------------------------------------------------------------


def two_batches(model):
    with energy.count(model) as report:
        for seed in (1, 2):
            model(*batch(model, seed=seed))
    return report


@pytest.mark.parametrize("form", ["fast", "plain", "slots", "training", "bf16"])
def test_every_product_sees_spikes(form):
    model = build(torch.float32)
    model.plain, model.slots = form == "plain", form == "slots"
    model.train(form == "training")
    with torch.set_grad_enabled(form == "training"), torch.autocast("cpu", torch.bfloat16, enabled=form == "bf16"):
        report = two_batches(model)
    linears = [m for m in model.modules() if isinstance(m, (SpikeLinear, BitPlanes))]
    assert report.products_on_spikes == report.products == len(linears) == 40
    assert report.macs_on_floats == report.macs_on_zeros == 0 and not report.unknown
    kinds = {next(operand.kind for operand in row.inputs if operand.kind != "weights") for row in report.rows}
    assert kinds <= ({"binary", "signed"} if form == "slots" else {"binary", "signed", "levels"})


def test_slots_count_the_same_synaptic_operations():
    model = build()
    with torch.no_grad():
        levels = two_batches(model)
        model.slots = True
        slots = two_batches(model)
    assert {r.layer: r.synaptic_operations for r in slots.rows} == {r.layer: r.synaptic_operations for r in levels.rows}
    patches, *others = (row.macs for row in levels.rows)
    assert slots.macs == patches + 4 * sum(others)


def test_info_shows_it():
    model = build(torch.float32)
    found = info(model, batch(model))
    assert "40 of 40 products see spikes" in str(found)
    assert found.spiking_multiply_adds == found.total and sum(found.synaptic_operations.values()) > 0
    assert found.energy["arithmetic"] < found.energy["mac"] / 2
    assert all(0.1 < rate < 0.95 for rate in found.rates.values())


# ---- spike by spike ------------------------------------------------------------------------------------------------------


def test_slots_are_single_spikes():
    s = torch.arange(-4.0, 5.0)
    slots = slots_of(s, 4)
    assert slots.abs().max() == 1 and torch.equal(slots.sum(0), s) and torch.equal(slots.abs().sum(0), s.abs())
    assert slots_of(torch.tensor([torch.nan]), 4).isnan().all()


def test_spike_by_spike_equals_the_integer_pass_bit_for_bit():
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 2**20).round() / 2**20)  # sums of these are exact in float64
        wanted = model(*batch(model))
        model.slots = True
        found = model(*batch(model))
    assert torch.equal(found, wanted) and wanted.std() > 0.1


def run_layers(model, inputs):
    """Run the model, each mixing layer on its entry in ``inputs``, if any. Return ({layer: input}, {neuron: (z, levels)})."""
    given, fired, handles = {}, {}, []

    def before(name):
        def hook(module, args):
            given[name] = args
            return inputs.get(name)

        return hook

    def after(name):
        return lambda module, args, s: fired.update({name: (module.normalise(args[0]), s)})

    for name, module in model.named_modules():
        if name.endswith((".attention", ".mlp")):
            handles.append(module.register_forward_pre_hook(before(name)))
        if isinstance(module, Spikes):
            handles.append(module.register_forward_hook(after(name)))
    with torch.no_grad():
        model(*batch(model))
    for handle in handles:
        handle.remove()
    return given, fired


@pytest.mark.parametrize("form", ["slots", "plain"])
def test_float32_levels_are_equal_away_from_the_rounding_points(form):
    model = build(torch.float32, dim=96)
    inputs, wanted = run_layers(model, {})
    setattr(model, form, True)
    _, found = run_layers(model, inputs)
    compared = 0
    for name, (z, levels) in wanted.items():
        if ".attention." in name or ".mlp." in name:
            away = (z - z.floor() - 0.5).abs() > 1e-4
            assert torch.equal(found[name][1][away], levels[away]), name
            compared += int(away.sum())
    assert compared > 80_000


# ---- the equations -------------------------------------------------------------------------------------------------------


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, lo, hi):
        ctx.save_for_backward((z >= lo) & (z <= hi))
        return z.clamp(lo, hi).round()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None


def oracle(w, config, x, t, y):
    """Compute the model from its equations, token by token, without code of the package. w: {name: parameter}."""
    n, side, P = config.levels, config.image_size // config.patch_size, config.patch_size

    def spikes(x, name, lo=-n):
        theta = w[name + ".log_factor"].exp() * (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return Round.apply(x / theta, lo, n)

    def linear(s, name):
        return s @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def shift(s):
        half = s.shape[-1] // 2
        before = torch.cat([torch.zeros_like(s[:, :1]), s[:, :-1]], 1)
        return torch.cat([before[..., :half], s[..., half:]], -1)

    def time_mix(x, p):
        s = shift(spikes(x, p + "neuron"))
        k, v, r = (linear(s, p + name) for name in ("key", "value", "receptance"))
        num = den = torch.zeros_like(k[:, 0])
        out = []
        for i in range(k.shape[1]):
            e = torch.exp(w[p + "time_first"] + k[:, i])
            out.append((num + e * v[:, i]) / (den + e))
            decay, e = torch.exp(-torch.exp(w[p + "time_decay"])), torch.exp(k[:, i])
            num, den = decay * num + e * v[:, i], decay * den + e
        return x + linear(spikes(torch.sigmoid(r) * torch.stack(out, 1), p + "gated_neuron"), p + "output")

    def channel_mix(x, p):
        s = shift(spikes(x, p + "neuron"))
        hidden = spikes(linear(s, p + "key"), p + "hidden_neuron", 0)
        return x + torch.sigmoid(linear(s, p + "receptance")) * linear(hidden, p + "value")

    def order(i):
        grid = torch.arange(side * side).reshape(side, side)
        grid = grid.T if i % 4 > 1 else grid
        flat = grid.flatten()
        return torch.cat([torch.zeros(1, dtype=torch.int64), 1 + (flat.flip(0) if i % 2 else flat)])

    time, at = w["time.weight"], t / 8
    row = at.floor().long().clamp(max=len(time) - 2)
    share = (at - row).unsqueeze(1)
    c = time[row] * (1 - share) + time[row + 1] * share + w["labels.weight"][y]
    step = 4 / 2**config.planes
    q = (x / step).round().clamp(1 - 2**config.planes, 2**config.planes - 1) * step
    q = torch.stack([  # patches row by row, a patch as (row, column): one channel
        q[:, 0, P * i : P * i + P, P * j : P * j + P].flatten(1) for i in range(side) for j in range(side)
    ], 1)  # fmt: skip
    patches = linear(q, "patches") + linear(spikes(c, "condition_neuron"), "condition_to_patches").unsqueeze(1)
    x = torch.cat([c.unsqueeze(1), patches], 1) + w["position"]
    kept, half = [], config.depth // 2
    for i in range(2 * half + 1):
        p, to = f"blocks.{i}.", order(i)
        x = x[:, to]
        if i > half:
            both = spikes(x, p + "skip_neurons.0"), spikes(kept.pop()[:, to], p + "skip_neurons.1")
            x = linear(torch.cat(both, -1), p + "skip")
        x = channel_mix(time_mix(x, p + "attention."), p + "mlp.")
        x = x[:, to.argsort()]
        if i < half:
            kept.append(x)
    x = linear(spikes(x[:, 1:], "final_neuron"), "final")
    return x.reshape(-1, side, side, P, P).transpose(2, 3).reshape(-1, 1, side * P, side * P)


@pytest.mark.parametrize("plain", [False, True])
def test_outputs_and_gradients_equal_the_equations(plain):
    model = build(image_size=12)
    names, parameters = zip(*model.named_parameters())
    arguments = batch(model)
    model.plain = plain
    found = model(*arguments)
    wanted = oracle(dict(zip(names, parameters)), model.config, *arguments)
    g = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted).sin()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    pairs = zip(names, torch.autograd.grad(found, parameters, g), torch.autograd.grad(wanted, parameters, g))
    for name, got, want in pairs:
        assert want.abs().max() > 0, name
        assert (got - want).abs().max() <= 1e-8 * want.abs().max(), name


@pytest.mark.parametrize("planes", [8, 10, 12])
def test_bit_planes_are_a_linear_layer_of_rounded_pixels(planes):
    layer = BitPlanes(16, 5, planes).double()
    x = 6 * torch.randn(3, 7, 16, dtype=torch.float64)
    step = 4 / 2**planes
    rounded = ((x / step).round() * step).clamp(step - 4, 4 - step)
    for layer.plain in (False, True):
        torch.testing.assert_close(layer(x), F.linear(rounded, layer.weight, layer.bias), rtol=1e-12, atol=1e-12)


def test_bit_planes_keep_nan_and_limit_infinity():
    layer = BitPlanes(2, 3, 10)
    assert layer(torch.tensor([math.nan, 0.0])).isnan().all()
    torch.testing.assert_close(layer(torch.tensor([math.inf, -math.inf])), layer(torch.tensor([4.0, -9.0])))


def test_the_table_of_times_interpolates():
    table = TimeTable(3).double()
    times = torch.tensor([0, 3, 8, 999, 1000, 12.5])
    rows = torch.stack([
        table.weight[0], table.weight[0].lerp(table.weight[1], 3 / 8), table.weight[1],
        table.weight[124].lerp(table.weight[125], 7 / 8), table.weight[125], table.weight[1].lerp(table.weight[2], 4.5 / 8),
    ])  # fmt: skip
    torch.testing.assert_close(table(times), rows)


# ---- in use --------------------------------------------------------------------------------------------------------------


def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    model = SDiT(PRESETS["digits"], spiking="pure", reconstruction=False, v_threshold=1.0, condition="every", dim=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x0, y, g = torch.randn(8, 1, 8, 8).sign().repeat(4, 1, 1, 1), torch.arange(8).repeat(4), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        t, noise, drop = draw(model.config, 32, g)
        losses.append(training_loss(model, x0, y, t=t, noise=noise, drop=drop)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_checkpoints_samples_and_firing_rates(tmp_path):
    model = build(torch.float32).eval()
    save_model(tmp_path / "pure.safetensors", model)
    loaded = load_model(tmp_path / "pure.safetensors")
    assert loaded.config == model.config
    images = sample(model, [3, 1, 10], sampler="dpm++", steps=3, guidance=1.5)
    assert torch.equal(sample(loaded, [3, 1, 10], sampler="dpm++", steps=3, guidance=1.5), images)
    fired = {}
    with model.record(fired) as rates, torch.no_grad():
        model(*batch(model))
    assert list(rates)[:3] == ["condition_neuron", "blocks.0.attention", "blocks.0.attention.gated_neuron"]
    assert rates.keys() == fired.keys() and len(rates) == sum(isinstance(m, Spikes) for m in model.modules())


def test_checkpointing_gives_the_same_gradients():
    model = build()
    found = []
    for model.checkpointing in (False, True):
        found.append(torch.autograd.grad(model(*batch(model)).square().sum(), list(model.parameters())))
    assert all(map(torch.equal, *found))


def test_the_preset_has_the_size_of_fashion_tiny():
    pure, tiny = (sum(p.numel() for p in SDiT(PRESETS[f"fashion_{name}"]).parameters()) for name in ("pure", "tiny"))
    assert 0.95 < pure / tiny < 1.05


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reconstruction": True}, "reconstruction must be false with spiking='pure'"),
        ({"variant": "faithful"}, "variant must be 'improved' with spiking='pure', got 'faithful'"),
        ({"T": 8}, "T does not apply to spiking='pure': it must be 4, got 8"),
        ({"v_threshold": 0.5}, "v_threshold does not apply to spiking='pure': it must be 1.0, got 0.5"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"levels": 65}, "levels must be at most 64, got 65"),
        ({"planes": 17}, "planes must be at most 16, got 17"),
        ({"spiking": "rate", "levels": 2}, "levels does not apply to spiking='rate': it must be 4, got 2"),
        ({"spiking": "wkv", "planes": 8}, "planes does not apply to spiking='wkv': it must be 10, got 8"),
    ],
)
def test_wrong_fields_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_what_does_not_apply_is_refused():
    with pytest.raises(ValueError, match="slots needs a model with spiking='pure', this one has spiking='rate'"):
        SDiT(PRESETS["digits"], dim=32, depth=2).slots = True
    with pytest.raises(ValueError, match="threshold must be None with spiking='pure', whose thresholds are learnt, got 0.5"):
        sample(build(torch.float32), [1], threshold=0.5)


@pytest.mark.slow
def test_the_model_compiles_as_one_graph():
    model = build(torch.float32, dim=16, depth=2)
    wanted = torch.autograd.grad(model(*batch(model)).square().sum(), list(model.parameters()))
    found = torch.compile(model, fullgraph=True)(*batch(model))
    for got, want in zip(torch.autograd.grad(found.square().sum(), list(model.parameters())), wanted):
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()


def test_times_outside_of_the_table_are_refused():
    model, S = SDiT(SMALL), SMALL.image_size
    x, y = torch.randn(2, SMALL.channels, S, S), torch.tensor([0, 1])
    for t in ([-1, 5], [0, 1001], [0.5, float("nan")]):
        with pytest.raises(ValueError, match=r"t must be times 0 \.\. 1000, as its table has no others, got"):
            model(x, torch.tensor(t), y)
    model(x, torch.tensor([0, 1000]), y)
