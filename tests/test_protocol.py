"""The rules that every op keeps: signatures, order in the file, caches, dtypes, purity."""

import ast
import importlib
import inspect
import random
import subprocess
import sys
from numbers import Number
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from conftest import BLOCKS, EACH
from pytrees import PYTREES

import funcmha
from funcmha import biases, merge, norms, ops, rotary
from funcmha.biases import RelativeBias
from funcmha.testing import check_vjp
from funcmha.testing.strategies import AttentionProblem, MhaProblem

PACKAGE = Path(funcmha.__file__).parent


class Pair(NamedTuple):
    """An op, its vjp, and inputs to try it on."""

    f: object
    f_vjp: object
    inputs: object  # dtype → tuple
    static: dict


SQUARE = MhaProblem(
    K=1, G=2, Ck=17, Cv=17, S=5, mask="intersection", bias="... H 1 S", bias_kv=True, zero_attn=True, rate=0.3
)
MODERN = MhaProblem(
    K=1, G=2, S=5, mask="window", bias="... H T+S-1", qk_norm="layer", rotary="half of some", sink=True, softcap=0.5,
    per_head=True, scale=0.5, rate=0.3, seeded=True,
)  # fmt: skip
ATTENTION = AttentionProblem(mask="intersection", bias="... H 1 S", rate=0.3)
MODERN_ATTENTION = AttentionProblem(
    mask="window", bias="... H T+S-1", sink=True, softcap=0.5, per_head=True, scale=0.5, rate=0.3, seeded=True
)


def normal(*shapes):
    return lambda dtype: tuple(np.random.default_rng(0).standard_normal(s).astype(dtype) for s in shapes)


def one_head_inputs(dtype):
    params, query, key, value, _ = MhaProblem(bias_kv=True).inputs(dtype)
    return funcmha.head_params(params, 1), query, key, value, None


OF_ENGINES = {
    "attention": Pair(funcmha.attention, funcmha.attention_vjp, ATTENTION.inputs, ATTENTION.static()),
    "attention, modern": Pair(
        funcmha.attention, funcmha.attention_vjp, MODERN_ATTENTION.inputs, MODERN_ATTENTION.static()
    ),
    "head": Pair(funcmha.head, funcmha.head_vjp, one_head_inputs, {"zero_attn": True}),
    "mha": Pair(funcmha.mha, funcmha.mha_vjp, SQUARE.inputs, SQUARE.static()),
    "mha, modern": Pair(funcmha.mha, funcmha.mha_vjp, MODERN.inputs, MODERN.static()),
    "self_attention": Pair(
        funcmha.self_attention,
        funcmha.self_attention_vjp,
        lambda dtype: tuple(SQUARE.inputs(dtype)[i] for i in (0, 1, 4)),
        SQUARE.static(),
    ),
}
PAIRS = {
    "linear": Pair(funcmha.linear, funcmha.linear_vjp, normal((2, 5, 3), (7, 3), (7,)), {}),
    "softmax": Pair(funcmha.softmax, funcmha.softmax_vjp, normal((2, 5, 3)), {}),
    "scores": Pair(ops.scores, ops.scores_vjp, normal((2, 4, 3, 5), (2, 2, 7, 5), (4, 1, 7)), {"softcap": 2.0}),
    **{
        f"{name}, {engine.name}": pair._replace(static=pair.static | {"engine": engine})
        for name, pair in OF_ENGINES.items()
        for engine in EACH
    },
    "rotate": Pair(
        rotary.rotate,
        rotary.rotate_vjp,
        normal((2, 5, 3)),
        {"rotary": rotary.table(np.arange(5), rotary.frequencies(2))},
    ),
    "rms_norm": Pair(norms.rms_norm, norms.rms_norm_vjp, normal((2, 5, 3), (3,)), {"eps": 1e-5}),
    "l2_norm": Pair(norms.l2_norm, norms.l2_norm_vjp, normal((2, 5, 3)), {"eps": 1e-5}),
    "layer_norm": Pair(norms.layer_norm, norms.layer_norm_vjp, normal((2, 5, 3), (3,), (3,)), {"eps": 1e-5}),
    "alibi": Pair(biases.alibi, biases.alibi_vjp, normal((3,)), {"T": 5, "S": 7, "offset": 2}),
    "lookup": Pair(
        biases.lookup, biases.lookup_vjp, normal((5, 3)), {"index": biases.clipped(biases.distances(5, 7), 2)}
    ),
    "merge": Pair(merge.merge, merge.merge_vjp, normal((2, 5, 3), (2, 5), (2, 5, 3), (2, 5)), {}),
}
# Their inputs or outputs hold an integer, or are tuples of any length, or nothing is computed with them: held to the
# protocol in test_kv_cache_append.py, test_kv_cache_step.py and test_packing.py.
ELSEWHERE = {"append", "pack", "unpack", "pad", "unpad", "step"}
TILED_PAIRS = [pair for name, pair in PAIRS.items() if name.endswith("tiled")]
all_pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
PORTABLE = {name: pair for name, pair in PAIRS.items() if not name.endswith("tiled")}
portable_pairs = pytest.mark.parametrize("pair", PORTABLE.values(), ids=PORTABLE)
# With half types the lse of `merge` is float32: inputs of two dtypes, which test_merge.py tries.
ONE_DTYPE = {name: pair for name, pair in PAIRS.items() if name != "merge"}
one_dtype_pairs = pytest.mark.parametrize("pair", ONE_DTYPE.values(), ids=ONE_DTYPE)


def on_arrays(pair):
    """The pair with the array of a `RelativeBias` in its place, in inputs, outputs and gradients."""

    def opened(x):
        return x.values if isinstance(x, RelativeBias) else x

    def closed(x, like):
        return RelativeBias(x) if isinstance(like, RelativeBias) else x

    like = pair.inputs("float64")
    y_like, _ = pair.f(*like, **pair.static)

    def f(*inputs, **static):
        if pair in TILED_PAIRS and any(np.iscomplexobj(a) for a in jax.tree.leaves(inputs)):
            static = static | {"engine": "sequential"}
        y, cache = pair.f(*map(closed, inputs, like), **static)
        return opened(y), cache

    def f_vjp(cache, dy):
        return tuple(map(opened, pair.f_vjp(cache, closed(dy, y_like))))

    return f, f_vjp, tuple(map(opened, like))


def test_every_public_op_is_here():
    modules = [node for node in map(vars(funcmha).get, funcmha.__all__) if inspect.ismodule(node)]
    own = {
        n for node in modules for n, f in vars(node).items()
        if (getattr(f, "__module__", None) or "").startswith(node.__name__)
    }  # fmt: skip
    public = {name for name in {*funcmha.__all__} | own if name.endswith("_vjp") and name[0] != "_"}
    public -= {"softmax_with_sink_vjp"}  # a formula that ops and derivatives share: it has no cache
    assert {name.removesuffix("_vjp") for name in public} == {pair.f.__name__ for pair in PAIRS.values()} | ELSEWHERE
    assert all(hasattr(funcmha, name) for name in funcmha.__all__)
    assert sorted(funcmha.__all__) == funcmha.__all__


@all_pairs
def test_purity_structure_and_gradient(pair):
    check_vjp(*on_arrays(pair), pair.static)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "interop" not in path.parts and "_vjp(" in path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_vjp_is_the_next_function_in_the_file(path):
    """In every file and in every class: where both are there, the vjp stands below what it is the vjp of."""
    tree = ast.parse(path.read_text())
    for scope in (tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))):
        names = [node.name for node in scope.body if isinstance(node, ast.FunctionDef)]
        for name in names:
            if name.endswith("_vjp") and name.removesuffix("_vjp") in names:
                assert names[names.index(name) - 1] == name.removesuffix("_vjp")


def test_every_part_with_gradients_is_among_those_files():
    assert {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in FILES} >= {
        *("ops", "mha", "merge", "packing", "rotary", "norms", "biases"),
        *(
            "engines/grouped",
            "engines/projections",
            "engines/batched",
            "engines/blocks/attention",
            "engines/tiled/attention",
        ),
        *("engines/tiled/linear", "kv_cache/append", "kv_cache/step"),
    }


@all_pairs
def test_the_signature_says_what_is_differentiable(pair):
    kinds = {p.kind for p in inspect.signature(pair.f).parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    cache, cotangent, *options = inspect.signature(pair.f_vjp).parameters.values()
    assert cache.name == "cache"
    assert cotangent.name.startswith("d")
    assert {cache.kind, cotangent.kind} == {inspect.Parameter.POSITIONAL_ONLY}
    assert {p.kind for p in options} <= {inspect.Parameter.KEYWORD_ONLY}
    differentiable = [p for p in inspect.signature(pair.f).parameters.values() if p.kind is p.POSITIONAL_ONLY]
    assert len(pair.f_vjp(pair.f(*pair.inputs("float64"), **pair.static)[1], cotangent_of(pair))) == len(differentiable)


def cotangent_of(pair, dtype="float64"):
    return pair.f(*pair.inputs(dtype), **pair.static)[0]


@all_pairs
def test_docstrings_open_with_the_formula_or_the_gradients(pair):
    assert "=" in pair.f.__doc__.splitlines()[0]
    assert "→" in pair.f.__doc__
    assert pair.f_vjp.__doc__.startswith("d")


@all_pairs
def test_the_cache_is_a_plain_pytree_named_after_its_op(pair):
    _, cache = pair.f(*pair.inputs("float64"), **pair.static)
    assert type(cache).__name__ == f"{pair.f.__name__.title().replace('_', '')}Cache"
    for flatten, unflatten in PYTREES.values():
        leaves, spec = flatten(cache)
        again = unflatten(leaves, spec)
        assert type(again) is type(cache)
        assert all(leaf is None or isinstance(leaf, (np.ndarray, Number)) for leaf in leaves)
        dy = cotangent_of(pair)
        for got, want in zip(pair.f_vjp(again, dy), pair.f_vjp(cache, dy), strict=True):
            jax.tree.map(np.testing.assert_array_equal, got, want)


def structure(cache):
    """A cache with its leaves replaced by their types: what is an array, a number, None."""
    return jax.tree.map(lambda leaf: "array" if isinstance(leaf, np.ndarray) else type(leaf).__name__, cache)


@all_pairs
def test_the_structure_of_a_cache_depends_on_no_number(pair):
    """An array is one whatever its values are: none is dropped because it is zero, or large, or cheap to recompute."""
    inputs = pair.inputs("float64")
    sizes = [jax.tree.map(lambda a, gain=gain: gain * a, inputs) for gain in (0.0, 1.0, 30.0, 1e3)]
    with np.errstate(over="ignore"):
        structures = [jax.tree.structure(structure(pair.f(*x, **pair.static)[1])) for x in sizes]
    assert all(other == structures[0] for other in structures)


@pytest.mark.slow
@portable_pairs
def test_jax_takes_the_pair_as_it_is(pair):
    """jax.custom_vjp(f).defvjp(f, f_vjp) needs no adaptor, under jit too, and equals JAX's own differentiation."""
    with jax.enable_x64(True):
        inputs = [jax.tree.map(jax.numpy.asarray, x) for x in pair.inputs("float64")]
        present = [i for i, x in enumerate(inputs) if x is not None]

        def plain(*args):
            filled = [args[present.index(i)] if i in present else None for i in range(len(inputs))]
            return pair.f(*filled, **pair.static)

        def plain_vjp(cache, dy):
            return tuple(g for i, g in enumerate(pair.f_vjp(cache, dy)) if i in present)

        ours = jax.custom_vjp(lambda *args: plain(*args)[0])
        ours.defvjp(plain, plain_vjp)
        args = [inputs[i] for i in present]
        every = tuple(range(len(args)))

        def loss(f):
            return lambda *a: sum((y**3).sum() for y in jax.tree.leaves(f(*a)))

        got = jax.jit(jax.grad(loss(ours), argnums=every))(*args)
        want = jax.jit(jax.grad(loss(lambda *a: plain(*a)[0]), argnums=every))(*args)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@one_dtype_pairs
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtype_in_is_dtype_out(pair, dtype):
    y, cache = pair.f(*pair.inputs(dtype), **pair.static)
    assert {a.dtype for a in jax.tree.leaves((y, pair.f_vjp(cache, y)))} == {np.dtype(dtype)}


@one_dtype_pairs
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_float32_rounded_once(pair, dtype):
    """T4: from the same numbers, bit for bit what float32 gives, rounded at the end and nowhere else."""
    inputs = pair.inputs(dtype)
    y, cache = pair.f(*inputs, **pair.static)
    y_32, cache_32 = pair.f(*cast(inputs, np.float32), **pair.static)
    got, want = (y, pair.f_vjp(cache, y)), (y_32, pair.f_vjp(cache_32, cast(y, np.float32)))
    jax.tree.map(np.testing.assert_array_equal, got, cast(want, dtype))


def cast(node, dtype):
    return jax.tree.map(lambda a: a.astype(dtype), node)


@one_dtype_pairs
@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
    ],
)
def test_all_is_computed_in_one_dtype(pair, dtype, computed, monkeypatch):
    """A NumPy scalar would turn float32 into float64, and the rounding at the end would cover it up."""
    rounded = set()
    for path in PACKAGE.rglob("*.py"):
        if "interop" in path.parts or "downcast(" not in path.read_text() or path.name == "_arrays.py":
            continue
        dotted = ".".join(("funcmha", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        module = importlib.import_module(dotted)
        monkeypatch.setattr(
            module, "downcast", lambda x, d, f=module.downcast: rounded.add(getattr(x, "dtype", None)) or f(x, d)
        )
    y, cache = pair.f(*pair.inputs(dtype), **pair.static)
    pair.f_vjp(cache, y)
    assert rounded - {None} == {np.dtype(computed)}
    paths, _ = jax.tree_util.tree_flatten_with_path(cache)
    exact = ("scale", "softcap")  # options in the engine of tiles, which takes them as they were given
    leaves = [leaf for path, leaf in paths if getattr(path[-1], "name", None) not in exact]
    assert all(isinstance(leaf, (np.ndarray, Number)) for leaf in leaves)
    dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, np.ndarray)}
    assert dtypes <= {np.dtype(computed), np.dtype(bool), np.dtype(np.int64), np.dtype(np.int32)}


@all_pairs
def test_no_call_changes_global_state(pair):
    def state():
        return np.geterr(), np.get_printoptions(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002

    before = state()
    y, cache = pair.f(*pair.inputs("float64"), **pair.static)
    pair.f_vjp(cache, y)
    with pytest.raises(TypeError):
        pair.f(*[None] * len(pair.inputs("float64")), **pair.static)
    assert state() == before


@all_pairs
def test_no_floating_point_warning_on_ordinary_input(pair):
    """T8. Underflow is allowed: the weight of a key that is far away is 0."""
    with np.errstate(all="raise", under="ignore"):
        y, cache = pair.f(*pair.inputs("float64"), **pair.static)
        pair.f_vjp(cache, y)


def test_the_core_imports_numpy_and_threadpoolctl_alone():
    code = (
        "import sys; before = set(sys.modules); import numpy; known = set(sys.modules); import funcmha;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - known};"
        "print(sorted(m for m in new - set(sys.stdlib_module_names) if 'cython' not in m))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['funcmha', 'numpy', 'threadpoolctl']"


@pytest.mark.parametrize("engine", ["sequential", "batched", BLOCKS])
def test_torch_tensors_are_arrays_like_others(engine):
    problem = AttentionProblem(mask="intersection", rate=0.3)
    arrays, static = problem.inputs("float64"), problem.static()
    want, _ = funcmha.attention(*arrays, **static)
    static["dropout"] = oracles.on_keep(lambda keep: torch.tensor(np.array(keep)), static["dropout"])
    tensors = (None if a is None else torch.tensor(np.array(a)) for a in arrays)
    got, _ = funcmha.attention(*tensors, **static, engine=engine)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
