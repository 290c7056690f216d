"""PyTorch: `nn.MultiheadAttention`, and `scaled_dot_product_attention` between projections: as a peer of its own, and
where the former cannot express the case.

In training mode, because `forward` of every NumPy peer also keeps a cache for its backward; but kind "attention" has no
backward, and runs without autograd. A causal mask is `is_causal`, with which PyTorch skips the masked tiles. A window
can only be an additive (T, T) mask: it is made beforehand, and counts as an input.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.cases import Case, Problem
from benchmarks.peers import Call, SkipError, check_memory
from funcmha import tree
from funcmha.interop.torch import from_state_dict, to_state_dict

COPIES = 4  # of all scores, where the weights are asked for: scores, weights, and the gradients of both


def prepare(case: Case, problem: Problem, variant: str) -> Call:
    if variant == "weights":
        if case.kind != "self":
            raise SkipError("need_weights is of nn.MultiheadAttention, which has no grouped heads")
        check_memory(case, COPIES)
    if case.window is not None:
        check_memory(case, 2 / (case.B * case.H))  # the mask: made from its negative
    if variant == "compiled":
        torch.compiler.reset()  # each case starts as the first did
    if variant == "sdpa" and case.kind != "self":
        raise SkipError("is what the peer PyTorch takes here")
    make = {"self": _self_sdpa if variant == "sdpa" else _self, "cross": _cross, "attention": _attention}[case.kind]
    return make(case, problem, variant)


def _self(case: Case, problem: Problem, variant: str) -> Call:
    module = torch.nn.MultiheadAttention(case.width, case.H, bias=case.bias, batch_first=True, dtype=_dtype(problem))
    module.load_state_dict({name: _tensor(a) for name, a in to_state_dict(problem.params).items()})
    x = _tensor(problem.inputs[0], grad=True)
    need_weights = variant == "weights"
    options = {"need_weights": need_weights, "attn_mask": _mask(case, x, need_weights)}
    options["is_causal"] = case.causal and case.window is None and not need_weights

    def output() -> torch.Tensor:
        return module(x, x, x, **options)[0]

    def params(grads: dict[str, Any]) -> dict[str, np.ndarray]:
        return tree.flatten(from_state_dict(grads, case.H))

    return _call(output, variant, {"x": x}, dict(module.named_parameters()), problem, params)


def _self_sdpa(case: Case, problem: Problem, variant: str) -> Call:
    """The projections of q, k and v as one, as `nn.MultiheadAttention` has them."""
    C, leaves = case.width, to_state_dict(problem.params)
    x, flat = _tensor(problem.inputs[0], grad=True), {name: _tensor(a, grad=True) for name, a in leaves.items()}
    bias, is_causal = flat.get("in_proj_bias"), case.causal and case.window is None
    mask = None if case.window is None else _mask(case, x, False)

    def output() -> torch.Tensor:
        qkv = linear(x, flat["in_proj_weight"], bias).unflatten(-1, (3 * case.H, case.D)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        o = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return linear(o.transpose(1, 2).reshape(-1, case.T, C), flat["out_proj.weight"], flat.get("out_proj.bias"))

    def params(grads: dict[str, Any]) -> dict[str, np.ndarray]:
        return tree.flatten(from_state_dict(grads, case.H))

    return _call(output, variant, {"x": x}, flat, problem, params)


def _mask(case: Case, x: torch.Tensor, need_weights: bool) -> torch.Tensor | None:
    """(T, T), added to the scores. `is_causal` requires one but does not read it: a broadcast 0 is enough."""
    if not case.causal:
        return None
    if case.window is None and not need_weights:
        return torch.zeros((), dtype=x.dtype).expand(case.T, case.S)
    forbidden = torch.from_numpy(~case.mask().dense(case.T, case.S))
    return torch.zeros(case.T, case.S, dtype=x.dtype).masked_fill_(forbidden, -torch.inf)


def _cross(case: Case, problem: Problem, variant: str) -> Call:
    query, memory = (_tensor(x, grad=True) for x in problem.inputs)
    flat = {leaf: _tensor(w, grad=True) for leaf, w in tree.flatten(problem.params).items()}
    wq, wk, wv = (flat[f"{name}.w"] for name in ("q_proj", "k_proj", "v_proj"))  # (heads, D, C)
    wo = flat["out_proj.w"]  # (C, H, D)

    def output() -> torch.Tensor:
        q, k, v = (_heads(x, w) for x, w in ((query, wq), (memory, wk), (memory, wv)))
        o = scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return linear(o.transpose(1, 2).flatten(2), wo.flatten(1))

    def params(grads: dict[str, Any]) -> dict[str, np.ndarray]:
        return {leaf: g.numpy() for leaf, g in grads.items()}

    return _call(output, variant, {"query": query, "memory": memory}, flat, problem, params)


def _heads(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (B, S, C)   w (heads, D, C)   →   (B, heads, S, D)"""
    return linear(x, w.flatten(0, 1)).unflatten(-1, w.shape[:2]).transpose(1, 2)


def _attention(case: Case, problem: Problem, variant: str) -> Call:
    q, k, v = map(_tensor, problem.inputs)

    @torch.no_grad()
    def output() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    run = torch.compile(output, dynamic=False) if variant == "compiled" else output
    return Call(run, None, lambda: {"y": run().numpy()}, run if variant == "compiled" else lambda: None)


def _call(
    output: Callable[[], torch.Tensor],
    variant: str,
    inputs: dict[str, torch.Tensor],
    leaves: dict[str, torch.Tensor],
    problem: Problem,
    params: Callable[[dict[str, Any]], dict[str, np.ndarray]],
) -> Call:
    """`output` and its gradients; `params` renames those of the leaves."""
    forward = torch.compile(output, dynamic=False) if variant == "compiled" else output
    dy, wrt = _tensor(problem.dy), [*inputs.values(), *leaves.values()]

    def both() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        y = forward()
        return y, torch.autograd.grad(y, wrt, dy)

    def named() -> dict[str, np.ndarray]:
        y, grads = both()
        dinputs, dleaves = grads[: len(inputs)], grads[len(inputs) :]
        named_inputs = {name: g.numpy() for name, g in zip(inputs, dinputs, strict=True)}
        return {"y": y.detach().numpy()} | named_inputs | params(dict(zip(leaves, dleaves, strict=True)))

    return Call(forward, both, named, both if variant == "compiled" else lambda: None)


def _tensor(a: np.ndarray, grad: bool = False) -> torch.Tensor:
    """A copy in memory that PyTorch has allocated and aligned."""
    return torch.tensor(a, requires_grad=grad)


def _dtype(problem: Problem) -> torch.dtype:
    return getattr(torch, problem.dy.dtype.name)
