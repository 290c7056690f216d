"""Independent oracles: the same mathematics written without funcmha, differentiated by torch's autograd in float64."""

from typing import Any

import numpy as np
import torch

from funcmha import masks, norms, rotary, tree
from funcmha.biases import RelativeBias
from funcmha.dropout import Masked

F64 = torch.float64


def tensor(a: Any) -> Any:
    """A float64 leaf that wants a gradient, of anything like an array; None for None."""
    if isinstance(a, RelativeBias):
        return RelativeBias(tensor(a.values))
    return None if a is None else torch.tensor(np.array(a, np.float64), requires_grad=True)


def gradients(outputs: list[Any], cotangents: list[Any], leaves: list[Any]) -> list[Any]:
    """The gradient of Σ ⟨output, cotangent⟩ with respect to each leaf, as NumPy arrays; None for None."""
    total = sum((o * torch.tensor(np.array(c, np.float64))).sum() for o, c in zip(outputs, cotangents, strict=True))
    leaves = [leaf.values if isinstance(leaf, RelativeBias) else leaf for leaf in leaves]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True) if wanted else [])
    grads = [None if leaf is None else (leaf, next(found)) for leaf in leaves]
    return [None if g is None else (torch.zeros_like(g[0]) if g[1] is None else g[1]).numpy() for g in grads]


def attention(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    sink: Any = None,
    *,
    mask: Any,
    scale: Any,
    softcap: Any = None,
    dropout: Any = None,
) -> tuple[Any, ...]:
    """o, weights, log-sum-exp of tensors q (..., H, T, D), k (..., K, S, D), v (..., K, S, E).

    A bias (..., T + S − 1) that is a `RelativeBias`'s is looked up for each query and key.
    """
    T, S = q.shape[-2], k.shape[-2]
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = torch.einsum("...td,...sd->...ts", q, k) * (q.shape[-1] ** -0.5 if scale is None else each_head(scale))
    scores = scores if softcap is None else each_head(softcap) * torch.tanh(scores / each_head(softcap))
    if isinstance(bias, RelativeBias):
        difference = torch.arange(S)[None, :] - torch.arange(T)[:, None] + T - 1
        bias = bias.values[..., difference]
    scores = scores if bias is None else scores + bias
    allowed = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None:
        allowed = allowed & torch.tensor(np.array(masks.dense(mask, T, S, np.zeros(0))))
    top = torch.where(allowed, scores, -torch.inf).amax(-1, keepdim=True).detach() if S else torch.zeros(())
    top = top if sink is None else torch.maximum(top, sink[:, None, None].detach())
    top = torch.where(torch.isinf(top), 0.0, top)
    e = torch.where(allowed, torch.exp(torch.where(allowed, scores, top) - top), 0.0)
    total = e.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink[:, None, None] - top)
    some = total > 0
    p = e / torch.where(some, total, 1.0)
    lse = torch.where(some, top + torch.log(torch.where(some, total, 1.0)), -torch.inf)[..., 0]
    a = p if dropout is None else p * torch.tensor(np.array(dropout.dense(tuple(p.shape)))) / (1 - dropout.rate)
    return a @ v, p, lse


def on_keep(f: Any, dropout: Any) -> Any:
    """The dropout with f of its mask, if it has one."""
    return dropout._replace(keep=f(dropout.keep)) if isinstance(dropout, Masked) else dropout


def each_head(x: Any) -> Any:
    return x if isinstance(x, float) else torch.tensor(np.array(x, np.float64))[:, None, None]


def normalised(x: Any, norm: Any, params: Any) -> Any:
    w, b = params.get("w"), params.get("b")
    if isinstance(norm, norms.RMSNorm):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], w if w is None else norm.offset + w, norm.eps)
    if isinstance(norm, norms.L2Norm):
        return torch.nn.functional.normalize(x, dim=-1, eps=norm.eps)
    return x if norm is None else torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, norm.eps)


def rotated(x: Any, table: Any) -> Any:
    """Pairs of features as complex numbers, times e^(i angle)."""
    if table is None:
        return x
    n, half = table.cos.shape[-1], isinstance(table, rotary.HalfPairs)
    angles = torch.complex(torch.tensor(np.array(table.cos)), torch.tensor(np.array(table.sin)))
    a, b = (x[..., :n], x[..., n : 2 * n]) if half else (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2])
    z = torch.complex(a, b) * angles
    y = torch.cat([z.real, z.imag], -1) if half else torch.stack([z.real, z.imag], -1).flatten(-2)
    return torch.cat([y, x[..., 2 * n :]], -1)


def mha(
    params: Any,
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    *,
    zero_attn: bool,
    mask: Any,
    qk_norm: Any = None,
    rotary: Any = None,
    **static: Any,
) -> tuple[Any, ...]:
    """y, weights, log-sum-exp of tensors, all heads at once."""
    q = torch.einsum("...tc,hdc->...htd", query, params["q_proj"]["w"])
    k = torch.einsum("...sc,hdc->...hsd", key, params["k_proj"]["w"])
    v = torch.einsum("...sc,hdc->...hsd", value, params["v_proj"]["w"])
    if "b" in params["q_proj"]:
        q, k, v = (
            x + params[n]["b"][:, None, :] for x, n in zip((q, k, v), ("q_proj", "k_proj", "v_proj"), strict=True)
        )
    q, k = normalised(q, qk_norm, params.get("q_norm", {})), normalised(k, qk_norm, params.get("k_norm", {}))
    q, k = (rotated(x, table) for x, table in zip((q, k), rotary or (None, None), strict=True))
    T, S = q.shape[-2], k.shape[-2]
    mask = None if mask is None else np.array(masks.dense(mask, T, S, np.zeros(0)))
    bias = bias if bias is None or isinstance(bias, RelativeBias) else bias.expand(*bias.shape[:-1], S)
    columns = (
        [] if "bias_kv" not in params else [(params["bias_kv"]["k"][:, None, :], params["bias_kv"]["v"][:, None, :])]
    )
    columns += [(torch.zeros(1, 1, q.shape[-1]), torch.zeros(1, 1, v.shape[-1]))] if zero_attn else []
    for k_new, v_new in columns:
        k = torch.cat([k, k_new.expand(*k.shape[:-2], 1, k.shape[-1])], dim=-2)
        v = torch.cat([v, v_new.expand(*v.shape[:-2], 1, v.shape[-1])], dim=-2)
        if mask is not None:
            mask = np.broadcast_to(mask, (*mask.shape[:-1], k.shape[-2] - 1))
            mask = np.concatenate([mask, np.ones((*mask.shape[:-1], 1), bool)], axis=-1)
        bias = None if bias is None else torch.cat([bias, torch.zeros(*bias.shape[:-1], 1, dtype=F64)], dim=-1)
    o, p, lse = attention(q, k, v, bias, params["sink"]["w"] if "sink" in params else None, mask=mask, **static)
    y = torch.einsum("...hte,ohe->...to", o, params["out_proj"]["w"])
    return (y + params["out_proj"]["b"] if "b" in params["out_proj"] else y), p, lse


def tensors(params: Any) -> Any:
    return tree.map(tensor, params)
