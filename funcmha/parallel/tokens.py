"""From the tokens of a rank to those of all ranks that share its part of the ring, and back.

Axes: T queries and S keys, C width; `...` is batch.
"""

from typing import Any

from funcmha._arguments import Options
from funcmha._arrays import Array, from_host, namespace, unset, upcast
from funcmha.masks.zero import zero_tokens

from .comm import contiguous
from .line import Line


def zeroed(
    line: Line, query: Array, key: Array, value: Array, x: Options, T: int, S: int, appended: bool
) -> tuple[Array, Array, Array]:
    """The inputs, upcast, with 0 at keys that no rank attends, and at fully masked queries where none are appended"""
    if query is key is value:
        query = key = value = upcast(query)
    else:
        query, key, value = upcast(query), upcast(key), upcast(value)
    if x.mask is None:
        return query, key, value
    attended, attending = _at(line, x.mask.attended_keys(T, S, query), S, query), None
    if not appended:
        attending = _at(line, namespace(query).matrix_transpose(x.mask.attending_queries(T, S, query)), T, query)
    return zero_tokens(query, key, value, attended, attending)


def _at(line: Line, a: Array, n: int, like: Array) -> Array:
    """a (..., n or 1) at this rank's tokens"""
    return a if a.shape[-1] != n or n == 1 else namespace(a).take(a, from_host(line.positions(n), like), axis=-1)


def gathered_inputs(line: Line, inputs: tuple[Array, ...], T: int, S: int) -> tuple[Array, ...]:
    """The inputs of the tokens of this part of the ring; one where they are one"""
    query, key, value = inputs
    if query is key is value:
        x = gathered(line, query, T)
        return x, x, x
    return gathered(line, query, T), gathered(line, key, S), gathered(line, value, S)


def gathered(line: Line, x: Array, n: int) -> Array:
    """x (..., T of this rank, C)   →   (..., T of its part of the ring, C), of n tokens"""
    comm, first = line.heads, line.comm.rank - line.heads.rank
    if comm.size == 1:
        return x
    out = [unset((*x.shape[:-2], line.layout.num_tokens(n, first + r), x.shape[-1]), x) for r in range(comm.size)]
    comm.all_gather(contiguous(x), out)
    return namespace(x).concat(out, axis=-2)


def scattered(line: Line, x: Array, n: int) -> Array:
    """Σ x over the heads' ranks (..., T of its part of the ring, C)   →   (..., T of this rank, C): the adjoint"""
    comm, first = line.heads, line.comm.rank - line.heads.rank
    if comm.size == 1:
        return x
    parts, start = [], 0
    for r in range(comm.size):
        stop = start + line.layout.num_tokens(n, first + r)
        parts.append(contiguous(x[..., start:stop, :]))
        start = stop
    return comm.reduce_scatter(parts)


def gathered_table(line: Line, table: Any, n: int) -> Any:
    """A rotary table of the tokens of this part of the ring"""
    if table is None or line.heads.size == 1:
        return table
    return table._replace(cos=gathered(line, table.cos, n), sin=gathered(line, table.sin, n))
