"""Texts with one label each, as tasks that come one after the other: CLINC150, BANKING77, DBpedia14 and a toy.

From a folder with a folder per data set, in the formats in which they are released,

    clinc150/{data_full.json, domains.json}    Larson et al. 2019; 15 intents of one domain are a task
    banking77/{train.csv, test.csv}            Casanueva et al. 2020; 11 intents drawn by the seed are a task
    dbpedia14/test.json                        [{"label", "sentence"}], a fifth held out; 2 classes are a task

or from the hub. Its copy of CLINC has no domains: there too the seed draws what a task is made of.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line

HUB = "hub"
SPLIT_SEED = 1_000_003  # of what is held out, where the data do not say
START = "\n"  # before every text: none is empty


class Labelled(NamedTuple):
    """Texts, each with the number of its class."""

    texts: list[str]
    labels_N: np.ndarray  # [N] int32


class DataSet(NamedTuple):
    """A classification problem."""

    classes: tuple[str, ...]
    train: Labelled
    test: Labelled
    tasks: tuple[tuple[int, ...], ...] | None = None  # the classes of each; None: the seed draws them


class Source(NamedTuple):
    """Where a data set comes from."""

    folder: Callable[[Path], DataSet] | None  # None: it is made here
    hub: Callable[[], DataSet]
    task_classes: int  # of a task, where the seed draws them
    length: int  # bytes of a text that are read


class Examples(NamedTuple):
    """Texts as bytes, cut to one length."""

    tokens_NT: np.ndarray  # [N, T] uint8
    mask_NT: np.ndarray  # [N, T] bool, False at padding
    labels_N: np.ndarray  # [N] int32
    weights_N: np.ndarray  # [N] float32, 0: no example, only filling

    def rows(self, index: Any) -> "Examples":
        """Some of them."""
        return Examples(*(leaf[index] for leaf in self))

    @property
    def size(self) -> int:
        """N."""
        return len(self.labels_N)


def load(name: str, data: str) -> DataSet:
    """A data set of `SOURCES`, below the folder `data` or with "hub" from the hub.

    Raises:
      UserError: the folder does not hold the files of this data set, or they are not in its format.
    """
    source = SOURCES[name]
    if source.folder is None or data == HUB:
        return source.hub()
    path = Path(data) / name
    try:
        return source.folder(path)
    except FileNotFoundError as error:
        missing = Path(error.filename)
        raise UserError(
            f"no {missing.name} in {missing.parent}; --data takes the folder that holds {name}/{missing.name}, or {HUB}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not {name} in the format of experiments/intents.py: {one_line(error)}") from error


def tasks_of(data: DataSet, source: Source, seed: int) -> list[tuple[int, ...]]:
    """The classes of each task, in the order in which this seed lets them come.

    Classes left over where the size of a task does not divide their number join the last task.

    >>> source = Source(None, toy, task_classes=2, length=8)
    >>> tasks_of(toy(), source, seed=0)
    [(2, 3), (4, 5), (0, 1)]
    """
    rng = np.random.default_rng(seed)
    if data.tasks is not None:
        return [data.tasks[i] for i in rng.permutation(len(data.tasks))]
    drawn, size = rng.permutation(len(data.classes)).tolist(), source.task_classes
    begins = range(0, len(drawn) - len(drawn) % size, size)
    return [tuple(sorted(drawn[i : i + size] if i != begins[-1] else drawn[i:])) for i in begins]


def encode(data: Labelled, length: int, classes: Sequence[int] | None = None) -> Examples:
    """The texts of some classes (None: of all), each a line feed and its first `length - 1` bytes.

    >>> encode(Labelled(["yes", "no"], np.array([0, 1])), 3).tokens_NT.tolist()
    [[10, 121, 101], [10, 110, 111]]
    """
    wanted = np.ones(len(data.texts), bool) if classes is None else np.isin(data.labels_N, classes)
    rows = np.flatnonzero(wanted)
    tokens_NT = np.zeros((len(rows), length), np.uint8)
    mask_NT = np.zeros((len(rows), length), bool)
    for row, i in enumerate(rows):
        found = (START + data.texts[i]).encode()[:length]
        tokens_NT[row, : len(found)] = np.frombuffer(found, np.uint8)
        mask_NT[row, : len(found)] = True
    return Examples(tokens_NT, mask_NT, data.labels_N[rows].astype(np.int32), np.ones(len(rows), np.float32))


# --- formats of the files ---------------------------------------------------------------------------------------------


def clinc_folder(path: Path) -> DataSet:
    """The 150 intents in scope; a domain is a task."""
    splits = json.loads((path / "data_full.json").read_text())
    domains = json.loads((path / "domains.json").read_text())
    data = _numbered(splits["train"], splits["test"])
    number = {name: i for i, name in enumerate(data.classes)}
    tasks = tuple(tuple(number[name] for name in names) for names in domains.values())
    if sorted(i for task in tasks for i in task) != list(range(len(number))):
        raise ValueError("the domains do not share out the intents")
    return data._replace(tasks=tasks)


def banking_folder(path: Path) -> DataSet:
    """Two tables with the columns text and category."""

    def read(name: str) -> list[tuple[str, str]]:
        with (path / name).open(newline="") as file:
            return [(row["text"], row["category"]) for row in csv.DictReader(file)]

    return _numbered(read("train.csv"), read("test.csv"))


def dbpedia_folder(path: Path) -> DataSet:
    """Abstracts without their titles; every fifth, in an order of our own, is held out."""
    found = json.loads((path / "test.json").read_text())
    pairs = [(row["sentence"].partition("Text:")[2].strip(), row["label"]) for row in found]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pairs)).tolist()
    held_out = len(pairs) // 5
    return _numbered([pairs[i] for i in order[held_out:]], [pairs[i] for i in order[:held_out]])


def _numbered(train: Sequence[Sequence[str]], test: Sequence[Sequence[str]]) -> DataSet:
    """From (text, name of the class) pairs."""
    names = tuple(sorted({name for _, name in train}))
    strangers = {name for _, name in test} - set(names)
    if strangers or not train:
        raise ValueError(f"no training text of {', '.join(sorted(strangers)) or 'any class'}")
    number = {name: i for i, name in enumerate(names)}

    def labelled(pairs: Sequence[Sequence[str]]) -> Labelled:
        return Labelled([text for text, _ in pairs], np.array([number[name] for _, name in pairs], np.int32))

    return DataSet(names, labelled(train), labelled(test))


# --- the hub ----------------------------------------------------------------------------------------------------------


def _from_hub(
    repository: str,
    config: str | None,
    text: str,
    label: str,
    *,
    leave_out: str = "",
    most: dict[str, int] | None = None,
) -> Callable[[], DataSet]:
    """A data set of the hub.

    Args:
      repository: its name.
      config: which of its configurations.
      text: a column.
      label: a column of names, or of numbers that have names.
      leave_out: a class.
      most: of the splits "train" and "test", how many examples to draw.
    """

    def read() -> DataSet:
        from datasets import load_dataset

        def pairs(split: str) -> list[tuple[str, str]]:
            rows = load_dataset(repository, config, split=split)
            if most is not None:
                rows = rows.shuffle(seed=SPLIT_SEED).select(range(most[split]))
            name = getattr(rows.features[label], "int2str", str)
            found = [(one, name(one_label)) for one, one_label in zip(rows[text], rows[label], strict=True)]
            return [(one, name) for one, name in found if name != leave_out]

        try:
            return _numbered(pairs("train"), pairs("test"))
        except Exception as error:  # whatever it is, the user gave no folder and the hub did not answer as expected
            raise UserError(
                f"{repository} cannot be read from the hub ({one_line(error)}); give a folder with --data"
            ) from error

    return read


# --- made here --------------------------------------------------------------------------------------------------------


def toy() -> DataSet:
    """Six classes, each with words of its own among words of all; 16 texts of each, 4 held out."""
    rng = np.random.default_rng(SPLIT_SEED)
    words = ["".join(map(chr, rng.integers(97, 123, size=4))) for _ in range(24)]

    def texts(count: int) -> list[tuple[str, str]]:
        return [
            (" ".join([*rng.choice(words[:6], 2), *rng.choice(words[6 + 3 * i : 9 + 3 * i], 2)]), f"class {i}")
            for i in range(6)
            for _ in range(count)
        ]

    return _numbered(texts(16), texts(4))


SOURCES = {
    "clinc150": Source(clinc_folder, _from_hub("clinc/clinc_oos", "plus", "text", "intent", leave_out="oos"), 15, 64),
    "banking77": Source(banking_folder, _from_hub("mteb/banking77", None, "text", "label_text"), 11, 64),
    "dbpedia14": Source(
        dbpedia_folder,
        _from_hub("fancyzhx/dbpedia_14", None, "content", "label", most={"train": 10_000, "test": 1_000}),
        2,
        96,
    ),
    "toy": Source(None, toy, 2, 24),
}
