"""What `hope train` does around a run: opening line, comparison, sample, and where everything lies."""

from pathlib import Path

import jax
from rich.console import Console

from hope_jax.models import ModelConfig
from hope_jax.training.config import TrainConfig
from hope_jax.training.distributed import is_primary, joined, say
from hope_jax.training.errors import UserError
from hope_jax.training.evaluate import describe_compressors
from hope_jax.training.generate import encode_prompt, generate_bytes, token_pieces
from hope_jax.training.interrupt import Stop
from hope_jax.training.loop import Result, train
from hope_jax.training.overrides import unknown
from hope_jax.training.profile import Steps
from hope_jax.training.versus import OTHERS, comparable, comparison, train_opponent
from hope_jax.training.vocabulary import BYTES

SAMPLE_PROMPT_BYTES = 48
_WRITTEN = ("config.yaml", "metrics.jsonl", "events.*", "goodput.json", "loss.png", "ckpt/")


def run_training(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    versus: str | None = None,
    profile: Steps | None = None,
    again: str = "hope train ... --resume",
) -> Stop:
    """Trains, compares and shows.

    Args:
      config, run_dir, resume, overwrite, profile: see `loop.train`.
      versus: name of the model to compare with, None for none.
      again: the command that continues this run, for the messages.
    Returns:
      Why the run was stopped before the end (and saved), `Stop.NO` if it was not.
    Raises:
      UserError, RunFailed: see `loop.train`.
    """
    with joined(config.heartbeat_seconds):
        return _train(config, run_dir, resume, overwrite, versus, profile, again)


def _train(
    config: TrainConfig,
    run_dir: Path,
    resume: bool | None,
    overwrite: bool,
    versus: str | None,
    profile: Steps | None,
    again: str,
) -> Stop:
    if versus is not None:
        if versus not in OTHERS:
            raise UserError(unknown("model for --versus", versus, list(OTHERS)))
        config = comparable(config, versus)  # refuses before hours of training, not after
    console = Console(highlight=False, soft_wrap=True, emoji=False, quiet=not is_primary())
    ours = train(config, run_dir, resume=resume, overwrite=overwrite, console=console, profile=profile)
    if ours.interrupted:
        return _say_interrupted(ours, again)
    _show_result(ours, console, again)
    if versus is not None:
        theirs = train_opponent(ours, versus, resume=resume, overwrite=overwrite, console=console)
        if theirs.interrupted:
            return _say_interrupted(theirs, again)
        console.print(comparison(ours, theirs))
    if jax.process_count() == 1:
        _show_sample(ours, console)
    console.print(f"wrote {run_dir}: {', '.join(_WRITTEN)}{', profile/' if profile else ''}", markup=False)
    return Stop.NO


def _say_interrupted(result: Result, again: str) -> Stop:
    step, word = int(result.state.step), result.stop.name.lower()
    say(f"{word}; step {step} is saved in {result.run_dir}; continue with: {again}")
    return result.stop


def _show_result(result: Result, console: Console, again: str) -> None:
    steps = result.config.steps
    if result.started_at == steps:
        console.print(
            f"{result.run_dir} was finished at step {steps}; go on with: {again} steps={2 * steps}",
            markup=False,
        )
    console.print(result.corpus.describe(), markup=False)
    compressors = ""
    if result.corpus.vocabulary.name == BYTES:
        compressors = f"; compressors on the same text: {describe_compressors(result.corpus.validation)}"
    console.print(
        f"validation: {result.validation_bpb:.3f} bits per byte after {result.seconds:.0f} s "
        f"({result.tokens_per_second or 0:,.0f} tokens/s{compressors})",
        markup=False,
    )


def sample_lengths(model: ModelConfig, sample_bytes: int) -> tuple[int, int]:
    """Bytes (tokens) of prompt and continuation: together they fit an attention cache, a memory has no limit.

    >>> sample_lengths(ModelConfig(name="transformer", max_length=32), sample_bytes=300)
    (16, 16)
    """
    if not model.architecture.cache:
        return SAMPLE_PROMPT_BYTES, sample_bytes
    prompt_bytes = min(SAMPLE_PROMPT_BYTES, model.max_length // 2)
    return prompt_bytes, min(sample_bytes, model.max_length - prompt_bytes)


def _show_sample(result: Result, console: Console) -> None:
    """Continues the beginning of the validation text."""
    if not result.config.sample_bytes:
        return
    prompt_bytes, sample_bytes = sample_lengths(result.config.model, result.config.sample_bytes)
    if not prompt_bytes:
        console.print(f"no sample: model.max_length={result.config.model.max_length} has no room for one", markup=False)
        return
    vocabulary, seen = result.corpus.vocabulary, result.corpus.seen_bytes
    known = set(seen) - {vocabulary.end}
    opening = [value for value in result.corpus.validation[:prompt_bytes].tolist() if value in known]
    prompt = opening or encode_prompt("", vocabulary, seen)
    values = generate_bytes(
        result.program.lm,
        result.state.params,
        prompt,
        seen_bytes=seen,
        max_bytes=sample_bytes,
        seed=result.config.seed,
        end=vocabulary.end,
    )
    console.rule("sample")
    console.print("".join(token_pieces([*prompt, *values], vocabulary)), markup=False)
    console.rule()
