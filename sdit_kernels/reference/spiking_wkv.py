"""The definition of spiking_wkv: WKV scans whose outputs drive LIF neurons. T time steps, B batch, L tokens, C channels.

The currents have the dtype of the arithmetic, for every dtype of the data.
"""

from ..dtypes import state_dtype
from .neuron import lif
from .wkv import wkv


def spiking_wkv(
    time_decay,
    time_first,
    k,
    v,
    r=None,
    *,
    tau=2.0,
    v_threshold=1.0,
    v_reset=0.0,
    decay_input=True,
    detach_reset=False,
    surrogate="atan",
    alpha=None,
    levels=None,
    log_decay=None,
    scan_state=None,
    membrane=None,
    return_state=False,
    rate=False,
):
    """See :func:`sdit_kernels.spiking_wkv`."""
    T, B = k.shape[:2]
    dtype = state_dtype(k.dtype)
    k_, v_, r_ = (None if t is None else t.to(dtype).flatten(0, 1) for t in (k, v, r))
    if scan_state is not None:
        scan_state = tuple(s.flatten(0, 1) for s in scan_state)
    current, scan_state = wkv(
        time_decay, time_first, k_, v_, r=r_, state=scan_state, return_state=True, log_decay=log_decay
    )  # fmt: skip
    s, membrane = lif(
        current.unflatten(0, (T, B)), membrane, tau=tau, v_threshold=v_threshold, v_reset=v_reset, decay_input=decay_input,
        detach_reset=detach_reset, surrogate=surrogate, alpha=alpha, levels=levels, return_v=True,
    )  # fmt: skip
    s = (s.sum(0) / T if rate else s).to(k.dtype)
    return (s, (tuple(x.unflatten(0, (T, B)) for x in scan_state), membrane)) if return_state else s
