r"""Zip archives, read strictly, as every byte belongs to one record and all records agree, and written forwards.

    local header, data │ local header, data │ … │ central directory │ end record

`zipfile` finds what it can in a damaged file. Parameters are whole or refused, so this reader takes the archives that
`numpy.savez`, `numpy.savez_compressed` and `funcmha.npz.save` write, and no looser ones: members stored or deflated,
back to back in the order of the directory; no comment, no encryption. Written to a pipe, a member's sizes and checksum
follow its data, in a descriptor: then the directory is believed, and what stands elsewhere must say the same. `zip` of
Info-ZIP makes such archives too, and notes times and owners in extra fields: these mean nothing here, and zip64's is
the only other one. Layout: PKWARE APPNOTE.TXT 6.3, section 4.3. Whatever is wrong raises `zipfile.BadZipFile`.

What is written is byte for byte what `zipfile` makes of the same stored members in a file with `seek`. But every length
and checksum is known before the bytes that it is of: nothing is gone back to, so a pipe or a socket takes it as well.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipInfo

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")

WIDE = 0xFFFFFFFF  # stands for a number that does not fit, and is in the zip64 extra field
FOLLOWED = 0x0008  # the flag of a member that a descriptor follows: of what it says, the local header may have 0
HARMLESS = 0x0806 | FOLLOWED  # flags that say how hard deflate tried, and that the name is UTF-8
RATIO = 1032  # the most that deflate can: 258 bytes in two bits, as of zeros
NOTES = {  # extra fields of times and owners, and their lengths: proginfo/extrafld.txt of Info-ZIP
    0x5455: (5, 9, 13),  # UT: one to three times
    0x7875: (7, 11, 19),  # ux: user and group, of 2, 4 or 8 bytes
    0x5855: (8, 12),  # UX: two times, and user and group or not
    0x7855: (0, 4),  # Ux: user and group, or not
    0x000A: (32,),  # NTFS: three times
}
CHUNK = 1 << 18  # bytes read at a time: they stay in a core's cache for the checksum and the copy


class Source(NamedTuple):
    """The bytes of a file from a position on: those before are somebody else's."""

    file: BinaryIO
    start: int
    length: int

    def read(self, at: int, n: int) -> bytes:
        """The n bytes at `at`; BadZipFile where there are fewer."""
        data = b""
        if 0 <= at <= self.length - n:
            self.file.seek(self.start + at)
            while len(data) < n and (piece := self.file.read(n - len(data))):  # a raw file may give less than asked for
                data = data + piece if data else piece
        if len(data) < n:
            raise BadZipFile(f"the file must have {n} bytes at byte {at}, but it ends before")
        return data


class Member(NamedTuple):
    """One file in the archive, as its local header and the directory describe it."""

    name: str
    flags: int
    method: int
    crc: int
    stored: int  # bytes in the archive
    size: int  # bytes when unpacked
    start: int  # where its data are in the archive; of the directory's, where its local header is


def members(source: Source) -> list[Member]:
    """The archive's members, in order; nothing of their data is read."""
    start, end, count = _directory(source)
    found: list[Member] = []
    at = 0
    for listed in _central(source.read(start, end - start)):
        name = listed.name
        if listed.start != at:
            raise BadZipFile(f"{name} must begin at byte {at}, where the one before it ends, got {listed.start}")
        member = _local(source, at)
        if listed.flags & FOLLOWED:
            known = {field: getattr(member, field) or getattr(listed, field) for field in ("crc", "stored", "size")}
            member = member._replace(**known)
        if member[:-1] != listed[:-1]:
            got = f"{member[:-1]} and {listed[:-1]}"
            raise BadZipFile(f"{name} must be alike in its local header and in the directory, got {got}")
        _check(member)
        at = member.start + member.stored
        if member.flags & FOLLOWED:
            at += _descriptor(source, at, member)
        if at > start:
            raise BadZipFile(f"{name} must end before the directory at byte {start}, got {at}")
        found.append(member)
    if at != start:
        raise BadZipFile(f"the directory must begin at byte {at}, where the last member ends, got {start}")
    if len(found) != count:
        raise BadZipFile(f"the directory must list {count} members as the end record says, got {len(found)}")
    return found


def contents(source: Source, member: Member, skip: int = 0) -> Iterator[bytes]:
    """The unpacked bytes of `member` after the first `skip`, in pieces; BadZipFile unless size and CRC are right."""
    size, crc, end = 0, 0, member.start + member.stored
    pieces = (source.read(at, min(CHUNK, end - at)) for at in range(member.start, end, CHUNK))
    for piece in pieces if member.method == ZIP_STORED else _inflate(pieces, member):
        crc = zlib.crc32(piece, crc)
        skipped = max(skip - size, 0)
        size += len(piece)
        if size > member.size:
            raise BadZipFile(f"{member.name} must unpack to {member.size} bytes, got more")
        yield piece[skipped:]
    if size != member.size:
        raise BadZipFile(f"{member.name} must unpack to {member.size} bytes, got {size}")
    if crc != member.crc:
        raise BadZipFile(f"{member.name} must have CRC {member.crc:08x}, got {crc:08x}")


def head(source: Source, member: Member, n: int) -> bytes:
    """The first `n` unpacked bytes of `member`, or all. A deflated one is unpacked to its end: its size is a claim."""
    if member.method == ZIP_STORED:
        return source.read(member.start, min(n, member.size))
    first = b""
    for piece in contents(source, member):
        first += piece[: n - len(first)]
    return first


def _check_beginning(source: Source) -> None:
    """BadZipFile, which says what the file is instead, unless it begins as an archive does."""
    begins, after = source.read(0, min(8, source.length)), f" after its position {source.start}" if source.start else ""
    if not source.length:
        raise BadZipFile(f"no npz file: it is empty{after}")
    if not begins.startswith(b"PK"):
        shown = begins.decode() if begins.isascii() and begins.decode().isprintable() else begins
        raise BadZipFile(f"no npz file: it starts with {shown!r}{after}")
    if source.length < END.size:
        raise BadZipFile(f"a zip archive has at least {END.size} bytes, got {source.length}{after}")


def _directory(source: Source) -> tuple[int, int, int]:
    """Where the central directory begins and ends, and how many members it lists."""
    at = source.length - END.size
    _check_beginning(source)
    signature, *fields, comment = END.unpack(source.read(at, END.size))
    if signature != b"PK\5\6" or comment:
        ends = source.read(source.length - 8, 8)
        raise BadZipFile(f"the last {END.size} bytes must be a zip end record, got a file that ends with {ends!r}")
    if at >= LOCATOR.size and source.read(at - LOCATOR.size, 4) == b"PK\6\7":
        at -= LOCATOR.size + END64.size
        fields = _end64(source, at, fields)
    disk, directory_disk, here, count, size, start = fields
    if disk or directory_disk or here != count:
        raise BadZipFile(f"the archive must be whole, got part {disk} of one with {count} members, {here} of them here")
    if start + size != at:
        raise BadZipFile(f"the directory must end at byte {at}, where the end record begins, got {start} + {size}")
    return start, at, count


def _end64(source: Source, at: int, narrow: list[Any]) -> list[Any]:
    """The fields of the zip64 end record at `at`, which those of the plain end record must equal, or stand for."""
    signature, size, _, _, *fields = END64.unpack(source.read(at, END64.size))
    locator = LOCATOR.unpack(source.read(at + END64.size, LOCATOR.size))
    if (signature, size) != (b"PK\6\6", END64.size - 12) or locator != (b"PK\6\7", 0, at, 1):
        raise BadZipFile(f"a zip64 end record must be at byte {at}, and its locator say so, got {locator}")
    limits = 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, WIDE, WIDE
    if any(short not in (long, limit) for short, long, limit in zip(narrow, fields, limits, strict=True)):
        raise BadZipFile(f"both end records must agree, got {narrow} and {fields}")
    return fields


def _central(directory: bytes) -> Iterator[Member]:
    """The records of the directory."""
    at = 0
    while at < len(directory):
        record = directory[at : at + CENTRAL.size]
        if len(record) < CENTRAL.size or record[:4] != b"PK\1\2":
            raise BadZipFile(f"the directory must be one record after another, got {record[:8]!r} at its byte {at}")
        _, _, _, flags, method, _, _, crc, stored, size, n, e, comment, disk, _, _, offset = CENTRAL.unpack(record)
        at += CENTRAL.size + n + e
        name, extra = _name(directory[at - e - n : at - e]), directory[at - e : at]
        if at > len(directory) or comment or disk:
            raise BadZipFile(f"{name} must end within the directory, without a comment, on disk 0, got disk {disk}")
        size, stored, offset = _with_zip64(name, extra, size, stored, offset)
        yield Member(name, flags, method, crc, stored, size, offset)


def _local(source: Source, at: int) -> Member:
    """The local header at `at`."""
    record = source.read(at, LOCAL.size)
    signature, _, flags, method, _, _, crc, stored, size, n, e = LOCAL.unpack(record)
    if signature != b"PK\3\4":
        raise BadZipFile(f"a local header must be at byte {at}, got {record[:8]!r}")
    tail = source.read(at + LOCAL.size, n + e)
    name = _name(tail[:n])
    size, stored = _with_zip64(name, tail[n:], size, stored)
    return Member(name, flags, method, crc, stored, size, at + LOCAL.size + n + e)


def _descriptor(source: Source, at: int, member: Member) -> int:
    """How long the descriptor at `at` is, with its signature or without, its sizes of 8 bytes or of 4.

    It must be one of these four to the byte, and none begins as another does, as no size of a .npy file is 0.
    """
    numbers = member.crc, member.stored, member.size
    got = source.read(at, 24)  # which the directory and the end record are longer than, so that there are as many
    for sizes in ("<L2Q", "<L2L"):
        if sizes == "<L2Q" or max(numbers) <= WIDE:
            for signature in (b"PK\7\x08", b""):
                if got.startswith(record := signature + struct.pack(sizes, *numbers)):
                    return len(record)
    wanted = f"CRC {member.crc:08x}, {member.stored} and {member.size} bytes"
    raise BadZipFile(
        f"{member.name} must be followed by its descriptor, of {wanted} as the directory says, got {got!r}"
    )


def _with_zip64(name: str, extra: bytes, *numbers: int) -> tuple[int, ...]:
    """The numbers, where WIDE stands for the next one of the zip64 extra field, which must have just those."""
    n = numbers.count(WIDE)
    allowed, rest, long = NOTES | ({1: (8 * n,)} if n else {}), extra, b""
    while len(rest) >= 4:
        kind, size = struct.unpack_from("<2H", rest)
        if size not in allowed.pop(kind, ()) or len(rest) < 4 + size:
            break
        long, rest = rest[4 : 4 + size] if kind == 1 else long, rest[4 + size :]
    if rest or 1 in allowed:
        raise BadZipFile(
            f"{name} must have no extra field but zip64's, with {n} numbers, and those of times and owners "
            f"(as `zip -X` leaves out), got {extra[:36]!r}"
        )
    wide = iter(struct.unpack(f"<{n}Q", long))
    return tuple(next(wide) if number == WIDE else number for number in numbers)


def _check(member: Member) -> None:
    name, flags, method, _, stored, size, _ = member
    for good, law in (
        (not flags & 1, "must not be encrypted"),
        (not flags & ~HARMLESS, f"must have flags of {HARMLESS:#06x} at most, got {flags:#06x}"),
        (method in (ZIP_STORED, ZIP_DEFLATED), f"must be stored or deflated (method 0 or 8), got method {method}"),
        (method or stored == size, f"is stored, so it must take its own size {size} in the archive, got {stored}"),
        (size <= RATIO * stored, f"must unpack to at most {RATIO} times its own {stored} bytes, got {size}"),
    ):
        if not good:
            raise BadZipFile(f"{name} {law}")


def _inflate(pieces: Iterator[bytes], member: Member) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        while not inflater.eof:
            packed = inflater.unconsumed_tail or next(pieces, b"")
            unpacked = inflater.decompress(packed, CHUNK)
            if not packed and not unpacked:
                raise BadZipFile(f"{member.name} must hold a whole deflate stream, got one that breaks off")
            yield unpacked
    except zlib.error as error:
        raise BadZipFile(f"{member.name} must hold a deflate stream, got one with {error}") from error
    if inflater.unused_data or next(pieces, b""):
        raise BadZipFile(f"{member.name} must hold one deflate stream and nothing after it")


def _name(raw: bytes) -> str:
    """Printable ASCII as it is, the rest as escapes: they may be shown, and no rule for names lets a backslash pass."""
    return repr(raw)[2:-1]


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def write(file: BinaryIO, members: Iterable[tuple[str, tuple[bytes | memoryview, ...]]]) -> None:
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


def _put(file: BinaryIO, *parts: bytes | memoryview) -> int:
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
