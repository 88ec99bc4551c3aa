"""What makes a `ModelConfig` valid; every message carries the offending value and the remedy."""

from __future__ import annotations

import functools
import itertools
import typing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ModelConfig


def check(config: ModelConfig) -> None:
    """Refuse a config that no model can be made of.

    Raises:
      ValueError: the first field that is wrong.
    """
    for field, choices in _choices(type(config)).items():
        require(getattr(config, field) in choices, f"{field} must be one of {choices}; got {getattr(config, field)!r}")
    _check_sizes(config)
    _check_attention(config)
    _check_memories(config)
    _check_fast_levels(config)


@functools.cache
def _choices(config: type[ModelConfig]) -> dict[str, tuple[object, ...]]:
    """The values that fields of a `Literal` type may have."""
    hints = typing.get_type_hints(config)
    return {field: typing.get_args(hint) for field, hint in hints.items() if typing.get_origin(hint) is typing.Literal}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_sizes(config: ModelConfig) -> None:
    for field in (
        "vocab_size",
        "dim",
        "layers",
        "heads",
        "memory_hidden",
        "chunk_proj",
        "chunk_mem",
        "window",
        "persistent",
        "omega_window",
        "max_length",
    ):
        _require_positive(field, getattr(config, field))
    for field in ("cms_hidden", "cms_chunks"):
        for value in getattr(config, field):
            _require_positive(f"each entry of {field}", value)
    if config.mlp_hidden is not None:
        _require_positive("mlp_hidden", config.mlp_hidden)
    require(
        config.head_dim is not None or config.dim % config.heads == 0,
        f"heads must divide dim; got dim={config.dim}, heads={config.heads}",
    )
    require(
        not config.architecture.rotary or config.rope_theta is None or config.head_width % 2 == 0,
        f"rotary positions need an even head width; got {config.head_width} from dim={config.dim}, "
        f"heads={config.heads}",
    )
    mixers = len(config.architecture.mixers)
    require(
        config.layers % mixers == 0,
        f"{config.name} alternates {mixers} mixers, so layers must be a multiple of {mixers}; got {config.layers}",
    )
    require(
        config.rope_theta is None or config.rope_theta > 0,
        f"rope_theta must be positive, or None for no positions; got {config.rope_theta}",
    )


def _check_attention(config: ModelConfig) -> None:
    given = {field: getattr(config, field) for field in ("head_dim", "kv_heads", "rope_llama3")}
    foreign = [f"{field}={value}" for field, value in given.items() if value not in (None, ())]
    require(
        config.architecture.cache or not foreign,
        f"only attention over a cache ('transformer', 'hope_attention') takes {', '.join(foreign)}; leave it out for "
        f"name={config.name!r}",
    )
    if config.head_dim is not None:
        _require_positive("head_dim", config.head_dim)
    if config.kv_heads is not None:
        _require_positive("kv_heads", config.kv_heads)
        require(
            config.heads % config.kv_heads == 0,
            f"kv_heads must divide heads; got kv_heads={config.kv_heads}, heads={config.heads}",
        )
    scaling = config.rope_llama3
    require(
        len(scaling) in (0, 4) and all(value > 0 for value in scaling) and (not scaling or scaling[1] < scaling[2]),
        f"rope_llama3 needs factor, low < high frequency factors and a length, all positive, or (); got {scaling}",
    )
    require(config.norm_eps > 0, f"norm_eps must be positive; got {config.norm_eps}")


def _check_memories(config: ModelConfig) -> None:
    momentum = config.momentum
    require(
        momentum is None or momentum == "gate" or (_is_number(momentum) and 0 <= momentum < 1),
        f"momentum must be None, 'gate' or a number in [0, 1); got {momentum!r}",
    )
    require(
        isinstance(config.conv_window, int) and config.conv_window >= 0,
        f"conv_window must be 0 (none) or a number of tokens; got {config.conv_window!r}",
    )
    clip = config.error_clip
    require(
        clip is None or (_is_number(clip) and clip > 0), f"error_clip must be None or a positive number; got {clip!r}"
    )
    for field, absent in (("surprise", None), ("surprise_temperature", 0.0)):
        value = getattr(config, field)
        require(
            value == absent or (_is_number(value) and value >= 0),
            f"{field} must be {absent} or a positive number; got {value!r}",
        )
    require(
        config.surprise is not None or not (config.surprise_temperature or config.gate_retention),
        "surprise_temperature and gate_retention belong to a surprise gate; give surprise, for example 1.0",
    )
    require(config.eta_init > 0, f"eta_init must be positive; got {config.eta_init}")
    require(0 < config.erase_max <= 2, f"erase_max must lie in (0, 2]; got {config.erase_max}")
    require(set(config.static) <= {"k", "v"}, f"static holds some of 'k' and 'v'; got {config.static}")
    fast, slow = sorted((config.chunk_proj, config.chunk_mem))
    require(
        slow % fast == 0,
        f"one of chunk_proj, chunk_mem must divide the other; got {config.chunk_proj} and {config.chunk_mem}",
    )


def _check_fast_levels(config: ModelConfig) -> None:
    chunks = config.cms_chunks
    require(
        not chunks or config.has_cms,
        f"{config.name} has no CMS levels; leave cms_chunks empty (got {chunks}) or use 'hope' or 'hope_attention'",
    )
    require(
        len(chunks) <= len(config.cms_hidden),
        f"cms_chunks {chunks} has more entries than cms_hidden {config.cms_hidden}; give each level a width",
    )
    _check_mlp_chunks(config)
    fast_chunks = config.fast_chunks
    require(
        all(slow % fast == 0 for fast, slow in itertools.pairwise(fast_chunks)),
        f"chunk sizes must divide, fastest first; got {'cms' if chunks else 'mlp'}_chunks={list(fast_chunks)}",
    )
    require(
        config.cms_variant != "nested" or len(fast_chunks) >= 2 or not (config.has_cms or fast_chunks),
        f"cms_variant='nested' needs two fast levels, or nothing starts again; got chunk sizes {fast_chunks}",
    )
    require(config.cms_eta >= 0, f"cms_eta must not be negative; got {config.cms_eta}")
    require(
        len(config.bptt_chunks) <= len(fast_chunks),
        f"bptt_chunks {config.bptt_chunks} has more entries than there are fast levels, of chunk sizes {fast_chunks}",
    )
    for value in config.bptt_chunks:
        if value is not None:
            _require_positive("each entry of bptt_chunks that is not None", value)


def _check_mlp_chunks(config: ModelConfig) -> None:
    chunks = config.mlp_chunks
    require(
        not chunks or config.name == "transformer",
        f"mlp_chunks assigns the MLPs of a transformer to levels, name={config.name!r} has cms_chunks; got {chunks}",
    )
    require(
        not chunks or config.cms_variant != "independent",
        f"cms_variant='independent' mixes the levels of one block; with mlp_chunks={chunks} a block has one MLP",
    )
    require(
        len(chunks) in (0, config.layers),
        f"mlp_chunks needs one entry per layer, None for an ordinary MLP; got {chunks} for {config.layers} layers",
    )
    for chunk in chunks:
        if chunk is not None:
            _require_positive("each entry of mlp_chunks that is not None", chunk)


def _require_positive(field: str, value: object) -> None:
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        f"{field} must be a positive integer; got {value!r}",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
