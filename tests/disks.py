"""A disk that is nearly full."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Real writes beyond that fail, with EFBIG instead of ENOSPC; a write across it is cut short."""
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of a file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def room_for(path: Path, more: int) -> AbstractContextManager[None]:
    """A disk on which `path`, and any new file as long as it, has room for so many bytes more."""
    return files_of_at_most(path.stat().st_size + more)
