"""Parameters: one table of leaves and axes, and what follows from it.

A parameter tree is a plain dict of dicts of arrays, the heads stacked on one axis. Sizes are read off the arrays, so no
configuration can disagree with them.

Axes: H query heads, K key/value heads, D query/key width, E value width, O output width, Cq Ck Cv input widths.
"""

from collections.abc import Iterator
from math import prod, sqrt
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from . import _check, tree
from ._xp import Array, namespace, quiet_underflow

Params = dict[str, Any]

SPEC = {  # leaf: axes
    "q_proj.w": "H D Cq",
    "q_proj.b": "H D",
    "k_proj.w": "K D Ck",
    "k_proj.b": "K D",
    "v_proj.w": "K E Cv",
    "v_proj.b": "K E",
    "out_proj.w": "O H E",
    "out_proj.b": "O",
    "bias_kv.k": "K D",
    "bias_kv.v": "K E",
    "sink.w": "H",
    "q_norm.w": "D",
    "q_norm.b": "D",
    "k_norm.w": "D",
    "k_norm.b": "D",
}
REQUIRED = ("q_proj.w", "k_proj.w", "v_proj.w", "out_proj.w")
HEAD_SPEC = {  # the same for one head, as `head_params` cuts it out
    leaf: " ".join(axis for axis in axes.split() if axis not in "HK")
    for leaf, axes in SPEC.items()
    if not leaf.startswith("out_proj")
}


class Sizes(NamedTuple):
    """The sizes of the axes of a parameter tree."""

    H: int  # query heads
    K: int  # key/value heads
    D: int  # query/key width of a head
    E: int  # value width of a head
    Cq: int  # width of the query input
    Ck: int  # width of the key input
    Cv: int  # width of the value input
    O: int  # width of the output


def sizes(params: Params, /) -> Sizes:
    """The sizes that the arrays of `params` show.

    Raises KeyError for a missing or unexpected leaf, ValueError for a shape that does not fit SPEC, TypeError for mixed
    dtypes; each names the leaf.
    """
    axes, _ = check(params, SPEC)
    return Sizes(*(axes[letter] for letter in Sizes._fields))


def check(params: Params, spec: dict[str, str]) -> tuple[_check.Axes, dict[str, Array]]:
    """The door for parameters: their axes, to check the other arguments against, and their leaves by dotted name."""
    if not isinstance(params, dict):
        raise TypeError(f"params must be a dict of dicts of arrays, got {type(params).__name__}")
    leaves = tree.flatten(params)
    _check.keys("params", leaves, required=[leaf for leaf in REQUIRED if leaf in spec], optional=spec)
    if ("bias_kv.k" in leaves) != ("bias_kv.v" in leaves):
        raise KeyError("params must have both bias_kv.k and bias_kv.v, or neither")
    _check.one_dtype(leaves.items())
    axes = _check.Axes()
    for leaf, symbols in spec.items():
        if leaf in leaves:
            axes(leaf, leaves[leaf], symbols)
    if "H" in axes.size:
        _check.multiple("q_proj.w", axes["H"], "k_proj.w", axes["K"])
    return axes, leaves


def head_params(params: Params, h: int, /) -> Params:
    """The parameters of head `h`, as views: those of `SPEC` without the axes H and K

    `head` takes them. The output projection belongs to no single head and is left out. Raises IndexError unless
    0 ≤ h < H.
    """
    H, K, *_ = sizes(params)
    if not isinstance(h, Integral) or isinstance(h, bool):
        raise TypeError(f"h must be an int, got {h!r} of type {type(h).__name__}")
    if not 0 <= h < H:
        raise IndexError(f"h must be in 0 … {H - 1}, as q_proj.w has H={H} heads, got {h}")
    index = {"H": h, "K": h // (H // K)}
    cut = {
        leaf: a[(*(index.get(axis, slice(None)) for axis in SPEC[leaf].split()), ...)]
        for leaf, a in tree.flatten(params).items()
        if leaf in HEAD_SPEC
    }
    return tree.unflatten(cut)


def stack_head(params: Params) -> Params:
    """The parameters of a head as a stack of one, where `SPEC` has an axis of heads."""
    leaves = tree.flatten(params)
    return tree.unflatten({leaf: a if SPEC[leaf] == HEAD_SPEC[leaf] else a[None, ...] for leaf, a in leaves.items()})


def unstack_head(params: Params) -> Params:
    """The head that `stack_head` made a stack of."""
    leaves = tree.flatten(params)
    return tree.unflatten({leaf: a if SPEC[leaf] == HEAD_SPEC[leaf] else a[0, ...] for leaf, a in leaves.items()})


def group_params(params: Params, start: int, stop: int) -> Params:
    """The parameters of key/value heads start … stop and of the query heads that read them, as views.

    The output's bias, which is added once, goes with the first of them.
    """
    per_key_head = params["q_proj"]["w"].shape[0] // max(params["k_proj"]["w"].shape[0], 1)
    heads = {"H": slice(start * per_key_head, stop * per_key_head), "K": slice(start, stop)}
    cut = {
        leaf: a[tuple(heads.get(axis, slice(None)) for axis in SPEC[leaf].split())]
        for leaf, a in tree.flatten(params).items()
        if leaf != "out_proj.b" or start == 0
    }
    return tree.unflatten(cut)


def join_groups(groups: list[Params]) -> Params:
    """The gradient of all parameters from those of all groups: side by side, or summed where groups share a leaf."""
    if len(groups) == 1:
        return groups[0]
    leaves = [tree.flatten(group) for group in groups]
    joined = {}
    for leaf in list(leaves[0]):
        parts = [group.pop(leaf) for group in leaves if leaf in group]
        head = next((i for i, axis in enumerate(SPEC[leaf].split()) if axis in "HK"), None)
        joined[leaf] = sum(parts[1:], parts[0]) if head is None else namespace(parts[0]).concat(parts, axis=head)
    return tree.unflatten(joined)


@quiet_underflow
def init(
    seed: int,
    embed_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    kdim: int | None = None,
    vdim: int | None = None,
    out_dim: int | None = None,
    bias: bool = True,
    bias_kv: bool = False,
    sink: bool = False,
    qk_norm: bool = False,
    dtype: Any = np.float32,
) -> Params:
    """A tree of `SPEC` from the distributions of `torch.nn.MultiheadAttention`; one seed gives the same bits anywhere.

    H = num_heads, K = num_kv_heads or H, D = head_dim or embed_dim / H, E = value_dim or D, Cq = embed_dim,
    Ck = kdim or Cq, Cv = vdim or Cq, O = out_dim or embed_dim. All sizes are at least 1. NumPy arrays of `dtype`.

    Input projections: U(±√(6 / (fan_in + fan_out))) (Glorot and Bengio 2010, eq. 16). PyTorch stores the three as one
    matrix when their inputs have one width, and its fan_out then counts the rows of all three; so does this.
    Output projection: U(±fan_in ** -0.5). Biases and sinks: 0. q_norm.w and k_norm.w: 1. bias_kv: N(0, 1 / (K·D)) and
    N(0, 1 / (K·E)).
    Raises ValueError for sizes that are not positive or do not divide, TypeError for a dtype that is not a float.
    """
    size = _init_sizes(embed_dim, num_heads, num_kv_heads, head_dim, value_dim, kdim, vdim, out_dim)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    for name, given in (("bias", bias), ("bias_kv", bias_kv), ("sink", sink), ("qk_norm", qk_norm)):
        _check.flag(name, given)
    dtype = np.dtype(dtype)
    if dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    wanted = list(REQUIRED) + ["q_proj.b", "k_proj.b", "v_proj.b", "out_proj.b"] * bias
    wanted += ["bias_kv.k", "bias_kv.v"] * bias_kv + ["sink.w"] * sink + ["q_norm.w", "k_norm.w"] * qk_norm
    wanted.sort(key=list(SPEC).index)
    return tree.unflatten({leaf: _draw(leaf, size, int(seed)).astype(dtype) for leaf in wanted})


def _init_sizes(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
    value_dim: int | None,
    kdim: int | None,
    vdim: int | None,
    out_dim: int | None,
) -> Sizes:
    given = locals()
    for name, n in given.items():
        if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be a multiple of num_heads={num_heads} unless head_dim is given, got {embed_dim}"
        )
    D = embed_dim // num_heads if head_dim is None else head_dim
    K = num_heads if num_kv_heads is None else num_kv_heads
    _check.multiple("num_heads", num_heads, "num_kv_heads", K)
    return Sizes(
        H=num_heads,
        K=K,
        D=D,
        E=D if value_dim is None else value_dim,
        Cq=embed_dim,
        Ck=embed_dim if kdim is None else kdim,
        Cv=embed_dim if vdim is None else vdim,
        O=embed_dim if out_dim is None else out_dim,
    )


def _draw(leaf: str, size: Sizes, seed: int) -> np.ndarray:
    """One leaf in float64. Each has a stream of its own, so that no leaf depends on which others there are."""
    shape = tuple(getattr(size, letter) for letter in SPEC[leaf].split())
    if leaf.endswith(".b") or leaf == "sink.w":
        return np.zeros(shape)
    if leaf in ("q_norm.w", "k_norm.w"):
        return np.ones(shape)
    n = prod(shape)
    bits = np.random.PCG64(np.random.SeedSequence([seed, *leaf.encode()]))
    if leaf.startswith("bias_kv"):
        return np.reshape(sqrt(1 / n) * _normal(bits, n), shape)
    return np.reshape(_bound(leaf, size) * (2 * _uniform(bits, n) - 1), shape)


def _bound(leaf: str, size: Sizes) -> float:
    """Half the width of the uniform distribution of a matrix."""
    H, K, D, E, Cq, Ck, Cv, _ = size
    if leaf == "out_proj.w":
        return sqrt(1 / (H * E))
    fan_in, fan_out = {"q_proj.w": (Cq, H * D), "k_proj.w": (Ck, K * D), "v_proj.w": (Cv, K * E)}[leaf]
    if Cq == Ck == Cv:
        fan_out = H * D + K * D + K * E
    return sqrt(6 / (fan_in + fan_out))


# NumPy promises the raw words of a bit generator for ever, but not its distributions, nor the last bit of a logarithm.


def _uniform(bits: np.random.PCG64, n: int) -> np.ndarray:
    """n numbers in [0, 1), multiples of 2⁻⁵³."""
    return (bits.random_raw(n) >> np.uint64(11)) * 2.0**-53


def _normal(bits: np.random.PCG64, n: int) -> np.ndarray:
    """n standard normal numbers, as ratios of uniforms (Kinderman and Monahan 1977): the logarithm only decides."""
    return np.concatenate([np.zeros(0), *_normal_chunks(bits, n)])[:n]


def _normal_chunks(bits: np.random.PCG64, n: int) -> Iterator[np.ndarray]:
    while n > 0:
        u, v = 1 - _uniform(bits, 64), _uniform(bits, 64)
        x = 1.7155277699214135 * (v - 0.5) / u  # √(8/e)
        x = x[x * x <= -4 * np.log(u)]
        n -= x.size
        yield x
