"""The toy problems and the sequences of tasks: what they compute, and their tiny runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import continual_momentum, optimizer_toy
from experiments.continual_momentum import ContinualOptions, learn, losses, make_tasks, summary
from experiments.optimizer_toy import RULES, ToyOptions, held, psi, steps_until_near, trajectory
from experiments.options import from_command_line
from hope_jax import carry_momentum, delta_momentum, preconditioned_momentum, reset_momentum
from hope_jax.training.errors import UserError

QUIET = Console(quiet=True)


def test_psi():
    r, theta = -0.7, 1.3
    want = r**2 + 2.0 * (r - theta + 0.5 * np.sin(3 * r)) ** 2
    assert float(psi(jnp.array([r, theta]), ToyOptions(k=2.0, a=0.5, omega=3.0))) == pytest.approx(want, rel=1e-6)


def test_delta_momentum_is_near_sooner():
    """Spec 10.49: damped delta momentum needs fewer than 1,000 steps and momentum more."""
    options = ToyOptions()
    steps = {
        name: steps_until_near(trajectory(RULES[name](0.01, 0.99), options))
        for name in ("momentum", "delta momentum, damped")
    }
    assert steps["delta momentum, damped"] < 1000 < steps["momentum"]  # type: ignore[operator]


def test_trajectory_is_the_loop():
    options = ToyOptions(steps=30)
    point, m = np.array(optimizer_toy.START), np.zeros(2)
    for _ in range(30):
        r, theta = point
        inner = r - theta + np.sin(5 * r)
        m = 0.9 * m - 0.01 * np.array([2 * r + 2 * inner * (1 + 5 * np.cos(5 * r)), -2 * inner])
        point = point + m
    found = trajectory(preconditioned_momentum(0.01, 0.9), options)
    assert found.shape == (31, 2)
    np.testing.assert_allclose(found[-1], point, rtol=2e-3, atol=2e-3)  # 30 steps of float32 along a sine


def test_steps_until_near():
    points = jnp.array([[1.0, 0.0], [0.0, 5e-4], [1.0, 1.0]])
    assert steps_until_near(points) == 1 and steps_until_near(points[2:]) is None


def test_what_is_held_of_an_orthogonal_task():
    options = ToyOptions(tasks=10)
    n = np.arange(11)
    np.testing.assert_allclose(held(preconditioned_momentum(0.1, 0.9), options), 0.9**n, rtol=1e-5)
    np.testing.assert_allclose(held(delta_momentum(0.1, 0.9), options), 0.9**n, rtol=1e-5)
    np.testing.assert_allclose(held(delta_momentum(0.1, 1.0), options), np.ones(11), rtol=1e-5)


def test_toy_runs(tmp_path):
    path = optimizer_toy.run(dataclasses.replace(optimizer_toy.TINY, out=tmp_path, sweep=False), QUIET)
    assert path.read_bytes().startswith(b"\x89PNG")
    best = optimizer_toy.tuned(RULES["momentum"], ToyOptions(steps=400))
    assert best.steps is not None and np.isclose(best.learning_rate, optimizer_toy.RATES).any()


@pytest.mark.parametrize("overlap", [0.0, 0.7])
def test_tasks(overlap):
    tasks = make_tasks(jax.random.key(0), ContinualOptions(), overlap)
    gram = jnp.einsum("nkr,mks->nmrs", tasks.bases_NKR, tasks.bases_NKR)
    want = jnp.where(jnp.eye(4, dtype=bool), 1.0, overlap**2)[..., None, None] * jnp.eye(6)[None, None]
    np.testing.assert_allclose(gram, want, atol=1e-5)
    np.testing.assert_allclose(losses(jnp.zeros(tasks.targets_NKV.shape[1:]), tasks), np.ones(4), rtol=1e-6)
    of_second = losses(tasks.targets_NKV[1], tasks)
    assert float(of_second[1]) == 0 and float(of_second[0]) > 0.5


def test_only_momentum_forgets_orthogonal_tasks():
    """At one learning rate: what is carried over undoes what was learned, by whole shares of the loss."""
    options = ContinualOptions(tasks=3, steps=100)

    def forgotten(rule, boundary, overlap=0.0):
        run = jax.jit(lambda key: learn(continual_momentum.RULES[rule](1e-3), boundary, key, options, overlap))
        return summary(np.stack([run(jax.random.key(seed)) for seed in (0, 1)]), 1e-3).forgotten

    assert (np.abs(forgotten("momentum_0.99", reset_momentum)) < 1e-5).all()
    assert (np.abs(forgotten("momentum_0.99", carry_momentum)) > 0.02).all()
    assert (np.abs(forgotten("sgd", carry_momentum)) < 1e-5).all()
    assert (np.abs(forgotten("sgd", carry_momentum, overlap=0.7)) > 1e-3).all()


def test_summary():
    """Two tasks of two steps; the first is at 0.2 when learned and at 0.5 in the end."""
    losses_SNTN = np.array([[[[0.9, 1.0], [0.2, 1.0]], [[0.4, 0.3], [0.5, 0.1]]]] * 2)
    found = summary(losses_SNTN, 0.1)
    np.testing.assert_allclose(found.learned, [0.15] * 2)
    np.testing.assert_allclose(found.forgotten, [0.3] * 2)
    np.testing.assert_allclose(found.end, [0.3] * 2)
    assert found.first_task.tolist() == [0.9, 0.2, 0.4, 0.5]


@pytest.mark.parametrize(
    ("cls", "tiny"), [(ToyOptions, optimizer_toy.TINY), (ContinualOptions, continual_momentum.TINY)]
)
def test_command_line(cls, tiny):
    made = from_command_line(cls, tiny, ["--tiny"])
    assert made == dataclasses.replace(tiny, tiny=True)
    assert from_command_line(cls, tiny, []) == cls()


def test_continual_runs(tmp_path):
    options = dataclasses.replace(continual_momentum.TINY, out=tmp_path)
    path, results = continual_momentum.run(options, QUIET)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert set(results) == {(s, "momentum_0.9", w) for s in ("orthogonal", "overlapping") for w in ("carry", "reset")}
    for found in results.values():
        assert found.end.shape == (2,) and np.isfinite(found.end).all() and found.first_task.shape == (8,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": 1}, "tasks must be at least 2; got 1"),
        ({"overlap": 1.5}, r"between 0 and 1; got 1\.5"),
        ({"rules": ("m4",)}, "rule 'm4'"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(UserError, match=message):
        ContinualOptions(**change)


def test_toy_refuses():
    with pytest.raises(UserError, match="steps must be at least 1; got 0"):
        ToyOptions(steps=0)
