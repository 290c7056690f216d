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
    H, K = x.q.shape[-3], x.k.shape[-3]

    def work(task: tuple[Any, int]) -> None:
        b, kv = task
        h = slice(kv * (H // K), (kv + 1) * (H // K))
        at = (*b, h)
        x.o[at], x.row_sum[at], x.row_max[at], x.dominant[at] = few.forward(x.heads(b, h))

    threads.run(work, [(b, kv) for b in x.samples() for kv in range(K)], x.flops, x.plan)
    return True


def _in_tiles(x: Views) -> bool:
    shifted: list[Any] = []

    def work(task: tuple[slice, Range, Any]) -> None:
        h, rows, b = task
        at, heads = (*b, h, slice(*rows)), x.heads(b, h)
        k = x.k[x.key_heads(b, h)][..., slice(*heads.columns(rows)), :]
        longest = np.sqrt(np.einsum("...sd,...sd->...s", k, k).max(axis=-1, keepdims=True, initial=0.0))
        x.row_sum[at], row_max, key = rows_forward(heads, rows, longest, x.o[at])
        if key is not None:
            x.dominant[at] = key
        if row_max is not None:
            x.row_max[at] = row_max
            shifted.append(task)

    stacks = x.stacks()
    samples = x.samples_together(max((h.stop - h.start for h in stacks), default=1))
    # Where the mask is causal the last rows of a head take longest, and begin first.
    of_rows = blocks(x.q.shape[-2], x.plan.tile_rows)
    tasks = [(h, rows, b) for h in stacks for rows in reversed(of_rows) for b in samples]
    threads.run(work, tasks, x.flops, x.plan)
    return bool(shifted)
