"""The nest against the two usual ways to run levels at different rates, on the same three-level CMS.

- token scan: one token a step, pending errors in the carry, `lax.cond` at each level's boundary;
- MultiSteps: the same with `optax.MultiSteps(tx, chunk_size)` per level.

All three give the same outputs (checked before anything is timed).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hope_jax import cms, cms_chain, cms_memory, l2_regression, level

CHUNKS = (4, 16, 64)


def cases(tokens: int = 4096, dim: int = 128, hidden: int = 512) -> tuple[dict[str, Callable[[Any], jax.Array]], Any]:
    """The three programs, checked, as functions of the start weights that return the outputs [T, D]."""
    memories = [cms_memory(dim, hidden) for _ in CHUNKS]
    rules = [optax.sgd(0.1 / (c * dim)) for c in CHUNKS]
    n = cms(*map(level, memories, rules, CHUNKS), loss=l2_regression.loss)
    params = n.params(jax.random.key(0))
    x, target = jax.random.normal(jax.random.key(1), (2, tokens, dim))

    def error(params: Any, x: jax.Array, target: jax.Array) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            y = cms_chain(memories, params, x[None])[0]
            return l2_regression.loss(y, target), y

        return jax.grad(loss, has_aux=True)(params)

    programs = {
        "nest": lambda params: n.apply(n.init(params), (x, target))[1],
        "token scan, lax.cond": lambda params: _token_scan(error, rules, params, x, target),
        "token scan, optax.MultiSteps": lambda params: _multi_steps(error, rules, params, x, target),
    }
    outputs = {name: np.asarray(jax.jit(program)(params)) for name, program in programs.items()}
    # float32 over up to 4,096 steps: 1e-6 a step, growing with the square root of their number, rounded up
    for name, y in outputs.items():
        np.testing.assert_allclose(y, outputs["nest"], rtol=1e-4, atol=1e-4, err_msg=name)
    return programs, params


def _token_scan(error: Callable, rules: list, params: Any, x: jax.Array, target: jax.Array) -> jax.Array:
    def body(carry, token):
        t, params, pending, states = carry
        errors, y = error(params, *token)
        pending = jax.tree.map(jnp.add, pending, errors)
        new = [
            jax.lax.cond((t + 1) % c == 0, lambda p, e, s, tx=tx: _write(tx, p, e, s), lambda p, e, s: (p, e, s), *args)
            for c, tx, *args in zip(CHUNKS, rules, params, pending, states, strict=True)
        ]
        params, pending, states = (tuple(part) for part in zip(*new, strict=True))
        return (t + 1, params, pending, states), y

    states = tuple(tx.init(p) for tx, p in zip(rules, params, strict=True))
    return jax.lax.scan(body, (0, params, jax.tree.map(jnp.zeros_like, params), states), (x, target))[1]


def _write(tx: optax.GradientTransformation, params: Any, error: Any, state: Any) -> tuple[Any, Any, Any]:
    updates, state = tx.update(error, state, params)
    return optax.apply_updates(params, updates), jax.tree.map(jnp.zeros_like, error), state


def _multi_steps(error: Callable, rules: list, params: Any, x: jax.Array, target: jax.Array) -> jax.Array:
    steps = [optax.MultiSteps(tx, c, use_grad_mean=False) for tx, c in zip(rules, CHUNKS, strict=True)]

    def body(carry, token):
        params, states = carry
        errors, y = error(params, *token)
        new = [tx.update(e, s, p) for tx, e, s, p in zip(steps, errors, states, params, strict=True)]
        params = tuple(optax.apply_updates(p, u) for p, (u, _) in zip(params, new, strict=True))
        return (params, tuple(s for _, s in new)), y

    states = tuple(tx.init(p) for tx, p in zip(steps, params, strict=True))
    return jax.lax.scan(body, (params, states), (x, target))[1]
