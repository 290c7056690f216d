"""JAX: einsum projections around `jax.nn.dot_product_attention`, jitted. Its `forward` keeps nothing for a backward."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case, Problem
from benchmarks.peers import Call, check_memory
from funcmha import tree

COPIES = 4  # of all scores: scores, weights, and the gradients of both


def prepare(case: Case, problem: Problem, variant: str) -> Call:
    check_memory(case, COPIES)
    if case.kind == "attention":
        return _attention(case, problem)
    leaves = jax.tree.map(jnp.asarray, (problem.params, problem.inputs))
    output = partial(_output, case)

    @jax.jit
    def value_and_gradients(leaves: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(output, *leaves)
        return y, vjp(dy)

    forward, _ = _bind(jax.jit(output), *leaves)
    both, compile_both = _bind(value_and_gradients, leaves, jnp.asarray(problem.dy))
    return Call(forward, both, lambda: _named(*both()), compile_both)


def _bind(f: Any, *args: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """f(*args), which waits for its result, and a function that only compiles it."""
    compiled = cache(lambda: f.lower(*args).compile())
    return lambda: jax.block_until_ready(compiled()(*args)), compiled


def _output(case: Case, params: Any, inputs: Any) -> Any:
    query, memory = inputs[0], inputs[-1]
    q, k, v = (_project(params[name], x) for name, x in (("q_proj", query), ("k_proj", memory), ("v_proj", memory)))
    window = None if case.window is None else (case.window - 1, 0)
    o = jax.nn.dot_product_attention(q, k, v, is_causal=case.causal, local_window_size=window)
    y = jnp.einsum("bthe,ohe->bto", o, params["out_proj"]["w"])
    return y + params["out_proj"]["b"] if case.bias else y


def _project(p: Any, x: Any) -> Any:
    """x (B, S, C)   →   (B, S, heads, D)"""
    y = jnp.einsum("bsc,hdc->bshd", x, p["w"])
    return y + p["b"] if "b" in p else y


def _attention(case: Case, problem: Problem) -> Call:
    q, k, v = (jnp.asarray(np.swapaxes(x, 1, 2)) for x in problem.inputs)  # (B, S, heads, D), as JAX wants them
    forward, compile_forward = _bind(jax.jit(jax.nn.dot_product_attention), q, k, v)
    return Call(forward, None, lambda: {"y": np.swapaxes(np.asarray(forward()), 1, 2)}, compile_forward)


def _named(y: Any, grads: Any) -> dict[str, np.ndarray]:
    dparams, dinputs = jax.tree.map(np.asarray, grads)
    names = ("x",) if len(dinputs) == 1 else ("query", "memory")
    return {"y": np.asarray(y)} | dict(zip(names, dinputs, strict=True)) | tree.flatten(dparams)
