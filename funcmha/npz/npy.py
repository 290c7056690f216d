r"""The header of a .npy file: which dtype, which shape, which order, and where the numbers begin.

    \x93NUMPY │ version │ length │ {'descr': '<f4', 'fortran_order': False, 'shape': (3, 5), } │ spaces, newline

NumPy evaluates the header as a Python literal. Here it has a grammar of three items, so that nothing is evaluated: no
expression, no object, structured or sub-array dtype has words in it. Format: the docstring of `numpy.lib.format`,
versions 1.0 to 3.0. Whatever is wrong raises ValueError.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"\x93NUMPY"
LONGEST = 10_000  # bytes of a header, as numpy.load has it
HEAD = 12 + LONGEST  # bytes of a file that hold all of its header
NDIM = 32  # of NumPy 1, and enough for anyone

DTYPES = {f"'{order}f{n}'".encode(): np.dtype(f"{order}f{n}") for order in "<>" for n in (2, 4, 8)}

_SIZE = rb"(?:0|[1-9][0-9]{0,18})"
_SHAPE = rb"\( *(?:(?:%b *, *)+(?:%b *)?)?\)" % (_SIZE, _SIZE)
_ITEM = rb"'(\w+)' *: *('[\w<>=|\[\]]*'|True|False|%b)" % _SHAPE
_DICT = re.compile(rb" *\{ *(?:%b *, *)*(?:%b *)?\}[ \n]*" % (_ITEM, _ITEM))


class Header(NamedTuple):
    """What a .npy file holds: `nbytes` of numbers after its first `start` bytes."""

    dtype: np.dtype[Any]  # as stored: of either byte order
    shape: tuple[int, ...]
    fortran: bool
    start: int
    nbytes: int


def parse(head: bytes, size: int) -> Header:
    """The header of a .npy file of `size` bytes that begins with `head`, its first HEAD bytes or all."""
    if head[: len(MAGIC)] != MAGIC:
        raise ValueError(f"must begin with {MAGIC!r}, got {head[: len(MAGIC)]!r}")
    version = tuple(head[6:8])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"must have npy version (1, 0), (2, 0) or (3, 0), got {version}")
    text = 10 if version == (1, 0) else 12
    length = int.from_bytes(head[8:text], "little")
    start = text + length
    if length > LONGEST or start > size:
        raise ValueError(f"must have a header of at most {LONGEST} bytes, within its own {size}, got {length}")
    dtype, shape, fortran = _fields(head[text:start])
    nbytes = dtype.itemsize * math.prod(shape)
    if start + nbytes != size:
        raise ValueError(f"must have {nbytes} bytes after its header for {dtype} {shape}, got {size - start}")
    return Header(dtype, shape, fortran, start, nbytes)


def _fields(text: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    items = re.findall(_ITEM, text) if _DICT.fullmatch(text) else []
    found = dict(items)
    descr, order, shape = (found.get(key, b"") for key in (b"descr", b"fortran_order", b"shape"))
    if len(items) != 3 or order not in (b"True", b"False") or not shape.startswith(b"("):
        raise ValueError(
            "must have a header like {'descr': '<f4', 'fortran_order': False, 'shape': (3, 5)}, "
            f"got {text[:200].strip()!r}"
        )
    if descr not in DTYPES:
        hint = " (bfloat16, perhaps, which npz cannot tell: save it as float32)" if b"V2" in descr else ""
        raise ValueError(f"must have dtype float16, float32 or float64, got {descr.decode()}{hint}")
    dtype, sizes = DTYPES[descr], tuple(int(n) for n in re.findall(rb"\d+", shape))
    if len(sizes) > NDIM:
        raise ValueError(f"must have at most {NDIM} dimensions, got {len(sizes)}")
    # NumPy's own limit, which leaves sizes of 0 out of the product.
    if dtype.itemsize * math.prod(n or 1 for n in sizes) >= 2**63:
        raise ValueError(f"must have a shape that NumPy can hold, got {sizes}")
    return dtype, sizes, order == b"True"


def header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The first bytes of a .npy file, version 1.0, in C order; the numbers begin at a multiple of 64 bytes."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return MAGIC + b"\1\0" + len(text).to_bytes(2, "little") + text.encode()
