"""Classify scikit-learn's handwritten digits with a neuron written in five lines: KLIF, which learns a factor per channel."""

import argparse

import torch

from sdit.data import load
from sdit_kernels import neuron
from sdit_kernels.nn import OverTime, reset

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--epochs", type=int, default=10, help="passes over the 1,500 training images (default: %(default)s)")
epochs, C, T = p.parse_args().epochs, 128, 4


def klif(x, s, p, o):  # Jiang and Zhang, arXiv 2302.09238, with a soft reset
    h = s.v + (x - s.v) * 0.5
    f = o.maximum(p.k * h, 0.0)
    fired = o.fire(f - 1.0)
    return fired, f - fired * 1.0


torch.manual_seed(0)
(x, y), (x_test, y_test) = ((d.images.flatten(1) / 255, d.labels) for d in (load("digits"), load("digits", split="test")))
neurons = neuron.define(klif, parameters=("k",)).module(k=torch.nn.Parameter(torch.ones(C)))
net = torch.nn.Sequential(OverTime(torch.nn.Linear(64, C)), neurons, OverTime(torch.nn.Linear(C, 10)))
optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)


def classify(x):
    reset(net)
    return net(2 * x.expand(T, -1, -1)).mean(0)  # the image is the current of every step


for epoch in range(1, epochs + 1):
    for batch in torch.randperm(len(y)).split(50):
        loss = torch.nn.functional.cross_entropy(classify(x[batch]), y[batch])
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    print(f"epoch {epoch}: loss {loss:.3f}, {(classify(x_test).argmax(1) == y_test).float().mean():.1%} right")
