"""One small text, one small config and one short run for all tests of training."""

import dataclasses
from pathlib import Path

import pytest

from hope_jax.models import ModelConfig
from hope_jax.training.config import TrainConfig
from hope_jax.training.loop import train

LINES = [f"line {i}: the square of {i} is {i * i}, and its cube is {i**3}.\n" for i in range(400)]


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
def trained(small, tmp_path_factory) -> Path:
    """The run directory of three steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    train(dataclasses.replace(small, steps=3), run_dir)
    return run_dir
