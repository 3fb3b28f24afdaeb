"""The picture files that records name: in a folder, or inside zip and tar archives, which are never unpacked."""

import logging
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from llava_app.errors import DataError, ImageError
from llava_app.images import Picture, open_image

logger = logging.getLogger(__name__)

ARCHIVES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
DEPTHS = ("*", "*/*")  # below a folder of pictures, where archives are looked for
ZIP_HEADER = 30  # bytes before the name in a zip's local header; its last four are the lengths of name and extra field


@dataclass(frozen=True)
class Member:
    """A file inside an archive, and where its bytes lie."""

    archive: Path
    name: str
    offset: int  # of a zip's local header, of a tar's data
    size: int  # as stored
    deflated: bool

    def read(self) -> bytes:
        """Its bytes, unpacked. Raises ImageError when the archive is gone or damaged."""
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset)
                if self.archive.suffix == ".zip":
                    header = file.read(ZIP_HEADER)
                    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
                stored = file.read(self.size)
            return zlib.decompress(stored, wbits=-15) if self.deflated else stored
        except (OSError, zlib.error) as error:
            raise ImageError(f"{self.name} in {self.archive.name} cannot be read. Copy the archive again.") from error


Place = Path | Member | bytes  # where a picture is: a file, a part of an archive, or itself


def open_picture(place: Place) -> Picture:
    """The picture there. Raises ImageError when it cannot be read."""
    return open_image(place.read(), place.name) if isinstance(place, Member) else open_image(place)


@dataclass(frozen=True)
class Archives:
    """The files inside of archives by the names they would have if each were unpacked where it lies."""

    paths: tuple[Path, ...]
    names: np.ndarray  # (F,) bytes, sorted
    places: np.ndarray  # (F, 4) int64: archive, offset, size, whether deflated

    def find(self, name: str) -> Member | None:
        """The file of that name, None where no archive has it."""
        wanted = posixpath.normpath(name).encode()
        place = int(np.searchsorted(self.names, wanted))
        if place == len(self.names) or self.names[place] != wanted:
            return None
        archive, offset, size, deflated = self.places[place].tolist()
        return Member(self.paths[archive], name, offset, size, bool(deflated))


@dataclass(frozen=True)
class Pictures:
    """What a record's picture names are relative to.

    The archives below a folder are looked into when a name is no file, and one that cannot be read is told and passed
    over: it may have nothing to do with the data.
    """

    folder: Path
    given: Archives | None = None  # of the one archive that was named

    def place(self, image: str | bytes) -> Place:
        """Where a record's picture is; nobody has looked yet whether a file is there."""
        if isinstance(image, bytes):
            return image
        file = self.folder / image
        if self.given:
            return self.given.find(image) or file
        if not self.near or os.path.isfile(file):
            return file
        return (self.archives.find(image) if self.archives else None) or file

    @cached_property
    def near(self) -> list[Path]:
        """The archives in the folder and in its folders."""
        return sorted(path for depth in DEPTHS for suffix in ARCHIVES for path in self.folder.glob(depth + suffix))

    @cached_property
    def archives(self) -> Archives | None:
        """What is in those that can be read."""
        return _index(self.folder, self.near, tell=logger.warning)


def find_pictures(root: Path) -> Pictures:
    """The pictures of a folder, with the archives in it and in its folders; or those of one archive.

    Raises DataError where `root` is an archive that must be read from its start, that is damaged, or empty.
    """
    if root.name.endswith(COMPRESSED):
        raise DataError(f"{root} is compressed as a whole, so no picture can be read alone. Give a .tar or .zip.")
    if root.suffix not in ARCHIVES:
        return Pictures(root)
    given = _index(root.parent, [root])
    if given is None:
        raise DataError(f"There is no file in {root}. Copy it again.")
    return Pictures(root.parent, given)


def _index(root: Path, archives: list[Path], tell: Callable[[str], None] | None = None) -> Archives | None:
    """What is in them, None where nothing is. One that cannot be read is a DataError, or said to `tell`."""
    names, places = [], []
    for number, archive in enumerate(archives):
        beside = archive.parent.relative_to(root).as_posix()
        try:
            members = list(_members(archive))
        except DataError as error:
            if tell is None:
                raise
            tell(f"{error} Its pictures are not found until then.")
            continue
        for name, offset, size, deflated in members:
            names.append(posixpath.normpath(posixpath.join(beside, name)).encode())
            places.append((number, offset, size, deflated))
    if not names:
        return None
    by_name = np.array(names)
    order = np.argsort(by_name, kind="stable")
    return Archives(tuple(archives), by_name[order], np.array(places, np.int64)[order])


def _members(archive: Path) -> Iterator[tuple[str, int, int, bool]]:
    try:
        if archive.suffix == ".zip":
            yield from _zip_members(archive)
            return
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, member.offset_data, member.size, False
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} is no archive or is damaged: {error}. Copy it again.") from error


def _zip_members(archive: Path) -> Iterator[tuple[str, int, int, bool]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.is_dir():
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                raise DataError(f"{archive}: {member.filename} is encrypted or not deflated. Pack it again, plainly.")
            deflated = member.compress_type == zipfile.ZIP_DEFLATED
            yield member.filename, member.header_offset, member.compress_size, deflated
