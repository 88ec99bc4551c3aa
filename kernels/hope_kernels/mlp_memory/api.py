"""The public function: checks, masks and dtypes are settled here, once, for every implementation."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.types import state_dtype
from hope_kernels.dispatch import Implementation, dispatch
from hope_kernels.mlp_memory import reference, xla
from hope_kernels.mlp_memory.types import Inputs, MLPMemoryOutput, Options, State, Weights

IMPLEMENTATIONS = {"xla": Implementation(xla.forward), "reference": Implementation(reference.forward)}
# exp(-30) = 1e-13 is zero beside one; without a floor, differences of log(0) = -inf would be NaN.
LOG_FLOOR = -30.0


def mlp_memory(
    q: jax.Array | None,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    *,
    chunk_size: int,
    log_alpha: jax.Array | None = None,
    log_mu: jax.Array | None = None,
    momentum1: jax.Array | None = None,
    momentum2: jax.Array | None = None,
    mask: jax.Array | None = None,
    rule: Literal["input", "layerwise"] = "input",
    decay: bool = True,
    exact: bool = True,
    objective: Literal["l2", "dot_product"] = "l2",
    error_clip: float | None = None,
    residual: bool = True,
    read: Literal["start", "before", "after"] = "start",
    group: int | None = None,
    implementation: str | None = None,
) -> MLPMemoryOutput:
    """A two-layer memory that learns a sequence while reading it: Titans, self-modifying Titans.

    For every batch entry and head the memory is M(x) = x + gelu(x w2) w1, for row vectors x. Each token (k, v) is
    written by one step down the gradient of 1/2 ||M(k) - v||^2. The gradients G1, G2 of a chunk's tokens are all
    taken at the weights the chunk started with, while the steps are made one after another, with x2 = k, x1 =
    gelu(k w2) at the chunk's start, and eta'(x) = eta / (1 + eta ||x||^2):

        rule "input"        w2 <- alpha w2 - eta'(k) k^T (k w2) - eta'(k) G2     w1 <- alpha w1 - eta'(k) G1
        rule "layerwise"    the same for w2, and w1 <- alpha w1 - eta'(x1) x1^T (x1 w1) - eta'(x1) G1

    With `log_mu` the steps pass through a momentum: Z <- mu Z - eta' G, and Z takes the place of -eta' G.

    The call begins with a chunk. T need not be a multiple of `chunk_size`: the weights that are returned hold all T
    writes, and a further call takes its first gradients at them. So a sequence may be cut between chunks, and a cut
    inside a chunk is a chunk that ends there.

    Weights, gates and errors are float32 whatever the inputs (float64 for float64 inputs); matrix products take the
    input dtype, the widest of q, k and v, and accumulate in the dtype of the weights. Everything is differentiable
    once, in reverse mode; kept for that are the inputs and the weights before every `group`-th chunk.

    Args:
        q: [B, T, H, K] what is read with, or None for the final weights only.
        k: [B, T, H, K] keys.
        v: [B, T, H, K] values, as wide as the keys.
        eta: [B, T, H] inner learning rate.
        w1: [B, H, F, K] hidden to output.
        w2: [B, H, K, F] input to hidden.
        chunk_size: tokens per gradient point; it changes the numbers.
        log_alpha: [B, T, H] log of the retained fraction, at most 0 in normal use; None retains everything. Values
            below -30 count as -30.
        log_mu: [B, T, H] log of the momentum decay, floored like `log_alpha`; None means no momentum.
        momentum1: like w1, only with `log_mu`; None is zeros.
        momentum2: like w2, only with `log_mu`; None is zeros.
        mask: bool [B, T, H]; a False token is not written, whatever its k, v and gates hold. It has its place in a
            chunk, and its y is read as any other.
        rule: as above.
        decay: False drops the terms that erase along keys, (x^T x) w: gradient descent with the same steps.
        exact: False takes eta itself for eta'.
        objective: "dot_product" takes -<M(k), v> in the place of the squared distance.
        error_clip: the largest norm of a token's error at the output: Huber's loss of the distance.
        residual: False drops the `x +`.
        read: y_t is M(q_t) with the weights at the "start" of the chunk, or the running ones, just "before" or
            "after" the token's own write.
        group: chunks between two states that are kept for the gradient; sets time and memory, never the numbers.
            None takes the square root of the number of chunks, which keeps the fewest states at a time.
        implementation: "xla", "reference", or None for the library's choice. A named one runs or raises.

    Returns:
        MLPMemoryOutput(y, w1, w2, momentum1, momentum2): y [B, T, H, K] in the input dtype, None without q; the
        weights after the last token; the momenta, None without `log_mu`.

    Raises:
        ValueError: shapes that do not fit, an unknown word for `rule`, `objective`, `read` or `implementation`, sizes
            below 1, a momentum without `log_mu`.
        TypeError: arrays that are not floating point, a mask that is not bool.

    Example:
        >>> import jax.numpy as jnp
        >>> k = jnp.eye(2)[None, :, None, :]  # two orthogonal keys
        >>> w1, w2 = jnp.zeros((1, 1, 3, 2)), jnp.ones((1, 1, 2, 3))
        >>> out = mlp_memory(k, k, 3 * k, jnp.full((1, 2, 1), 0.1), w1, w2, chunk_size=1, read="after")
        >>> (out.y > k)[0, :, 0].tolist()  # closer to 3 k than k itself, the answer before the writes
        [[True, False], [True, True]]

    Reference: spec 2.3, (S7.4)-(S7.7), 7.8; Nested Learning, arXiv:2512.24695, (88), (89); Titans, arXiv:2501.00663,
    T-8 to T-14.
    """
    arrays = dict(q=q, k=k, v=v, eta=eta, w1=w1, w2=w2, log_alpha=log_alpha, log_mu=log_mu)
    _check_arrays(arrays | dict(momentum1=momentum1, momentum2=momentum2), mask)
    options = Options(rule, decay, exact, objective, error_clip, residual, read)
    _check_options(options, chunk_size, group)
    dtype = jnp.result_type(k, v) if q is None else jnp.result_type(q, k, v)
    wide = state_dtype(dtype)

    momentum = None
    if log_mu is not None:
        momentum = Weights(
            jnp.zeros(w1.shape, wide) if momentum1 is None else momentum1.astype(wide),
            jnp.zeros(w2.shape, wide) if momentum2 is None else momentum2.astype(wide),
        )
    state = State(Weights(w1.astype(wide), w2.astype(wide)), momentum)
    inputs = Inputs(
        q=None if q is None else q.astype(dtype),
        k=k.astype(dtype),
        v=v.astype(dtype),
        eta=eta.astype(wide),
        log_alpha=None if log_alpha is None else jnp.maximum(log_alpha.astype(wide), LOG_FLOOR),
        log_mu=None if log_mu is None else jnp.maximum(log_mu.astype(wide), LOG_FLOOR),
        mask=None,
    )
    if mask is not None:
        inputs = _apply_mask(inputs, mask)

    y, end = inputs.q, state  # without tokens there is nothing to read
    if k.shape[1]:
        y, end = dispatch("mlp_memory", IMPLEMENTATIONS, implementation, options, chunk_size, group, inputs, state)
    z1, z2 = (None, None) if end.momentum is None else end.momentum
    return MLPMemoryOutput(y, end.weights.w1, end.weights.w2, z1, z2)


def _apply_mask(inputs: Inputs, mask_BTH: jax.Array) -> Inputs:
    """Masked tokens become tokens that do nothing; `where`, not a product, so that NaN padding stays out."""

    def only(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        return jnp.where(mask_BTH[..., None] if x.ndim == 4 else mask_BTH, x, 0)

    done = {n: only(getattr(inputs, n)) for n in ("k", "v", "eta", "log_alpha", "log_mu")}
    return inputs._replace(**done, mask=None if inputs.log_mu is None else mask_BTH.astype(inputs.log_mu.dtype))


def _check_options(options: Options, chunk_size: int, group: int | None) -> None:
    for name in ("rule", "objective", "read"):
        words, given = get_args(Options.__annotations__[name]), getattr(options, name)
        if given not in words:
            raise ValueError(f"{name} must be one of {', '.join(words)}; got {given!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is a number of tokens, at least 1; got {chunk_size}")
    if group is not None and group < 1:
        raise ValueError(f"group is a number of chunks, at least 1; got {group}")
    if options.error_clip is not None and options.error_clip <= 0:
        raise ValueError(f"error_clip is the largest norm of an error, above 0; got {options.error_clip}")


def _check_arrays(arrays: dict[str, jax.Array | None], mask: jax.Array | None) -> None:
    """Raise with the offending shapes, before anything is computed."""
    k, w2 = arrays["k"], arrays["w2"]
    assert k is not None and w2 is not None
    if k.ndim != 4:
        raise ValueError(f"k must be [batch, time, heads, width]; got shape {k.shape}")
    batch, _, heads, width = k.shape
    if w2.ndim != 4 or w2.shape[:3] != (batch, heads, width):
        raise ValueError(
            f"w2 must be [batch, heads, width, hidden width] with the first three of k {k.shape}; got {w2.shape}"
        )
    if arrays["log_mu"] is None and not arrays["momentum1"] is arrays["momentum2"] is None:
        raise ValueError("a momentum was given without log_mu; pass log_mu, or drop momentum1 and momentum2")
    turned = (batch, heads, w2.shape[-1], width)
    expected = {"q": k.shape, "v": k.shape, "w1": turned, "momentum1": turned, "momentum2": w2.shape}
    for name, array in (arrays | {"mask": mask}).items():
        shape = expected.get(name, k.shape[:3])
        if array is not None and name not in ("k", "w2") and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for k {k.shape} and w2 {w2.shape}; got {array.shape}")
        if array is not None and name != "mask" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point; got {array.dtype}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, True where the token counts; got {mask.dtype}")
