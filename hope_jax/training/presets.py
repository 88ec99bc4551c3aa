"""The presets of `hope train`: each is a function that returns a `TrainConfig`.

Imports are inside the functions so that `hope --help` and a mistyped name answer at once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

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
    from hope_jax.training.architecture import with_architecture

    return with_architecture(tiny(), "hope_attention")


def tiny_transformer() -> "TrainConfig":
    """As tiny, with a Transformer."""
    from hope_jax.training.architecture import with_architecture

    config = with_architecture(tiny(), "transformer")
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


class Size(NamedTuple):
    """A language model for accelerators; the parameters are those with a tied head of 32,000 tokens."""

    dim: int
    layers: int  # of heads of 64
    tokens: float  # of training
    batch_size: int
    seq_len: int
    learning_rate: float
    published: bool  # parameters, tokens, batch, length and learning rate are the paper's and Titans' (not the widths)


# Published: 760M parameters on 30B tokens, 1.3B on 100B; batches of half a million tokens, lengths of 4K, AdamW at 4e-4
# (arXiv:2512.24695, 9.3; arXiv:2501.00663, 5.1). Widths and depths are not; these are ours (spec 8.3). The smaller
# sizes are ours altogether, with 20 tokens a parameter (arXiv:2203.15556).
SIZES = {
    "30m": Size(512, 8, 0.6e9, 64, 2048, 1e-3, published=False),
    "140m": Size(768, 16, 2.8e9, 128, 2048, 8e-4, published=False),
    "350m": Size(1024, 24, 7e9, 128, 4096, 6e-4, published=False),
    "760m": Size(1536, 24, 30e9, 128, 4096, 4e-4, published=True),
    "1.3b": Size(2048, 24, 100e9, 128, 4096, 4e-4, published=True),
}


def sized(name: str, model: str = "hope") -> "TrainConfig":
    """The config of a row of `SIZES`, for accelerators: bfloat16 products, blocks recomputed.

    The text is bytes unless `tokenizer=FILE model.vocab_size=N` says otherwise; give it with `data=`.
    """
    from hope_jax.models import ModelConfig
    from hope_jax.training.architecture import with_architecture
    from hope_jax.training.config import TrainConfig

    size = SIZES[name]
    large = size.dim >= 1024
    levels = 3 if large else 2
    cms = 4 * size.dim // levels // 64 * 64  # together an MLP of 4 D
    steps = round(size.tokens / (size.batch_size * size.seq_len))
    config = TrainConfig(
        model=ModelConfig(
            dim=size.dim,
            layers=size.layers,
            heads=size.dim // 64,
            memory_hidden=64,
            chunk_proj=16,
            chunk_mem=16,
            eta_init=0.002,
            error_clip=1.0,
            cms_hidden=(cms,) * levels,
            max_length=size.seq_len,
            dtype="bfloat16",
            remat="full",
        ),
        steps=steps,
        batch_size=size.batch_size,
        seq_len=size.seq_len,
        learning_rate=size.learning_rate,
        final_learning_rate=size.learning_rate / 10,
        warmup_steps=min(2000, steps // 20),
        cms_periods=(1, 4, 16) if large else (1, 16),
        eval_every=1000,
        checkpoint_every=1000,
        final_eval_batches=100,
    )
    return with_architecture(config, model)


PRESETS: dict[str, Callable[[], "TrainConfig"]] = {
    function.__name__: function for function in (tiny, tiny_attention, tiny_transformer, smoke)
}
DESCRIPTIONS = {name: str(function.__doc__) for name, function in PRESETS.items()}
for _name, _size in SIZES.items():
    for _suffix, _model, _title in (
        ("", "hope", "Hope"),
        ("_attention", "hope_attention", "Hope-Attention"),
        ("_transformer", "transformer", "Transformer++"),
    ):
        PRESETS[_name + _suffix] = partial(sized, _name, _model)
        DESCRIPTIONS[_name + _suffix] = (
            f"{_title} of {_name.upper()} for accelerators, {_size.tokens / 1e9:g}B tokens "
            f"({'the published budget' if _size.published else 'a budget of ours'})."
        )


def preset(name: str, overrides: Sequence[str] = ()) -> "TrainConfig":
    """The config of a preset.

    Args:
      name: of the preset.
      overrides: key=value; `model=NAME` takes the preset to that architecture, the others change what comes of it.

    Raises:
      UserError: no such preset; the message names the nearest and lists all. Or as `apply_overrides`.
    """
    if name not in PRESETS:
        raise UserError(unknown("preset", name, list(PRESETS)))
    config = PRESETS[name]()
    if not overrides:
        return config

    from hope_jax.models import ARCHITECTURES
    from hope_jax.training.architecture import with_architecture

    words = [override.partition("=") for override in overrides]
    named = [value for key, _, value in words if key in ("model", "model.name") and value in ARCHITECTURES]
    return with_architecture(config, [config.model.name, *named][-1], overrides)


def describe_presets() -> str:
    """One line per preset, for the help text."""
    return "\n".join(f"  {name:<18}{text}" for name, text in DESCRIPTIONS.items())
