"""Bits by place in the context against plain sums, and their curve."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import plots
from experiments.cells import Best, table_cells
from experiments.context_use import binned, by_place, windows
from experiments.published import TABLES
from experiments.streaming import reader
from experiments.text import evaluation
from experiments.training import language_model
from hope_jax.models import ModelConfig
from hope_jax.training.errors import UserError
from tests.experiments.test_report import record

CONFIG = ModelConfig(name="delta_net", vocab_size=256, dim=8, heads=1, layers=1, mlp_hidden=8)
TEXT = np.random.default_rng(0).integers(97, 123, size=600).astype(np.uint8)


def test_bits_are_those_of_the_whole_window_in_one_call():
    """By hand: log2 of the probability of each byte after all before it."""
    model = language_model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    shown = windows(TEXT, 3, 40)
    log_p = jax.nn.log_softmax(jax.jit(model.apply)(params, jnp.asarray(shown[:, :-1].astype(np.int32))))
    expected = [
        -sum(float(log_p[row, t, int(shown[row, t + 1])]) for row in range(3)) / 3 / math.log(2) for t in range(40)
    ]
    found = by_place(reader(CONFIG, least=16), params, shown)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # One window after the other is what the bits per byte of a text are made of.
    once = evaluation(model, TEXT[:81], rows=2, length=40, limit=9)(params)["bits_per_byte"]
    cut = np.stack([TEXT[:41], TEXT[40:81]])
    np.testing.assert_allclose(once, by_place(reader(CONFIG, least=16), params, cut).mean(), rtol=1e-5)


def test_bins_double_and_hold_every_place_once():
    bits = np.arange(100.0)
    scores = binned(bits)
    bounds = [0, 16, 32, 64, 100]
    assert scores == {"bits": 49.5} | {
        f"bits_from_{a}": pytest.approx(sum(range(a, b)) / (b - a)) for a, b in itertools.pairwise(bounds)
    }
    assert set(binned(np.ones(2**20))) <= set(TABLES["context_use"].scores)


def test_windows_are_spread_over_the_whole_text():
    found = windows(TEXT, 5, 100)
    assert found.shape == (5, 101)
    assert bytes(found[0]) == bytes(TEXT[:101]) and bytes(found[-1]) == bytes(TEXT[-101:])
    with pytest.raises(UserError, match="the held-out text has 600 bytes; lower --context 600"):
        windows(TEXT, 5, 600)


def test_the_curve_is_drawn_from_the_records(tmp_path):
    runs = [
        record(model=model, experiment="context_use", column="embedded", scores=binned(np.linspace(level, 2, 64)))
        for model, level in (("hope", 5), ("swa", 4))
    ]
    for run in runs:
        run.options["length"] = 32
    table = TABLES["context_use"]
    cells = table_cells(runs, table)
    figure = plots.against_position(cells, table)
    lines = {
        line.get_label(): line.get_xydata() for line in figure.axes[0].lines if not line.get_label().startswith("_")
    }
    best: Best = cells["hope", "embedded"][""]
    np.testing.assert_allclose(lines["hope"], [(x or 1, best.mean(f"bits_from_{x}")) for x in (0, 16, 32)])
    assert set(lines) == {"hope", "swa"}
    paths = plots.draw("context_use", cells, table, tmp_path)
    assert {path.name for path in paths} == {"context_use.png", "context_use_curve.png"}
