"""Texts that are streamed: a file, a folder, a New Testament, or generated words, each with a held-out part."""

import functools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from experiments import text
from hope_jax.training.corpus import Corpus
from hope_jax.training.errors import UserError

HELD_OUT = 10  # every tenth chapter
WORDS, WORDS_OF_TEXT = 64, 20_000  # of a generated language


@functools.cache
def source(name: str) -> Corpus:
    """A text by its name.

    Args:
      name: "generated-N" (`generated`), an XML file of the Corpus Encoding Standard, a folder of JSON books, or what
        `text.corpus` takes: "embedded", a text file, or a folder with one.

    Raises:
      UserError: there is no such text, or its file is not what its name says.

    >>> source("generated-1").train.size > 50_000
    True
    """
    path = Path(name)
    if match := re.fullmatch(r"generated-(\d+)", name):
        return generated(int(match[1]))
    if path.suffix == ".xml":
        return of_chapters(name, chapters_of_xml(path))
    if path.is_dir() and any(path.glob("*.json")):
        return of_chapters(name, [part for book in sorted(path.glob("*.json")) for part in chapters_of_json(book)])
    return text.corpus(name)


def label(name: str) -> str:
    """What a table calls a source.

    >>> label("data/bible/Basque-NT.xml"), label("data/wikitext2/valid.txt"), label("generated-1")
    ('bible/Basque-NT', 'wikitext2/valid', 'generated-1')
    """
    path = Path(name)
    return f"{path.parent.name}/{path.stem}" if path.suffix else path.name


def generated(number: int) -> Corpus:
    """Words of a made-up language in random order; another number is another language with the same letters."""
    rng = np.random.default_rng(number)
    words = ["".join(chr(97 + letter) for letter in rng.integers(26, size=rng.integers(2, 7))) for _ in range(WORDS)]
    data = _tokens(" ".join(words[i] for i in rng.integers(WORDS, size=WORDS_OF_TEXT)))
    cut = data.size - data.size // HELD_OUT
    return Corpus(f"generated-{number}", data[:cut], data[cut:])


def of_chapters(name: str, chapters: list[str]) -> Corpus:
    """Every tenth chapter is held out, so that both parts have something of every book.

    >>> corpus = of_chapters("", [str(i) for i in range(11)])
    >>> bytes(corpus.validation), bytes(corpus.train[:5])
    (b'9', b'0\\n1\\n2')
    """
    if len(chapters) < HELD_OUT:
        raise UserError(f"{name} has {len(chapters)} chapters; every tenth is held out, so it needs {HELD_OUT} or more")
    held_out = [chapter for i, chapter in enumerate(chapters) if i % HELD_OUT == HELD_OUT - 1]
    train = [chapter for i, chapter in enumerate(chapters) if i % HELD_OUT != HELD_OUT - 1]
    return Corpus(name, _tokens("\n".join(train)), _tokens("\n".join(held_out)))


def chapters_of_xml(path: Path) -> list[str]:
    """The chapters of a bible of the Corpus Encoding Standard, a line per verse.

    Raises:
      UserError: no such file, not XML, or no verses.
    """
    found = _chapters(_root(path))
    if not found:
        raise UserError(f"{path} has no <div type='chapter'>; give a bible of the Corpus Encoding Standard")
    return found


def books_of_xml(path: Path) -> list[str]:
    """The same, book by book.

    Raises:
      UserError: no such file, not XML, or no books.
    """
    books = [_chapters(part) for part in _root(path).iter("div") if part.get("type") == "book"]
    if not books:
        raise UserError(f"{path} has no <div type='book'>; give a bible of the Corpus Encoding Standard")
    return ["\n".join(chapters) for chapters in books]


def _root(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"cannot read {path} as XML: {error}; give a file with <seg type='verse'> elements") from error


def _chapters(whole: ElementTree.Element) -> list[str]:
    found = []
    for chapter in whole.iter("div"):
        if chapter.get("type") == "chapter":
            verses = [" ".join("".join(verse.itertext()).split()) for verse in chapter.iter("seg")]
            found.append("\n".join(verse for verse in verses if verse))
    return found


def chapters_of_json(path: Path) -> list[str]:
    """The chapters of a book, a line per verse.

    Raises:
      UserError: the file is not {"chapters": [{"verses": [{"text": ...}, ...]}, ...]}.
    """
    try:
        book = json.loads(path.read_text())
        return ["\n".join(verse["text"].strip() for verse in chapter["verses"]) for chapter in book["chapters"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a book with chapters and verses ({error!r}); take it out of its folder"
        ) from error


def _tokens(words: str) -> np.ndarray:
    return np.frombuffer(words.encode(), dtype=np.uint8)
