"""Fingerprints of a model: whether a session belongs to these parameters and this config."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np

from hope_jax.models import ModelConfig
from hope_jax.types import path_string

# They change how a model is computed or trained, not what it is.
ASIDE = ("remat", "bptt_chunks")


def config_fingerprint(config: ModelConfig) -> str:
    """Sixteen hexadecimal digits that differ when the model or the clocks and steps of its levels do.

    Fields at their default do not count, so that files of sessions stay readable when the config gets a field more.
    (Where a default changes, `session_file.FORMAT` has to change too.)

    Example:
      >>> config_fingerprint(ModelConfig(remat="full")) == config_fingerprint(ModelConfig())
      True
    """
    usual = dataclasses.asdict(type(config)())
    fields = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in ASIDE and value != usual[name]
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(params: Any) -> str:
    """Sixty-four hexadecimal digits of all parameters: names, shapes, dtypes and every bit."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    total = hashlib.sha256()
    for path, leaf in leaves:
        array = np.ascontiguousarray(leaf)
        total.update(f"{path_string(path)} {array.dtype} {array.shape} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()
