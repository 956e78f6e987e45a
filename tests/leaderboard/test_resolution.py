"""The smallest difference that a board's prompts resolve."""

import pytest
from made_runs import everything

from lethebench.leaderboard import scan
from lethebench.leaderboard._board import _resolution
from lethebench.row import Difference

HEADLINE = "fbmem.memorized"


def test_it_follows_the_width_of_paired_intervals_that_have_one(tmp_path) -> None:
    everything(tmp_path)
    row = next(e.row for e in scan(tmp_path).entries if not e.row.control and HEADLINE in e.row.scores)

    def wide(half: float):
        difference = Difference(value=-0.5, low=-0.5 - half, high=-0.5 + half, p=0.01)
        score = row.scores[HEADLINE].model_copy(update={"base_difference": difference})
        return row.model_copy(update={"scores": {HEADLINE: score}})

    narrow = _resolution([wide(0.05)], HEADLINE)
    assert narrow == pytest.approx(0.05 * 2.8 / 1.96)
    assert _resolution([wide(0.1)], HEADLINE) == pytest.approx(2 * narrow)
    assert _resolution([wide(0.0)], HEADLINE) is None
    assert _resolution([wide(0.0), wide(0.05)], HEADLINE) == pytest.approx(narrow)
