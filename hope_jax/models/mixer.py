"""What surrounds the sequence layer of every recurrent block: a norm per head, an output gate, a map out (spec 8.1)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hope_jax.placement import batch_axes
from hope_jax.sequence_layer import SequenceLayer

from .norm import RMSNorm
from .params import matmul, matrix


class Mixer(nnx.Module):
    """`(RMSNorm_per_head(layer(r)) * silu(r @ w_gate)) @ w_out`, the gate optional.

    Args:
      layer: for one example, [T, D] in and out; its parameters live here under `memory`.
      dim, heads: D, and the groups of channels that are normalised (None: the layer has a norm of its own).
      gated: multiply by the gate.
      out_gain: scale of the map out.
    """

    def __init__(
        self,
        layer: SequenceLayer,
        *,
        dim: int,
        heads: int | None,
        gated: bool,
        out_gain: float,
        rngs: nnx.Rngs,
    ):
        self.layer = layer
        self.memory = nnx.data(jax.tree.map(nnx.Param, layer.init(rngs.params())))
        if heads is not None:
            self.head_norm = RMSNorm(dim, groups=heads)
        self.gated = gated
        if gated:
            self.w_gate = matrix(rngs, dim, dim)
        self.w_out = matrix(rngs, dim, dim, out_gain)

    def init_state(self, batch_size: int) -> Any:
        """Every row starts from the learned start states; nothing is shared from then on."""
        state = self.layer.init_state(self._memory())
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch_size, *jnp.shape(leaf))), state)

    def __call__(
        self, r_BTD: jax.Array, state: Any, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        """Read and write the memories of each row; padding enters as zeros and writes nothing."""
        params, rows = self._memory(), partial(jax.vmap, spmd_axis_name=batch_axes(r_BTD.shape[0]))
        if mask_BT is None:
            apply = rows(lambda s, r: self.layer.apply(params, s, r, phase=phase))
            state, a_BTD = apply(state, r_BTD)
        else:
            r_BTD = jnp.where(mask_BT[:, :, None], r_BTD, 0)
            apply = rows(lambda s, r, m: self.layer.apply(params, s, r, phase=phase, mask_T=m))
            state, a_BTD = apply(state, r_BTD, mask_BT)
        y_BTD = a_BTD.astype(r_BTD.dtype)
        if hasattr(self, "head_norm"):
            y_BTD = self.head_norm(y_BTD)
        if self.gated:
            y_BTD = y_BTD * jax.nn.silu(matmul(r_BTD, self.w_gate))
        return state, matmul(y_BTD, self.w_out)

    def _memory(self) -> Any:
        return jax.tree.map(lambda leaf: leaf[...], self.memory, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
