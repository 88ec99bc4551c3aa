"""Operations counted on the jaxpr: by hand, against XLA's count, and against 6 N T + attention."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.config import TrainConfig
from hope_jax.training.flops import Flops, flops_of
from hope_jax.training.optimizer import build_optimizer
from hope_jax.training.step import init_state, make_train_step, token_losses
from hope_kernels.delta_rule import delta_rule
from hope_kernels.delta_rule.config import Config

A, B = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 4 * 8 * 8


def loops(a, b):
    return jax.lax.scan(lambda a, _: (a @ b, None), a, length=5)[0]


def branches(a, b):
    return jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: a @ b @ b)


def recomputed(a, b):
    return jax.grad(jax.checkpoint(lambda a: ((a @ b) @ b).sum() ** 2))(a)


def kept(a, b):
    return jax.grad(lambda a: ((a @ b) @ b).sum() ** 2)(a)


def kernel(cost=None):
    def body(a, b, out):
        out[...] = a[...] @ b[...]

    whole = pl.BlockSpec((8, 8), lambda i: (0, 0))
    rows = pl.BlockSpec((1, 8), lambda i: (i, 0))
    return pl.pallas_call(body, grid=(4,), in_specs=[rows, whole], out_specs=rows, out_shape=A, cost_estimate=cost)


def divided(a, b):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(a, b)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (jnp.matmul, 1),
        (jax.jit(lambda a, b: jnp.einsum("ij,kj->ik", a, b)), 1),
        (loops, 5),
        (branches, 2),
        (kept, 4),
        (recomputed, 6),
        (kernel(), 1),
        (divided, 1),
    ],
)
def test_products_by_hand(function, products):
    assert flops_of(function, A, B).products == products * PRODUCT


def test_elementwise_work_and_what_a_kernel_says_of_itself():
    assert flops_of(lambda a: jnp.exp(2 * a + 1).sum(), A) == Flops(0, 3 * 32)
    assert flops_of(kernel(pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=0)), A, B) == Flops(7, 0)


def test_a_loop_without_a_known_end_is_refused():
    with pytest.raises(ValueError, match=r"while loop .* use lax\.scan"):
        flops_of(lambda a: jax.lax.while_loop(lambda a: a.sum() > 0, lambda a: a - 1, a), A)


def test_a_convolution_is_what_xla_counts():
    x, w = jax.ShapeDtypeStruct((2, 3, 16), jnp.float32), jax.ShapeDtypeStruct((6, 3, 5), jnp.float32)

    def conv(x, w):
        return jax.lax.conv(x, w, (1,), "VALID")

    assert flops_of(conv, x, w).total == xla_count(conv, x, w)


def test_a_tpu_kernel_counts_nearly_what_the_xla_form_does():
    """Its tiles solve the triangular system another way, and its first tile counts like every other."""
    x, eta = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 256, 2), jnp.float32)

    def count(implementation, interpret):
        config = Config(block_t=64, interpret=interpret)
        return flops_of(lambda x, eta: delta_rule(x, x, x, eta, implementation=implementation, config=config), x, eta)

    assert count("pallas_tpu", True).products == pytest.approx(count("xla", None).products, rel=0.25)


def test_a_gpu_kernel_counts_its_tiles(monkeypatch):
    """In whole products of 64 x 64 x 64: those of the memory, and those that invert the triangular system."""
    pytest.importorskip("absl")
    choose = importlib.import_module("hope_kernels.delta_rule.pallas_gpu.choose")
    monkeypatch.setattr(choose, "_wrong_machine", lambda device: None)
    batch, tokens, heads = 2, 256, 2
    x = jax.ShapeDtypeStruct((batch, tokens, heads, 64), jnp.bfloat16)
    eta = jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32)
    config = Config(segments=1)
    found = flops_of(lambda x, eta: delta_rule(x, x, x, eta, implementation="pallas_gpu", config=config), x, eta)
    products = found.products / (2 * 64**3 * batch * heads * tokens / 64)
    assert products == int(products) and 8 <= products <= 20


def small(name):
    model = ModelConfig(
        name=name, dim=32, layers=1, heads=2, memory_hidden=8, cms_hidden=(128, 128), chunk_proj=8, chunk_mem=8
    )
    return TrainConfig(model=model, steps=10, batch_size=2, seq_len=16)


def xla_count(function, *args):
    found: Any = jax.jit(function).lower(*args).compile().cost_analysis()
    return found["flops"]


@pytest.mark.parametrize("name", ["transformer", "hope_attention", pytest.param("hope", marks=pytest.mark.slow)])
def test_a_training_step_is_within_a_tenth_of_what_xla_counts(name, monkeypatch):
    """With its loops unrolled: XLA counts the body of a loop once."""
    config = small(name)
    lm, tx = build_lm(config.model), build_optimizer(config)
    state = jax.eval_shape(lambda: init_state(lm, tx, 0))
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.uint8)
    step = make_train_step(lm, tx, config)
    counted = flops_of(step, state, tokens)
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *args, **kwargs: scan(*args, **{**kwargs, "unroll": True}))
    assert counted.total == pytest.approx(xla_count(make_train_step(lm, tx, config), state, tokens), rel=0.1)
    assert counted.products > 0.75 * counted.total


def test_the_gradient_of_a_transformer_is_6nt_and_attention():
    config = TrainConfig(model=ModelConfig(name="transformer", dim=64, layers=3, heads=2), batch_size=2, seq_len=128)
    lm, (rows, length) = build_lm(config.model), (config.batch_size, config.seq_len)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rows, length + 1), jnp.uint8)
    counted = flops_of(jax.grad(lambda params, tokens: token_losses(lm, params, tokens).mean()), params, tokens)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)  # tied: the embedding is the head
    attention = 12 * config.model.layers * config.model.dim * rows * length * length  # every pair, masked or not
    assert counted.products == pytest.approx(6 * weights * rows * length + attention, rel=0.02)
