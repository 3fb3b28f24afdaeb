import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_app.engine.features import FeatureCache


def features(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def test_the_longest_unused_picture_goes_first() -> None:
    cache = FeatureCache(limit=30)
    for digest in ("a", "b", "c"):
        cache.put(digest, features(10))
    cache.get("a")
    cache.put("d", features(10))
    assert [digest for digest in "abcd" if cache.get(digest) is not None] == ["a", "c", "d"]


def test_a_picture_that_is_put_again_counts_as_used() -> None:
    cache = FeatureCache(limit=20)
    for digest in ("a", "b", "a", "c"):
        cache.put(digest, features(10))
    assert cache.get("a") is not None
    assert cache.get("b") is None


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 30)), max_size=20))
def test_the_last_picture_stays_and_the_bytes_keep_to_the_limit(put: list[tuple[str, int]]) -> None:
    cache = FeatureCache(limit=30)
    for digest, size in put:
        new = features(size)
        cache.put(digest, new)
        assert cache.get(digest) is new
        assert cache.bytes <= 30


def test_a_picture_larger_than_the_limit_stays_alone() -> None:
    cache = FeatureCache(limit=30)
    cache.put("a", features(10))
    cache.put("b", features(40))
    assert cache.get("a") is None
    assert cache.get("b") is not None
    cache.put("c", features(10))
    assert cache.bytes == 10


def test_a_cleared_cache_is_empty() -> None:
    cache = FeatureCache(limit=30)
    cache.put("a", features(10))
    cache.clear()
    assert (cache.get("a"), cache.bytes) == (None, 0)
