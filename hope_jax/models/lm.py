"""The skeleton every language model shares: embedding, blocks scanned over depth, final norm, head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.placement import between_layers

from .block import build_block
from .config import ModelConfig
from .ends import Ends
from .functional import Params, functional


class LM(NamedTuple):
    """A language model as pure functions; every array of a state has the batch axis first.

    - `init(key) -> params`: nested dict of float32 arrays, the blocks stacked on a leading layer axis.
    - `init_state(params, batch_size) -> state`: fast state and caches of rows that have read nothing.
    - `apply(params, state, tokens_BT, *, phase=None, mask_BT=None) -> (state, logits_BTV)`.
      `phase` is the number of tokens every row of this state has read, when the caller knows it while tracing
      (0 for a fresh state); it selects the chunk-parallel path. None works for every state, row by row.
      `mask_BT` is False at padding, which neither attends, is attended to, nor writes; its logits mean
      nothing. Where attention is the only memory, a fresh state read with phase=0 also takes int32 numbers of
      documents, 0 at padding: they do not see each other.
    - `reset(params, state, rows_B) -> state`: the flagged rows start again (a document boundary); other rows
      have a different phase from then on, so call `apply` with `phase=None`, or flag every row.
    """

    init: Callable[[jax.Array], Params]
    init_state: Callable[[Params, int], Any]
    apply: Callable[..., tuple[Any, jax.Array]]
    reset: Callable[[Params, Any, jax.Array], Any]


def skeleton(config: ModelConfig, prefixes: tuple[int, ...] = ()) -> LM:
    """A model whose CMS levels all read the weights in `params`.

    Args:
      config: any `ModelConfig`; its `cms_chunks` are not looked at here (see `fast_levels`).
      prefixes: widths; with them `apply` returns `Ends.prefixes` in the place of logits (see `matryoshka`).

    Returns:
      `LM(init, init_state, apply, reset)`.
    """
    init_ends, ends = functional(lambda rngs: Ends(config, rngs=rngs))
    init_block, block = functional(lambda rngs: build_block(config, rngs))
    recompute = _remat(config.remat)

    def init(key: jax.Array) -> Params:
        ends_key, blocks_key = jax.random.split(key)
        blocks = jax.vmap(init_block)(jax.random.split(blocks_key, config.repeats))
        return {**init_ends(ends_key), "blocks": blocks}

    def init_state(params: Params, batch_size: int) -> Any:
        return _swap(jax.vmap(lambda layer: block(layer, batch_size, method="init_state"))(params["blocks"]))

    def apply(
        params: Params,
        state: Any,
        tokens_BT: jax.Array,
        *,
        phase: int | None = None,
        mask_BT: jax.Array | None = None,
    ) -> tuple[Any, jax.Array]:
        check_call(state, tokens_BT, phase, mask_BT, numbers=config.architecture.cache)
        rest = {name: value for name, value in params.items() if name != "blocks"}

        @recompute
        def body(x_BTD, layer):
            weights, layer_state = layer
            layer_state, x_BTD = block(weights, x_BTD, layer_state, phase=phase, mask_BT=mask_BT)
            return between_layers(x_BTD), layer_state

        x_BTD = between_layers(ends(rest, tokens_BT, method="embed"))
        x_BTD, state = jax.lax.scan(body, x_BTD, (params["blocks"], _swap(state)))
        if prefixes:
            return _swap(state), ends(rest, x_BTD, method="prefixes", widths=prefixes)
        return _swap(state), ends(rest, x_BTD, method="logits")

    return LM(init, init_state, apply, reset_rows(init_state))


def reset_rows(init_state: Callable[[Params, int], Any]) -> Callable[[Params, Any, jax.Array], Any]:
    """`reset` of a model whose states have the batch axis first: fresh values where a row is flagged."""

    def reset(params: Params, state: Any, rows_B: jax.Array) -> Any:
        fresh = init_state(params, rows_B.shape[0])

        def choose(new, old):
            return jnp.where(jnp.expand_dims(rows_B, tuple(range(1, old.ndim))), new, old)

        return jax.tree.map(choose, fresh, state)

    return reset


def check_call(
    state: Any, tokens_BT: jax.Array, phase: int | None, mask_BT: jax.Array | None, *, numbers: bool = False
) -> None:
    """Refuse tokens that are not `[B, T]` integers, a state of another batch, a wrong mask or phase.

    `numbers`: with phase 0 the mask may be numbers of documents.
    """
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers of shape [batch, time]; got {tokens_BT.dtype}{list(tokens_BT.shape)}")
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(state)}
    if rows != {tokens_BT.shape[0]}:
        raise ValueError(
            f"tokens have {tokens_BT.shape[0]} rows, the state has {sorted(rows)}; make it with "
            f"init_state(params, {tokens_BT.shape[0]})"
        )
    kinds = (bool, jnp.int32) if numbers and phase == 0 else (bool,)
    if mask_BT is not None and (mask_BT.shape != tokens_BT.shape or mask_BT.dtype not in kinds):
        raise TypeError(f"mask must be bool of shape {list(tokens_BT.shape)}; got {mask_BT.dtype}{list(mask_BT.shape)}")
    if phase is not None and not (isinstance(phase, int) and phase >= 0):
        raise TypeError(f"phase must be None or a Python integer, 0 or more; got {phase!r}")


def _swap(tree: Any) -> Any:
    """Exchange the two leading axes, batch and layers, of every array."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)


def _remat(policy: str) -> Callable[[Callable], Callable]:
    """Recomputation of a block in the backward pass, by name."""
    if policy == "none":
        return lambda body: body
    saveable = None if policy == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return lambda body: jax.checkpoint(body, policy=saveable, prevent_cse=False)
