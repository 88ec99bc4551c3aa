"""The presets of `hope train`: each is a function that returns a `TrainConfig`.

Imports are inside the functions so that `hope --help` and a mistyped name answer at once.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from hope_jax.training.errors import UserError
from hope_jax.training.overrides import unknown

if TYPE_CHECKING:
    from hope_jax.training.config import TrainConfig


def tiny() -> "TrainConfig":
    """A small Hope on the embedded corpus, under five minutes on two CPU cores."""
    from hope_jax.models import ModelConfig
    from hope_jax.training.config import TrainConfig

    # With momentum mu a write acts 1 / (1 - mu) times, so the inner step starts that much smaller. Recomputing the
    # blocks in the backward pass is faster here than writing the memories' states out (experiments/LOG.md).
    model = ModelConfig(
        dim=128,
        heads=4,
        memory_hidden=16,
        cms_hidden=(256, 256),
        chunk_proj=16,
        chunk_mem=16,
        eta_init=0.002,
        error_clip=1.0,
        remat="full",
    )
    return TrainConfig(model=model, steps=400)


def tiny_attention() -> "TrainConfig":
    """As tiny, with attention in place of the self-modifying memory (Hope-Attention)."""
    return _with_model(tiny(), "hope_attention")


def tiny_transformer() -> "TrainConfig":
    """As tiny, with a Transformer."""
    config = _with_model(tiny(), "transformer")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))  # its fastest policy


def smoke() -> "TrainConfig":
    """Every part of a run in seconds, on a model too small to learn anything."""
    base = tiny()
    model = dataclasses.replace(base.model, dim=32, layers=1, memory_hidden=16, cms_hidden=(32, 32))
    return dataclasses.replace(
        base,
        model=model,
        steps=6,
        batch_size=2,
        seq_len=32,
        eval_every=3,
        eval_batches=2,
        final_eval_batches=4,
        checkpoint_every=3,
        sample_bytes=16,
    )


def _with_model(config: "TrainConfig", name: str) -> "TrainConfig":
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))  # type: ignore[arg-type]


PRESETS: dict[str, Callable[[], "TrainConfig"]] = {
    function.__name__: function for function in (tiny, tiny_attention, tiny_transformer, smoke)
}


def preset(name: str) -> "TrainConfig":
    """The config of a preset.

    Raises:
      UserError: no such preset; the message names the nearest and lists all.
    """
    if name not in PRESETS:
        raise UserError(unknown("preset", name, list(PRESETS)))
    return PRESETS[name]()


def describe_presets() -> str:
    """One line per preset, for the help text."""
    return "\n".join(f"  {name:<18}{function.__doc__}" for name, function in PRESETS.items())
