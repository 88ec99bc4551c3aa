"""Bits per byte: of a model on held-out text, and of general-purpose compressors on the same text."""

import gzip
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.training.config import TrainConfig
from hope_jax.training.corpus import ONE_DOCUMENT
from hope_jax.training.data import EvalBatch, document_eval_batches, eval_batches
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.step import Program, bits
from hope_jax.training.vocabulary import BYTES


def evaluate(
    program: Program,
    params: Any,
    data: np.ndarray,
    config: TrainConfig,
    limit: int | None = None,
    *,
    starts: np.ndarray = ONE_DOCUMENT,
    bytes_per_token: float = 1.0,
) -> float:
    """Bits per byte of a text under a model, each window starting with an empty memory.

    Where the config resets the memory at documents, each document of the text starts with an empty memory too.

    Args:
      program: the compiled functions.
      params: the parameters.
      data: [tokens].
      config: window length, batch and what documents are.
      limit: at most this many batches, evenly spaced; None reads everything.
      starts: [documents] where each document begins.
      bytes_per_token: of this text.
    Returns:
      Mean of -log2 p(token) over the tokens that are predicted, divided by `bytes_per_token`.
    Raises:
      RunFailed: it is infinite or not a number.
    """
    nats = count = 0.0
    for batch in _batches(data, starts, config, limit):
        tokens, weights = program.put_batch(batch.tokens), program.put_batch(batch.weights)
        batch_nats, batch_count = program.eval_step(params, tokens, weights)
        nats, count = nats + float(batch_nats), count + float(batch_count)
    bpb = bits(nats / count) / bytes_per_token
    if not math.isfinite(bpb):
        raise RunFailed(
            f"evaluation gave {bpb} bits per byte: the parameters have diverged; "
            f"train again with a smaller learning_rate (it was {config.learning_rate:g})"
        )
    return bpb


def _batches(data: np.ndarray, starts: np.ndarray, config: TrainConfig, limit: int | None) -> Iterator[EvalBatch]:
    sizes = {"batch": config.microbatch, "length": config.seq_len, "limit": limit}
    if config.documents in ("reset", "carry_reset"):
        return document_eval_batches(data, starts, multiple=config.segment, **sizes)
    return eval_batches(data, **sizes)


def compressed_bits(data: np.ndarray) -> dict[str, float]:
    """Bits per byte of gzip and xz at their strongest, on this text alone.

    >>> compressed_bits(np.zeros(10_000, np.uint8))["gzip"] < 0.1
    True
    """
    raw = data.tobytes()
    sizes = {
        "gzip": len(gzip.compress(raw, 9)),
        "xz": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(raw) for name, size in sizes.items()}


def describe_compressors(data: np.ndarray) -> str:
    """One line with `compressed_bits`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in compressed_bits(data).items())


def eval_file(run_dir: Path, path: Path) -> str:
    """What `hope eval` prints: bits per byte of a text file under the latest checkpoint of a run.

    Raises:
      UserError: no such run, or the file is missing, empty or binary.
    """
    from hope_jax.training.corpus import read_text
    from hope_jax.training.load import load_run
    from hope_jax.training.run_dir import read_seen_bytes, run_vocabulary

    text = np.frombuffer(read_text(path), np.uint8)
    vocabulary = run_vocabulary(run_dir)
    data = vocabulary.encode([text.tobytes().decode()])[0]
    if not data.size:
        raise UserError(f"{path} holds no token of this run's tokenizer; give another text")
    run = load_run(run_dir)
    bpb = evaluate(run.program, run.state.params, data, run.config, bytes_per_token=text.size / data.size)
    unit = "bytes" if vocabulary.name == BYTES else "tokens"
    line = (
        f"{path}: {bpb:.3f} bits per byte over {data.size - 1:,} {unit}, in windows of {run.config.seq_len} "
        f"({run_dir} at step {int(run.state.step)}; {describe_compressors(text)})"
    )
    unseen = int((~np.isin(data, read_seen_bytes(run_dir))).sum())
    return line + (f"\nnote: {unseen:,} of the {unit} have values that never occurred in training" if unseen else "")
