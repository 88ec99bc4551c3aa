"""The folder for what can be made again: ingested texts, compiled programs."""

import os
from pathlib import Path

import jax

LEAST_SECONDS = 0.5  # of compilation, for a program to be kept


def cache_dir() -> Path:
    """$HOPE_JAX_CACHE, or hope_jax/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("HOPE_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hope_jax"


def keep_compiled() -> None:
    """Compiled programs are kept for the next process, unless $JAX_COMPILATION_CACHE_DIR says where already."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
