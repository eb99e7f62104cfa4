"""SDiT against its plain form: repeat, SpikingJelly's LIFNode, the eager loop over tokens, concatenations.

    python perf/bench_sdit.py --json perf/results/sdit.json
    python perf/bench_sdit.py --only training --quick

The plain form is what the research code computes, with the ops its users have, and stays as it is: B copies of the
reconstruction tokens appended to those of the image, four copies of every current, a scan that walks the tokens one by one. It
is written out below, on the weights of the model it is compared with, and must agree with it in float64 before any time counts.
"""

import copy
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from perf import harness
from perf.bench_wkv import eager_loop
from perf.harness import Contestant, check, compare, goal, missing, ratio
from sdit import PRESETS, SDiT
from sdit_kernels import reference

PRESET = "fashion_mnist"


# ---- the plain form --------------------------------------------------------------------------------------------------


def lif_node(v_threshold):
    """currents (T, ...) -> spikes: SpikingJelly's LIFNode, or the definition where it is not installed."""
    if missing("spikingjelly"):
        return functools.partial(reference.lif, v_threshold=v_threshold)
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(tau=2.0, v_threshold=v_threshold, v_reset=0.0, surrogate_function=surrogate.ATan(), step_mode="m")

    def run(x):
        node.reset()
        return node(x)

    return run


def shifted(x, *mixes):
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    before = F.pad(x, (0, 0, 1, -1))
    return [x * m + before * (1 - m) for m in mixes]


class Plain(torch.nn.Module):
    """The plain form, on a copy of the weights of ``model``."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lif = copy.deepcopy(model), lif_node(model.config.v_threshold)

    def rate(self, x):
        return self.lif(x.unsqueeze(0).repeat(self.model.config.T, 1, 1, 1)).mean(0)

    def block(self, block, x, kept):
        a, m, R = block.attention, block.mlp, block.reconstruction
        if kept is not None:
            x = block.skip(torch.cat([x, kept], -1))
        x = torch.cat([x, R.repeat(len(x), 1, 1)], 1)
        xk, xv, xr = shifted(x, a.time_mix_k, a.time_mix_v, a.time_mix_r)
        y = torch.sigmoid(a.receptance(xr)) * eager_loop(a.time_decay, a.time_first, a.key(xk), a.value(xv), unbind=True)
        x = x + self.rate(a.output(y))
        xk, xr = shifted(x, m.time_mix_k, m.time_mix_r)
        x = x + self.rate(torch.sigmoid(m.receptance(xr)) * m.value(torch.relu(m.key(xk)).square()))
        x, r = x.chunk(2, 1)
        return x + x * block.tokens_out(block.tokens_in(r).transpose(1, 2))

    def forward(self, x, t, y):
        x, half, kept = self.model._embed(x, t, y), len(self.model.blocks) // 2, []
        for i, block in enumerate(self.model.blocks):
            x = self.block(block, x, kept.pop() if i > half else None)
            if i < half:
                kept.append(x)
        return self.model._image(x)


# ---- sections --------------------------------------------------------------------------------------------------------


def case(device, batch, preset=None):
    """The model and its inputs: weights with which neurons fire and every layer has a gradient, as after some training."""
    torch.manual_seed(0)
    model = SDiT(PRESETS[preset or PRESET], variant="improved").to(device)
    for block in model.blocks:
        if block.reconstruction is not None:
            torch.nn.init.xavier_uniform_(block.tokens_out.weight, gain=0.1)
    torch.nn.init.normal_(model.final.weight, std=0.05)
    config = model.config
    x = torch.randn(batch, config.channels, config.image_size, config.image_size, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    return model, (x, t, torch.arange(batch, device=device) % config.num_classes)


def step(model, inputs, target, optimizer=None, dtype=None):
    """One training step: forward, loss, backward, AdamW."""
    with torch.autocast(inputs[0].device.type, dtype=dtype, enabled=dtype is not None):
        loss = (model(*inputs) - target).square().mean()
    loss.backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def agree(args):
    """The gate: outputs and every gradient, in float64."""
    model, inputs = case(args.device, 1)
    model = model.double()
    inputs = inputs[0].double(), *inputs[1:]
    plain = Plain(model)
    target = torch.zeros((), dtype=torch.float64, device=args.device)
    error = check("output", model(*inputs), plain(*inputs), 1e-10, 1e-10)
    step(model, inputs, target)
    step(plain, inputs, target)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        check(f"gradient of {name}", p.grad, q.grad, 1e-8, 1e-10 * q.grad.abs().max().item())
    return {"fp64_max_abs_error": error["max_abs_error"]}


def training(args, settings):
    """A training step: forward, mean squared error, backward, AdamW"""
    error = agree(args)
    model, inputs = case(args.device, args.batch)
    target = torch.randn(model.config.out_channels, *inputs[0].shape[2:], device=args.device)

    def contestant(name, model, dtype=None):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def forward():
            with torch.autocast(args.device, dtype=dtype, enabled=dtype is not None):
                return model(*inputs)

        kept = harness.saved_bytes(forward, exclude=[*model.parameters(), *inputs])[0] // args.batch
        extra = {"saved_per_sample_bytes": kept, **error}
        return Contestant(name, lambda: step(model, inputs, target, optimizer, dtype), extra=extra)

    rows = compare(
        [
            contestant("ours", copy.deepcopy(model)),
            contestant("ours, bf16 autocast", copy.deepcopy(model), torch.bfloat16),
            contestant("plain", Plain(model)),
            contestant("plain, bf16 autocast", Plain(model), torch.bfloat16),
        ],
        **settings,
    )
    ours, bf16, plain, plain_bf16 = rows
    goal("training step fp32, times plain fp32", plain["ratio"], 1.8)
    goal("training step bf16, times plain fp32", plain["median_s"] / bf16["median_s"], 4)
    goal("training step bf16, times plain bf16", plain_bf16["median_s"] / bf16["median_s"], 1)
    for name, other in (("fp32", ours), ("bf16", bf16)):
        share = other["saved_per_sample_bytes"] / plain["saved_per_sample_bytes"]
        goal(f"bytes kept for backward, {name} over plain fp32", share, 0.5, at_least=False)
    return f"{PRESET}, batch {args.batch}", rows


def sampling(args, settings):
    """A sampling step: a forward pass without gradients, the weights frozen"""
    model, inputs = case(args.device, args.batch)
    model.eval()
    frozen = model.frozen()
    frozen.__enter__()

    def contestant(name, model, dtype=None):
        def run():
            with torch.no_grad(), torch.autocast(args.device, dtype=dtype, enabled=dtype is not None):
                return model(*inputs)

        return Contestant(name, run)

    rows = compare(
        [
            contestant("ours", model),
            contestant("ours, bf16 autocast", model, torch.bfloat16),
            contestant("plain", Plain(model)),
            contestant("plain, bf16 autocast", Plain(model), torch.bfloat16),
        ],
        **settings,
    )
    frozen.__exit__(None, None, None)
    goal("sampling step fp32, times plain fp32", ratio(rows, "plain"), 1.6)
    goal("sampling step bf16, times plain fp32", rows[2]["median_s"] / rows[1]["median_s"], 4)
    return f"{PRESET}, batch {args.batch}", rows


def add_arguments(parser):
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of the comparison (default: 5, 2 with --quick)")


def main():
    sections = {"training": training, "sampling": sampling}

    def with_rounds(section):
        def run(args, settings):  # a step takes seconds
            return section(args, settings | {"rounds": args.rounds or (2 if args.quick else 5)})

        run.__doc__ = section.__doc__
        return run

    return harness.run(__doc__, {k: with_rounds(v) for k, v in sections.items()}, add_arguments=add_arguments)


if __name__ == "__main__":
    sys.exit(main())
