"""Ad-hoc level stacking: the MLPs of a trained Transformer become levels that go on learning (spec 6.7).

Nothing is copied or added: a layer's MLP is *assigned* to a level and its weights become that level's start state.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .config import ModelConfig
from .functional import Params


class Pretrained(NamedTuple):
    """A trained model: what `build_lm` needs and what its functions take."""

    config: ModelConfig
    params: Params


def stack_levels(
    pretrained: tuple[ModelConfig, Params],
    levels: Mapping[int | Iterable[int], int | None],
    *,
    eta: float = 0.1,
) -> Pretrained:
    """Make Hope-Attention of a trained Transformer by assigning the MLPs of its layers to levels.

    Layers of one chunk size C form one level: inside the sequence their matrices W, each row its own, follow

        W <- W - eta / C * sum of grad_W (next-token loss) over the C tokens

    and start at the trained weights, which stay ordinary parameters of the outer optimizer. At eta = 0 the logits are
    those of the trained model, bit for bit.

    Args:
      pretrained: `(config, params)`, for example from `load_pretrained(run)` or `load_llama(folder)`.
      levels: layers -> chunk size in tokens, counted from 0 at the input: `{range(0, 4): 16, 4: 64, (5, 7): None}`.
        None, like a layer that is not named, is an ordinary MLP. Sizes must divide each other. The paper does not say
        which layers it made fast; contiguous groups with the fast ones at the input are a place to start.
      eta: learning rate of the levels, `cms_eta` of the config.

    Returns:
      `Pretrained(config, params)` for `build_lm`: the config of the levels and the very same parameters. Variants
      ("nested", truncated gradients) are further fields: `dataclasses.replace(config, cms_variant="nested")`.

    Raises:
      ValueError: not a Transformer, a layer that it does not have or that is named twice, or sizes that do not divide.

    Example:
      >>> import jax
      >>> from hope_jax.models import build_lm
      >>> config = ModelConfig(name="transformer", dim=16, layers=3)
      >>> params = build_lm(config).init(jax.random.key(0))
      >>> stacked = stack_levels((config, params), {0: 4, (1, 2): 16})
      >>> stacked.config.mlp_chunks, stacked.params is params
      ((4, 16, 16), True)

    Reference: paper section 7.3; spec 6.7.
    """
    config, params = pretrained
    if config.name != "transformer":
        raise ValueError(
            f"stack_levels assigns the one MLP of each layer of a transformer; got name={config.name!r}, "
            f"whose levels are set by cms_chunks"
        )
    chunks: dict[int, int | None] = {}
    for layers, chunk in levels.items():
        for layer in [layers] if isinstance(layers, int) else layers:
            if not 0 <= layer < config.layers:
                raise ValueError(f"there is no layer {layer}: the model has layers 0 to {config.layers - 1}")
            if layer in chunks:
                raise ValueError(f"layer {layer} is named twice; a layer's MLP belongs to one level")
            chunks[layer] = chunk
    by_layer = tuple(chunks.get(layer) for layer in range(config.layers))
    return Pretrained(dataclasses.replace(config, mlp_chunks=by_layer, cms_eta=eta), params)
