"""The public function: checks, masks and dtypes are settled here, once, for every implementation."""

from typing import Literal

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule import reference, xla
from hope_kernels.delta_rule.tile import dot
from hope_kernels.delta_rule.types import DeltaRuleOutput, Inputs, State, state_dtype
from hope_kernels.dispatch import Implementation, dispatch

IMPLEMENTATIONS = {"xla": Implementation(xla.forward), "reference": Implementation(reference.forward)}
READS = ("start", "before", "after")
# exp(-30) = 1e-13 is zero beside one; without a floor, differences of log(0) = -inf would be NaN.
LOG_FLOOR = -30.0


def delta_rule(
    q: jax.Array | None,
    k: jax.Array,
    u: jax.Array,
    eta: jax.Array | None = None,
    *,
    log_alpha: jax.Array | None = None,
    log_mu: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    initial_momentum: jax.Array | None = None,
    mask: jax.Array | None = None,
    read: Literal["start", "before", "after"] = "after",
    block_t: int | None = None,
    implementation: str | None = None,
) -> DeltaRuleOutput:
    """A matrix memory that forgets, erases and writes one token after another.

    For every batch entry and head, with row vectors q, k [K], u [V] and the state S [K, V] (the transpose of
    the matrix in the mathematics):

        S_t = alpha_t S_{t-1} - eta_t k_t^T (k_t S_{t-1}) + k_t^T u_t
        y_t = q_t S_t (read "after"), q_t S_{t-1} ("before") or q_t S_0 ("start": before the first token)

    and with `log_mu` the writes pass through a momentum Z [K, V] first:

        Z_t = mu_t Z_{t-1} + k_t^T u_t,    S_t = alpha_t S_{t-1} - eta_t k_t^T (k_t S_{t-1}) + Z_t

    The states, the triangular system and the decays are float32 whatever the inputs (float64 for float64
    inputs); matrix products take the input dtype, the widest of q, k and u, and accumulate in the dtype of the
    state. Everything is differentiable once, in reverse mode; what is kept for that are the inputs and one state
    per `block_t` tokens.

    Args:
        q: [B, T, H, K] what is read with, or None for the final state only.
        k: [B, T, H, K] keys.
        u: [B, T, H, V] what is written, step size included.
        eta: [B, T, H] erase coefficient (b of spec S2.1); None is zero and needs no triangular solve.
        log_alpha: [B, T, H] log of the retained fraction, at most 0 in normal use; None retains everything.
            Values below -30 count as -30.
        log_mu: [B, T, H] log of the momentum decay, floored like `log_alpha`; None means no momentum.
        initial_state: [B, H, K, V]; None is zeros.
        initial_momentum: [B, H, K, V], only with `log_mu`; None is zeros.
        mask: bool [B, T, H]; a False token leaves state and momentum exactly as they are, whatever its k, u and
            gates hold (its y still reads the state at that point).
        read: which state y_t reads.
        block_t: tokens per tile of the chunked forms; changes the speed, never the numbers. None chooses.
        implementation: "xla", "reference", or None for the library's choice. A named one runs or raises.

    Returns:
        DeltaRuleOutput(y, state, momentum): y [B, T, H, V] in the input dtype, None without q; state [B, H, K, V];
        momentum [B, H, K, V], None without `log_mu`.

    Raises:
        ValueError: shapes that do not fit, an unknown `read` or `implementation`, `initial_momentum` without
            `log_mu`.
        TypeError: arrays that are not floating point, a mask that is not bool.
        NotImplementedError: the named implementation exists but cannot run here.

    Example:
        >>> import jax.numpy as jnp
        >>> k = jnp.eye(3)[None, :, None, :]  # three orthogonal keys
        >>> u = jnp.arange(6.0).reshape(1, 3, 1, 2)
        >>> delta_rule(k, k, u, jnp.ones((1, 3, 1))).y[0, :, 0].tolist()
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]

    Reference: spec (S2.1), (S5.1)-(S5.6); Nested Learning, arXiv:2512.24695, (65), (88), (92), (93).
    """
    _check(q, k, u, eta, log_alpha, log_mu, initial_state, initial_momentum, mask, read, block_t)
    dtype = jnp.result_type(k, u) if q is None else jnp.result_type(q, k, u)
    wide = state_dtype(dtype)
    batch, tokens, heads, key_width = k.shape
    shape = (batch, heads, key_width, u.shape[-1])
    state = State(_start(initial_state, shape, wide), None)
    if log_mu is not None:
        state = state._replace(z=_start(initial_momentum, shape, wide))

    inputs = Inputs(
        q=None if q is None or read == "start" else q.astype(dtype),
        k=k.astype(dtype),
        u=u.astype(dtype),
        eta=None if eta is None else eta.astype(wide),
        log_alpha=None if log_alpha is None else jnp.maximum(log_alpha.astype(wide), LOG_FLOOR),
        log_mu=None if log_mu is None else jnp.maximum(log_mu.astype(wide), LOG_FLOOR),
        mask=None,
    )
    if mask is not None:
        inputs = _apply_mask(inputs, mask)

    y, end = None, state
    if tokens:
        y, end = dispatch("delta_rule", IMPLEMENTATIONS, implementation, inputs, state, read=read, block_t=block_t)
    if q is not None and read == "start":
        y = dot("bthk,bhkv->bthv", q, state.s, dtype, wide).astype(dtype)
    elif q is not None and y is None:
        y = jnp.zeros((batch, tokens, heads, u.shape[-1]), dtype)
    return DeltaRuleOutput(y, end.s, end.z)


def _start(given: jax.Array | None, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.zeros(shape, dtype) if given is None else given.astype(dtype)


def _apply_mask(inputs: Inputs, mask_BTH: jax.Array) -> Inputs:
    """Masked tokens become tokens that do nothing; `where`, not a product, so that NaN padding stays out."""

    def gate(x_BTH: jax.Array | None) -> jax.Array | None:
        return None if x_BTH is None else jnp.where(mask_BTH, x_BTH, 0)

    return Inputs(
        q=inputs.q,
        k=jnp.where(mask_BTH[..., None], inputs.k, 0),
        u=jnp.where(mask_BTH[..., None], inputs.u, 0),
        eta=gate(inputs.eta),
        log_alpha=gate(inputs.log_alpha),
        log_mu=gate(inputs.log_mu),
        mask=None if inputs.log_mu is None else mask_BTH.astype(inputs.log_mu.dtype),
    )


def _check(q, k, u, eta, log_alpha, log_mu, initial_state, initial_momentum, mask, read, block_t) -> None:
    """Raise with the offending shapes, before anything is computed."""
    if read not in READS:
        raise ValueError(f"read must be one of {', '.join(READS)}; got {read!r}")
    if block_t is not None and block_t < 1:
        raise ValueError(f"block_t must be at least 1; got {block_t}")
    if k.ndim != 4:
        raise ValueError(f"k must be [batch, time, heads, key width]; got shape {k.shape}")
    if u.ndim != 4 or u.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"u must be [batch, time, heads, value width] with the first three of k {k.shape}; got {u.shape}"
        )
    if initial_momentum is not None and log_mu is None:
        raise ValueError("initial_momentum was given without log_mu; pass log_mu, or drop initial_momentum")
    batch, _, heads, key_width = k.shape
    state = (batch, heads, key_width, u.shape[-1])
    expected = {
        "q": (q, k.shape),
        "eta": (eta, k.shape[:3]),
        "log_alpha": (log_alpha, k.shape[:3]),
        "log_mu": (log_mu, k.shape[:3]),
        "mask": (mask, k.shape[:3]),
        "initial_state": (initial_state, state),
        "initial_momentum": (initial_momentum, state),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for k {k.shape} and u {u.shape}; got {array.shape}")
    for name, array in {"k": k, "u": u, **{n: a for n, (a, _) in expected.items() if n != "mask"}}.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point; got {array.dtype}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, True where the token counts; got {mask.dtype}")
