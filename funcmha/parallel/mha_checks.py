"""What all ranks must agree on before they attend with a layer: its parameters, inputs and options.

Axes: T queries and S keys of a rank, H query heads, K key/value heads.
"""

from hashlib import blake2b
from typing import Any

import numpy as np

from funcmha import tree
from funcmha._arguments import HeadOptions, Options, check_mha, check_names, name_of, values_of
from funcmha._arrays import Array, full, namespace
from funcmha.biases import as_bias
from funcmha.params import SPEC, Params, leaf

from .agreement import Facts, agree, described
from .attention import check_lengths, check_line, check_real, whole_of
from .line import Line


def agreed(
    line: Line, params: Params, query: Array, key: Array, value: Array, bias: Any, options: Any
) -> tuple[int, int, int, int, Options]:
    """T, S, H and K of all ranks, and the options, checked on all of them"""
    check_line(line)
    inputs = {"query": query, "key": key, "value": value}

    def local() -> tuple[Facts, tuple[int, ...]]:
        check_names(options, HeadOptions)
        H, K = (params[name]["w"].shape[0] for name in ("q_proj", "k_proj"))
        of_tokens = {name: options[name] for name in ("qk_norm", "rotary") if name in options}
        check_mha(params if H else _with_heads(params, 1, 1), query, key, value, None, of_tokens)
        check_real("query", query)
        given = as_bias(bias)
        facts = {"line": str(line.layout), "params": ", ".join(_widths(params))}
        facts |= {
            name: f"({', '.join([*map(str, x.shape[:-2]), 'any', str(x.shape[-1])])}) of {x.dtype}"
            for name, x in inputs.items()
        }
        facts |= {name_of(given): described(values_of(given)), "rotary": str(options.get("rotary") is None)}
        facts |= {name: described(x) for name, x in options.items() if name != "rotary"}
        return facts, (query.shape[-2], key.shape[-2], H, K, _fingerprint(params) if H else 0)

    table = agree(line.comm, local)
    T, S = check_lengths(line, table[:, :2], ("query", "key"))
    H, K = (int(n) for n in table[: line.layout.heads, 2:4].sum(axis=0))
    same = [rank for rank, row in enumerate(table[: line.layout.heads]) if row[4] and row[4] in table[:rank, 4]]
    if same:
        raise ValueError(f"params must be shard(params, line), got on rank {same[0]} the heads of a rank before it")
    for rank, (own_H, own_K) in enumerate(table[:, 2:4]):
        h, kv = line.layout.query_heads(H, K, rank), line.layout.kv_heads(K, rank)
        if (own_H, own_K) != (h.stop - h.start, kv.stop - kv.start):
            wanted = f"H={h.stop - h.start} and K={kv.stop - kv.start} of {H} and {K} heads on rank {rank}"
            raise ValueError(f"params must be shard(params, line), {wanted}, got H={own_H} and K={own_K}")
    rest = {name: x for name, x in options.items() if name not in ("rotary", "qk_norm")}
    _, _, x = check_mha(_with_heads(params, H, K), whole_of(query, T), whole_of(key, S), whole_of(value, S), bias, rest)
    given = options.get("rotary")
    rotary = given if type(given) is tuple else (given, given)
    return T, S, H, K, x._replace(qk_norm=options.get("qk_norm"), rotary=rotary)


def _fingerprint(params: Params) -> int:
    """A number for the first rows of NumPy's parameters, to see whether they are another rank's; 0 for no such"""
    rows = [leaf(params, f"{name}_proj.w")[0, 0] for name in "qkv"] + [leaf(params, "out_proj.w")[0, 0]]
    if not isinstance(rows[0], np.ndarray) or all((row == row[:1]).all() for row in rows):  # as after init with 0
        return 0
    return int.from_bytes(blake2b(b"".join(row.tobytes() for row in rows), digest_size=7).digest(), "little")


def _with_heads(params: Params, H: int, K: int) -> Params:
    """Arrays that stand for the parameters of so many heads in checks: no memory"""
    sizes = {"H": H, "K": K}

    def stand_in(name: str, a: Array) -> Array:
        shape = (sizes.get(axis, n) for axis, n in zip(SPEC[name].split(), a.shape, strict=True))
        return namespace(a).broadcast_to(full((1,), 0.0, a), tuple(shape))

    norms = ("q_norm", "k_norm")
    return tree.unflatten(
        {n: stand_in(n, a) for n, a in tree.flatten(params).items() if n.partition(".")[0] not in norms}
    )


def _widths(params: Params) -> list[str]:
    """What must be the same of every leaf: its axes but those of heads"""
    found = []
    for name, a in tree.flatten(params).items():
        axes = SPEC.get(name, "").split()
        sizes = (axis if axis in "HK" else str(n) for axis, n in zip(axes, a.shape, strict=False))
        found.append(f"{name} ({', '.join(sizes)}) of {a.dtype}")
    return found
