"""Classify scikit-learn's handwritten digits with SpikingJelly, without and with the one line that accelerates it."""

import argparse
import copy
import statistics
import time

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate

from sdit.data import from_uint8, load
from sdit_kernels.compat.spikingjelly import accelerate

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--epochs", type=int, default=3, help="passes over the 1,500 training images (default: %(default)s)")
T, epochs, data = 4, p.parse_args().epochs, [load("digits", split=split, size=16) for split in ("train", "test")]
(x, y), (x_test, y_test) = ((from_uint8(d.images).movedim(3, 1).expand(T, -1, -1, -1, -1), d.labels) for d in data)
torch.manual_seed(0)
net = torch.nn.Sequential(
    layer.Conv2d(1, 32, 3, padding=1), layer.BatchNorm2d(32), neuron.LIFNode(surrogate_function=surrogate.ATan()),
    layer.MaxPool2d(2), layer.Conv2d(32, 64, 3, padding=1), layer.BatchNorm2d(64), neuron.IFNode(), layer.MaxPool2d(2),
    layer.Flatten(), layer.Linear(64 * 16, 128), neuron.ParametricLIFNode(), layer.Linear(128, 10),
)  # fmt: skip
functional.set_step_mode(net, "m")
fused = copy.deepcopy(net)
print(accelerate(fused))  # the line that accelerates the network
for name, model in (("SpikingJelly", net), ("accelerated", fused)):
    optimiser, order, times = torch.optim.Adam(model.parameters(), lr=2e-3), torch.Generator().manual_seed(1), []
    for batch in torch.cat([torch.randperm(len(y), generator=order) for _ in range(epochs)]).split(50):
        start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(model(x[:, batch]).mean(0), y[batch])
        optimiser.zero_grad(), loss.backward(), optimiser.step(), functional.reset_net(model)
        times.append(1e3 * (time.perf_counter() - start))
    functional.reset_net(model.eval())
    right = (model(x_test).mean(0).argmax(1) == y_test).float().mean()
    print(f"{name}: {statistics.median(times):.1f} ms a step, {right:.1%} right")
