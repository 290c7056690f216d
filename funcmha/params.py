"""Parameters: one table of leaves and axes, and everything that follows from it.

A parameter tree is a plain dict of dicts of arrays, with the heads stacked on one axis. Sizes are read off the arrays,
so no configuration can disagree with them.

Axes: H query heads, K key/value heads, D query/key width, E value width, O output width, Cq Ck Cv input widths.
"""

from collections.abc import Collection
from math import prod, sqrt
from typing import Any, NamedTuple

import numpy as np

from . import _check, tree
from ._arrays import Array, namespace, quiet_underflow

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
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
REQUIRED = ("q_proj.w", "k_proj.w", "v_proj.w", "out_proj.w")
HEAD_SPEC = {  # the same for one head, as `head_params` slices it
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
    """The sizes of the arrays of `params`.

    Raises KeyError for a missing or unexpected leaf, ValueError for a shape that does not fit SPEC, TypeError for mixed
    dtypes; each names the leaf.
    """
    axes, _ = check(params, SPEC)
    return Sizes(*(axes[letter] for letter in Sizes._fields))


def check(params: Params, spec: dict[str, str]) -> tuple[_check.Axes, dict[str, Array]]:
    """Check parameters: their axes, to check the other arguments against, and their leaves by dotted name."""
    if not isinstance(params, dict):
        raise TypeError(f"params must be a dict of dicts of arrays, got {type(params).__name__}")
    leaves = tree.flatten(params)
    _check.keys("params", leaves, required=[leaf for leaf in REQUIRED if leaf in spec], optional=spec)
    if ("bias_kv.k" in leaves) != ("bias_kv.v" in leaves):
        raise KeyError("params must have both bias_kv.k and bias_kv.v, or neither")
    axes = _check.arrays(*[(leaf, leaves[leaf], symbols) for leaf, symbols in spec.items() if leaf in leaves])
    if "H" in axes.size:
        if not axes["H"]:
            raise ValueError(f"q_proj.w must have at least one head, got shape {tuple(leaves['q_proj.w'].shape)}")
        _check.multiple("q_proj.w", axes["H"], "k_proj.w", axes["K"])
    return axes, leaves


def head_params(params: Params, h: int, /) -> Params:
    """The parameters of head `h`, as views: those of `SPEC` without the axes H and K

    They are the parameters of `head`. The output projection belongs to no single head and is left out. Raises
    IndexError unless 0 ≤ h < H.
    """
    H, h = sizes(params).H, _check.integer("h", h)
    if not 0 <= h < H:
        raise IndexError(f"h must be in 0 … {H - 1}, as q_proj.w has H={H} heads, got {h}")
    return one_head(params, h)


def one_head(params: Params, h: int) -> Params:
    """`head_params` without checks. Leaves may have batch axes, as gradients of single samples have."""
    H, K = params["q_proj"]["w"].shape[-3], params["k_proj"]["w"].shape[-3]
    return at_heads(params, {"H": h, "K": h // (H // K)}, HEAD_SPEC)


def group_params(params: Params, kv: slice) -> Params:
    """The parameters of key/value heads kv and of the query heads that read them, as views

    The bias of the output projection, which is added once, goes with the first key/value head.
    """
    K = params["k_proj"]["w"].shape[0]
    if kv == slice(0, K):
        return dict(params)
    readers = params["q_proj"]["w"].shape[0] // K
    heads = {"H": slice(kv.start * readers, kv.stop * readers), "K": kv}
    return at_heads(params, heads, [name for name in SPEC if name != "out_proj.b" or kv.start == 0])


def at_heads(params: Params, index: dict[str, Any], names: Collection[str]) -> Params:
    """Of the leaves with these names, which may have batch axes, those places on the axes H and K"""
    at = {name: (..., *(index.get(axis, slice(None)) for axis in SPEC[name].split())) for name in names}
    return tree.unflatten({name: a[at[name]] for name, a in tree.flatten(params).items() if name in at})


def join_heads(heads: list[Params], K: int) -> Params:
    """A tree of parameters, or of gradients, from those of its heads, whose leaves may have batch axes

    Leaves with an axis H are stacked. Those with an axis K are first summed over the query heads that share them, then
    stacked. The others are summed.
    """
    leaves, joined, readers = [tree.flatten(head) for head in heads], {}, len(heads) // K
    for name, symbols in SPEC.items():
        parts, axes = [own[name] for own in leaves if name in own], symbols.split()
        if not parts:
            continue
        if "K" in axes:
            parts = [sum(parts[i + 1 : i + readers], parts[i]) for i in range(0, len(parts), readers)]
        where = next((i - len(axes) for i, axis in enumerate(axes) if axis in "HK"), None)
        joined[name] = sum(parts[1:], parts[0]) if where is None else namespace(parts[0]).stack(parts, axis=where)
    return tree.unflatten(joined)


def leaf(params: Params, name: str) -> Array:
    """The array under a dotted name of `SPEC`, None where there is none."""
    branch, _, last = name.partition(".")
    return params.get(branch, {}).get(last)


def in_order_of(params: Params, dparams: Params) -> Params:
    """The gradient of the parameters, its leaves in their order."""
    return {name: {last: dparams[name][last] for last in branch} for name, branch in params.items()}


def drop_absent(params: Params) -> Params:
    """The tree without leaves that are None, and without the branches that this empties."""
    kept = {name: {last: a for last, a in branch.items() if a is not None} for name, branch in params.items()}
    return {name: branch for name, branch in kept.items() if branch}


def join_groups(groups: list[Params]) -> Params:
    """The gradient of all parameters from those of groups of heads: concatenated, or summed where they share a leaf."""
    if len(groups) == 1:
        return groups[0]
    leaves, joined = [tree.flatten(group) for group in groups], {}
    for name in list(leaves[0]):
        parts, axes = [group.pop(name) for group in leaves if name in group], SPEC[name].split()
        where = next((i - len(axes) for i, axis in enumerate(axes) if axis in "HK"), None)
        joined[name] = sum(parts[1:], parts[0]) if where is None else namespace(parts[0]).concat(parts, axis=where)
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
    """A tree of `SPEC` from the distributions of `torch.nn.MultiheadAttention`; a seed gives the same bits everywhere.

    H = num_heads, K = num_kv_heads or H, D = head_dim or embed_dim / H, E = value_dim or D, Cq = embed_dim,
    Ck = kdim or Cq, Cv = vdim or Cq, O = out_dim or embed_dim. All sizes are at least 1. NumPy arrays of `dtype`, in
    native byte order.

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
    dtype = dtype.newbyteorder("=")
    wanted = list(REQUIRED) + ["q_proj.b", "k_proj.b", "v_proj.b", "out_proj.b"] * bias
    wanted += ["bias_kv.k", "bias_kv.v"] * bias_kv + ["sink.w"] * sink + ["q_norm.w", "k_norm.w"] * qk_norm
    wanted.sort(key=list(SPEC).index)
    return tree.unflatten({leaf: _draw(leaf, size, int(seed)).astype(dtype) for leaf in wanted})


def _init_sizes(*given: Any) -> Sizes:
    names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "value_dim", "kdim", "vdim", "out_dim")
    for name, n in zip(names, given, strict=True):
        if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
    C, H, K, D, *others = given
    if D is None and C % H:
        raise ValueError(f"embed_dim must be a multiple of num_heads={H} unless head_dim is given, got {C}")
    K, D = H if K is None else K, C // H if D is None else D
    _check.multiple("num_heads", H, "num_kv_heads", K)
    E, Ck, Cv, O = (default if n is None else n for n, default in zip(others, (D, C, C, C), strict=True))
    return Sizes(H, K, D, E, C, Ck, Cv, O)


def _draw(leaf: str, size: Sizes, seed: int) -> np.ndarray:
    """One leaf in float64. Each has its own stream of random bits, so that no leaf depends on which others exist."""
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


# NumPy guarantees the raw bits of a bit generator for ever, but not its distributions, nor the last bit of a logarithm.


def _uniform(bits: np.random.PCG64, n: int) -> np.ndarray:
    """n numbers in [0, 1), multiples of 2⁻⁵³."""
    return (bits.random_raw(n) >> np.uint64(11)) * 2.0**-53


def _normal(bits: np.random.PCG64, n: int) -> np.ndarray:
    """n standard normal numbers, as ratios of uniforms (Kinderman and Monahan 1977): the logarithm only decides."""
    found = np.zeros(0)
    while found.size < n:
        u, v = 1 - _uniform(bits, 64), _uniform(bits, 64)
        x = 1.7155277699214135 * (v - 0.5) / u  # √(8/e)
        found = np.concatenate([found, x[x * x <= -4 * np.log(u)]])
    return found[:n]
