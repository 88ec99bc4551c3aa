"""A run that begins from another run: with its parameters, its momenta, and perhaps new CMS levels in front.

The new run keeps what it began with as its checkpoint of step 0, so from then on it needs the other one no more;
RUN/origin.json says what that was. Data, learning rate and step count start anew (spec 4.10, 6.8).
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hope_jax.models import ModelConfig, Pretrained, add_fast_level, build_lm
from hope_jax.models.growing import with_fast_level
from hope_jax.training import distributed
from hope_jax.training.checkpoint import Checkpoints, fingerprints, saved_step
from hope_jax.training.config import StartConfig, TrainConfig, read_config
from hope_jax.training.errors import UserError
from hope_jax.training.files import write_text
from hope_jax.training.optimizer import build_optimizer, carry_optimizer
from hope_jax.training.overrides import one_line
from hope_jax.training.run_dir import ORIGIN_FILE, read_corpus_facts, run_vocabulary, tokenizer_of
from hope_jax.training.step import Program, TrainState, abstract_state
from hope_jax.training.vocabulary import load_vocabulary
from hope_jax.types import path_string

SLOWER = 4  # times more rarely is a level written, with each one that is added in front of it


class Origin(NamedTuple):
    """The run that another begins from, after all that can be checked was."""

    run_dir: Path  # as it was given
    config: TrainConfig
    new_levels: tuple[int, ...]  # hidden widths of the CMS levels that are added in front, fastest first


def config_from(run_dir: Path, *, add_level: bool = False) -> TrainConfig:
    """The config of a run that begins from another: that of the other, with a learning-rate schedule of its own.

    Args:
      run_dir: of the other.
      add_level: put a CMS level in front, as wide as the fastest and written in every step; the others are written
        `SLOWER` times more rarely than before.
    Raises:
      UserError: there is no run, or its model cannot take a level.
    """
    there = read_config(run_dir)
    tokenizer = tokenizer_of(there, run_dir)
    config = dataclasses.replace(there, start=StartConfig(run=str(run_dir)), decay_steps=0, tokenizer=tokenizer)
    if not add_level:
        return config
    try:
        model = with_fast_level(there.model)
    except ValueError as error:
        raise UserError(f"{run_dir}: {one_line(error)}") from error
    periods = [*there.cms_periods, *[1] * (len(there.model.cms_hidden) - len(there.cms_periods))]
    return dataclasses.replace(config, model=model, cms_periods=(1, *(SLOWER * period for period in periods)))


def find_origin(config: TrainConfig, program: Program, run_dir: Path) -> Origin | None:
    """The run that a config begins from, None if from random parameters. Only reads.

    Args:
      config: of the new run.
      program: of the new run.
      run_dir: of the new run.
    Raises:
      UserError: there is no such run or no checkpoint of it, it lies where the new run will, or its tokens or
        parameters are not those of the new run.
    """
    if not config.start.run:
        return None
    there = Path(config.start.run)
    if there.resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"{run_dir} cannot begin from {there}, which it would write over; give another place with --run"
        )
    other = read_config(there)
    if saved_step(there) is None:
        raise UserError(f"{there} holds no checkpoint yet; train it to its first one")
    if load_vocabulary(config.tokenizer).digest != run_vocabulary(there).digest:
        raise UserError(
            f"tokenizer={config.tokenizer} makes other tokens than those that {there} was trained on "
            f"(tokenizer={other.tokenizer}); a run begins from one of the same tokenizer"
        )
    origin = Origin(there, other, _new_levels(other.model, config.model))
    _check_shapes(origin, program)
    return origin


def _new_levels(old: ModelConfig, new: ModelConfig) -> tuple[int, ...]:
    more = len(new.cms_hidden) - len(old.cms_hidden)
    grown = old.has_cms and new.has_cms and more > 0 and new.cms_hidden[more:] == old.cms_hidden
    return new.cms_hidden[:more] if grown else ()


def _check_shapes(origin: Origin, program: Program) -> None:
    """The first parameter that differs is the message."""
    try:
        shapes = jax.eval_shape(lambda: _grow(origin, build_lm(origin.config.model).init(jax.random.key(0))))
    except ValueError as error:
        raise UserError(f"{origin.run_dir}: {one_line(error)}") from error
    theirs, ours = _by_path(shapes), _by_path(program.abstract_state.params)
    for path in [*theirs, *ours]:
        if theirs.get(path) != ours.get(path):
            raise UserError(
                f"the model does not fit {origin.run_dir}: {path} is {_size(theirs, path)} there and "
                f"{_size(ours, path)} here; leave the sizes as they are in {origin.run_dir}"
            )


def _by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_string(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _size(shapes: dict[str, tuple[int, ...]], path: str) -> str:
    return "x".join(map(str, shapes[path])) if path in shapes else "missing"


def _grow(origin: Origin, params: Any) -> Any:
    """Adds the new levels, the slowest first; each has random numbers of its own."""
    model = Pretrained(origin.config.model, params)
    for width in reversed(origin.new_levels):
        key = jax.random.fold_in(jax.random.key(origin.config.seed), len(model.config.cms_hidden))
        model = add_fast_level(model, hidden=width, key=key)
    return model.params


def begin(origin: Origin, config: TrainConfig, program: Program, run_dir: Path) -> TrainState:
    """The state of the new run before its first step; writes origin.json.

    Args:
      origin: what it begins from.
      config, program, run_dir: of the new run; its mesh may be another.
    Raises:
      UserError: every checkpoint is damaged, or belongs to another run.
    """
    carry, there = config.start.momentum == "carry", origin.run_dir
    abstract = abstract_state(build_lm(origin.config.model), build_optimizer(origin.config), program.mesh)
    wanted = {"step": abstract.step, "params": abstract.params}
    wanted |= {"opt_state": abstract.opt_state} if carry else {}
    expected = fingerprints(origin.config, read_corpus_facts(there)["sha256"])
    with Checkpoints(there, read_only=True) as checkpoints:
        found = checkpoints.restore_part(wanted, expected)
    _record(origin, config, int(found["step"]), expected, run_dir)
    placed = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    grow = jax.jit(functools.partial(_grow, origin), out_shardings=placed.params)
    state = program.start(grow(found["params"]))
    if not carry:
        return state
    go_on = functools.partial(carry_optimizer, added=len(origin.new_levels))
    opt_state = jax.jit(go_on, out_shardings=placed.opt_state)(found["opt_state"], state.opt_state)
    return state._replace(opt_state=opt_state)


def _record(origin: Origin, config: TrainConfig, step: int, expected: dict[str, Any], run_dir: Path) -> None:
    facts = {"run": str(origin.run_dir), "step": step, **expected, "momentum": config.start.momentum}
    if distributed.is_primary():
        write_text(run_dir / ORIGIN_FILE, json.dumps(facts | {"new_levels": origin.new_levels}) + "\n")


def levels_added(run_dir: Path) -> int | None:
    """How many CMS levels a run has in front of those of the run that it began from; None if that is not written."""
    path = run_dir / ORIGIN_FILE
    return len(json.loads(path.read_text())["new_levels"]) if path.exists() else None


def describe_origin(origin: Origin, config: TrainConfig) -> str:
    """A line for the terminal."""
    went = "go on" if config.start.momentum == "carry" else "start again"
    line = f"begins from {origin.run_dir} at step {saved_step(origin.run_dir)}, its momenta {went}"
    if not origin.new_levels:
        return line
    names = ", ".join(f"level_{i} of width {width}" for i, width in enumerate(origin.new_levels))
    return f"{line}; new and without effect yet: {names}"
