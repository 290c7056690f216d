"""Attention and its gradient on ranks that are threads, put together as one process has them."""

import numpy as np

from funcmha import biases, log_sum_exp, parallel


def line_of(scheme):
    """A function from a `Comm` to a `Line`: of a scheme, or of a grid, (heads, ring)."""
    if isinstance(scheme, tuple):
        return lambda comm: parallel.grid(comm, heads=scheme[0], ring=scheme[1])
    return lambda comm: parallel.Line(comm, scheme)


def values(bias):
    return bias.values if isinstance(bias, biases.RelativeBias) else bias


def put_together(parts, places, n):
    """(..., n, width) from the rows of each rank"""
    whole = np.full((*parts[0].shape[:-2], n, parts[0].shape[-1]), np.nan, parts[0].dtype)
    for part, place in zip(parts, places, strict=True):
        whole[..., place, :] = part
    return whole


def run(problem, n, scheme, dtype, pair=parallel, wrap=lambda comm: comm, arrays=None):
    """o, lse, dq, dk, dv, dbias, dsink of a problem on n ranks: the last two as each rank has them"""
    q, k, v, bias, sink = arrays or problem.inputs(dtype)
    do, _, dlse = problem.cotangents(dtype)
    dlse = dlse if dtype in ("float32", "float64") else dlse.astype("float32")
    static = problem.static()

    def of_rank(comm):
        line = line_of(scheme)(wrap(comm))
        i, j = line.positions(problem.T), line.positions(problem.S)
        of_q, of_k, of_v, of_do = (np.take(a, at, axis=-2) for a, at in ((q, i), (k, j), (v, j), (do, i)))
        o, cache = pair.attention(line, of_q, of_k, of_v, bias, sink, **static)
        grads = pair.attention_vjp(cache, of_do, dlse=np.take(dlse, i, axis=-1))
        return (i, j), (o, log_sum_exp(cache)[..., None], *grads)

    places, results = zip(*parallel.threads(n).run(of_rank), strict=True)
    rows, keys = zip(*places, strict=True)
    o, lse, dq, dk, dv, dbias, dsink = zip(*results, strict=True)
    T, S = problem.T, problem.S
    of_rows = (put_together(o, rows, T), put_together(lse, rows, T)[..., 0], put_together(dq, rows, T))
    return *of_rows, put_together(dk, keys, S), put_together(dv, keys, S), dbias, dsink
