"""Classify scikit-learn's handwritten digits with only the ops: WKV attention over the rows of a digit, then LIF neurons."""

import argparse

import torch

from sdit.data import load
from sdit_kernels import lif, lif_rate, wkv

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--epochs", type=int, default=10, help="passes over the 1,500 training images (default: %(default)s)")
epochs, C, T = p.parse_args().epochs, 64, 4


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kvr, self.hidden, self.out = torch.nn.Linear(8, 3 * C), torch.nn.Linear(8 * C, C), torch.nn.Linear(C, 10)
        self.time_decay, self.time_first = torch.nn.Parameter(torch.zeros(C)), torch.nn.Parameter(torch.zeros(C))
        self.tau = torch.nn.Parameter(torch.full((C,), 2.0))  # one learned time constant per channel

    def forward(self, x):  # (B, 8 rows, 8 pixels)
        k, v, r = self.kvr(x).chunk(3, dim=-1)  # (B, L, C) each; wkv reads the slices without a copy
        y = wkv(self.time_decay, self.time_first, k, v, r=r, bidirectional=True)
        y = lif_rate(4 * y, T=T, residual=y).flatten(1)  # y + firing rates: (B, L * C)
        spikes = lif(self.hidden(y).expand(T, -1, -1), tau=self.tau.clamp(min=1.0))  # (T, B, C)
        return self.out(spikes.mean(0))


torch.manual_seed(0)
(x, y), (x_test, y_test) = ((d.images[..., 0] / 255, d.labels) for d in (load("digits"), load("digits", split="test")))
net = Net()
optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
for epoch in range(1, epochs + 1):
    for batch in torch.randperm(len(y)).split(50):
        loss = torch.nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    print(f"epoch {epoch}: loss {loss:.3f}, {(net(x_test).argmax(1) == y_test).float().mean():.1%} right")
