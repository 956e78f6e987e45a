"""Ranks: tie groups of the rows that compete, by paired tests on the headline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lethebench.leaderboard import _format as fmt
from lethebench.row import Row, ScoreRecord

if TYPE_CHECKING:
    import pandas as pd

    from lethebench.metric import Metric, Score

Key = tuple[str, str, str, str]
"""(suite@version, model, method, setting)."""


@dataclass(frozen=True)
class Rank:
    """A row's place: ``first`` to ``last``, or None with the reason in ``note``."""

    first: int | None
    last: int | None
    note: str

    @property
    def text(self) -> str:
        """``2``, ``2–4``, or a dash."""
        return "–" if self.first is None or self.last is None else fmt.rank_text(self.first, self.last)


def rank_rows(
    rows: Sequence[Row], tables: Mapping[Key, pd.DataFrame | None], headline: str
) -> tuple[dict[Key, Rank], str]:
    """The rank of every row of a board, and why there are none at all (or an empty text).

    Controls, rows that failed, and rows that the guard flags don't compete. A row competes only if its
    per-image table gives the score that the row records.
    """
    notes = {row.key: _barred(row, headline) for row in rows}
    competing = [row for row in rows if not notes[row.key]]
    if not competing:
        return {key: Rank(None, None, note) for key, note in notes.items()}, ""
    found = scorer(competing[0], headline)
    if found is None:
        name = competing[0].scores[headline].metric
        why = f"No ranks: the metric {name!r} of the headline is not installed here."
        return {key: Rank(None, None, note or why) for key, note in notes.items()}, why
    kept: dict[Key, pd.DataFrame] = {}
    for row in competing:
        table = tables.get(row.key)
        note = mismatch(*found, row.scores[headline], table)
        if note or table is None:
            notes[row.key] = f"Not ranked: {note}"
        else:
            kept[row.key] = table
    places = _places(*found, kept)
    return {row.key: places.get(row.key) or Rank(None, None, notes[row.key]) for row in rows}, ""


def _barred(row: Row, headline: str) -> str:
    if row.control:
        return "A control: not ranked"
    if row.status != "ok":
        return "Nothing was measured"
    record = row.scores.get(headline)
    if record is None or record.value is None or record.direction == "none":
        return f"Not ranked: {headline} was not measured"
    if row.warnings:
        return "Not ranked: flagged by the guard"
    return ""


def scorer(row: Row, name: str) -> tuple[Metric, Score] | None:
    """The installed metric that gave a row's score and its definition of it; None where there is none."""
    from lethebench.metric import configure_metric
    from lethebench.registry import METRICS

    made_by = row.scores[name].metric
    try:
        settings = row.metrics.get(made_by, {}).get("settings", {})
        metric: Metric = configure_metric(METRICS.get(made_by), settings)
    except Exception:  # a metric that can't be loaded must not cost the page
        return None
    score = next((s for s in metric.all_scores() if s.name == name), None)
    return None if score is None else (metric, score)


def mismatch(metric: Metric, score: Score, record: ScoreRecord, table: pd.DataFrame | None) -> str:
    """Why the table can't stand for the recorded score; empty where it can."""
    from lethebench import stats

    if table is None:
        return "no per-image table beside the row"
    if not {score.column, "cluster", "role", "kind"} <= set(table.columns):
        return f"its per-image table lacks a column of {score.name}"
    if not stats.is_mean(metric, score):
        return ""
    mean = stats.select(score, table)[score.column].astype(float).mean()
    if record.value is None or not abs(mean - record.value) < 1e-6 * max(1.0, abs(record.value)):
        return f"its per-image table doesn't give the {score.name} that the row records"
    return ""


def _places(metric: Metric, score: Score, tables: Mapping[Key, pd.DataFrame]) -> dict[Key, Rank]:
    from lethebench import stats

    by_name = {"\x1f".join(key): key for key in tables}
    if not by_name or score.direction == "none":
        return {}
    named = {name: tables[key] for name, key in by_name.items()}
    found = stats.rank(metric, score, named, seed_parts=("leaderboard",))
    return {by_name[name]: _place(place.rank, place.size) for name, place in found.items()}


def _place(rank: int, size: int) -> Rank:
    if size == 1:
        return Rank(rank, rank, "Told apart from the rows before and after it (paired test, Holm-corrected)")
    note = f"One of {size} rows that the paired test (Holm-corrected) can't tell from the best of them"
    return Rank(rank, rank + size - 1, note)
