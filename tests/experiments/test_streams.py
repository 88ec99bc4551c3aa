"""Learning from a stream against gradients by hand, and the arithmetic of forgetting."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import domain_stream, languages, plots, streams
from experiments.cells import table_cells
from experiments.learners import learner, moving
from experiments.published import TABLES
from experiments.records import write
from experiments.report import ReportOptions, report
from experiments.streams import StreamOptions, TradeOff, at_rates, curve, cut, trace, trade_off
from experiments.training import Trained
from hope_jax.models import build_lm
from hope_jax.models.cms_inputs import cms_chains
from hope_jax.training.errors import UserError
from tests.experiments.test_report import record

T = 8
CELL = dataclasses.replace(
    domain_stream.TINY, models=("transformer",), learners=(f"{T}",), length=T, layers=1, windows=2, test_windows=2
)
RNG = np.random.default_rng(0)
WINDOWS = RNG.integers(97, 123, size=(2, T + 1)).astype(np.uint8)
TEST = RNG.integers(97, 123, size=(3, T + 1)).astype(np.uint8)


@functools.cache
def built(who):
    """The model without levels, its parameters, and what `who` does with them."""
    base, config = streams.configs(dataclasses.replace(CELL, learners=(who,)))
    lm = build_lm(base)
    return base, lm, jax.jit(lm.init)(jax.random.key(0)), moving(config, learner(who))


def mean_nats(lm, params, windows):
    tokens = jnp.asarray(windows, jnp.int32)
    logits = lm.apply(params, lm.init_state(params, len(tokens)), tokens[:, :-1], phase=0)[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@pytest.mark.parametrize("who", [f"{T}", f"all:{T}"])
def test_two_windows_are_two_steps_of_gradient_descent(who):
    """A clock of a whole window: by hand, each step down the mean loss of its window. Two rates at once."""
    base, lm, params, how = built(who)
    rates = (0.5, 4.0)
    together = at_rates(base, how, rates)
    found = together.learn(params, together.start(params), WINDOWS)
    gradient = jax.jit(jax.grad(lambda weights, window: mean_nats(lm, how.put(params, weights), window)))
    for i, rate in enumerate(rates):
        weights = how.start(params)
        for window in WINDOWS:
            weights = optax.tree.add_scale(weights, -rate, gradient(weights, window[None]))
        for ours, by_hand in zip(jax.tree.leaves(found), jax.tree.leaves(weights), strict=True):
            np.testing.assert_allclose(ours[i], by_hand, rtol=0, atol=1e-5)
        assert optax.tree.norm(optax.tree.sub(weights, how.start(params))) > 1e-2
    frozen = jax.tree.map(lambda a, b: bool((a == b).all()), how.put(params, how.start(params)), params)
    assert all(jax.tree.leaves(frozen))


@pytest.mark.parametrize("who", [f"{T}", f"all:{T}"])
def test_without_a_learning_rate_nothing_is_learned(who):
    """Bit for bit what the trained model knows, before and after; and that is the loss of the model.

    With a rate, each time the streamed text is known better; what diverged knows nothing.
    """
    base, lm, params, how = built(who)
    found = trace(at_rates(base, how, (0.0, 0.5, 1e30)), params, [WINDOWS, WINDOWS], [TEST, WINDOWS])
    assert found.shape == (3, 3, 2)
    assert (found[0] == found[0, 0]).all() and (found[1:, 0] == found[0, 0]).all()
    assert (np.diff(found[1, :, 1]) < -1e-3).all() and (found[2, 1:] == 8.0).all()
    expected = float(jax.jit(functools.partial(mean_nats, lm))(params, WINDOWS)) / math.log(2)
    np.testing.assert_allclose(found[0, 0, 1], expected, rtol=1e-6)
    nothing = at_rates(base, moving(base, learner("none")), (0.0,))
    assert (trace(nothing, params, [WINDOWS], [TEST, WINDOWS]) == found[0, 0]).all()


def test_sleep_empties_the_fast_level_into_the_next():
    """What the chains give on the replayed text is kept better than by emptying the level alone (spec 11.4)."""
    cell = dataclasses.replace(domain_stream.TINY, learners=("sleep:4,8",), length=T, layers=1)
    base, config = streams.configs(cell)
    params = jax.jit(build_lm(base).init)(jax.random.key(0))
    how = {name: moving(config, learner(name)) for name in ("4,8", "sleep:4,8")}
    rates = (10.0,)
    awake, asleep = (at_rates(base, one, rates) for one in how.values())
    start = asleep.start(params)
    learned, rested = (one.learn(params, start, WINDOWS) for one in (awake, asleep))
    for ours, first in zip(jax.tree.leaves(rested[0]), jax.tree.leaves(start[0]), strict=True):
        np.testing.assert_array_equal(ours, first)
    assert optax.tree.norm(optax.tree.sub(rested[1], learned[1])) > 1e-3
    chains = cms_chains(config)
    put = jax.jit(lambda weights: how["4,8"].put(params, jax.tree.map(lambda leaf: leaf[0], weights)))
    x = chains.inputs(put(learned), jnp.asarray(WINDOWS[:, :-1]))
    y, emptied, kept = (
        chains.apply(put(weights)["blocks"]["cms"], x) for weights in (learned, (start[0], *learned[1:]), rested)
    )
    assert jnp.linalg.norm(kept - y) < jnp.linalg.norm(emptied - y)


def test_forgetting_by_hand():
    """A: 3 at best before, 3.5 and 3.1 after B at two rates; B: 5 at best before, 4 and 4.8 after."""
    bits = np.array(
        [[[3.2, 5.1], [3.0, 5.0], [3.5, 4.0], [3.0, 4.2]], [[3.0, 5.0], [3.3, 5.1], [3.1, 4.8], [3.0, 4.9]]]
    )
    found = domain_stream.scores(bits, (1.0, 0.1))
    expected = {"bits_both": 3.75, "bits_forgotten": 0.5, "bits_gained": 1.0}
    expected |= {"bits_forgotten_at_1": 0.5, "bits_gained_at_1": 1.0}
    expected |= {"bits_forgotten_at_0.1": 0.1, "bits_gained_at_0.1": 0.2}
    expected |= {"bits_a_start": 3.2, "bits_a_before": 3.0, "bits_a_after": 3.5, "bits_a_again": 3.0}
    expected |= {"bits_b_start": 5.1, "bits_b_before": 5.0, "bits_b_after": 4.0, "bits_b_again": 4.2}
    assert found == pytest.approx(expected)


def test_a_learner_that_diverged_at_once_has_forgotten():
    forgotten, gained, both = trade_off(np.array([[[3.0, 5.0], [8.0, 8.0], [8.0, 8.0]]]))
    assert (forgotten[0], gained[0], both[0]) == (5.0, -3.0, 8.0)


def test_languages_by_hand():
    """Home, first, second at the start, after the first, in the end; the second alone."""
    bits = np.array([[[2.0, 6.0, 7.0], [2.5, 4.0, 6.5], [3.0, 5.0, 4.5]]])
    found = languages.scores(bits, np.array([4.4]), (1.0,))
    assert (found["bits_forgotten"], found["bits_gained"], found["bits_both"]) == (1.0, 2.0, 4.75)
    assert (found["bits_home_end"], found["bits_first_between"], found["bits_second_start"]) == (3.0, 4.0, 7.0)
    assert found["bits_second_alone"] == 4.4


def test_a_text_is_cut_into_windows_that_share_a_byte():
    text = np.arange(40, dtype=np.uint8)
    shown = cut(text, CELL)
    assert shown.shape == (2, T + 1) and shown[0, -1] == shown[1, 0]
    assert (np.diff(shown.astype(int), axis=1) == 1).all()
    assert {cut(text, dataclasses.replace(CELL, seeds=(seed,)))[0, 0] for seed in range(9)} > {shown[0, 0]}
    with pytest.raises(UserError, match="a text of 16 bytes has no 2 windows of 8"):
        cut(text[:16], CELL)


def test_learners_are_compared_where_they_gained_the_same(tmp_path):
    """Between the rates on straight lines; of a curve that is there twice the better; seeds that never are, counted."""

    def seed(number, *points):
        scores = {"bits_both": 4.0, "bits_forgotten": 0.1, "bits_gained": 0.5}
        for rate, (gained, forgotten) in enumerate(points, 1):
            scores |= {f"bits_gained_at_{rate}": gained, f"bits_forgotten_at_{rate}": forgotten}
        return record(seed=number, experiment="domain_stream", model="16", column="a → b", scores=scores)

    for one in (seed(0, (0.4, 0.1), (0.8, 0.3), (0.4, 0.9)), seed(1, (0.5, 0.25), (0.6, 0.5))):
        write(tmp_path / "domain_stream" / f"{one.seed}.json", one)
    text = report(ReportOptions(tmp_path, tmp_path)).read_text()
    # 0.15 and 0.25; 0.25 of the first alone; at 0.9 and 1.1 none
    assert "| 16 | a → b | 0.200 ± 0.071 | 0.250 [1 of 2] | – | – |" in text
    assert "| model | column | gained 0.5 | gained 0.7 | gained 0.9 | gained 1.1 |" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learners": ("sgd:8",)}, "got 'sgd:8'"),
        ({"learners": ("all:4,8",)}, "got 'all:4,8'"),
        ({"learners": ("sleep:4",)}, "two clocks, not 'sleep:4'"),
        ({"learners": ("0",)}, "got '0'"),
        ({"learners": ("fast",)}, "got 'fast'"),
        ({"rates": (-1.0,)}, r"rates must be .*got \[-1.0\]"),
        ({"models": ("swa",)}, "unknown model 'swa'"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        StreamOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learners": ("3",)}, "length must be a multiple of every clock; got 8 and 3"),
        ({"learners": ("2,4",)}, "mlp_chunks needs one entry per layer"),
        ({"models": ("hope_attention",), "learners": ("4,2",)}, "chunk sizes must divide, fastest first"),
        ({"models": ("hope",), "learners": ("all:2",)}, "'all' must be a multiple of the memories' chunk 4; got 2"),
        ({"learners": ("sleep:4,8",), "layers": 2}, "sleep needs a CMS chain; transformer has none"),
        ({"overrides": ("cms_variant=nested",)}, "nested levels start again"),
    ],
)
def test_what_the_model_cannot_do(changes, message):
    with pytest.raises(UserError, match=message):
        streams.configs(dataclasses.replace(CELL, **changes))


def test_order_in_depth_is_free():
    config = streams.configs(dataclasses.replace(CELL, layers=3, learners=("8,2",)))[1]
    assert config.mlp_chunks == (8, 2, None)


def test_learners_share_the_training_they_start_from(monkeypatch):
    """One training for learners without meta-learned starts, whatever they and their rates are."""
    trainings = []

    def train(model, batches, loss, evaluate, cell, **how):
        trainings.append(cell.learners[0])
        return Trained({"trained": len(trainings)}, 1, [(1, evaluate(None))], 0.0, 0.0, 0.0, None, None)

    monkeypatch.setattr(streams, "train", train)
    monkeypatch.setattr(streams, "TRAINED", {})

    def params(**changes):
        cell = dataclasses.replace(CELL, **changes)
        found = streams.train_once(None, None, None, lambda params: {"bits": params["trained"]}, cell)  # pyright: ignore
        return found.scores["bits"]

    assert [params(learners=(who,)) for who in ("none", "4", "all:8", "meta:4", "meta:8", "4,8")] == [1, 1, 1, 2, 3, 1]
    assert (params(rates=(0.5,)), params(seeds=(1,)), params(steps=3)) == (1, 4, 5)
    assert trainings[:3] == ["none", "meta:4", "meta:8"]


def test_the_curve_is_drawn_from_the_records():
    """Means over seeds, a point per rate; a rate that lost on the second text is left out."""
    runs = []
    for seed, (low, high) in enumerate([(0.1, 0.4), (0.3, 0.6)]):
        found = TradeOff(np.array([low, high, 2.0]), np.array([low + 0.1, high + 0.1, -1.0]), np.ones(3))
        scores = curve((0.1, 1, 10), found)[1]
        runs.append(record(seed=seed, model="hope, 16", experiment="domain_stream", column="a → b", scores=scores))
    table = TABLES["domain_stream"]
    figure = plots.against_gain(table_cells(runs, table), table)
    [line] = [line for line in figure.axes[0].lines if line.get_label() == "hope, 16"]
    np.testing.assert_allclose(line.get_xydata(), [(0.3, 0.2), (0.6, 0.5)])
