"""Checkpoints of a run: RUN/ckpt/<step>/{state, meta}, written by orbax, never pickled.

`state` is the whole `TrainState`. `meta` is JSON: the position of the data, the seed and the fingerprints of
the config and the corpus. Everything random in a run is a function of (seed, step), so no generator state is
stored.
"""

import logging
from pathlib import Path
from typing import Any

import jax

from hope_jax.training.config import TrainConfig, config_hash
from hope_jax.training.errors import UserError
from hope_jax.training.step import TrainState

CHECKPOINTS = "ckpt"


def saved_step(run_dir: Path) -> int | None:
    """The step of the latest complete checkpoint of a run, None without one; opens nothing."""
    names = [path.name for path in (run_dir / CHECKPOINTS).glob("*") if path.is_dir()]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def fingerprints(config: TrainConfig, corpus_sha256: str) -> dict[str, Any]:
    """What `meta` says about whose checkpoint it is; `restore` compares it."""
    return {"seed": config.seed, "config_hash": config_hash(config), "corpus_sha256": corpus_sha256}


class Checkpoints:
    """Saves and restores the checkpoints of one run; use as a context manager.

    Args:
      run_dir: the run directory.
      keep: how many of the latest to keep.
      read_only: change nothing on the disk: the run may be training, and saving, at this moment.
    """

    def __init__(self, run_dir: Path, keep: int = 2, *, read_only: bool = False):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
        self._ocp = ocp
        self.directory = run_dir / CHECKPOINTS
        # Synchronous: the next step donates the buffers that an asynchronous save would still be reading on a
        # CPU.
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, enable_async_checkpointing=False)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
        self._manager = ocp.CheckpointManager(self.directory.resolve(), options=options, item_names=("state", "meta"))

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, None before the first."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves a state under its step, unless that step is already saved."""
        step = int(state.step)
        if step == self.latest_step():
            return
        args = self._ocp.args
        self._manager.save(step, args=args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta)))

    def restore(self, abstract_state: TrainState, expected: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """The latest checkpoint, placed as `abstract_state` says.

        Args:
          abstract_state: shapes, dtypes and shardings.
          expected: the `fingerprints` that its meta must have.
        Returns:
          (state, meta).
        Raises:
          UserError: there is none, its arrays are not those of this model, or another run saved it.
        """
        step = self.latest_step()
        if step is None:
            raise UserError(f"no checkpoint in {self.directory}; train the run first, without --resume")
        args = self._ocp.args
        try:
            restored = self._manager.restore(
                step, args=args.Composite(state=args.StandardRestore(abstract_state), meta=args.JsonRestore())
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            message = str(error).strip().split("\n")[0]
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit this model ({message}); "
                "it is damaged or from another version: train again, or remove it to use an earlier one"
            ) from error
        meta = restored["meta"]
        different = [
            f"{key}: {meta.get(key)} there, {value} here" for key, value in expected.items() if meta.get(key) != value
        ]
        if different:
            raise UserError(
                f"checkpoint {self.directory / str(step)} was saved by another run ({'; '.join(different)}); "
                "restore the config.yaml and corpus.json that belong to it, or train again"
            )
        # Restored arrays are not reliably donatable; one pass through jit makes them the runtime's own.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
        return jax.jit(lambda state: state, out_shardings=shardings)(restored["state"]), meta

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._manager.close()
