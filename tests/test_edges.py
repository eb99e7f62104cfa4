"""Every op at the edges: unusual defaults of torch, extreme numbers, infinities, arguments given both ways."""

import pytest
import torch

from sdit_kernels import backend, spiking_wkv, wkv

BACKENDS = ["cpu", "triton", "reference"]


@pytest.mark.parametrize("name", BACKENDS)
def test_the_gate_by_position_and_by_name(name):
    k, v, r = torch.randn(3, 2, 1, 5, 4).unbind(0)
    w, u = torch.randn(2, 4)
    with backend(name):
        assert torch.equal(wkv(w, u, k[:, 0], v[:, 0], r[:, 0]), wkv(w, u, k[:, 0], v[:, 0], r=r[:, 0]))
        assert torch.equal(spiking_wkv(w, u, k, v, r), spiking_wkv(w, u, k, v, r=r))
