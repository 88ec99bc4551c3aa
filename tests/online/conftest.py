"""One small model that learns, for all tests of sessions; its programs are compiled once per process."""

import jax
import numpy as np
import pytest

from hope_jax import online
from hope_jax.models import ModelConfig, build_lm
from tests.training.conftest import _compile_once, program_cache  # noqa: F401  the same small programs in every file

SMALL = {"dim": 16, "layers": 1, "heads": 2, "cms_hidden": (32, 32), "cms_chunks": (8, 32)}
OTHERS = {
    "hope": {"name": "hope", "memory": "linear", "chunk_proj": 4, "chunk_mem": 4, **SMALL},
    "nested": {"name": "hope_attention", "cms_variant": "nested", "max_length": 96, **SMALL},
    "no fast levels": {"name": "hope", "memory": "linear", "dim": 16, "layers": 1, "chunk_mem": 4},
    "MLPs of layers": {"name": "transformer", "dim": 16, "layers": 2, "mlp_chunks": (8, 16), "max_length": 96},
}


@pytest.fixture(scope="session")
def config():
    return ModelConfig(name="hope_attention", max_length=96, cms_eta=0.5, **SMALL)


@pytest.fixture(scope="session")
def params(config):
    return build_lm(config).init(jax.random.key(0))


@pytest.fixture(scope="session")
def text():
    """430 tokens: 53 chunks of 8 and 6 more."""
    return np.random.default_rng(0).integers(0, 256, 430).astype(np.uint8).tobytes()


@pytest.fixture
def interrupted():
    """A function that is stopped by Ctrl-C where it is called for the second time, and not again."""

    def stop(function):
        calls = []

        def second(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return second

    return stop


@pytest.fixture
def run(config, params, tmp_path, monkeypatch):
    """A run directory, as far as the commands see."""

    def of_run(run, config, **options):
        return online.Session(config, params, **options)

    monkeypatch.setattr("hope_jax.online.keeping._config_of", lambda run: config)
    monkeypatch.setattr("hope_jax.online.keeping._of_run", of_run)
    return tmp_path / "run"
