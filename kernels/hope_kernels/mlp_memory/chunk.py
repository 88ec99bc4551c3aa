"""One chunk of one example: the errors at the weights it starts with, the writes, and the reads.

Heads first: q, k, v [H, C, K], gates [H, C], w1 [H, F, K], w2 [H, K, F]. Both matrices are written by `delta_rule`
(spec S7.5 to S7.7). Errors, gates and weights are in the state dtype; products take the input dtype and accumulate in
the state dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule import DeltaRuleOutput, delta_rule
from hope_kernels.delta_rule.tile import dot
from hope_kernels.mlp_memory.types import Inputs, Options, State, Weights


class Factors(NamedTuple):
    """The gradient of the objective: for both matrices and every token an input and the error at the output."""

    key1: jax.Array  # [H, C, F]  the hidden layer
    error1: jax.Array  # [H, C, K]  at the output
    key2: jax.Array  # [H, C, K]  the keys
    error2: jax.Array  # [H, C, F]  at the hidden layer, before gelu


def chunk(options: Options, inputs: Inputs, state: State) -> tuple[jax.Array | None, State]:
    """Reads [H, C, K], None without q, and the state after the last token."""
    start = state.weights
    running, state = _write(options, inputs, _factors(options, inputs, start), state)
    if inputs.q is None or options.read != "start":
        return running, state
    y_HCK = _output(options, start, inputs.q, jax.nn.gelu(_hidden(start, inputs.q)))
    return y_HCK.astype(inputs.k.dtype), state


def _factors(options: Options, inputs: Inputs, start: Weights) -> Factors:
    """The error at the output and at the hidden layer (S7.4)."""
    h_HCF, slope = jax.vjp(jax.nn.gelu, _hidden(start, inputs.k))
    error1 = -inputs.v.astype(h_HCF.dtype)
    if options.objective == "l2":
        error1 += _output(options, start, inputs.k, h_HCF)
    if options.error_clip is not None:
        error1 = _clip(error1, options.error_clip)
    (error2,) = slope(dot("hck,hfk->hcf", error1, start.w1, inputs.k.dtype, h_HCF.dtype))
    return Factors(h_HCF, error1, inputs.k, error2)


def _write(options: Options, inputs: Inputs, errors: Factors, state: State) -> tuple[jax.Array | None, State]:
    """Write the chunk, one token after another; reads [H, C, K] by the running weights, None if of the start."""
    q = None if options.read == "start" else inputs.q
    layerwise = options.rule == "layerwise"
    z = Weights(None, None) if state.momentum is None else state.momentum

    step2 = _step(options, inputs.eta, errors.key2)
    erase2 = step2 if options.decay else None
    out2 = _recurrence(options, inputs, q, errors.key2, errors.error2, step2, erase2, state.weights.w2, z.w2)

    h_HCF = None if out2.y is None else jax.nn.gelu(out2.y)
    step1 = _step(options, inputs.eta, errors.key1) if layerwise else step2
    erase1 = step1 if options.decay and layerwise else None
    out1 = _recurrence(options, inputs, h_HCF, errors.key1, errors.error1, step1, erase1, state.weights.w1, z.w1)

    y = out1.y
    if y is not None and q is not None and options.residual:
        y = q + y
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
    """x @ w2 [H, C, F]."""
    return dot("hck,hkf->hcf", x_HCK, weights.w2, x_HCK.dtype, weights.w2.dtype)


def _output(options: Options, weights: Weights, x_HCK: jax.Array, h_HCF: jax.Array) -> jax.Array:
    """What the memory answers [H, C, K], from its hidden layer."""
    y_HCK = dot("hcf,hfk->hck", h_HCF, weights.w1, x_HCK.dtype, weights.w1.dtype)
    return x_HCK.astype(y_HCK.dtype) + y_HCK if options.residual else y_HCK


def _clip(error: jax.Array, size: float) -> jax.Array:
    """The error with its norm cut to `size`; the square root stays differentiable at zero."""
    square = jnp.sum(error * error, axis=-1, keepdims=True)
    outside = square > size * size
    return jnp.where(outside, size * jax.lax.rsqrt(jnp.where(outside, square, 1.0)), 1.0) * error
