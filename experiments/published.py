"""Published results, and how each experiment's table is laid out beside them.

Numbers are as printed, in percent; rows carry the library's names for the architectures.
"""

from typing import NamedTuple

PAPER = "arXiv:2512.24695"


class Table(NamedTuple):
    """Layout of one experiment's table."""

    title: str
    scores: tuple[str, ...]  # of a record, shown in this order
    best: tuple[str, ...]  # what makes one configuration better than another, first things first
    columns: tuple[str, ...] = ()  # columns that are shown even while empty; further ones follow
    settings: dict[str, int] = {}  # noqa: RUF012  column -> how many settings the published number is the mean of
    published: dict[str, dict[str, str]] = {}  # noqa: RUF012  model -> column -> as printed
    source: str = ""
    note: str = ""


def _rows(columns: tuple[str, ...], rows: dict[str, str]) -> dict[str, dict[str, str]]:
    """Rows written as "a | b | c" under `columns`."""
    return {
        model: dict(zip(columns, (cell.strip() for cell in line.split("|")), strict=True))
        for model, line in rows.items()
    }


_LANGUAGES = ("parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "Shuffle-2")
_MAD = ("compression", "in_context_recall", "fuzzy_recall", "selective_copying", "memorisation")

TABLES = {
    "formal_languages": Table(
        title="Formal languages: whole strings right, lengths 2-50 / 51-100, percent",
        scores=("bin0", "bin1"),
        best=("bin1", "bin0"),
        columns=_LANGUAGES,
        published=_rows(
            _LANGUAGES,
            {
                "lstm": "100 / 100 | 100 / 100 | 100 / 100 | 100 / 100 | 100 / 100 | 100 / 100",
                "transformer": "46.4 / 0.0 | 0.0 / 0.0 | 0.0 / 0.0 | 100 / 100 | 100 / 100 | 100 / 100",
                "linear_attention": "78.1 / 0.0 | 0.0 / 0.0 | 0.0 / 0.0 | 100 / 100 | 100 / 100 | 100 / 100",
                "delta_net": "98.2 / 10.1 | 0.0 / 0.0 | 0.0 / 0.0 | 100 / 100 | 100 / 100 | 100 / 100",
                "srwm": "100 / 100 | 100 / 100 | 100 / 100 | 100 / 100 | 100 / 100 | 100 / 100",
                "hope": "100 / 100 | 100 / 100 | 100 / 100 | 100 / 100 | 100 / 100 | 100 / 100",
            },
        ),
        source=f"{PAPER}, Table 5",
        note="Widths, depths and chunk sizes of the published rows are not given. The best configuration is chosen "
        "on the strings it is reported on, as published.",
    ),
    "mad": Table(
        title="MAD: accuracy over classes, percent",
        scores=("score",),
        best=("score",),
        columns=_MAD,
        settings=dict(zip(_MAD, (11, 11, 11, 13, 6), strict=True)),
        published=_rows(
            _MAD,
            {
                "transformer": "49.4 | 100 | 47.9 | 96.2 | 83.7",
                "rwkv7": "45.1 | 100 | 32.8 | 95.6 | 82.2",
                "comba": "46.3 | 100 | 32.8 | 96.4 | 82.9",
                "titans": "49.8 | 100 | 50.0 | 99.4 | 83.4",
                "hope": "51.2 | 100 | 52.1 | 99.7 | 85.2",
            },
        ),
        source=f"{PAPER}, Table 4; number of settings from arXiv:2403.17844",
        note="A number is the mean over the settings that have records, [n of m] says how many; compare it with the "
        "published one when all are there. Model sizes of the published rows are not given.",
    ),
    "mqar": Table(
        title="Multi-query associative recall: accuracy at queries, percent",
        scores=("accuracy",),
        best=("accuracy",),
        note="The paper reports no such experiment. See plots/mqar_state.png for accuracy against state size.",
    ),
}
