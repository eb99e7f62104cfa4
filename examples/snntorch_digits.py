"""Classify scikit-learn's handwritten digits with snnTorch: first with its loop over time steps, then with `unroll`."""

import argparse
import time

import torch
from snntorch import Leaky

from sdit.data import load
from sdit_kernels.compat.snntorch import unroll

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--epochs", type=int, default=5, help="passes over the 1,500 training images (default: %(default)s)")
epochs, steps = p.parse_args().epochs, 25
(x, y), (x_test, y_test) = ((d.images.flatten(1) / 255, d.labels) for d in (load("digits"), load("digits", split="test")))


def run_net(name, fc1, lif1, fc2, lif2, x):
    mem1, mem2, history = lif1.reset_mem(), lif2.reset_mem(), []
    if name == "unroll":
        return unroll(lif2, fc2(unroll(lif1, fc1(x), mem1)[0]), mem2)[1]
    for x_t in x:  # the loop that unroll replaces
        spk1, mem1 = lif1(fc1(x_t), mem1)
        _, mem2 = lif2(fc2(spk1), mem2)
        history.append(mem2)
    return torch.stack(history)


for name in ("loop", "unroll"):
    torch.manual_seed(0)
    net = torch.nn.Linear(64, 500), Leaky(0.9, learn_beta=True), torch.nn.Linear(500, 10), Leaky(0.9)
    optimiser, times = torch.optim.Adam(torch.nn.ModuleList(net).parameters(), lr=2e-3), []
    for batch in torch.cat([torch.randperm(len(y)) for _ in range(epochs)]).split(100):
        spikes, start = torch.bernoulli(x[batch].expand(steps, -1, -1)), time.perf_counter()  # rate coding
        loss = torch.nn.functional.cross_entropy(run_net(name, *net, spikes).flatten(0, 1), y[batch].repeat(steps))
        optimiser.zero_grad(), loss.backward(), optimiser.step(), times.append(time.perf_counter() - start)
    right = (run_net(name, *net, torch.bernoulli(x_test.expand(steps, -1, -1))).sum(0).argmax(1) == y_test).float().mean()
    print(f"{name}: {1e3 * sorted(times)[len(times) // 2]:.1f} ms a step, {right:.1%} right")
