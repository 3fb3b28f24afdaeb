"""Several visitors at once, over HTTP: the quick form of the load benchmark, without its clocks and scales."""

from concurrent.futures import ThreadPoolExecutor

from tests.benchmarks.load import QUICK, measure


def test_visitors_get_their_own_answers_and_every_error_has_a_name() -> None:
    with ThreadPoolExecutor(1) as thread:  # beside Playwright, whose own loop holds the main thread
        tally, _ = thread.submit(measure, QUICK).result()
    assert (tally.wrong, tally.faults) == ([], [])
    assert tally.right == tally.asked > QUICK.visitors
    assert tally.named == tally.provoked
