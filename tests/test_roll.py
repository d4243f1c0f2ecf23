"""What the processes of a run say of themselves, and the verdict on the run that follows."""

from __future__ import annotations

import pytest

from fastmoco.distributed.roll import Pulse, Roll


def test_the_cause_is_waited_for_where_an_exception_may_be_anothers() -> None:
    roll = Roll(3, seconds=60.0, grace=1.0, patience=10.0, began=0.0)
    for rank in range(3):
        roll.heard(Pulse(rank, "n", 10 + rank, step=5), 1.0)
    roll.heard(Pulse(2, "n", 12, step=5, hurt="DistBackendError: Connection closed by peer"), 2.0)
    assert roll.verdict(9.0) is None
    roll.lost(1, "Connection timed out")
    verdict = roll.verdict(9.1)
    assert verdict is not None
    assert verdict.rank == 1
    assert "rank 1 on n (pid 11) can no longer be reached after step 5 (Connection timed out)" in verdict.text


def test_where_no_cause_shows_up_the_broken_connection_is_it() -> None:
    roll = Roll(2, seconds=60.0, grace=1.0, patience=10.0, began=0.0)
    roll.heard(Pulse(0, "n", 10, step=5, hurt="DistBackendError: Connection closed by peer"), 2.0)
    roll.heard(Pulse(1, "n", 11, step=5, hurt="DistBackendError: Timed out"), 3.0)
    assert roll.verdict(11.9) is None
    verdict = roll.verdict(12.1)
    assert verdict is not None
    assert (verdict.rank, verdict.alike) == (0, False)
    assert "failed after step 5: DistBackendError: Connection closed by peer" in verdict.text


def test_a_rank_that_never_reported_is_named() -> None:
    roll = Roll(2, seconds=60.0, grace=1.0, patience=10.0, began=0.0)
    roll.heard(Pulse(0, "n", 10, idle=60.0), 60.0)
    assert roll.verdict(60.0) is None
    verdict = roll.verdict(61.0)
    assert verdict is not None
    assert verdict.hung
    assert "before the first step" in verdict.text
    assert "rank 1 never reported" in verdict.text


def test_who_lived_by_anothers_signs_has_its_time_from_that_ones_end_on() -> None:
    roll = Roll(2, seconds=60.0, grace=1.0, patience=10.0, began=0.0)
    roll.heard(Pulse(0, "n", 10, step=5, idle=90.0), 100.0)
    roll.heard(Pulse(1, "n", 11, step=5, idle=2.0), 100.0)
    assert roll.verdict(100.0) is None
    roll.heard(Pulse(1, "n", 11, step=5, ended=True), 101.0)
    assert roll.verdict(101.0) is None
    roll.heard(Pulse(0, "n", 10, step=5, idle=151.0), 161.0)
    assert roll.verdict(161.0) is None
    verdict = roll.verdict(161.1)
    assert verdict is not None
    assert verdict.hung and "rank 0 on n (pid 10) stands after step 5" in verdict.text


def test_all_that_fail_alike_are_one_failure() -> None:
    roll = Roll(2, seconds=60.0, grace=1.0, patience=10.0, began=0.0)
    roll.heard(Pulse(0, "n", 10, step=5), 1.0)
    roll.heard(Pulse(1, "m", 11, step=5, failed="UserError: too bad", mistake=True), 2.0)
    assert roll.verdict(11.9) is None
    roll.heard(Pulse(0, "n", 10, step=5, failed="UserError: too bad", mistake=True), 11.9)
    verdict = roll.verdict(11.9)
    assert verdict is not None
    assert (verdict.rank, verdict.alike) == (1, True)


def test_a_process_that_said_how_it_ends_is_not_lost() -> None:
    roll = Roll(3, seconds=60.0, grace=1.0, patience=10.0, began=0.0)
    roll.heard(Pulse(0, "n", 10, step=5), 1.0)
    roll.heard(Pulse(1, "n", 11, step=5, ended=True), 1.0)
    roll.heard(Pulse(2, "n", 12, step=5, failed="ValueError: x"), 1.0)
    roll.lost(1)
    roll.lost(2)
    assert roll.verdict(1.5) is None
    verdict = roll.verdict(2.0)
    assert verdict is not None
    assert verdict.text == "rank 2 on n (pid 12) failed after step 5: ValueError: x; go on with --resume"


@pytest.mark.parametrize("said", [{"rank": 1, "step": "x"}, {"rank": 1, "what": 2}, {"pid": 3}])
def test_what_is_no_pulse_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Pulse.of(said)
