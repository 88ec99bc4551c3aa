"""What each of two processes does alone: the rows that it makes, and what it reads into a cache, shared or its own.

A program of its own, given a table and a folder for the caches and a run; it prints one line for each.
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
from hope_jax.training.loop import train
from hope_jax.training.step import build_program
from hope_jax.training.vocabulary import load_vocabulary


def config(table: str) -> TrainConfig:
    """Two steps of eight rows, over both processes."""
    model = ModelConfig(name="transformer", dim=16, layers=1, heads=2, max_length=64)
    sizes = {"steps": 2, "warmup_steps": 1, "batch_size": 8, "seq_len": 16, "final_eval_batches": 1}
    return TrainConfig(model=model, mesh=MeshConfig(fsdp=2), data=table, **sizes)  # type: ignore[arg-type]


def rows(config: TrainConfig) -> list[int]:
    """Those of this process, after a look at what lies on its device."""
    program = build_program(config)
    batches = TrainBatches(np.arange(2000, dtype=np.uint16), seed=0, batch=8, length=16)
    here = program.rows_here(8)
    placed = program.put_batch(batches.rows(3, here), here, 8)
    (shard,) = placed.addressable_shards
    np.testing.assert_array_equal(shard.data, batches[3][shard.index])
    return here


def made_by(config: TrainConfig, run_dir: Path) -> int:
    """Rows that this process makes for a run."""
    items: list[int] = []
    row = TrainBatches.row
    TrainBatches.row = lambda self, item: items.append(item) or row(self, item)  # type: ignore[method-assign]
    train(config, run_dir)
    return len(items)


def main(table: str, folder: str) -> None:
    with joined(100):
        print("host: rows", *rows(config(table)))
        for name, cache in (("shared", "shared"), ("own", f"own{index()}"), ("again", "shared")):
            os.environ["HOPE_JAX_CACHE"] = str(Path(folder) / cache)
            said: list[str] = []
            corpus = ingest(table, "text", load_vocabulary("bytes"), said.append)
            print("host:", name, len(said), corpus.sha256)
        print("host: made", made_by(config(table), Path(folder) / "run"))


if __name__ == "__main__":
    main(*sys.argv[1:])
