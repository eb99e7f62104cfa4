"""The diffusion process and the training objective.

q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), abar_t = prod_{s <= t} (1 - beta_s), t = 0 .. 999, beta linear from 1e-4 to
2e-2. The network predicts the noise eps, or v. With ``learn_sigma`` it also predicts the log variance of p(x_{t-1} | x_t), as a
position between its lower and upper limit (Nichol and Dhariwal, arXiv 2102.09672). With ``prediction="flow"`` the path from an
image to noise is a straight line, x_t = (1 - s) x_0 + s eps, s = t / 1000; a sampler then solves an ordinary differential
equation from noise to image.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["STEPS", "add_noise", "draw", "training_loss"]

STEPS = 1000
BETAS = (1e-4, 2e-2)
_MAX_SNR = 5  # gamma of Min-SNR, the value of its paper


@lru_cache(maxsize=16)
def _flow_tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (1 - s, s) of flow for the times 1 .. 1000, (1000,) each."""
    s = torch.arange(1, STEPS + 1, dtype=torch.float64, device="cpu") / STEPS
    return (1 - s).to(device, dtype), s.to(device, dtype)


class Tables(NamedTuple):
    """Coefficients of the diffusion for every time t, (1000,) each, computed in float64."""

    signal: Tensor  # sqrt(abar): x_t = signal x_0 + sigma eps
    sigma: Tensor  # sqrt(1 - abar)
    shift: Tensor  # beta / (sqrt(alpha) sigma): the mean of q(x_{t-1} | x_t, x_0) is x_t / sqrt(alpha) - shift eps
    log_beta: Tensor  # upper limit of the log variance of a reverse step
    log_posterior: Tensor  # its lower limit, from q(x_{t-1} | x_t, x_0); that variance is 0 at t = 0, so t = 1 stands for it


@lru_cache(maxsize=16)
def make_tables(device: torch.device, dtype: torch.dtype) -> Tables:
    beta = torch.linspace(*BETAS, STEPS, dtype=torch.float64, device="cpu")
    abar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), abar[:-1]])
    posterior = beta * (1 - before) / (1 - abar)
    posterior[0] = posterior[1]
    sigma = torch.sqrt(1 - abar)
    tables = Tables(abar.sqrt(), sigma, beta / ((1 - beta).sqrt() * sigma), beta.log(), posterior.log())
    return Tables(*(table.to(device, dtype) for table in tables))


@lru_cache(maxsize=16)
def _logit_normal_times(device: torch.device) -> Tensor:
    """Return a table (1000,) that turns uniform times into times 1000 sigmoid(z - 1), z normal: both have the same quantile."""
    quantiles = (torch.arange(STEPS, dtype=torch.float64, device="cpu") + 0.5) / STEPS
    return (STEPS * torch.sigmoid(torch.special.ndtri(quantiles) - 1)).to(device, torch.int64)


def config_of(model):
    """Return the configuration of a model, also if DistributedDataParallel wraps it."""
    return model.config if hasattr(model, "config") else model.module.config


def draw(config, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    r"""Draw the random inputs of :func:`training_loss`, always in the same order: times, noise, dropped labels.

    If each of several processes draws for the whole batch and takes its slice, they train as one process does.

    Args:
        config: configuration of the model; channels, image_size, dropout_label and times are used.
        n: number of images.
        generator: the only source of randomness.

    Returns:
        t (n,) int64 in 0 .. 999, distributed as config.times says, which changes nothing else; noise (n, C, S, S) float32,
        normal; drop (n,) bool, True with probability dropout_label, where the label becomes the null label. All are on the
        generator's device.

    Raises:
        TypeError: generator is not a torch.Generator.

    Source: logit-normal times: Esser et al., Scaling rectified flow transformers, arXiv 2403.03206.

    Example:
        >>> import torch
        >>> from sdit import PRESETS
        >>> from sdit.diffusion import draw
        >>> t, noise, drop = draw(PRESETS["digits"], 4, torch.Generator().manual_seed(0))
        >>> t.shape, noise.shape, drop.dtype
        (torch.Size([4]), torch.Size([4, 1, 8, 8]), torch.bool)
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    at = {"generator": generator, "device": generator.device}
    t = torch.randint(STEPS, (n,), **at)
    if config.times == "logit_normal":
        t = _logit_normal_times(t.device)[t]
    noise = torch.randn(n, config.channels, config.image_size, config.image_size, dtype=torch.float32, **at)
    drop = torch.rand(n, dtype=torch.float32, **at) < config.dropout_label
    return t, noise, drop


def training_loss(
    model,
    x0: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    drop: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""Compute the training objective: the mean squared error of the prediction plus the variational bound of the variance.

    ::

        x_t       = signal x0 + sigma noise;    prediction, logits = halves of model(x_t, t, y)
        target    = noise                        config.prediction "epsilon"
                    signal noise - sigma x0                        "v"
                    noise - x0                                     "flow"
        mse       = mean (prediction - target)^2
        weight    = 1                            config.weighting "uniform"
                    min(snr, 5) (d x0_hat / d prediction)^2       "min_snr",  snr = (signal / sigma)^2:
                    min(snr, 5) / snr, min(snr, 5) / (snr + 1), min(snr, 5) sigma^2 for the three predictions
        vb        = mean over pixels, in bits, of  KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)),  t > 0
                                                   -log P(x0 | x_1),                              t = 0
        p         = N(posterior mean at eps_hat, exp(f log beta_t + (1 - f) log beta~_t)),  f = (logits + 1) / 2
        P(x0)     = integral of p over x0's level of 256, [x0 - 1/255, x0 + 1/255]; the outermost two reach to infinity
        loss      = mean weight (prediction - target)^2 + vb

    signal and sigma are sqrt(abar_t) and sqrt(1 - abar_t). For "flow" they are 1 - s and s, with s = (t + 1) / 1000, and the
    model receives the time 1000 s. vb detaches eps_hat (for "v": signal v_hat + sigma x_t), so vb trains only the logits. P is
    exact (it does not use the common tanh approximation), and its logarithm is finite for any x0. Without config.learn_sigma
    the model outputs only its prediction, and vb is 0.

    The network runs under the caller's autocast. x_t and the loss stay in float32 (float64 for float64 x0). The CPU does not
    wait for the GPU if t, noise and drop are on the GPU or drawn on it.

    Args:
        model: called as model(x_t, t, y); has a ``config``; DistributedDataParallel may wrap it.
        x0: images (B, C, S, S) in [-1, 1], as :func:`sdit.data.to_batch` makes them.
        y: labels (B,), ints in 0 .. num_classes.
        generator: draws t, noise and drop where they are None, see :func:`draw`.
        t: times (B,), ints in 0 .. 999.
        noise: the shape of x0.
        drop: (B,) bool, True where the label becomes the null label.

    Returns:
        ``{"loss", "mse", "vb"}``, scalars; only loss has a gradient.

    Raises:
        TypeError: a dtype is wrong, or t, noise or drop is missing without a generator.
        ValueError: a shape is wrong, a value is out of range (checked for tensors on the CPU), or the number of output channels
            of the model does not fit its config.

    Source: Nichol and Dhariwal, Improved DDPM, arXiv 2102.09672; Ho et al., DDPM, arXiv 2006.11239. v: Salimans and Ho,
    Progressive distillation, arXiv 2202.00512. Flow: Liu et al., Rectified flow, arXiv 2209.03003. Weights: Hang et al.,
    Min-SNR, arXiv 2303.09556.

    Example:
        >>> import torch
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.diffusion import training_loss
        >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
        >>> x0, y = torch.zeros(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> losses = training_loss(model, x0, y, torch.Generator().manual_seed(0))
        >>> losses["loss"].backward()
        >>> list(losses)
        ['loss', 'mse', 'vb']
    """
    config = config_of(model)
    expected = (config.channels, config.image_size, config.image_size)
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        raise TypeError(
            f"x0 must be a floating-point tensor in [-1, 1], got {getattr(x0, 'dtype', type(x0).__name__)}; see to_batch"
        )
    if x0.ndim != 4 or tuple(x0.shape[1:]) != expected or not len(x0):
        raise ValueError(f"x0 must be (B, {', '.join(map(str, expected))}) with B > 0, got {tuple(x0.shape)}")
    n = len(x0)
    _check_ints("y", y, n, config.num_classes)
    if t is None or noise is None or drop is None:
        drawn = draw(config, n, generator)
        t, noise, drop = (a if a is not None else b for a, b in zip((t, noise, drop), drawn))
    _check_ints("t", t, n, STEPS - 1)
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}")
    if drop.shape != (n,) or drop.dtype != torch.bool:
        raise ValueError(f"drop must be a bool tensor of shape ({n},), got {drop.dtype} of shape {tuple(drop.shape)}")

    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    t, noise, y, drop = t.to(x0.device), noise.to(x0), y.to(x0.device), drop.to(x0.device)
    xt, model_t, tables = add_noise(config, x0, noise, t)
    out = model(xt, model_t, torch.where(drop, config.num_classes, y)).to(x0.dtype)
    if out.shape[1] != (2 if config.learn_sigma else 1) * config.channels:
        outputs = f"{config.prediction} and variance" if config.learn_sigma else config.prediction
        raise ValueError(f"model must output {outputs}, got {out.shape[1]} channels")
    error = out[:, : config.channels] - _target(config.prediction, x0, noise, *tables[:2])
    square = error.square()
    mse = square.mean()
    loss = mse if config.weighting == "uniform" else (_min_snr(config.prediction, *tables[:2]) * square).mean()
    if not config.learn_sigma:
        return {"loss": loss, "mse": mse.detach(), "vb": torch.zeros_like(mse).detach()}
    error = error.detach() if config.prediction == "epsilon" else tables.signal * error.detach()  # of eps
    vb = _variational_bound(tables, x0, error, out[:, config.channels :], t == 0).mean()
    return {"loss": loss + vb, "mse": mse.detach(), "vb": vb.detach()}


def add_noise(config, x0, noise, t):
    """Return (x_t, the time that the model receives, the tables at t). Flow has only the first two tables."""
    flow = config.prediction == "flow"
    make = _flow_tables if flow else make_tables
    if torch.compiler.is_compiling():  # the compiler traces what the cache would hold, and warns about the cache
        make = make.__wrapped__
    every = make(x0.device, x0.dtype)
    tables = tuple(table[t].view(-1, 1, 1, 1) for table in every)
    xt = tables[0] * x0 + tables[1] * noise  # autocast leaves elementwise arithmetic in float32, here and above
    return (xt, t + 1, tables) if flow else (xt, t, Tables(*tables))


def _target(prediction, x0, noise, signal, sigma):
    if prediction == "epsilon":
        return noise
    return noise - x0 if prediction == "flow" else signal * noise - sigma * x0


def _min_snr(prediction, signal, sigma):
    snr = (signal / sigma).square()
    return snr.clamp(max=_MAX_SNR) * (1 / snr if prediction == "epsilon" else sigma.square())


def _check_ints(name, value, n, largest):
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of ints, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one per image, got {tuple(value.shape)}")
    if torch.compiler.is_compiling():
        return
    if value.device.type == "cpu" and n and not (value.min() >= 0 and value.max() <= largest):
        raise ValueError(f"{name} must be in 0..{largest}, got {value.min()}..{value.max()}")


def _variational_bound(tables, x0, error, v, first):
    """Return the variational bound in bits per dimension, elementwise.

    The means of q and p differ by shift times the error of eps_hat. This form avoids the cancellation of large numbers where
    abar is small.
    """
    f = (v + 1) / 2
    log_variance = f * tables.log_beta + (1 - f) * tables.log_posterior
    distance = tables.shift * error  # mean of q - mean of p; the mean of q is x0 itself at t = 0
    d = tables.log_posterior - log_variance
    kl = 0.5 * (torch.expm1(d) - d + distance.square() * torch.exp(-log_variance))
    if first.device.type != "cpu" or torch.compiler.is_compiling():  # nonzero would make the CPU wait for the device
        first = first.view(-1, 1, 1, 1)
        return torch.where(first, -_log_likelihood(x0, distance, log_variance), kl) / math.log(2)
    i = first.nonzero().flatten()  # one image in a thousand; the likelihood of all images took a twelfth of a training step
    if len(i):
        kl = kl.index_put((i,), -_log_likelihood(x0[i], distance[i], log_variance[i]))
    return kl / math.log(2)


def _log_likelihood(x, distance, log_variance):
    """Return the log probability of the level of x, [x - 1/255, x + 1/255], under a normal with mean x - distance."""
    scale = torch.exp(-0.5 * log_variance)
    low, high = (distance - 1 / 255) * scale, (distance + 1 / 255) * scale
    right = distance > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)  # in the lower tail, where log Phi is precise
    log_high = torch.special.log_ndtr(high)
    inner = log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
    lowest, highest = x < -0.999, x > 0.999
    tail = torch.where(lowest, distance + 1 / 255, 1 / 255 - distance) * scale
    return torch.where(lowest | highest, torch.special.log_ndtr(tail), inner)
