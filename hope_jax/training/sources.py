"""Where text comes from: local files, folders and patterns, or a dataset of the hub, read through `datasets`.

`data` is one source or several with weights: "a.jsonl", "notes/", "web/*.parquet:0.7,books.txt:0.3",
"hub:NAME", "hub:NAME@CONFIG". A row of a table is a document, a text file is one. Everything streams: a file is
never held whole.
"""

import glob
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line

HUB = "hub:"
EMBEDDED = "embedded"
BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
BUILDERS |= {".txt": "text", ".text": "text", ".md": "text"}
BLOCK = 1 << 20  # characters of a text file that are handed on together
ROWS = 1_000  # of a table
CONVERT = "convert it first, for example with iconv"


class Source(NamedTuple):
    """One source of a mixture."""

    name: str  # as it was written, without the weight
    weight: float  # as it was written; 1 without


class Piece(NamedTuple):
    """Some text of a document."""

    text: str
    ends: bool  # it is the document's last


def parse_sources(data: str) -> list[Source]:
    """The sources that `data` names, with positive weights.

    Raises:
      UserError: a weight is negative or no number, or all are zero.

    >>> parse_sources("a.jsonl:0.7,b.parquet:0.3")
    [Source(name='a.jsonl', weight=0.7), Source(name='b.parquet', weight=0.3)]
    >>> parse_sources("notes.txt")
    [Source(name='notes.txt', weight=1.0)]
    """
    words = [data] if os.path.exists(data) else [word.strip() for word in data.split(",") if word.strip()]
    if not words:
        raise UserError("data= names no source; give a file, a folder, a pattern or hub:NAME, or leave it out")
    sources = [_parse_source(word) for word in words]
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise UserError(f"data={data}: the weight of {source.name} is {source.weight:g}; it must be 0 or greater")
    if not sum(source.weight for source in sources) > 0:
        raise UserError(f"data={data}: the weights add up to zero; give FILE:WEIGHT with a weight above zero")
    return [source for source in sources if source.weight > 0]


def _parse_source(word: str) -> Source:
    name, separator, weight = word.rpartition(":")
    try:
        return Source(name, float(weight)) if separator and not os.path.exists(word) else Source(word, 1.0)
    except ValueError:
        return Source(word, 1.0)


def is_table(name: str) -> bool:
    """Whether a source is read by `datasets` even alone: not one plain text file, whatever its extension."""
    one_file = not (name.startswith(HUB) or Path(name).is_dir() or (glob.has_magic(name) and not Path(name).exists()))
    return not one_file or BUILDERS.get(Path(name).suffix, "text") != "text"


def source_files(name: str) -> list[Path]:
    """The files of a local source, in the order of their names.

    Raises:
      UserError: there are none, or one has an extension that is not read.
    """
    path, known = Path(name), ", ".join(BUILDERS)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS and file.is_file())
        if not files:
            raise UserError(f"{name} holds no file that can be read as text; these can: {known}")
        return files
    files = [path] if path.exists() else sorted(Path(file) for file in glob.glob(name, recursive=True))
    if not files:
        what = "file matches" if glob.has_magic(name) else "such file:"
        raise UserError(f"no {what} {name}; give a file, a folder, a pattern, or {HUB}NAME for a dataset of the hub")
    for file in files:
        if file.suffix not in BUILDERS:
            raise UserError(f"{file} has an unknown extension {file.suffix!r}; these can be read: {known}")
    return files


def read_pieces(name: str, column: str) -> Iterator[Piece]:
    """The documents of a source, one after the other; those without text are left out.

    Args:
      name: a file, folder or pattern, or "hub:NAME".
      column: of a table, the one that holds the text.
    Raises:
      UserError: something cannot be read; the message names the file and, for JSON, the line.
    """
    if name.startswith(HUB):
        yield from _read_hub(name, column)
        return
    for path in source_files(name):
        builder = BUILDERS[path.suffix]
        try:
            if builder == "text":
                yield from _join_lines(_load(path, sample_by="line", keep_linebreaks=True))
            else:
                yield from _read_rows(_load(path), column, str(path))
        except UserError:
            raise
        except Exception as error:  # of pyarrow, of the codec, of datasets: as many as there are formats
            raise UserError(_explain(path, builder, error)) from error


def _load(path: Path, **options: Any) -> Any:
    datasets = _datasets()
    if not path.stat().st_size:
        raise UserError(f"{path} is empty; give a file with some text in it")
    files = [glob.escape(str(path.resolve()))]  # a name with brackets is a name, not a pattern
    return datasets.load_dataset(BUILDERS[path.suffix], data_files=files, split="train", streaming=True, **options)


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their errors are ours to tell
    return datasets


def _join_lines(lines: Any) -> Iterator[Piece]:
    """Blocks of whole lines; the last one ends the document."""
    held: list[str] = []
    size = 0
    for batch in lines.iter(ROWS):
        for line in batch["text"]:
            if size >= BLOCK:
                yield Piece("".join(held), False)
                held, size = [], 0
            held.append(line)
            size += len(line)
    if held:
        yield Piece("".join(held), True)


def _read_rows(rows: Any, column: str, name: str) -> Iterator[Piece]:
    number = 0
    for batch in rows.iter(ROWS):
        if column not in batch:
            raise UserError(
                f"{name} has no column {column!r}; there are: {', '.join(map(repr, batch))}; choose with text_column="
            )
        for text in batch[column]:
            number += 1
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"{name}: column {column!r} of row {number} holds {type(text).__name__}, not text; "
                    "choose another with text_column="
                )
            if text:
                yield Piece(text, True)


def _explain(path: Path, builder: str, error: Exception) -> str:
    if builder == "json" and (line := _bad_line(path)):
        return line
    if isinstance(error, UnicodeDecodeError):
        return f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02X}); {CONVERT}"
    return f"cannot read {path} as {path.suffix[1:]}: {one_line(error)}"


def _bad_line(path: Path) -> str | None:
    """What is wrong with the first line of a JSON file that is not an object in UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line.decode()) if line.strip() else {}
            except UnicodeDecodeError as error:
                return f"{path}, line {number}: not UTF-8 text (byte 0x{line[error.start]:02X}); {CONVERT}"
            except json.JSONDecodeError as error:
                return f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); each line is one object"
            if not isinstance(value, dict):
                return f'{path}, line {number}: {type(value).__name__}, not an object; write {{"text": ...}}'
    return None


def _read_hub(name: str, column: str) -> Iterator[Piece]:
    datasets = _datasets()
    dataset, _, config = name.removeprefix(HUB).partition("@")
    try:
        rows = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
        yield from _read_rows(rows, column, name)
    except UserError:
        raise
    except Exception as error:  # of the hub's client, of the network, of the format behind it
        raise UserError(
            f"cannot read {name} ({type(error).__name__}: {one_line(error)[:160]}); "
            "check the name and the network, or give local files"
        ) from error
