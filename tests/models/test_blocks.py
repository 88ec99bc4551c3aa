"""Compositions: a block of each is the loop in NumPy float64 that its line in the table of `hope_jax` says."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hope_jax.models import ModelConfig
from hope_jax.models.block import build_block
from hope_jax.models.functional import functional
from tests.models import loops
from tests.oracles import assert_close, compiled, float64, numpy64

D, H, T = 8, 2, 6
SIZES: dict[str, Any] = {"dim": D, "heads": H, "memory_hidden": 3, "chunk_proj": 3, "chunk_mem": 3, "max_length": T}
SIZES |= {"mlp_hidden": 5, "cms_hidden": (5, 3), "window": 4, "persistent": 2, "eta_init": 0.3}

MIXERS = {
    "hope": (loops.mix_self_modifying,),
    "hope_attention": (loops.mix_attention,),
    "transformer": (loops.mix_attention,),
    "titans_mag": (loops.mix_gated_by_memory,),
    "titans_mal": (loops.mix_memory_then_attention,),
    "mamba2": (loops.mix_mamba2,),
    "samba": (loops.mix_mamba2, loops.mix_window),
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_block_is_the_loop(name, x64, rng):
    """With parameters away from their special start values: gains, filters and gates."""
    config = ModelConfig(name=name, layers=len(MIXERS[name]), **SIZES)
    init, apply = functional(lambda rngs: build_block(config, rngs))
    params = jax.tree.map(lambda w: w + 0.2 * rng.normal(size=w.shape), numpy64(init(jax.random.key(0))))
    x = rng.normal(size=(T, D))

    def run(params, x):
        state = apply(params, 1, method="init_state")
        return apply(params, x[None], state, phase=0, mask_BT=None)[1][0]

    y, want = compiled(run)(float64(params), jnp.asarray(x)), x
    for i, mix in enumerate(MIXERS[name]):
        want = loops.block(params.get(f"block_{i}", params), want, mix, config)
    assert_close(y, want)
