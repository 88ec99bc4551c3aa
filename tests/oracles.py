"""The definitions as float64 NumPy, one token at a time, written from the formulas and not from the library.

Rows everywhere: a matrix memory is `y = x @ S` with S [K, V] (spec 0, "Two layouts").
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

TIGHT = 1e-12  # absolute, float64, order-one data
GELU_C = np.sqrt(2 / np.pi)


def float64(tree):
    """Every floating leaf as float64; needs the `x64` fixture."""
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if is_float(x) else x, tree)


def numpy64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def compiled(function, **options):
    """`jax.jit` for programs that run once: the compiler's optimizations would take longer than they save."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def assert_close(got, want, atol=TIGHT):
    """Trees of the same structure, equal to `atol`."""
    got_leaves, got_def = jax.tree.flatten(got)
    want_leaves, want_def = jax.tree.flatten(want)
    assert got_def == want_def
    for a, b in zip(got_leaves, want_leaves, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def primitives(jaxpr, found=None):
    """Names of all primitives of a program and of the programs inside it."""
    found = set() if found is None else found
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                primitives(inner, found)
    return found


def gelu(x):
    return 0.5 * x * (1 + np.tanh(GELU_C * (x + 0.044715 * x**3)))


def gelu_slope(x):
    t = np.tanh(GELU_C * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * GELU_C * (1 + 3 * 0.044715 * x**2)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def l2_unit(a):
    return a / np.sqrt(np.sum(a**2, axis=-1, keepdims=True) + 1e-6)


def mlp_read(params, x, residual=True):
    """(89): x + W1 gelu(W2 x), or a matrix read when there is only `w`."""
    if "w" in params:
        return x @ params["w"]
    y = gelu(x @ params["w2"]) @ params["w1"]
    return x + y if residual else y


def mlp_factors(params, key, delta):
    """Spec 2.3: weight name -> (input of the weight, error at its output), for one token."""
    if "w" in params:
        return {"w": (key, delta)}
    z = key @ params["w2"]
    return {"w1": (gelu(z), delta), "w2": (key, gelu_slope(z) * (params["w1"] @ delta))}


def mlp_gradient(params, key, delta):
    return {name: np.outer(k, d) for name, (k, d) in mlp_factors(params, key, delta).items()}


def write(state, z, key, push, erase=0.0, alpha=1.0, mu=None):
    """(S5.1) for one token: Z <- mu Z + k u^T, S <- (alpha I - b k k^T) S + Z."""
    z = np.outer(key, push) + (0.0 if mu is None else mu * z)
    return alpha * state - erase * np.outer(key, key @ state) + z, z


def proximal(eta, key):
    """eta' of (S3.2)."""
    return eta / (1 + eta * key @ key)


def titans_loop(start, xs, chunk_size, residual=True):
    """T-13, T-14, T-16: surprise with memory, forgetting, errors and reads at the chunk's start.

    `xs` holds key, value and query [T, K or V] and the gates eta, alpha and mu [T]. Reads, and the last weights.
    """
    m, s, ys = start, {n: np.zeros_like(w) for n, w in start.items()}, []
    for t, (key, value) in enumerate(zip(xs.key, xs.value, strict=True)):
        m0 = m if t % chunk_size == 0 else m0  # noqa: F821  (t = 0 comes first)
        gradient = mlp_gradient(m0, key, mlp_read(m0, key, residual) - value)
        s = {n: xs.mu[t] * s[n] - xs.eta[t] * gradient[n] for n in m}
        m = {n: xs.alpha[t] * m[n] + s[n] for n in m}
        ys.append(mlp_read(m0, xs.query[t], residual))
    return np.stack(ys), m


def cms_token(params_by_level, x, target):
    """One token by hand, (S6.1): output, and the gradient of 1/2 ||y - target||^2 to every weight."""
    y, factors = cms_factors(params_by_level, x, target)
    return y, [{n: np.outer(k, d) for n, (k, d) in level.items()} for level in factors]


def cms_factors(params_by_level, x, target):
    """The same gradient per weight as (input of the weight, error at its output)."""
    inputs = []
    for p in params_by_level:
        rms = np.sqrt(np.mean(x**2) + 1e-6)
        n = x / rms
        z = n @ p["w2"]
        inputs.append((x, rms, n, z))
        x = x + gelu(z) @ p["w1"]
    y, g, factors = x, x - target, []
    for p, (before, rms, n, z) in zip(reversed(params_by_level), reversed(inputs), strict=True):
        dz = gelu_slope(z) * (p["w1"] @ g)
        factors.insert(0, {"w1": (gelu(z), g), "w2": (n, dz)})
        dn = p["w2"] @ dz
        g = g + dn / rms - before * (before @ dn) / (g.size * rms**3)
    return y, factors


def independent_token(params_by_level, x, target, logits):
    """One token of independent levels, (74): output, and the gradient of 1/2 ||y - target||^2 to every weight."""
    share = np.exp(logits) / np.exp(logits).sum()
    n = x / np.sqrt(np.mean(x**2) + 1e-6)
    y = x + sum(a * mlp_read(p, n, residual=False) for a, p in zip(share, params_by_level, strict=True))
    return y, [mlp_gradient(p, n, a * (y - target)) for a, p in zip(share, params_by_level, strict=True)]


def nested_cms_loop(start, xs, targets, sizes, eta, *, mu=0.0, first_order=True):
    """Spec 6.5, nested, token by token; all rules are eta / C times a trace of decay mu.

    Returns:
        Outputs, and after every token: weights, start states of all levels but the last, and both pending sums.
    """
    zero = lambda p: {n: np.zeros_like(w) for n, w in p.items()}  # noqa: E731
    add = lambda a, b, scale=1.0: {n: a[n] + scale * b[n] for n in a}  # noqa: E731
    weights, starts = [dict(p) for p in start], [dict(p) for p in start[:-1]]
    pending, trace = [zero(p) for p in start], [zero(p) for p in start]
    start_pending, start_trace = [zero(p) for p in starts], [zero(p) for p in starts]
    ys, history = [], []
    for t in range(len(xs)):
        y, gradients = cms_token(weights, xs[t], targets[t])
        ys.append(y)
        pending = [add(p, g) for p, g in zip(pending, gradients, strict=True)]
        if first_order:
            start_pending = [add(p, g) for p, g in zip(start_pending, gradients[:-1], strict=True)]
        for i, c in enumerate(sizes):  # all write ...
            if (t + 1) % c == 0:
                trace[i] = add(pending[i], trace[i], mu)
                weights[i], pending[i] = add(weights[i], trace[i], -eta / c), zero(weights[i])
        for i, c in enumerate(sizes[1:]):  # ... and then the faster ones start again
            if (t + 1) % c == 0:
                start_trace[i] = add(start_pending[i], start_trace[i], mu)
                starts[i], start_pending[i] = add(starts[i], start_trace[i], -eta / c), zero(starts[i])
                weights[i], trace[i] = dict(starts[i]), zero(starts[i])
        history.append((list(weights), list(starts), list(pending), list(start_pending)))
    return np.stack(ys), history


def cms_loop(start, xs, targets, sizes, eta, token=cms_token):
    """(S6.2) token by token: outputs and the weights after every token."""
    weights = [dict(p) for p in start]
    pending = [{n: np.zeros_like(w) for n, w in p.items()} for p in start]
    ys, history = [], []
    for t in range(len(xs)):
        y, gradients = token(weights, xs[t], targets[t])
        ys.append(y)
        pending = [{n: p[n] + g[n] for n in p} for p, g in zip(pending, gradients, strict=True)]
        for i, c in enumerate(sizes):
            if (t + 1) % c == 0:
                weights[i] = {n: w - eta / c * pending[i][n] for n, w in weights[i].items()}
                pending[i] = {n: np.zeros_like(w) for n, w in weights[i].items()}
        history.append([dict(w) for w in weights])
    return np.stack(ys), history, pending


def self_modifying_loop(config, params, r, mask=None):
    """Spec 7.2-7.5 for a whole stream, one token and one head at a time; reads [T, D]."""
    width, window = config.dim // config.heads, config.conv_window
    ys = np.zeros_like(r)
    for head in range(config.heads):
        cut = slice(head * width, (head + 1) * width)
        start = {b: {n: w[head] for n, w in p.items()} for b, p in params["boxes"].items()}
        run = {b: dict(p) for b, p in start.items()}
        z = {b: {n: np.zeros_like(w) for n, w in p.items()} for b, p in start.items()}
        past = {n: [np.zeros(width)] * max(window - 1, 0) for n in "qkv"}
        usual, surprises = 0.0, []  # of the chunk
        for t in range(len(r)):
            keep = mask is None or mask[t]
            x = (r[t] @ params["in_proj"] if config.heads > 1 else r[t])[cut] / np.sqrt(width)
            made = {}
            for n in "qkv":
                raw = mlp_read(start[n], x) if n in start else (r[t] @ params["static"][n])[cut]
                taps = [*past[n], raw if keep else np.zeros(width)]
                past[n] = taps[1:]
                made[n] = sum(w[head] * a for w, a in zip(params["conv"][n], taps, strict=True)) if window else taps[-1]
            q, k, v = l2_unit(made["q"]), l2_unit(made["k"]), made["v"]
            v = l2_unit(v) if config.value_norm else v

            def gate(name, x=x, head=head, start=start):
                p = params["gates"][name]
                return p["w"][head] @ (mlp_read(start[name], x) if name in start else x) + p["b"][head]

            eta = softplus(gate("eta"))
            alpha = sigmoid(gate("alpha")) if config.retention else 1.0
            if config.surprise is not None:
                value = mlp_read(start["mem"], v) if config.stage == 3 else v
                s = np.linalg.norm(mlp_read(start["mem"], k) - value if config.objective == "l2" else value)
                opened = float(s >= config.surprise * usual)
                if config.surprise_temperature:
                    over = s / usual - config.surprise if usual else np.inf
                    opened = sigmoid(over / config.surprise_temperature)
                surprises += [s] if keep else []
                eta = opened * eta
                alpha = 1 - opened * (1 - alpha) if config.gate_retention else alpha
            mu = sigmoid(gate("mu")) if config.momentum == "gate" else config.momentum
            ys[t, cut] = mlp_read((start if config.read == "start" else run)["mem"], q)
            for b in start:
                if not keep:
                    continue
                value = mlp_read(start[b], v) if config.stage == 3 else v
                e = mlp_read(start[b], k) - value if config.objective == "l2" else -value
                if config.error_clip is not None:
                    e = e * min(1.0, config.error_clip / np.linalg.norm(e))
                for n, (key, delta) in mlp_factors(start[b], k, e).items():
                    own = key if config.mlp_rule == "layerwise" or config.memory == "linear" else k
                    step = proximal(eta, own) if config.exact else eta
                    decays = config.dgd_decay and (n != "w1" or config.mlp_rule == "layerwise")
                    erase = step if decays else 0.0
                    run[b][n], z[b][n] = write(run[b][n], z[b][n], key, -step * delta, erase, alpha, mu)
            for b in start:
                if (t + 1) % (config.chunk_mem if b == "mem" else config.chunk_proj) == 0:
                    start[b] = dict(run[b])
            if (t + 1) % config.chunk_mem == 0 and surprises:
                usual = 0.9 * usual + 0.1 * np.mean(surprises) if usual else np.mean(surprises)
                surprises = []
    return ys


def projected(params, r):
    """Queries, keys and values [T, H, K] of a memory layer: projected, convolved over W tokens, through SiLU."""
    made = []
    for name in "qkv":
        kernel = params["conv"][name]  # [W, H, K]
        window, shape = len(kernel), kernel.shape[1:]
        raw = np.concatenate([np.zeros((window - 1, *shape)), (r @ params[f"w{name}"]).reshape(-1, *shape)])
        made.append(silu(np.stack([np.sum(raw[t : t + window] * kernel, axis=0) for t in range(len(r))])))
    return made


def polar5(x: np.ndarray) -> np.ndarray:
    """Five quintic Newton-Schulz steps of one matrix, on the side with fewer rows (spec 4.6)."""
    if x.shape[0] > x.shape[1]:
        return polar5(x.T).T
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def descend(tx: Any, target: Any, steps: int) -> Any:
    """Parameters after descent from zero to `target`; every update has the dtypes of the gradients."""
    dtypes = jax.tree.map(lambda x: x.dtype, target)

    def step(carry, _):
        params, state = carry
        g = jax.tree.map(lambda p, t: p - t, params, target)
        u, state = tx.update(g, state, params, value=1.0, unknown=None)
        assert jax.tree.map(lambda x: x.dtype, u) == dtypes
        return (optax.apply_updates(params, u), state), None

    start = jax.tree.map(jnp.zeros_like, target)
    (end, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))((start, tx.init(start)))
    return end
