"""What each of two processes does alone: the rows that it makes, and what it reads into a cache, shared or its own.

A program of its own, given a table and a folder for the caches; it prints one line for each.
"""

import os
import sys
from pathlib import Path

import numpy as np

from hope_jax.models import ModelConfig
from hope_jax.training.config import MeshConfig, TrainConfig
from hope_jax.training.data import TrainBatches
from hope_jax.training.distributed import index, joined
from hope_jax.training.ingest import ingest
from hope_jax.training.step import build_program
from hope_jax.training.vocabulary import load_vocabulary


def rows() -> list[int]:
    """Those of this process, after a look at what lies on its device."""
    model = ModelConfig(name="transformer", dim=16, layers=1, heads=2, max_length=64)
    program = build_program(TrainConfig(model=model, mesh=MeshConfig(fsdp=2), batch_size=8, seq_len=16))
    batches = TrainBatches(np.arange(2000, dtype=np.uint16), seed=0, batch=8, length=16)
    here = program.rows_here(8)
    placed = program.put_batch(batches.rows(3, here), here, 8)
    (shard,) = placed.addressable_shards
    np.testing.assert_array_equal(shard.data, batches[3][shard.index])
    return here


def main(table: str, caches: str) -> None:
    with joined(100):
        print("host: rows", *rows())
        for name, folder in (("shared", "shared"), ("own", f"own{index()}"), ("again", "shared")):
            os.environ["HOPE_JAX_CACHE"] = str(Path(caches) / folder)
            said: list[str] = []
            corpus = ingest(table, "text", load_vocabulary("bytes"), said.append)
            print("host:", name, len(said), corpus.sha256)


if __name__ == "__main__":
    main(*sys.argv[1:])
