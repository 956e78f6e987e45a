"""The picture of suppression against adherence with as many methods as there are."""

from __future__ import annotations

import random

import pytest

from lethebench.leaderboard._board import _looks
from lethebench.leaderboard._format import NumberFormat
from lethebench.leaderboard._plot import CHARACTER, Axis, Point, Scale, Series, outline, scatter
from lethebench.leaderboard._plot import SHAPES as FAMILIES

PERCENT = NumberFormat(0, percent=True)


def made(seed: int, methods: int = 30, base: float = 0.9) -> list[Series]:
    """Base and methods of three settings that lose anything between nothing and almost all."""
    rng = random.Random(seed)

    def point(name: str, setting: str, x: float, y: float) -> Point:
        return Point(f"{name}-{setting}", setting, x, y, x - 0.05, x + 0.05, y - 0.01, y + 0.01, name)

    found = [Series("base", -1, "circle", "sampling", True, (point("base", "default", 0.8, base),))]
    for i in range(methods):
        name, cost = f"method-number-{i}", 10 ** rng.uniform(-3, 0)
        ys = [base * (1 - cost * k / 3) for k in (1, 2, 3)]
        xs = sorted((rng.uniform(0, 0.8) for _ in ys), reverse=True)
        points = tuple(point(name, str(k), x, y) for k, (x, y) in enumerate(zip(xs, ys, strict=True)))
        found.append(Series(name, i % 8, "circle", "weights", False, points))
    return found


def drawn(series: list[Series], front: frozenset[str], width: int, most: int):
    x, y = Axis("still there", PERCENT, "lower"), Axis("Adherence", NumberFormat(2), "higher")
    return scatter(series, x, y, front, [], width, 500, most)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("width", "most"), [(1080, 31), (380, 10)])
def test_no_label_covers_another_and_those_of_the_front_come_first(seed: int, width: int, most: int) -> None:
    series = made(seed)
    front = frozenset(series[i].points[-1].row for i in (3, 17))
    plot = drawn(series, front, width, most)
    boxes = []
    for label in plot.labels:
        wide = len(label.text) * CHARACTER
        left = label.x - {"start": 0, "middle": wide / 2, "end": wide}[label.anchor]
        boxes.append((left, label.y - 10.5, left + wide, label.y + 3.5))
    for i, a in enumerate(boxes):
        assert a[0] >= plot.left - 30 and a[2] <= plot.right + 30
        for b in boxes[:i]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]) + 0.2
    assert {"method-number-2", "method-number-16"} <= {x.text for x in plot.labels}
    assert len(plot.labels) == most if width == 380 else len(plot.labels) > 15


def test_scale_is_spread_out_near_base_and_keeps_the_order() -> None:
    plot = drawn(made(1), frozenset(), 1080, 31)
    by_loss = sorted(plot.marks, key=lambda m: -m.point.y)
    assert [m.y for m in by_loss] == sorted(m.y for m in by_loss)
    at = {t.text: t.at for t in plot.y_ticks}
    one, ten = at["−1"] - at["base"], at["−20"] - at["−10"]
    assert one > 0.5 * ten, "a loss of 1 % takes about as much room as one from 10 to 20 %"
    gaps = [b.at - a.at for a, b in zip(plot.y_ticks, plot.y_ticks[1:], strict=False)]
    assert min(gaps) >= 18


def test_scale_with_a_centre_is_symmetric_and_meets_its_ends() -> None:
    scale = Scale(0.5, 1.5, 0.0, 100.0, centre=1.0)
    assert (scale(0.5), scale(1.0), scale(1.5)) == (0.0, 50.0, 100.0)
    assert scale(1.1) - 50 == pytest.approx(50 - scale(0.9), abs=0.11)


def test_without_base_the_scale_is_that_of_the_score() -> None:
    plot = drawn(made(1)[1:], frozenset(), 1080, 31)
    assert plot.y_label == "Adherence" and all(t.text not in ("base", "−1") for t in plot.y_ticks)


class FakeRow:
    def __init__(self, method: str, family: str, control: bool = False) -> None:
        self.method, self.family, self.control = method, family, control


def test_thirty_methods_look_different_and_families_share_no_shape() -> None:
    rows = [FakeRow(f"w{i}", "weights") for i in range(16)] + [
        FakeRow(f"s{i}", "sampling") for i in range(16)
    ]
    looks = _looks([*rows, FakeRow("base", "sampling", True)])  # type: ignore[arg-type]
    methods = {m: look for m, look in looks.items() if m != "base"}
    assert len(set(methods.values())) == 32
    shapes = [{look[1] for m, look in methods.items() if m[0] == family} for family in "ws"]
    assert shapes[0].isdisjoint(shapes[1])
    assert looks["base"] == (-1, "circle")


def test_every_shape_has_its_own_outline() -> None:
    shapes = [s for family in FAMILIES.values() for s in family]
    assert len({outline(s, 5) for s in shapes}) == len(shapes)
