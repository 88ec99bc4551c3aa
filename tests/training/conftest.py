"""One small text, one small config and one short run for all tests of training."""

import dataclasses
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from hope_jax.models import ModelConfig
from hope_jax.training.config import TrainConfig
from hope_jax.training.loop import Result, train
from hope_jax.training.metrics import TIMED, read_metrics

LINES = [f"line {i}: the square of {i} is {i * i}, and its cube is {i**3}.\n" for i in range(400)]


def records(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in TIMED} for record in read_metrics(run_dir)]


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory) -> Path:
    """A directory of compiled programs: most runs here are the same run again."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", autouse=True)
def _compile_once(program_cache):
    names = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(program_cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for settings in (names, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is names:
            yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 17 kB of text whose bytes are letters, digits, punctuation and newlines."""
    path = tmp_path_factory.mktemp("text") / "squares.txt"
    path.write_text("".join(LINES))
    return path


@pytest.fixture(scope="session")
def small(text_file) -> TrainConfig:
    """A config whose step takes milliseconds."""
    return TrainConfig(
        model=ModelConfig(name="transformer", dim=16, layers=1, heads=2, max_length=64),
        data=str(text_file),
        steps=6,
        batch_size=4,
        seq_len=16,
        warmup_steps=2,
        eval_every=3,
        eval_batches=2,
        final_eval_batches=4,
        checkpoint_every=2,
        sample_bytes=8,
    )


@pytest.fixture(scope="session")
def trained(small, tmp_path_factory, program_cache) -> Path:
    """The run directory of three steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    train(dataclasses.replace(small, steps=3), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Result:
    """An uninterrupted run of six steps."""
    return train(small, tmp_path_factory.mktemp("whole") / "run")
