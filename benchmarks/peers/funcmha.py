"""funcmha with its default engine, with the one that spares memory, and its specification, the engine "sequential"."""

from functools import partial
from inspect import signature
from typing import Any

import funcmha
from benchmarks.cases import Case, Problem
from benchmarks.peers import Call, SkipError, check_memory
from funcmha import tree

HAS_ENGINES = "engine" in signature(funcmha.mha).parameters
COPIES = 3  # of all scores: the weights of every head, and temporary arrays of one head


def prepare(case: Case, problem: Problem, variant: str) -> Call:
    static: dict[str, Any] = {"mask": case.mask()}
    if variant != "default":
        if not HAS_ENGINES:
            raise SkipError("this version has only one engine")
        static["engine"] = getattr(funcmha.engines, {"sequential": "SEQUENTIAL", "lean": "TILED_LEAN"}[variant])
    if variant == "sequential" or not HAS_ENGINES:
        check_memory(case, COPIES)
    return {"self": _self, "cross": _cross, "attention": _attention}[case.kind](problem, static)


def _self(problem: Problem, static: dict[str, Any]) -> Call:
    params, (x,), dy = problem
    forward = partial(funcmha.self_attention, params, x, **static)

    def both() -> Any:
        y, cache = forward()
        dparams, dx, _ = funcmha.self_attention_vjp(cache, dy)
        return {"y": y, "x": dx} | tree.flatten(dparams)

    return Call(forward, both, both)


def _cross(problem: Problem, static: dict[str, Any]) -> Call:
    params, (query, memory), dy = problem
    forward = partial(funcmha.mha, params, query, memory, memory, **static)

    def both() -> Any:
        y, cache = forward()
        dparams, dquery, dkey, dvalue, _ = funcmha.mha_vjp(cache, dy)
        return {"y": y, "query": dquery, "memory": dkey + dvalue} | tree.flatten(dparams)

    return Call(forward, both, both)


def _attention(problem: Problem, static: dict[str, Any]) -> Call:
    forward = partial(funcmha.attention, *problem.inputs, **static)
    return Call(forward, None, lambda: {"y": forward()[0]})
