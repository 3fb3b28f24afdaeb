"""Several visitors at once, over HTTP: the quick form of the load benchmark, without its clocks and scales."""

from tests.benchmarks.load import QUICK, measure


def test_visitors_get_their_own_answers_and_every_error_has_a_name() -> None:
    tally, _ = measure(QUICK)
    assert (tally.wrong, tally.faults) == ([], [])
    assert tally.right == tally.asked > QUICK.visitors
    assert tally.named == tally.provoked
