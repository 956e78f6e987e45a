"""Numbers as the page, the tables and the exports write them."""

from __future__ import annotations

import math
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
EN_DASH = "\N{EN DASH}"
THIN = "\N{NARROW NO-BREAK SPACE}"


@dataclass(frozen=True)
class NumberFormat:
    """How the values of one column are written: all with the same decimals, so that they align."""

    decimals: int
    percent: bool = False

    def __call__(self, value: float | None) -> str:
        """The value, without a unit.

        >>> NumberFormat(1, percent=True)(0.4176)
        '41.8'
        >>> NumberFormat(2)(-0.5)
        '−0.50'
        """
        if value is None or not math.isfinite(value):
            return ""
        text = f"{value * 100 if self.percent else value:.{self.decimals}f}"
        return text.replace("-", MINUS) if float(text) else text.lstrip("-")

    def interval(self, low: float | None, high: float | None) -> str:
        """``low–high``; empty where there is no interval."""
        if low is None or high is None:
            return ""
        joint = f"{THIN}to{THIN}" if min(low, high) < 0 else EN_DASH
        return f"{self(low)}{joint}{self(high)}"

    def signed(self, value: float) -> str:
        """The value with its sign always written."""
        text = self(value)
        return text if text.startswith(MINUS) or not float(text) else f"+{text}"


def number_format(values: list[float], bounds: tuple[float, float] | None, unit: str) -> NumberFormat:
    """The format of a column: shares of 0 to 1 in percent, else by magnitude.

    >>> number_format([0.31, 0.28], (0, 1), "share")
    NumberFormat(decimals=1, percent=True)
    >>> number_format([0.31, 0.28], (-1, 1), "cosine")
    NumberFormat(decimals=3, percent=False)
    >>> number_format([12.5, 180.0], None, "distance")
    NumberFormat(decimals=1, percent=False)
    """
    if is_share(bounds, unit):
        return NumberFormat(1, percent=True)
    top = max((abs(v) for v in values), default=0.0)
    return NumberFormat(0 if top >= 1000 else 1 if top >= 30 else 2 if top >= 3 else 3)


def is_share(bounds: tuple[float, float] | None, unit: str) -> bool:
    """Whether a score is a share, which the page writes in percent."""
    return "share" in unit or (unit in ("%", "rate", "fraction", "proportion") and bounds in ((0, 1), None))


def p_value(p: float) -> str:
    """A p-value as text.

    >>> p_value(0.0004), p_value(0.0321)
    ('p < .001', 'p = .032')
    """
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def seconds(value: float | None) -> str:
    """A duration for people.

    >>> seconds(0), seconds(0.214), seconds(80), seconds(5400)
    ('0', '0.21 s', '1.3 min', '1.5 h')
    """
    if value is None:
        return ""
    if value == 0:
        return "0"
    for limit, unit, size in ((1, "s", 1), (60, "s", 1), (3600, "min", 60), (math.inf, "h", 3600)):
        if value < limit:
            return f"{value / size:.{2 if limit == 1 else 0 if limit == 60 and value >= 10 else 1}f} {unit}"
    raise AssertionError


def size(value: int | None) -> str:
    """Bytes for people.

    >>> size(1_288_490_188), size(40_960), size(0)
    ('1.2 GiB', '40 KiB', '0')
    """
    if not value:
        return "" if value is None else "0"
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 2**power:
            return f"{value / 2**power:.{1 if power == 30 else 0}f} {unit}"
    return f"{value} B"


def percent(value: float | None) -> str:
    """A share in percent, with its sign.

    >>> percent(0.0345)
    '3.5 %'
    """
    return "" if value is None else f"{value * 100:.1f} %"


def rank_text(first: int, last: int) -> str:
    """A tie group's rank: ``2`` or ``2–4``.

    >>> rank_text(1, 1), rank_text(2, 4)
    ('1', '2–4')
    """
    return str(first) if first == last else f"{first}{EN_DASH}{last}"
