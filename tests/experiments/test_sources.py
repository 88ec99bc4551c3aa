"""New Testaments from hand-made files, their held-out chapters, and generated languages."""

import json

import numpy as np
import pytest

from experiments import sources
from hope_jax.training.errors import UserError

XML = """<?xml version="1.0" ?>
<cesDoc version="4"><cesHeader><title>not this</title></cesHeader><text><body id="Bible">
  <div id="b.MAT" type="book">
    <div id="b.MAT.1" type="chapter">
      <seg id="b.MAT.1.1" type="verse">
         Liburuä
         one &amp; two
      </seg>
      <seg id="b.MAT.1.2" type="verse">three</seg>
    </div>
    <div id="b.MAT.2" type="chapter"><seg type="verse">four</seg><seg type="verse"> </seg></div>
  </div>
</body></text></cesDoc>"""


def test_chapters_of_xml_are_lines_of_verses(tmp_path):
    path = tmp_path / "Basque-NT.xml"
    path.write_text(XML)
    assert sources.chapters_of_xml(path) == ["Liburuä one & two\nthree", "four"]
    assert sources.label(str(path)) == f"{tmp_path.name}/Basque-NT"


def test_a_folder_of_books_is_one_text_without_every_tenth_chapter(tmp_path):
    for book, count in (("Acts", 4), ("John", 8)):
        chapters = [{"chapter": str(i), "verses": [{"verse": "1", "text": f" {book} {i} "}]} for i in range(count)]
        (tmp_path / f"{book}.json").write_text(json.dumps({"book": book, "chapters": chapters}))
    (tmp_path / "LICENSE").write_text("not this")
    found = sources.source(str(tmp_path))
    kept = [f"Acts {i}" for i in range(4)] + [f"John {i}" for i in (0, 1, 2, 3, 4, 6, 7)]
    assert bytes(found.validation) == b"John 5" and bytes(found.train).decode() == "\n".join(kept)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "<div", "cannot read .*a.xml as XML: unclosed token"),
        ("a.xml", "<div/>", "a.xml has no <div type='chapter'>"),
        ("a.xml", XML, "a.xml has 2 chapters; every tenth is held out"),
        ("a/a.json", "{}", "a.json is not a book with chapters and verses"),
        ("a/a.json", "[1", "a.json is not a book with chapters and verses"),
    ],
)
def test_what_is_no_testament(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        sources.source(str(path.parent if path.suffix == ".json" else path))


def test_missing_files_are_named(tmp_path):
    for name in ("no.xml", "no.txt"):
        with pytest.raises(UserError, match=name):
            sources.source(str(tmp_path / name))


def test_generated_languages_share_letters_and_no_words():
    one, two = (sources.generated(number) for number in (1, 2))
    assert bytes(one.train) == bytes(sources.generated(1).train)
    words = [{word for word in bytes(corpus.train).split(b" ")[:-1] if len(word) > 3} for corpus in (one, two)]
    assert not words[0] & words[1] and np.unique(one.train).size == 27
    assert one.validation.size == (one.train.size + one.validation.size) // 10
