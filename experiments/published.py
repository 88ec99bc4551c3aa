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
_NEEDLES = ("S-NIAH-1", "S-NIAH-2", "S-NIAH-3", "MK-NIAH-1", "MQ-NIAH", "MV-NIAH")
_ABLATION = ("text of the paper, perplexity", "reasoning of the paper")
PREFIXES = ("1/8", "1/4", "1/2", "1")  # of a representation, as a share of its width
FROM = "bits_from_"  # scores of this name and a place in the context
ETA = "bits_eta_"  # and an inner learning rate
GATE, WRITTEN = "bits_gate_", "written_"  # and a gate
AT, TUNED = "bits_at_", "bits_tuned_"  # and a chunk size
_RATES = (0.1, 0.3, 1.0, 3.0)
_GATES = ("first_half", "threshold", "ema", "budget")
_CHUNKS = tuple(2**i for i in range(11))
FORGOTTEN, GAINED = "bits_forgotten_at_", "bits_gained_at_"  # and an inner learning rate
_STREAMS = (
    "At the inner learning rate with the fewest bits of both texts, chosen on the text it is reported on. Of bits "
)
_STREAMS += "gained more are better. One rate proves nothing: of several levels against one, the curves of "
_STREAMS += "plots/{}_curve.png decide, and a gain of the levels is one whose curve lies below. "
_LEARNED = ("bits_both", "bits_forgotten", "bits_gained")
TASK = "task_"  # scores of this name and the number of a task in the order in which it came

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
    "niah": Table(
        title="Needles in a haystack: values generated right, at 1 / 2 / 4 times the training length, percent",
        scores=("values_1x", "values_2x", "values_4x"),
        best=("values_1x", "values_2x", "values_4x"),
        columns=_NEEDLES,
        published=_rows(
            _NEEDLES,
            {
                "transformer": "88.6 / 76.4 / 79.8 | 100 / 98.8 / 94.2 | 78.0 / 69.2 / 40.8 | 79.4 / 83.0 / 61.4 | "
                "58.9 / 48.0 / 29.8 | 37.5 / 34.1 / 21.5",
                "hope_attention": "100 / 100 / 100 | 100 / 98.4 / 94.4 | 76.8 / 68.8 / 42.4 | 80.2 / 84.8 / 60.8 | "
                "60.4 / 47.8 / 30.6 | 35.2 / 34.4 / 24.8",
                "rwkv7": "100 / 100 / 99.6 | 93.8 / 44.8 / 12.6 | 63.8 / 13.2 / 5.8 | 21.4 / 18.8 / 9.6 | "
                "20.4 / 14.8 / 8.6 | 16.2 / 13.4 / 6.8",
                "comba": "100 / 100 / 99.4 | 92.6 / 47.2 / 13.4 | 62.4 / 13.8 / 7.4 | 21.4 / 19.4 / 8.2 | "
                "21.8 / 15.2 / 6.4 | 16.5 / 13.5 / 7.2",
                "dla": "96.4 / 71.2 / 44.0 | 79.6 / 42.6 / 28.2 | 18.2 / 8.8 / 4.0 | 27.4 / 20.0 / 11.8 | "
                "26.4 / 22.0 / 6.4 | 25.6 / 12.8 / 9.6",
                "titans": "100 / 100 / 100 | 99.6 / 84.6 / 75.4 | 74.2 / 42.8 / 21.2 | 26.4 / 23.6 / 8.2 | "
                "22.8 / 19.8 / 9.4 | 24.6 / 15.1 / 8.2",
                "hope": "100 / 100 / 100 | 99.2 / 88.4 / 78.2 | 73.2 / 46.2 / 24.8 | 29.4 / 24.8 / 14.8 | "
                "31.7 / 24.8 / 14.2 | 31.4 / 17.2 / 11.4",
            },
        ),
        source=f"{PAPER}, Table 1, at 4K / 8K / 16K tokens",
        note="The published models are language models trained on 50B tokens of long documents; ours are trained on "
        "the task alone, at a length of hundreds of bytes. Only orderings can be compared.",
    ),
    "babilong": Table(
        title="bAbI in long texts: answers right at the training length / 4K / 16K / 64K / 256K / 1M / 10M, percent",
        scores=tuple(f"exact_{length}" for length in ("train", "4K", "16K", "64K", "256K", "1M", "10M")),
        best=("exact_train", "exact_4K"),
        note="The paper shows this experiment as a plot only. Lengths are in bytes; a length that no model was tested "
        "on is left out.",
    ),
    "class_incremental": Table(
        title="Classes that come a task at a time: final average accuracy / forgetting, percent",
        scores=("accuracy", "forgetting"),
        best=("accuracy",),
        columns=("clinc150", "banking77", "dbpedia14"),
        note="Less forgetting is better; joint training has no order and forgets nothing. Steps and time are those of "
        "the stream, without the backbone's training. The paper shows this experiment as a plot only (Figure 6). See "
        "plots/class_incremental_spread.png and plots/class_incremental_matrix.png.",
    ),
    "ablation": Table(
        title="Hope without one of its parts: text in bits per byte; queries and strings of 2-50 / 51-100, percent",
        scores=("bits_per_byte", "accuracy", "bin0", "bin1"),
        best=("bits_per_byte", "accuracy", "bin1"),
        columns=_ABLATION,
        published=_rows(
            _ABLATION,
            {
                "reference": "12.24 | 58.1",
                "w/o DGD": "13.41 | 56.5",
                "w/o momentum": "13.58 | 56.9",
                "w/o weight decay": "13.71 | 57.2",
                "w/o CMS": "13.04 | 57.3",
                "static k": "13.77 | 56.9",
                "static v": "13.90 | 55.1",
                "static q": "12.19 | 57.4",
            },
        ),
        source=f"{PAPER}, Table 6, a perplexity and an accuracy",
        note="Only the signs of differences to the reference can be compared.",
    ),
    "context_use": Table(
        title="Bits per byte: of all places, and of places with 0-15 / 16-31 / 32-63 / 64-127 / ... bytes of context",
        scores=("bits", f"{FROM}0", *(f"{FROM}{2**i}" for i in range(4, 24))),
        best=("bits",),
        note="The paper shows this experiment as a plot only. See plots/context_use_curve.png.",
    ),
    "matryoshka": Table(
        title="Prefixes of a representation, 1/8 / 1/4 / 1/2 / 1 of its width: bits per byte, then recall of the "
        "intent at the nearest sentence, percent",
        scores=(*(f"bits_{share}" for share in PREFIXES), *(f"recall_{share}" for share in PREFIXES)),
        best=("bits_1",),
        note="Not an experiment of the paper. See plots/matryoshka_width.png.",
    ),
    "test_time_learning": Table(
        title="Bits per byte of the second half of a long text: frozen / learning at the rates 0.1 / 0.3 / 1 / 3 / "
        "gates: first half, threshold, ema, budget / their shares of chunks written, percent",
        scores=(
            "bits_frozen",
            *(f"{ETA}{rate:g}" for rate in _RATES),
            *(f"{GATE}{gate}" for gate in _GATES),
            *(f"{WRITTEN}{gate}" for gate in _GATES),
        ),
        best=("bits_frozen",),
        note="The paper reports no such experiment. A window costs as much per byte as reading and learning. A rate "
        "that no row has is left out, and other rates are in the picture alone (plots/test_time_learning_curve.png).",
    ),
    "chunk_transfer": Table(
        title="Trained at one chunk size, served at others in their order: bits per byte / after some training there",
        scores=(*(f"{AT}{chunk}" for chunk in _CHUNKS), *(f"{TUNED}{chunk}" for chunk in _CHUNKS)),
        best=tuple(f"{AT}{chunk}" for chunk in _CHUNKS),
        note="The paper reports no such experiment. See plots/chunk_transfer_matrix.png.",
    ),
    "levels_and_frequency": Table(
        title="Levels and their slowest clock: values right / characters right, percent",
        scores=("values", "characters"),
        best=("values", "characters"),
        note="The paper shows this experiment as a plot only (Figure 7, a pre-trained language model at 512 to 2K "
        "tokens): more levels help, a slower slowest level helps, and all are above one level. See "
        "plots/levels_and_frequency_curve.png.",
    ),
    "mqar": Table(
        title="Multi-query associative recall: accuracy at queries, percent",
        scores=("accuracy",),
        best=("accuracy",),
        note="The paper reports no such experiment. See plots/mqar_state.png for accuracy against state size.",
    ),
    "optimizer_lm": Table(
        title="Optimizers on a byte language model: bits per byte",
        scores=("bits_per_byte",),
        best=("bits_per_byte",),
        note="The learning rate of each is the best on the text it is reported on. The paper compares times of "
        "training only (Figure 12): M3 slower than Muon and on par with AdaMuon. See plots/optimizer_lm_curve.png.",
    ),
    "optimizer_vision": Table(
        title="Optimizers on a Vision Transformer: bits of training labels / of test labels / test accuracy",
        scores=("bits_train", "bits_test", "accuracy"),
        best=("bits_test",),
        note="The learning rate of each is the best on the test images. The paper shows a plot only (Figure 11, "
        "ImageNet-21K): M3 lowest on both, below Muon and AdamW.",
    ),
    "domain_stream": Table(
        title="Streams A → B: bits per byte of A and B after B / of A forgotten while B was learned / of B gained",
        scores=_LEARNED,
        best=("bits_both",),
        note=_STREAMS.format("domain_stream") + "The paper reports no such experiment.",
    ),
    "languages": Table(
        title="Two languages, one after the other: bits per byte of both in the end / of the first forgotten while the "
        "second was learned / of the second gained",
        scores=_LEARNED,
        best=("bits_both",),
        note=_STREAMS.format("languages") + "The paper's experiment is a plot only (Figure 8: chrF of translations "
        "from Manchu and Kalamang; in sequence the learner in context falls back to what training gave, and more "
        "levels recover it); here texts are predicted and nothing is translated.",
    ),
    "translation": Table(
        title="Sentence pairs of two languages, one after the other: chrF into the first right after it / into the "
        "first in the end / into the second in the end, percent; bits per byte of both in the end / of the first "
        "forgotten while the second was learned / of the second gained",
        scores=("chrf_first_between", "chrf_first_end", "chrf_second_end", *_LEARNED),
        best=("bits_both",),
        note=_STREAMS.format("translation") + "Of chrF more is better. The paper's experiment is a "
        "plot only (Figure 8: a pre-trained language model translates from Manchu and Kalamang; in sequence the "
        "learner in context falls back to what training gave, more levels recover it, and three almost reach what one "
        "language alone gives in context); here translations are from the language at home into the others.",
    ),
}
