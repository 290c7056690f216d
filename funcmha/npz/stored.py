"""A zip archive of stored members, written from the first byte to the last.

Byte for byte what `zipfile` makes of the same members in a file with `seek`. But every length and checksum is known
before the bytes that it is of, so nothing is gone back to, and a pipe or a socket takes the archive as well.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO
from zipfile import ZIP_STORED, ZipInfo

from .archive import CENTRAL, END, END64, LOCATOR, WIDE

Bytes = bytes | bytearray | memoryview


def write(file: BinaryIO, members: Iterable[tuple[str, tuple[Bytes, ...]]]) -> None:
    """Names, each with its bytes in parts  →  an archive, as on Unix, of 1980"""
    at = 0
    infos: list[ZipInfo] = []
    for name, parts in members:
        info = ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        info.create_system, info.external_attr = 3, 0o644 << 16
        info.header_offset, info.CRC = at, 0
        info.file_size = info.compress_size = sum(map(len, parts))
        for part in parts:
            info.CRC = zlib.crc32(part, info.CRC)
        at += _put(file, info.FileHeader(zip64=info.file_size * 1.05 > zipfile.ZIP64_LIMIT), *parts)
        infos.append(info)
    directory = b"".join(map(_record, infos))
    _put(file, directory, *_ends(len(infos), len(directory), at))


def _put(file: BinaryIO, *parts: Bytes) -> int:
    """Write all of the parts; how many bytes they are."""
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            n = file.write(rest)
            if n == 0:
                raise OSError(f"{type(file).__name__} takes no more, with {len(rest)} bytes left")
            rest = rest[len(rest) if n is None else n :]  # a raw file may take less than it is given
    return sum(map(len, parts))


def _record(info: ZipInfo) -> bytes:
    """What the directory says of a member, large numbers in the zip64 field."""
    n, offset = info.file_size, info.header_offset
    large = ([n, n] if n > zipfile.ZIP64_LIMIT else []) + ([offset] if offset > zipfile.ZIP64_LIMIT else [])
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    version = 45 if large else info.create_version  # that of the local header, which has a field a little earlier
    n, offset = (WIDE if x > zipfile.ZIP64_LIMIT else x for x in (n, offset))
    name = info.filename.encode("ascii")
    kind = version | info.create_system << 8, version, 0, ZIP_STORED, 0, 0x21
    lengths = len(name), len(extra), 0, 0, 0
    return CENTRAL.pack(b"PK\1\2", *kind, info.CRC, n, n, *lengths, info.external_attr, offset) + name + extra


def _ends(count: int, size: int, start: int) -> Iterator[bytes]:
    """The end records of an archive whose directory lists `count` members in `size` bytes at `start`."""
    limits = zipfile.ZIP_FILECOUNT_LIMIT, zipfile.ZIP64_LIMIT, zipfile.ZIP64_LIMIT
    if any(n > limit for n, limit in zip((count, size, start), limits, strict=True)):
        yield END64.pack(b"PK\6\6", END64.size - 12, 45, 45, 0, 0, count, count, size, start)
        yield LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
    count, size, start = min(count, 0xFFFF), min(size, WIDE), min(start, WIDE)
    yield END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0)
