"""Check of a DICOM file, element by element, before any library reads it.

GDCM allocates whatever length an element claims: a file of 600 bytes can ask for 4 GB. So every length is compared with
the bytes that are left (DICOM PS3.5, chapter 7), through all nested sequences, without copying anything.
"""

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

from segkit.errors import DataError
from segkit.reading.volume import damaged, require_file

_SERIES, _TRANSFER_SYNTAX, _PIXELS = (0x0020, 0x000E), (0x0002, 0x0010), (0x7FE0, 0x0010)
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF
_WITH_LONG_LENGTH = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_WITH_SHORT_LENGTH = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_IMPLICIT, _BIG_ENDIAN, _DEFLATED = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"
_DEEPEST = 32
_MOST_ELEMENTS = 1_000_000
"""An enhanced file of 2000 frames has a tenth of it."""


@dataclass(frozen=True)
class DicomFile:
    """A checked file: UID of its series, bytes of its pixels (0: no image), and whether they are compressed."""

    series: str
    pixel_bytes: int
    is_packed: bool


def check_dicom(path: Path) -> DicomFile | None:
    """Series and pixel bytes of a DICOM file whose elements all fit into it; None where it is not a DICOM file.

    Raises DataError where the file cannot be opened, or an element claims bytes that the file does not have.
    """
    size = require_file(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        has_preamble = data[128:132] == b"DICM"
        start = 132 if has_preamble else 0
        if size < start + 8 or (not has_preamble and data[:2] not in (b"\2\0", b"\x08\0")):
            return None
        walk = _Walk(path, data)
        try:
            walk.file(start)
        except (struct.error, IndexError) as failure:
            raise walk.damaged("it ends in the middle of an element") from failure
        return DicomFile(walk.series, walk.pixel_bytes, walk.is_packed)


@dataclass
class _Walk:
    path: Path
    data: mmap.mmap
    series: str = ""
    syntax: bytes = b""
    pixel_bytes: int = 0
    is_packed: bool = False
    order: str = "<"
    is_explicit: bool = True
    count: int = field(default=0, repr=False)

    def file(self, start: int) -> None:
        """The meta group, always explicit and little-endian, then the data set in the transfer syntax it names."""
        size, place = len(self.data), start
        while place < size and self.data[place : place + 2] == b"\2\0":
            place = self._element(place, size, 0)
        if self.syntax == _DEFLATED:
            remedy = "Export it with another transfer syntax"
            raise DataError("the DICOM file is deflated as a whole", where=self.path, remedy=remedy)
        self.order = ">" if self.syntax == _BIG_ENDIAN else "<"
        letters = self.data[place + 4 : place + 6]
        looks_explicit = letters in _WITH_SHORT_LENGTH or letters in _WITH_LONG_LENGTH
        self.is_explicit = self.syntax != _IMPLICIT if self.syntax else looks_explicit
        while size - place >= 8 and any(self.data[place : place + 8]):
            place = self._element(place, size, 0)
        if any(self.data[place:]):  # some writers append zeros
            raise self.damaged(f"after its last element {size - place} bytes follow")

    def damaged(self, found: str) -> DataError:
        """The error of an element that cannot be right."""
        return damaged(self.path, f"the DICOM file is truncated or damaged: {found}")

    def _element(self, place: int, end: int, depth: int) -> int:
        """Walk over the element at `place` and return where the next begins."""
        self.count += 1
        if self.count > _MOST_ELEMENTS or depth > _DEEPEST:
            raise self.damaged("it has more elements, or deeper ones, than any image")
        tag, kind, length, place = self._head(place)
        name = f"({tag[0]:04x},{tag[1]:04x})"
        if tag[0] == 0xFFFE or (depth == 0 and tag == _PIXELS and self.pixel_bytes):
            raise self.damaged(f"{name} is not allowed where it stands")
        if length == _UNDEFINED:
            return self._fragments(place, end) if tag == _PIXELS else self._items(place, end, depth, kind)
        if length > end - place:
            raise self.damaged(f"element {name} claims {length} bytes where {end - place} are left")
        if depth == 0 and tag == _SERIES:
            self.series = self.data[place : place + length].strip(b"\0 ").decode("ascii", "replace")
        elif depth == 0 and tag == _TRANSFER_SYNTAX:
            self.syntax = self.data[place : place + length].strip(b"\0 ")
        elif depth == 0 and tag == _PIXELS:
            self.pixel_bytes = length
        is_item = self.data[place : place + 4] == struct.pack(f"{self.order}HH", *_ITEM)
        if kind == b"SQ" or (kind in (b"", b"UN") and length >= 8 and is_item and tag != _PIXELS):
            self._items(place, place + length, depth, kind)
        return place + length

    def _head(self, place: int) -> tuple[tuple[int, int], bytes, int, int]:
        """Tag, value representation (empty in implicit files), length, and where the value begins."""
        group, element = struct.unpack_from(f"{self.order}HH", self.data, place)
        kind = self.data[place + 4 : place + 6] if self.is_explicit and group != 0xFFFE else b""
        if kind in _WITH_LONG_LENGTH:
            number, at, size = "I", 8, 12
        elif kind in _WITH_SHORT_LENGTH:
            number, at, size = "H", 6, 8
        elif kind:
            raise self.damaged(f"element ({group:04x},{element:04x}) has an unknown value representation")
        else:
            number, at, size = "I", 4, 8
        (length,) = struct.unpack_from(f"{self.order}{number}", self.data, place + at)
        return (group, element), kind, length, place + size

    def _items(self, place: int, end: int, depth: int, kind: bytes) -> int:
        """Walk over the items of a sequence; the content of an unknown one (UN) is always implicit."""
        before, self.is_explicit = self.is_explicit, self.is_explicit and kind != b"UN"
        while place < end:
            tag, _, length, place = self._head(place)
            if tag == _END_OF_SEQUENCE:
                break
            if tag != _ITEM:
                raise self.damaged(f"({tag[0]:04x},{tag[1]:04x}) stands where an item of a sequence should")
            if length != _UNDEFINED and length > end - place:
                raise self.damaged(f"an item claims {length} bytes where {end - place} are left")
            end_of_item = end if length == _UNDEFINED else place + length
            while place < end_of_item:
                if self.data[place : place + 4] == struct.pack(f"{self.order}HH", *_END_OF_ITEM):
                    place += 8
                    break
                place = self._element(place, end_of_item, depth + 1)
        self.is_explicit = before
        return place

    def _fragments(self, place: int, end: int) -> int:
        self.is_packed = True
        while place < end:
            tag, _, length, place = self._head(place)
            if tag == _END_OF_SEQUENCE:
                break
            if tag != _ITEM or length > end - place:
                raise self.damaged("its pixels are cut short")
            self.pixel_bytes += length
            place += length
        return place
