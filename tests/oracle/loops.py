"""Every op as loops in numpy float64, with gradients written by hand. This file uses neither autograd nor the library.

T simulation steps, B batch, L tokens, C channels. Each function returns (outputs, backward). ``backward`` takes the gradients
of the outputs in their order (None: zero) and returns a dictionary of gradients by argument. The derivative of a spike is
ds/dh = g(h - v_threshold), where g is the surrogate.

There are two rules for infinities. A value that a select does not take has gradient 0. And 0 times anything is 0 (``times``),
which is the limit, because every surrogate decreases faster than its factor grows.
"""

import numpy as np

from .surrogates import derivative


def times(a, b):
    """Return a * b, or 0 where a is 0."""
    return np.where(a == 0, 0.0, a * np.where(a == 0, 1.0, b))


def zeros_unless(upstream, like):
    return np.zeros(np.shape(like)) if upstream is None else upstream


def sum_to(d, parameter):
    """Sum over the axes along which a parameter was broadcast: a number, or one value per channel or per token."""
    shape = np.shape(parameter)
    d = d.sum(tuple(range(d.ndim - len(shape))))
    return d.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def of_step(p, x, t):
    """Return a parameter at step t. It has a value per step if it has as many axes as x."""
    return p[t if len(p) > 1 else 0] if np.ndim(p) == x.ndim else p


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- neurons ----------------------------------------------------------------------------------------------------------------


def lif(
    x, v=None, *, tau=2.0, v_threshold=1.0, v_reset=0.0, decay_input=True, detach_reset=False, surrogate="atan", alpha=None,
    levels=None,
):  # fmt: skip
    """x (T, ...) -> s (T, ...), v after the last step, v after every step. Gradients: x, v, tau, v_threshold."""
    if levels is not None:
        return _lif_with_levels(
            x, v, tau, v_threshold, v_reset, decay_input, detach_reset, derivative(surrogate, alpha), levels
        )
    T, leaks, g = len(x), 1 / np.asarray(tau, float), derivative(surrogate, alpha)
    thetas = np.asarray(v_threshold, float)
    soft, rest = v_reset is None, 0.0 if v_reset is None else v_reset
    v = np.full(x.shape[1:], rest) if v is None else v
    before, charge, after, spikes = [], [], [], []
    for t in range(T):
        r, theta = of_step(leaks, x, t), of_step(thetas, x, t)
        before.append(v)
        h = v + (x[t] - (v - rest)) * r if decay_input else v - (v - rest) * r + x[t]
        s = h >= theta
        v = h - s * theta if soft else np.where(s, v_reset, h)
        charge.append(h)
        spikes.append(s)
        after.append(v)

    def backward(ds=None, dv_last=None, dv_every=None):
        ds, dv, dv_every = zeros_unless(ds, x), zeros_unless(dv_last, v), zeros_unless(dv_every, x)
        dx, dr, dtheta = np.zeros(x.shape), np.zeros(x.shape), np.zeros(x.shape)
        for t in reversed(range(T)):
            r, theta = of_step(leaks, x, t), of_step(thetas, x, t)
            h, s, slope = charge[t], spikes[t], g(charge[t] - theta)
            dv = dv + dv_every[t]
            if soft:  # v = h - s theta
                dh, d_spike, dtheta[t] = dv, -theta * dv, np.where(s, -dv, 0.0)
            else:  # v = v_reset where s, else h
                dh, d_spike = np.where(s, 0.0, dv), times(dv, v_reset - h)
            if detach_reset:
                d_spike = 0.0
            dz = times(slope, ds[t] + d_spike)  # z = h - theta
            dh, dtheta[t] = dh + dz, dtheta[t] - dz
            if decay_input:  # h = v + (x - (v - rest)) r
                dx[t], dr[t] = dh * r, times(dh, x[t] - (before[t] - rest))
            else:  # h = v - (v - rest) r + x
                dx[t], dr[t] = dh, times(dh, rest - before[t])
            dv = dh * (1 - r)
        return dict(x=dx, v=dv, tau=sum_to(-dr * leaks**2, tau), v_threshold=sum_to(dtheta, v_threshold))

    return (np.array(spikes, float).reshape(x.shape), v, np.array(after).reshape(x.shape)), backward


def _lif_with_levels(x, v, tau, v_threshold, v_reset, decay_input, detach_reset, g, levels):
    """levels: "ternary" for spikes of -1, 0 and 1, or (lo, hi, window, scale) for integers; the last two may be missing."""
    T, r, theta = len(x), 1 / np.asarray(tau, float), np.asarray(v_threshold, float)
    ternary, soft, rest = levels == "ternary", v_reset is None, 0.0 if v_reset is None else v_reset
    lo, hi, window, scale = (-1, 1, None, 1.0) if ternary else (*levels, *(None, 1.0)[len(levels) - 2 :])
    low, high = (lo, hi) if window is None else window
    v = np.full(x.shape[1:], rest) if v is None else v
    before, charge, after, counts = [], [], [], []
    for t in range(T):
        before.append(v)
        h = v + (x[t] - (v - rest)) * r if decay_input else v - (v - rest) * r + x[t]
        if ternary:
            c = (h >= theta) * 1.0 - (-h >= theta)
        else:
            c = np.rint(np.minimum(np.maximum(h / theta, lo), hi)) + 0.0  # not a negative zero
        v = h - c * theta if soft else np.where(c != 0, v_reset, h)
        charge.append(h)
        counts.append(c)
        after.append(v)

    def backward(ds=None, dv_last=None, dv_every=None):
        ds, dv, dv_every = zeros_unless(ds, x), zeros_unless(dv_last, v), zeros_unless(dv_every, x)
        dx, dr, dtheta = np.zeros(x.shape), np.zeros(x.shape), np.zeros(x.shape)
        for t in reversed(range(T)):
            h, c, dv = charge[t], counts[t], dv + dv_every[t]
            if soft:  # v = h - c theta
                dh, d_up, d_down, dtheta[t] = dv, -theta * dv, theta * dv, times(c, -dv)
            else:  # v = v_reset where one of the two fires, else h
                dh, d_up = np.where(c != 0, 0.0, dv), times(dv, v_reset - h)
                d_down = d_up
            if detach_reset:
                d_up = d_down = 0.0
            if ternary:  # c = up - down
                d_up, d_down = times(g(h - theta), d_up + ds[t]), times(g(-h - theta), d_down - ds[t])
                dh, dtheta[t] = dh + d_up - d_down, dtheta[t] - d_up - d_down
            else:  # c = round(clip(h / theta)), s = c scale
                z = h / theta
                dz = np.where((z >= low) & (z <= high), d_up + ds[t] * scale, 0.0)
                dh, dtheta[t] = dh + dz / theta, dtheta[t] - times(dz, z / theta)
            if decay_input:  # h = v + (x - (v - rest)) r
                dx[t], dr[t] = dh * r, times(dh, x[t] - (before[t] - rest))
            else:  # h = v - (v - rest) r + x
                dx[t], dr[t] = dh, times(dh, rest - before[t])
            dv = dh * (1 - r)
        return dict(x=dx, v=dv, tau=sum_to(-dr * r**2, tau), v_threshold=sum_to(dtheta, v_threshold))

    return (np.array(counts, float).reshape(x.shape) * scale, v, np.array(after).reshape(x.shape)), backward


def norm_lif(
    x, weight=None, bias=None, v=None, step_factor=None, *, running=None, eps=1e-5, channel_axis=2, per_step=False, scale=1.0,
    **neuron,
):  # fmt: skip
    """lif behind a normalisation per channel. running: (mean, var), in evaluation.

    Return (s, v after the last step, v after every step, mean, var), backward. Gradients: x, weight, bias, v, step_factor, tau,
    v_threshold.
    """
    y = np.moveaxis(x, channel_axis, -1)  # (T, .., C)
    axes = tuple(range(1 if per_step else 0, y.ndim - 1))
    N = int(np.prod([y.shape[a] for a in axes]))

    def spread(p):
        return p.reshape(p.shape[0], *[1] * (y.ndim - 2), p.shape[1]) if np.ndim(p) == 2 else p

    mean, var = (y.mean(axes), y.var(axes)) if running is None else running
    rstd = spread(1 / np.sqrt(var + eps))
    xhat = (y - spread(mean)) * rstd
    normal = xhat * scale
    gamma = 1.0 if weight is None else spread(weight)
    beta = 0.0 if bias is None else spread(bias)
    steps = 1.0 if step_factor is None else step_factor.reshape(-1, *[1] * (y.ndim - 1))
    (s, *vs), back = lif((normal * gamma + beta) * steps, None if v is None else np.moveaxis(v, channel_axis - 1, -1), **neuron)

    def home(a):
        return np.moveaxis(a, -1, channel_axis - (a.ndim < x.ndim))

    def backward(ds=None, dv_last=None, dv_every=None):
        upstream = ds, dv_last, dv_every
        found = back(*(None if d is None else np.moveaxis(d, channel_axis - (d.ndim < x.ndim), -1) for d in upstream))
        d = found["x"] * steps
        dxhat = d * gamma * scale
        dx = rstd * dxhat
        if running is None:
            dx -= rstd * (dxhat.sum(axes, keepdims=True) / N + xhat * (dxhat * xhat).sum(axes, keepdims=True) / N)
        terms = (found["x"] * (normal * gamma + beta)).sum(tuple(range(1, y.ndim)))
        sums = dict(weight=(d * normal).sum(axes), bias=d.sum(axes), step_factor=terms)
        return found | sums | dict(x=home(dx), v=home(found["v"]))

    return (home(s), *map(home, vs), mean, var), backward


def lif_rate(x, T=4, residual=None, gate=None, **neuron):
    """(...) -> residual + mean over T of lif(sigmoid(gate) x), (...). Gradients: x, residual, gate, tau, v_threshold."""
    share = 1.0 if gate is None else sigmoid(gate)
    (s, _, _), lif_backward = lif(np.stack([share * x] * T), **neuron)
    rate = s.sum(0) / T

    def backward(d):
        found = lif_backward(np.stack([d / T] * T))
        d_current = found["x"].sum(0)
        gradients = dict(x=d_current * share, residual=d, tau=found["tau"], v_threshold=found["v_threshold"])
        if gate is not None:
            gradients["gate"] = d_current * x * share * (1 - share)
        return gradients

    return rate if residual is None else residual + rate, backward


def leaky(x, v=None, *, beta, v_threshold=1.0, reset="subtract", reset_delay=True, surrogate="atan", alpha=None):
    """x (T, ...) -> s, v after the last step, v after every step. Gradients: x, v, beta, v_threshold."""
    T, beta_, theta, g = len(x), np.asarray(beta, float), np.asarray(v_threshold, float), derivative(surrogate, alpha)
    v = np.zeros(x.shape[1:]) if v is None else v
    before, charge, after, spikes = [], [], [], []
    for t in range(T):
        before.append(v)
        r = v > theta  # fired in the step before; no gradient passes through r
        h = beta_ * np.where(r & (reset == "zero"), 0.0, v) + x[t]
        if reset == "subtract":
            h = h - r * theta
        s = h > theta
        v = h
        if not reset_delay and reset == "subtract":
            v = h - (s * 1.0 - r) * theta
        if not reset_delay and reset == "zero":  # v = h - (s - r) h
            v = np.where(s & ~r, 0.0, np.where(r & ~s, 2 * h, h))
        charge.append(h)
        spikes.append(s)
        after.append(v)

    def backward(ds=None, dv_last=None, dv_every=None):
        ds, dv, dv_every = zeros_unless(ds, x), zeros_unless(dv_last, v), zeros_unless(dv_every, x)
        dx, dbeta, dtheta = np.zeros(x.shape), np.zeros(x.shape), np.zeros(x.shape)
        for t in reversed(range(T)):
            h, s, r, slope = charge[t], spikes[t], before[t] > theta, g(charge[t] - theta)
            dv = dv + dv_every[t]
            dh, d_spike = dv, 0.0  # v = h
            if not reset_delay and reset == "subtract":  # v = h - (s - r) theta
                d_spike, dtheta[t] = -theta * dv, -(s * 1.0 - r) * dv
            if not reset_delay and reset == "zero":  # v = h - (s - r) h
                dh, d_spike = times(1.0 - s + r, dv), times(dv, -h)
            dz = times(slope, ds[t] + d_spike)  # z = h - theta
            dh, dtheta[t] = dh + dz, dtheta[t] - dz
            if reset == "subtract":  # h = beta v + x - r theta
                dtheta[t] -= r * dh
            kept = np.where(r & (reset == "zero"), 0.0, before[t])
            dx[t], dbeta[t] = dh, times(dh, kept)
            dv = np.where(r & (reset == "zero"), 0.0, beta_ * dh)
        return dict(x=dx, v=dv, beta=sum_to(dbeta, beta), v_threshold=sum_to(dtheta, v_threshold))

    return (np.array(spikes, float).reshape(x.shape), v, np.array(after).reshape(x.shape)), backward


def lapicque(x, v=None, *, R=1.0, C, time_step=1.0, v_threshold=1.0, reset="subtract", surrogate="atan", alpha=None):
    """x (T, ...) -> s, v after the last step, v after every step. Gradients: x, v, R, C, time_step, v_threshold."""
    T, g = len(x), derivative(surrogate, alpha)
    R_, C_, dt, theta = (np.asarray(p, float) for p in (R, C, time_step, v_threshold))
    v = np.zeros(x.shape[1:]) if v is None else v
    before, after, spikes = [], [], []
    for t in range(T):
        before.append(v)
        r = v > theta  # fired in the step before; no gradient passes through r
        u = x[t] * R_ * (1 / (R_ * C_)) * dt + (1 - dt / (R_ * C_)) * v
        if reset == "subtract":
            u = u - np.where(r, theta, 0.0)
        v = np.where(r & (reset == "zero"), 0.0, u)
        spikes.append(v > theta)
        after.append(v)

    def backward(ds=None, dv_last=None, dv_every=None):
        ds, dv, dv_every = zeros_unless(ds, x), zeros_unless(dv_last, v), zeros_unless(dv_every, x)
        dx, dR, dC, ddt, dtheta = (np.zeros(x.shape) for _ in range(5))
        for t in reversed(range(T)):
            r, z = before[t] > theta, after[t] - theta
            dz = times(g(z), ds[t])
            du = dv + dv_every[t] + dz
            dtheta[t] = -dz
            if reset == "subtract":
                dtheta[t] -= np.where(r, du, 0.0)
            if reset == "zero":
                du = np.where(r, 0.0, du)
            # u = x dt / C + (1 - dt / (R C)) v; R and 1 / R cancel in the first term
            dx[t], dv = du * dt / C_, du * (1 - dt / (R_ * C_))
            dR[t] = times(du, before[t]) * dt / (R_**2 * C_)
            dC[t] = times(du, before[t] / R_ - x[t]) * dt / C_**2
            ddt[t] = times(du, x[t] - before[t] / R_) / C_
        sums = dict(R=sum_to(dR, R), C=sum_to(dC, C), time_step=sum_to(ddt, time_step))
        return dict(x=dx, v=dv, v_threshold=sum_to(dtheta, v_threshold)) | sums

    return (np.array(spikes, float).reshape(x.shape), v, np.array(after).reshape(x.shape)), backward


def cuba(x, i=None, v=None, *, beta_i, beta, v_threshold=1.0, reset="subtract", reset_delay=True, surrogate="atan", alpha=None):
    """x (T, ...) -> s, (i, v) after the last step, (i, v) after every step. Gradients: x, i, v, beta_i, beta, v_threshold."""
    T, g = len(x), derivative(surrogate, alpha)
    bi, b, theta = (np.asarray(p, float) for p in (beta_i, beta, v_threshold))
    i, v = (np.zeros(x.shape[1:]) if state is None else state for state in (i, v))
    before, charge, after, spikes = [], [], [], []
    for t in range(T):
        before.append((i, v))
        r = v > theta  # fired in the step before; no gradient passes through r
        i = bi * i + x[t]
        h = b * v + i
        if reset == "subtract":
            h = h - np.where(r, theta, 0.0)
        if reset == "zero":
            h = np.where(r, 0.0, h)
        s = h > theta
        v = h
        if not reset_delay and reset == "subtract":
            v = h - (s * 1.0 - r) * theta
        if not reset_delay and reset == "zero":
            v = np.where(s, 0.0, h)
        charge.append(h)
        spikes.append(s)
        after.append((i, v))

    def backward(ds=None, di_last=None, dv_last=None, di_every=None, dv_every=None):
        ds, di, dv = zeros_unless(ds, x), zeros_unless(di_last, v), zeros_unless(dv_last, v)
        di_every, dv_every = zeros_unless(di_every, x), zeros_unless(dv_every, x)
        dx, dbi, db, dtheta = (np.zeros(x.shape) for _ in range(4))
        for t in reversed(range(T)):
            h, s, r = charge[t], spikes[t], before[t][1] > theta
            di, dv = di + di_every[t], dv + dv_every[t]
            dh, d_spike = dv, 0.0  # v = h
            if not reset_delay and reset == "subtract":  # v = h - (s - r) theta
                d_spike, dtheta[t] = -theta * dv, -(s * 1.0 - r) * dv
            if not reset_delay and reset == "zero":  # v = 0 where s, else h
                dh, d_spike = np.where(s, 0.0, dv), times(dv, -h)
            dz = times(g(h - theta), ds[t] + d_spike)  # z = h - theta
            dh, dtheta[t] = dh + dz, dtheta[t] - dz
            if reset == "subtract":  # h = beta v + i - r theta
                dtheta[t] -= np.where(r, dh, 0.0)
            if reset == "zero":
                dh = np.where(r, 0.0, dh)
            di = di + dh
            dx[t], dbi[t], db[t] = di, times(di, before[t][0]), times(dh, before[t][1])
            di, dv = di * bi, dh * b
        return dict(
            x=dx, i=di, v=dv, beta_i=sum_to(dbi, beta_i), beta=sum_to(db, beta), v_threshold=sum_to(dtheta, v_threshold)
        )

    seqs = [np.array(states).reshape(x.shape) for states in (zip(*after) if T else ((), ()))]
    return (np.array(spikes, float).reshape(x.shape), i, v, *seqs), backward


def adlif(x, v=None, w=None, *, beta, beta_w, a, b, v_threshold=1.0, surrogate="atan", alpha=None):
    """x (T, ...) -> s, (v, w) after the last step, (v, w) after every step. Gradients: of every tensor argument."""
    T, g = len(x), derivative(surrogate, alpha)
    bv, bw, a_, b_, theta = (np.asarray(p, float) for p in (beta, beta_w, a, b, v_threshold))
    v, w = (np.zeros(x.shape[1:]) if state is None else state for state in (v, w))
    before, charge, after, spikes = [], [], [], []
    for t in range(T):
        before.append((v, w))
        h = bv * v + (1 - bv) * (x[t] - w)
        s = h >= theta
        v = np.where(s, 0.0, h)
        w = bw * w + (1 - bw) * (a_ * v + np.where(s, b_, 0.0))
        charge.append(h)
        spikes.append(s)
        after.append((v, w))

    def backward(ds=None, dv_last=None, dw_last=None, dv_every=None, dw_every=None):
        ds, dv, dw = zeros_unless(ds, x), zeros_unless(dv_last, v), zeros_unless(dw_last, v)
        dv_every, dw_every = zeros_unless(dv_every, x), zeros_unless(dw_every, x)
        dx, dbv, dbw, da, db, dtheta = (np.zeros(x.shape) for _ in range(6))
        for t in reversed(range(T)):
            h, s, (v0, w0), v1 = charge[t], spikes[t], before[t], after[t][0]
            dv, dw = dv + dv_every[t], dw + dw_every[t]
            # w = beta_w w0 + (1 - beta_w) (a v1 + b s)
            drive = dw * (1 - bw)
            dbw[t] = times(dw, w0 - (a_ * v1 + np.where(s, b_, 0.0)))
            da[t], db[t] = times(drive, v1), np.where(s, drive, 0.0)
            dv = dv + drive * a_
            # v1 = 0 where s, else h
            dh, d_spike = np.where(s, 0.0, dv), drive * b_ + times(dv, -h)
            dz = times(g(h - theta), ds[t] + d_spike)
            dtheta[t], dh = -dz, dh + dz
            # h = beta v0 + (1 - beta) (x - w0)
            dbv[t] = times(dh, v0 - (x[t] - w0))
            dx[t], dv, dw = dh * (1 - bv), dh * bv, dw * bw - dh * (1 - bv)
        found = dict(beta=(dbv, beta), beta_w=(dbw, beta_w), a=(da, a), b=(db, b), v_threshold=(dtheta, v_threshold))
        return dict(x=dx, v=dv, w=dw) | {name: sum_to(d, p) for name, (d, p) in found.items()}

    seqs = [np.array(states).reshape(x.shape) for states in (zip(*after) if T else ((), ()))]
    return (np.array(spikes, float).reshape(x.shape), v, w, *seqs), backward


# --- scans ------------------------------------------------------------------------------------------------------------------


def less(a, b):
    """Subtract exponents. The result is -inf where a is -inf, because an empty sum stays empty."""
    return np.where(a == -np.inf, -np.inf, a - np.where(b == -np.inf, 0.0, b))


class Walk:
    """One direction of a scan. N = a e^o and D = b e^o are the sums over the tokens so far, and o is their running maximum.

    k and v are (L, B, C), and ``order`` is the order of the tokens. Initially N = ybar e^lse and D = e^lse.
    """

    def __init__(self, w, k, v, order, ybar, lse):
        self.w, self.k, self.v, self.order, self.ybar, self.lse = w, k, v, order, ybar, lse
        a, b, o = np.where(lse == -np.inf, 0.0, ybar), np.where(lse == -np.inf, 0.0, 1.0), lse
        self.before, self.keep, self.new = {}, {}, {}
        for t in order:
            self.before[t] = a, b, o
            o_ = np.maximum(w + o, k[t])
            keep, new = np.exp(less(w + o, o_)), np.exp(less(k[t], o_))  # one of them is 1
            a, b, o = keep * a + new * v[t], keep * b + new, o_
            self.keep[t], self.new[t] = keep, new
        self.a, self.b, self.o = a, b, o
        seen = b != 0
        self.final = np.where(seen, a / np.where(seen, b, 1), 0.0), np.where(seen, o + np.log(np.where(seen, b, 1)), -np.inf)

    def backward(self, g, y, log_z, d_ybar, d_lse, dk, dv):
        """Add to dk and dv, and return dw (L, B, C), d_ybar, d_lse. For the state, P e^-o = dL/dN and Q e^-o = dL/dD."""
        dw, seen, (ybar, _) = np.zeros(dk.shape), self.b != 0, self.final
        P = np.where(seen, d_ybar / np.where(seen, self.b, 1), 0.0)
        Q = np.where(seen, (d_lse - d_ybar * ybar) / np.where(seen, self.b, 1), 0.0)
        for t in reversed(self.order):
            (a, b, o), keep, new = self.before[t], self.keep[t], self.new[t]
            dk[t] += times(new, P * self.v[t] + Q)
            dv[t] += new * P
            dw[t] = times(keep, P * a + Q * b)
            share = np.exp(less(o, log_z[t]))  # the state's share of the output
            P, Q = keep * P + g[t] * share, keep * Q - times(share, g[t] * y[t])
        some = self.lse != -np.inf
        return dw, np.where(some, P, 0.0), np.where(some, P * np.where(some, self.ybar, 0.0) + Q, 0.0)


def wkv(time_decay, time_first, k, v, r=None, ybar=None, lse=None, *, log_decay=None, bidirectional=False, cu_seqlens=None):
    """k, v (B, L, C) -> out (B, L, C), ybar, lse. Gradients: decay (of the given one), time_first, k, v, r, ybar, lse."""
    if cu_seqlens is not None:
        return _packed(time_decay, time_first, k, v, r, ybar, lse, log_decay, bidirectional, cu_seqlens)
    w = -np.exp(time_decay) if log_decay is None else log_decay
    w = np.maximum(w, -1e20)
    B, L, C = k.shape
    if ybar is None:
        ybar, lse = np.zeros((B, C)), np.full((B, C), -np.inf)
    k_, v_ = np.swapaxes(k, 0, 1), np.swapaxes(v, 0, 1)  # (L, B, C)
    walks = [Walk(w, k_, v_, range(L), ybar, lse)]
    if bidirectional:
        walks.append(Walk(w, k_, v_, range(L)[::-1], ybar, lse))
    y, log_z, own = np.zeros((L, B, C)), np.zeros((L, B, C)), np.zeros((L, B, C))
    for t in range(L):
        states = [walk.before[t] for walk in walks]
        top = time_first + k_[t]
        for _, _, o in states:
            top = np.maximum(top, o)
        e = np.exp(less(time_first + k_[t], top))
        n, z = times(e, v_[t]), e
        for a, b, o in states:
            n, z = n + a * np.exp(less(o, top)), z + b * np.exp(less(o, top))
        seen = z != 0
        y[t] = np.where(seen, n / np.where(seen, z, 1), 0.0)
        log_z[t] = np.where(seen, top + np.log(np.where(seen, z, 1)), -np.inf)
        own[t] = np.exp(less(time_first + k_[t], log_z[t]))  # the token's own share of its output
    share = 1.0 if r is None else sigmoid(np.swapaxes(r, 0, 1))
    out = np.swapaxes(share * y, 0, 1)

    def backward(d_out=None, d_ybar=None, d_lse=None):
        d = np.swapaxes(zeros_unless(d_out, out), 0, 1)
        g = share * d
        dv, du = g * own, times(own, g * (v_ - y))
        dk, dw = du.copy(), 0.0
        ends = zeros_unless(d_ybar, ybar), zeros_unless(d_lse, lse)
        for i, walk in enumerate(walks):
            dw_, d_ybar_, d_lse_ = walk.backward(g, y, log_z, *(ends if i == 0 else (0 * ybar, 0 * ybar)), dk, dv)
            dw = dw + dw_
            if i == 0:
                found = dict(ybar=d_ybar_, lse=d_lse_)
        dw = sum_to(dw, w)
        found |= dict(k=np.swapaxes(dk, 0, 1), v=np.swapaxes(dv, 0, 1), time_first=sum_to(du, w))
        found["decay"] = np.where(w == -1e20, 0.0, dw * w) if log_decay is None else dw
        if r is not None:
            found["r"] = np.swapaxes(times(d * share * (1 - share), y), 0, 1)
        return found

    return (out, *walks[0].final), backward


def _packed(decay, first, k, v, r, ybar, lse, log_decay, bidirectional, cu_seqlens):
    """Call wkv for each sequence, add the gradients of parameters, and concatenate all other gradients."""
    parts = []
    for i, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        one = slice(i, i + 1)
        parts.append(
            wkv(
                decay, first, k[:, a:b], v[:, a:b], None if r is None else r[:, a:b], None if ybar is None else ybar[one],
                None if lse is None else lse[one], log_decay=log_decay, bidirectional=bidirectional,
            )
        )  # fmt: skip
    outputs = [np.concatenate([o[i] for o, _ in parts], axis) for i, axis in ((0, 1), (1, 0), (2, 0))]

    def backward(d_out=None, d_ybar=None, d_lse=None):
        found = []
        for i, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
            d = (None if d_out is None else d_out[:, a:b], *(None if t is None else t[i : i + 1] for t in (d_ybar, d_lse)))
            found.append(parts[i][1](*d))
        sums = {n: sum(f[n] for f in found) for n in ("decay", "time_first")}
        axes = {n: 0 if n in ("ybar", "lse") else 1 for n in found[0] if n not in sums}
        return sums | {n: np.concatenate([f[n] for f in found], axis) for n, axis in axes.items()}

    return tuple(outputs), backward


def spiking_wkv(
    time_decay, time_first, k, v, r=None, ybar=None, lse=None, membrane=None, *, log_decay=None, rate=False, **neuron
):
    """k, v (T, B, L, C) -> out, ybar (T, B, C), lse, membrane (B, L, C). In each step the output of a scan drives a neuron."""
    T = len(k)
    scans = []
    for t in range(T):
        state = (None, None) if ybar is None else (ybar[t], lse[t])
        scans.append(wkv(time_decay, time_first, k[t], v[t], None if r is None else r[t], *state, log_decay=log_decay))
    current = np.stack([outputs[0] for outputs, _ in scans])
    (s, v_last, _), lif_backward = lif(current, membrane, **neuron)
    out = s.sum(0) / T if rate else s

    def backward(d_out=None, d_ybar=None, d_lse=None, d_membrane=None):
        d_out = zeros_unless(d_out, out)
        found = lif_backward(np.stack([d_out / T] * T) if rate else d_out, d_membrane)
        steps = []
        for t, (_, scan_backward) in enumerate(scans):
            steps.append(scan_backward(found["x"][t], *(None if d is None else d[t] for d in (d_ybar, d_lse))))
        gradients = {n: sum(f[n] for f in steps) for n in ("decay", "time_first")}
        gradients |= {n: np.stack([f[n] for f in steps]) for n in steps[0] if n not in gradients}
        return gradients | dict(membrane=found["v"], tau=found["tau"], v_threshold=found["v_threshold"])

    return (out, *(np.stack([outputs[i] for outputs, _ in scans]) for i in (1, 2)), v_last), backward


# --- around the scan --------------------------------------------------------------------------------------------------------


def token_shift(x, mixes, norm_eps=None, last=None):
    """x (B, L, C) -> one tensor for each mix. Gradients: x, last (B, C), mixes (a list)."""
    B, L, C = x.shape
    rows = np.concatenate([np.zeros((B, 1, C)) if last is None else last[:, None], x], 1)
    if norm_eps is None:
        normed = rows
    else:
        centred = rows - rows.mean(-1, keepdims=True)
        inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + norm_eps)
        normed = centred * inverse
    now, before = normed[:, 1:], normed[:, :-1]
    outputs = [now * m + before * (1 - m) for m in mixes]

    def backward(*ds):
        d = np.zeros(rows.shape)
        for m, upstream in zip(mixes, ds):
            d[:, 1:] += upstream * m
            d[:, :-1] += upstream * (1 - m)
        if norm_eps is not None:  # normalisation removes the mean and the part parallel to the normalised row from the gradient
            d = inverse * (d - d.mean(-1, keepdims=True) - normed * (d * normed).mean(-1, keepdims=True))
        return dict(x=d[:, 1:], last=d[:, 0], mixes=[sum_to(upstream * (now - before), m) for m, upstream in zip(mixes, ds)])

    return outputs, backward


def relu_squared(x):
    return np.where(x <= 0, 0.0, x) ** 2, lambda d: dict(x=d * 2 * np.where(x <= 0, 0.0, x))
