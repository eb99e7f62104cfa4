"""Time SDiT against its plain form: repeat, SpikingJelly's LIFNode, an eager loop over tokens, concatenations.

    python perf/bench_sdit.py --json perf/results/sdit.json --plot perf/results/sdit_profile.png
    python perf/bench_sdit.py --only training --quick

The plain form computes as the research code does, with public ops of PyTorch and SpikingJelly. It appends B copies of the
reconstruction tokens to the tokens of the image, copies every current four times, and scans the tokens one by one. It uses the
weights of the model that it is compared with, and must agree with that model in float64 before it is timed. It is the fixed
baseline: do not optimise it.
"""

import contextlib
import copy
import functools
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness
from perf.harness import Contestant, check, compare, ratio, record_goal
from perf.peers import eager_loop, plain_token_shift, spikingjelly_lif
from sdit import PRESETS, SDiT
from sdit.sample import sample
from sdit_kernels import reference

PRESET = "fashion_mnist"
BATCHES = (1, 4, 16, 64)
FIGURE = "perf/results/sdit_profile.png"
FORMS = ("ours", "ours, bf16 autocast", "plain", "plain, bf16 autocast")


# ---- the plain form --------------------------------------------------------------------------------------------------


class PlainSDiT(torch.nn.Module):
    """The plain form, on a copy of the weights of ``model``."""

    def __init__(self, model):
        super().__init__()
        self.model, v_threshold = copy.deepcopy(model), model.config.v_threshold
        self.lif = spikingjelly_lif(v_threshold) or functools.partial(reference.lif, v_threshold=v_threshold)

    config = property(lambda self: self.model.config)

    def frozen(self):
        return contextlib.nullcontext()

    def rate(self, x):
        return self.lif(x.unsqueeze(0).repeat(self.model.config.T, 1, 1, 1)).mean(0)

    def block(self, block, x, skipped):
        a, m, R = block.attention, block.mlp, block.reconstruction
        if skipped is not None:
            x = block.skip(torch.cat([x, skipped], -1))
        x = torch.cat([x, R.repeat(len(x), 1, 1)], 1)
        xk, xv, xr = plain_token_shift(x, a.time_mix_k, a.time_mix_v, a.time_mix_r)
        y = torch.sigmoid(a.receptance(xr)) * eager_loop(a.time_decay, a.time_first, a.key(xk), a.value(xv), unbind=True)
        x = x + self.rate(a.output(y))
        xk, xr = plain_token_shift(x, m.time_mix_k, m.time_mix_r)
        x = x + self.rate(torch.sigmoid(m.receptance(xr)) * m.value(torch.relu(m.key(xk)).square()))
        x, r = x.chunk(2, 1)
        return x + x * block.tokens_out(block.tokens_in(r).transpose(1, 2))

    def forward(self, x, t, y):
        x, half, skips = self.model.embed_inputs(x, t, y), len(self.model.blocks) // 2, []
        for i, block in enumerate(self.model.blocks):
            x = self.block(block, x, skips.pop() if i > half else None)
            if i < half:
                skips.append(x)
        return self.model.decode_tokens(x)


# ---- sections --------------------------------------------------------------------------------------------------------


def make_case(device, batch, preset=PRESET):
    """Make a model and its inputs. With its weights, neurons fire and every layer has a gradient, as after some training."""
    torch.manual_seed(0)
    model = SDiT(PRESETS[preset], variant="improved").to(device)
    for block in model.blocks:
        if block.reconstruction is not None:
            torch.nn.init.xavier_uniform_(block.tokens_out.weight, gain=0.1)
    torch.nn.init.normal_(model.final.weight, std=0.05)
    config = model.config
    x = torch.randn(batch, config.channels, config.image_size, config.image_size, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    return model, (x, t, torch.arange(batch, device=device) % config.num_classes)


def run_training_step(model, inputs, target, optimizer=None, dtype=None):
    """Run one training step: forward pass, loss, backward pass, AdamW."""
    with torch.autocast(inputs[0].device.type, dtype=dtype, enabled=dtype is not None):
        loss = (model(*inputs) - target).square().mean()
    loss.backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def check_forms_agree(device, preset=PRESET):
    """Check that both forms agree in float64: outputs and every gradient."""
    model, inputs = make_case(device, 1, preset)
    model = model.double()
    inputs = inputs[0].double(), *inputs[1:]
    plain = PlainSDiT(model)
    target = torch.zeros((), dtype=torch.float64, device=device)
    error = check("output", model(*inputs), plain(*inputs), 1e-10, 1e-10)
    run_training_step(model, inputs, target)
    run_training_step(plain, inputs, target)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        check(f"gradient of {name}", p.grad, q.grad, 1e-8, 1e-10 * q.grad.abs().max().item())
    return {"fp64_max_abs_error": error["max_abs_error"]}


def make_forms(model):
    """Yield (name, model, dtype of autocast) of each contestant; each has its own copy of the weights."""
    for name in FORMS:
        own = PlainSDiT(model) if name.startswith("plain") else copy.deepcopy(model)
        yield name, own, torch.bfloat16 if "bf16" in name else None


def autocast(args, dtype):
    return torch.autocast(args.device, dtype=dtype, enabled=dtype is not None)


def training_steps(args, batch, extra, known=None):
    """Make the contestants; skip those that do not fit in memory by ``known``: {name: bytes kept per sample}."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model, inputs = make_case(args.device, batch)
    target = torch.randn(model.config.out_channels, *inputs[0].shape[2:], device=args.device)

    def contestant(name, model, dtype):
        needed = batch * (known or {}).get(name, 0)
        if args.device == "cpu" and needed > memory / 5:  # at its peak a plain step holds more than twice as much
            return Contestant(
                name, skip=f"keeps {needed / 2**30:.0f} GiB for the backward pass", extra={"batch": batch, **extra}
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def forward():
            with autocast(args, dtype):
                return model(*inputs)

        kept = harness.saved_bytes(forward, exclude=[*model.parameters(), *inputs])[0] // batch
        return Contestant(
            name,
            lambda: run_training_step(model, inputs, target, optimizer, dtype),
            extra={"batch": batch, "saved_per_sample_bytes": kept, **extra},
        )

    return [contestant(*form) for form in make_forms(model)]


def sampling_steps(args, batch, stack, extra):
    """Make the contestants of sampling. Until ``stack`` closes, tensors that only depend on the weights are computed once."""
    model, inputs = make_case(args.device, batch)

    def contestant(name, model, dtype):
        model.eval()
        stack.enter_context(model.frozen())

        def run():
            with torch.no_grad(), autocast(args, dtype):
                return model(*inputs)

        return Contestant(name, run, extra={"batch": batch, **extra})

    return [contestant(*form) for form in make_forms(model)]


def training(args, settings):
    """A training step: forward, mean squared error, backward, AdamW"""
    rows = compare(training_steps(args, args.batch, check_forms_agree(args.device)), **settings)
    ours, bf16, plain, plain_bf16 = rows
    record_goal("training step fp32, times plain fp32", plain["ratio"], 1.8)
    record_goal("training step bf16, times plain fp32", plain["median_s"] / bf16["median_s"], 4)
    record_goal("training step bf16, times plain bf16", plain_bf16["median_s"] / bf16["median_s"], 1)
    for name, other in (("fp32", ours), ("bf16", bf16)):
        share = other["saved_per_sample_bytes"] / plain["saved_per_sample_bytes"]
        record_goal(f"bytes kept for backward, {name} over plain fp32", share, 0.5, at_least=False)
    return f"{PRESET}, batch {args.batch}", rows


def sampling(args, settings):
    """A sampling step: a forward pass without gradients inside model.frozen()"""
    with contextlib.ExitStack() as stack:
        rows = compare(sampling_steps(args, args.batch, stack, {}), **settings)
    record_goal("sampling step fp32, times plain fp32", ratio(rows, "plain"), 1.6)
    record_goal("sampling step bf16, times plain fp32", rows[2]["median_s"] / rows[1]["median_s"], 4)
    return f"{PRESET}, batch {args.batch}", rows


def image(args, settings):
    """One whole image with batch size 1: from noise to pixels in 50 steps of DPM-Solver++"""
    model, _ = make_case(args.device, 1)
    draw = functools.partial(sample, labels=[3], sampler="dpm++")
    double = copy.deepcopy(model).double()
    error = check("image", draw(double, steps=2), draw(PlainSDiT(double), steps=2), 0, 1e-6)
    del double
    steps = 3 if args.quick else 50

    def contestant(name, model, dtype):
        def run():
            with autocast(args, dtype):
                return draw(model, steps=steps)

        return Contestant(name, run, extra={"steps": steps, "fp64_max_abs_error": error["max_abs_error"]})

    rows = compare([contestant(*form) for form in make_forms(model)], **settings | {"rounds": min(settings["rounds"], 3)})
    record_goal("one image fp32, times plain fp32", ratio(rows, "plain"), 1.6)
    return f"{PRESET}, 50 steps", rows


def batches(args, settings):
    """Training and sampling steps at several batch sizes; images per second"""
    rows, sizes, known = [], BATCHES[:2] if args.quick else BATCHES, {}
    for batch in sizes:
        few = settings | {"rounds": min(settings["rounds"], 2 if batch > 16 else 3)}
        rows += compare(training_steps(args, batch, {"step": "training"}, known), **few)
        known = {row["name"]: row["saved_per_sample_bytes"] for row in rows[-4:] if "saved_per_sample_bytes" in row} or known
        with contextlib.ExitStack() as stack:
            rows += compare(sampling_steps(args, batch, stack, {"step": "sampling"}), **few)
    for row in rows:
        if "median_s" in row:
            row["images_per_second"] = row["batch"] / row["median_s"]
    slowest = min(plain["ratio"] for plain in rows[2::4] if "ratio" in plain)
    record_goal("fp32, the least of all batches, times plain fp32", slowest, 1)
    return f"{PRESET}, batch {sizes[0]} to {sizes[-1]}", rows


# ---- where the time goes ---------------------------------------------------------------------------------------------

GROUPS = {  # {group: pattern of torch.profiler's op names}; the first match counts
    "matrix products": r"aten::(addmm_?|b?mm|baddbmm|\w*linear\w*|\w*conv(olution|[123]d)\w*|mkldnn\w*)",
    "sdit_kernels: neurons": r"sdit_kernels::lif.*",
    "sdit_kernels: scan": r"sdit_kernels::wkv.*",
    "sdit_kernels: norm, shift, mixes": r"sdit_kernels::token_shift.*",
    "sdit_kernels: squared ReLU": r"sdit_kernels::relu_squared.*",
    "copies, fills, concatenations": r"aten::(copy_|cat|fill_|zero_|clone|repeat|_to_copy|stack|constant_pad_nd)",
    "optimizer": r".*(adamw|Optimizer).*",
    "elementwise, reductions, norms": r"(aten::.*|Spik.*|\w*[Aa]tan\w*)",
    "autograd and Python": r".*",
}
VIEWS = r"aten::(\w*view\w*|t|transpose|permute|expand\w*|slice\w*|select\w*|narrow|chunk|split\w*|unbind|unsqueeze|squeeze|" \
    r"as_strided\w*|empty\w*|to|detach|resize_|result_type|reshape|is_\w+|item|lift_fresh|contiguous)"  # fmt: skip


def find_group(name):
    """Return the group of an op of the profiler. Views and allocations belong to "autograd and Python"."""
    if re.fullmatch(VIEWS, name):
        return "autograd and Python"
    return next(title for title, pattern in GROUPS.items() if re.fullmatch(pattern, name))


def profile(args, settings):
    """Time of a training step per group of ops, from torch.profiler: plain form and ours"""
    from torch.profiler import ProfilerActivity, profile

    rows = []
    for c in training_steps(args, args.batch, {}):
        steps = 1 if args.quick or c.name.startswith("plain") else 3  # the profiler's events of a plain step take gigabytes
        c.fn()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(steps):
                c.fn()
        seconds = dict.fromkeys(GROUPS, 0.0)
        for event in found.key_averages():
            seconds[find_group(event.key)] += event.self_cpu_time_total / 1e6 / steps
        total = sum(seconds.values())
        rows += [
            {"name": c.name, "group": title, "self_s": took, "percent_of_step": 100 * took / total}
            for title, took in seconds.items()
            if took
        ]
    share = next(r["percent_of_step"] for r in rows if (r["name"], r["group"]) == ("ours", "matrix products"))
    record_goal("matrix products, share of the fp32 step", share, 80, " %")
    if args.plot:
        plot_profile(args.plot, rows)
    return f"{PRESET}, batch {args.batch}", rows


def plot_profile(path, rows):
    """Draw one bar per form: its length is the time of a step, its colours are the groups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3), layout="constrained")
    colors = ("#0072B2", "#009E73", "#56B4E9", "#F0E442", "#CC79A7", "#D55E00", "#000000", "#E69F00", "#999999")
    names = [FORMS[i] for i in (2, 0, 3, 1)]
    left = dict.fromkeys(names, 0.0)
    for title, color in zip(GROUPS, colors):
        widths = [sum(r["self_s"] for r in rows if r["name"] == name and r["group"] == title) for name in names]
        axes.barh(names, widths, left=list(left.values()), color=color, label=title, height=0.62)
        left = {name: start + width for (name, start), width in zip(left.items(), widths)}
    for name, total in left.items():
        products = next(r for r in rows if r["name"] == name and r["group"] == "matrix products")["percent_of_step"]
        axes.text(total, name, f"  {products:.0f} % products", va="center", fontsize=8)
    axes.set_xlim(0, 1.25 * max(left.values()))
    axes.invert_yaxis()
    axes.set(xlabel="seconds of a training step, by torch.profiler")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(harness.make_parent_folder(path), dpi=150)
    pyplot.close(figure)


def add_arguments(parser):
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of the comparison (default: 5, 2 with --quick)")


def main():
    sections = {"training": training, "sampling": sampling, "image": image, "batches": batches, "profile": profile}

    def with_rounds(section):
        def run(args, settings):  # few rounds, because a step takes seconds
            return section(args, settings | {"rounds": args.rounds or (2 if args.quick else 5)})

        run.__doc__ = section.__doc__
        return run

    return harness.run_sections(
        __doc__, {k: with_rounds(v) for k, v in sections.items()}, figure=FIGURE, add_arguments=add_arguments
    )


if __name__ == "__main__":
    sys.exit(main())
