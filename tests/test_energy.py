"""sdit_kernels.energy against counts by hand, by loops over all taps, and by SpikingJelly's counters."""

import doctest
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sdit_kernels
import sdit_kernels.energy
from sdit_kernels import energy
from sdit_kernels.nn import LIF, reset


class Call(nn.Module):
    """A model that is a function of itself and its inputs, with a parameter w."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(*shape or (4, 3)))

    def forward(self, *inputs):
        return self.function(self, *inputs)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spikes(*shape, rate=0.4):
    x = (torch.rand(shape) < rate).float()
    x.view(-1)[:2] = torch.tensor([0.0, 1.0])
    return x


def only(report):
    (row,) = report.rows
    return row


def kinds(report):
    return [tuple(map(str, row.inputs)) for row in report.rows]


# ---- counted by hand -------------------------------------------------------------------------------------------------


def test_linear_counts_events_times_outputs():
    net = nn.Linear(4, 3)
    x = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    report = energy.count(net, x)
    row = only(report)
    assert (row.macs, row.synaptic_operations, row.calls, row.op) == (2 * 4 * 3, 3 * 3, 1, "addmm")
    assert row.inputs[0].rate == 3 / 8 and row.inputs[0].silent == 1 and row.inputs[0].neurons == 4
    assert kinds(report) == [("binary", "weights")]
    assert report.energy_pj["arithmetic"] == pytest.approx(9 * 0.9)


CONVOLUTIONS = {
    "padding": (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 5)),
    "all": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2), (2, 4, 6, 5)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3, stride=3), (1, 3, 7, 7)),
    "1d": (nn.Conv1d(2, 3, 4, stride=2, padding=3), (2, 2, 7)),
    "3d": (nn.Conv3d(1, 2, 2, padding=1), (1, 1, 2, 3, 2)),
    "unbatched": (nn.Conv2d(2, 3, 3), (2, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2), (2, 4, 3, 4)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 4, stride=3, padding=2), (1, 2, 5)),
}


def count_taps(net, x):
    """Count the multiply-adds on nonzero inputs, one by one."""
    x = x if x.dim() == net.weight.dim() else x[None]
    out = net(x)
    groups, axes, transposed = net.groups, x.dim() - 2, isinstance(net, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    here, there = (x, out) if transposed else (out, x)  # the kernel's taps reach from a position of here to one of there
    channels = out.shape[1] // groups
    total = 0
    for position in itertools.product(*map(range, here.shape[2:])):
        for tap in itertools.product(*map(range, net.kernel_size)):
            at = [p * s - pad + k * d for p, s, pad, k, d in zip(position, net.stride, net.padding, tap, net.dilation)]
            if all(0 <= a < n for a, n in zip(at, there.shape[2:])):
                source = position if transposed else tuple(at)
                total += int((x[(slice(None), slice(None), *source)] != 0).sum()) * channels
    assert axes == len(net.kernel_size)
    return total


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_count_the_taps_that_events_meet(name):
    net, shape = CONVOLUTIONS[name]
    x = spikes(*shape)
    row = only(energy.count(net, x))
    assert row.synaptic_operations == count_taps(net, x) and row.inputs[0].kind == "binary"
    batched = x if x.dim() == net.weight.dim() else x[None]
    positions = batched if isinstance(net, (nn.ConvTranspose1d, nn.ConvTranspose2d)) else net(batched)
    assert row.macs == positions[:, 0].numel() * net.weight.numel()
    # all taps of all inputs: the dense count without the zeros of the padding
    assert count_taps(net, torch.ones(shape)) <= row.macs
    assert row.inputs[0].neurons == x[0].numel() if x is batched else x.numel()


def test_a_convolution_whose_weights_are_spikes():
    """Both operands are data: events of each, and pairs."""
    net = Call(lambda self, x, w: F.conv1d(x, w, padding=1))
    x, w = torch.tensor([[[1.0, 0, 1, 0]]]), torch.tensor([[[0.0, 1, 1]], [[0, 0, 1]]])
    row = only(energy.count(net, x, w))
    # x: position 0 meets 2 taps, position 2 meets 3 taps, in 2 channels. w: tap 1 meets 4 positions, tap 2 meets 3, twice
    assert [i.synaptic_operations for i in row.inputs] == [10, 10]
    assert row.pairs == round(F.conv1d(x, w, padding=1).sum().item()) == 4


def test_both_products_of_attention_count_events_and_pairs():
    def attend(self, q, k, v):
        return (q @ k.transpose(1, 2)) @ v

    q, k, v = torch.tensor([[[1.0, 0], [1, 1]]]), torch.tensor([[[1.0, 1], [0, 0]]]), torch.tensor([[[0.0, 1], [1, 1]]])
    scores, mixed = energy.count(Call(attend), q, k, v).rows
    assert scores.macs == mixed.macs == 8
    assert [i.synaptic_operations for i in scores.inputs] == [3 * 2, 2 * 2] and scores.synaptic_operations == 4
    assert scores.pairs == 3 == (q @ k.transpose(1, 2)).sum()
    assert mixed.inputs[0].kind == "levels" and mixed.inputs[0].level == 2  # scores [[1, 0], [2, 0]]
    assert [i.synaptic_operations for i in mixed.inputs] == [3 * 2, 3 * 2] and mixed.pairs == 3


@pytest.mark.parametrize("heads", [3, 1])
def test_fused_attention_is_two_products(heads):
    q, k, v = spikes(2, 3, 5, 4), spikes(2, heads, 5, 4), spikes(2, heads, 5, 4)
    net = Call(lambda self, *a: F.scaled_dot_product_attention(*a, enable_gqa=heads == 1))
    report = energy.count(net, q, k, v)
    assert report.macs == 2 * (2 * 3 * 5 * 5 * 4)
    first, second = report.rows
    repeats = 3 // heads
    assert sorted(i.nonzero_operations for i in first.inputs) == sorted([int(q.sum()) * 5, int(k.sum()) * 5 * repeats])
    assert second.inputs[0].kind == "floats" and second.synaptic_operations == int(v.sum()) * 5 * repeats


def test_a_residual_of_spikes_is_integer_levels():
    net = nn.Linear(6, 2)
    a, b = spikes(8, 6), spikes(8, 6)
    row = only(energy.count(net, a + b))
    assert str(row.inputs[0]) == "levels to 2 x 1"
    assert row.synaptic_operations == int((a + b).sum()) * 2  # a level of 2 is two events
    assert row.inputs[0].nonzero_operations == int(((a + b) > 0).sum()) * 2


@pytest.mark.parametrize("kernel", [2, 3])
def test_average_pooled_spikes_are_levels_up_to_a_factor(kernel):
    net = nn.Sequential(nn.AvgPool2d(kernel), nn.Conv2d(2, 3, 1))
    x = spikes(3, 2, 2 * kernel, 3 * kernel)
    row = only(energy.count(net, x))
    assert row.inputs[0].kind == "levels" and row.inputs[0].factor == pytest.approx(1 / kernel**2)
    assert row.synaptic_operations == int(x.sum()) * 3  # each spike is one level of the pooled value


def test_levels_share_a_factor_over_batches():
    net = nn.Sequential(nn.Identity(), Call(lambda self, x: (x / 4) @ self.w))
    with energy.count(net) as report:
        for x in ([0.0, 2, 0, 2], [1.0, 3, 0, 0], [0.0, 2, 0, 0]):
            net(torch.tensor([x]))
    row = only(report)
    assert str(row.inputs[0]) == "levels to 3 x 0.25" and row.synaptic_operations == (4 + 4 + 2) * 3


def test_signed_spikes():
    x = torch.tensor([[1.0, 0, -1, 0]])
    row = only(energy.count(nn.Linear(4, 3), x))
    assert row.inputs[0].kind == "signed" and row.synaptic_operations == 6


def test_a_trained_model_over_three_batches():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), LIF(tau=1.5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 4 * 4, 8),
                        LIF(tau=1.5), nn.Linear(8, 2))  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(3)
        net[4].weight.mul_(4)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    with sdit_kernels.backend("reference"):
        for _ in range(3):
            reset(net)
            loss = net(torch.randn(6, 1, 8, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        batches, seen = torch.randn(3, 6, 1, 8, 8), {}
        handles = [
            net[i].register_forward_pre_hook(lambda m, args, i=i: seen.setdefault(i, []).append(args[0].detach()))
            for i in (0, 4, 6)
        ]
        with energy.count(net) as report:
            for x in batches:
                reset(net)
                net(x)
    for handle in handles:
        handle.remove()
    rows = {row.layer: row for row in report.rows}
    assert list(rows) == ["0", "4", "6"] and report.batches == 3 and all(row.calls == 3 for row in rows.values())
    assert kinds(report) == [("floats", "weights"), ("binary", "weights"), ("binary", "weights")]
    for layer, outputs in (("4", 8), ("6", 2)):
        x = torch.cat(seen[int(layer)])
        row = rows[layer]
        assert row.synaptic_operations == int(x.sum()) * outputs > 0
        assert row.inputs[0].rate == pytest.approx(x.mean().item())
        assert row.inputs[0].silent == int((x.amax(0) == 0).sum())
    assert report.macs == 18 * 64 * 9 * 4 + 18 * 64 * 8 + 18 * 8 * 2
    floats, sops = 18 * 64 * 9 * 4, report.synaptic_operations
    assert report.macs_on_floats == floats
    assert report.energy_pj["arithmetic"] == pytest.approx(floats * 4.6 + sops * 0.9)


# ---- what is called spikes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, function",
    [
        ("zeros", lambda self, x: torch.zeros_like(x) @ self.w),
        ("zeros", lambda self, x: (x - 100).relu() @ self.w),
        ("one value", lambda self, x: (x > -100).float() @ self.w),
        ("constant", lambda self, x: torch.eye(4) @ self.w + x[:, :3]),
        ("constant", lambda self, x: (self.w > 0).float().t() @ self.w + x[:3, :3]),
        ("floats", lambda self, x: x.relu() @ self.w),
        ("floats", lambda self, x: (2 + 3 * (x > 0).float()) @ self.w),  # never near 0
        ("floats", lambda self, x: torch.rand(4, 4) @ self.w),
        ("binary", lambda self, x: (x > 0).float() @ self.w),
        ("binary", lambda self, x: (x > 0).float().to(torch.bfloat16) @ self.w.to(torch.bfloat16)),
        ("levels", lambda self, x: (2 * (x > 0).float()) @ self.w),
        ("levels", lambda self, x: F.dropout((x > 0).float(), 0.5) @ self.w),
        ("fixed", lambda self, x: ((0 * x + torch.eye(4)) > 0).float() @ self.w),
    ],
)  # fmt: skip
def test_kinds_of_operands(kind, function):
    net = Call(function)
    with energy.count(net) as report:
        for _ in range(2):
            net(torch.randn(4, 4))
    assert kind in [i.kind for i in report.rows[0].inputs]
    assert report.products_on_spikes == (kind in ("binary", "levels"))


def test_one_hot_tokens_are_not_spikes_but_spikes_of_embedded_tokens_are():
    ids = torch.randint(4, (5, 6))
    assert kinds(energy.count(Call(lambda self, i: F.one_hot(i, 4).float() @ self.w), ids)) == [("indices", "weights")]
    net = Call(lambda self, i: (F.embedding(i, self.w) > 0).float() @ self.w.t())
    assert kinds(energy.count(net, ids)) == [("binary", "weights")]


def test_given_pixels_are_floats_and_given_counts_are_levels():
    net = nn.Linear(5, 2)
    counts = torch.randint(0, 17, (20, 5)).float()
    assert kinds(energy.count(net, counts / 16)) == [("floats", "weights")]
    assert only(energy.count(net, counts)).inputs[0].level == counts.max()


def test_events_given_as_integers_are_spikes():
    for dtype in (torch.bool, torch.uint8, torch.int64):
        net = Call(lambda self, x: x.float() @ self.w)
        assert kinds(energy.count(net, spikes(3, 4).to(dtype))) == [("binary", "weights")]


def test_few_floats_that_fit_a_factor_of_their_own_are_floats():
    net = Call(lambda self, x: (x + 0) @ self.w, 3, 2)
    with energy.count(net) as report:
        for factor in (0.3, 0.777, 1.234):
            net(factor * torch.tensor([[0.0, 1, 3]]))
    assert kinds(report) == [("floats", "weights")]


def test_work_outside_the_model_is_not_counted():
    net = nn.Linear(4, 3)
    with energy.count(net) as report:
        out = net(torch.randn(2, 5) @ torch.randn(5, 4))
        nn.Linear(3, 2)(out)
    assert only(report).macs == 2 * 4 * 3


def test_equal_batches_do_not_make_spikes_fixed():
    net, x = Call(lambda self, x: (x > 0).float() @ self.w), torch.randn(4, 4)
    with energy.count(net) as report:
        for _ in range(3):
            net(x)
    assert kinds(report) == [("binary", "weights")]


def test_spikes_written_into_a_buffer_are_data():
    def run(self, x):
        out = torch.zeros(3, 4)
        for t in range(3):
            out[t] = (x[t] > 0).float()
        return out @ self.w

    assert kinds(energy.count(Call(run), torch.randn(3, 4))) == [("binary", "weights")]


def test_levels_of_other_dtypes():
    x = spikes(6, 9, 5, rate=0.2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        row = only(energy.count(Call(lambda self, x: x.mean(1) @ self.w.to(x.dtype), 5, 2), x.to(dtype)))
        assert row.inputs[0].kind == "levels" and row.synaptic_operations == int(x.sum()) * 2


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, function",
    [
        ("_fft_r2c", lambda self, x: torch.fft.fft(x)),
        ("_cdist_forward", lambda self, x: torch.cdist(x, x)),
        ("_linalg_det", lambda self, x: torch.linalg.det(x)),
        ("_embedding_bag", lambda self, x: F.embedding_bag(torch.tensor([[0, 1]]), self.w)),
        ("index_add", lambda self, x: x.index_add(0, torch.tensor([0]), x[:1])),
        ("_trilinear", lambda self, x: F.bilinear(x, x, self.w.new_ones(2, 4, 4))),
        ("_sparse_addmm", lambda self, x: torch.sparse.mm(x.to_sparse(), self.w)),
    ],
)
def test_operators_that_are_not_counted_are_named(name, function):
    report = energy.count(Call(function), torch.randn(4, 4))
    assert (f"aten::{name}", "") in report.unknown and f"aten::{name} in (model): 1 calls" in report.table()
    assert "NOT COUNTED" in report.table()


def test_a_custom_operator_is_named():
    @torch.library.custom_op("energy_test::times", mutates_args=())
    def times(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    report = energy.count(Call(lambda self, x: times(x, self.w)), torch.randn(4, 4))
    assert ("energy_test::times", "") in report.unknown


def test_usual_layers_have_nothing_unknown():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.Dropout(0.1),
                        nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.GELU(), nn.Unflatten(1, (2, 4)),
                        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    report = energy.count(net, x)
    net.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again = energy.count(net, x)
        assert not again.unknown and again.macs == report.macs
    attention = 2 * (3 * 16 * 2 + 16 * 2 + 2 * 2 * 2 * 4 + 2 * 2 * 32)
    assert not report.unknown and report.macs == 2 * 4 * 36 * 9 + 2 * 36 * 8 + attention


def test_small_products():
    net = Call(lambda self, x: (x @ self.w[:, 0], torch.dot(x[0], self.w[:, 0]), torch.einsum("bi,ij->bj", x, self.w)))
    report = energy.count(net, spikes(5, 4))
    assert report.macs == 5 * 4 + 4 + 5 * 4 * 3 and report.products == 3 and not report.unknown


def test_products_of_one_call_have_a_line_each():
    net = Call(lambda self, x: torch.einsum("bi,ij,jk->bk", x, self.w, self.w.t()))
    assert energy.count(net, spikes(4, 4)).products == 2


def test_fused_operators_are_on_a_line_of_their_own():
    net = nn.Sequential(nn.Linear(4, 3), LIF())
    with sdit_kernels.backend("reference"):  # plain PyTorch: nothing fused
        assert not energy.count(net, torch.randn(2, 4)).fused
    with sdit_kernels.backend("cpu"):
        report = energy.count(Call(lambda self, x: sdit_kernels.lif(x)), torch.randn(4, 5))
    assert report.fused == {("lif", ""): 20} and not report.unknown and report.macs == 0
    assert report.fused_work()["lif"]["macs"] == 40 and "lif: 20 elements" in report.table()


# ---- ways to run a model ---------------------------------------------------------------------------------------------


def two_layers():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_gradients_and_checkpointing_count_the_forward_pass_once():
    net, x = two_layers(), torch.randn(5, 4, requires_grad=True)
    want = energy.count(net, x).macs
    for reentrant in (False, True):
        wrapped = Call(lambda self, x, r=reentrant: checkpoint(net, x, use_reentrant=r))
        with energy.count(wrapped) as report:
            wrapped(x).sum().backward()
        assert report.macs == want == 5 * (4 * 6 + 6 * 3) and report.products == 2
        assert {i.kind for row in report.rows for i in row.inputs} == {"floats", "weights"}


def test_autocast_keeps_weights_weights_in_every_batch():
    net = two_layers()
    with torch.autocast("cpu", torch.bfloat16), energy.count(net) as report:
        for _ in range(3):
            net(torch.randn(5, 4))
    assert kinds(report) == [("floats", "weights")] * 2


def test_a_compiled_model_runs_its_own_code():
    net = two_layers()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(5, 4)
    compiled(x)
    for model in (compiled, nn.Sequential(compiled)):
        report = energy.count(model, x)
        assert report.macs == 210 and [row.layer[-1] for row in report.rows] == ["0", "2"]
    assert [row.layer for row in energy.count(compiled, x).rows] == ["0", "2"]


def test_a_loop_over_time_steps_is_one_product():
    net = Call(lambda self, x: [(step > 0).float() @ self.w for step in x])
    row = only(energy.count(net, torch.randn(7, 2, 4)))
    assert row.calls == 7 and row.macs == 7 * 2 * 4 * 3


def test_an_error_in_the_model_leaves_nothing_behind():
    def fail(self, x):
        raise RuntimeError("no")

    net = nn.Sequential(nn.Linear(4, 3), Call(fail))
    before = [len(hooks) for hooks in global_hooks()]
    with pytest.raises(RuntimeError, match="no"):
        energy.count(net, torch.randn(2, 4))
    assert [len(hooks) for hooks in global_hooks()] == before
    with energy.count(net) as report:
        with pytest.raises(RuntimeError, match="no"):
            net(torch.randn(2, 4))
        net[0](torch.randn(2, 4))
    assert {row.layer for row in report.rows} == {"0"} and [len(hooks) for hooks in global_hooks()] == before
    assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)


def global_hooks():
    module = torch.nn.modules.module
    return module._global_forward_hooks, module._global_forward_pre_hooks


def test_without_values_all_operands_are_floats():
    report = energy.count(two_layers().to("meta"), torch.ones(5, 4, device="meta"))
    assert report.macs == 210 and kinds(report) == [("floats", "floats")] * 2
    assert report.energy_pj["arithmetic"] == pytest.approx(210 * 4.6)


def test_written_arguments_without_schemas(monkeypatch):
    monkeypatch.setattr(sdit_kernels._torch, "_HAS_SCHEMA", False)
    test_spikes_written_into_a_buffer_are_data()
    x, out = torch.ones(2), torch.ones(2)
    written = sdit_kernels._torch.written_arguments
    assert written(torch.ops.aten.add_.Tensor, (x, out), {})[0] is x and not written(torch.ops.aten.add.Tensor, (x, out), {})
    assert written(torch.ops.aten.add.out, (x, x), {"out": out})[0] is out


def test_the_count_changes_no_result():
    net, x = two_layers(), torch.randn(5, 4)
    want = net(x)
    with energy.count(net):
        assert torch.equal(net(x), want)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_as_text_dict_and_json(capsys):
    net = nn.Sequential(nn.Linear(4, 3), Call(lambda self, x: (x > 0).float() @ self.w, 3, 5))
    with energy.count(net) as report:
        for _ in range(3):
            net(torch.randn(8, 4))
    found = report.to_dict()
    assert json.loads(report.to_json()) == json.loads(json.dumps(found))
    assert {"macs", "synaptic_operations", "energy_pj", "products", "products_on_spikes"} <= found.keys()
    assert found["macs"] == 3 * 8 * (12 + 15) and found["products"] == 2 and found["products_on_spikes"] == 1
    assert list(found["energy_pj"]) == ["arithmetic", "with_memory", "quantised"]
    print(report)
    text = capsys.readouterr().out
    assert text.rstrip("\n") == report.table()
    for part in ("1 of 2 products see spikes (3 batches)", "0: addmm (floats, weights)", "4.6 pJ", "0.9 pJ", "1 MB SRAM"):
        assert part in text


def test_the_three_energies_by_hand():
    net, x = nn.Linear(4, 3, bias=False), torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    report = energy.count(net, x)
    assert report.energy_pj["arithmetic"] == pytest.approx(9 * 0.9)
    # 12 weights and 6 results of 4 bytes, 8 spikes of a bit
    assert report.energy_pj["with_memory"] == pytest.approx(9 * 0.9 + (18 * 4 + 1) * 12.5)
    # 12 weights of a byte
    assert report.energy_pj["quantised"] == pytest.approx(24 * 0.3 + (12 + 6 * 4 + 1) * 12.5)
    other = report.with_costs(energy.Costs(add=2, byte=0, time_steps=2))
    assert other.energy_pj == pytest.approx({"arithmetic": 18, "with_memory": 18, "quantised": 12 * 0.3})
    assert report.costs.add == 0.9


def test_silent_neurons_over_batches():
    net = nn.Linear(3, 2)
    with energy.count(net) as report:
        net(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
        net(torch.tensor([[0.0, 1, 0]]))
    assert (only(report).inputs[0].silent, only(report).inputs[0].neurons) == (1, 3)
    assert "1 of 3" in report.table()


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        energy.count(lambda x: x, torch.ones(1))
    with pytest.raises(TypeError, match="costs must be a sdit_kernels.energy.Costs, got float"):
        energy.count(nn.Linear(1, 1), torch.ones(1), costs=4.6)
    with pytest.raises(ValueError, match="weight is lazy"):
        energy.count(nn.LazyLinear(1), torch.ones(1))
    with pytest.raises(ValueError, match="mac must be 0 or more and finite, got -1"):
        energy.Costs(mac=-1)
    with pytest.raises(ValueError, match="time_steps must be at least 1, got 0"):
        energy.Costs(time_steps=0)
    with pytest.raises(TypeError, match="byte must be a number, got '1'"):
        energy.Costs(byte="1")
    with pytest.raises(TypeError, match="memory must be a str, got int"):
        energy.Costs(memory=1)


@pytest.mark.parametrize("module", [energy, sdit_kernels.energy.report], ids=lambda m: m.__name__)
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# ---- other libraries -------------------------------------------------------------------------------------------------


def jelly(step_mode):
    pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed (make peers)")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(1, 4, 3, padding=1), neuron.LIFNode(tau=1.5), layer.Conv2d(4, 4, 3, stride=2),
                        neuron.IFNode(), layer.Flatten(), layer.Linear(4 * 3 * 3, 5))  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(4)
        net[2].weight.mul_(4)
    functional.set_step_mode(net, step_mode)
    return net, functional.reset_net


def count_jelly(net, reset_net, step_mode, batches):
    with torch.no_grad(), energy.count(net) as report:
        for x in batches:
            reset_net(net)
            net(x) if step_mode == "m" else [net(step) for step in x]
    return report


@pytest.mark.peers
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_spikingjelly_counts_the_same_on_its_own_modules(step_mode):
    """On binary inputs with constant weights. The page docs/energy.md explains the differences elsewhere."""
    net, reset_net = jelly(step_mode)
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter

    batches = 2 * torch.rand(2, 4, 3, 1, 8, 8)
    report = count_jelly(net, reset_net, step_mode, batches)
    synops, macs = SynOpCounter(), MACCounter()
    with torch.no_grad(), DispatchCounterMode([synops, macs]):
        for x in batches:
            reset_net(net)
            net(x) if step_mode == "m" else [net(step) for step in x]
    assert report.synaptic_operations == synops.get_total() > 0
    products = ("convolution", "addmm", "mm")
    counted = {str(op): n for op, n in macs.get_counts()["Global"].items()}
    assert report.macs_on_floats == sum(n for op, n in counted.items() if any(f".{p}" in op or f"{p}." in op for p in products))
    assert kinds(report) == [("floats", "weights"), ("binary", "weights"), ("binary", "weights")]


@pytest.mark.peers
def test_where_spikingjelly_counts_something_else():
    jelly("m")
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter

    def both(function, *inputs):
        net, counter = Call(function, 4, 4), SynOpCounter()
        report = energy.count(net, *inputs)
        with torch.no_grad(), DispatchCounterMode([counter]):
            net(*inputs)
        return only(report), counter.get_total()

    x, y = spikes(5, 4), spikes(4, 4)
    row, theirs = both(lambda self, x, y: x @ y, x, y)
    assert theirs == row.pairs < row.synaptic_operations
    row, theirs = both(lambda self, x: (x + x[[1, 2, 3, 4, 0]]) @ self.w, x)
    assert theirs == 0 and row.synaptic_operations == 2 * int(x.sum()) * 4
    row, theirs = both(lambda self, x: x.cos() @ (self.w > 0).float(), x)
    assert theirs > 0 and row.synaptic_operations == 0


@pytest.mark.peers
def test_an_accelerated_model_counts_the_same():
    net, reset_net = jelly("m")
    from sdit_kernels.compat import spikingjelly

    batches = 2 * torch.rand(2, 4, 3, 1, 8, 8)
    want = count_jelly(net, reset_net, "m", batches)
    spikingjelly.accelerate(net)
    got = count_jelly(net, reset_net, "m", batches)
    assert got.synaptic_operations == want.synaptic_operations and kinds(got) == kinds(want)
    assert {op for op, _ in got.fused} == {"lif"} and not got.unknown


@pytest.mark.peers
def test_snntorch_modules_and_recurrent_spikes():
    snn = pytest.importorskip("snntorch", reason="snntorch is not installed (make peers)")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), snn.RLeaky(beta=0.5, linear_features=8)

        def forward(self, x):
            out, mem = self.second.init_rleaky()
            for _ in range(4):
                out, mem = self.second(self.first(x), out, mem)
            return out

    net = Net()
    with torch.no_grad(), energy.count(net) as report:
        for _ in range(3):
            net(4 * torch.randn(5, 6))
    assert [(row.layer, row.inputs[0].kind, row.calls) for row in report.rows] == [
        ("first", "floats", 12), ("second.recurrent", "binary", 12),
    ]  # fmt: skip


def test_no_value_is_read_during_the_run_if_the_tensors_are_on_a_gpu(monkeypatch):
    """The CPU stands for a GPU: reading a value raises."""
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    last = Call(lambda self, x: (F.avg_pool2d(x.gt(0).float(), 2).flatten(2) @ self.w).gt(0).float() @ self.w.t(), 9, 2)
    attention = Call(lambda self, x: x.gt(0).float() @ x.gt(0).float().transpose(1, 2))
    net, x = nn.Sequential(first, last, attention), torch.randn(3, 2, 1, 8, 8)

    def run():
        with torch.no_grad(), energy.count(net) as report:
            for batch in x:
                net(batch)
        return report

    want = run().to_dict()
    with monkeypatch.context() as patch:
        patch.setattr(sdit_kernels.energy.products, "is_readable", lambda t: False)
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a value was read"))
        report = run()
    got = report.to_dict()
    for row in (*got["rows"], *want["rows"]):
        for i in row["inputs"]:
            if i["kind"] == "floats":  # neurons of floats are not counted where the values can be read
                i["neurons"] = i["silent"] = 0
    assert got == want and got["products_on_spikes"] == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_not_waited_for_during_the_run():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Call(lambda self, x: F.avg_pool2d((x > 0).float(), 2)), nn.Conv2d(4, 3, 2)).cuda()
    x = torch.randn(3, 2, 1, 8, 8)
    with energy.count(net) as cpu_report:
        net.cpu()
        for batch in x:
            net(batch)
    net.cuda()
    x = x.cuda()
    net(x[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with energy.count(net) as report:
            for batch in x:
                net(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.synaptic_operations == pytest.approx(cpu_report.synaptic_operations, rel=0.02)
    assert kinds(report) == kinds(cpu_report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_levels_of_rounded_values_are_counted_exactly(dtype):
    """k / 3 and k / 7 are rounded in every dtype; the rounding must not add up."""
    draw = torch.Generator().manual_seed(0)
    for n in (3, 7):
        level = (torch.rand(n, 500, 16, generator=draw) < 0.3).sum(0)
        model = nn.Sequential(Scale(n), nn.Linear(16, 8, dtype=dtype))
        assert energy.count(model, level.to(dtype)).synaptic_operations == 8 * level.sum().item()


class Scale(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return x / self.n


def test_an_offset_is_not_a_spike():
    spikes = (torch.rand(20, 16, generator=torch.Generator().manual_seed(0)) < 0.3).float()

    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x):
            return self.linear(x + 1)

    report = energy.count(Offset(), spikes)
    assert report.synaptic_operations == 0 and report.rows[0].inputs[0].kind == "floats"
