"""Optimizers under one schedule, the Vision Transformer and its images."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.optimizer_comparison import RULES, ComparisonOptions, rule
from experiments.optimizer_vision import digits, folder, in_batches, losses, mean_nats
from experiments.training import Batch, schedule
from experiments.vit import ViTConfig, vit
from hope_jax import hidden_matrices
from hope_jax.training.errors import UserError
from hope_jax.types import path_string

CELL = ComparisonOptions(optimizers=("m3",), learning_rates=(0.1,), steps=40, warmup=4, clip=1e9)
SHAPE = ViTConfig(size=4, channels=1, classes=3, patch=2, dim=8, layers=1, heads=2)


@pytest.mark.parametrize("name", RULES)
def test_first_step(name):
    """Every matrix moves by 0.2 times the rate or, with AdamW, by the rate; M3 to the letter as Algorithm 1 says."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "bias": jnp.ones(4)}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    cell = dataclasses.replace(CELL, optimizers=(name,))
    tx = rule(cell)
    moved, _ = tx.update(grads, tx.init(params), params)
    updates: Any = moved
    rms = float(jnp.sqrt(jnp.mean(updates["w"] ** 2)))
    rate = np.asarray(schedule(cell)(0)).item()
    if name.startswith("m3_literal"):
        eps = float(name.rpartition("_")[2])
        g = np.asarray(grads["bias"])  # V = b2 g^2, and no Newton-Schulz: the step is b1 g / (sqrt(b2) |g| + eps)
        want = -rate * 0.95 * g / (np.sqrt(0.999) * np.abs(g) + eps)
        np.testing.assert_allclose(updates["bias"], want, rtol=1e-5)
    else:
        assert rms == pytest.approx(rate * (1 if name == "adamw" else 0.2), rel=0.1 if name == "muon" else 1e-3)


@pytest.mark.parametrize("name", [name for name in RULES if "literal" not in name])
def test_weight_decay_is_that_of_the_matrices(name):
    params = {"w": jnp.full((6, 4), 2.0), "bias": jnp.ones(4)}
    cell = dataclasses.replace(CELL, optimizers=(name,), weight_decays=(0.5,))
    tx = rule(cell)
    moved, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    updates: Any = moved
    rate = np.asarray(schedule(cell)(0)).item()
    np.testing.assert_allclose(updates["w"], np.full((6, 4), -rate * 0.5 * 2.0), rtol=1e-5)
    assert not np.any(updates["bias"])


def test_gradients_are_clipped_together():
    """The literal M3 with epsilon 1 sees their size: ten times the norm allowed is the norm allowed."""
    params = {"w": jnp.eye(4), "bias": jnp.ones(4)}
    cell = dataclasses.replace(CELL, optimizers=("m3_literal_eps_1",), clip=1.0)
    tx = rule(cell)
    unit = {"w": jnp.full((4, 4), 0.2), "bias": jnp.full(4, 0.3)}  # 16 x 0.04 + 4 x 0.09 = 1
    small, _ = tx.update(unit, tx.init(params), params)
    large, _ = tx.update(jax.tree.map(lambda g: 10 * g, unit), tx.init(params), params)
    chex.assert_trees_all_close(small, large, rtol=1e-5)


def test_refusals():
    with pytest.raises(UserError, match=r"optimizer 'adamv'.*adamw"):
        ComparisonOptions(optimizers=("adamv",))
    with pytest.raises(UserError, match=r"m3_literal_eps_1 has no weight decay: add --weight-decays 0"):
        dataclasses.replace(CELL, optimizers=("m3_literal_eps_1",), weight_decays=(0.1,))
    with pytest.raises(ValueError, match="size must be a multiple of patch"):
        vit(dataclasses.replace(SHAPE, patch=3))


def test_digits():
    data = digits()
    assert data.train_NSSC.shape == (1348, 8, 8, 1) and data.test_NSSC.shape == (449, 8, 8, 1) and data.classes == 10
    assert data.train_NSSC.min() == -1 and data.train_NSSC.max() == 1
    everything = np.concatenate([data.train_NSSC, data.test_NSSC]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797  # none twice, so none in both
    assert np.bincount(np.concatenate([data.train_labels_N, data.test_labels_N])).min() > 170


def make_images(root, *parts):
    for part in parts:
        for number, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (6, 5), color=200 * number + i).save(root / part / name / f"{i}.png")


def test_folder(tmp_path):
    make_images(tmp_path / "split", "train", "test")
    make_images(tmp_path / "whole", ".")
    split, whole = folder(tmp_path / "split", 4), folder(tmp_path / "whole", 4)
    assert split.train_NSSC.shape == split.test_NSSC.shape == (8, 4, 4, 3) and split.classes == whole.classes == 2
    assert whole.train_NSSC.shape == (6, 4, 4, 3) and whole.test_NSSC.shape == (2, 4, 4, 3)
    for images in (split, whole):
        bright = images.train_NSSC.mean(axis=(1, 2, 3)) > 0
        np.testing.assert_array_equal(bright, images.train_labels_N == 1)
    with pytest.raises(UserError, match="no images to be read in"):
        folder(tmp_path / "nothing", 4)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "b.png")
    with pytest.raises(UserError, match="has no classes"):
        folder(tmp_path / "flat", 4)


def test_every_image_counts_once():
    images, labels = np.arange(5, dtype=np.float32), np.arange(5) % 2
    found = list(in_batches(images, labels, 3))
    assert [batch.tokens.tolist() for batch in found] == [[0, 1, 2], [3, 4, 4]]
    assert np.concatenate([batch.weights for batch in found]).tolist() == [1, 1, 1, 1, 1, 0]


def test_losses():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]], np.float32)
    batch = Batch(np.zeros(3), np.array([0, 0, 1]), np.array([1, 1, 0], np.float32))
    nats = [np.log(np.exp(row).sum()) - row[0] for row in logits[:2]]
    np.testing.assert_allclose(losses(jnp.asarray(logits), batch), [sum(nats), 1, 2], rtol=1e-6)
    assert float(mean_nats(jnp.asarray(logits), batch)) == pytest.approx(sum(nats) / 2, rel=1e-6)


def test_the_matrices_of_a_vit():
    labels = hidden_matrices(jax.eval_shape(vit(SHAPE).init, jax.random.key(0)))
    names = [path_string(path) for path, label in jax.tree.leaves_with_path(labels) if label == "matrix"]
    block = ("attention/k", "attention/out", "attention/q", "attention/v", "down", "up")
    assert sorted(names) == [f"blocks/0/{name}/kernel" for name in block]


def test_vit_sees_every_pixel_and_trains_every_parameter():
    model = vit(SHAPE)
    params = model.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))

    def loss(params, images):
        return (model.apply(params, images)[0] ** 2).sum()

    by_param, by_pixel = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, images)
    dead = [p for p, g in jax.tree.leaves_with_path(by_param) if not jnp.any(g)]
    assert not dead
    assert jnp.all(by_pixel[0] != 0) and not jnp.any(by_pixel[1])
