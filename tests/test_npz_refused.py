"""funcmha.npz: what is not sound is refused, whatever it is, before it costs memory.

Every bad file has one fault, planted in a good one by `npy`, `zipped` or `patched`, and is refused for that fault.
"""

import io
import pickle
import struct
import subprocess
import tracemalloc
import zipfile
import zlib
from contextlib import suppress
from shutil import which
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcmha import npz, tree
from funcmha.npz import archive

MiB = 2**20


def npy(descr="'<f4'", shape="(3, 5)", order="False", data=bytes(60), version=(1, 0), header=None, length=None):
    """A .npy file: right, but for what is given."""
    text = header or f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
    length = len(text) if length is None else length
    return (
        b"\x93NUMPY" + bytes(version) + length.to_bytes(2 if version == (1, 0) else 4, "little") + text.encode() + data
    )


class Pipe(io.BytesIO):
    """Takes what is written, and cannot be gone back in."""

    def seekable(self):
        return False

    def seek(self, *where):
        raise io.UnsupportedOperation("seek")

    tell = seek


def zipped(*members, method=zipfile.ZIP_STORED, wide=False, extra=b"", to=io.BytesIO):
    """What zipfile makes of (name, data) pairs, whatever the names; with zip64 records wherever it can if `wide`."""
    buffer = to()
    with (
        mock.patch.object(zipfile, "ZIP64_LIMIT", 0 if wide else 2**31),
        zipfile.ZipFile(buffer, "w", method) as archive,
    ):
        for name, data in members:
            info = zipfile.ZipInfo()
            info.filename, info.compress_type, info.file_size = name, method, len(data)  # ZipInfo(name) would mend it
            info.extra = extra
            with archive.open(info, "w") as member:
                member.write(data)
    return buffer.getvalue()


FIELDS = {  # of each record: offset and struct code
    "local": (b"PK\3\4", {"flags": "6H", "method": "8H", "crc": "14L", "stored": "18L", "size": "22L", "name": "30B"}),
    "central": (
        b"PK\1\2",
        {"flags": "8H", "method": "10H", "crc": "16L", "stored": "20L", "size": "24L"}
        | {"length": "28H", "comment": "32H", "disk": "34H", "offset": "42L", "name": "46B"},
    ),
    "end": (b"PK\5\6", {"disk": "4H", "here": "8H", "count": "10H", "size": "12L", "start": "16L", "comment": "20H"}),
    "end64": (b"PK\6\6", {"length": "4Q", "count": "32Q", "start": "48Q"}),
    "locator": (b"PK\6\7", {"at": "8Q", "disks": "16L"}),
}


def patched(data, both=None, **records):
    """`data` with other numbers in the last record of each kind; `both` is local and central."""
    data = bytearray(data)
    for record, values in ({"local": both, "central": both} if both else records).items():
        signature, fields = FIELDS[record]
        for field, value in values.items():
            offset, code = fields[field][:-1], fields[field][-1]
            struct.pack_into(f"<{code}", data, data.rindex(signature) + int(offset), value)
    return bytes(data)


def deflated(data):
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def from_numpy(save, *args, to=io.BytesIO, **arrays):
    """The file that np.save, np.savez or np.savez_compressed writes."""
    buffer = to()
    save(buffer, *args, **arrays)
    return buffer.getvalue()


ONE = zipped(("w.npy", npy()))
TWO = zipped(("v.npy", npy()), ("w.npy", npy()))
WIDE = zipped(("w.npy", npy()), wide=True)
PACKED = zipped(("w.npy", npy()), method=zipfile.ZIP_DEFLATED)
AT = ONE.index(b"PK\1\2")  # where its directory begins


PIPED = zipped(("w.npy", npy()), to=Pipe)  # whose sizes and checksum follow the data, in a descriptor
AFTER = PIPED.index(b"PK\7\x08")


BEFORE = {"crc": zlib.crc32(npy()), "stored": len(npy()), "size": len(npy())}


def followed(descriptor, piped=PIPED):
    """`piped` with another descriptor of its one member."""
    at, end = piped.index(b"PK\7\x08"), piped.index(b"PK\1\2")
    return patched(piped[:at] + descriptor + piped[end:], end={"start": at + len(descriptor)})


def described(signature=b"PK\7\x08", numbers="2L", **others):
    """A descriptor: right, but for what is given."""
    return signature + struct.pack(f"<L{numbers}", *(BEFORE | others).values())


def stream(packed):
    """An archive with one deflated member: `packed`, said to unpack to npy()."""
    return patched(zipped(("w.npy", packed)), both={"method": 8, "size": len(npy()), "crc": zlib.crc32(npy())})


def headed(header):
    return zipped(("w.npy", npy(header=header)))


def typed(descr):
    return zipped(("w.npy", npy(descr=descr)))


def shaped(shape, n=60):
    return zipped(("w.npy", npy(shape=shape, data=bytes(n))))


STRUCTURE = {
    "empty": (b"", "no npz file: it is empty"),
    "text": (b"not an archive, but longer than an end record", "it starts with 'not an a'"),
    "short text": (b"a", "it starts with 'a'"),
    "pickle": (pickle.dumps({"w": np.zeros(5)}), r"it starts with b'\\x80\\x04\\x95"),
    "bare npy": (npy(), r"it starts with b'\\x93NUMPY\\x01\\x00'"),
    "beginning": (ONE[:20], "at least 22 bytes, got 20"),
    "cut at the end": (ONE[:-1], "zip end record"),
    "cut in the middle": (ONE[:99], "zip end record"),
    "cut in front": (ONE[1:], "it starts with"),
    "junk before": (b"junk" + ONE, "it starts with"),
    "what may be an archive before": (b"PK\5\6" + ONE, "directory must end at"),
    "junk before, counted": (
        patched(b"PK\5\6" + ONE, central={"offset": 4}, end={"start": AT + 4}),
        "must begin at byte 0, where the one before it ends, got 4",
    ),
    "junk before the directory": (
        patched(ONE[:AT] + b"junk" + ONE[AT:], end={"start": AT + 4}),
        f"directory must begin at byte {AT}, where the last member ends, got {AT + 4}",
    ),
    "junk after": (ONE + b"\0", "zip end record"),
    "comment": (patched(ONE, end={"comment": 4}) + b"junk", "zip end record"),
    "comment of no bytes there": (patched(ONE, end={"comment": 4}), "zip end record"),
    "comment of a member": (patched(ONE, central={"comment": 1}), "without a comment"),
    "member of another disk": (patched(ONE, central={"disk": 1}), "on disk 0, got disk 1"),
    "one part of many": (patched(ONE, end={"disk": 1}), "must be whole, got part 1"),
    "fewer members here": (patched(ONE, end={"here": 0}), "must be whole"),
    "more members counted": (patched(ONE, end={"count": 2, "here": 2}), "must list 2 members .* got 1"),
    "directory too long": (patched(ONE, end={"size": 2**32 - 1}), "directory must end"),
    "directory of junk": (b"PK\5\6" + bytes(42) + patched(zipped(), end={"size": 46}), "one record after another"),
    "directory cut": (patched(ONE[:AT] + ONE[AT : AT + 30] + ONE[-22:], end={"size": 30}), "one record after another"),
    "name past the directory": (patched(ONE, central={"length": 6}), "must end within the directory"),
    "no local header": (b"PK\3\5".join(TWO.rsplit(b"PK\3\4", 1)), "local header must be at byte [1-9]"),
    "zip64 end record elsewhere": (patched(WIDE, locator={"at": 0}), "zip64 end record must be at"),
    "zip64 end record longer": (patched(WIDE, end64={"length": 45}), "zip64 end record must be at"),
    "zip64 on two disks": (patched(WIDE, locator={"disks": 2}), "zip64 end record must be at"),
    "zip64 end record differs": (patched(WIDE, end={"count": 2, "here": 2}), "both end records must agree"),
    "zip64 alone": (WIDE[-42:], "the file must have 56 bytes at byte -56"),
    "encrypted": (patched(ONE, both={"flags": 1}), "w.npy must not be encrypted"),
    "sizes after the data, which are not there": (patched(ONE, both={"flags": 8}), "be followed by its descriptor, of"),
    "sizes after the data, of the local header alone": (patched(ONE, local={"flags": 8}), "must be alike"),
    "sizes after the data, of the directory alone": (patched(ONE, central={"flags": 8}), "must be alike"),
    "sizes after the data, without the flag": (patched(PIPED, both={"flags": 0}), "must be alike"),
    "a descriptor without the flag": (
        patched(patched(PIPED, local=BEFORE), both={"flags": 0}),
        f"the directory must begin at byte {AFTER}, where the last member ends, got {AFTER + 16}",
    ),
    "a descriptor with another checksum": (followed(described(crc=9)), "followed by its descriptor, of CRC"),
    "a descriptor with another size": (followed(described(size=9)), "followed by its descriptor, of CRC"),
    "a descriptor with another size stored": (followed(described(stored=9)), "followed by its descriptor, of CRC"),
    "a descriptor with another signature": (followed(described(b"PK\7\7")), "followed by its descriptor, of CRC"),
    "a descriptor of a signature alone": (followed(b"PK\7\x08"), "followed by its descriptor, of CRC"),
    "a descriptor that breaks off": (followed(described()[:-1]), "followed by its descriptor, of CRC"),
    "a descriptor of no bytes": (followed(b""), "followed by its descriptor, of CRC"),
    "a descriptor twice": (followed(2 * described()), "the directory must begin at byte"),
    "a descriptor and a rest": (followed(described() + b"\0"), "the directory must begin at byte"),
    "a wide descriptor with a rest": (followed(described(numbers="2Q") + bytes(4)), "the directory must begin at byte"),
    "another checksum before than after": (
        patched(PIPED, local={"crc": 9}),
        "must be alike in its local header and in",
    ),
    "another size before than after": (patched(PIPED, local={"size": 9}), "must be alike in its local header and in"),
    "another size stored before than after": (patched(PIPED, local={"stored": 9}), "must be alike in its local header"),
    "a size of the directory alone": (patched(PIPED, central={"size": 9}), "is stored, so it must take its own size 9"),
    "sizes of the directory alone": (
        patched(PIPED, central={"size": 9, "stored": 9}),
        "followed by its descriptor, of",
    ),
    "a checksum of the directory alone": (
        patched(PIPED, central={"crc": 9}),
        "its descriptor, of CRC 00000009, 130 and 130 b",
    ),
    "4 GiB of zeros in a pipe": (
        patched(zipped(("w.npy", npy()), method=zipfile.ZIP_DEFLATED, to=Pipe), central={"size": 2**32 - 2}),
        "w.npy must unpack to at most 1032 times its own",
    ),
    "patched data": (patched(ONE, both={"flags": 0x20}), "must have flags of 0x080e at most, got 0x0020"),
    "bzip2": (zipped(("w.npy", npy()), method=zipfile.ZIP_BZIP2), "stored or deflated .*, got method 12"),
    "local name differs": (patched(ONE, local={"name": ord("v")}), "must be alike in its local header"),
    "local size differs": (patched(ONE, local={"size": 9}), "must be alike in its local header"),
    "local checksum differs": (patched(ONE, local={"crc": 9}), "must be alike in its local header"),
    "local method differs": (patched(ONE, local={"method": 8}), "must be alike in its local header"),
    "stored size differs": (patched(ONE, both={"size": 9}), "must take its own size 9"),
    "overlap": (patched(TWO, central={"offset": 0}), "where the one before it ends, got 0"),
    "past the directory": (patched(ONE, both={"stored": 999, "size": 999}), "must end before the directory"),
    "extra field": (zipped(("w.npy", npy()), extra=b"UT\0\0"), "no extra field but zip64's, with 0 numbers"),
    "zip64 field and another": (zipped(("w.npy", npy()), wide=True, extra=b"UT\0\0"), "no extra field but zip64's"),
    "extra field of no kind": (zipped(("w.npy", npy()), extra=b"up\5\0\1word"), "no extra field but zip64's"),
    "extra field that breaks off": (zipped(("w.npy", npy()), extra=b"UT\x0d\0\3time"), "no extra field but zip64's"),
    "extra field and a rest": (zipped(("w.npy", npy()), extra=b"UT\5\0\3timeUT"), "no extra field but zip64's"),
    "extra field twice": (zipped(("w.npy", npy()), extra=2 * b"UT\5\0\3time"), "no extra field but zip64's"),
    "zip64 field of nothing": (zipped(("w.npy", npy()), extra=b"\1\0\0\0"), "no extra field but zip64's"),
    "zip64 field that is not there": (
        patched(ONE, both={"size": 2**32 - 1}),
        "no extra field but zip64's, with 1 numb",
    ),
    "zip64 field of too few": (WIDE.replace(struct.pack("<2H", 1, 16), struct.pack("<2H", 1, 8)), "no extra field"),
    "deflate breaks off": (stream(deflated(npy())[:-1]), "breaks off"),
    "deflate goes on": (stream(deflated(npy()) + b"junk"), "nothing after it"),
    "deflate in two": (stream(deflated(npy()) + deflated(b"")), "nothing after it"),
    "not deflate": (stream(b"\7" * 9), "must hold a deflate stream, got"),
    "deflate of more": (stream(deflated(npy() + b"\0")), f"must unpack to {len(npy())} bytes, got more"),
    "deflate of less": (stream(deflated(npy()[:-1])), f"must unpack to {len(npy())} bytes, got {len(npy()) - 1}"),
    "checksum, deflated": (patched(PACKED, both={"crc": 9}), "must have CRC 00000009"),
    "4 GiB of zeros": (patched(PACKED, both={"size": 2**32 - 2}), "w.npy must unpack to at most 1032 times its own"),
}
NAMES = {
    ascii(name)[:30]: (zipped((name, npy())), "must be named in letters")
    for name in [
        "", "w", ".npy", "w.npz", "w.npy.txt", "w .npy", "w-1.npy", "w..npy", ".w.npy", "../w.npy", "/w.npy", "a/w.npy",
        "a\\w.npy", "C:w.npy", "w.npy/", "w.npy\0", "w\0.npy", "w\n.npy", "w.npy\n", "\u202ew.npy", "é.npy", "٣.npy",
        "__class__.npy", "a.__init__.b.npy", "a" * 252 + ".npy",
    ]
}  # fmt: skip
TOGETHER = {
    "twice": (TWO.replace(b"v.npy", b"w.npy"), "w must be there once"),
    "w and w.npy": (zipped(("w.npy", npy()), ("w.npy.npy", npy())), "w.npy runs through a leaf"),
    "branch and leaf": (zipped(("w.b.npy", npy()), ("w.npy", npy())), "w is both a leaf and a branch"),
}
NPY = {
    "no bytes": (zipped(("w.npy", b"")), "w.npy must begin with"),
    "no magic": (zipped(("w.npy", b"\x94" + npy()[1:])), "w.npy must begin with"),
    "magic alone": (zipped(("w.npy", npy()[:6])), r"npy version .*, got \(\)"),
    "version 0.1": (zipped(("w.npy", npy(version=(0, 1)))), r"npy version .*, got \(0, 1\)"),
    "version 1.1": (zipped(("w.npy", npy(version=(1, 1)))), r"npy version .*, got \(1, 1\)"),
    "version 4.0": (zipped(("w.npy", npy(version=(4, 0)))), r"npy version .*, got \(4, 0\)"),
    "length alone": (zipped(("w.npy", npy(version=(2, 0))[:10])), "header of at most 10000 bytes, within its own 10"),
    "length 4 GiB": (zipped(("w.npy", npy(version=(2, 0), length=2**32 - 1))), "got 4294967295"),
    "length 10001": (headed(npy()[10:-61].decode() + " " * (10_001 - len(npy()) + 71)), "got 10001"),
    "length past the end": (zipped(("w.npy", npy(data=b"", length=99))), "within its own"),
    "length 0": (zipped(("w.npy", npy(length=0))), "must have a header like"),
    "not a dict": (headed("('<f4', False, (3, 5))"), "must have a header like"),
    "not closed": (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 5)"), "must have a header like"),
    "two dicts": (headed("{'descr': '<f4', 'fortran_order': False}, {'shape': (3, 5)}"), "must have a header like"),
    "no descr": (headed("{'fortran_order': False, 'shape': (3, 5)}"), "must have a header like"),
    "no fortran_order": (headed("{'descr': '<f4', 'shape': (3, 5)}"), "must have a header like"),
    "no shape": (headed("{'descr': '<f4', 'fortran_order': False}"), "must have a header like"),
    "extra key": (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 5), 'a': True}"), "a header like"),
    "key twice": (headed("{'descr': '<f4', 'shape': (3, 5), 'shape': (3, 5)}"), "must have a header like"),
    "order 0": (zipped(("w.npy", npy(order="0"))), "must have a header like"),
    "order a string": (zipped(("w.npy", npy(order="'C'"))), "must have a header like"),
    "code": (shaped("print((3, 5))"), "must have a header like"),
}
DTYPES = {
    descr: (typed(f"'{descr}'"), "w.npy must have dtype float16, float32 or float64, got")
    for descr in [
        "|O",
        "<i4",
        "<u8",
        "|b1",
        "<c8",
        "<f16",
        "<g",
        "<U5",
        "|S4",
        "|V4",
        "<V2",
        "<M8[ns]",
        "f4",
        "=f4",
        "float32",
    ]
} | {
    "structured": (typed("[('a', '<f4')]"), "must have a header like"),
    "sub-array": (typed("('<f4', (2,))"), "must have a header like"),
    "object": (from_numpy(np.savez, w=np.array([{}])), "must have dtype"),
    "bfloat16": (from_numpy(np.savez, w=np.ones(3, ml_dtypes.bfloat16)), "bfloat16, perhaps, .* save it as float32"),
}
SHAPES = {
    shape: (shaped(shape), "must have a header like")
    for shape in [
        "3",
        "(3)",
        "[3, 5]",
        "(-3, -5)",
        "(3., 5)",
        "(True,)",
        "(3, 5",
        "(,)",
        "(03, 5)",
        "(0xf,)",
        "(9" * 20 + ",)",
    ]
} | {
    "one byte too few": (shaped("(3, 5)", 59), r"must have 60 bytes after its header for float32 \(3, 5\), got 59"),
    "one byte too many": (shaped("(3, 5)", 61), r"must have 60 bytes after its header for float32 \(3, 5\), got 61"),
    "zero-size with bytes": (shaped("(3, 0)", 4), "must have 0 bytes"),
    "4 TiB": (shaped(f"({2**40},)"), f"must have {2**42} bytes"),
    "wraps to 60 bytes": (shaped(f"({2**32}, {2**30}, 15)"), "must have a shape that NumPy can hold"),
    "zero-size beyond NumPy": (shaped(f"(0, {2**62}, 2)", 0), "must have a shape that NumPy can hold"),
    "33 dimensions": (shaped("(" + "1," * 33 + ")", 4), "must have at most 32 dimensions, got 33"),
}
REFUSED = STRUCTURE | NAMES | TOGETHER | NPY | DTYPES | SHAPES
STALE = zipped(("w.npy", npy(data=bytes(59) + b"\1"))).replace(
    bytes(59) + b"\1", bytes(60)
)  # the stored checksum is not right


NUMBERS = {
    "q_proj": {"w": np.arange(15.0).reshape(3, 5)},
    "scale": np.float16(0.5),
    "none": np.zeros((0, 7), "float32"),
}
GOOD = [
    from_numpy(np.savez, **tree.flatten(NUMBERS)),
    from_numpy(np.savez_compressed, **tree.flatten(NUMBERS)),
    zipped(*((f"{key}.npy", from_numpy(np.save, x)) for key, x in tree.flatten(NUMBERS).items()), wide=True),
]


def noted(method, wide):
    """As Info-ZIP has it: of two times the directory has one, and notes stand on both sides of zip64's numbers."""
    buffer = io.BytesIO()
    with (
        mock.patch.object(zipfile, "ZIP64_LIMIT", 0 if wide else 2**31),
        zipfile.ZipFile(buffer, "w", method) as archive,
    ):
        for key, x in tree.flatten(NUMBERS).items():
            info, data = zipfile.ZipInfo(f"{key}.npy"), from_numpy(np.save, x)
            info.compress_type, info.file_size, info.extra = method, len(data), b"UT\x09\0\3timetime" + OWNER
            with archive.open(info, "w") as member:
                member.write(data)
            info.extra = b"UT\5\0\3time" + OWNER
    return buffer.getvalue()


OWNER = b"ux\x0b\0\1\4user\4grou"
STREAMED = [
    from_numpy(np.savez, **tree.flatten(NUMBERS), to=Pipe),
    from_numpy(np.savez_compressed, **tree.flatten(NUMBERS), to=Pipe),
    *(zipped(*((f"{key}.npy", from_numpy(np.save, x)) for key, x in tree.flatten(NUMBERS).items()), method=m, to=Pipe)
      for m in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)),
]  # fmt: skip
GOOD += STREAMED
NOTED = [noted(method, wide) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for wide in (False, True)]
GOOD += NOTED


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.npz"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One path for all the examples of a property."""
    return tmp_path_factory.mktemp("npz") / "model.npz"


def written(path, data):
    path.write_bytes(data)
    return path


def bits(params):
    """Of each leaf: dtype, but for the byte order, shape and bits."""
    return {
        key: (x.dtype.name, x.shape, x.astype(x.dtype.newbyteorder("=")).tobytes())
        for key, x in tree.flatten(params).items()
    }


@pytest.mark.parametrize("read", [npz.load, npz.entries])
@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_file_is_refused(path, read, data, reason):
    with pytest.raises(npz.ParameterFileError, match=reason) as refusal:
        read(written(path, data))
    assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize("chunk", [1, 7, len(deflated(npy()))])
def test_it_matters_to_no_file_where_its_pieces_end(path, chunk):
    zeros = npy(shape="(29,)", data=bytes(4 * 29))  # 114 of which come after the last byte of the stream is taken in
    with mock.patch.object(archive, "CHUNK", chunk):
        assert not npz.load(written(path, zipped(("w.npy", zeros), method=zipfile.ZIP_DEFLATED)))["w"].any()
        for good in GOOD:
            assert bits(npz.load(written(path, good))) == bits(NUMBERS)
        for bad, reason in STRUCTURE.values():
            with pytest.raises(npz.ParameterFileError, match=reason):
                npz.load(written(path, bad))


@pytest.mark.parametrize("data", STREAMED, ids=["savez", "savez_compressed", "stored", "deflated"])
def test_a_file_that_was_written_to_a_pipe_is_read(path, data):
    """By NumPy and by other programs: a descriptor with numbers of 8 bytes, or of 4, after each member."""
    assert data.count(b"PK\7\x08") == len(tree.flatten(NUMBERS))
    assert bits(npz.load(written(path, data))) == bits(NUMBERS)
    assert npz.entries(path).keys() == tree.flatten(NUMBERS).keys()
    with np.load(path) as theirs:
        assert bits(npz.load(path)) == bits(tree.unflatten(dict(theirs)))


@pytest.mark.parametrize("signature", [b"PK\7\x08", b""], ids=["signed", "bare"])
@pytest.mark.parametrize("numbers", ["2L", "2Q"])
@pytest.mark.parametrize("local", [{}, {"size": len(npy())}, BEFORE], ids=len)
def test_every_form_of_a_descriptor_is_read(path, signature, numbers, local):
    """With what the writer knew before: nothing, as Go and Java; or sizes, as Info-ZIP."""
    data = followed(described(signature, numbers=numbers), patched(PIPED, local=local))
    assert (npz.load(written(path, data))["w"] == np.zeros((3, 5))).all()
    assert (npz.load(path, mmap=True)["w"] == np.zeros((3, 5))).all()


@given(st.sampled_from(STREAMED), st.data())
def test_no_byte_of_a_descriptor_may_be_another(scratch, good, data):
    starts = [i for i in range(len(good)) if good.startswith(b"PK\7\x08", i)]
    at = data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, 15))
    other = data.draw(st.integers(1, 255))
    written(scratch, good[:at] + bytes([good[at] ^ other]) + good[at + 1 :])
    with pytest.raises(npz.ParameterFileError, match="must be followed by its descriptor, of CRC"):
        npz.load(scratch)


@pytest.mark.skipif(not which("zip"), reason="Info-ZIP's zip is not installed")
@pytest.mark.parametrize("options", [(), ("-0",), ("-X",), ("-fd",)], ids=lambda o: "".join(o) or "plain")
def test_what_info_zip_writes_to_a_pipe_is_read(tmp_path, options):
    with zipfile.ZipFile(io.BytesIO(GOOD[0])) as archive:
        archive.extractall(tmp_path)
        names = archive.namelist()
    packed = subprocess.run(
        ["zip", "-q", *options, "-", *names], cwd=tmp_path, check=True, timeout=60, stdout=-1
    ).stdout
    assert list(bits(npz.load(io.BytesIO(packed))).items()) == list(bits(NUMBERS).items())


@pytest.mark.parametrize("data", NOTED)
def test_notes_of_times_and_owners_are_read_over(path, data):
    assert bits(npz.load(written(path, data))) == bits(NUMBERS)


@pytest.mark.parametrize(
    "note", [b"UT\x0d\0\7" + bytes(12), b"UX\x0c\0" + bytes(12), b"Ux\0\0", b"\n\0\x20\0" + bytes(32)]
)
def test_notes_of_other_programs_are_read_over(path, note):
    assert npz.load(written(path, zipped(("w.npy", npy()), extra=note)))["w"].shape == (3, 5)


@pytest.mark.skipif(not which("zip"), reason="Info-ZIP's zip is not installed")
@pytest.mark.parametrize("options", [(), ("-0",), ("-9",), ("-X",), ("-fz",)], ids=lambda o: "".join(o) or "plain")
def test_what_info_zip_packs_is_read(tmp_path, options):
    """A file taken apart and packed again by hand; and one that is mended in place."""
    with zipfile.ZipFile(io.BytesIO(GOOD[0])) as archive:
        archive.extractall(tmp_path)
        names = archive.namelist()
    subprocess.run(["zip", "-q", *options, "again.npz", *names], cwd=tmp_path, check=True, timeout=60)
    assert list(bits(npz.load(tmp_path / "again.npz")).items()) == list(bits(NUMBERS).items())
    subprocess.run(["zip", "-q", *options, "again.npz", names[0]], cwd=tmp_path, check=True, timeout=60)
    assert bits(npz.load(tmp_path / "again.npz")) == bits(NUMBERS)


def test_a_wrong_checksum_is_refused_when_the_numbers_are_read(path):
    assert npz.entries(written(path, STALE)).keys() == {"w"}
    with pytest.raises(npz.ParameterFileError, match=r"w.npy must have CRC [0-9a-f]{8}, got"):
        npz.load(path)


def test_the_good_files_of_which_the_bad_are_made_are_good(path):
    elsewhere = patched(WIDE, end={"start": 2**32 - 1, "size": 2**32 - 1, "count": 2**16 - 1, "here": 2**16 - 1})
    flagged = patched(ONE, both={"flags": 0x0806})
    for data in ONE, TWO, WIDE, elsewhere, flagged, PACKED, stream(deflated(npy())), headed(npy()[10:-60].decode()):
        assert (npz.load(written(path, data))["w"] == np.zeros((3, 5))).all()


NOISE = np.random.default_rng(0).bytes(120_000)  # so that 100 MiB are less than 1032 times as much
CLAIM = npy(shape=f"({25 * MiB},)", data=b"")  # to be 100 MiB
COSTLY = REFUSED | {
    "100 MiB that are not there": (
        patched(
            zipped(("v.npy", npy(shape="(30000,)", data=NOISE)), ("w.npy", deflated(CLAIM))),
            both={"method": 8, "size": len(CLAIM) + 100 * MiB},
        ),
        "must unpack to",
    ),
    "100 MiB that might be there": (
        patched(zipped(("w.npy", deflated(CLAIM + NOISE))), both={"method": 8, "size": len(CLAIM) + 100 * MiB}),
        f"must unpack to {len(CLAIM) + 100 * MiB} bytes, got {len(CLAIM) + len(NOISE)}",
    ),
    "64 MiB that are not told of": (
        zipped(("w.npy", npy(data=bytes(64 * MiB))), method=zipfile.ZIP_DEFLATED),
        f"w.npy must have 60 bytes after its header for float32 .*, got {64 * MiB}",
    ),
    "64 MiB said to be 60 bytes": (
        patched(zipped(("w.npy", npy(data=bytes(64 * MiB))), method=zipfile.ZIP_DEFLATED), both={"size": len(npy())}),
        f"must unpack to {len(npy())} bytes, got more",
    ),
    "700 members, the last one bad": (
        patched(zipped(*((f"{i}.w.npy", npy()) for i in range(700))), both={"flags": 1}),
        "must not be encrypted",
    ),
}


@pytest.mark.parametrize("read", [npz.load, npz.entries])
@pytest.mark.parametrize(("data", "reason"), COSTLY.values(), ids=COSTLY)
def test_a_refusal_costs_no_memory(path, read, data, reason):
    written(path, data)
    tracemalloc.start()
    try:
        with pytest.raises(npz.ParameterFileError, match=reason):
            read(path)
        assert tracemalloc.get_traced_memory()[1] <= 2 * len(data) + MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy_is_read(path, version):
    data = NOISE[:60]
    assert npz.load(written(path, zipped(("w.npy", npy(data=data, version=version)))))["w"].tobytes() == data


@pytest.mark.parametrize("header", [
    "{'shape': (3, 5), 'descr': '<f4', 'fortran_order': False}",
    "{'descr':'<f4','fortran_order':False,'shape':(3,5,),}",
    " { 'descr' : '<f4' , 'fortran_order' : False , 'shape' : ( 3 , 5 ) , } \n",
])  # fmt: skip
def test_keys_and_spaces_of_a_header_are_free(path, header):
    assert npz.load(written(path, headed(header)))["w"].shape == (3, 5)


@pytest.mark.parametrize("read", [npz.load, npz.entries])
def test_max_bytes_counts_unpacked_bytes(path, read):
    n = len(npy())
    assert read(written(path, PACKED), max_bytes=n).keys() == {"w"}
    with pytest.raises(npz.ParameterFileError, match=f"must unpack to at most max_bytes={n - 1} bytes, got {n}"):
        read(path, max_bytes=n - 1)


@given(st.sampled_from(GOOD), st.integers(0, 2**16), st.integers(0, 9), st.binary(max_size=9))
def test_damage_is_refused_or_without_effect(scratch, good, at, length, insert):
    at %= len(good)
    written(scratch, good[:at] + insert + good[at + length :])
    with suppress(npz.ParameterFileError):
        assert bits(npz.load(scratch)) == bits(NUMBERS)


def test_one_axis_in_fortran_order_gets_memory_of_its_own(path):
    w = npz.load(written(path, zipped(("w.npy", npy(shape="(15,)", order="True")))))["w"]
    assert w.shape == (15,)
    assert w.flags.owndata


def test_like_is_compared_before_numbers_are_read(path):
    with pytest.raises(KeyError):
        npz.load(written(path, STALE), like={"v": np.zeros((3, 5))})
