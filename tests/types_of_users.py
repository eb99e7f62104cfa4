"""The types that a type checker sees in users' code. mypy reads this file (make check), and it never runs."""

import torch
from torch import Tensor
from typing_extensions import assert_type

from sdit_kernels import (
    SURROGATES,
    Levels,
    backend,
    cuba,
    lapicque,
    lif,
    lif_rate,
    neuron,
    nn,
    relu_squared,
    spiking_wkv,
    token_shift,
    wkv,
    wkv_state_from_rwkv,
    wkv_state_to_rwkv,
    wkv_step,
    wkv_step_,
)
from sdit_kernels.compat import rwkv, vision_rwkv

x, w = torch.ones(4, 2, 3), torch.zeros(3)
state = (w, w)

assert_type(lif(x), Tensor)
assert_type(lif(x, None, tau=w, v_reset=None, surrogate=torch.sigmoid), Tensor)
assert_type(lif(x, return_v=True), tuple[Tensor, Tensor])
assert_type(lif(x, return_v_seq=True, alpha=2.0), tuple[Tensor, Tensor])
assert_type(lif(x, return_v=True, return_v_seq=True), tuple[Tensor, Tensor, Tensor])
assert_type(lif(x, v_reset=None, levels=(0, 4)), Tensor)
assert_type(lif(x, levels="ternary", spike_dtype=torch.int8, return_v=True), tuple[Tensor, Tensor])
assert_type(lapicque(x, C=2.0, return_v=True), tuple[Tensor, Tensor])
assert_type(cuba(x, beta_i=0.5, beta=w), Tensor)
assert_type(cuba(x, (w, None), beta_i=0.5, beta=w, return_state=True), tuple[Tensor, tuple[Tensor, Tensor]])
own = neuron.define(lambda x, s, p, o: (o.fire(x), s.v), parameters=("k",))
assert_type(own(x, k=w), Tensor)
assert_type(own(x, k=w, return_state=True), tuple[Tensor, tuple[Tensor, ...]])
assert_type(own.module(k=1.0).forward(x), Tensor)
assert_type(lif_rate(x, 4, residual=x), Tensor)
assert_type(lif_rate(x, 1, tau=1.0, v_reset=None, levels=Levels(0, 4, scale=0.25)), Tensor)
assert_type(wkv(w, w, x, x, r=x), Tensor)
assert_type(wkv(w, w, x, x, x), Tensor)
assert_type(wkv(None, w, x, x, log_decay=w, state=state, return_state=True), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(wkv_step(w, w, x[0], x[0], state), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(wkv_step_(w, w, x[0], x[0], state), Tensor)
assert_type(wkv_state_to_rwkv(*wkv_state_from_rwkv(w, w, w)), tuple[Tensor, Tensor, Tensor])
assert_type(spiking_wkv(w, w, x, x, x, rate=True), Tensor)
assert_type(spiking_wkv(w, w, x, x, r=x), Tensor)
assert_type(spiking_wkv(w, w, x, x, tau=3.0, return_state=True), tuple[Tensor, tuple[tuple[Tensor, Tensor], Tensor]])
assert_type(token_shift(x, w, norm_eps=1e-5), tuple[Tensor, ...])
assert_type(relu_squared(x), Tensor)
assert_type(SURROGATES["atan"].alpha, float)
with backend("reference"):
    assert_type(nn.LIFRate(T=4).T, int)
assert_type(nn.LIF().forward(x), Tensor)
assert_type(rwkv.RUN_CUDA(4, 2, 3, w, w, x, x), Tensor)
assert_type(rwkv.RUN_CUDA(4, 2, 3, w, w, x, x, x), tuple[Tensor, Tensor])
assert_type(vision_rwkv.RUN_CUDA(4, 2, 3, w, w, x, x), Tensor)
assert_type(vision_rwkv.RUN_CUDA(w, w, x, x), Tensor)
assert_type(rwkv.accelerate(nn.LIF()).replaced, tuple[tuple[str, str], ...])
