"""`hope chat`: a conversation on the terminal that shows what is learned while it is learned."""

import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from hope_jax.online.learn import read_with_progress, save_beside, start_or_continue
from hope_jax.online.report import LevelReport, Report
from hope_jax.online.session import Session
from hope_jax.online.text_file import check_text
from hope_jax.training.errors import UserError
from hope_jax.training.watch import sparkline

PROMPT = "> "
WIDTH = 16  # characters of a bar
CURVE = 40  # of the line of losses
MOST_LINE = 1 << 20  # bytes of a line
BYTES = "surrogateescape"  # bytes that are not UTF-8 are half characters in a line, and bytes again for the session
# What would move the cursor or colour the terminal, and half characters, are shown as a mark.
UNSHOWN = [*range(32), *range(127, 160), *range(0xD800, 0xE000)]
CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in UNSHOWN if chr(code) not in "\n\t"}
HELP = """a line          is read, learned from and continued
/tell TEXT      reads a line and learns from it, without an answer
/load FILE      reads a text file
/score TEXT     how surprising a text is now; leaves no trace
/levels         what waits in each level, and how far it has moved
/forget LEVEL   sets a level back to its start: fast, level_0, level_1, ..., context, all
/learn on|off   whether lines teach (off: they are read all the same)
/save [FILE]    writes the session to a file
/quit           ends, as does Ctrl-D; Ctrl-C stops an answer"""


class Chat:
    """A conversation with a session.

    Args:
      session: it reads, learns and answers.
      file: where it is kept; None: nowhere, unless /save names a file.
      console: where to.
      options: of `Session.answer`.
    """

    def __init__(self, session: Session, file: Path | None, console: Console, **options: Any):
        self.session, self.file, self.console, self.options = session, file, console, options
        self.learn = True
        self.saved: str | None = session.digest() if session.file else None
        self.commands: dict[str, Callable[[str], None]] = {
            "/tell": self.tell,
            "/load": self.load,
            "/score": self.score,
            "/levels": self.levels,
            "/forget": self.forget,
            "/learn": self.switch,
            "/save": self.save,
            "/help": lambda _: self.say(HELP),
        }

    def run(self, lines: Iterable[str]) -> None:
        """Takes line after line until /quit or the end; a mistake is one line and the conversation goes on."""
        try:
            for line in lines:
                if line.strip() == "/quit":
                    break
                try:
                    self.take(line)
                except UserError as error:
                    self.say(str(error), style="red")
                except KeyboardInterrupt:
                    self.say("stopped; what was read stays read")
        finally:
            try:
                self.end()
            except KeyboardInterrupt:
                self.end()
                raise

    def take(self, line: str) -> None:
        """One line: a command, or text to learn from and to answer."""
        if len(line.encode(errors=BYTES)) > MOST_LINE:
            raise UserError(
                f"a line has at most {MOST_LINE:,} bytes, and nothing was learned from this one; "
                "put a long text into a file, for /load FILE or hope learn --data FILE"
            )
        word, _, rest = line.strip().partition(" ")
        if word.startswith("/"):
            if word not in self.commands:
                raise UserError(f"no command {word!r}; there are {', '.join(self.commands)}, /quit")
            self.commands[word](rest.strip())
        elif line.strip():
            self.read(line)
            self.answer()

    def read(self, text: str) -> None:
        """Reads a text and shows what it did."""
        self.console.print(learned(self.session.observe(text.encode(errors=BYTES), update_allowed=self.learn)))

    def answer(self) -> None:
        """Streams what comes next, to the end of the line."""
        seed = self.session.tokens  # another one each time, and the same when a session is played again
        try:
            for piece in self.session.answer(until="\n", seed=seed, **self.options):
                self.console.print(piece.translate(CONTROL), end="", style="bold", soft_wrap=True)
        except KeyboardInterrupt:
            self.console.print(" (stopped)", end="", style="dim")
        self.console.print()
        last = self.session.snapshot().place.held.tokens[-1:]  # the last token read always waits for the next
        if "\n" not in self.session.vocabulary.decode(last.tolist()):  # the model did not end its line
            self.session.observe("\n", update_allowed=False)

    def tell(self, text: str) -> None:
        """/tell"""
        self.read(f"{text}\n")

    def load(self, name: str) -> None:
        """/load"""
        text = check_text(_path(name))
        for report in read_with_progress(self.session, text, self.console, learn=self.learn):
            self.console.print(learned(report))

    def score(self, text: str) -> None:
        """/score"""
        self.say(f"{self.session.score(text.encode(errors=BYTES)):.3f} nats/token")

    def levels(self, _: str) -> None:
        """/levels"""
        now, moved = self.session.observe(""), self.session.diff()
        self.say(f"{self.session.tokens:,} tokens read, {now.held} of them wait for a whole chunk")
        self.console.print(level_table([level._replace(moved=moved[level.name]) for level in now.levels]))

    def forget(self, level: str) -> None:
        """/forget"""
        self.session.forget(level or "fast")
        self.say(f"forgot {level or 'fast'}")

    def switch(self, word: str) -> None:
        """/learn"""
        if word not in ("on", "off"):
            raise UserError(f"/learn {word}: write /learn on or /learn off")
        self.learn = word == "on"
        self.say(f"lines {'teach' if self.learn else 'are read and do not teach'} from now on")

    def save(self, name: str) -> None:
        """/save"""
        file = _path(name) if name else self.file
        if file is None:
            raise UserError("nowhere to save to; write /save FILE, or start with --session FILE")
        self.session.save(file)
        self.file, self.saved = file, self.session.digest()
        self.say(f"saved {file}: {self.session.tokens:,} tokens")

    def end(self) -> None:
        """Saves what is not saved yet, where there is a file for it, or beside that if it cannot be written."""
        if self.session.digest() == self.saved:
            return
        if self.file is None:
            self.say("nothing was saved; start with --session FILE to keep what was learned")
            return
        try:
            self.save("")
        except UserError as error:
            self.say(str(error), style="red")
            self.say(f"saved {save_beside(self.session, self.file)} instead: {self.session.tokens:,} tokens")

    def say(self, text: str, style: str = "dim") -> None:
        """A line of the program, not of the model."""
        self.console.print(Text(text.translate(CONTROL), style=style), soft_wrap=True)


def _path(name: str) -> Path:
    """A file by its name in a line."""
    if "\0" in name:
        raise UserError(f"no file is called {name!r:.80}; a name has no NUL bytes")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~stranger
        raise UserError(f"{name.partition('/')[0]} is nobody's home; give the file's whole name") from error


def learned(report: Report) -> Group:
    """What a text did: the loss before and after, and each level."""
    lines = [Text(f"{report.tokens:,} tokens read, {report.held} wait for a whole chunk", style="dim")]
    if len(report.chunks.before):
        lines[0].append(f"; surprise {report.before:.3f}")
        lines[0].append(f" -> {report.after:.3f} nats/token" if report.levels else " nats/token")
    if len(report.chunks.before) > 2:
        lines[0].append(f"  {sparkline(report.chunks.before.tolist(), CURVE)}")
    warnings = [Text(warning, style="yellow") for warning in report.warnings]
    return Group(*lines, level_table(report.levels), *warnings)


def level_table(levels: Sequence[LevelReport]) -> Table:
    """One line per level: how full its chunk is, whether it fired, how far it has moved."""
    table = Table.grid(padding=(0, 2))
    furthest = max((level.moved for level in levels if level.moved > 0), default=1.0)
    for level in levels:
        known = math.isfinite(level.moved)
        waits = min(level.pending / level.chunk_size, 1.0)
        table.add_row(
            Text(level.name, style="cyan" if level.updates else "dim"),
            Text(f"every {level.chunk_size:,}", style="dim"),
            Text(bar(waits), style="dim"),
            Text(f"fired {level.updates}x", style="bold cyan") if level.updates else Text("waits", style="dim"),
            Text(bar(level.moved / furthest if known else 0.0), style="magenta"),
            Text(f"moved {level.moved:.4f}" if known else "no whole chunk yet"),
        )
    return table


def bar(share: float) -> str:
    """A bar of fixed width.

    >>> bar(0.5)
    '████████        '
    """
    return ("█" * round(share * WIDTH)).ljust(WIDTH)


def chat(
    run_dir: Path,
    file: Path | None,
    overrides: Sequence[str],
    *,
    gate: str | None = None,
    max_moved: float | None = None,
    **options: Any,
) -> None:
    """What `hope chat` does.

    Args:
      run_dir: of the run.
      file: of the session; it is continued if it exists, and saved at the end.
      overrides: fields of the model config, for a new session.
      gate, max_moved: for a new session, as of `start_or_continue`.
      options: of `Session.answer`.

    Raises:
      UserError: no such run, or a file that is not a session of it.
    """
    console = Console(highlight=False, emoji=False, markup=False)
    session = start_or_continue(run_dir, file, overrides, gate=gate, max_moved=max_moved)
    conversation = Chat(session, file, console, **options)
    clocks = ", ".join(f"{clock:,}" for clock in session.clocks) or "none"
    conversation.say(f"{run_dir}: {session.tokens:,} tokens read before; levels write every {clocks} tokens; /help")
    conversation.run(_typed() if sys.stdin.isatty() else _piped(sys.stdin.buffer))


def _piped(file: BinaryIO) -> Iterator[str]:
    """Lines of a file or another program; of one that is too long its beginning, which is too long as well."""
    most = MOST_LINE + len(b"\r\n")
    while line := file.readline(most):
        yield line.removesuffix(b"\n").removesuffix(b"\r").decode(errors=BYTES)
        while line and not line.endswith(b"\n"):
            line = file.readline(most)


def _typed() -> Iterator[str]:
    """Lines from the keyboard; Ctrl-C in an empty line ends like Ctrl-D."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors=BYTES)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and knows those before)
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return
