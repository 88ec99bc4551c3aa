"""`hope learn`, and sessions in files as the command line uses them."""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hope_jax.online.gates import parse_gate
from hope_jax.online.keeping import from_run
from hope_jax.online.keeping import open as open_session
from hope_jax.online.reading import joined, without_losses
from hope_jax.online.report import Report
from hope_jax.online.session import Session
from hope_jax.online.text_file import TextFile, check_text, file_pieces
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import apply_overrides

PART_SECONDS = 60.0  # so that a process that is killed loses no more work than that
CALLS_A_PART = 4096  # of a thousand tokens at most: a report grows with its chunks


def learning_options(gate: str | None, max_moved: float | None) -> dict[str, Any]:
    """Those options of `Session` that a command line gives, of those that it does give.

    Raises:
      UserError: no such gate.
    """
    try:
        chosen = {"gate": None if gate is None else parse_gate(gate), "max_moved": max_moved}
    except ValueError as error:
        raise UserError(f"--gate: {error}") from error
    return {name: value for name, value in chosen.items() if value is not None}


def start_or_continue(
    run_dir: Path,
    file: Path | None,
    overrides: Sequence[str] = (),
    *,
    gate: str | None = None,
    max_moved: float | None = None,
) -> Session:
    """The session of a file, or a new one of the run where there is no file yet.

    Args:
      run_dir: of the run.
      file: of the session.
      overrides: fields of the model config.
      gate: of a new session, as of `parse_gate`.
      max_moved: of a new session, as of `Session`.

    Raises:
      UserError: no such run or gate, a file that is not a session of it, or overrides, a gate or a max_moved that a
        session which has begun does not follow.
    """
    options = learning_options(gate, max_moved)
    if file is None or not file.exists():
        if file is not None and not file.parent.is_dir():
            raise UserError(f"no such folder: {file.parent}; make it, or give another --session")
        return from_run(run_dir, tuple(overrides), **options)
    session = open_session(file, run=run_dir)
    if apply_overrides(session.model, overrides) != session.model:
        raise UserError(
            f"{file} is a session that began without {' '.join(overrides)}; leave that out, or begin another --session"
        )
    for option, asked, own in (
        ("--gate", options.get("gate", session.gate).name, session.gate.name),
        ("--max-moved", options.get("max_moved", session.max_moved), session.max_moved),
    ):
        if asked != own:
            raise UserError(
                f"{file} is a session with {option} {own}, not {asked}; leave that out, or begin another --session"
            )
    return session


def read_with_progress(session: Session, text: TextFile, console: Console, *, learn: bool = True) -> Iterator[Report]:
    """Observes a text, with a bar on a terminal; Ctrl-C or a fault ends it early, and what was read stays read.

    Args:
      session: it reads, and learns.
      text: what comes next in its stream.
      console: where the bar is.
      learn: False: it reads and does not learn.
    Yields:
      What was read, in parts of `PART_SECONDS` or `CALLS_A_PART` calls. Of a call that Ctrl-C ended early the tokens
        count, and the surprise is not known.

    Raises:
      UserError: as `file_pieces`, after a report of what was read before.
    """
    columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    pieces, total = file_pieces(session, text)
    task = bar.add_task("", total=total, loss="compiling ...")
    first, ended, fault = session.tokens, False, None
    while not ended:
        reports: list[Report] = []
        begun, end = session.tokens, time.monotonic() + PART_SECONDS
        with bar:
            try:
                for piece in itertools.islice(pieces, CALLS_A_PART):
                    report = session.observe(piece, update_allowed=learn)
                    reports.append(without_losses(report))
                    bar.update(task, completed=session.tokens - first, loss=f"{report.before:.3f} nats/token")
                    if time.monotonic() >= end:
                        break
                else:
                    ended = len(reports) < CALLS_A_PART
            except KeyboardInterrupt:
                console.print(f"stopped; {session.tokens - first:,} tokens are read")
                ended = True
            except UserError as error:
                ended, fault = True, error
        if session.tokens > begun or (begun == first and not fault):
            yield joined(session, reports)._replace(tokens=session.tokens - begun)
    if fault:
        raise fault


def save_beside(session: Session, file: Path) -> Path:
    """Saves a session whose file cannot be written under the first free of the names alice.hope.1, alice.hope.2 ...

    Raises:
      UserError: that cannot be written either.
    """
    names = (file.with_name(f"{file.name}.{number}") for number in itertools.count(1))
    beside = next(path for path in names if not path.exists())
    session.save(beside)
    return beside


def learn_file(run_dir: Path, file: Path, data: Path, overrides: Sequence[str], **options: Any) -> None:
    """What `hope learn` does: reads a text into a session's file, and says what it learned.

    The file is saved at the end and, of a long text, after each part that is reported; Ctrl-C meanwhile ends it after
    one more save.

    Args:
      run_dir: of the run.
      file: of the session.
      data: the text, as of `check_text`.
      overrides: fields of the model config.
      options: gate and max_moved, as of `start_or_continue`.

    Raises:
      UserError: as `start_or_continue`, `check_text` and `file_pieces`, or the file cannot be written; the session is
        beside it then.
    """
    from hope_jax.online.chat import learned

    console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    text = check_text(data)
    session = start_or_continue(run_dir, file, overrides, **options)

    def save() -> str:
        try:
            session.save(file)
        except UserError as error:
            raise UserError(f"{error}; what was learned is in {save_beside(session, file)}") from error
        return f"saved {file}: {session.tokens:,} tokens"

    try:
        for report in read_with_progress(session, text, console):
            saved = save()
            console.print(learned(report))
            console.print(saved)
    except KeyboardInterrupt:  # while it reported or saved
        console.print(save())
        raise


def answer_from(run_dir: Path, file: Path, prompt: str, **options: Any) -> Iterator[str]:
    """What `hope generate --session` prints: the prompt, then the answer; the file stays as it is.

    Args:
      run_dir: of the run.
      file: the session's.
      prompt: what comes next in the session's stream.
      options: of `Session.answer`.

    Raises:
      UserError: no such run or session, or a value out of range.
    """
    answer = open_session(file, run=run_dir).answer(prompt, learn=False, **options)
    yield prompt
    yield from answer
