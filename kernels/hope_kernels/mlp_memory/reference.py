"""The definition: one token after another, everything in the state dtype, the inner gradient taken by `jax.grad`."""

from functools import partial

import jax
import jax.numpy as jnp

from hope_kernels.mlp_memory.types import Inputs, Options, State, Weights

_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def forward(
    options: Options, chunk_size: int, group: int | None, inputs: Inputs, state: State
) -> tuple[jax.Array | None, State]:
    """Token loop for every example and head; `group` has no meaning here."""
    del group
    heads = jax.vmap(partial(_one_head, options, chunk_size), in_axes=(1, 0), out_axes=(1, 0))
    wide = jax.tree.map(lambda x: x.astype(state.weights.w1.dtype), inputs)
    y, end = jax.vmap(heads)(wide, state)
    return None if y is None else y.astype(inputs.k.dtype), end


def _one_head(options: Options, chunk_size: int, inputs: Inputs, state: State) -> tuple[jax.Array | None, State]:
    """Inputs [T, ...], weights w1 [F, K] and w2 [K, F]."""

    def step(carry: tuple[Weights, State], x: tuple[jax.Array, Inputs]):
        (start, before), (t, token) = carry, x
        start = jax.tree.map(partial(jnp.where, t % chunk_size == 0), before.weights, start)
        after = _write(options, start, before, token)
        if token.q is None:
            return (start, after), None
        answering = {"start": start, "before": before.weights, "after": after.weights}[options.read]
        return (start, after), _apply(options, answering, token.q)

    tokens = (jnp.arange(inputs.k.shape[0]), inputs)
    (_, end), y = jax.lax.scan(step, (state.weights, state), tokens)
    return y, end


def _apply(options: Options, weights: Weights, x_K: jax.Array) -> jax.Array:
    """The memory (89)."""
    y_K = _product(jax.nn.gelu(_product(x_K, weights.w2)), weights.w1)
    return x_K + y_K if options.residual else y_K


def _loss(options: Options, weights: Weights, token: Inputs) -> jax.Array:
    """The objective of one token. Where the norm of the error is above the clip c, the loss grows with slope c."""
    y_K = _apply(options, weights, token.k)
    dot_product = options.objective == "dot_product"
    loss = -jnp.sum(y_K * token.v) if dot_product else 0.5 * jnp.sum((y_K - token.v) ** 2)
    c = options.error_clip
    if c is None:
        return loss
    square = jnp.sum(token.v**2) if dot_product else 2 * loss
    norm = jnp.sqrt(jnp.maximum(square, c * c))
    return jnp.where(square > c * c, loss * c / norm if dot_product else c * norm - 0.5 * c * c, loss)


def _write(options: Options, start: Weights, before: State, token: Inputs) -> State:
    """Both matrices, one token: W <- alpha W - eta' x^T (x W) + Z with Z <- mu Z - eta' gradient."""
    gradient = jax.grad(partial(_loss, options))(start, token)
    hidden = jax.nn.gelu(_product(token.k, start.w2))
    z = Weights(None, None) if before.momentum is None else before.momentum
    layerwise = options.rule == "layerwise"

    def step(key: jax.Array) -> jax.Array:
        return token.eta / (1 + token.eta * jnp.sum(key * key)) if options.exact else token.eta

    def matrix(w, z, key, step, erases, gradient):
        alpha = 1.0 if token.log_alpha is None else jnp.exp(token.log_alpha)
        push = -step * gradient
        if z is not None and token.log_mu is not None:
            z = jnp.exp(token.log_mu) * z + push
            push = z if token.mask is None else token.mask * z
        if options.decay and erases:
            push -= step * jnp.outer(key, _product(key, w))
        return alpha * w + push, z

    w2, z2 = matrix(before.weights.w2, z.w2, token.k, step(token.k), True, gradient.w2)
    w1, z1 = matrix(before.weights.w1, z.w1, hidden, step(hidden if layerwise else token.k), layerwise, gradient.w1)
    return State(Weights(w1, w2), None if before.momentum is None else Weights(z1, z2))
