"""The mixer of a Hope block: self-modifying Titans, normalised per head, gated, mapped out (spec 8.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hope_jax.self_modifying import SelfModifyingConfig, self_modifying

from .config import ModelConfig
from .norm import RMSNorm
from .params import matmul, matrix


class HopeMixer(nnx.Module):
    """`(RMSNorm_per_head(self_modifying(r)) * silu(r @ w_gate)) @ w_out`, the gate optional."""

    def __init__(self, config: ModelConfig, *, out_gain: float, rngs: nnx.Rngs):
        self.layer = self_modifying(_layer_config(config))
        self.memory = nnx.data(jax.tree.map(nnx.Param, self.layer.init(rngs.params())))
        self.head_norm = RMSNorm(config.dim, groups=config.heads)
        self.gated = config.out_gate
        if self.gated:
            self.w_gate = matrix(rngs, config.dim, config.dim)
        self.w_out = matrix(rngs, config.dim, config.dim, out_gain)

    def init_state(self, batch_size: int) -> Any:
        """Every row starts from the learned start states; nothing is shared from then on."""
        state = self.layer.init_state(self._memory())
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch_size, *jnp.shape(leaf))), state)

    def __call__(
        self, r_BTD: jax.Array, state: Any, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        """Read and write the memories of each row; padding enters as zeros and writes nothing."""
        params = self._memory()
        if mask_BT is None:
            state, a_BTD = jax.vmap(lambda s, r: self.layer.apply(params, s, r, phase=phase))(state, r_BTD)
        else:
            r_BTD = jnp.where(mask_BT[:, :, None], r_BTD, 0)
            state, a_BTD = jax.vmap(lambda s, r, m: self.layer.apply(params, s, r, phase=phase, mask_T=m))(
                state, r_BTD, mask_BT
            )
        y_BTD = self.head_norm(a_BTD.astype(r_BTD.dtype))
        if self.gated:
            y_BTD = y_BTD * jax.nn.silu(matmul(r_BTD, self.w_gate))
        return state, matmul(y_BTD, self.w_out)

    def _memory(self) -> Any:
        return jax.tree.map(lambda leaf: leaf[...], self.memory, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def _layer_config(config: ModelConfig) -> SelfModifyingConfig:
    return SelfModifyingConfig(
        dim=config.dim,
        heads=config.heads,
        memory_hidden=config.memory_hidden,
        chunk_proj=config.chunk_proj,
        chunk_mem=config.chunk_mem,
        read=config.read,
        adaptive_q=config.adaptive_q,
        momentum=config.momentum,
        retention=config.retention,
        dgd_decay=config.dgd_decay,
        exact=config.exact,
        mlp_rule=config.mlp_rule,
        conv_window=config.conv_window,
        value_norm=config.value_norm,
        error_clip=config.error_clip,
        eta_init=config.eta_init,
        remat=config.remat != "none",
    )
