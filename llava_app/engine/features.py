"""What the vision tower made of pictures, kept for as long as there is room."""

import threading
from collections import OrderedDict

from torch import Tensor


class FeatureCache:
    """Projected features (S, D) by the digest of a picture; the longest unused go first. For any thread."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes."""
        self._limit = limit
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str) -> Tensor | None:
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return self._kept.get(digest)

    def put(self, digest: str, features_SD: Tensor) -> None:
        with self._lock:
            self._kept[digest] = features_SD
            self._kept.move_to_end(digest)
            while self._bytes() > self._limit and len(self._kept) > 1:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    @property
    def bytes(self) -> int:
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(features.nbytes for features in self._kept.values())
