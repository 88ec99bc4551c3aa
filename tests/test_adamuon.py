"""AdaMuon against Algorithm 1 of arXiv:2507.11005v3, line by line in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import adamuon, newton_schulz, scale_by_adamuon
from tests.oracles import assert_close, compiled

LR, BETA, EPS, DECAY = 0.1, 0.8, 1e-3, 0.3


def _algorithm_1(w, gradients, b2=BETA):
    """One matrix; Newton-Schulz itself is tested elsewhere."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for g in gradients:
        m = BETA * m + g
        o = np.asarray(newton_schulz(jnp.asarray(np.sign(m))))
        v = b2 * v + (1 - b2) * o * o
        scaled = o / (np.sqrt(v) + EPS)
        gamma = 0.2 * np.sqrt(w.size) / np.linalg.norm(scaled)
        w = w - LR * (gamma * scaled + DECAY * w)
    return w


@pytest.mark.parametrize("b2", [None, 0.5])
def test_it_is_algorithm_1(b2, x64, rng):
    """A matrix, a stack matrix by matrix, and AdamW on the rest."""
    w: Any = {"w": rng.normal(size=(3, 4)), "stack": rng.normal(size=(2, 4, 3)), "bias": rng.normal(size=4)}
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape), w) for _ in range(6)]
    tx: Any = adamuon(LR, beta=BETA, b2=b2, eps=EPS, weight_decay=DECAY)
    adam: Any = optax.adamw(LR, eps_root=1e-16, weight_decay=0.0)
    step, adam_step = compiled(tx.update), compiled(adam.update)
    got, bias = jax.tree.map(jnp.asarray, w), jnp.asarray(w["bias"])
    state, adam_state = tx.init(got), adam.init(bias)
    for g in gradients:
        updates, state = step(g, state, got)
        got: Any = optax.apply_updates(got, updates)
        update, adam_state = adam_step(g["bias"], adam_state, bias)
        bias = optax.apply_updates(bias, update)
    assert_close(got["w"], _algorithm_1(w["w"], [g["w"] for g in gradients], b2 or BETA))
    for i in range(2):
        want = _algorithm_1(w["stack"][i], [g["stack"][i] for g in gradients], b2 or BETA)
        assert_close(got["stack"][i], want)
    assert_close(got["bias"], bias)


def test_only_the_signs_of_the_momentum_count(rng):
    """Any scale of gradients gives the same updates, of rms 0.2 times the learning rate."""
    w: Any = jnp.zeros((4, 6))
    tx: Any = adamuon(LR)
    step = compiled(tx.update)
    gs = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    runs = {}
    for scale in (1.0, 2.0**-40):
        state, runs[scale] = tx.init(w), []
        for g in gs:
            u, state = step(scale * g, state, w)
            runs[scale].append(u)
            np.testing.assert_allclose(np.sqrt(np.mean(np.square(u))), 0.2 * LR, rtol=1e-5)
    assert_close(runs[1.0], runs[2.0**-40], 0)


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\); got 1.0"):
        adamuon(LR, beta=1.0)
    with pytest.raises(ValueError, match=r"b2 must lie in \[0, 1\); got -1"):
        adamuon(LR, b2=-1)
    with pytest.raises(ValueError, match="'septic'"):
        adamuon(LR, ns=("septic", 5))
    with pytest.raises(ValueError, match=r"adamuon takes matrices.*layer/bias has shape \(3,\)"):
        scale_by_adamuon().init({"layer": {"bias": jnp.ones(3)}})
