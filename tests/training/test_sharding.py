"""The rule table: where each array lies."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from hope_jax.training.config import MeshConfig
from hope_jax.training.errors import UserError
from hope_jax.training.sharding import make_mesh, shardings, spec_for


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/blocks/mixer/wq", (2, 64, 64), P(None, "fsdp", "tensor")),
        ("opt_state/0/mu/blocks/mixer/wo", (2, 64, 64), P(None, "tensor", "fsdp")),
        ("params/embedding", (256, 64), P("tensor", "fsdp")),
        ("params/head", (64, 256), P("fsdp", "tensor")),
        ("params/blocks/mixer/memory/in_proj", (2, 64, 64), P(None, "fsdp", "tensor")),
        ("params/blocks/mixer/memory/static/q", (2, 64, 64), P(None, "fsdp", "tensor")),
        ("params/blocks/mixer/memory/boxes/mem/w1", (2, 2, 32, 16), P(None, "tensor", "fsdp", None)),
        ("params/blocks/mixer/memory/wk", (2, 64, 64), P(None, "fsdp", "tensor")),
        ("params/blocks/block_0/mixer/memory/start/level_0/w2", (2, 2, 32, 16), P(None, "tensor", "fsdp", None)),
        ("params/blocks/mixer/memory/conv/q", (2, 4, 2, 32), P(None, None, "tensor", None)),
        ("params/blocks/mixer/memory/gates/eta/w", (2, 2, 32), P(None, None, None)),  # small: whole everywhere
        ("params/blocks/mixer/attention/wo", (2, 64, 64), P(None, "tensor", "fsdp")),
        ("params/blocks/mixer/recall/w_out", (2, 64, 64), P(None, "tensor", "fsdp")),
        ("params/blocks/mixer/recall/memory/wq", (2, 64, 64), P(None, "fsdp", "tensor")),
        ("params/blocks/mixer/memory/memory_k", (2, 64, 64), P(None, "fsdp", "tensor")),
        ("params/blocks/mixer/memory/start/w", (2, 2, 32, 100), P(None, "tensor", "fsdp", None)),
        ("params/blocks/mixer/memory/start/level_0/attention", (2, 2, 32, 32), P(None, "tensor", "fsdp", None)),
        ("params/blocks/cms/level_0/w1", (2, 128, 64), P(None, "tensor", "fsdp")),
        ("params/blocks/cms/level_1/w2", (2, 64, 128), P(None, "fsdp", "tensor")),
        ("params/blocks/cms/level_1/norm/scale", (2, 64), P(None, None)),
        ("params/blocks/mlp/w_down", (2, 175, 64), P(None, None, "fsdp")),  # 175 does not divide
        ("params/blocks/mixer_norm/scale", (2, 64), P(None, None)),
        ("opt_state/count", (), P()),
    ],
)
def test_first_match_is_aligned_with_the_last_dimensions(mesh, path, shape, spec):
    assert spec_for(path, shape, mesh) == spec


def test_first_match_wins(mesh):
    rules = [("wq$", P("data")), ("w", P("tensor")), ("", P())]
    assert spec_for("a/wq", (4,), mesh, rules) == P("data")
    assert spec_for("a/wk", (4,), mesh, rules) == P("tensor")


def test_moments_lie_where_their_parameter_lies(mesh):
    params = {"blocks": {"mixer": {"wq": jnp.zeros((2, 8, 8))}}}
    placed = shardings({"params": params, "opt_state": {"mu": params}}, mesh)
    assert placed["params"] == placed["opt_state"]["mu"]


def test_a_mesh_that_is_too_large_says_how_many_devices_there_are():
    with pytest.raises(UserError, match=f"needs 16 devices, {len(jax.devices())} visible"):
        make_mesh(MeshConfig(data=16))
