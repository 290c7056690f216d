"""The options: spelled once, shown in full by `help`, and refused by name where they are those of another library."""

import ast
import inspect
import pydoc
import typing
from pathlib import Path

import numpy as np
import pytest

import funcmha
from funcmha import _arguments, attention, head, head_params, kv_cache, mha, ops, self_attention
from funcmha.testing.strategies import MhaProblem

PACKAGE = Path(funcmha.__file__).parent
PARAMS, X, *_ = MhaProblem(Ck=17, Cv=17, S=5).inputs("float64")
Q, K, V = np.ones((2, 6, 5, 4)), np.ones((2, 3, 7, 4)), np.ones((2, 3, 7, 9))
CALLS = {
    "attention": (attention, (Q, K, V)),
    "head": (head, (head_params(PARAMS, 0), X, X, X)),
    "mha": (mha, (PARAMS, X, X, X)),
    "self_attention": (self_attention, (PARAMS, X)),
    "step": (kv_cache.step, (PARAMS, X)),
}
OF_ATTENTION = ("mask", "scale", "softcap", "dropout")
OPTIONS = {
    "attention": {*OF_ATTENTION, "engine"},
    "head": {*OF_ATTENTION, "zero_attn", "qk_norm", "rotary", "engine"},
    "mha": {*OF_ATTENTION, "zero_attn", "qk_norm", "rotary", "engine"},
    "self_attention": {*OF_ATTENTION, "zero_attn", "qk_norm", "rotary", "engine"},
    "step": {*OF_ATTENTION, "qk_norm", "rotary", "left", "engine"},
}
every_function = pytest.mark.parametrize("name", CALLS)


@every_function
def test_the_signature_shows_every_option(name):
    parameters = inspect.signature(CALLS[name][0]).parameters.values()
    options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert options.keys() == OPTIONS[name]
    assert all(p.default is (False if p.name == "zero_attn" else None) for p in options.values())
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL, p.POSITIONAL_OR_KEYWORD) for p in parameters)


@every_function
def test_help_shows_every_option_and_tells_of_it(name):
    text = pydoc.plain(pydoc.render_doc(CALLS[name][0]))
    signature, _, docstring = text.partition(CALLS[name][0].__doc__.partition("\n")[0])  # from 3.13 on in several lines
    assert all(f" {option}=" in signature or f" {option}: " in signature for option in OPTIONS[name])
    words = " ".join(docstring.split())
    if "as in `mha`" not in words and "options of `mha`" not in words:
        assert all(f"\n    {option} " in docstring for option in OPTIONS[name])


def test_every_option_is_typed_once():
    """In one TypedDict: what passes options on takes them as `**options`, and names none in its own signature."""
    assert typing.get_type_hints(_arguments.HeadOptions).keys() == OPTIONS["mha"] - {"engine"}
    typed, named = [], []
    for path in (
        "_arguments.py",
        "ops.py",
        "mha.py",
        "engines/__init__.py",
        "engines/grouped.py",
        "engines/batched.py",
    ):
        for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
            if isinstance(node, ast.ClassDef) and any(keyword.arg == "total" for keyword in node.keywords):
                typed += [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
                named += [argument.arg for argument in node.args.kwonlyargs]
    typed = [name for name in typed if name != "engine"]
    assert sorted(typed) == sorted(OPTIONS["mha"] - {"engine"})
    assert not OPTIONS["mha"] & set(named) - {"engine"}


INSTEAD = {
    "causal": (True, "mask=masks.causal()"),
    "is_causal": (True, "mask=masks.causal()"),
    "attn_mask": (np.ones((5, 5), bool), "mask="),
    "key_padding_mask": (np.ones((2, 5), bool), "mask=masks.padding"),
    "window_size": ((3, 0), "mask=masks.window"),
    "dropout_p": (0.1, "dropout=dropout.seeded(seed, rate)"),
    "keep": (np.ones((5, 5), bool), "dropout=dropout.masked(keep, rate)"),
    "rate": (0.1, "dropout="),
    "cap": (30.0, "softcap="),
    "soft_cap": (30.0, "softcap="),
    "norm": (None, "qk_norm="),
    "sm_scale": (0.5, "scale="),
    "need_weights": (True, "attention_weights(cache)"),
    "return_lse": (True, "log_sum_exp(cache)"),
    "backend": ("tiled", "engine="),
}


@every_function
@pytest.mark.parametrize("option", INSTEAD)
def test_an_option_of_another_library_is_answered(name, option):
    f, inputs = CALLS[name]
    value, instead = INSTEAD[option]
    with pytest.raises(TypeError) as refusal:
        f(*inputs, **{option: value})
    assert str(refusal.value).startswith(f"{option}= is no option, which are mask, scale, softcap, dropout")
    assert f": write {instead}" in str(refusal.value)


@every_function
def test_an_unknown_option_is_answered_with_those_there_are(name):
    f, inputs = CALLS[name]
    with pytest.raises(TypeError, match="maks= is no option, which are mask, scale, softcap, dropout"):
        f(*inputs, maks=None)


def test_scores_take_their_own_options_alone():
    with pytest.raises(TypeError, match="dropout= is no option, which are mask, scale, softcap"):
        ops.scores(Q, K, dropout=None)


@every_function
@pytest.mark.parametrize("engine", ["fast", "TILED", 3, True])
def test_an_engine_that_there_is_not_is_answered(name, engine):
    f, inputs = CALLS[name]
    with pytest.raises(TypeError, match=r"engine must be one of 'sequential', 'batched', 'tiled', .*, got"):
        f(*inputs, engine=engine)


@every_function
@pytest.mark.parametrize("engine", ["sequential", "batched", "tiled"])
def test_every_engine_refuses_the_same(name, engine):
    f, inputs = CALLS[name]
    with pytest.raises(TypeError, match=r"is_causal= is no option, .*: write mask=masks.causal\(\)"):
        f(*inputs, is_causal=True, engine=engine)
