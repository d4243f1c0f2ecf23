"""The numbers in one table: each with its interval, and with what is to be said of it under the table."""

from __future__ import annotations

from collections.abc import Sequence

from fastmoco.evaluate.intervals import Estimate
from fastmoco.evaluate.weighted import Score
from fastmoco.study.report.gather import BASELINES, FULL
from fastmoco.study.report.statistics import Statistics, mean_difference
from fastmoco.study.report.words import NOT_KNOWN, Footnotes, points, scored

RUNS = "seeds x draws"
# Published baselines have every label that is not a test image's.
OF_BASELINES = (
    "with all labels a baseline is fitted on training and validation images together, once its C is chosen on the "
    "validation images; encoders' probes are fitted on the training images alone"
)


class Entries:
    """Texts for one table. A number of fewer runs than the study asks for has a remark that says so; one of a baseline
    with all labels has another, as it is fitted on more images than an encoder's probe."""

    def __init__(self) -> None:
        self.footnotes = Footnotes()

    def score(self, own: Statistics, measure: str, init: str, budget: float, score: Score = "auc") -> str:
        """The mean score of `init` at `budget`."""
        estimate = own.estimate(measure, init, budget, score)
        return self._entry(scored(estimate), estimate, own, measure, (init,), budget)

    def difference(self, own: Statistics, measure: str, a: str, b: str, budget: float) -> str:
        """`a` minus `b` in points of AUC."""
        estimate = own.difference(measure, a, b, budget)
        return self._entry(points(estimate), estimate, own, measure, (a, b), budget)

    def mean_difference(self, each: Sequence[Statistics], measure: str, a: str, b: str, budget: float) -> str:
        """`a` minus `b` in points of AUC, mean of all sets of images."""
        estimate = mean_difference(each, measure, a, b, budget)
        counts = [own.whole(measure, (a, b), budget) for own in each]
        least = min(seeds for seeds, _ in counts), min(draws for _, draws in counts)
        notes = [OF_BASELINES] if budget == 1 and b in BASELINES else []
        return self._marked(points(estimate), estimate, least, each[0].found.planned(measure, budget), notes)

    def second(self, own: Statistics, init: str, score: Score = "auc") -> str:
        """The mean score of `init` for the second target."""
        estimate = own.second(init, score)
        return self._marked(scored(estimate), estimate, own.whole_of_second((init,)), own.found.planned(FULL, 1.0))

    def second_difference(self, own: Statistics, a: str, b: str, score: Score = "auc") -> str:
        """`a` minus `b` in points, for the second target."""
        estimate = own.second_difference(a, b, score)
        return self._marked(points(estimate), estimate, own.whole_of_second((a, b)), own.found.planned(FULL, 1.0))

    def runs(self, own: Statistics, measure: str, inits: Sequence[str], budgets: Sequence[float]) -> str:
        """How many seeds and draws the numbers of a row are means over, budget by budget: "3 x 7, 3 x 1"."""
        counts = [own.whole(measure, inits, budget) for budget in budgets]
        return ", ".join(f"{seeds} x {draws}" if seeds else NOT_KNOWN for seeds, draws in counts)

    def _entry(
        self, text: str, estimate: Estimate | None, own: Statistics, measure: str, inits: Sequence[str], budget: float
    ) -> str:
        notes = [note for init in inits for note in own.found.notes(measure, init, budget)]
        if budget == 1 and estimate is not None and any(init in BASELINES for init in inits):
            notes.append(OF_BASELINES)
        planned = own.found.planned(measure, budget)
        return self._marked(text, estimate, own.whole(measure, inits, budget), planned, notes)

    def _marked(
        self,
        text: str,
        estimate: Estimate | None,
        whole: tuple[int, int],
        planned: tuple[int, int],
        notes: Sequence[str] = (),
    ) -> str:
        said = [*(estimate.notes if estimate is not None else ()), *notes]
        # Of more draws than fine-tuning's are baselines, which lack none.
        if estimate is not None and (whole[0] < planned[0] or whole[1] < planned[1]):
            said.append(f"provisional: {lacking(whole, planned)}")
        return self.footnotes.mark(text, said)


def lacking(whole: tuple[int, int], planned: tuple[int, int]) -> str:
    """1 of 3 seeds, 2 of 2 draws."""
    return f"{whole[0]} of {planned[0]} seeds, {whole[1]} of {planned[1]} draws"
