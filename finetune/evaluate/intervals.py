"""How sure a score is: bootstrap intervals, and a paired test of two models on the same questions.

A score is 100 × sum of points / sum of what could be had, which is a share of right answers where each question gives
one point, and LLaVA-Bench's ratio of means where the judge's two scores are the points and what could be had.
"""

from collections.abc import Sequence

import numpy as np

Pair = tuple[float, float]  # points, out of
Interval = tuple[float, float]  # 2.5 % and 97.5 %

DRAWS = 10_000
CHUNK = 4_000_000  # numbers held at once


def ratio(pairs: Sequence[Pair]) -> float | None:
    """The score, in per cent; None where there was nothing to be had."""
    most = sum(out_of for _, out_of in pairs)
    return 100 * sum(points for points, _ in pairs) / most if most else None


def interval(pairs: Sequence[Pair], seed: int) -> Interval | None:
    """The 95 % percentile interval of the score: questions drawn with replacement (Efron 1979), DRAWS times."""
    drawn = _drawn([pairs], seed)
    return None if drawn is None else _middle(drawn[0])


def difference_interval(first: Sequence[Pair], second: Sequence[Pair], seed: int) -> Interval | None:
    """The 95 % interval of first − second, both scored on the same drawn questions (Koehn 2004)."""
    drawn = _drawn([first, second], seed)
    return None if drawn is None else _middle(drawn[0] - drawn[1])


def paired_p(first: Sequence[Pair], second: Sequence[Pair], seed: int) -> float:
    """How often models that do not differ would differ at least as much: two-sided approximate randomisation.

    Each question's two results change places with probability ½, DRAWS times (Noreen 1989); the observed one counts as
    one more draw, so p is never 0 (Phipson and Smyth 2010).
    """
    rng = np.random.default_rng(seed)
    a, b = np.array(first, float), np.array(second, float)
    observed = abs(_score(a.sum(0)) - _score(b.sum(0)))
    as_extreme = 0
    for count in _chunks(len(a)):
        swapped_DQ = rng.integers(0, 2, (count, len(a))).astype(float)
        moved_D2 = swapped_DQ @ (b - a)
        differences = np.abs(_score(a.sum(0) + moved_D2) - _score(b.sum(0) - moved_D2))
        as_extreme += int((differences >= observed - 1e-9).sum())
    return (as_extreme + 1) / (DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having made several comparisons (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _drawn(models: Sequence[Sequence[Pair]], seed: int) -> list[np.ndarray] | None:
    """The scores of each model, DRAWS of them, on the same drawn questions; None where nothing could be had."""
    if not all(ratio(pairs) is not None for pairs in models):
        return None
    rng = np.random.default_rng(seed)
    values = [np.array(pairs, float) for pairs in models]
    found: list[list[np.ndarray]] = [[] for _ in models]
    for count in _chunks(len(values[0])):
        chosen_DQ = rng.integers(0, len(values[0]), (count, len(values[0])))
        for place, value in enumerate(values):
            found[place].append(_score(value[chosen_DQ].sum(1)))
    return [np.concatenate(parts) for parts in found]


def _chunks(questions: int) -> list[int]:
    size = max(1, CHUNK // questions)
    return [min(size, DRAWS - start) for start in range(0, DRAWS, size)]


def _score(sums: np.ndarray) -> np.ndarray:
    """100 × points / out of; 0 for the rare draw in which nothing could be had."""
    points, out_of = sums[..., 0], sums[..., 1]
    return 100 * points / np.where(out_of == 0, np.inf, out_of)


def _middle(drawn: np.ndarray) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)
