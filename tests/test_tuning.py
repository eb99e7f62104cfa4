"""The record of tuning numbers: which threads see it, and a change of it between the forward and the backward pass."""

import threading

import pytest
import torch

from sdit_kernels import backend, spiking_wkv, wkv
from sdit_kernels.tuning import Tuning, current, tuned


def test_a_block_changes_the_record_and_restores_it():
    before = current()
    with pytest.raises(KeyError), tuned(wkv_held_tokens=4):
        assert current() == before._replace(wkv_held_tokens=4)
        with tuned(Tuning(), wkv_threads=32):
            assert current() == Tuning(wkv_threads=32)
        assert current() == before._replace(wkv_held_tokens=4)
        raise KeyError
    assert current() is before
    with pytest.raises(ValueError, match="tuned takes the fields .*, got tile"), tuned(tile=4):
        pass


def test_other_threads_see_the_record():
    """A backward pass on a GPU runs on another thread than the forward pass."""
    seen = []
    with tuned(wkv_threads=32):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        assert seen == [current()]


@pytest.mark.parametrize("op", ["wkv", "spiking_wkv"])
def test_a_backward_pass_with_other_numbers_recomputes_its_checkpoint(op):
    """The record sets how many tokens lie between the rows of a checkpoint.

    A checkpoint with other distances must not be used.
    """
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 3, 40, 9, generator=generator)
    if op == "wkv":
        k, v = k[0], v[0]
    w, u = torch.zeros(9), torch.zeros(9)
    found = []
    for first, second in ((4, 4), (8, 4), (4, 8)):
        x = k.clone().requires_grad_()
        with backend("cpu"), tuned(wkv_checkpoint_tokens=first):
            out = {"wkv": wkv, "spiking_wkv": spiking_wkv}[op](w, u, x, v)
        with backend("cpu"), tuned(wkv_checkpoint_tokens=second):
            out.backward(torch.ones_like(out))
        found.append(x.grad)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
