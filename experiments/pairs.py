"""Sentences in three languages, from files whose lines belong together or from a generator, and lines of pairs."""

import functools
import gzip
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hope_jax.training.errors import UserError

GENERATED = "generated"
GENERATED_LANGUAGES = ("home", "first", "second")
WORDS, SENTENCES, TESTS = 24, 12_000, 500  # of the generated languages
SEED = 0

type Sentence = tuple[str, ...]  # in every language


class Parallel(NamedTuple):
    """Sentences in the same languages."""

    train: list[Sentence]
    test: list[Sentence]


@functools.cache
def parallel(data: str, languages: Sentence) -> Parallel:
    """Sentences of a folder in the form of Multi30k, or generated ones.

    A sentence that was there before, in any part, is left out.

    Args:
      data: "generated", or a folder with train.X and test*.X (the first by name) or val.X, plain or .gz, for each
        language X: line i of one says what line i of the others says. A line that is empty in any is left out.
      languages: the Xs; of generated ones home, first and second.

    Raises:
      UserError: a file is missing, unreadable, empty or not UTF-8, or files have different numbers of lines.

    >>> parallel("generated", GENERATED_LANGUAGES).test[0]
    ('ecwa vr ats', 'xr tb cqpx', 'pn yr ys')
    """
    if data == GENERATED:
        if languages != GENERATED_LANGUAGES:
            raise UserError(f"--languages {' '.join(languages)} are ends of files; give their folder with --data")
        return generated(SEED)
    folder = Path(data)
    train, test = (aligned(folder, stem, languages) for stem in ("train", _held_out(folder, languages[0])))
    return Parallel(train, _new(test, train))


def generated(seed: int) -> Parallel:
    """Made-up languages: word i of one means word i of the others, and the second has the last word first."""
    rng = np.random.default_rng(seed)
    home, first, second = (_words(rng) for _ in GENERATED_LANGUAGES)
    said: dict[Sentence, None] = {}
    while len(said) < SENTENCES + TESTS:  # different ones
        i = rng.integers(WORDS, size=rng.integers(3, 6))
        said[tuple(" ".join(words) for words in (home[i], first[i], second[i][::-1]))] = None
    sentences = list(said)
    return Parallel(sentences[:SENTENCES], sentences[SENTENCES:])


def _words(rng: np.random.Generator) -> np.ndarray:
    """Different ones, of two to four letters."""
    found: dict[str, None] = {}
    while len(found) < WORDS:
        found["".join(chr(97 + letter) for letter in rng.integers(26, size=rng.integers(2, 5)))] = None
    return np.array(list(found))


def aligned(folder: Path, stem: str, languages: Sequence[str]) -> list[Sentence]:
    """The sentences of the files `stem`.X.

    Raises:
      UserError: see `parallel`.
    """
    files = {f"{stem}.{language}": lines(folder, f"{stem}.{language}") for language in languages}
    [(home, found), *others] = files.items()
    for name, other in others:
        if len(other) != len(found):
            raise UserError(
                f"{folder}: {home} has {len(found)} lines and {name} {len(other)}; line i of one must say what line i "
                "of the other says"
            )
    sentences = _new((sentence for sentence in zip(*files.values(), strict=True) if all(sentence)), ())
    if not sentences:
        raise UserError(f"{folder}: no line of {', '.join(files)} has words in every language; give other files")
    return sentences


def _new(sentences: Iterable[Sentence], known: Iterable[Sentence]) -> list[Sentence]:
    """Those that say at home what none before them said."""
    said, found = {sentence[0] for sentence in known}, []
    for sentence in sentences:
        if sentence[0] not in said:
            said.add(sentence[0])
            found.append(sentence)
    return found


def lines(folder: Path, name: str) -> list[str]:
    """The lines of a file, plain or .gz, with single spaces between words.

    Raises:
      UserError: it is missing, unreadable, empty or not UTF-8.
    """
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
    if path is None:
        raise UserError(
            f"no {name} or {name}.gz in {folder}; --data takes a folder with train.X and test*.X or val.X for each X "
            "of --languages"
        )
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; convert it first, for example with iconv") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; give a text file, plain or packed by gzip") from error
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with a sentence per line")
    return [" ".join(line.split()) for line in text.removesuffix("\n").split("\n")]


def _held_out(folder: Path, language: str) -> str:
    """The stem of the held-out files."""
    ends = (f".{language}", f".{language}.gz")
    names = sorted(path.name for end in ends for path in folder.glob(f"test*{end}"))
    return names[0].removesuffix(".gz").removesuffix(ends[0]) if names else "val"


def between(sentences: Iterable[Sentence], language: int) -> list[tuple[str, str]]:
    """(sentence at home, the same in a language)."""
    return [(sentence[0], sentence[language]) for sentence in sentences]


def line(pair: tuple[str, str]) -> bytes:
    r"""A pair as the model reads it.

    >>> line(("a cat", "eine Katze"))
    b'a cat\teine Katze\n'
    """
    return "{}\t{}\n".format(*pair).encode()


def text_of(pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """A line per pair, uint8."""
    return np.frombuffer(b"".join(map(line, pairs)), dtype=np.uint8)
