"""The forward of attention in tiles, shared out among the threads: tiles of many queries, or products of few.

Axes: T queries, S keys, H query heads, K key/value heads, D query/key width, E value width; `...` is batch.
"""

from typing import Any

import numpy as np

from funcmha.masks import Range

from . import few, threads
from .cache import Views
from .tiles import blocks, rows_forward, sums


def forward(x: Views) -> bool:
    """Write o, row_sum, row_max and dominant; return whether anything was subtracted from a score, be it 0"""
    return _few_queries(x) if x.has_few_queries else _in_tiles(x)


def recomputed(x: Views) -> Views:
    """With the sums of the exponentials that tiles give: those of `few` are others, by rounding"""
    if not x.has_few_queries:
        return x
    x, row_sum = x._replace(k=np.ascontiguousarray(x.k)), np.empty_like(x.row_sum)

    def work(task: tuple[Any, slice]) -> None:
        at = (*task[0], task[1])
        row_sum[at] = sums(x.heads(*task), None if x.row_max is None else x.row_max[at])

    with threads.single_threaded_blas():  # whose threads would cut a product otherwise, with other bits
        threads.run(work, x.stacks_of_samples(), flops=0.0, plan=x.plan)
    return x._replace(row_sum=row_sum)


def _few_queries(x: Views) -> bool:
    def work(task: tuple[Any, slice, slice]) -> None:
        b, kv, h = task
        at, heads = (*b, h), x.heads(b, h)._replace(k=x.k[(*b, kv)], v=x.v[(*b, kv)])
        x.o[at], x.row_sum[at], x.row_max[at], x.dominant[at] = few.forward(heads)

    threads.run(work, x.stacks_of_few_queries(), x.flops, x.plan)
    return True


def _in_tiles(x: Views) -> bool:
    shifted: list[Any] = []

    def work(task: tuple[Range, Any, slice]) -> None:
        rows, b, h = task
        at, heads = (*b, h, slice(*rows)), x.heads(b, h)
        k = x.k[x.key_heads(b, h)][..., slice(*heads.columns(rows)), :]
        longest = np.sqrt(np.einsum("...sd,...sd->...s", k, k).max(axis=-1, keepdims=True, initial=0.0))
        x.row_sum[at], row_max, key = rows_forward(heads, rows, longest, x.o[at])
        if key is not None:
            x.dominant[at] = key
        if row_max is not None:
            x.row_max[at] = row_max
            shifted.append(task)

    # Where the mask is causal the last rows of a head take longest, and begin first.
    of_rows = reversed(blocks(x.q.shape[-2], x.plan.tile_rows))
    tasks = [(rows, b, h) for rows in of_rows for b, h in x.stacks_of_samples()]
    threads.run(work, tasks, x.flops, x.plan)
    return bool(shifted)
