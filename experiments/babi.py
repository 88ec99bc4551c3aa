"""Stories of people who go to places and carry things, each with a question about where someone or something is.

Tasks 1, 2 and 3 of bAbI (Weston et al. 2015, arXiv:1502.05698) from a generator of our own, or any task from the files
of the data set. Which facts a question needs:

    qa1  Where is Anna?                     the last fact that moved her
    qa2  Where is the kite?                 who took it, and where that one went (or dropped it)
    qa3  Where was the kite before the inn? two of its moves: the last to the inn and the one before
"""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hope_jax.training.errors import UserError

PEOPLE = ("Anna", "Bruno", "Clara", "David")
PLACES = ("attic", "cellar", "harbour", "inn", "market", "mill")
THINGS = ("kite", "lamp", "shell")
FACTS = {"qa1": (2, 8), "qa2": (3, 12), "qa3": (5, 12)}  # of a story, least and most


class Story(NamedTuple):
    """Facts in their order, and a question about the world after the last."""

    facts: tuple[str, ...]
    question: str
    answer: str

    @property
    def size(self) -> int:
        """Bytes with a line per fact, as a document holds them."""
        return sum(len(line) + 1 for line in self.facts) + len(self.question) + len(self.answer) + 3


class World:
    """Where everyone is, who holds what, and every place each thing has been."""

    def __init__(self) -> None:
        self.place: dict[str, str] = {}  # of a person
        self.holder: dict[str, str] = {}  # of a thing in someone's hands
        self.visited: dict[str, list[str]] = {}  # places of a thing one after the other

    def act(self, rng: np.random.Generator) -> str:
        """Something happens; says what."""
        person = _one(rng, PEOPLE)
        here = self.place.get(person)
        held = [thing for thing, holder in self.holder.items() if holder == person]
        # A thing nobody has touched is wherever it is taken first.
        near = [thing for thing in THINGS if thing not in self.holder and self.visited.get(thing, [here])[-1] == here]
        if here is not None and held and rng.random() < 0.2:
            thing = _one(rng, held)
            del self.holder[thing]
            return f"{person} dropped the {thing}."
        if here is not None and near and rng.random() < 0.5:
            thing = _one(rng, near)
            self.holder[thing] = person
            self.visited.setdefault(thing, [here])
            return f"{person} took the {thing}."
        place = _one(rng, [place for place in PLACES if place != here])
        self.place[person] = place
        for thing in held:
            self.visited[thing].append(place)
        return f"{person} went to the {place}."

    def ask(self, task: str, rng: np.random.Generator) -> tuple[str, str] | None:
        """A question of the task and its answer; None when nothing can be asked yet."""
        if task == "qa1":
            person = _one(rng, list(self.place))  # the first fact always moves someone
            return f"Where is {person}?", self.place[person]
        long_enough = [thing for thing, places in self.visited.items() if len(places) > (task == "qa3")]
        if not long_enough:
            return None
        thing = _one(rng, long_enough)
        places = self.visited[thing]
        if task == "qa2":
            return f"Where is the {thing}?", places[-1]
        later = {place: before for before, place in itertools.pairwise(places)}  # the last time of each
        place = _one(rng, list(later))
        return f"Where was the {thing} before the {place}?", later[place]


def _one[T](rng: np.random.Generator, among: Sequence[T]) -> T:
    return among[int(rng.integers(len(among)))]


def make(task: str, rng: np.random.Generator) -> Story:
    """A story of qa1, qa2 or qa3; one about which nothing can be asked is told anew."""
    low, high = FACTS[task]
    while True:
        world = World()
        facts = tuple(world.act(rng) for _ in range(rng.integers(low, high + 1)))
        asked = world.ask(task, rng)
        if asked is not None:
            return Story(facts, *asked)


def read(path: Path) -> list[Story]:
    """The stories of a file of the data set: each question with the facts before it.

    Raises:
      UserError: a line is not "number text" or "number question<tab>answer<tab>facts".
    """
    stories, facts = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.fullmatch(r"(\d+) ([^\t]+)(?:\t([^\t]+)\t[\d ]+)?", line)
        if found is None:
            raise UserError(f"{path}, line {number} is not a line of bAbI: {line[:60]!r}")
        if found[1] == "1":
            facts = []
        if found[3] is None:
            facts.append(found[2].strip())
        else:
            stories.append(Story(tuple(facts), found[2].strip(), found[3].strip()))
    return stories


def source(task: str, folder: str | None, half: str, most: int) -> Callable[[np.random.Generator], Story]:
    """Where stories come from: `half` ("train" or "test") of the data set in `folder`, or without one the generator.

    Args:
      task: "qa1" to "qa20"; without a folder up to "qa3".
      folder: holds qa1_single-supporting-fact_train.txt and the like.
      half: which file.
      most: bytes that a story may have; longer ones are left out.

    Raises:
      UserError: there is no such task or file, or no story is short enough.
    """
    if folder is None:
        if task not in FACTS:
            raise UserError(
                f"{task} needs the files of bAbI: give their folder with --babi; without: {', '.join(FACTS)}"
            )

        def draw(rng: np.random.Generator) -> Story:
            while True:
                story = make(task, rng)
                if story.size <= most:
                    return story

        return draw
    paths = sorted(Path(folder).glob(f"{task}_*_{half}.txt"))
    if not paths:
        raise UserError(f"no {task}_*_{half}.txt in {folder}; --babi takes the folder with the files of bAbI")
    stories = [story for story in read(paths[0]) if story.size <= most]
    if not stories:
        raise UserError(f"no story of {paths[0]} has {most} bytes or fewer; raise --length")
    return lambda rng: _one(rng, stories)
