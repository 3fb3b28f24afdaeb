"""Files of one record a line, which grow at their end."""

import errno
import os
from pathlib import Path


def append_line(path: Path, line: str) -> int:
    """Write one more line, whole or not at all, and give the bytes that were there before it.

    Raises OSError when it cannot be kept (ENOSPC where there is no room for all of it). Whoever calls this holds a
    lock that keeps other writers of the file away.
    """
    with path.open("ab+", buffering=0) as file:
        before = file.tell()
        file.seek(max(0, before - 1))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"  # after a line that a crash cut short
        data = begin + line.encode() + b"\n"
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise
    return before
