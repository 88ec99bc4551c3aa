"""How many levels, and how slow the slowest? Needles and bAbI questions, after the paper's Figure 7.

    python -m experiments.levels_and_frequency [--tasks S-NIAH-1 qa1] [--clocks none 32 8-32] [--seeds 0 1 2] [--tiny]

Every model ends its blocks in CMS levels of one total width. The last is ordinary: it has what training gave it, and
alone ("1 level", clocks "none") the model learns in context by its attention only, the paper's baseline ICL. The others
are fast: "8-32" is a model of three levels of which one is written every 8 and one every 32 bytes of the document, by
the next-byte loss on the document itself, in training and in the test. The slowest clock is what the paper calls
"lowest frequency"; there it is 512 or 2K tokens of a context of a language model, here a part of `length`.

Levels are a chain, so more of them also make a deeper model. `--eta 0 --clocks 32 8-32` are the controls: the same
chains, never written.

Tasks: the constructions of `needles` (`--tasks S-NIAH-1`; "values" are those generated right, "characters" those in
their place), and bAbI questions in a text ("qa1" to "qa20", the files of the data set with `--babi`; "values" are the
answers right to their end). Training and test documents have `length` bytes.

The report draws accuracy over the slowest clock, a curve per number of levels (plots/levels_and_frequency_curve.png).

A step with a fast level costs several times one without, so compare at equal time too (`--clocks none --steps ...`).
Needles that every row finds in the end tell levels apart by their speed of learning alone; MK-NIAH-1 or more digits are
harder.
"""

import dataclasses
from typing import Any, ClassVar

from experiments import babilong, niah
from experiments.needles import TASKS
from experiments.options import BYTES, TINY_RESULTS, Options, at_least, model_config
from experiments.running import Job, main
from experiments.streaming import answers, reader, split
from experiments.training import Scores, cross_entropy, language_model
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import unknown

NONE = "none"  # of a model without fast levels
QUESTIONS = tuple(f"qa{number}" for number in range(1, 21))
WIDTH = 4  # hidden width of all levels together, in widths of the model


def chunks_of(clocks: str) -> tuple[int, ...]:
    """The chunk sizes that a string names.

    Raises:
      UserError: it is not "none" or numbers with "-" between them.

    >>> chunks_of("8-32"), chunks_of("none")
    ((8, 32), ())
    """
    if clocks == NONE:
        return ()
    try:
        return tuple(int(chunk) for chunk in clocks.split("-"))
    except ValueError:
        raise UserError(f'clocks are "none" or bytes, fastest first, such as 8-32; got {clocks!r}') from None


@dataclasses.dataclass(frozen=True)
class LevelOptions(Options):
    """Levels and clocks.

    Attributes:
      tasks: names in `needles.TASKS`, or "qa1" to "qa3", with `babi` to "qa20".
      clocks: bytes between two writes of each fast level, fastest first: "none", "32", "8-32", ...
      models: with CMS levels: hope_attention or hope.
      eta: inner learning rate of the fast levels; 0 = the same chain of levels, all ordinary.
      length: bytes of a document, answer included.
      digits: of a needle's number.
      babi: folder with the files of bAbI (its `en`); none = the built-in generator.
      data: background, "embedded" or a text file.
      test_documents: how many are scored.
    """

    tasks: tuple[str, ...] = ("S-NIAH-1", "qa1")
    clocks: tuple[str, ...] = (NONE, "32", "64", "128", "8-32", "16-64", "32-128", "8-32-128")
    models: tuple[str, ...] = ("hope_attention",)
    chunks: tuple[int, ...] = (8,)
    batch_size: int = 8
    steps: int = 300
    eval_every: int = 300
    dim: int = 48
    eta: float = 0.3
    length: int = 258
    digits: int = 2
    babi: str | None = None
    data: str = "embedded"
    test_documents: int = 64

    GRID: ClassVar[tuple[str, ...]] = ("tasks", "clocks", *Options.GRID)
    KNOWN_MODELS: ClassVar[tuple[str, ...]] = ("hope_attention", "hope")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.tasks:
            if name not in (*TASKS, *QUESTIONS):
                raise UserError(unknown("task", name, [*TASKS, *QUESTIONS]))
        for one in self.clocks:
            chunks_of(one)
        at_least(self, {"eta": 0})


TINY = LevelOptions(
    tasks=("S-NIAH-1",),
    clocks=("16",),
    overrides=("remat=none",),
    steps=2,
    eval_every=2,
    dim=8,
    head_width=8,
    layers=1,
    batch_size=2,
    length=114,
    test_documents=2,
    results=TINY_RESULTS,
)


def row(clocks: str, eta: float = 0.3) -> str:
    """What the table calls them.

    >>> row("none"), row("8-32"), row("8-32", 0.0)
    ('1 level', '3 levels, slowest 32 (8-32)', 'a chain of 3 ordinary levels')
    """
    chunks = chunks_of(clocks)
    if chunks and not eta:
        return f"a chain of {len(chunks) + 1} ordinary levels"
    return f"{len(chunks) + 1} levels, slowest {chunks[-1]} ({clocks})" if chunks else "1 level"


def with_levels(cell: LevelOptions) -> LevelOptions:
    """The cell with its levels among the overrides of the model; further ones of the user come after them."""
    chunks = chunks_of(cell.clocks[0])
    widths = ",".join([str(WIDTH * cell.dim // (len(chunks) + 1))] * (len(chunks) + 1))
    fast = (f"cms_chunks={','.join(map(str, chunks))}", f"cms_eta={cell.eta}") if chunks else ()
    return dataclasses.replace(cell, overrides=(f"cms_hidden={widths}", *fast, *cell.overrides))


def as_options[T: Options](cls: type[T], cell: LevelOptions, **fields: Any) -> T:
    """The same cell of another experiment: what both have, and `fields`."""
    names = {field.name for field in dataclasses.fields(cls)} & {field.name for field in dataclasses.fields(cell)}
    return cls(**{name: getattr(cell, name) for name in names} | fields)


def needles(cell: LevelOptions) -> Job:
    """Needles at the training length: a cache no longer than that keeps attention cheap."""
    task = as_options(niah.NeedleOptions, cell)
    tests = niah.held_out(task, cell.length)
    config = model_config(cell, vocab_size=BYTES, length=cell.length)
    read = reader(config)

    def evaluate(params: Any) -> Scores:
        said_BA = answers(read, params, split(tests.prompts_BT, read.size), tests.answers_BA.shape[1])
        found = niah.score(said_BA, tests)
        return {name: found[name] for name in ("values", "characters")}

    return Job(cell.tasks[0], "", config, language_model(config), niah.stream(task), cross_entropy, evaluate, cell)


def questions(cell: LevelOptions) -> Job:
    """Questions at the training length."""
    job = babilong.prepare(as_options(babilong.LongOptions, cell, longest="train", cache=cell.length))

    def evaluate(params: Any) -> Scores:
        return {"values": job.evaluate(params)["exact_train"]}

    return job._replace(evaluate=evaluate, cell=cell)


def prepare(cell: LevelOptions) -> Job:
    """What one cell computes."""
    [task], [clocks] = cell.tasks, cell.clocks
    return (needles if task in TASKS else questions)(with_levels(cell))._replace(row=row(clocks, cell.eta))


if __name__ == "__main__":
    main("levels_and_frequency", LevelOptions, TINY, prepare)
