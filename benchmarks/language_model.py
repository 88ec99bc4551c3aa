"""Training throughput of a small Hope model against a Transformer with the same number of parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.models import ModelConfig, build_lm, count_parameters, match_parameters


def steps(config: ModelConfig, batch: int = 8, length: int = 512) -> tuple[dict[str, Callable[[Any], Any]], Any]:
    """One AdamW step of the model and of its parameter-matched Transformer, as functions of the tokens."""
    matched = dataclasses.replace(config, name="transformer", cms_chunks=(), remat="none")  # its fastest policy here
    models = {config.name: config, "transformer": match_parameters(matched, count_parameters(config))}
    tokens = jax.random.randint(jax.random.key(0), (batch, length + 1), 0, config.vocab_size)
    return {name: _step(model, batch) for name, model in models.items()}, tokens


def _step(config: ModelConfig, batch: int) -> Callable[[Any], Any]:
    lm, tx = build_lm(config), optax.adamw(1e-3)
    params = lm.init(jax.random.key(0))
    opt_state = tx.init(params)

    def step(tokens: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            _, logits = lm.apply(params, lm.init_state(params, batch), tokens[:, :-1], phase=0)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, _ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), jnp.asarray(value)

    return step


def backward_bytes(config: ModelConfig, lengths: tuple[int, ...], batch: int = 1) -> dict[int, int]:
    """Bytes of temporaries of one compiled training step by sequence length, from the compiler's own analysis."""
    found = {}
    for length in lengths:
        tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
        compiled = jax.jit(_step(config, batch)).lower(tokens).compile()
        analysis = compiled.memory_analysis()
        found[length] = analysis.temp_size_in_bytes if analysis else 0
    return found
