"""The cases: the problems that every peer computes, and their number of operations.

Axes: B batch, T queries, S keys, C width of the inputs and of the output, H query heads, K key/value heads, D width
of a head.
"""

from typing import Any, NamedTuple

import numpy as np

from funcmha import init, masks
from funcmha.masks import Mask
from funcmha.params import Params

TILE = 256  # queries and keys of the tiles that `products` counts


class Case(NamedTuple):
    name: str
    kind: str  # "self": query = key = value; "cross": key = value; "attention": no projections, forward only
    B: int
    T: int
    S: int
    H: int
    K: int
    D: int
    causal: bool = False
    window: int | None = None  # a causal query attends so many keys, its own included
    bias: bool = False

    @property
    def width(self) -> int:
        """C"""
        return self.H * self.D

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward",) if self.kind == "attention" else ("forward", "forward + backward")

    def mask(self) -> Mask | None:
        if self.window is not None:
            return masks.window(self.window - 1, 0)
        return masks.causal() if self.causal else None

    def __str__(self) -> str:
        length = f"T {self.T}" if self.kind == "self" else f"{self.T} queries × {self.S} keys"
        heads = f"{self.H} heads of {self.D}" if self.K == self.H else f"{self.H} heads of {self.D}, {self.K} key/value"
        mask = f"window {self.window}" if self.window is not None else "causal" if self.causal else "no mask"
        linear = f"C {self.width}, {'' if self.bias else 'no '}biases" if self.kind != "attention" else "no projections"
        return f"{self.name}: B {self.B}, {length}, {heads}, {mask}, {linear}"


CASES = (
    Case("seed", "self", B=16, T=256, S=256, H=6, K=6, D=64),
    Case("gpt2", "self", B=4, T=1024, S=1024, H=12, K=12, D=64, causal=True, bias=True),
    Case("bert", "self", B=32, T=128, S=128, H=12, K=12, D=64, bias=True),
    Case("vit", "self", B=64, T=50, S=50, H=12, K=12, D=64, bias=True),
    Case("one", "self", B=1, T=256, S=256, H=8, K=8, D=64, causal=True),
    Case("long", "self", B=1, T=16384, S=16384, H=8, K=8, D=64, causal=True),
    Case("window", "self", B=1, T=16384, S=16384, H=8, K=8, D=64, causal=True, window=512),
    Case("cross", "cross", B=1, T=512, S=8192, H=8, K=2, D=64),
    Case("decode", "attention", B=1, T=1, S=4096, H=32, K=8, D=128),
)


def of_length(T: int) -> Case:
    """The family of `scaling`."""
    return Case(f"T={T}", "self", B=1, T=T, S=T, H=8, K=8, D=64, causal=True)


def shortened(case: Case, longest: int) -> Case:
    """The same case, short: to check that everything runs, not to measure."""
    window = None if case.window is None else min(case.window, longest // 4)
    return case._replace(B=min(case.B, 2), T=min(case.T, longest), S=min(case.S, longest), window=window)


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


class Problem(NamedTuple):
    params: Params  # {} for kind "attention"
    inputs: tuple[np.ndarray, ...]  # x (B, T, C); query and memory (B, S, C); or q (B, H, T, D), k and v (B, K, S, D)
    dy: np.ndarray  # as the output

    def astype(self, dtype: Any) -> "Problem":
        params = {name: {leaf: a.astype(dtype) for leaf, a in p.items()} for name, p in self.params.items()}
        return Problem(params, tuple(x.astype(dtype) for x in self.inputs), self.dy.astype(dtype))


def draw(case: Case) -> Problem:
    """The same float32 numbers in every process: weights as PyTorch draws them, the rest standard normal."""
    B, T, S, C, H, K, D = case.B, case.T, case.S, case.width, case.H, case.K, case.D
    rng = np.random.default_rng(0)
    shapes = {
        "self": [(B, T, C)],
        "cross": [(B, T, C), (B, S, C)],
        "attention": [(B, H, T, D), (B, K, S, D), (B, K, S, D)],
    }[case.kind]
    *inputs, dy = (rng.standard_normal(shape, dtype=np.float32) for shape in [*shapes, shapes[0]])
    params = {} if case.kind == "attention" else init(0, C, H, num_kv_heads=K, bias=case.bias)
    for p in params.values():
        if "b" in p:  # drawn as 0
            p["b"] = rng.standard_normal(p["b"].shape, dtype=np.float32)
    return Problem(params, tuple(inputs), dy)


# ── the work ─────────────────────────────────────────────────────────────────────────────────────────────────────


def products(case: Case, direction: str) -> float:
    """Floating-point operations of the matrix products that a tiled attention does, projections included.

    In a tile: q kᵀ and p v forward; q kᵀ recomputed, do vᵀ, dzᵀ q, dz k and pᵀ do backward. An empty tile costs
    nothing, a mixed one as much as a full one. In projections, each product forward costs two backward.
    """
    backward = direction != "forward"
    tiles = (2 + 5 * backward) * 2 * case.D * case.B * case.H * _pairs(case)
    if case.kind == "attention":
        return tiles
    rows_by_columns = 2 * case.T * case.H * case.D + 2 * case.S * case.K * case.D  # q and out; k and v
    return tiles + (1 + 2 * backward) * 2 * case.B * case.width * rows_by_columns


def _pairs(case: Case) -> int:
    """Queries × keys in the tiles that the mask leaves."""
    mask, pairs = case.mask(), 0
    for i in range(0, case.T, TILE):
        rows = (i, min(i + TILE, case.T))
        for j in range(0, case.S, TILE):
            cols = (j, min(j + TILE, case.S))
            if mask is None or mask.block(rows, cols) != "empty":
                pairs += (rows[1] - rows[0]) * (cols[1] - cols[0])
    return pairs


def scores_bytes(case: Case) -> int:
    """One float32 for every head, query and key: a dense peer holds several such arrays."""
    return 4 * case.B * case.H * case.T * case.S
