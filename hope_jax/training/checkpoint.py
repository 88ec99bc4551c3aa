"""Checkpoints of a run: RUN/ckpt/<step>/{state, meta, checksums.json}, written by orbax, never pickled.

`state` is the whole `TrainState`. `meta` is JSON: the position of the data, the seed, the fingerprints of the
config and the corpus, and what wrote it. Everything random in a run is a function of (seed, step), so no
generator state is stored.

A save runs beside the steps that follow it, unless the config says to wait. It writes into
<step>.orbax-checkpoint-tmp, then the checksums of what it wrote, and the rename to <step> comes last: a directory
with the name of a step is complete. What lies on the disk may still be damaged later, so the checksums are compared
before a checkpoint is used; one that differs is put aside as <step>.damaged and the one before is taken.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hope_jax.training import distributed
from hope_jax.training.checksums import CHECKSUMS, find_damage, write_checksums
from hope_jax.training.config import TrainConfig, config_hash
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.step import TrainState
from hope_jax.training.versions import versions

CHECKPOINTS = "ckpt"
DAMAGED = ".damaged"
TEMPORARY = ".orbax-checkpoint-tmp"
META = Path("meta") / "metadata"
STATE = "state"
FOR_EVER = 2**62  # steps: of them only step 0 is a multiple
NO_SPACE = ("no space left", "file too large", "disk quota")  # in the messages of the operating system
REMEDY = "free some space, or lower keep_checkpoints, and continue with --resume"


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the complete checkpoints of a run, in order; opens nothing."""
    names = [path.name for path in (run_dir / CHECKPOINTS).glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def saved_step(run_dir: Path) -> int | None:
    """The step of the latest complete checkpoint of a run, None without one; opens nothing."""
    return max(saved_steps(run_dir), default=None)


def fingerprints(config: TrainConfig, corpus_sha256: str) -> dict[str, Any]:
    """What `meta` says about whose checkpoint it is; `restore` compares it."""
    return {"seed": config.seed, "config_hash": config_hash(config), "corpus_sha256": corpus_sha256}


def describe(step: int, config: TrainConfig, corpus_sha256: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The `meta` of a checkpoint."""
    return {
        "data_step": step,  # the position of data and random numbers: both follow from (seed, step)
        **fingerprints(config, corpus_sha256),
        "versions": versions(),
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "checksums": CHECKSUMS,  # a checkpoint that says so is damaged without them
    }


class Checkpoints:
    """Saves and restores the checkpoints of one run; use as a context manager.

    In a run of several processes, all of them call every method, in the same order.

    Args:
      run_dir: the run directory.
      keep: how many of the latest to keep.
      keep_every: keep also those whose step this divides, for good; 0 for none but step 0, which is saved only
        where a run begins from another.
      read_only: change nothing on the disk: the run may be training, and saving, at this moment.
    """

    def __init__(self, run_dir: Path, keep: int = 2, keep_every: int = 0, *, read_only: bool = False):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax narrates every save; its errors we raise
        # The parallel writing of replicas compiles a program for each array: seconds at the first save.
        ocp.type_handlers.register_type_handler(
            jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True
        )
        self._ocp = ocp
        self._run_dir, self._read_only = run_dir, read_only
        self.directory = run_dir / CHECKPOINTS
        self._saving: int | None = None  # the step of the save in progress
        self._saved: int | None = None  # the step that was saved or restored last
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, enable_async_checkpointing=False)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or FOR_EVER,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums),
                cleanup_tmp_directories=True,
            )
        self._manager = ocp.CheckpointManager(self.directory.resolve(), options=options, item_names=("state", "meta"))

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, None before the first."""
        return saved_step(self._run_dir)

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Begins to save a state under its step, unless that step is already saved.

        The state may be donated as soon as this returns: orbax has copied it to the host, or, on a CPU, holds
        views of it, and a buffer that is viewed is not reused.

        Raises:
          RunFailed: this save could not begin, or the one before was not completed.
        """
        self.wait()
        step = int(state.step)
        if step == self._saved:
            return
        self._check_room(step, state)
        self._saving = step
        args = self._ocp.args
        try:
            self._manager.save(step, args=args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta)))
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises what `wait` would raise, if the save in progress has ended; waits for nothing."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress, if there is one, is complete.

        Raises:
          RunFailed: it failed; its part of the disk is free again, and the checkpoints before it are whole.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving, self._saved = None, self._saving

    def _write_checksums(self) -> None:
        write_checksums(self.directory / f"{self._saving}{TEMPORARY}")

    def _check_room(self, step: int, state: TrainState) -> None:
        """Refuses to begin what cannot be completed: the disk needs room for one more checkpoint."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if distributed.is_primary() and free < needed:
            raise RunFailed(
                f"no room to save step {step} in {self.directory}: {free / 1e6:,.0f} MB are free, a checkpoint "
                f"takes about {needed / 1e6:,.0f} MB; {self._what_is_saved()}; {REMEDY}"
            )

    def _failed(self, error: Exception) -> RunFailed:
        """Forgets the save in progress and removes what it left."""
        step, self._saving = self._saving, None
        if distributed.is_primary():
            shutil.rmtree(self.directory / f"{step}{TEMPORARY}", ignore_errors=True)
        self._manager.reload()
        reason = " ".join(str(error).split())
        full = any(word in reason.lower() for word in NO_SPACE)
        return RunFailed(
            f"step {step} could not be saved in {self.directory} ({'the disk is full' if full else reason}); "
            f"{self._what_is_saved()}; {REMEDY if full else 'mend that and continue with --resume'}"
        )

    def _what_is_saved(self) -> str:
        last = self.latest_step()
        return "no checkpoint was saved before it" if last is None else f"the checkpoint of step {last} is whole"

    def restore(self, abstract_state: TrainState, expected: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """The latest checkpoint that is as it was written, placed as `abstract_state` says.

        Args:
          abstract_state: shapes, dtypes and shardings.
          expected: the `fingerprints` that its meta must have.
        Returns:
          (state, meta).
        Raises:
          UserError: there is none, its arrays are not those of this model, or another run saved it.
        """
        step, meta = self._latest_of(expected)
        args = self._ocp.args
        with self._misfit_named(step):
            restored = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(abstract_state)))
        self._saved = step
        # Restored arrays are not reliably donatable; one pass through jit makes them the runtime's own.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
        return jax.jit(lambda state: state, out_shardings=shardings)(restored["state"]), meta

    def restore_part(self, abstract_part: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
        """As `restore`, but only some fields of the state: {"params": ...}."""
        return self._read_part(self._latest_of(expected)[0], abstract_part)

    def beginning(self, abstract_params: Any) -> Any:
        """The parameters of step 0, which a run that begins from another keeps; None if they are no longer there."""
        if self._saving == 0:
            self.wait()
        if 0 not in saved_steps(self._run_dir):
            return None
        return self._read_part(0, {"params": abstract_params})["params"]

    def _read_part(self, step: int, abstract_part: dict[str, Any]) -> dict[str, Any]:
        placed = self._ocp.checkpoint_utils.construct_restore_args(abstract_part)
        wanted = self._ocp.args.PyTreeRestore(abstract_part, restore_args=placed, partial_restore=True)
        reader = self._ocp.Checkpointer(self._ocp.PyTreeCheckpointHandler())
        with self._misfit_named(step), contextlib.closing(reader):
            return reader.restore((self.directory / str(step) / STATE).resolve(), args=wanted)

    def _latest_of(self, expected: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Step and meta of the latest sound checkpoint, if this run saved it."""
        if self.latest_step() is None:
            raise UserError(f"no checkpoint in {self.directory}; train the run first, without --resume")
        step = self._latest_sound_step()
        if step is None:
            raise UserError(self._all_damaged())
        meta = json.loads((self.directory / str(step) / META).read_text())
        self._check_owner(step, meta, expected)
        return step, meta

    @contextlib.contextmanager
    def _misfit_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, FileNotFoundError) as error:
            message = str(error).strip().split("\n")[0]
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit this model ({message}); "
                "it is damaged or from another version: train again, or remove it to use an earlier one"
            ) from error

    def check_none_is_damaged(self) -> None:
        """Refuses to begin a run again silently whose checkpoints have all been put aside.

        Raises:
          UserError: there are damaged checkpoints and no other.
        """
        if self.latest_step() is None and any(self.directory.glob(f"*{DAMAGED}")):
            raise UserError(self._all_damaged())

    def _all_damaged(self) -> str:
        return f"every checkpoint in {self.directory} is damaged; train the run again, with --overwrite"

    def _latest_sound_step(self) -> int | None:
        """The latest step whose files are as they were written; those after it are put aside."""
        for step in reversed(saved_steps(self._run_dir)):
            problem = self._problem(self.directory / str(step))
            if problem is None:
                return step
            self._put_aside(step, problem)
        return None

    def _problem(self, directory: Path) -> str | None:
        """What is wrong with a checkpoint, the same answer on every process."""
        problem = _find_problem(directory, distributed.index(), jax.process_count())
        # The file names are the same everywhere; the first process that found something tells the others.
        return distributed.first_of(problem)

    def _put_aside(self, step: int, problem: str) -> None:
        there, aside = self.directory / str(step), self.directory / f"{step}{DAMAGED}"
        kept = "it is left alone" if self._read_only else f"it is kept as {aside}"
        distributed.say(f"checkpoint {there} is damaged ({problem}); {kept}, the one before is used")
        if self._read_only:
            return
        if distributed.is_primary():
            shutil.rmtree(aside, ignore_errors=True)
            there.rename(aside)
        distributed.barrier("put aside")
        self._manager.reload()

    def _check_owner(self, step: int, meta: dict[str, Any], expected: dict[str, Any]) -> None:
        different = [
            f"{key}: {meta.get(key)} there, {value} here" for key, value in expected.items() if meta.get(key) != value
        ]
        if different:
            raise UserError(
                f"checkpoint {self.directory / str(step)} was saved by another run ({'; '.join(different)}); "
                "restore the config.yaml and corpus.json that belong to it, or train again"
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        """Completes the save in progress; after an error it may be the reason, and is only waited for."""
        if kind is not None and jax.process_count() > 1:
            return  # the others may be gone, and a save waits for them
        try:
            self.wait()
        except RunFailed:
            if kind is None:
                raise
        self._manager.close()


def _find_problem(directory: Path, share: int, shares: int) -> str | None:
    try:
        meta = json.loads((directory / META).read_text())
    except (OSError, ValueError):
        return f"{META} cannot be read"
    if not (directory / CHECKSUMS).exists():
        if meta.get("checksums"):
            return f"{CHECKSUMS} is missing"
        distributed.say(f"note: {directory} was saved without checksums, it is used as it is")
        return None
    return find_damage(directory, share, shares)
