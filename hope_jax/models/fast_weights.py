"""Which weights of a model adapt inside the sequence: those of its first CMS levels, or of some layers' MLPs.

Norm gains are not among them: they belong to the outer level (spec 6.1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .cms import level_name
from .config import ModelConfig
from .functional import Params

type Weights = tuple[dict[str, Any], ...]  # per level its matrices, [L, in, out] of the L layers that belong to it

CMS_MATRICES = ("w2", "w1")
MLP_MATRICES = ("w_gate", "w_up", "w_down")


class FastWeights(NamedTuple):
    """A view of some parameters by level, fastest first."""

    take: Callable[[Params], Weights]
    put: Callable[[Params, Weights], Params]  # parameters with these weights in the place of their own


def fast_weights(config: ModelConfig) -> FastWeights:
    """The weights of the levels of `config.fast_chunks`."""
    if config.mlp_chunks:
        layers = [[i for i, c in enumerate(config.mlp_chunks) if c == chunk] for chunk in config.fast_chunks]
        return _of_layers(layers)
    return _of_chain(len(config.cms_chunks))


def _of_chain(depth: int) -> FastWeights:
    """Level i: `cms/level_i` of all layers."""
    names = [level_name(i) for i in range(depth)]

    def take(params: Params) -> Weights:
        cms = params["blocks"]["cms"]
        return tuple({key: cms[name][key] for key in CMS_MATRICES} for name in names)

    def put(params: Params, weights: Weights) -> Params:
        cms = params["blocks"]["cms"]
        new = {name: {**cms[name], **level} for name, level in zip(names, weights, strict=True)}
        return _with(params, "cms", {**cms, **new})

    return FastWeights(take, put)


def _of_layers(layers_by_level: list[list[int]]) -> FastWeights:
    """Level i: the MLPs of certain layers."""
    rows = [np.array(layers) for layers in layers_by_level]

    def take(params: Params) -> Weights:
        mlp = params["blocks"]["mlp"]
        return tuple({key: mlp[key][row] for key in MLP_MATRICES} for row in rows)

    def put(params: Params, weights: Weights) -> Params:
        mlp = dict(params["blocks"]["mlp"])
        for row, level in zip(rows, weights, strict=True):
            mlp |= {key: mlp[key].at[row].set(new) for key, new in level.items()}
        return _with(params, "mlp", mlp)

    return FastWeights(take, put)


def _with(params: Params, part: str, new: Params) -> Params:
    return {**params, "blocks": {**params["blocks"], part: new}}
