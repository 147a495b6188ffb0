"""The formulas in plain float64 NumPy, written from the papers; shares no code with the package.

Loops on purpose: one line of code per line of formula. Gradients are analytic where a stop-gradient makes
the loss no ordinary function, and central differences where it is one.
"""

import math

import numpy as np

# --- channel 1 ---------------------------------------------------------------------------------------------


def advantages(rewards, size, scale="group", eps=1e-4, ddof=1, singleton="zero"):
    """(R - mean) / (std + eps) in each group; nan = not scored."""
    rewards = np.asarray(rewards, dtype=np.float64)
    result = np.zeros_like(rewards)
    every = [r for r in rewards if not math.isnan(r)]
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        scored = [r for r in group if not math.isnan(r)]
        for i, reward in enumerate(group):
            if math.isnan(reward):
                continue
            if len(scored) == 1 and singleton == "zero":
                continue
            mean = 0.0 if len(scored) == 1 else sum(scored) / len(scored)
            if scale == "none":
                divisor = 1.0
            elif scale == "batch":
                divisor = deviation(every, ddof) + eps
            else:
                divisor = (1.0 if len(scored) == 1 else deviation(scored, ddof)) + eps
            result[start + i] = (reward - mean) / divisor
    return result


def deviation(values, ddof):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def policy(logp, old, adv, mask, *, level, surrogate, low, high, dual=None, clamp=None):
    """Return per-token values and their derivative with respect to that token's logp.

    `low` and `high` are the bounds of the ratio itself. The sequence level is differentiated through the
    token form sg[s] pi/sg[pi].
    """
    values, gradient = np.zeros_like(logp), np.zeros_like(logp)
    for b in range(logp.shape[0]):
        tokens = [t for t in range(logp.shape[1]) if mask[b, t]]
        mean = sum(logp[b, t] - old[b, t] for t in tokens) / max(len(tokens), 1)
        for t in tokens:
            log_ratio = mean if level == "sequence" else logp[b, t] - old[b, t]
            held = clamp is not None and not clamp[0] <= log_ratio <= clamp[1]
            if held:
                log_ratio = min(max(log_ratio, clamp[0]), clamp[1])
            ratio, a = math.exp(log_ratio), adv[b, t]
            bounded = min(max(ratio, low), high)
            if surrogate == "cispo":
                values[b, t], gradient[b, t] = -bounded * a * logp[b, t], -bounded * a
                continue
            if ratio * a <= bounded * a:
                value, slope = -ratio * a, 0.0 if held else -ratio * a
            else:
                value, slope = -bounded * a, 0.0
            if dual is not None and a < 0 and value > -dual * a:
                value, slope = -dual * a, 0.0
            values[b, t], gradient[b, t] = value, slope
    return values, gradient


def k3(logp, ref, mask):
    d = np.where(mask, ref - logp, 0.0)
    return np.where(mask, np.exp(d) - d - 1, 0.0), np.where(mask, 1 - np.exp(d), 0.0)


def reduce(values, mask, how, constant=None):
    """Return the scalar of one batch."""
    rows = [[values[b, t] for t in range(values.shape[1]) if mask[b, t]] for b in range(values.shape[0])]
    if how == "sequence_mean":
        return sum(sum(r) / len(r) for r in rows if r) / len(rows)
    if how == "constant_length":
        return sum(sum(r) for r in rows) / (len(rows) * constant)
    return sum(sum(r) for r in rows) / sum(len(r) for r in rows)


# --- channel 2 ---------------------------------------------------------------------------------------------


def softmax(logits, temperature=1.0):
    z = np.asarray(logits, dtype=np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(s, t, alpha, entry_clip=None):
    """Divergence of two distributions (lists of probabilities)."""
    total = 0.0
    for p_s, p_t in zip(s, t, strict=True):
        if alpha == 0:
            entry = kl_entry(p_t, p_s)
        elif alpha == 1:
            entry = kl_entry(p_s, p_t)
        else:
            m = (1 - alpha) * p_s + alpha * p_t
            entry = alpha * kl_entry(p_t, m) + (1 - alpha) * kl_entry(p_s, m)
        total += entry if entry_clip is None else min(entry, entry_clip)
    return total


def kl_entry(p, q):
    if p == 0:
        return 0.0
    return math.inf if q == 0 else p * math.log(p / q)


def full(student_logits, teacher_logits, alpha, temperature=1.0, entry_clip=None):
    s, t = softmax(student_logits, temperature), softmax(teacher_logits, temperature)
    return np.array([divergence(a, b, alpha, entry_clip) for a, b in zip(s, t, strict=True)])


def topk(student_logits, teacher_logits, alpha, k, of="student", tail=True, temperature=1.0, entry_clip=None):
    result = []
    for s, t in zip(softmax(student_logits, temperature), softmax(teacher_logits, temperature), strict=True):
        order = sorted(range(len(s)), key=lambda i: -(s if of == "student" else t)[i])[:k]
        rest = [i for i in range(len(s)) if i not in order]
        if tail:
            s, t = [[*p[order], sum(p[i] for i in rest)] for p in (s, t)]
        else:
            s, t = [p[order] / p[order].sum() for p in (s, t)]
        result.append(divergence(s, t, alpha, entry_clip))
    return np.array(result)


# --- channel 3 ---------------------------------------------------------------------------------------------


def dpo(c, c_mask, c_ref, r, r_mask, r_ref, beta, smoothing=0.0, normalize=False, nll=0.0):
    """Return values (P,) and margins (P,)."""
    values, margins = [], []
    for i in range(len(c)):
        if not c_mask[i].any() or not r_mask[i].any():
            values.append(0.0)
            margins.append(0.0)
            continue
        shift_c = float((c[i] - c_ref[i])[c_mask[i]].sum()) / (c_mask[i].sum() if normalize else 1)
        shift_r = float((r[i] - r_ref[i])[r_mask[i]].sum()) / (r_mask[i].sum() if normalize else 1)
        delta = beta * (shift_c - shift_r)
        value = (1 - smoothing) * math.log1p(math.exp(-delta)) + smoothing * math.log1p(math.exp(delta))
        values.append(value - nll * c[i][c_mask[i]].mean())
        margins.append(delta)
    return np.array(values), np.array(margins)


# --- gradients ---------------------------------------------------------------------------------------------


def central(function, x, step=1e-5):
    """Gradient of the scalar `function` at `x` by central differences."""
    x = np.array(x, dtype=np.float64)
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + step
        above = function(x)
        x[i] = kept - step
        gradient[i] = (above - function(x)) / (2 * step)
        x[i] = kept
    return gradient


# --- token log-probabilities --------------------------------------------------------------------------------


def row_logprobs(table, previous, ids, temperature):
    """Log-probabilities (T,) of `ids` after the tokens `previous`, from a (V, V) table of logits."""
    logits = np.asarray(table, dtype=np.float64)[list(previous)] / temperature
    highest = logits.max(-1, keepdims=True)
    logits = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    return logits[np.arange(len(ids)), list(ids)]


# --- outer loop ---------------------------------------------------------------------------------------------


def outer(local, start, *, lr=0.7, momentum=0.9, nesterov=True):
    """DiLoCo's outer step (arXiv:2311.08105, algorithm 1, SGD with Nesterov momentum): theta after each round.

    `local` (rounds, islands, size) holds every island's parameters just before each sync, `start` (size,) theta_0.
    """
    theta, velocity, found = np.asarray(start, dtype=np.float64), 0.0, []
    for islands in np.asarray(local, dtype=np.float64):
        gradient = sum(theta - one for one in islands) / len(islands)
        velocity = momentum * velocity + gradient
        theta = theta - lr * (gradient + momentum * velocity if nesterov else velocity)
        found.append(theta)
    return np.array(found)
