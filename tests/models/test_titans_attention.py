"""Memory as context against a loop over tokens in NumPy float64, written from T-21 to T-25."""

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.models.titans_attention import memory_as_context
from tests.models.loops import turned
from tests.oracles import assert_close, compiled, float64, l2_unit, mlp_gradient, mlp_read, numpy64, sigmoid, softplus

D, H, F, C, P, T = 8, 2, 4, 3, 2, 8  # C does not divide T
K = D // H
THETA = 10_000.0
LAYER = memory_as_context(D, H, hidden=F, segment=C, persistent=P, eta_init=0.3)


def loop(params, r):
    """Heads meet only in the projections; each has a memory of its own."""
    head = lambda x, h: x[h * K : (h + 1) * K]  # noqa: E731
    memories = [{n: w[h] for n, w in params["start"]["level_0"].items()} for h in range(H)]
    surprise = [{n: np.zeros_like(w) for n, w in m.items()} for m in memories]
    gate = {name: r @ p["w"] + p["b"] for name, p in params["gates"].items()}
    eta, alpha, mu = softplus(gate["eta"]), sigmoid(gate["log_alpha"]), sigmoid(gate["log_mu"])
    outputs = []
    for t in range(T):
        slot = t % C
        if slot == 0:
            start, recalled, inputs = [dict(m) for m in memories], [], []
        ask = r[t] @ params["memory_q"]
        recalled.append(np.concatenate([mlp_read(start[h], l2_unit(head(ask, h)), residual=False) for h in range(H)]))
        inputs.append(r[t])
        y = np.zeros(D)
        for h in range(H):
            q = head(r[t] @ params["wq"], h)
            seen = [(s, x) for xs in (recalled, inputs) for s, x in enumerate(xs)]
            scores = [turned(q, slot, THETA) @ turned(head(x @ params["wk"], h), s, THETA) for s, x in seen]
            scores += [q @ head(x @ params["wk"], h) for x in params["persistent"]]
            values = [head(x @ params["wv"], h) for x in [x for _, x in seen] + list(params["persistent"])]
            weight = np.exp(np.array(scores) / np.sqrt(K))
            y[h * K : (h + 1) * K] = weight / weight.sum() @ np.stack(values)
        read = np.zeros(D)
        for h in range(H):
            key, value = l2_unit(head(y @ params["memory_k"], h)), head(y @ params["memory_v"], h)
            error = mlp_read(start[h], key, residual=False) - value
            gradient = mlp_gradient(start[h], key, error)
            surprise[h] = {n: mu[t, h] * s - eta[t, h] * gradient[n] for n, s in surprise[h].items()}
            memories[h] = {n: alpha[t, h] * w + surprise[h][n] for n, w in memories[h].items()}
            ask = l2_unit(head(y @ params["memory_q"], h))
            read[h * K : (h + 1) * K] = mlp_read(memories[h], ask, residual=False)
        outputs.append(y * read)
    return np.stack(outputs), memories


def test_memory_as_context(x64, rng):
    """Outputs and last weights, in one call and in pieces that end inside a segment."""
    params, r = numpy64(LAYER.init(jax.random.key(0))), rng.normal(size=(T, D))
    want_y, want = loop(params, r)

    def run(params, r, cut):
        state, head = LAYER.apply(params, LAYER.init_state(params), r[:cut], phase=0)
        state, tail = LAYER.apply(params, state, r[cut:], phase=cut)
        return state.levels[0].running, jnp.concatenate([head, tail])

    for cut in (0, 4):
        weights, y = compiled(run, static_argnums=2)(float64(params), r, cut)
        assert_close(y, want_y)
        assert_close(weights, {n: np.stack([m[n] for m in want]) for n in ("w1", "w2")})
