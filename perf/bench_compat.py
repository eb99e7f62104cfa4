"""The drop-ins: models of other libraries before and after ``accelerate``.

    python perf/bench_compat.py --json perf/results/compat_rwkv.json --only rwkv_step,rwkv_layer,rwkv_decode
    python perf/bench_compat.py --quick

Both models have the same weights, and their outputs and gradients are compared before any time counts.
"""

import copy
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness
from perf.harness import Contestant, check, compare, goal, missing, ratio

# ---- transformers' RWKV ------------------------------------------------------------------------------------------------


def rwkv_pair(device, **config):
    """transformers' model with random weights, and the accelerated one on a copy of them."""
    from transformers import RwkvConfig, RwkvForCausalLM

    from sdit_kernels.compat import rwkv

    torch.manual_seed(0)
    theirs = RwkvForCausalLM(RwkvConfig(context_length=1024, bos_token_id=0, eos_token_id=None, **config))
    for p in theirs.parameters():  # initial values make some products zero
        p.data += 0.02 * torch.randn_like(p)
    theirs = theirs.to(device)
    ours = copy.deepcopy(theirs)
    rwkv.accelerate(ours)
    return theirs, ours


def contest(contestants, args, settings, baseline):
    reason = missing("transformers")
    contestants = [c._replace(skip=reason) for c in contestants] if reason else contestants
    rounds = 3 if args.quick else 7
    return compare(contestants, **settings | {"rounds": rounds, "min_time": settings["min_time"] / 5}, baseline=baseline)


def step(model, *inputs, **arguments):
    """Forward and backward; returns the result and the gradients of the parameters."""
    out = model(*inputs, **arguments)
    loss = out.loss if hasattr(out, "loss") else out[0].square().mean()
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def against_theirs(name, theirs, ours, run, args, settings, products=None):
    """Check, then time and weigh one of each kind; ``products``: what the matrix products alone cost both."""
    error = check(name, run(ours), run(theirs), rtol=1e-3, atol=1e-5)
    forward = [lambda model=model: run(model, backward=False) for model in (theirs, ours)]
    kept = [harness.saved_bytes(f, [*m.parameters()])[0] for f, m in zip(forward, (theirs, ours), strict=True)]
    contestants = [
        Contestant("accelerated", lambda: run(ours), extra={"saved_bytes": kept[1]} | error),
        Contestant("transformers", lambda: run(theirs), extra={"saved_bytes": kept[0]}),
    ]
    if products:
        contestants.append(Contestant("the matrix products of both", products))
    return contest(contestants, args, settings, "accelerated")


def skipped():
    return [{"name": name, "note": f"skipped: {missing('transformers')}"} for name in ("accelerated", "transformers")]


def rwkv_step(args, settings):
    """A whole model, L = 512: loss, forward and backward; the bytes that a forward pass keeps"""
    what = "rwkv model (2, 512), 4 layers of 256 channels, forward+backward"
    if missing("transformers"):
        goal(f"{what}, times transformers", None, 5)
        return what, skipped()
    theirs, ours = rwkv_pair(args.device, vocab_size=256, hidden_size=256, num_hidden_layers=4)
    ids = torch.randint(256, (2, 512), device=args.device)

    def run(model, backward=True):
        return step(model, ids, labels=ids) if backward else model(ids, labels=ids).loss

    rows = against_theirs("model", theirs.train(), ours.train(), run, args, settings)
    goal(f"{what}, times transformers", ratio(rows, "transformers"), 5)
    return what, rows


def rwkv_layer(args, settings):
    """One time mix of the size of the 169M model's, L = 512, forward and backward"""
    what = "rwkv time mix (2, 512, 768), forward+backward"
    if missing("transformers"):
        return what, skipped()
    theirs, ours = (
        m.rwkv.blocks[0].attention for m in rwkv_pair(args.device, vocab_size=8, hidden_size=768, num_hidden_layers=2)
    )
    x = torch.randn(2, 512, 768, device=args.device)

    def run(layer, backward=True):
        return step(layer, x) if backward else layer(x)[0]

    def products():
        y = ours.output(ours.key(x) + ours.value(x) + ours.receptance(x))
        return torch.autograd.grad(y, [p for p in ours.parameters() if p.dim() == 2], y)

    return what, against_theirs("time mix", theirs, ours, run, args, settings, products)


def rwkv_decode(args, settings):
    """Inference: a prompt of 512 tokens with its state, and 16 tokens one by one from there, batch of one"""
    title = "rwkv, 4 layers of 256 channels, batch 1"
    if missing("transformers"):
        goal("rwkv token by token, times transformers", None, 0.9)
        return title, skipped()
    theirs, ours = (m.eval() for m in rwkv_pair(args.device, vocab_size=256, hidden_size=256, num_hidden_layers=4))
    ids = torch.randint(256, (1, 528), device=args.device)

    @torch.inference_mode()
    def prompt(model):
        return model(ids[:, :512], use_cache=True)

    @torch.inference_mode()
    def decode(model, state):
        state, logits = [s.clone() for s in state], []
        for t in range(512, 528):
            out = model(ids[:, t : t + 1], state=state, use_cache=True)
            state, logits = out.state, [*logits, out.logits]
        return torch.cat(logits, 1)

    first, second = prompt(ours), prompt(theirs)
    error = check("prompt", first.logits, second.logits, rtol=1e-3, atol=1e-4)
    rows = contest(
        [Contestant("accelerated", lambda: prompt(ours), extra={"what": "prompt"} | error),
         Contestant("transformers", lambda: prompt(theirs), extra={"what": "prompt"})],
        args, settings, "accelerated",
    )  # fmt: skip
    error = check("decode", decode(ours, first.state), decode(theirs, second.state), rtol=1e-3, atol=1e-4)
    rows += contest(
        [Contestant("accelerated", lambda: decode(ours, first.state), extra={"what": "16 tokens"} | error),
         Contestant("transformers", lambda: decode(theirs, second.state), extra={"what": "16 tokens"})],
        args, settings, "accelerated",
    )  # fmt: skip
    goal("rwkv token by token, times transformers", ratio(rows[2:], "transformers"), 0.9)
    return title, rows


SECTIONS = {"rwkv_step": rwkv_step, "rwkv_layer": rwkv_layer, "rwkv_decode": rwkv_decode}

if __name__ == "__main__":
    sys.exit(harness.run(__doc__, SECTIONS))
