"""Every row of the ablation changes what it says and nothing else, in the config and in the computation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import mqar
from experiments.ablation import TASKS, TINY, VARIANTS, AblationOptions, prepare, with_slow_levels
from experiments.options import cells
from experiments.training import optimizer
from hope_jax.models import count_parameters
from hope_jax.training.errors import UserError

CHANGED = {
    "reference": {},
    "w/o DGD": {"dgd_decay": (True, False)},
    "w/o momentum": {"momentum": (0.9, None), "eta_init": (0.002, 0.02)},
    "w/o weight decay": {"retention": (True, False)},
    "w/o CMS": {"cms_hidden": ((16, 16), (32,))},
    "static k": {"static": ((), ("k",))},
    "static v": {"static": ((), ("v",))},
    "static q": {"adaptive_q": (True, False)},
}


def config_of(variant, task="language_model"):
    return prepare(dataclasses.replace(TINY, variants=(variant,), tasks=(task,))).config


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_is_one_change_of_the_reference(variant, task):
    base, config = (dataclasses.asdict(config_of(name, task)) for name in ("reference", variant))
    assert {key: (base[key], config[key]) for key in base if base[key] != config[key]} == CHANGED[variant]


def test_without_cms_the_width_stays():
    """The reference has the scale of a norm more, nothing else."""
    with_cms, without = (count_parameters(config_of(variant)) for variant in ("reference", "w/o CMS"))
    assert with_cms - without == TINY.dim


def test_static_projections_have_no_box():
    counts = {variant: count_parameters(config_of(variant)) for variant in VARIANTS}
    assert all(counts[f"static {name}"] != counts["reference"] for name in "kvq")
    assert counts["static k"] == counts["static v"]


def test_rows_are_named_by_what_they_lack():
    for cell in cells(dataclasses.replace(TINY, variants=tuple(VARIANTS))):
        assert [prepare(cell).row] == list(cell.variants)


def test_slow_levels_average_four_gradients():
    """Against AdamW on the mean of four; everything else steps each time."""
    [cell] = cells(dataclasses.replace(TINY, steps=8, warmup=0, clip=1e9))
    params: Any = {
        "cms": {"level_0": {"w": jnp.ones((2, 2))}, "level_1": {"w": jnp.ones((2, 2))}},
        "other": jnp.ones(3),
    }
    grads = [jax.tree.map(lambda leaf, i=i: jnp.full_like(leaf, 1.0 + i), params) for i in range(4)]
    tx = with_slow_levels(cell, (1, 4))
    state: Any = tx.init(params)
    slow = params
    for grad in grads:
        updates, state = tx.update(grad, state, slow)
        before, slow = slow, _applied(slow, updates)
        moved = {name: not np.array_equal(slow["cms"][name]["w"], before["cms"][name]["w"]) for name in slow["cms"]}
        assert moved == {"level_0": True, "level_1": grad is grads[-1]}
    own = optimizer(dataclasses.replace(cell, steps=2))
    only: Any = {"cms": {"level_1": params["cms"]["level_1"]}}
    mean = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.5), only)
    updates, _ = own.update(mean, own.init(only), only)
    np.testing.assert_allclose(slow["cms"]["level_1"]["w"], _applied(only, updates)["cms"]["level_1"]["w"], rtol=1e-6)


def _applied(params: Any, updates: Any) -> Any:
    return optax.apply_updates(params, updates)


def test_tasks_are_those_of_their_own_experiments():
    """The batches of associative recall are those that mqar trains on."""
    cell = dataclasses.replace(TINY, tasks=("mqar",))
    recall = mqar.RecallOptions(pairs=(3,), vocab=32, length=24, seeds=(0,), batch_size=cell.batch_size)
    ours, theirs = next(TASKS["mqar"](cell).batches), next(mqar.stream(recall))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("w/o MLP",)}, "unknown variant 'w/o MLP'"),
        ({"tasks": ("parrity",)}, "unknown task 'parrity'; did you mean 'parity'"),
        ({"models": ("titans",)}, "those of hope; got models titans"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        AblationOptions(**changes)
