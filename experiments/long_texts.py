"""Long texts to read after training: spans of a text file, or the books of a Bible, one each."""

import json
import re
from pathlib import Path

import numpy as np

from experiments import text
from experiments.context_use import windows
from hope_jax.training.corpus import read_text
from hope_jax.training.errors import UserError


def long_texts(source: str, count: int, size: int) -> np.ndarray:
    """[count, size] uint8 of texts that a model has not been trained on.

    Args:
      source: "embedded" (its held-out half), a text file, or a folder with one .txt file: spans evenly spread over it.
        A folder of .json files ({"book": ..., "chapters": [{"verses": [{"text": ...}]}]}), or an .xml file of verses
        (`<seg id="b.MAT.1.1" type="verse">`): the beginnings of the longest books.
      count: texts.
      size: bytes of each.

    Raises:
      UserError: no such text, or too little of it.
    """
    path = Path(source)
    if path.suffix == ".xml":
        return _longest(source, _xml_books(read_text(path).decode()), count, size)
    if path.is_dir() and (books := sorted(path.glob("*.json"))):
        return _longest(source, [_json_book(book) for book in books], count, size)
    return windows(_whole(source), count, size - 1)


def _whole(source: str) -> np.ndarray:
    corpus = text.corpus(source)
    return corpus.validation if source == "embedded" else np.concatenate([corpus.train, corpus.validation])


def _longest(source: str, books: list[bytes], count: int, size: int) -> np.ndarray:
    chosen = [book for book in sorted(books, key=len, reverse=True) if len(book) >= size][:count]
    if len(chosen) < count:
        raise UserError(
            f"{source} has {len(chosen)} books of {size} bytes or more; ask for as many documents, or shorter ones"
        )
    return np.stack([np.frombuffer(book[:size], np.uint8) for book in chosen])


def _json_book(path: Path) -> bytes:
    try:
        chapters = json.loads(read_text(path))["chapters"]
        return "\n".join(verse["text"].strip() for chapter in chapters for verse in chapter["verses"]).encode()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a book of chapters and verses ({type(error).__name__}: {error})") from error


def _xml_books(xml: str) -> list[bytes]:
    books: dict[str, list[str]] = {}
    for book, verse in re.findall(r'<seg id="b\.(\w+)\.\d+\.\d+" type="verse">(.*?)</seg>', xml, re.DOTALL):
        books.setdefault(book, []).append(" ".join(verse.split()))
    return ["\n".join(verses).encode() for verses in books.values()]
