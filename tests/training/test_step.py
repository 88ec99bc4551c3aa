"""The training step: the same numbers on every mesh, one compile, slow levels, accumulation, the optimizer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.models import ModelConfig
from hope_jax.training.config import MeshConfig, TrainConfig
from hope_jax.training.optimizer import (
    build_optimizer,
    decay_mask,
    learning_rate_schedule,
    period_labels,
)
from hope_jax.training.sharding import path_string
from hope_jax.training.step import accumulated_grad, build_program

EPS = float(jnp.finfo(jnp.float32).eps)


def model(name, **changes):
    return ModelConfig(
        name=name, dim=16, layers=1, heads=4, memory_hidden=8, cms_hidden=(16, 16), max_length=32, **changes
    )


def config(name="transformer", **changes):
    values = {"model": model(name), "steps": 20, "batch_size": 8, "seq_len": 16, "warmup_steps": 4}
    return TrainConfig(**values | changes)  # type: ignore[arg-type]


def tokens(config, step):
    rng = np.random.default_rng([7, step])
    return rng.integers(97, 101, (config.batch_size, config.seq_len + 1)).astype(np.uint8)


def run(config, steps):
    """Losses, final state and program of a number of steps."""
    program = build_program(config)
    state, losses = program.init(), []
    for step in range(steps):
        state, metrics = program.train_step(state, program.put_batch(tokens(config, step)))
        losses.append(float(metrics.loss))
    return np.array(losses), state, program


EIGHT = MeshConfig(fsdp=2, tensor=2, sequence=2)


def compare_meshes(name, mesh=EIGHT):
    one, _, program = run(config(name), 20)
    assert program.train_step._cache_size() == 1
    assert one[-1] < one[0]
    eight, state, program = run(config(name, mesh=mesh), 20)
    assert program.train_step._cache_size() == 1
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    # The mesh is used: no device holds all of the training state.
    sizes = [
        (leaf.addressable_shards[0].data.size, leaf.size) for leaf in jax.tree.leaves((state.params, state.opt_state))
    ]
    assert sum(local for local, _ in sizes) < 0.5 * sum(whole for _, whole in sizes)


def test_eight_devices_give_the_loss_curve_of_one():
    compare_meshes("transformer")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hope", "hope_attention", "delta_net", "titans"])
def test_eight_devices_give_the_loss_curve_of_one_for_every_model(name):
    compare_meshes(name)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 2, "tensor": 2, "sequence": 2}])
def test_other_meshes_give_the_loss_curve_of_one(axes):
    compare_meshes("hope", MeshConfig(**axes))


def test_accumulation_is_the_gradient_of_the_whole_batch():
    def loss_fn(params, batch):
        return jnp.tanh(batch @ params["w"]).mean(), batch

    params = {"w": jax.random.normal(jax.random.key(0), (5,))}
    batch = jax.random.normal(jax.random.key(1), (12, 5))
    whole = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
    for pieces in (1, 3, 4):
        parts = accumulated_grad(loss_fn, params, batch, pieces)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=50 * EPS, atol=EPS), parts, whole)


@pytest.fixture(scope="module")
def levels():
    """Parameters before and after each of five steps with CMS periods 1 and 2, their metrics, and the program."""
    settings = config("hope_attention", cms_periods=(1, 2), batch_size=2, seq_len=4, steps=8)
    program = build_program(settings)
    state = program.init()
    history, told = [jax.device_get(state.params)], []
    for step in range(5):
        state, metrics = program.train_step(state, program.put_batch(tokens(settings, step)))
        history.append(jax.device_get(state.params))
        told.append(jax.device_get(metrics))
    return history, told, program, jax.device_get(program.distances(state.params))


def test_a_slow_level_moves_at_its_steps_and_no_other(levels):
    history, _, program, _ = levels

    def moved(level, step):
        before, after = (history[i]["blocks"]["cms"][f"level_{level}"] for i in (step - 1, step))
        return any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))

    assert [moved(0, step) for step in range(1, 6)] == [True] * 5
    assert [moved(1, step) for step in range(1, 6)] == [False, True, False, True, False]
    assert program.train_step._cache_size() == 1


def test_the_metrics_of_the_levels_are_what_their_parameters_did(levels):
    history, told, _, distances = levels

    def apart(a, b):
        """Norms of the difference by level, and of all of it."""
        squares = {level: 0.0 for level in ("level_0", "level_1", "rest")}
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
            level = next((name for name in squares if f"/{name}/" in path_string(path)), "rest")
            squares[level] += float(np.sum((x.astype(np.float64) - y) ** 2))
        return {level: value**0.5 for level, value in squares.items()}, sum(squares.values()) ** 0.5

    rounding = EPS * float(optax.tree.norm(history[0]))  # of the parameters, when an update is added to them
    for before, after, metrics in zip(history[:-1], history[1:], told, strict=True):
        moved, whole = apart(after, before)
        assert metrics.level_update_norm == pytest.approx(moved, rel=1e-5, abs=2 * rounding)
        assert metrics.update_norm == pytest.approx(whole, rel=1e-5, abs=2 * rounding)
        sizes = apart(before, jax.tree.map(np.zeros_like, before))[0]
        gradients = [ratio * sizes[level] for level, ratio in metrics.level_gradient_ratio.items()]
        assert len(gradients) == 3 and metrics.grad_norm == pytest.approx(np.linalg.norm(gradients), rel=1e-5)
    assert distances == pytest.approx(apart(history[-1], history[0])[0], rel=1e-5)
    waited = [metrics.level_waited for metrics in told]
    assert [step["level_1"] for step in waited] == [1, 0, 1, 0, 1]
    assert not any(step[level] for step in waited for level in ("level_0", "rest"))


def test_period_labels_name_the_levels():
    shapes = {"blocks": {"cms": {"level_0": {"w1": 0}, "level_1": {"w1": 0}, "level_2": {"w1": 0}}, "mixer": 0}}
    labels = period_labels(shapes, (1, 4))
    assert labels["blocks"]["cms"]["level_1"]["w1"] == "every_4"
    others = [labels["blocks"]["mixer"], *(labels["blocks"]["cms"][f"level_{i}"]["w1"] for i in (0, 2))]
    assert others == ["every_1"] * 3


def test_schedule():
    settings = config(steps=100, warmup_steps=10, learning_rate=1e-2, final_learning_rate=1e-3)
    rates = np.array([learning_rate_schedule(settings)(step) for step in range(150)])
    assert 0 < rates[0] < rates[5] < rates[10]
    np.testing.assert_allclose(rates[[10, 100, 149]], [1e-2, 1e-3, 1e-3], rtol=1e-5)
    assert np.all(np.diff(rates[10:101]) < 0)
    slow = np.array([learning_rate_schedule(settings, 4)(step) for step in range(25)])
    np.testing.assert_allclose(slow, rates[:100:4], rtol=1e-6)
    assert np.asarray(learning_rate_schedule(config(steps=2, warmup_steps=50))(1)) > 0


def test_decay_applies_to_matrices_only():
    untied = config(model=model("transformer", tie_embeddings=False))
    shapes = jax.eval_shape(lambda: build_program(untied).init()).params
    mask = {path_string(path): flag for path, flag in jax.tree_util.tree_leaves_with_path(decay_mask(shapes))}
    assert mask["blocks/mixer/wq"] and mask["blocks/mlp/w_down"]
    assert not any(mask[path] for path in ("embedding", "head", "final_norm/scale", "blocks/mixer_norm/scale"))


def test_gradients_are_clipped_by_their_global_norm():
    """The first AdamW step is the same for a gradient and ten times it, once both are beyond the clip."""
    tx = build_optimizer(config(clip_norm=1e-3, weight_decay=0.0))
    params = {"w": jnp.ones((2, 3))}

    def first_step(scale):
        grads = {"w": scale * jnp.arange(6.0).reshape(2, 3)}
        updates, state = tx.update(grads, tx.init(params), params)
        moments: Any = optax.tree.get(state, "mu")
        return np.asarray(jax.tree.leaves(updates)[0]), np.asarray(moments["w"])

    (once, moments), (tenfold, moments_tenfold) = first_step(1.0), first_step(10.0)
    np.testing.assert_allclose(tenfold, once, rtol=50 * EPS)
    np.testing.assert_allclose(moments_tenfold, moments, rtol=50 * EPS)
    np.testing.assert_allclose(np.linalg.norm(moments), 0.1 * 1e-3, rtol=1e-5)


@pytest.mark.slow
def test_matryoshka_of_the_whole_alone_is_the_plain_run():
    """Three steps, bit for bit; with weights on the prefixes they are others."""
    plain, state, _ = run(config(), 3)
    alone, other, _ = run(config(matryoshka=(0.0, 0.0, 0.0, 1.0)), 3)
    np.testing.assert_array_equal(alone, plain)
    jax.tree.map(np.testing.assert_array_equal, other.params, state.params)
    assert (run(config(matryoshka=(0.25, 0.25, 0.25, 0.25)), 3)[0] != plain).any()


@pytest.mark.slow
def test_matryoshka_on_eight_devices():
    settings = config(matryoshka=(0.25, 0.25, 0.25, 0.25))
    one, eight = (run(dataclasses.replace(settings, mesh=mesh), 5)[0] for mesh in (MeshConfig(), EIGHT))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
