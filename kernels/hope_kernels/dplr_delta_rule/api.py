"""The public function: checks, masks and dtypes are settled here, once, for every implementation."""

from typing import Literal

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.api import LOG_FLOOR
from hope_kernels.delta_rule.types import state_dtype
from hope_kernels.dispatch import Implementation, dispatch
from hope_kernels.dplr_delta_rule import reference, xla
from hope_kernels.dplr_delta_rule.types import DPLRDeltaRuleOutput, Inputs

IMPLEMENTATIONS = {"xla": Implementation(xla.forward), "reference": Implementation(reference.forward)}
READS = ("before", "after")


def dplr_delta_rule(
    q: jax.Array | None,
    k: jax.Array,
    u: jax.Array,
    b: jax.Array,
    c: jax.Array,
    log_alpha: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    read: Literal["before", "after"] = "after",
    scale: float = 1.0,
    implementation: str | None = None,
    block_t: int | None = None,
) -> DPLRDeltaRuleOutput:
    """A matrix memory in which every key channel forgets at a pace of its own, and what is erased is free.

    For every batch entry and head, with row vectors q, k, b, c, alpha [K], u [V] and the state S [K, V] (the transpose
    of the matrix in the mathematics):

        S_t = diag(alpha_t) S_{t-1} - b_t^T (c_t S_{t-1}) + k_t^T u_t
        y_t = q_t S_t (read "after") or q_t S_{t-1} ("before")

    The transition diag(alpha_t) - b_t^T c_t is diagonal plus low rank (DPLR). With v the value, what is called so by

        RWKV-7                     alpha = w, b = a * kappa, c = kappa, k = k~, u = v (kappa of unit norm)
        Kimi delta attention       b = beta k, c = alpha * k, u = beta v: (I - beta k^T k) diag(alpha) S + beta k^T v
        `delta_rule`               alpha the same in all channels, b = eta k, c = k

    State, decays and the triangular system are float32 whatever the inputs (float64 for float64 inputs); matrix
    products take the input dtype, the widest of q, k, u, b and c, and accumulate in the dtype of the state. Everything
    is differentiable once, in reverse mode; what is kept for that are the inputs and one state per tile, under the
    name "dplr_delta_rule_states" for `jax.checkpoint` policies.

    Args:
        q: [B, T, H, K] what is read with, or None for the final state only.
        k: [B, T, H, K] keys.
        u: [B, T, H, V] what is written, step size included.
        b: [B, T, H, K] where the state is changed by an erasure, step size included.
        c: [B, T, H, K] what an erasure asks the state for. Only the product b^T c matters, which should leave
            diag(alpha) - b^T c without growth for long sequences (0 <= b . c <= 1 + alpha for b parallel to c, say).
        log_alpha: [B, T, H, K] log of the retained fraction of every key channel, at most 0. Values below -30 count as
            -30.
        initial_state: [B, H, K, V]; None is zeros.
        mask: bool [B, T, H]; a False token leaves the state exactly as it is, whatever its k, u, b, c and log_alpha
            hold (its y still reads the state at that point).
        segment_ids: int [B, T], packed documents: wherever the id differs from that of the token before, the state is
            emptied first. The first document continues the initial state; the final state is the last document's
            (give padding the id of the tokens before it, and mask it).
        read: which state y_t reads.
        scale: y is multiplied by it (1/sqrt(K), say).
        implementation: "xla", "reference", or None for the library's choice. A named one runs or raises.
        block_t: tokens per tile; changes the speed, never the numbers. None chooses.

    Returns:
        DPLRDeltaRuleOutput(y, state): y [B, T, H, V] in the input dtype, None without q; state [B, H, K, V].

    Raises:
        ValueError: shapes that do not fit, an unknown `read` or `implementation`, `block_t` below 1.
        TypeError: arrays that are not floating point, a mask that is not bool, segment ids that are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> k = jnp.eye(2)[None, :, None, :]  # two orthogonal keys
        >>> u, nothing = jnp.ones((1, 2, 1, 1)), jnp.zeros_like(k)
        >>> alpha = jnp.broadcast_to(jnp.array([0.5, 1.0]), k.shape)  # the first channel forgets
        >>> dplr_delta_rule(None, k, u, nothing, nothing, jnp.log(alpha)).state[0, 0].tolist()
        [[0.5], [1.0]]

    Reference: (P1)-(P6) of this folder's README; RWKV-7, arXiv:2503.14456; Kimi Linear, arXiv:2510.26692.
    """
    arrays = {"q": q, "k": k, "u": u, "b": b, "c": c, "log_alpha": log_alpha, "initial_state": initial_state}
    _check_arrays(arrays, mask, segment_ids)
    if read not in READS:
        raise ValueError(f"read must be one of {', '.join(READS)}; got {read!r}")
    if block_t is not None and block_t < 1:
        raise ValueError(f"block_t is a number of tokens, at least 1; got {block_t}")
    dtype = jnp.result_type(*(x for x in (q, k, u, b, c) if x is not None))
    wide = state_dtype(dtype)
    batch, tokens, heads, width = k.shape
    shape = (batch, heads, width, u.shape[-1])
    state = jnp.zeros(shape, wide) if initial_state is None else initial_state.astype(wide)
    inputs = Inputs(
        q=None if q is None else q.astype(dtype) if scale == 1.0 else (q.astype(wide) * scale).astype(dtype),
        k=k.astype(dtype),
        u=u.astype(dtype),
        b=b.astype(dtype),
        c=c.astype(dtype),
        log_alpha=jnp.maximum(log_alpha.astype(wide), LOG_FLOOR),
        reset=None if segment_ids is None else _resets(segment_ids, heads, wide),
    )
    if mask is not None:
        inputs = _apply_mask(inputs, mask)
    if not tokens:
        return DPLRDeltaRuleOutput(None if q is None else jnp.zeros(u.shape, dtype), state)
    how = {"read": read, "block_t": block_t}
    return DPLRDeltaRuleOutput(
        *dispatch("dplr_delta_rule", IMPLEMENTATIONS, implementation, inputs, state, **how),
    )


def _resets(segment_ids_BT: jax.Array, heads: int, dtype: jnp.dtype) -> jax.Array:
    """[B, T, H], 1 where a document begins, except at the first token."""
    changes = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], [(0, 0), (1, 0)])
    return jnp.repeat(changes[..., None], heads, axis=-1).astype(dtype)


def _apply_mask(inputs: Inputs, mask_BTH: jax.Array) -> Inputs:
    """Masked tokens become tokens that do nothing; `where`, not a product, so that NaN padding stays out."""
    names = ("k", "u", "b", "c", "log_alpha")
    return inputs._replace(**{n: jnp.where(mask_BTH[..., None], getattr(inputs, n), 0) for n in names})


def _check_arrays(arrays: dict[str, jax.Array | None], mask: jax.Array | None, segment_ids: jax.Array | None) -> None:
    """Raise with the offending shapes, before anything is computed."""
    k, u = arrays["k"], arrays["u"]
    assert k is not None and u is not None
    if k.ndim != 4:
        raise ValueError(f"k must be [batch, time, heads, key width]; got shape {k.shape}")
    if u.ndim != 4 or u.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"u must be [batch, time, heads, value width], the first three those of k {k.shape}; got {u.shape}"
        )
    batch, tokens, heads, width = k.shape
    expected = {
        "u": u.shape,
        "initial_state": (batch, heads, width, u.shape[3]),
        "mask": (batch, tokens, heads),
        "segment_ids": (batch, tokens),
    }
    for name, array in (arrays | {"mask": mask, "segment_ids": segment_ids}).items():
        shape = expected.get(name, k.shape)
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for k {k.shape} and u {u.shape}; got {array.shape}")
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point; got {array.dtype}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, True where the token counts; got {mask.dtype}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers; got {segment_ids.dtype}")
