"""Every architecture of the table, in the least that tells it works; what all promise is in test_contract.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import ARCHITECTURES, ModelConfig, build, build_lm, count_parameters, match_parameters
from tests.models.cases import CASES, distinct_tokens
from tests.oracles import compiled

LENGTH = 9  # over two chunks of four, and one token


# In the quick contract already, or a sibling of one that is here.
LATER = (
    "hope hope_attention transformer self_modifying_titans titans_mag titans_mal ttt_linear dla gated_delta_net comba "
)
LATER += "retnet linear_attention"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LATER.split() else ()) for n in sorted(ARCHITECTURES)],
)
def test_a_stream_of_tokens_is_the_parallel_pass(name):
    """One block of it, token by token in a scan against the whole sequence, in one program."""
    config = dataclasses.replace(CASES[name], layers=len(ARCHITECTURES[name].mixers))
    lm = build_lm(config)
    tokens = distinct_tokens(rows=2, length=LENGTH)

    def both(key):
        params = lm.init(key)
        params["embedding"] = 25 * params["embedding"]  # logits of order one
        fresh = lm.init_state(params, 2)
        one = lambda state, token: lm.apply(params, state, token[:, None])  # noqa: E731
        _, stream = jax.lax.scan(one, fresh, tokens.T)
        return lm.apply(params, fresh, tokens, phase=0)[1], jnp.moveaxis(stream[:, :, 0], 0, 1)

    whole, stream = compiled(both)(jax.random.key(0))
    assert 0.3 < float(jnp.std(whole)) < 3
    np.testing.assert_allclose(stream, whole, rtol=0, atol=1e-5)


def test_build_takes_a_name():
    """And refuses one that does not exist."""
    config = ModelConfig(dim=16, layers=1)
    shapes = jax.eval_shape(build("retnet", config).init, jax.random.key(0))
    assert "mlp" in shapes["blocks"] and "memory" in shapes["blocks"]["mixer"]
    with pytest.raises(ValueError, match=r"name must be one of .*got 'delta'"):
        build("delta", config)


def test_a_hybrid_needs_whole_rounds_of_its_mixers():
    with pytest.raises(ValueError, match=r"samba alternates 2 mixers, so layers must be a multiple of 2; got 3"):
        ModelConfig(name="samba", layers=3)


SWITCHES = {"memory": "linear", "objective": "dot_product", "read": "before", "momentum": None, "retention": False}
SWITCHES |= {"dgd_decay": False, "exact": False, "mlp_rule": "layerwise", "adaptive_q": True, "static": ("k",)}
SWITCHES |= {"conv_window": 0, "value_norm": False, "error_clip": 0.5, "chunk_proj": 4, "chunk_mem": 4}
SWITCHES |= {"surprise": 1.0, "stage": 2}


def test_every_switch_of_hope_reaches_its_boxes():
    """The traced program is another one."""

    def program(**switch):
        fields = {"dim": 8, "layers": 1, "memory_hidden": 4, "chunk_proj": 2, "chunk_mem": 2, **switch}
        lm = build_lm(ModelConfig(name="hope", **fields))
        params = jax.eval_shape(lm.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return str(jax.make_jaxpr(lambda p, t: lm.apply(p, lm.init_state(p, 1), t, phase=0)[1])(params, tokens))

    plain = program()
    assert plain == program(momentum=0.9)
    assert not [name for name, value in SWITCHES.items() if program(**{name: value}) == plain]
    gates = ({}, {"surprise_temperature": 1.0}, {"gate_retention": True})
    assert len({program(surprise=1.0, **more) for more in gates}) == len(gates)


def test_hope_without_cms():
    """`cms="none"` of spec 8.4: what is left of a block is its mixer."""
    config = ModelConfig(name="hope", dim=16, layers=2, memory_hidden=8, cms_hidden=())
    shapes = jax.eval_shape(build_lm(config).init, jax.random.key(0))
    assert set(shapes["blocks"]) == {"mixer", "mixer_norm"}
    lm, tokens = build_lm(config), jnp.arange(12)[None] % 5
    params = lm.init(jax.random.key(0))
    assert np.isfinite(lm.apply(params, lm.init_state(params, 1), tokens, phase=0)[1]).all()
    wider = dataclasses.replace(config, dim=20)
    assert match_parameters(config, count_parameters(wider)) == wider  # there is no other width to fit


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("hope", "rwkv7", "samba", "swa") else pytest.mark.slow)
        for n in sorted(ARCHITECTURES)
    ],
)
def test_parameters_can_be_matched(name):
    target = count_parameters(ModelConfig(name="transformer", dim=32))
    fitted = match_parameters(ModelConfig(name=name, dim=32, memory_hidden=16), target)
    assert abs(count_parameters(fitted) - target) <= 0.01 * target
