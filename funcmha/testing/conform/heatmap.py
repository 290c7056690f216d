"""|error| / bound as pictures: PNGs of one pixel an entry, in six colours.

The colours go from light to dark, so that they are told apart without colour too.
"""

import struct
import zlib
from base64 import b64encode
from typing import NamedTuple

import numpy as np

from funcmha._arrays import Array

LEGEND = (  # up to which ratio, the colour, what it says
    (1.0, "#dfe8f2", "up to 1: ok"),
    (8.0, "#fbd24e", "to 8: loose"),
    (1e2, "#fe9929", "to 100"),
    (1e4, "#d95f0e", "to 10,000"),
    (float("inf"), "#993404", "above"),
    (float("nan"), "#14143c", "NaN, or must be exactly 0"),
)
MOST = 160  # pixels along an axis: what is longer is pooled, by its largest
AXES = {
    "o": ("sample", "head", "query", "width"),
    "lse": ("sample", "head", "query"),
    "weights": ("sample", "head", "query", "key"),
    "dq": ("sample", "head", "query", "width"),
    "dk": ("sample", "key/value head", "key", "width"),
    "dv": ("sample", "key/value head", "key", "width"),
    "dbias": ("sample", "head", "query", "key"),
    "dsink": ("head",),
    "dbias_k": ("key/value head", "width"),
    "dbias_v": ("key/value head", "width"),
}


class Map(NamedTuple):
    says: str  # of what it is
    down: str  # the axis down, and how long it is
    across: str
    shape: tuple[int, int]  # in pixels
    source: str  # a data URL


def maps(quantity: str, ratios: Array) -> list[Map]:
    """Over heads and positions, the largest along the rest; and of the worst head alone, entry by entry"""
    axes = AXES[quantity]
    if ratios.ndim != len(axes) or not ratios.size:  # what is missing or has another shape is told in words
        return []
    if ratios.ndim < 3:
        two = ratios.reshape(-1, ratios.shape[-1])
        return [_map("", two, axes[0] if ratios.ndim == 2 else "", axes[-1])]
    by_head = ratios.reshape(-1, *ratios.shape[2:])
    largest = by_head if by_head.ndim == 2 else by_head.max(-1)
    heads = _map("all samples and heads", largest, f"{axes[1]}s, sample by sample", axes[2])
    if by_head.ndim == 2:
        return [heads]
    worst = int(largest.max(-1).argmax())
    sample, head = divmod(worst, ratios.shape[1])
    return [heads, _map(f"sample {sample}, {axes[1]} {head}", by_head[worst], axes[2], axes[3])]


def _map(says: str, ratios: Array, down: str, across: str) -> Map:
    n, m = ratios.shape
    small = _pooled(_pooled(ratios, 0), 1)
    labels = f"{down} 0 … {n - 1}" if down else "", f"{across} 0 … {m - 1}"
    return Map(says, *labels, small.shape, f"data:image/png;base64,{b64encode(png(classes(small))).decode()}")


def _pooled(a: Array, axis: int) -> Array:
    step = -(-a.shape[axis] // MOST)
    pooled: Array = np.maximum.reduceat(a, np.arange(0, a.shape[axis], step), axis=axis)
    return pooled


def classes(ratios: Array) -> Array:
    """The places of ratios in LEGEND"""
    limits = [limit for limit, _, _ in LEGEND[:-2]]
    return np.where(np.isfinite(ratios), np.searchsorted(limits, ratios), len(LEGEND) - 1).astype(np.uint8)


def png(indices: Array) -> bytes:
    """An image of these colours of LEGEND (PNG specification, third edition, sections 5 and 11)"""
    n, m = indices.shape
    palette = b"".join(bytes.fromhex(colour[1:]) for _, colour, _ in LEGEND)
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    header = struct.pack(">IIBBBBB", m, n, 8, 3, 0, 0, 0)  # 8 bits, of a palette
    chunks = (b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
