"""funcmha against `torch.nn.MultiheadAttention`, value by value: `python -m funcmha verify`.

Two problems, with the same weights, inputs and cotangents on both sides:

    self-attention   no biases, no masks
    everything on    biases, boolean mask + floating mask + key padding, bias_kv, zero_attn, kdim, vdim, S ≠ T, and a
                     cotangent through the weights of every head as well

Every value is judged twice. It must agree with PyTorch in the same precision, within `TOLERANCE`; and its error against
PyTorch in float64 on the same numbers must be within the bound of `funcmha.testing.tolerance`, which knows what
rounding may cost at that entry.

Axes: B batch, T queries, S keys, C embed_dim, H heads.
"""

from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np

from funcmha import tree
from funcmha._arrays import Array
from funcmha.engines import attention_weights, mha, mha_vjp
from funcmha.engines.plan import Plan
from funcmha.engines.tiled import threads
from funcmha.interop.torch import from_state_dict, masks, to_state_dict
from funcmha.params import Params, init

from .tolerance import mha_bounds, unit_roundoff, worst_ratio

__all__ = ["Row", "verify"]

PROBLEMS = ("self-attention", "everything on")
TOLERANCE = {"float32": "|got − want| ≤ 1e-5 + 1e-5 |want|", "float64": "|got − want| ≤ 1e-11 max(1, max |want|)"}


class Row(NamedTuple):
    """One value of funcmha and its difference from PyTorch's."""

    problem: str  # one of PROBLEMS
    dtype: str
    quantity: str
    shape: tuple[int, ...]
    error: float  # the largest |funcmha − PyTorch|
    of_tolerance: float  # the largest |funcmha − PyTorch| / tolerance
    of_bound: float  # the largest |funcmha − PyTorch in float64| / bound

    @property
    def ok(self) -> bool:
        """False for NaN too."""
        return self.of_tolerance <= 1 and self.of_bound <= 1


class Problem(NamedTuple):
    """The arguments of both sides. Self-attention has no key and no value of its own."""

    params: Params
    query: Array  # (B, T, C)
    key: Array  # (B, S, Ck) or None
    value: Array  # (B, S, Cv) or None
    bias: Array  # (B, H, T, S) or None
    forbidden: Array  # (T, S), True = may not attend, or None
    padding: Array  # (B, S), True = may not be attended to, or None
    zero_attn: bool
    dy: Array  # (B, T, C)
    dweights: Array  # (B, H, T, S + 2) or None

    @property
    def heads(self) -> int:
        """H"""
        return int(self.params["q_proj"]["w"].shape[0])

    @property
    def inputs(self) -> tuple[Any, Any, Any, Any, Any]:
        """The positional arguments of `mha`."""
        q, k, v = (self.query,) * 3 if self.key is None else self[1:4]
        return self.params, q, k, v, self.bias

    @property
    def options(self) -> dict[str, Any]:
        """The options of `mha`."""
        return {"mask": masks(self.forbidden, self.padding, self.heads)[0], "zero_attn": self.zero_attn}

    def astype(self, dtype: str) -> "Problem":
        """The same numbers in another precision."""

        def cast(x: Any) -> Any:
            return x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype != bool else x

        return Problem(*(tree.map(cast, x) for x in self))


def verify(
    *,
    batch: int = 16,
    length: int = 256,
    width: int = 384,
    heads: int = 6,
    dtypes: Sequence[str] = ("float32", "float64"),
    seed: int = 0,
    engine: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """The comparison, row by row; `progress` is called with what is being computed

    Raises ModuleNotFoundError where PyTorch is not installed, ValueError for sizes that do not fit.
    """
    draws = (self_attention_problem, everything_problem)
    problems = [draw(seed, batch, length, width, heads) for draw in draws]
    progress("error bounds")
    bounds = _bounds_of_all(problems)
    for dtype in dtypes:
        for name, problem, bound in zip(PROBLEMS, problems, bounds, strict=True):
            progress(f"{name}, {dtype}")
            yield from _compare(name, dtype, problem.astype(dtype), bound, engine)


def _bounds_of_all(problems: Sequence[Problem]) -> list[dict[str, Array]]:
    """At the same time: they take longer than everything else"""
    bounds: list[dict[str, Array]] = [{} for _ in problems]

    def work(i: int) -> None:
        bounds[i] = run_bounds(problems[i])

    with threads.single_threaded_blas():
        threads.run(work, range(len(problems)), flops=inf, plan=Plan())
    return bounds


def _compare(name: str, dtype: str, problem: Problem, bounds: dict[str, Array], engine: str | None) -> Iterator[Row]:
    got, want = run_funcmha(problem, engine), run_torch(problem)
    exact = want if dtype == "float64" else run_torch(problem.astype("float64"))
    roundoff = unit_roundoff(dtype) / unit_roundoff("float32")
    for quantity, x in want.items():
        error = np.abs(got[quantity] - x)
        tolerance = 1e-5 + 1e-5 * np.abs(x) if dtype == "float32" else 1e-11 * max(1.0, float(np.abs(x).max()))
        errors = float(error.max()), float((error / tolerance).max())
        of_bound = worst_ratio(got[quantity], exact[quantity], roundoff * bounds[quantity])
        yield Row(name, dtype, quantity, x.shape, *errors, of_bound)


# ── the two problems ─────────────────────────────────────────────────────────────────────────────────────────────


def self_attention_problem(seed: int, B: int, T: int, C: int, H: int) -> Problem:
    """Weights as PyTorch draws them, standard normal input and cotangent."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, B, T, C))
    params = init(seed, C, H, bias=False, dtype=np.float64)
    return Problem(params, x, None, None, None, None, None, False, dy, None)


def everything_problem(seed: int, B: int, T: int, C: int, H: int) -> Problem:
    """Every option of the module at once. No row is fully masked: PyTorch has no answer there.

    The cotangents have standard deviation 1 / √(B·T), as those of a loss averaged over rows, so that a gradient summed
    over all rows has size 1. At size √(B·T) its rounding errors alone would exceed 1e-5, on either side.
    """
    rng = np.random.default_rng(seed)
    S, Ck, Cv = T + T // 4, C + C // 2, max(C // 2, 1)
    dy, dweights = (rng.standard_normal(shape) / (B * T) ** 0.5 for shape in ((B, T, C), (B, H, T, S + 2)))
    params = init(seed, C, H, kdim=Ck, vdim=Cv, bias_kv=True, dtype=np.float64)
    for group in params.values():
        if "b" in group:  # drawn as 0
            group["b"] = rng.standard_normal(group["b"].shape)
    shapes = (B, T, C), (B, S, Ck), (B, S, Cv), (B, H, T, S)
    query, key, value, bias = (rng.standard_normal(shape) for shape in shapes)
    forbidden = np.arange(S) > np.arange(T)[:, None] + T // 2
    padding = np.arange(S) >= rng.integers(1, S + 1, B)[:, None]
    return Problem(params, query, key, value, bias, forbidden, padding, True, dy, dweights)


# ── the two sides, and the bounds ────────────────────────────────────────────────────────────────────────────────


def run_funcmha(problem: Problem, engine: str | None = None) -> dict[str, Array]:
    """Every value by name."""
    y, cache = mha(*problem.inputs, **problem.options, engine=engine)
    dparams, *dinputs, dbias = mha_vjp(cache, problem.dy, dweights=problem.dweights)
    return _named(problem, y, attention_weights(cache), dparams, dinputs, dbias)


def run_bounds(problem: Problem) -> dict[str, Array]:
    """The error bounds in float32, by name. The bounds of three summed gradients add.

    Bounds are proportional to the unit roundoff, to within 1 % here, so these serve float64 too.
    """
    bounds = mha_bounds(*problem.inputs, problem.dy, **problem.options, dweights=problem.dweights, dtype="float32")
    y, weights, _, dparams, *dinputs, dbias = bounds
    return _named(problem, y, weights, dparams, dinputs, dbias)


def run_torch(problem: Problem) -> dict[str, Array]:
    """Every value by name, from `torch.nn.MultiheadAttention` in training mode and its autograd."""
    import torch

    p, dtype = problem.params, getattr(torch, str(problem.dy.dtype))
    flags = {"bias": "b" in p["q_proj"], "add_bias_kv": "bias_kv" in p, "add_zero_attn": problem.zero_attn}
    widths = {"kdim": p["k_proj"]["w"].shape[-1], "vdim": p["v_proj"]["w"].shape[-1]}
    C = problem.dy.shape[-1]
    module = torch.nn.MultiheadAttention(C, problem.heads, batch_first=True, dtype=dtype, **flags, **widths)
    module.load_state_dict({name: torch.from_numpy(a) for name, a in to_state_dict(p).items()})

    inputs: list[Any] = [torch.tensor(a, requires_grad=True) for a in problem[1:5] if a is not None]
    attn_mask = padding = None
    if problem.bias is not None:
        forbidden, padded = torch.from_numpy(problem.forbidden), torch.from_numpy(problem.padding)
        attn_mask = inputs[3].masked_fill(forbidden, -torch.inf).flatten(0, 1)
        padding = torch.zeros(padded.shape, dtype=dtype).masked_fill(padded, -torch.inf)
    weighted = {"need_weights": problem.dweights is not None, "average_attn_weights": False}
    qkv = inputs[:3] if len(inputs) > 1 else 3 * inputs
    y, weights = module(*qkv, attn_mask=attn_mask, key_padding_mask=padding, **weighted)
    outputs = [(y, problem.dy)] if weights is None else [(y, problem.dy), (weights, problem.dweights)]
    torch.autograd.backward([out for out, _ in outputs], [torch.from_numpy(d) for _, d in outputs])

    dparams = from_state_dict({name: parameter.grad for name, parameter in module.named_parameters()}, problem.heads)
    y, weights = (None if x is None else x.detach().numpy() for x in (y, weights))
    grads = [x.grad.numpy() for x in inputs]
    return _named(problem, y, weights, dparams, grads[:3], *grads[3:])


def _named(
    problem: Problem, y: Array, weights: Array, dparams: Params, dinputs: Sequence[Array], dbias: Array = None
) -> dict[str, Array]:
    """The values to compare, under their names in the table."""
    names = ("query", "key", "value")
    of = {"input": sum(dinputs)} if problem.key is None else dict(zip(names, dinputs, strict=True))
    of |= tree.flatten(dparams) | ({} if dbias is None else {"bias": dbias})
    shown = {"output": y} if problem.dweights is None else {"output": y, "weights": weights}
    return shown | {f"{name} gradient": g for name, g in of.items()}
