"""The public function: checks, masks and dtypes are settled here, once, for every implementation."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule import pallas_gpu, pallas_tpu, reference, xla
from hope_kernels.delta_rule.config import Config
from hope_kernels.delta_rule.mesh import divide, division_by_type, undividable
from hope_kernels.delta_rule.segments import in_segments
from hope_kernels.delta_rule.tile import dot
from hope_kernels.delta_rule.types import (
    DeltaRuleOutput,
    Inputs,
    State,
    state_dtype,
    value_heads_per_key_head,
)
from hope_kernels.dispatch import Implementation, dispatch


def _kernel(module: ModuleType, segments: Callable[[Inputs], int] | None = None) -> Implementation:
    """A Pallas kernel, which cannot run where the compiler would have to divide it, cut into `segments` of time."""

    def cannot_run(inputs: Inputs, state: State, **how: Any) -> str | None:
        return module.cannot_run(inputs, state, **how) or undividable((inputs, state))

    return Implementation(in_segments(module.forward, segments), cannot_run, module.unsuited)


def _undivided(inputs: Inputs, state: State, *, config: Config, **how: Any) -> str | None:
    """The token loop waits for every token before, on whatever device."""
    del inputs, state, how
    return None if config.axis is None else f"a loop over tokens is not divided over the mesh axis {config.axis!r}"


IMPLEMENTATIONS = {  # the preferred one first
    "pallas_tpu": _kernel(pallas_tpu),
    "pallas_gpu": _kernel(pallas_gpu, pallas_gpu.segments),
    "xla": Implementation(in_segments(xla.forward)),
    "reference": Implementation(reference.forward, _undivided),
}
READS = ("start", "before", "after")
PRECISIONS = ("default", "high", "fast")
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
    segment_ids: jax.Array | None = None,
    read: Literal["start", "before", "after"] = "after",
    scale: float = 1.0,
    precision: Literal["default", "high", "fast"] = "default",
    implementation: str | None = None,
    config: Config | None = None,
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
    per tile, under the name "delta_rule_states" for `jax.checkpoint` policies (and the tiles' triangular inverses,
    "delta_rule_inverse", where a kernel keeps them).

    Args:
        q: [B, T, Hk, K] what is read with, or None for the final state only.
        k: [B, T, Hk, K] keys. Hk divides H; value head h is addressed by key head h // (H / Hk).
        u: [B, T, H, V] what is written, step size included. Memories that share keys and gates go through one call
            with their writes side by side along V: the triangular system is then solved once for all.
        eta: [B, T, H] erase coefficient (b of spec S2.1); None is zero and needs no triangular solve.
        log_alpha: [B, T, H] log of the retained fraction, at most 0 in normal use; None retains everything.
            Values below -30 count as -30.
        log_mu: [B, T, H] log of the momentum decay, floored like `log_alpha`; None means no momentum.
        initial_state: [B, H, K, V]; None is zeros.
        initial_momentum: [B, H, K, V], only with `log_mu`; None is zeros.
        mask: bool [B, T, H]; a False token leaves state and momentum exactly as they are, whatever its k, u and
            gates hold (its y still reads the state at that point).
        segment_ids: int [B, T], packed documents: wherever the id differs from that of the token before, state and
            momentum are emptied first. The first document continues the initial state; the final state is the last
            document's (give padding the id of the tokens before it, and mask it).
        read: which state y_t reads.
        scale: y is multiplied by it (1/sqrt(K), say).
        precision: for bfloat16 and float16 inputs. "default" is the above; "high" makes every product in the dtype
            of the state ("xla") or solves the triangular system in three passes (kernels); "fast" lets kernels use
            single passes in their gradients too. Other inputs are always computed at full precision.
        implementation: a name of `IMPLEMENTATIONS`, or None for the fastest that can run; `hope_kernels.explain`
            tells which. A named one runs or raises. Kernels do not run where the compiler would have to divide them
            over a mesh: see `delta_rule_sharded`.
        config: how the work is cut; changes the speed, never the numbers. None chooses.

    Returns:
        DeltaRuleOutput(y, state, momentum): y [B, T, H, V] in the input dtype, None without q; state [B, H, K, V];
        momentum [B, H, K, V], None without `log_mu`.

    Raises:
        ValueError: shapes that do not fit, an unknown `read`, `precision` or `implementation`, `initial_momentum`
            without `log_mu`.
        TypeError: arrays that are not floating point, a mask that is not bool, segment ids that are not integers.
        NotImplementedError: the named implementation exists but cannot run here.

    Example:
        >>> import jax.numpy as jnp
        >>> k = jnp.eye(3)[None, :, None, :]  # three orthogonal keys
        >>> u = jnp.arange(6.0).reshape(1, 3, 1, 2)
        >>> delta_rule(k, k, u, jnp.ones((1, 3, 1))).y[0, :, 0].tolist()
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]

    Reference: spec (S2.1), (S5.1)-(S5.6); Nested Learning, arXiv:2512.24695, (65), (88), (92), (93).
    """
    _check_options(read, precision, initial_momentum, log_mu)
    _check_arrays(q, k, u, eta, log_alpha, log_mu, initial_state, initial_momentum, mask, segment_ids)
    arrays = dict(q=q, k=k, u=u, eta=eta, log_alpha=log_alpha, log_mu=log_mu, mask=mask, segment_ids=segment_ids)
    arrays |= dict(initial_state=initial_state, initial_momentum=initial_momentum)
    present = {name: x for name, x in arrays.items() if x is not None}
    division = division_by_type(present)
    if division is not None:
        options: Any = dict(read=read, scale=scale, precision=precision, implementation=implementation, config=config)
        return divide(partial(delta_rule, **options), division, present)

    axis = None if config is None else config.axis
    dtype = jnp.result_type(k, u) if q is None else jnp.result_type(q, k, u)
    wide = state_dtype(dtype)
    batch, tokens, heads, value_width = u.shape
    shape = (batch, heads, k.shape[-1], value_width)
    state = State(_start(initial_state, shape, wide), None)
    if log_mu is not None:
        state = state._replace(z=_start(initial_momentum, shape, wide))

    inputs = Inputs(
        q=None if q is None else q.astype(dtype) if scale == 1.0 else (q.astype(wide) * scale).astype(dtype),
        k=k.astype(dtype),
        u=u.astype(dtype),
        eta=None if eta is None else eta.astype(wide),
        log_alpha=None if log_alpha is None else jnp.maximum(log_alpha.astype(wide), LOG_FLOOR),
        log_mu=None if log_mu is None else jnp.maximum(log_mu.astype(wide), LOG_FLOOR),
        mask=None,
        reset=None if segment_ids is None else _resets(segment_ids, wide, axis),
    )
    if mask is not None:
        inputs = _apply_mask(inputs, mask)

    y, end = None, state
    if tokens:
        running = inputs._replace(q=None) if read == "start" else inputs
        how = {"read": read, "config": config or Config(), "precision": precision}
        y, end = dispatch("delta_rule", IMPLEMENTATIONS, implementation, running, state, **how)
    if inputs.q is not None and read == "start":
        y = _read_start(inputs.q, inputs, state, axis)
    elif inputs.q is not None and y is None:
        y = jnp.zeros(u.shape, dtype)
    return DeltaRuleOutput(y, end.s, end.z)


def _read_start(q: jax.Array, inputs: Inputs, state: State, axis: str | None) -> jax.Array:
    """Reads of the initial state [B, T, H, V]: one product, no recurrence. After a reset there is nothing to read."""
    dtype, wide = q.dtype, state.s.dtype
    s = state.s.reshape(state.s.shape[0], inputs.k.shape[2], -1, *state.s.shape[2:])
    y = dot("bthk,bhgkv->bthgv", q, s, dtype, wide).reshape(inputs.u.shape)
    if inputs.reset is not None:
        resets = jnp.cumsum(inputs.reset, axis=1)
        if axis is not None:  # and those on the devices before
            ends = jax.lax.all_gather(resets[:, -1], axis)
            before = jnp.arange(ends.shape[0]) < jax.lax.axis_index(axis)
            resets += jnp.where(before[:, None], ends, 0).sum(0)[:, None]
        y = jnp.where((resets == 0)[..., None, None], y, 0)
    return y.astype(dtype)


def _resets(segment_ids_BT: jax.Array, dtype: jnp.dtype, axis: str | None) -> jax.Array:
    """1 where a document begins, except at the first token, which on an axis is that of the first device."""
    before_B1 = segment_ids_BT[:, :1]
    if axis is not None:
        last_B1, devices = segment_ids_BT[:, -1:], jax.lax.axis_size(axis)
        received_B1 = jax.lax.ppermute(last_B1, axis, [(i, i + 1) for i in range(devices - 1)])
        before_B1 = jnp.where(jax.lax.axis_index(axis) == 0, before_B1, received_B1)
    before_BT = jnp.concatenate([before_B1, segment_ids_BT[:, :-1]], axis=1)
    return (segment_ids_BT != before_BT).astype(dtype)


def _start(given: jax.Array | None, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.zeros(shape, dtype) if given is None else given.astype(dtype)


def _apply_mask(inputs: Inputs, mask_BTH: jax.Array) -> Inputs:
    """Masked tokens become tokens that do nothing; `where`, not a product, so that NaN padding stays out."""

    def gate(x_BTH: jax.Array | None) -> jax.Array | None:
        return None if x_BTH is None else jnp.where(mask_BTH, x_BTH, 0)

    per_key_head = mask_BTH
    group = value_heads_per_key_head(inputs)
    if group > 1:  # a key head is masked where all its value heads are; eta and u take care of the others
        per_key_head = mask_BTH.reshape(*mask_BTH.shape[:2], -1, group).any(-1)
    return inputs._replace(
        k=jnp.where(per_key_head[..., None], inputs.k, 0),
        u=jnp.where(mask_BTH[..., None], inputs.u, 0),
        eta=gate(inputs.eta),
        log_alpha=gate(inputs.log_alpha),
        log_mu=gate(inputs.log_mu),
        mask=None if inputs.log_mu is None else mask_BTH.astype(inputs.log_mu.dtype),
    )


def _check_options(read, precision, initial_momentum, log_mu) -> None:
    if read not in READS:
        raise ValueError(f"read must be one of {', '.join(READS)}; got {read!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if initial_momentum is not None and log_mu is None:
        raise ValueError("initial_momentum was given without log_mu; pass log_mu, or drop initial_momentum")


def _check_arrays(q, k, u, eta, log_alpha, log_mu, initial_state, initial_momentum, mask, segment_ids) -> None:
    """Raise with the offending shapes, before anything is computed."""
    if k.ndim != 4:
        raise ValueError(f"k must be [batch, time, key heads, key width]; got shape {k.shape}")
    if u.ndim != 4 or u.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"u must be [batch, time, heads, value width] with batch and time of k {k.shape}; got {u.shape}"
        )
    if not k.shape[2] or u.shape[2] % k.shape[2]:
        raise ValueError(f"the heads of k must divide those of u; got {k.shape[2]} and {u.shape[2]}")
    state = (u.shape[0], u.shape[2], k.shape[3], u.shape[3])
    expected = {
        "q": (q, k.shape),
        "eta": (eta, u.shape[:3]),
        "log_alpha": (log_alpha, u.shape[:3]),
        "log_mu": (log_mu, u.shape[:3]),
        "mask": (mask, u.shape[:3]),
        "segment_ids": (segment_ids, u.shape[:2]),
        "initial_state": (initial_state, state),
        "initial_momentum": (initial_momentum, state),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for k {k.shape} and u {u.shape}; got {array.shape}")
    floating = {"k": k, "u": u} | {n: a for n, (a, _) in expected.items() if n not in ("mask", "segment_ids")}
    for name, array in floating.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point; got {array.dtype}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, True where the token counts; got {mask.dtype}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers; got {segment_ids.dtype}")
