"""Parameters, gradients and arrays, cut for the ranks of a line and put together again.

Axes: T tokens, C width; those of parameters are in `funcmha.params.SPEC`.
"""

from typing import Any

import numpy as np

from funcmha import _check, tree
from funcmha._arrays import Array, downcast, dtype_name, from_host, namespace, unset, upcast
from funcmha.params import SPEC, Params, at_heads, sizes

from .agreement import Facts, agree
from .attention import check_lengths, check_line, check_real
from .comm import Comm, contiguous
from .line import Line

MOST_AXES = 8


def shard(params: Params, line: Line, /) -> Params:
    """The parameters of this rank's heads, as views: the axes H and K of `SPEC` are cut, all others stay

    Key/value heads as `numpy.array_split` cuts them, and the query heads that read them; a rank may have none. A line
    that does not cut heads leaves every leaf whole.
    """
    check_line(line)
    H, K, *_ = sizes(params)
    rank, layout = line.comm.rank, line.layout
    return at_heads(params, {"H": layout.query_heads(H, K, rank), "K": layout.kv_heads(K, rank)}, SPEC)


def unshard(params: Params, line: Line, /) -> Params:
    """The parameters, or gradients, of all heads from those of each rank: the inverse of `shard`, on every rank"""
    check_line(line)
    return tree.unflatten({name: _joined(line, name, x) for name, x in tree.flatten(params).items()})


def heads_axis(name: str) -> int | None:
    """The axis of a leaf along which heads are, counted from its end; None for none"""
    axes = SPEC[name].split()
    return next((i - len(axes) for i, axis in enumerate(axes) if axis in "HK"), None)


def _joined(line: Line, name: str, x: Array) -> Array:
    axis, comm = heads_axis(name), line.heads
    if axis is None or comm.size == 1:
        return x
    counts = [np.empty(1, np.int64) for _ in range(comm.size)]
    comm.all_gather(np.array([x.shape[axis]]), counts)
    shape = [*x.shape]
    out = []
    for n in counts:
        shape[axis] = int(n[0])
        out.append(unset(tuple(shape), x))
    comm.all_gather(contiguous(x), out)
    return namespace(x).concat(out, axis=axis)


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def all_reduce(line: Line, x: Any, /) -> Any:
    """Σ x over all ranks, on every rank     of a tree of arrays, or one array

    For gradients of data parallel training: the arrays of one dtype are one message, their sum is in the order of the
    ranks, and half types are added up in float32 and rounded once.
    """
    check_line(line)
    leaves = tree.flatten({"x": x})

    def local() -> tuple[Facts, tuple[int, ...]]:
        for name, a in leaves.items():
            _check.one_dtype([(name.removeprefix("x."), a)])
        return {name.removeprefix("x."): f"{tuple(a.shape)} of {a.dtype}" for name, a in leaves.items()}, ()

    agree(line.comm, local)
    return tree.unflatten(total(line.comm, leaves))["x"]


def total(comm: Comm, leaves: dict[str, Array]) -> dict[str, Array]:
    """The sums of the leaves over the ranks, of checked arrays"""
    if comm.size == 1:
        return leaves
    sums: dict[str, Array] = {}
    for dtype in {str(a.dtype): a.dtype for a in leaves.values()}.values():
        some = {name: upcast(a) for name, a in leaves.items() if a.dtype == dtype}
        xp = namespace(next(iter(some.values())))
        flat = comm.all_reduce(xp.concat([xp.reshape(a, (-1,)) for a in some.values()]))
        start = 0
        for name, a in some.items():
            size = int(np.prod(a.shape))
            sums[name] = downcast(xp.reshape(flat[start : start + size], tuple(a.shape)), dtype)
            start += size
    return {name: sums[name] for name in leaves}


# ── from one rank and back ───────────────────────────────────────────────────────────────────────────────────────


def scatter(line: Line, x: Array = None, /) -> Array:
    """x[..., line.positions(T), :] on every rank, of the x (..., T, C) that rank 0 has; the others give None"""
    check_line(line)
    comm = line.comm

    def local() -> tuple[Facts, tuple[int, ...]]:
        if comm.rank:
            return {}, (0,) * (2 + MOST_AXES)
        _check.one_dtype([("x", x)])
        check_real("x", x)
        if not 2 <= x.ndim <= MOST_AXES:
            raise ValueError(f"x must be (..., T, C) of {MOST_AXES} axes or fewer, got {tuple(x.shape)}")
        return {}, (_check.DTYPES.index(dtype_name(x)), x.ndim, *x.shape, *(0,) * (MOST_AXES - x.ndim))

    dtype, n, *shape = (int(number) for number in agree(comm, local)[0])
    *batch, T, C = shape[:n]
    counts = [line.layout.num_tokens(T, rank) for rank in range(comm.size)]
    own = comm.empty((*batch, counts[comm.rank], C), _check.DTYPES[dtype])
    if comm.rank:
        comm.shift([], [(own, 0)])()
        return own
    parts = [contiguous(namespace(x).take(x, _index(line, T, rank, x), axis=-2)) for rank in range(comm.size)]
    comm.shift([(part, rank) for rank, part in enumerate(parts) if rank], [])()
    return parts[0]


def gather(line: Line, x: Array, /) -> Array:
    """The x (..., T, C) of all tokens on rank 0, from x (..., T of this rank, C); None on the others"""
    check_line(line)
    comm = line.comm

    def local() -> tuple[Facts, tuple[int, ...]]:
        _check.one_dtype([("x", x)])
        if x.ndim < 2:
            raise ValueError(f"x must be (..., T, C), got {tuple(x.shape)}")
        return {"x": f"({', '.join(map(str, (*x.shape[:-2], 'any', x.shape[-1])))}) of {x.dtype}"}, (x.shape[-2],)

    lengths = agree(comm, local)
    (T,) = check_lengths(line, lengths, ("x",))
    if comm.rank:
        comm.shift([(contiguous(x), 0)], [])()
        return None
    parts = [x, *(unset((*x.shape[:-2], line.layout.num_tokens(T, r), x.shape[-1]), x) for r in range(1, comm.size))]
    comm.shift([], [(part, rank) for rank, part in enumerate(parts) if rank])()
    whole = unset((*x.shape[:-2], T, x.shape[-1]), x)
    for rank, part in enumerate(parts):
        whole[..., _index(line, T, rank, x), :] = part
    return whole


def _index(line: Line, T: int, rank: int, like: Array) -> Array:
    """The tokens of a rank, beside x"""
    positions = [i for piece in line.layout.pieces(T, rank) for i in piece]
    return from_host(np.array(positions, np.int64), like)
