"""Numbers in a report's tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastmoco.evaluate.intervals import Estimate

NOT_KNOWN = "-"
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Footnotes:
    """Remarks under a table, each once, and the raised numbers by which its cells refer to them."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def mark(self, text: str, notes: Iterable[str]) -> str:
        """`text` with the numbers of `notes` behind it."""
        places = [self._places.setdefault(note, len(self._places) + 1) for note in dict.fromkeys(notes)]
        return text + (" " if places else "") + " ".join(map(_raised, places))

    def mean(self, values: Sequence[float], seeds: int, *, digits: int = 3) -> str:
        """The mean of a value a seed, marked where fewer than `seeds` have one."""
        text = number(sum(values) / len(values) if values else None, digits)
        return self.mark(text, self.seeds(len(values), seeds))

    @staticmethod
    def seeds(count: int, planned: int) -> list[str]:
        """The remark on a mean over `count` seeds, where some of those `planned` are missing."""
        return [f"provisional: {count} of {planned} seeds"] if 0 < count < planned else []

    @property
    def lines(self) -> tuple[str, ...]:
        """The remarks by their numbers, for `Table.notes`."""
        return tuple(f"{_raised(place)} {note}" for note, place in self._places.items())


def _raised(number: int) -> str:
    return str(number).translate(_RAISED)


def scored(estimate: Estimate | None) -> str:
    """0.873 [0.841, 0.902]."""
    if estimate is None or estimate.value is None:
        return NOT_KNOWN
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def points(estimate: Estimate | None) -> str:
    """A difference in points, hundredths of a score: +3.1 [+0.2, +6.0]."""
    if estimate is None or estimate.value is None:
        return NOT_KNOWN
    return in_points(estimate.value, estimate.low, estimate.high)


def in_points(value: float, low: float | None, high: float | None) -> str:
    """A difference of scores and the ends of its interval, where there is one, as `points` shows them."""
    bounds = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * value:+.1f}{bounds}"


def seeds(estimate: Estimate | None) -> str:
    """The least and the greatest of the seeds' means, in points."""
    if estimate is None or len(estimate.seeds) < 2:
        return NOT_KNOWN
    return f"{100 * estimate.seeds.min():+.1f} to {100 * estimate.seeds.max():+.1f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash."""
    return NOT_KNOWN if value is None else f"{value:.{digits}f}"


def share(budget: float) -> str:
    """A budget: 1 %, 100 %."""
    return f"{100 * budget:g} %"
