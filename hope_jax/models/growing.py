"""Progressive stacking: a trained CMS gets a faster level in front, and what it had becomes slower (spec 6.8)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .build import build_lm
from .cms import level_name
from .config import ModelConfig
from .functional import Params
from .stacking import Pretrained


def add_fast_level(
    pretrained: tuple[ModelConfig, Params], *, hidden: int | None = None, key: jax.Array | None = None
) -> Pretrained:
    """A model with one more CMS level, the fastest, that computes what the model computed before.

    In every block level i becomes level i + 1, and the new level 0 is

        x + W1 gelu(W2 RMSNorm(x))        with W1 = 0 and W2 drawn as at the start of training

    so it adds exactly nothing until W1 has learned. W2 must not be zero too: neither would ever get a gradient. When
    the levels are written is not decided here: give the optimizer new periods, slower for those that were there.

    Args:
      pretrained: `(config, params)` of an architecture with CMS, all of whose levels are ordinary parameters.
      hidden: hidden width of the new level; None takes that of the fastest so far.
      key: of W2; None takes `jax.random.key(0)`.

    Returns:
      `Pretrained(config, params)`: `cms_hidden` is one longer, the other arrays are the very same.

    Raises:
      ValueError: no CMS, or levels of a kind that a new one could not leave as they are.

    Example:
      >>> config = ModelConfig(name="hope_attention", dim=16, layers=1, cms_hidden=(32,))
      >>> params = build_lm(config).init(jax.random.key(0))
      >>> grown = add_fast_level((config, params), hidden=8)
      >>> grown.config.cms_hidden, sorted(grown.params["blocks"]["cms"])
      ((8, 32), ['level_0', 'level_1'])

    Reference: spec 6.8 (i).
    """
    config, params = pretrained
    grown = with_fast_level(config, hidden)
    fresh = build_lm(grown).init(jax.random.key(0) if key is None else key)
    return Pretrained(grown, _grow(params, fresh))


def with_fast_level(config: ModelConfig, hidden: int | None = None) -> ModelConfig:
    """The config of `add_fast_level`; the arguments and errors are the same."""
    if not config.has_cms or not config.cms_hidden:
        raise ValueError(
            f"add_fast_level puts a level in front of a CMS; name={config.name!r} has none: "
            "take name='hope' or 'hope_attention', and one level at least"
        )
    if config.cms_chunks:
        raise ValueError(
            f"add_fast_level cannot keep the function of a model whose levels are written inside the sequence, "
            f"cms_chunks={config.cms_chunks}; add the level with cms_chunks=(), and make levels fast afterwards"
        )
    if config.cms_variant == "independent":
        raise ValueError(
            "add_fast_level cannot keep the function with cms_variant='independent': a new level takes its share "
            "of the mixture from the others; take cms_variant='sequential'"
        )
    width = config.cms_hidden[0] if hidden is None else hidden
    return dataclasses.replace(config, cms_hidden=(width, *config.cms_hidden))


def _grow(params: Params, fresh: Params) -> Params:
    """The CMS chains of `params`, wherever they are, each behind the first level of that of `fresh`."""
    return {
        name: _grown_chain(part, fresh[name]) if name == "cms" else _inside(part, fresh[name])
        for name, part in params.items()
    }


def _inside(part: Any, fresh: Any) -> Any:
    return _grow(part, fresh) if isinstance(part, dict) else part


def _grown_chain(chain: Params, fresh: Params) -> Params:
    new = fresh[level_name(0)]
    new = {**new, "w1": jnp.zeros_like(new["w1"])}
    return {level_name(0): new, **{level_name(i + 1): chain[level_name(i)] for i in range(len(chain))}}
