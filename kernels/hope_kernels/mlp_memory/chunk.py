"""One chunk of one example: the errors at the weights it started with, the writes, and the reads.

Heads first: q, k [H, C, K], v [H, C, K] or [P, H, C, K], gates [H, C], weights as in `Weights`. Both matrices are
written by `delta_rule` (spec S7.5 to S7.7). Errors, gates and weights are in the state dtype; products take the input
dtype and accumulate in the state dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule import DeltaRuleOutput, delta_rule
from hope_kernels.delta_rule.tile import dot
from hope_kernels.mlp_memory.types import Inputs, Options, State, Weights


class Factors(NamedTuple):
    """The gradient of the objective: for both matrices and every token an input and the error at the output."""

    key1: jax.Array  # [P, H, C, F]  the hidden layer
    error1: jax.Array  # [P, H, C, K]  at the output
    key2: jax.Array  # [H, C, K]  the keys
    error2: jax.Array  # [H, C, P F]  at the hidden layer, before gelu


def chunk(options: Options, inputs: Inputs, start: Weights, state: State) -> tuple[jax.Array | None, State]:
    """A chunk or a part of one: errors at `start`, the weights the chunk started with, are written into `state`.

    Returns:
        Reads [P, H, C, K], None without q, and the state after the last token.
    """
    running, state = write(options, inputs, factors(options, inputs, start), state)
    if inputs.q is None or options.read != "start":
        return running, state
    y_PHCK = _output(options, start, inputs.q, jax.nn.gelu(_hidden(start, inputs.q)))
    return y_PHCK.astype(inputs.k.dtype), state


def factors(options: Options, inputs: Inputs, start: Weights) -> Factors:
    """Every box's error at its output and at its hidden layer (S7.4); v is a constant of this gradient."""
    h_PHCF, slope = jax.vjp(jax.nn.gelu, _hidden(start, inputs.k))
    value = inputs.v.astype(h_PHCF.dtype)
    error1 = -(value if value.ndim == 4 else jnp.stack([value] * h_PHCF.shape[0]))
    if options.objective == "l2":
        error1 += _output(options, start, inputs.k, h_PHCF)
    if options.error_clip is not None:
        error1 = _clip(error1, options.error_clip)
    (error2,) = slope(dot("phck,phfk->phcf", error1, start.w1, inputs.k.dtype, h_PHCF.dtype))
    return Factors(h_PHCF, error1, inputs.k, _join(error2))


def write(options: Options, inputs: Inputs, errors: Factors, state: State) -> tuple[jax.Array | None, State]:
    """Write the chunk, one token after another; reads [P, H, C, K] by the running weights, None if of the start."""
    boxes = errors.key1.shape[0]
    q = None if options.read == "start" else inputs.q
    z = Weights(None, None) if state.momentum is None else state.momentum

    step2 = _step(options, inputs.eta, errors.key2)
    erase2 = step2 if options.decay else None
    out2 = _recurrence(options, inputs, q, errors.key2, errors.error2, step2, erase2, state.weights.w2, z.w2)
    h_PHCF = None if out2.y is None else jax.nn.gelu(_split(out2.y, boxes))

    def for_box(h_HCF, key1_HCF, error1_HCK, w1_HFK, z1_HFK) -> DeltaRuleOutput:
        layerwise = options.rule == "layerwise"
        step1 = _step(options, inputs.eta, key1_HCF) if layerwise else step2
        erase1 = step1 if options.decay and layerwise else None
        return _recurrence(options, inputs, h_HCF, key1_HCF, error1_HCK, step1, erase1, w1_HFK, z1_HFK)

    out1 = jax.vmap(for_box)(h_PHCF, errors.key1, errors.error1, state.weights.w1, z.w1)
    y = out1.y
    if y is not None and q is not None and options.residual:
        y = q[None] + y
    momentum = None if state.momentum is None else Weights(out1.momentum, out2.momentum)
    return y, State(Weights(out1.state, out2.state), momentum)


def _recurrence(options, inputs: Inputs, query, key, error, step, erase, state, momentum) -> DeltaRuleOutput:
    """`delta_rule` on arrays [H, C, ...] and states [H, ., .]: writes of -step * error under `key`."""
    dtype = inputs.k.dtype

    def time_first(x: jax.Array | None, dtype=None) -> Any:  # [H, C, ...] -> [1, C, H, ...]
        return None if x is None else jnp.moveaxis(x, 0, 1)[None].astype(dtype or x.dtype)

    mask = None if inputs.mask is None else inputs.mask > 0
    out = delta_rule(
        time_first(query, dtype),
        time_first(key, dtype),
        time_first(-step[..., None] * error, dtype),
        time_first(erase),
        log_alpha=time_first(inputs.log_alpha),
        log_mu=time_first(inputs.log_mu),
        mask=time_first(mask),
        initial_state=state[None],
        initial_momentum=None if momentum is None else momentum[None],
        read="after" if query is None else options.read,
        implementation="xla",
    )
    y = None if out.y is None else jnp.moveaxis(out.y[0], 1, 0)
    return DeltaRuleOutput(y, out.state[0], None if out.momentum is None else out.momentum[0])


def _step(options: Options, eta: jax.Array, key: jax.Array) -> jax.Array:
    """eta' of (S3.2) for every token, or eta itself."""
    if not options.exact:
        return eta
    key = key.astype(eta.dtype)
    return eta / (1 + eta * jnp.sum(key * key, axis=-1))


def _hidden(weights: Weights, x_HCK: jax.Array) -> jax.Array:
    """x @ w2 of every box [P, H, C, F]."""
    z = dot("hck,hkf->hcf", x_HCK, weights.w2, x_HCK.dtype, weights.w2.dtype)
    return _split(z, weights.w1.shape[0])


def _output(options: Options, weights: Weights, x_HCK: jax.Array, h_PHCF: jax.Array) -> jax.Array:
    """What every box answers [P, H, C, K], from its hidden layer."""
    y_PHCK = dot("phcf,phfk->phck", h_PHCF, weights.w1, x_HCK.dtype, weights.w1.dtype)
    return x_HCK.astype(y_PHCK.dtype)[None] + y_PHCK if options.residual else y_PHCK


def _split(z_HCX: jax.Array, boxes: int) -> jax.Array:
    """[H, C, P F] -> [P, H, C, F]"""
    return jnp.moveaxis(z_HCX.reshape(*z_HCX.shape[:-1], boxes, -1), -2, 0)


def _join(z_PHCF: jax.Array) -> jax.Array:
    """[P, H, C, F] -> [H, C, P F]"""
    z = jnp.moveaxis(z_PHCF, 0, -2)
    return z.reshape(*z.shape[:-2], -1)


def _clip(error: jax.Array, size: float) -> jax.Array:
    """The error with its norm cut to `size`; the square root stays differentiable at zero."""
    square = jnp.sum(error * error, axis=-1, keepdims=True)
    outside = square > size * size
    return jnp.where(outside, size * jax.lax.rsqrt(jnp.where(outside, square, 1.0)), 1.0) * error
