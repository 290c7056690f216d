"""A pair as a function of PyTorch: autograd, its checks, its compiler, and whose memory is whose."""

import copy
import functools
import gc
import pickle

import numpy as np
import pytest
import torch

from funcmha import attention, attention_vjp, init, masks, mha, mha_vjp, tree
from funcmha.dropout import Masked, masked, seeded
from funcmha.engines import TILED
from funcmha.interop.torch import (
    multi_head_attention_forward,
    multi_head_attention_forward_vjp,
    operators,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from funcmha.interop.torch.autograd import as_torch_function
from funcmha.interop.torch.pairs import PAIRS as _PAIRS
from funcmha.merge import merge, merge_vjp

F = torch.nn.functional


def leaf(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def qkv(dtype=torch.float64):
    return [leaf(2, 3, n, width, dtype=dtype) for n, width in ((5, 4), (7, 4), (7, 6))]


def small():
    """For checks by finite differences, which go number by number."""
    return [leaf(2, n, width) for n, width in ((3, 2), (5, 2), (5, 1))]


def compiled(f, **options):
    """Without C++, which would take a minute: what is tested is what the compiler is given."""
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


def as_it_is(f):
    return f


both_ways = pytest.mark.parametrize("way", [as_it_is, compiled], ids=["as it runs", "compiled"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def gradients(y, leaves):
    """Of Σ y², so that the cotangent is no constant."""
    return torch.autograd.grad((y**2).sum(), leaves)


def close(got, want, tolerance=1e-11):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= tolerance * max(1, want.abs().max())


# ── PyTorch's own checks ─────────────────────────────────────────────────────────────────────────────────────────

PAIRS = {
    "attention": (attention, attention_vjp, {"mask": masks.causal()}, small),
    "attention with everything": (
        attention,
        attention_vjp,
        {"mask": masks.window(2, 1), "softcap": 3.0, "dropout": seeded(2024, 0.3)},
        lambda: [*small(), leaf(2, 1, 5), leaf(2)],
    ),
    "merge, of two outputs": (merge, merge_vjp, {}, lambda: [leaf(3, 2), leaf(3), leaf(3, 2, seed=1), leaf(3, seed=1)]),
    "torch's own call": (scaled_dot_product_attention, scaled_dot_product_attention_vjp, {"scale": 0.3}, small),
}
all_pairs = pytest.mark.parametrize(("f", "f_vjp", "static", "inputs"), PAIRS.values(), ids=PAIRS)


@all_pairs
def test_gradcheck(f, f_vjp, static, inputs):
    assert torch.autograd.gradcheck(as_torch_function(f, f_vjp, **static), inputs())


@all_pairs
def test_opcheck(f, f_vjp, static, inputs):
    """Schema, fake tensors, registration of autograd, and the compiler's graphs with dynamic shapes."""
    g, tensors = as_torch_function(f, f_vjp, **static), inputs()
    name, structure = list(_PAIRS)[-1], f"(({', '.join(map(str, range(len(tensors))))}, ), {{}}, )"
    torch.library.opcheck(operators.apply, (name, structure, tensors))
    tensors = [x.detach() for x in tensors]
    ys = g(*tensors)
    torch.library.opcheck(operators.apply_vjp, (name, structure, tensors, list(ys) if isinstance(ys, tuple) else [ys]))


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_attention_matches_torch(way):
    attend = as_torch_function(attention, attention_vjp, mask=masks.causal())
    inputs = qkv()
    y, want = way(attend)(*inputs), F.scaled_dot_product_attention(*inputs, is_causal=True)
    close(y, want)
    for g, h in zip(gradients(y, inputs), gradients(want, inputs), strict=True):
        close(g, h)


@both_ways
def test_a_tree_of_parameters_and_a_mask_that_changes(way):
    """The oracle is `torch.nn.MultiheadAttention`, whose parameters are the tree, as views of its own tensors."""
    module = torch.nn.MultiheadAttention(6, 3, batch_first=True, dtype=torch.float64)
    layer = as_torch_function(mha, mha_vjp)

    def attend(x, padding):
        w, b = module.in_proj_weight.reshape(3, 3, 2, 6), module.in_proj_bias.reshape(3, 3, 2)
        params = {name: {"w": w[i], "b": b[i]} for i, name in enumerate(("q_proj", "k_proj", "v_proj"))}
        params["out_proj"] = {"w": module.out_proj.weight.reshape(6, 3, 2), "b": module.out_proj.bias}
        return layer(params, x, x, x, None, mask=~padding[:, None, None])

    x, attend = leaf(2, 5, 6), way(attend)
    for seed in (0, 1):
        padding = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed)) < 0.4
        padding[:, 0] = False
        y = attend(x, padding)
        want, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
        close(y, want)
        leaves = [x, *module.parameters()]
        for g, h in zip(gradients(y, leaves), gradients(want, leaves), strict=True):
            close(g, h)


@both_ways
@pytest.mark.parametrize("need_weights", [True, False])
def test_outputs_have_the_structure_that_the_function_gives(way, need_weights):
    """A tuple with None in it, of `multi_head_attention_forward`."""
    static = {"embed_dim_to_check": 6, "num_heads": 3, "add_zero_attn": False, "dropout_p": 0.0}
    static |= {"need_weights": need_weights}
    f = as_torch_function(multi_head_attention_forward, multi_head_attention_forward_vjp, **static)
    inputs = [
        leaf(5, 2, 6),
        leaf(7, 2, 6),
        leaf(7, 2, 6, seed=1),
        leaf(18, 6),
        leaf(18),
        None,
        None,
        leaf(6, 6),
        leaf(6),
    ]
    y, weights = way(f)(*inputs)
    arguments = (*inputs[:3], 6, 3, *inputs[3:7], False, 0.0, *inputs[7:])
    want, want_weights = F.multi_head_attention_forward(*arguments, need_weights=need_weights)
    close(y, want)
    assert (weights is None) == (not need_weights)
    leaves = [x for x in inputs if x is not None]
    loss, want_loss = (
        (a**2).sum() + (0 if p is None else (p**3).sum()) for a, p in ((y, weights), (want, want_weights))
    )
    for g, h in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want_loss, leaves), strict=True):
        close(g, h)


@both_ways
def test_an_output_that_nobody_uses_has_cotangent_0(way):
    inputs = [leaf(2, 5, 3), leaf(2, 5), leaf(2, 5, 3, seed=1), leaf(2, 5, seed=1)]
    f = way(as_torch_function(merge, merge_vjp))
    g, h = (gradients(f(*inputs)[i], inputs) for i in (0, 1))
    o, lse = f(*inputs)
    both = torch.autograd.grad((o**2).sum() + (lse**2).sum(), inputs)
    for a, b, c in zip(g, h, both, strict=True):
        close(a + b, c)


@both_ways
def test_some_inputs_only_want_a_gradient(way):
    q, k, v = qkv()
    k = k.detach()
    attend = way(as_torch_function(attention, attention_vjp))
    y = attend(q, k, v)
    want = F.scaled_dot_product_attention(q, k, v)
    for g, h in zip(gradients(y, (q, v)), gradients(want, (q, v)), strict=True):
        close(g, h)
    assert not attend(q.detach(), k, v.detach()).requires_grad
    with torch.no_grad():
        assert not attend(q, k, v).requires_grad


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_in_is_dtype_out(way, dtype):
    """What float64 gives, within the rounding of the dtype."""
    inputs = qkv(dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, want = way(as_torch_function(attention, attention_vjp))(*inputs), F.scaled_dot_product_attention(*wide)
    assert y.dtype == dtype
    (y.double() ** 2).sum().backward()
    (want**2).sum().backward()
    for x, w in zip(inputs, wide, strict=True):
        assert x.grad.dtype == dtype
        close(x.grad.double(), w.grad, 16 * torch.finfo(dtype).eps)


@both_ways
def test_both_ways_give_the_same_bits(way):
    attend = as_torch_function(attention, attention_vjp, mask=masks.causal(), scale=0.3)
    inputs = qkv()
    y, other = attend(*inputs), way(attend)(*inputs)
    assert torch.equal(y, other)
    for g, h in zip(gradients(y, inputs), gradients(other, inputs), strict=True):
        assert torch.equal(g, h)


@both_ways
def test_inputs_without_a_gradient(way):
    """A place is an integer and has none; of the other f_vjp says that it has none, which is 0."""
    f = as_torch_function(
        lambda x, place, other, /: (x[place], (x.shape, place)),
        lambda cache, dy, /: (np.where(np.arange(cache[0][0]) == cache[1], dy, 0.0), None, None),
    )
    x, other = leaf(5), leaf(3)
    y = way(f)(x, torch.tensor([2]), other)
    (y**2).sum().backward()
    want = torch.zeros(5, dtype=torch.float64)
    want[2] = 2 * x.detach()[2]
    close(x.grad, want)
    assert other.grad is None or not other.grad.any()


def test_tensors_given_once_are_arrays():
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    inputs = qkv()
    y = as_torch_function(attention, attention_vjp, mask=mask)(*inputs)
    close(y, F.scaled_dot_product_attention(*inputs, mask))


def test_a_second_backward_is_the_first():
    """The first takes the cache with it, so that memory is free again; the second makes it anew."""
    inputs = qkv()
    y = as_torch_function(attention, attention_vjp)(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    assert not y.grad_fn.kept.cache
    for g, h in zip(first, torch.autograd.grad(y.sum(), inputs), strict=True):
        assert torch.equal(g, h)


def test_functional_gradients():
    q, k, v = (x.detach() for x in qkv())
    attend = as_torch_function(attention, attention_vjp)
    got = torch.func.grad(lambda q, v: (attend(q, k, v) ** 2).sum(), argnums=(0, 1))(q, v)
    want = torch.func.grad(lambda q, v: (F.scaled_dot_product_attention(q, k, v) ** 2).sum(), argnums=(0, 1))(q, v)
    for g, h in zip(got, want, strict=True):
        close(g, h)


def test_checkpointing_runs_the_forward_again():
    inputs = qkv()
    attend = as_torch_function(attention, attention_vjp)
    y = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    for g, h in zip(gradients(y, inputs), gradients(attend(*inputs), inputs), strict=True):
        assert torch.equal(g, h)


def test_compiled_code_serves_other_shapes_and_functions():
    plain = as_torch_function(attention, attention_vjp)
    causal = as_torch_function(attention, attention_vjp, mask=masks.causal())

    def beside_mean(f, q, k, v):
        return f(q, k, v) - v.mean(-2)  # which the compiler refuses if it takes y for smaller than it is

    for n in (2, 3, 6):
        inputs = [leaf(5, 4), leaf(8, 4), leaf(8, n)]
        for f in (plain, causal):
            assert torch.equal(compiled(beside_mean)(f, *inputs), beside_mean(f, *inputs))


@pytest.mark.parametrize("operator", [False, True])
def test_a_function_may_go_before_its_gradient_comes(operator):
    """The graph holds it, and nothing else does."""
    inputs = qkv()
    attend = as_torch_function(attention, attention_vjp)
    name = list(_PAIRS)[-1]
    y = operators.apply(name, "((0, 1, 2, ), {}, )", inputs)[0] if operator else attend(*inputs)
    del attend
    gc.collect()
    want = F.scaled_dot_product_attention(*inputs)
    for g, h in zip(gradients(y, inputs), gradients(want, inputs), strict=True):
        close(g, h)
    del y
    gc.collect()
    assert name not in _PAIRS


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────


def identity(x, /, **static):
    return static.get("answer", lambda a: a)(x), ()


def identity_vjp(cache, dy, /):
    return (dy,)


def read_only(a):
    a = a * 1
    a.flags.writeable = False
    return a


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tensors_and_arrays_share_memory(dtype):
    """Of strided inputs, outputs, cotangents and gradients, in both directions."""
    arrays = {}

    def f(x, /):
        arrays["x"], arrays["y"] = x, x + x
        return arrays["y"], ()

    def f_vjp(cache, dy, /):
        arrays["dy"], arrays["dx"] = dy, dy + dy
        return (arrays["dx"],)

    x = leaf(3, 7, 5, dtype=dtype).transpose(0, 1).detach().requires_grad_()
    y = as_torch_function(f, f_vjp)(x)
    dy = torch.ones(5, 3, 7, dtype=dtype).permute(2, 1, 0)
    (dx,) = torch.autograd.grad(y, x, dy)
    for name, tensor in {"x": x, "y": y, "dy": dy, "dx": dx}.items():
        assert arrays[name].ctypes.data == tensor.data_ptr(), name
        assert arrays[name].strides == tuple(n * tensor.element_size() for n in tensor.stride()), name


@both_ways
@pytest.mark.parametrize(
    "answer",
    [lambda a: a, lambda a: a.T, lambda a: (a * 1)[::-1], read_only, lambda a: np.broadcast_to(a[:1], a.shape)],
    ids=["the input", "a view of it", "backwards", "read-only", "broadcast"],
)
def test_an_output_has_memory_of_its_own_to_write_to(way, answer):
    x = leaf(5, 5)
    before = x.detach().clone()
    f = way(as_torch_function(identity, identity_vjp, answer=answer))
    y = f(x.detach())
    np.testing.assert_array_equal(y.numpy(), answer(before.numpy()))
    y += 1
    assert torch.equal(x, before)


def test_an_operator_returns_contiguous_tensors():
    f = as_torch_function(lambda x, /: (x.T * 2, ()), lambda _, dy, /: (dy.T * 2,))
    x = leaf(3, 5)
    name = list(_PAIRS)[-1]
    torch.library.opcheck(operators.apply, (name, "((0, ), {}, )", [x]), test_utils="test_faketensor")
    dy = torch.ones(5, 3, dtype=torch.float64)
    torch.library.opcheck(
        operators.apply_vjp, (name, "((0, ), {}, )", [x.detach()], [dy]), test_utils="test_faketensor"
    )
    assert torch.equal(compiled(f)(x), f(x))


@pytest.mark.parametrize("share", [lambda dy: dy, lambda dy: dy * 1], ids=["the cotangent's", "one for both"])
def test_gradients_have_memory_of_their_own(share):
    """.grad is written to in place: neither the cotangent nor another input's gradient may be the same memory."""

    def f_vjp(cache, dy, /):
        g = share(dy)
        return g, g

    a, b = leaf(3), leaf(3, seed=1)
    dy = torch.ones(3, dtype=torch.float64)
    as_torch_function(lambda x, y, /: (x + y, ()), f_vjp)(a, b).backward(dy)
    a.grad += 1
    assert torch.equal(b.grad, dy)
    assert torch.equal(dy, torch.ones(3, dtype=torch.float64))


def exp(x, /):
    """Whose cache holds y."""
    y = np.exp(x)
    return y, (y,)


def exp_vjp(cache, dy):
    return (dy * cache[0],)


@pytest.mark.parametrize("name", ["an input", "the output"])
def test_writing_in_place_before_the_backward_is_refused(name):
    """The cache refers to it: the gradient would be silently wrong."""
    q, k, v = (x * 1 for x in qkv())
    if name == "an input":
        y = as_torch_function(attention, attention_vjp, engine=TILED)(q, k, v)
    else:
        y = as_torch_function(exp, exp_vjp)(k)
    with torch.no_grad():
        (k if name == "an input" else y).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_outside_the_cache_may_be_written_to():
    """As in x = layer(x); x += residual."""
    x = leaf(2, 5, 6)
    params = tree.map(torch.tensor, init(0, 6, 3, dtype=np.float64))
    layer = as_torch_function(mha, mha_vjp)
    y = layer(params, x, x, x)
    y += x
    for g, h in zip(gradients(y, [x]), gradients(layer(params, x, x, x) + x, [x]), strict=True):
        assert torch.equal(g, h)


# ── torch.func ───────────────────────────────────────────────────────────────────────────────────────────────────


def attends(f):
    """Self-attention of a (…, T, E), as a function of one tensor."""
    return lambda a: f(a, a, a)


def cubed(f):
    return lambda a: (f(a, a, a) ** 3).sum()


TRANSFORMS = {  # of self-attention, applied to (3, 2, 5, 4)
    "jacrev": lambda f: lambda x: torch.func.jacrev(attends(f))(x[0]),
    "vmap": lambda f: torch.vmap(attends(f)),
    "vmap of another axis": lambda f: torch.vmap(attends(f), in_dims=1, out_dims=2),
    "vmap of some inputs": lambda f: lambda x: torch.vmap(f, in_dims=(0, None, None))(x, x[0], x[1]),
    "vmap of vmap": lambda f: torch.vmap(torch.vmap(attends(f))),
    "gradients of each sample": lambda f: torch.vmap(torch.func.grad(cubed(f))),
    "gradients of each sample's heads": lambda f: torch.vmap(torch.vmap(torch.func.grad(cubed(f)))),
    "gradient of vmap": lambda f: torch.func.grad(lambda x: (torch.vmap(attends(f))(x) ** 3).sum()),
    "jacobian of each sample": lambda f: torch.vmap(torch.func.jacrev(attends(f))),
    "jacobian of vmap": lambda f: torch.func.jacrev(torch.vmap(attends(f))),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_match_torch(transform):
    """The oracle is PyTorch's attention under the same transform."""
    x = leaf(3, 2, 5, 4).detach()
    got, want = (transform(f)(x) for f in (as_torch_function(attention, attention_vjp), F.scaled_dot_product_attention))
    close(got, want)


@both_ways
def test_vmap_has_a_gradient(way):
    x = leaf(3, 2, 5, 4)
    ours, theirs = as_torch_function(attention, attention_vjp), F.scaled_dot_product_attention
    got, want = way(torch.vmap(attends(ours)))(x), torch.vmap(attends(theirs))(x)
    close(got, want)
    for g, h in zip(gradients(got, [x]), gradients(want, [x]), strict=True):
        close(g, h)


def test_vmap_of_trees_and_of_several_outputs():
    """The gradients of each sample with respect to shared parameters, and both outputs of `merge`."""
    params = tree.map(torch.tensor, init(0, 6, 3, dtype=np.float64))
    layer, x = as_torch_function(mha, mha_vjp), leaf(4, 5, 6).detach()
    each = torch.vmap(torch.func.grad(lambda p, a: cubed(lambda *xs: layer(p, *xs))(a)), in_dims=(None, 0))(params, x)
    for i in range(4):
        alone = torch.func.grad(lambda p, i=i: cubed(lambda *xs: layer(p, *xs))(x[i]))(params)
        tree.map(lambda g, h, i=i: close(g[i], h), each, alone)
    inputs = [leaf(2, 5, 3).detach(), leaf(2, 5).detach()] * 2
    f = as_torch_function(merge, merge_vjp)
    for got, want in zip(torch.vmap(f)(*inputs), f(*inputs), strict=True):
        assert torch.equal(got, want)


def test_a_jacobian_has_one_forward():
    """Its rows are so many cotangents for one cache."""
    calls = []

    def f(x, /):
        calls.append(x)
        return x * x, x

    y, pull = torch.func.vjp(as_torch_function(f, lambda x, dy, /: (2 * x * dy,)), leaf(5).detach())
    torch.vmap(pull)(torch.eye(5, dtype=torch.float64))
    torch.vmap(pull)(torch.eye(5, dtype=torch.float64))
    assert len(calls) == 1
    assert y.shape == (5,)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # which PyTorch uses here
@pytest.mark.parametrize("of", [torch.func.jacfwd, torch.func.hessian], ids=["jacfwd", "hessian"])
def test_forward_mode_is_refused(of):
    attend = as_torch_function(attention, attention_vjp)
    with pytest.raises(NotImplementedError, match="as_torch_function has no forward mode"):
        of(cubed(attend))(leaf(2, 5, 4).detach())


def test_a_batch_of_cotangents_of_autograd_is_refused():
    """It is another vmap than torch.vmap, and an older one."""
    q, k, v = qkv()
    y = as_torch_function(attention, attention_vjp)(q, k, v)
    with pytest.raises(NotImplementedError, match=r"is_grads_batched=True .*: use torch\.func\.jacrev"):
        torch.autograd.grad(y, [q], torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True)


# ── pickle and copy ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_module_that_holds_it_is_pickled():
    """With what is static, masks and arrays too; the pair is found by name."""
    keep = np.random.default_rng(0).random((5, 7)) > 0.3
    net = torch.nn.Linear(4, 4)
    net.attend = as_torch_function(attention, attention_vjp, mask=masks.causal() & keep, scale=0.3)
    again, inputs = pickle.loads(pickle.dumps(net)), qkv()
    y, other = net.attend(*inputs), again.attend(*inputs)
    assert torch.equal(y, other)
    for g, h in zip(gradients(y, inputs), gradients(other, inputs), strict=True):
        assert torch.equal(g, h)


def test_a_copy_is_itself():
    attend = as_torch_function(attention, attention_vjp)
    assert copy.deepcopy(attend) is copy.copy(attend) is attend


@pytest.mark.parametrize(
    "pair", [(lambda x: (x, x), identity_vjp), (identity, lambda x, dy: (dy,))], ids=["f", "f_vjp"]
)
def test_a_lambda_is_not_pickled(pair):
    with pytest.raises(
        pickle.PicklingError,
        match=r"as_torch_function\(.*<lambda>, …\) cannot be pickled: f.* must be a function that its module",
    ):
        pickle.dumps(as_torch_function(*pair))


def test_a_partial_is_pickled_as_its_function_is():
    f = functools.partial(attention, scale=0.3)
    again = pickle.loads(pickle.dumps(as_torch_function(f, attention_vjp)))
    close(again(*qkv()), F.scaled_dot_product_attention(*qkv(), scale=0.3))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_derivative_is_refused():
    inputs = qkv()
    attend = as_torch_function(attention, attention_vjp)
    (operator,) = operators.apply(list(_PAIRS)[-1], "((0, 1, 2, ), {}, )", inputs)
    for y in (attend(*inputs), operator):
        (dq,) = torch.autograd.grad((y**2).sum(), inputs[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="the gradient of a funcmha pair has no gradient"):
            dq.sum().backward()


ELSEWHERE = torch.empty(7, 4, device="meta")


@pytest.mark.parametrize(
    ("error", "message", "inputs", "options"),
    [
        (TypeError, r"inputs.1 must be on the CPU, .* got a tensor on meta", [0, ELSEWHERE, 2], {}),
        (TypeError, r"inputs.1 must be a tensor, .* got ndarray", [0, np.zeros((7, 4)), 2], {}),
        (TypeError, r"inputs.1 must be real", [0, torch.zeros(7, 4, dtype=torch.complex128), 2], {}),
        (TypeError, r"options have no gradient, and one of mask requires one", [0, 1, 2], {"mask": leaf(5, 7)}),
        (TypeError, r"inputs.1.w must be a tensor, None, or dicts and tuples", [0, {"w": 3.0}, 2], {}),
        (TypeError, r"options.scale must be .* are given once, to as_torch_function", [0, 1, 2], {"scale": 0.3}),
        (TypeError, r"options.mask must be .* got Band", [0, 1, 2], {"mask": masks.causal()}),
        (TypeError, r"options.dropout must be .* got Masked", [0, 1, 2], {"dropout": masked(np.ones(7, bool), 0)}),
        (ValueError, r"k must be \(\.\.\., K, S, D\)", [0, 2, 2], {}),
        (TypeError, "weight= is no option, which are mask, scale, softcap, dropout", [0, 1, 2], {"weight": None}),
    ],
)  # fmt: skip
def test_refusals(error, message, inputs, options):
    tensors = qkv()
    inputs = [tensors[x] if isinstance(x, int) else x for x in inputs]
    with pytest.raises(error, match=message):
        as_torch_function(attention, attention_vjp)(*inputs, **options)


def test_an_operator_whose_function_is_gone_says_so():
    with pytest.raises(RuntimeError, match="the function of attention 123456 is gone"):
        operators.apply("attention 123456", "((0, ), {}, )", [leaf(3)])


def test_a_tensor_given_once_that_wants_a_gradient_is_refused():
    with pytest.raises(TypeError, match="mask has no gradient where it is given once"):
        as_torch_function(attention, attention_vjp, mask=leaf(5, 7))
    with pytest.raises(TypeError, match=r"dropout\.keep has no gradient where it is given once"):
        as_torch_function(attention, attention_vjp, dropout=Masked(leaf(5, 7), 0.1))


def test_a_mask_of_dropout_is_a_tensor_or_an_array():
    """Given once, or at each call through a function that makes dropout of it: the numbers of the array."""
    tensors, keep = qkv(), np.random.default_rng(0).random((5, 7)) < 0.7
    want, _ = attention(*(x.detach().numpy() for x in tensors), dropout=masked(keep, 0.3))
    once = as_torch_function(attention, attention_vjp, dropout=masked(torch.tensor(keep), 0.3))

    def dropped(*inputs, keep):
        return attention(*inputs, dropout=masked(keep, 0.3))

    each = as_torch_function(dropped, attention_vjp)
    assert np.array_equal(once(*tensors).detach(), want)
    assert np.array_equal(each(*tensors, keep=torch.tensor(keep)).detach(), want)


@pytest.mark.parametrize(("answer", "got"), [("word", "str"), (np.zeros(3, dtype=np.int64), "ndarray of int64")])
def test_an_output_that_is_no_floating_array_is_refused(answer, got):
    f = as_torch_function(lambda x, /: ((x, answer), ()), identity_vjp)
    with pytest.raises(TypeError, match=f"output.1 must be a floating array, None, .* got {got}"):
        f(leaf(3))


def test_what_is_no_function_is_refused_at_once():
    with pytest.raises(TypeError, match="f must be a function, got NoneType"):
        as_torch_function(None, attention_vjp)
    with pytest.raises(TypeError, match="f_vjp must be a function, got tuple"):
        as_torch_function(attention, ())
