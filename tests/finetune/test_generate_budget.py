import json
import threading
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.instruct.budget import Budget, Limit, Prices, Usage
from finetune.instruct.ledger import Ledger, read_ledger, replies, spent
from llava_app.errors import DataError

TOKENS = st.integers(0, 2000)
USAGES = st.builds(Usage, TOKENS, TOKENS)
PRICES = st.builds(Prices, *[st.decimals(0, 100, places=3)] * 2)
LIMITS = st.builds(Limit, st.none() | st.integers(1, 20_000), st.none() | st.decimals(0, 1, places=4), PRICES)


@settings(max_examples=50)
@given(LIMITS, st.lists(st.tuples(USAGES, st.sampled_from([0, 0.3, 1]), st.booleans()), max_size=15))
def test_the_limit_is_never_passed(limit: Limit, questions: list[tuple[Usage, float, bool]]) -> None:
    budget = Budget(limit)
    in_flight: list[tuple[Usage, Usage]] = []
    for most, part, ends_soon in questions:
        if not limit.allows(budget.spent + budget.reserved + most):  # reserve() would wait for those in flight
            while in_flight:
                budget.settle(*in_flight.pop())
        if budget.reserve(most):
            in_flight.append((most, Usage(int(most.prompt * part), int(most.answer * part))))
        assert limit.allows(budget.spent + budget.reserved)
        if ends_soon and in_flight:
            budget.settle(*in_flight.pop(0))
    assert limit.allows(budget.spent)


def test_many_threads_share_a_budget_and_use_it_up() -> None:
    budget = Budget(Limit(tokens=1000))
    served = []

    def ask() -> None:
        while budget.reserve(Usage(30, 70)):
            assert budget.spent.tokens + budget.reserved.tokens <= 1000
            served.append(1)
            budget.settle(Usage(30, 70), Usage(30, 10))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.spent.tokens == 40 * len(served)
    assert 1000 - 100 < budget.spent.tokens <= 1000


def test_money_is_counted_by_the_million_tokens() -> None:
    prices = Prices(Decimal("0.15"), Decimal("0.60"))
    assert prices.cost(Usage(1_000_000, 500_000)) == Decimal("0.45")


def test_what_was_cut_off_counts_in_full_and_what_came_to_an_end_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    with Ledger(file) as ledger:
        ledger.write("asked", "a", Usage(100, 50))
        ledger.write("replied", "a", Usage(20, 5), text="x", finish="stop")
        ledger.write("asked", "b", Usage(100, 50))
        ledger.write("failed", "b", Usage(), reason="status 500")
        ledger.write("asked", "b", Usage(100, 50))
    assert spent(read_ledger(file)) == Usage(120, 55)
    with Ledger(file) as ledger:
        ledger.write("asked", "b", Usage(100, 50))
        ledger.write("replied", "b", Usage(30, 7), text="y", finish="stop")
    assert spent(read_ledger(file)) == Usage(150, 62)
    assert replies(read_ledger(file)).keys() == {"a", "b"}


@pytest.mark.parametrize("torn", [1, 5, 30])
def test_a_torn_last_line_is_passed_over(tmp_path: Path, torn: int) -> None:
    file = tmp_path / "ledger.jsonl"
    with Ledger(file) as ledger:
        ledger.write("replied", "a", Usage(1, 1), text="x\ny", finish="stop")
        ledger.write("replied", "b", Usage(1, 1), text="ü", finish="stop")
    file.write_bytes(file.read_bytes()[:-torn])
    with Ledger(file) as ledger:
        ledger.write("replied", "c", Usage(1, 1), text="z", finish="stop")
    assert {"a", "c"} <= replies(read_ledger(file)).keys()
    assert json.loads(file.read_bytes().split(b"\n")[-2])["key"] == "c"


def test_two_runs_cannot_write_the_same_ledger(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl"), pytest.raises(DataError, match="another run"):
        Ledger(tmp_path / "ledger.jsonl")
