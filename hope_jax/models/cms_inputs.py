"""What the CMS chains of a model see, and the chains themselves: to distil one level into another (spec 11.4)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .block import build_block, build_chain
from .config import ModelConfig
from .ends import Ends
from .functional import Params, functional


class Chains(NamedTuple):
    """The CMS chains of all layers; `cms` is `params["blocks"]["cms"]`, arrays [L, ...]."""

    inputs: Callable[[Params, jax.Array], jax.Array]  # (params, tokens_BT) -> [L, B, T, D] of rows that start afresh
    apply: Callable[[Any, jax.Array], jax.Array]  # (cms, x [L, ..., D]) -> [L, ..., D]


def cms_chains(config: ModelConfig) -> Chains:
    """The chains of a model whose blocks end in one.

    Raises:
      ValueError: they do not.

    Example:
      >>> import jax
      >>> from hope_jax.models import ModelConfig, build_lm
      >>> config = ModelConfig(name="hope_attention", dim=16, layers=1, cms_hidden=(8,))
      >>> params = build_lm(config).init(jax.random.key(0))
      >>> chains = cms_chains(config)
      >>> x = chains.inputs(params, jnp.zeros((1, 4), int))
      >>> chains.apply(params["blocks"]["cms"], x).shape
      (1, 1, 4, 16)
    """
    if not config.has_cms or config.repeats != config.layers:
        raise ValueError(f"the blocks of {config.name!r} do not each end in a CMS chain; use hope or hope_attention")
    _, ends = functional(lambda rngs: Ends(config, rngs=rngs))
    _, block = functional(lambda rngs: build_block(config, rngs))
    _, chain = functional(lambda rngs: build_chain(config, rngs))

    def inputs(params: Params, tokens_BT: jax.Array) -> jax.Array:
        rest = {name: value for name, value in params.items() if name != "blocks"}

        def layer(x_BTD, weights):
            state = block(weights, tokens_BT.shape[0], method="init_state")
            _, middle_BTD = block(weights, x_BTD, state, phase=0, mask_BT=None, method="mix")
            return block(weights, middle_BTD, method="channel"), middle_BTD

        x_BTD = ends(rest, tokens_BT.astype(jnp.int32), method="embed")
        return jax.lax.scan(layer, x_BTD, params["blocks"])[1]

    return Chains(inputs, jax.vmap(chain))
