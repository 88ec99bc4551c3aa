"""Reading a long text in pieces that can be watched, and the JSON form of what came of it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hope_jax.online.report import Report
from hope_jax.online.session import Session
from hope_jax.online.stream import TOKENS_A_CALL


def pieces(session: Session, text: str, size: int = TOKENS_A_CALL) -> list[np.ndarray]:
    """The tokens of a text, cut every `size` tokens: read one after another they are the whole text, to the bit."""
    tokens = session.encode(text)
    return [tokens[begin : begin + size] for begin in range(0, len(tokens), size)]


def joined(session: Session, reports: Sequence[Report]) -> Report:
    """One report of several calls in a row, as if they had been one; the session is as they left it.

    Those of `without_losses` may be among them.
    """
    chunks = [report.chunks for report in reports]
    return session.report(
        chunks, sum(report.tokens for report in reports), sum(report.new_contexts for report in reports)
    )


def without_losses(report: Report) -> Report:
    """A report to be kept while a long text is read: without the loss of each token, which `joined` does not need."""
    chunks = report.chunks
    return report._replace(chunks=chunks._replace(losses=chunks.losses[:0].copy()))  # a view would keep them all


def report_json(report: Report) -> dict[str, Any]:
    """A report as JSON: numbers that are not finite become null, arrays lists with one entry per chunk."""
    chunks = {
        name: getattr(report.chunks, name).tolist()
        for name in ("before", "after", "wrote", "rolled_back", "fired", "step", "moved")
    }
    fields = report._asdict() | {
        "levels": [level._asdict() for level in report.levels],
        "chunks": chunks,
        "warnings": report.warnings,
    }
    return finite(fields)


def finite(value: Any) -> Any:
    """The value without infinities and NaNs, which JSON does not have: None in their place.

    >>> finite({"before": float("nan"), "moved": [0.5]})
    {'before': None, 'moved': [0.5]}
    """
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
