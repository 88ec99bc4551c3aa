"""The harness: options and commands, the loop, records."""

import dataclasses
import json
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import ablation, babilong, context_use, formal_languages, mad, mqar, niah, records
from experiments.options import Options, cells, command, fingerprint, from_command_line, model_config
from experiments.running import Job, main, run
from experiments.training import Batch, Model, cross_entropy, language_model, make_step, optimizer, start, state_bytes
from experiments.training import train as train_model
from hope_jax.models import count_parameters
from hope_jax.training.errors import UserError

CELL = Options(models=("transformer",), steps=40, eval_every=10, batch_size=8, dim=8, layers=1, warmup=2)
EXPERIMENTS = {"formal_languages": formal_languages.TINY, "mqar": mqar.TINY, "mad": mad.TINY, "niah": niah.TINY}
EXPERIMENTS |= {"babilong": babilong.TINY, "ablation": ablation.TINY, "context_use": context_use.TINY}


def constant_batches():
    tokens = np.tile(np.arange(4, dtype=np.int32), (8, 1))
    while True:
        yield Batch(tokens, tokens, np.ones((8, 4), np.float32))


def table_model() -> Model:
    """Logits of each token from a table: learns the identity in a few steps."""
    return Model(lambda key: {"w": jnp.zeros((4, 4))}, lambda params, tokens: params["w"][tokens])


def accuracy(params):
    return {"accuracy": float((params["w"].argmax(axis=1) == jnp.arange(4)).mean())}


def train(model=None, evaluate=accuracy, **changes):
    cell = dataclasses.replace(CELL, **changes)
    return train_model(model or table_model(), constant_batches(), cross_entropy, evaluate, cell)


def test_training_reaches_the_only_answer():
    trained = train(learning_rates=(0.1,))
    assert trained.scores == {"accuracy": 1.0} and trained.steps == 40 and trained.failed is None
    assert [step for step, _ in trained.curve] == [10, 20, 30, 40]
    assert trained.tokens_per_second and trained.tokens_per_second > 0 and trained.cpu_seconds > 0


def test_training_stops_when_every_score_is_reached():
    assert train(learning_rates=(0.1,), stop_at=1.0, eval_every=4).steps < 40
    values = iter([(1.0, 0.2), (1.0, 0.9), (0.9, 0.9), (1.0, 1.0)])
    assert train(evaluate=lambda _: dict(zip("ab", next(values), strict=True)), stop_at=0.9).steps == 20


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step():
    """The first step takes w below zero, where the root is not a number."""

    def apply(params, tokens):
        return -jnp.sqrt(params["w"]) * jax.nn.one_hot(tokens, 4)

    trained = train(Model(lambda key: {"w": jnp.ones(())}, apply), learning_rates=(1e3,))
    assert trained.failed == "not finite at step 2: loss nan, gradient norm nan"
    assert trained.steps == 2 and trained.scores == {}


def test_a_gradient_that_is_not_finite_ends_the_run():
    """The loss is finite at the parameters of the first step, its gradient is not."""
    model = Model(lambda key: {"w": jnp.zeros(())}, lambda p, tokens: jnp.sqrt(p["w"]) * jnp.ones((*tokens.shape, 4)))
    assert (train(model).failed or "").startswith("not finite at step 1: loss 1.38629")


def test_one_compilation_per_run():
    cell = dataclasses.replace(CELL, models=("transformer",))
    model = language_model(model_config(cell, vocab_size=4, length=4))
    tx = optimizer(cell)
    step = make_step(model, cross_entropy, tx)
    params, opt_state = start(model, tx, 0)
    batches = constant_batches()
    for _ in range(3):
        params, opt_state, *_ = step(params, opt_state, next(batches))
    assert step._cache_size() == 1


def test_weights_decide_what_the_loss_sees():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets = np.array([[0, 1, 2], [3, 4, 0]])
    weights = np.array([[1, 0, 0.5], [0, 0, 0]], np.float32)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = -(log_p[0, 0, 0] + 0.5 * log_p[0, 2, 2]) / 1.5
    np.testing.assert_allclose(cross_entropy(logits, Batch(targets, targets, weights)), expected, rtol=1e-6)


def test_state_bytes_are_those_of_one_sequence():
    """A key-value cache: keys and values in float32, a flag per slot, a position."""
    config = model_config(CELL, vocab_size=4, length=10)
    assert state_bytes(config) == 2 * 10 * 8 * 4 + 10 + 4


def test_models_are_fitted_to_a_number_of_parameters():
    config = model_config(dataclasses.replace(CELL, parameters=5000), vocab_size=4, length=8)
    assert abs(count_parameters(config) - 5000) <= 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("hop",)}, "unknown model 'hop'; did you mean 'hope'"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Options(**changes)


def test_a_chunk_as_long_as_the_sequence_is_refused():
    cell = dataclasses.replace(CELL, models=("hope",), chunks=(8,))
    with pytest.raises(UserError, match="never read what a memory with chunk 8 writes"):
        model_config(cell, vocab_size=4, length=8)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_commands_compute_the_same_cell(name):
    """Parsing a printed command gives the options of the cell."""
    tiny = EXPERIMENTS[name]
    for cell in cells(dataclasses.replace(tiny, seeds=(3,), learning_rates=(2e-4,), overrides=("momentum=none",))):
        words = shlex.split(command(name, cell))
        assert words[:3] == ["python", "-m", f"experiments.{name}"]
        parsed = from_command_line(type(tiny), tiny, words[3:])
        assert fingerprint(parsed) == fingerprint(cell)


def test_tiny_changes_the_defaults_and_keeps_what_is_given():
    parsed = from_command_line(mqar.RecallOptions, mqar.TINY, ["--tiny", "--steps", "9"])
    assert parsed == dataclasses.replace(mqar.TINY, steps=9, tiny=True)
    assert from_command_line(mqar.RecallOptions, mqar.TINY, []) == mqar.RecallOptions()


def test_a_mistyped_model_is_named(capsys):
    with pytest.raises(SystemExit):
        from_command_line(mqar.RecallOptions, mqar.TINY, ["--models", "transfomer"])
    assert "did you mean" in capsys.readouterr().err


def test_mistakes_that_show_later_end_with_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mqar", "--tiny", "--overrides", "exct=false"])
    with pytest.raises(SystemExit, match=r"^error: unknown key 'exct'; did you mean 'exact'"):
        main("mqar", mqar.RecallOptions, mqar.TINY, mqar.prepare)


def test_records_are_kept_and_not_computed_again(tmp_path):
    asked = []

    def prepare(cell):
        asked.append(cell.seeds)
        config = model_config(cell, vocab_size=4, length=4)
        return Job("column", "", config, table_model(), constant_batches(), cross_entropy, accuracy, cell)

    options = dataclasses.replace(CELL, results=tmp_path, seeds=(0, 1))
    quiet = Console(quiet=True)
    run("toy", options, prepare, quiet)
    run("toy", dataclasses.replace(options, seeds=(0, 1, 2)), prepare, quiet)
    assert asked == [(0,), (1,), (2,)]
    run("toy", dataclasses.replace(options, seeds=(1,), overwrite=True), prepare, quiet)
    assert asked[3:] == [(1,)]
    found = list(records.read_all(tmp_path))
    assert [record.seed for record in found] == [0, 1, 2]
    assert found[1].command == (
        "python -m experiments.toy --models transformer --seeds 1 --steps 40 --batch-size 8 --warmup 2 "
        "--eval-every 10 --dim 8 --layers 1"
    )
    assert found[0].parameters == 16 and found[0].config["name"] == "transformer"
    assert found[0].versions["jax"] == jax.__version__ and f"{sys.version_info.major}." in found[0].versions["python"]


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "toy" / "a.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"experiment": "toy"}))
    with pytest.raises(UserError, match=r"a\.json is not a record .* remove it and run its cell again"):
        list(records.read_all(tmp_path))


def test_an_empty_grid_is_refused(tmp_path):
    with pytest.raises(UserError, match="the grid is empty"):
        run("toy", dataclasses.replace(CELL, seeds=()), lambda cell: None, Console(quiet=True))  # type: ignore[arg-type]
