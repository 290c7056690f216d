# %% [markdown]
# # Verified against PyTorch
#
# Multi-head attention written out head by head, forward and backward, beside `torch.nn.MultiheadAttention` with the
# same weights, at the sizes of a small GPT. Then what five times True does not show: float64, masks, cross attention,
# and how far each entry is from what rounding allows.
#
# This page is a script, `python examples/verify_against_torch.py`, with its output.

# %%
import numpy as np
import torch
from matplotlib import pyplot as plt

from funcmha import (
    attention_weights,
    engines,
    init,
    linear,
    linear_vjp,
    masks,
    mha,
    mha_vjp,
    softmax,
    softmax_vjp,
    tree,
)
from funcmha.interop.torch import to_state_dict
from funcmha.testing.tolerance import mha_bounds

B, T, C, H = 16, 256, 384, 6
D = C // H
rng = np.random.default_rng(0)
x = rng.standard_normal((B, T, C), dtype=np.float32)
dy = rng.standard_normal((B, T, C), dtype=np.float32) / np.float32(B * T) ** 0.5  # as of a loss that is a mean
params = init(0, C, H, bias=False)

# %% [markdown]
# ## The heads, one after another
#
# Forward: project, compare, weigh, sum. Backward: the same lines from the bottom up, from the last head to the first.


# %%
def by_hand(params, x):
    """y, the weights of each head, and the cache"""
    y, heads = 0, []
    for h in range(H):
        q, q_cache = linear(x, params["q_proj"]["w"][h])
        k, k_cache = linear(x, params["k_proj"]["w"][h])
        v, v_cache = linear(x, params["v_proj"]["w"][h])
        p, p_cache = softmax(D**-0.5 * q @ k.mT)
        y_h, out_cache = linear(p @ v, params["out_proj"]["w"][:, h])
        y = y + y_h
        heads.append((q, k, v, p, q_cache, k_cache, v_cache, p_cache, out_cache))
    return y, np.stack([head[3] for head in heads], axis=1), heads


def by_hand_vjp(heads, dy):
    """dx, and the gradients of the four projections by head"""
    dx, dw = 0, []
    for q, k, v, p, q_cache, k_cache, v_cache, p_cache, out_cache in reversed(heads):
        do, dw_out, _ = linear_vjp(out_cache, dy)
        dp, dv = do @ v.mT, p.mT @ do
        (dz,) = softmax_vjp(p_cache, dp)
        dq, dk = D**-0.5 * dz @ k, D**-0.5 * dz.mT @ q
        dx_q, dw_q, _ = linear_vjp(q_cache, dq)
        dx_k, dw_k, _ = linear_vjp(k_cache, dk)
        dx_v, dw_v, _ = linear_vjp(v_cache, dv)
        dx = dx + dx_q + dx_k + dx_v
        dw.insert(0, (dw_q, dw_k, dw_v, dw_out))
    dw_q, dw_k, dw_v, dw_out = zip(*dw, strict=True)
    return dx, np.concatenate([*dw_q, *dw_k, *dw_v]), np.concatenate(dw_out, axis=-1)


y, weights, heads = by_hand(params, x)
dx, dw_in, dw_out = by_hand_vjp(heads, dy)


# %% [markdown]
# ## PyTorch
#
# The same weights, and autograd for the gradients.


# %%
NAMES = {1: ["input"], 3: ["query", "key", "value"]}  # self-attention has one input, cross attention three


def by_torch(params, inputs, dy, **options):
    """Output, weights, and every gradient by name"""
    inputs = [torch.tensor(a, requires_grad=True) for a in inputs]
    query, key, value = inputs * (3 // len(inputs))
    widths = {"kdim": key.shape[-1], "vdim": value.shape[-1]}
    module = torch.nn.MultiheadAttention(C, H, bias=False, batch_first=True, dtype=query.dtype, **widths)
    module.load_state_dict({name: torch.from_numpy(a) for name, a in to_state_dict(params).items()})
    y, weights = module(query, key, value, average_attn_weights=False, **options)
    y.backward(torch.from_numpy(dy))
    dinputs = {f"d{name}": a.grad.numpy() for name, a in zip(NAMES[len(inputs)], inputs, strict=True)}
    dparams = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    return {"output": y.detach().numpy(), "weights": weights.detach().numpy()} | dinputs | dparams


want = by_torch(params, [x], dy)


def agree(name, got, want, tolerance=1e-5):
    """Print whether two arrays agree, and by how much they differ"""
    close = np.allclose(got, want, rtol=tolerance, atol=tolerance)
    print(f"{name:24} {close}   largest difference {np.abs(got - want).max():.0e}")
    assert close


# %% [markdown]
# ## Five comparisons

# %%
agree("output", y, want["output"])
agree("weights", weights, want["weights"])
agree("gradient of the input", dx, want["dinput"])
agree("gradient of in_proj", dw_in, want["in_proj_weight"])
agree("gradient of out_proj", dw_out, want["out_proj.weight"])


# %% [markdown]
# ## The library, by each engine
#
# `mha` is the loop above with every option that attention takes. `self_attention` adds up the gradients of query, key
# and value, as here.


# %%
def by_funcmha(params, inputs, dy, **options):
    """The same names as `by_torch`"""
    y, cache = mha(params, *inputs * (3 // len(inputs)), **options)
    dparams, *grads, _ = mha_vjp(cache, dy)
    grads = [sum(grads)] if len(inputs) == 1 else grads
    dinputs = {f"d{name}": a for name, a in zip(NAMES[len(inputs)], grads, strict=True)}
    return {"output": y, "weights": attention_weights(cache)} | dinputs | to_state_dict(dparams)


x, dy = x[:2], dy[:2]  # two samples from here on, to save time
want = by_torch(params, [x], dy)
for engine in engines.ENGINES:
    got = by_funcmha(params, [x], dy, engine=engine)
    print(engine, all(np.allclose(got[name], a, rtol=1e-5, atol=1e-5) for name, a in want.items()))

# %% [markdown]
# ## float64
#
# In double precision agreement is a million times closer, and nothing is rounded to float32 on the way.

# %%
params64, x64, dy64 = tree.map(lambda a: a.astype(np.float64), params), x.astype(np.float64), dy.astype(np.float64)
want64, got64 = by_torch(params64, [x64], dy64), by_funcmha(params64, [x64], dy64)
for name, a in want64.items():
    agree(name, got64[name], a, 1e-12)

# %% [markdown]
# ## Masks
#
# Causal, and the last keys of each sample are padding. PyTorch's masks are True where attention is forbidden, and its
# answer is an array; here a mask is True where a query attends, and takes no T × S array.

# %%
lengths = np.array([200, 256])
options = {
    "attn_mask": torch.ones(T, T, dtype=torch.bool).triu(1),
    "key_padding_mask": torch.from_numpy(np.arange(T) >= lengths[:, None]),
}
want = by_torch(params, [x], dy, **options)
got = by_funcmha(params, [x], dy, mask=masks.causal() & masks.lengths(lengths))
for name, a in want.items():
    agree(name, got[name], a)

# %% [markdown]
# ## Cross attention
#
# Queries of one sequence, keys and values of another, each with a width of its own.

# %%
S, wide, narrow = 100, 512, 256
cross = init(1, C, H, kdim=wide, vdim=narrow, bias=False)
key, value = (rng.standard_normal((2, S, n), dtype=np.float32) for n in (wide, narrow))
want = by_torch(cross, [x, key, value], dy)
got = by_funcmha(cross, [x, key, value], dy)
for name, a in want.items():
    agree(name, got[name], a)

# %% [markdown]
# ## The error against its bound
#
# 1e-5 is a guess, the same for every entry of every array. What rounding may cost can be derived instead, entry by
# entry, from the operations that lead to it. Each curve is the share of entries whose error, against float64, is above
# a given fraction of that bound. A correct implementation has none to the right of 1.

# %%
want32, got32 = by_torch(params, [x], dy), by_funcmha(params, [x], dy)
found = mha_bounds(params64, x64, x64, x64, None, dy64, dtype="float32")
bounds = {
    "output": found.y,
    "weights": found.weights,
    "dinput": found.dquery + found.dkey + found.dvalue,
} | to_state_dict(found.dparams)
titles = {
    "output": "output",
    "weights": "weights",
    "dinput": "gradient of the input",
    "in_proj_weight": "gradient of in_proj",
    "out_proj.weight": "gradient of out_proj",
}

figure, axes = plt.subplots(1, 5, figsize=(13, 3.2), sharey=True, layout="constrained")
for axis, (name, title) in zip(axes, titles.items(), strict=True):
    for label, values, style in (("funcmha", got32, "-"), ("PyTorch", want32, "--")):
        ratios = np.sort(np.abs(values[name] - want64[name]).ravel() / bounds[name].ravel())
        share = np.arange(ratios.size, 0, -1) / ratios.size
        axis.plot(ratios, share, style, color={"-": "#0072B2", "--": "#D55E00"}[style], label=label)
        assert ratios[-1] <= 1
        print(f"{title:24} {label:8} worst error / bound {ratios[-1]:.3f}")
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", yscale="log", title=title, xlabel="error / bound", xlim=(1e-5, 3))
axes[0].set_ylabel("share of entries above")
axes[0].legend()
