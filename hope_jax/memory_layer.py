"""A sequence layer around a memory: projections make each token's key, value, query and gates.

Most models of the literature are this layer with another nest: what differs between linear attention, DeltaNet,
Mamba-2 or Titans is the memory, its rule and its gates (`hope_jax/sequence.py`, `titans.py`), not the projections.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.gates import Gates, no_gates
from hope_jax.placement import by_head
from hope_jax.sequence_layer import SequenceLayer, identity_conv, l2_normalize, short_conv
from hope_jax.types import Nest, NestState, Params, Tokens


@dataclass(frozen=True)
class Projections:
    """How a layer turns its input [T, D] into tokens for each head's memory.

    q, k, v = activation(conv(r @ w)), cut into heads; then q and k pass through `feature`.
    """

    dim: int  # D
    heads: int  # H
    key_width: int  # K
    value_width: int  # V
    gates: Gates = no_gates()  # noqa: RUF009  a pair of functions
    feature: Callable[[jax.Array], jax.Array] = l2_normalize  # of keys and queries [..., K]
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    conv_window: int = 4  # 0: no convolution
    key_heads: int | None = None  # heads of q and k that the memories share, a divisor of H; None: one per memory

    def init(self, key: jax.Array) -> Params:
        """Outer parameters: projections, filters and gates."""
        q, k, v, gates = jax.random.split(key, 4)
        params = {
            f"w{name}": jax.random.normal(rng, (self.dim, heads * width)) / self.dim**0.5
            for (name, (heads, width)), rng in zip(self._shapes.items(), (q, k, v), strict=True)
        }
        params["gates"] = self.gates.init(gates, self.dim, self.heads)
        if self.conv_window:
            params["conv"] = {n: identity_conv(self.conv_window, shape) for n, shape in self._shapes.items()}
        return params

    def tails(self, dtype: Any) -> dict[str, jax.Array]:
        """The convolutions' inputs before the first token: none."""
        rows = max(self.conv_window - 1, 0)
        return {n: jnp.zeros((rows, *shape), dtype) for n, shape in self._shapes.items()}

    def __call__(
        self, params: Params, tails: dict[str, jax.Array], r_TD: jax.Array, mask_T: jax.Array | None
    ) -> tuple[dict[str, jax.Array], Tokens]:
        """New tails and the tokens of a call; padding enters the convolutions as zeros."""
        made, new = {}, {}
        for name, shape in self._shapes.items():
            raw_THK = (r_TD @ params[f"w{name}"].astype(r_TD.dtype)).reshape(-1, *shape)
            if mask_T is not None:
                raw_THK = jnp.where(mask_T[:, None, None], raw_THK, 0)
            new[name] = tails[name]
            if self.conv_window:
                tail, kernel = (x.astype(r_TD.dtype) for x in (tails[name], params["conv"][name]))
                tail, raw_THK = short_conv(kernel, tail, raw_THK)
                new[name] = tail.astype(tails[name].dtype)
            made[name] = self.activation(raw_THK)
        gates = self.gates.apply(params.get("gates", {}), r_TD)
        q, k = (self._share(self.feature(made[n])) for n in ("q", "k"))
        return new, Tokens(key=k, value=made["v"], query=q, mask=mask_T, **gates)

    @property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        keys = (self.key_heads or self.heads, self.key_width)
        return {"q": keys, "k": keys, "v": (self.heads, self.value_width)}

    def _share(self, x_THK: jax.Array) -> jax.Array:
        """The key head of every memory."""
        return jnp.repeat(x_THK, self.heads // x_THK.shape[1], axis=1)


class MemoryLayerState(NamedTuple):
    nest: NestState  # every head's memory, weights [H, ...]
    tails: dict[str, jax.Array]  # [W - 1, H, K or V] of q, k, v


def memory_layer(
    memory: Nest,
    projections: Projections,
    *,
    learned_start: bool = False,
    skip: bool = False,
    adjust: Callable[[Params, Tokens], Tokens] | None = None,
    adjust_init: Callable[[jax.Array, int], Params] | None = None,
) -> SequenceLayer:
    """A layer of H memories, one per head, over the tokens that its projections make.

    Args:
        memory: a nest over `Tokens`, written for one head.
        projections: what the tokens are made of.
        learned_start: the memories' start weights are outer parameters, as those of an MLP must be. False: they start
            as the memory's own `init` makes them, which must not depend on the key (an empty matrix).
        skip: add the value, times a learned number per head, to the read (the D of Mamba-2).
        adjust: `adjust(params, tokens) -> tokens`, a last change of the tokens, with parameters of its own from
            `adjust_init(key, heads)`.

    Returns:
        A `SequenceLayer`; the reads come out with heads concatenated, [T, H V], in the dtype of the input.

    Example:
        >>> from hope_jax import delta_net
        >>> from hope_jax.gates import read_outs, step_size
        >>> gates = read_outs(eta=step_size(0.5, most=1.0))
        >>> layer = memory_layer(delta_net(4, 4), Projections(8, 2, 4, 4, gates))
        >>> params = layer.init(jax.random.key(0))
        >>> state, y = layer.apply(params, layer.init_state(params), jnp.ones((6, 8)))
        >>> y.shape
        (6, 8)

    Reference: spec 7.2, 7.8; the layers of arXiv:2406.06484 and 2412.06464.
    """

    def start(key: jax.Array) -> Any:
        return jax.vmap(memory.params)(jax.random.split(key, projections.heads))

    def init(key: jax.Array) -> Params:
        made, begin, change = jax.random.split(key, 3)
        params = projections.init(made)
        if learned_start:
            params["start"] = {f"level_{i}": w for i, w in enumerate(start(begin))}
        if skip:
            params["skip"] = jnp.ones(projections.heads)
        if adjust_init is not None:
            params["adjust"] = adjust_init(change, projections.heads)
        return params

    def init_state(params: Params) -> MemoryLayerState:
        dtype = params["wq"].dtype
        if learned_start:
            weights = tuple(params["start"][f"level_{i}"] for i in range(len(params["start"])))
        else:
            weights = jax.tree.map(lambda w: w.astype(dtype), start(jax.random.key(0)))
        return MemoryLayerState(memory.init(weights), projections.tails(dtype))

    def apply(params: Params, state: MemoryLayerState, r_TD: jax.Array, phase: int | None = None, mask_T=None):
        tails, tokens = projections(params, state.tails, r_TD, mask_T)
        if adjust is not None:
            tokens = adjust(params.get("adjust", {}), tokens)
        tokens = jax.tree.map(lambda x: by_head(x, 1) if x.ndim > 1 else x, tokens)
        inner, y_THV = memory.apply(state.nest, tokens, phase)
        if skip:
            y_THV = y_THV + params["skip"].astype(y_THV.dtype)[None, :, None] * tokens.value.astype(y_THV.dtype)
        return MemoryLayerState(inner, tails), y_THV.reshape(r_TD.shape[0], -1).astype(r_TD.dtype)

    return SequenceLayer(init, init_state, apply)
