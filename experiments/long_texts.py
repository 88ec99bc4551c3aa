"""Long texts to read after training: spans of a text file, or the books of a Bible, one each."""

from pathlib import Path

import numpy as np

from experiments import text
from experiments.context_use import windows
from experiments.sources import books_of_xml, chapters_of_json
from hope_jax.training.errors import UserError


def long_texts(source: str, count: int, size: int) -> np.ndarray:
    """[count, size] uint8 of texts that a model has not been trained on.

    Args:
      source: "embedded" (its held-out half), a text file, or a folder with one .txt file: spans evenly spread over it.
        A folder of .json files ({"book": ..., "chapters": [{"verses": [{"text": ...}]}]}), or an .xml file of the
        Corpus Encoding Standard (`<div type="book">`): the beginnings of the longest books.
      count: texts.
      size: bytes of each.

    Raises:
      UserError: no such text, or too little of it.
    """
    path = Path(source)
    if path.suffix == ".xml":
        return _longest(source, books_of_xml(path), count, size)
    if path.is_dir() and (books := sorted(path.glob("*.json"))):
        return _longest(source, ["\n".join(chapters_of_json(book)) for book in books], count, size)
    return windows(_whole(source), count, size - 1)


def _whole(source: str) -> np.ndarray:
    corpus = text.corpus(source)
    return corpus.validation if source == "embedded" else np.concatenate([corpus.train, corpus.validation])


def _longest(source: str, books: list[str], count: int, size: int) -> np.ndarray:
    encoded = sorted((book.encode() for book in books), key=len, reverse=True)
    chosen = [book for book in encoded if len(book) >= size][:count]
    if len(chosen) < count:
        raise UserError(
            f"{source} has {len(chosen)} books of {size} bytes or more; ask for as many documents, or shorter ones"
        )
    return np.stack([np.frombuffer(book[:size], np.uint8) for book in chosen])
