"""Sessions of a trained run, and texts for them to read."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from experiments.text import corpus
from hope_jax import online
from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.errors import UserError
from hope_jax.training.vocabulary import BYTES


def session_maker(run: Path | None, overrides: tuple[str, ...], tiny: bool) -> Callable[[online.Gate], online.Session]:
    """Fresh sessions with a gate.

    Args:
      run: a trained run.
      overrides: fields of its model config, as key=value.
      tiny: a small untrained model where there is no run.

    Raises:
      UserError: neither, or a run of another vocabulary than bytes.
    """
    if run is not None:
        base = online.from_run(run, overrides, measure_after=False)
        if base.vocabulary.name != BYTES:
            raise UserError(
                f"{run} reads text as {base.vocabulary.name}, and these sessions read bytes; train on bytes"
            )
    elif tiny:
        config = ModelConfig(name="hope_attention", dim=16, layers=1, cms_hidden=(32, 32), cms_chunks=(16, 64))
        base = online.Session(config, build_lm(config).init(jax.random.key(0)))
    else:
        raise UserError("sessions need a trained run: make train, then --run runs/tiny")
    return lambda gate: online.Session(base.model, base.params, gate=gate, measure_after=False)


def text_of(data: str) -> np.ndarray:
    """What is read: of the embedded text, on which runs are trained, the held-out part."""
    found = corpus(data)
    return found.validation if data == "embedded" else found.train
