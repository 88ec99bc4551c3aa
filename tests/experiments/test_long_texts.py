"""Books and spans."""

import json

import numpy as np
import pytest

from experiments import text
from experiments.long_texts import long_texts
from hope_jax.training.errors import UserError


def book(*chapters):
    return json.dumps({"chapters": [{"verses": [{"text": verse} for verse in verses]} for verses in chapters]})


def test_the_longest_books_of_a_folder(tmp_path):
    (tmp_path / "a.json").write_text(book(["short"]))
    (tmp_path / "b.json").write_text(book(["one ", "two"], ["three"]))
    (tmp_path / "c.json").write_text(book(["four five six seven"]))
    found = long_texts(str(tmp_path), 2, 12)
    assert [bytes(row) for row in found] == [b"four five si", b"one\ntwo\nthre"]
    with pytest.raises(UserError, match=r"has 2 books of 12 bytes or more"):
        long_texts(str(tmp_path), 3, 12)
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(UserError, match=r"d.json is not a book with chapters and verses"):
        long_texts(str(tmp_path), 1, 12)


def test_the_books_of_an_xml_file(tmp_path):
    path = tmp_path / "some.xml"
    verse = '<div type="chapter"><seg type="verse">\n\t{}\n</seg></div>'
    book = '<div type="book">{}</div>'
    first = verse.format("In  the\n beginning &amp; <i>after</i>") + verse.format("y")
    path.write_text(f"<text>{book.format(verse.format('x'))}{book.format(first)}</text>")
    assert bytes(long_texts(str(path), 1, 26)[0]) == b"In the beginning & after\ny"
    path.write_text(f"<text>{first}</text>")
    with pytest.raises(UserError, match=r"some\.xml has no <div type='book'>"):
        long_texts(str(path), 1, 26)


def test_spans_of_a_file_cover_all_of_it_and_of_the_embedded_text_its_held_out_half(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("0123456789" * 10)
    found = long_texts(str(path), 3, 20)
    assert found.shape == (3, 20) and bytes(found[0]) == bytes(found[-1]) == b"0123456789" * 2
    held_out = text.corpus("embedded").validation
    np.testing.assert_array_equal(long_texts("embedded", 2, 50)[-1], held_out[-50:])
