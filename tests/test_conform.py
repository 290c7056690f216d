"""The referee finds what is wrong, names it, and lets pass what is right."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from published import FAULTS, RIGHT, implementation

from funcmha import attention
from funcmha.testing.conform import DeclarationError, Implementation, assert_conforms, check
from funcmha.testing.conform.cases import FEATURES, Case, cases
from funcmha.testing.conform.problems import Problem, rounded
from funcmha.testing.conform.ready import READY, ready
from funcmha.testing.conform.verdicts import judge


def found(impl, feature, seed=0):
    """Whether this feature, tried alone, is wrong, or this convention another than declared"""
    report = check(impl, seed=seed, select=lambda case: case.feature == feature)
    wrong = {f.name for f in report.features if f.verdict == "wrong"} | {m.field for m in report.mismatches}
    return wrong == {feature}


def told(report):
    return [str(m) for m in report.mismatches] + [
        f"{row.key} {row.ratio:.3g}: {row.why} {row.case.told()}" for f in report.features for row in f.failures
    ]


# ── what is wrong is found ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.bug}: {fault.says}")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_published_bug_is_found_by_its_feature(fault, seed):
    assert found(implementation((fault.old, fault.new)), fault.feature, seed)


def test_there_are_thirty_published_bugs():
    assert len({fault.bug for fault in FAULTS}) >= 30


# ── what is right passes ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_plain_implementation_is_right():
    report = check(implementation())
    assert report.ok, told(report)
    assert all(feature.verdict == "ok" for feature in report.features), told(report)
    assert len(report.features) == len(FEATURES)


@pytest.mark.slow
@pytest.mark.parametrize("variant", RIGHT, ids=lambda variant: variant.says)
def test_what_is_right_in_another_way_is_not_called_wrong(variant):
    report = check(implementation(*variant.changes, arithmetic=variant.arithmetic))
    assert report.ok, told(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in READY if name.startswith("funcmha:")])
def test_every_engine_of_funcmha_is_right_in_all_dtypes(name):
    report = check(ready(name), seconds=600)
    assert all(feature.verdict == "ok" for feature in report.features), told(report)
    features = {f for f in FEATURES if f != "appended key" or name == "funcmha:mha"}
    assert {(f.name, f.dtype) for f in report.features} == {(f, d) for f in features for d in ready(name).dtypes}


# ── conventions ──────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = implementation()


def transposed(q, k, v, **options):
    (o, lse, p), saved = PLAIN.forward(*(a.swapaxes(1, 2) for a in (q, k, v)), **options)
    return (o.swapaxes(1, 2), lse, p), saved


def transposed_back(saved, do, **cotangents):
    dq, dk, dv, *rest = PLAIN.backward(saved, do.swapaxes(1, 2), **cotangents)
    return *(a.swapaxes(1, 2) for a in (dq, dk, dv)), *rest


def aligned(q, k, v, *, causal=False, window=None, mask=None, **options):
    """Bottom right"""
    T, S = q.shape[2], k.shape[2]
    distance = np.arange(S) - np.arange(T)[:, None] - (S - T)
    parts = [distance <= 0] if causal else []
    parts += [] if window is None else [(-window[0] <= distance) & (distance <= window[1])]
    for part in parts:
        mask = part[None, None] if mask is None else mask & part
    return PLAIN.forward(q, k, v, mask=mask, **options)


def with_mean(q, k, v, **options):
    """A row that attends nothing has the mean of all values"""
    (o, lse, p), saved = PLAIN.forward(q, k, v, **options)
    mean = np.repeat(v, q.shape[1] // v.shape[1], 1).mean(-2, keepdims=True)
    return (np.where(np.isneginf(lse)[..., None], mean, o), lse, p), saved


def with_mean_back(saved, do, **cotangents):
    """The gradient of that mean: its cotangent, in equal parts to all values"""
    dq, dk, dv, *rest = PLAIN.backward(saved, do, **cotangents)
    (B, K, S, E), lse = dv.shape, saved[8]
    of_empty = np.where(np.isneginf(lse)[..., None], do, 0).sum(2).reshape(B, K, do.shape[1] // K, 1, E).sum(2)
    return dq, dk, dv + of_empty / np.float32(max(S, 1)), *rest


def with_nan(q, k, v, **options):
    (o, lse, p), saved = PLAIN.forward(q, k, v, **options)
    return (np.where(np.isneginf(lse)[..., None], np.float32(np.nan), o), lse, p), saved


def in_turn(q, k, v, **options):
    """Query head h reads key head h % K"""
    if q.shape[1] == k.shape[1]:
        return PLAIN.forward(q, k, v, **options)
    n = q.shape[1] // k.shape[1]
    return PLAIN.forward(q, np.tile(k, (1, n, 1, 1)), np.tile(v, (1, n, 1, 1)), **options)


def without_sink(q, k, v, *, sink=None, **options):
    """The log-sum-exp of the scores alone"""
    outputs, saved = PLAIN.forward(q, k, v, sink=sink, **options)
    (_, lse, _), _ = PLAIN.forward(q, k, v, **options)
    return (outputs[0], lse, outputs[2]), saved


def changed(**changes):
    """An option said in another way"""

    def forward(q, k, v, **options):
        given = {name: change(options[name], q) for name, change in changes.items() if name in options}
        return PLAIN.forward(q, k, v, **{**options, **given})

    return forward


def of_lse(change):
    def forward(q, k, v, **options):
        (o, lse, p), saved = PLAIN.forward(q, k, v, **options)
        return (o, change(lse), p), saved

    return forward


def back_of_lse(change):
    return lambda saved, do, dlse=None, **more: PLAIN.backward(
        saved, do, dlse=None if dlse is None else change(dlse), **more
    )


def capped_last(q, k, v, *, softcap=None, bias=None, scale=None, **options):
    if softcap is None or bias is None:
        return PLAIN.forward(q, k, v, softcap=softcap, bias=bias, scale=scale, **options)
    s = q.shape[-1] ** -0.5 * (q @ np.repeat(k, q.shape[1] // k.shape[1], 1).mT)
    bias = softcap * np.tanh((s + bias) / softcap) - s
    return PLAIN.forward(q, k, v, bias=bias.astype(q.dtype), scale=scale, **options)


LN2 = np.float32(np.log(2))
CONVENTIONS = {
    "layout": ("B T H D", {"forward": transposed, "backward": transposed_back}),
    "causal": ("bottom-right", {"forward": aligned}),
    "mask": ("True forbids", {"forward": changed(mask=lambda mask, q: ~mask)}),
    "mask ": (
        "additive",
        {"forward": changed(mask=lambda mask, q: np.ones_like(mask) if mask.dtype == bool else mask == 0)},
    ),
    "window": ("exclusive", {"forward": changed(window=lambda window, q: tuple(n - 1 for n in window))}),
    "empty_row": ("mean", {"forward": with_mean, "backward": with_mean_back}),
    "empty_row ": ("nan", {"forward": with_nan}),
    "gqa": ("h % K", {"forward": in_turn}),
    "scale_default": ("one", {"forward": lambda q, k, v, **o: PLAIN.forward(q, k, v, **{"scale": 1.0, **o})}),
    "lse_base": ("2", {"forward": of_lse(lambda a: a / LN2), "backward": back_of_lse(lambda a: a / LN2)}),
    "lse_layout": (
        "B T H",
        {"forward": of_lse(lambda a: a.swapaxes(1, 2)), "backward": back_of_lse(lambda a: a.swapaxes(1, 2))},
    ),
    "lse_includes_sink": (False, {"forward": without_sink}),
    "cap_order": ("scale bias cap mask", {"forward": capped_last}),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_wrong_declaration_is_told_what_was_measured(name):
    field, (measured, functions) = name.strip(), CONVENTIONS[name]
    report = check(replace(PLAIN, **functions))
    assert report.status == "declaration"
    assert not report.features
    (mismatch,) = report.mismatches
    assert (mismatch.field, mismatch.measured) == (field, measured)
    assert f"you declare {field}={getattr(PLAIN, field)!r}, the kernel is {measured!r}: " in str(mismatch)


WITHOUT_GRADIENT = {"lse_includes_sink", "gqa", "cap_order"}  # of which the functions above have none


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_right_declaration_of_another_convention_is_right(name):
    field, (measured, functions) = name.strip(), CONVENTIONS[name]
    impl = replace(PLAIN, **functions, **{field: measured})
    impl = replace(impl, gradients=()) if field in WITHOUT_GRADIENT else impl
    report = check(impl)
    assert report.ok, told(report)


def test_a_mismatch_is_shown_by_the_keys_that_are_attended():
    (mismatch,) = check(replace(PLAIN, forward=aligned)).mismatches
    assert mismatch.evidence == "with T=5 and S=8 query 0 attends keys 0, 1, 2, 3"


def test_a_convention_that_no_choice_fits_is_judged():
    """All samples have the mask of the first: that is no way to read a mask, and it is for the masks to say so."""
    report = check(replace(PLAIN, forward=changed(mask=lambda mask, q: mask[:1])))
    assert not report.mismatches
    wrong = {f.name for f in report.features if f.verdict == "wrong"}
    assert wrong == {"mask", "mask and causal", "empty rows", "lse", "appended key"}


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TILE_OF_DK = "        dk[:, :, tile] = ds.mT @ (scale * q)\n"
LAWS_BROKEN = {
    "is not linear in cotangents": (
        "plain",
        "twice the cotangent does not give twice the gradient",
        ("    do = do.astype(q.dtype)\n", "    do = (do + np.float32(1e-7) * do * np.abs(do)).astype(q.dtype)\n"),
    ),
    "gives a masked key a gradient": (
        "mask",
        "a key that no query attends has a gradient",
        (TILE_OF_DK, TILE_OF_DK + "        dk[:, :, tile] += np.float32(1e-30)\n"),
    ),
    "takes values of masked keys": (
        "mask",
        "a key that no query attends has an effect",
        ("    o = p @ vh\n", "    o = p @ vh + np.float32(1e-8) * vh.sum()\n"),
    ),
    "lets a future cotangent through": (
        "causal",
        "reaches keys that it does not attend",
        (TILE_OF_DK, TILE_OF_DK + "        dk[:, :, tile] += np.float32(1e-30)\n"),
    ),
    "mixes queries": (
        "causal",
        "reaches other queries",
        (
            "        dq += scale * (ds @ kh[:, :, tile])\n",
            "        dq += scale * (ds @ kh[:, :, tile]) + np.float32(1e-30)\n",
        ),
    ),
    "has a gradient without a cotangent": (
        "bias",
        "a cotangent of 0 gives a gradient that is not 0",
        ("        ds = p * (dp + along)\n", "        ds = p * (dp + along) + np.float32(1e-30)\n"),
    ),
    "forgets a sample": (
        "batch",
        "a sample of a batch alone gives another result",
        ("    s = (scale * q) @ kh.mT\n", "    s = (scale * q) @ kh.mT\n    s[1:] *= np.float32(1.01)\n"),
    ),
    "takes one head of a group": (
        "grouped heads",
        "a group of heads alone gives another result",
        (
            "    dk, dv = (a.reshape(a.shape[0], a.shape[1] // group, group, *a.shape[2:]).sum(2) for a in (dk, dv))\n",
            "    dk, dv = dk[:, ::group], dv[:, ::group]\n",
        ),
    ),
    "decodes without a sink": (
        "sink",
        "the last query alone gives another result",
        (
            "    total = e.sum(-1, keepdims=True) + e_sink\n",
            "    total = e.sum(-1, keepdims=True) + (e_sink if q.shape[2] > 1 else 0)\n",
        ),
    ),
    "is random": (
        "plain",
        "a second call gives other bits",
        (
            "    o = p @ vh\n",
            "    o = p @ vh * np.random.default_rng().choice(np.float32([1, 1.0000001]), vh.shape[-1])\n",
        ),
    ),
}


@pytest.mark.parametrize("fault", LAWS_BROKEN)
def test_a_law_that_is_broken_is_told(fault):
    feature, law, change = LAWS_BROKEN[fault]
    report = check(implementation(change), select=lambda case: case.feature == feature)
    assert [row for f in report.features for row in f.failures if law in row.why], told(report)


def test_what_is_declared_random_is_not_asked_for_its_bits():
    _, _, change = LAWS_BROKEN["is random"]
    report = check(implementation(change, deterministic=False), select=lambda case: case.feature == "plain")
    assert not [row for f in report.features for row in f.failures if "bits" in row.why]


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def only(feature):
    return {"select": lambda case: case.feature == feature}


DV = "        dv[:, :, tile] = p.mT @ do\n"
IN_TILES_OF_QUERIES = """        for row in range(0, q.shape[2], 32):
            rows = slice(row, row + 32)
            sums = dv[:, :, tile] + p[:, :, rows].mT @ do[:, :, rows]
            dv[:, :, tile] = sums.astype(np.float16)
"""


def in_float16(impl):
    """An implementation that computes in float32, of and into float16"""

    def forward(q, k, v, **options):
        (o, lse, p), saved = impl.forward(*(a.astype(np.float32) for a in (q, k, v)), **options)
        return (o.astype(np.float16), lse, p), saved

    def back(saved, do, **cotangents):
        given = {name: a.astype(np.float32) for name, a in cotangents.items()}
        return tuple(None if g is None else g.astype(np.float16) for g in impl.backward(saved, do, **given))

    return replace(impl, forward=forward, backward=back, dtypes=("float16",), gradients=("q", "k", "v"))


def test_an_error_of_a_few_bounds_is_loose_and_explained():
    """dv stored in half after each tile of queries, of a kernel that declares to round once"""
    impl = in_float16(implementation((DV, IN_TILES_OF_QUERIES)))
    report, strict = (
        check(impl, select=lambda c: c.problem.T == 65 and c.problem.S == 1, strict=s) for s in (False, True)
    )
    (feature,) = report.features
    assert (feature.verdict, report.status, strict.status) == ("loose", "right", "wrong")
    (row,) = feature.failures
    assert row.quantity == "dv"
    assert 1 < row.ratio <= 8
    assert row.why.startswith("as if stored in half: ")
    (*_, row) = check(impl, **only("sizes")).features[0].failures  # where parts of dv are large, and dv is small
    assert row.verdict == "wrong"
    assert row.diagnosis.startswith("as if ")
    declared = replace(impl, arithmetic=impl.profile._replace(stored=("o", "dv"), tile=32))
    assert check(declared, **only("sizes"), strict=True).ok
    assert check(in_float16(implementation()), strict=True).ok


def test_another_dtype_than_that_of_the_inputs_is_wrong():
    def forward(*inputs, **options):
        (o, *rest), saved = PLAIN.forward(*inputs, **options)
        return (o.astype(np.float64), *rest), saved

    report = check(replace(PLAIN, forward=forward), **only("plain"))
    (row,) = [row for f in report.features for row in f.failures]
    assert (row.quantity, row.verdict, row.why) == ("o", "wrong", "float32 in, float64 out")


def test_numbers_are_rounded_as_their_dtype_rounds():
    rng = np.random.default_rng(0)
    a = np.concatenate([rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000), 1 + np.arange(64) / 512])
    for dtype in ("float32", ml_dtypes.bfloat16):
        want = a.astype(np.float32).astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(rounded(a, "bfloat16" if dtype is ml_dtypes.bfloat16 else dtype), want)


def test_expected_failures_are_strict():
    faulty = ("        along = along + dlse[..., None]\n", "        along = along\n")
    expected = {"lse/dq": "issue 123", "lse/dk": "issue 123"}
    (feature,) = check(implementation(faulty, expected=expected), **only("lse")).features
    assert feature.verdict == "expected"
    assert check(implementation(faulty, expected={"lse": "issue 123"}), **only("lse")).ok
    assert check(implementation(faulty, expected={"lse/dq": "issue 123"}), **only("lse")).status == "wrong"
    report = check(implementation(expected=expected), **only("lse"))
    assert (report.features[0].verdict, report.status) == ("unexpected pass", "wrong")
    assert check(implementation(expected={"lsd/dq": "a typo"}), **only("lse")).status == "declaration"


def test_what_the_limits_refuse_is_listed_and_not_failed():
    def forward(q, k, v, **options):
        assert q.shape[-1] == v.shape[-1] == 32
        assert q.shape[1] == k.shape[1]
        assert q.shape[2] == k.shape[2]
        assert q.shape[2] % 16 == 0
        return PLAIN.forward(q, k, v, **options)

    impl = replace(PLAIN, forward=forward, gqa=None, limits={"D": 32, "E": "D", "T": (16, 4096, 16), "S": "T"})
    report = check(impl)
    assert report.ok, told(report)
    assert {case.feature for case, _ in report.refused} >= {"size 0", "widths", "grouped heads", "sizes"}
    assert {f.name for f in report.features} >= {"plain", "causal", "window", "sink", "lse", "bias"}


def test_nothing_that_could_run_is_no_success():
    assert check(replace(PLAIN, limits={"T": 10_000_000})).status == "nothing"
    assert check(PLAIN, **only("no such feature")).status == "nothing"


def test_time_is_kept_with_the_first_case_of_every_feature_first():
    report = check(PLAIN, seconds=0)
    assert (report.features, report.status) == ((), "nothing")
    assert report.left_out == sum(map(len, FEATURES.values()))


@pytest.mark.parametrize(
    ("old", "new", "diagnosis"),
    [
        (
            "        along = along + dlse[..., None]\n",
            "        along = along\n",
            "without the cotangent of lse: it is dropped",
        ),
        (
            "    delta = (do * o).sum(-1, keepdims=True)\n",
            "    delta = (do * o).sum(-1, keepdims=True) * 2\n",
            "dv is right, so the weights are: δ",
        ),
        ("top + np.log(total))[..., 0]", "(top + np.log(total)) / np.log(2))[..., 0]", "log₂ e"),
        (
            "        dv[:, :, tile] = p.mT @ do\n",
            "        dv[:, :, tile] = p.mT @ do[..., ::-1]\n",
            "the product of the weights with the cotangent",
        ),
        (
            "        dq += scale * (ds @ kh[:, :, tile])\n",
            "        dq += ds @ kh[:, :, tile]\n",
            "√D: the scale is missing",
        ),
        (
            "    dk, dv = (a.reshape(a.shape[0], a.shape[1] // group, group, *a.shape[2:]).sum(2) for a in (dk, dv))\n",
            "    dk, dv = dk[:, ::group], dv[:, ::group]\n",
            "the sum over a group of heads",
        ),
        (
            "*a.shape[2:]).sum(2) for a in (dk, dv))",
            "*a.shape[2:]).mean(2) for a in (dk, dv))",
            "dk by 0.5, dv by 0.5; 1/2: a mean over the heads of a group, not their sum",
        ),
        ("        ds = p * (dp + along)\n", "        ds = 0 * p\n", "no gradient comes through the scores"),
        (
            "        dv[:, :, tile] = p.mT @ do\n",
            "        dv[:, :, tile] = 0\n",
            "no gradient comes through the values",
        ),
    ],
)
def test_what_went_wrong_is_guessed(old, new, diagnosis):
    impl = implementation((old, new))
    features = {"plain", "grouped heads", "lse"}
    rows = [row for case, _ in cases(impl) if case.feature in features for row in judge(impl, case)]
    assert [row for row in rows if diagnosis in row.diagnosis], [row.diagnosis for row in rows if row.diagnosis]


def test_scores_detached_in_torch_are_guessed():
    """Its autograd then has no gradient of q and k at all."""

    def forward(q, k, v):
        return torch.softmax((q.shape[-1] ** -0.5 * q @ k.mT).detach(), -1) @ v

    report = check(Implementation("detached", forward, library="torch", gqa=None), **only("plain"))
    told = {row.quantity: row.diagnosis for f in report.features for row in f.failures}
    guess = "no gradient comes through the scores, or the weights after them: they are detached"
    assert told == {"dq": guess, "dk": guess}


def test_what_is_causal_always_is_judged_causal():
    """As many training kernels are: without an option, and of as many keys as queries."""

    def forward(q, k, v, *, sink=None):
        return PLAIN.forward(q, k, v, sink=sink, causal=True)

    def back(saved, do, **cotangents):
        return *PLAIN.backward(saved, do, **cotangents)[:3], PLAIN.backward(saved, do, **cotangents)[4]

    impl = replace(PLAIN, forward=forward, backward=back, limits={"causal": True, "S": "T"})
    report = check(impl)
    assert report.ok, told(report)
    assert {f.name for f in report.features} >= {"plain", "causal", "widths", "grouped heads", "sink", "lse", "batch"}
    not_causal = replace(impl, forward=lambda q, k, v, *, sink=None: PLAIN.forward(q, k, v, sink=sink))
    assert {f.verdict for f in check(not_causal, **only("plain")).features} == {"wrong"}


@pytest.mark.parametrize(
    ("forward", "declared", "message"),
    [
        (lambda q, k, v: None, {}, "forward must return o as an array of numpy, got NoneType"),
        (lambda q, k, v: 3.0, {"library": "torch"}, "forward must return o as an array of torch, got float"),
        (
            lambda q, k, v: q.numpy(),
            {"library": "torch"},
            "forward must return o as an array of torch, got numpy.ndarray",
        ),
        (lambda q, k, v: torch.tensor(q), {}, "forward must return o as an array of numpy, got torch.Tensor"),
        (lambda q, k, v: (q, q), {}, "forward must return o as outputs declares, got 2 arrays"),
        (lambda q, k, v: q, {"outputs": ("o", "lse")}, "forward must return o, lse as outputs declares, got 1 arrays"),
        (lambda q, k, v: q, {"backward": lambda saved, do: None}, r"forward must return \(outputs, saved\)"),
        (
            lambda q, k, v: q,
            {"library": "pytorch"},
            "no float32 array of library='pytorch' can be made: ModuleNotFound",
        ),
        (lambda q, k, v: q, {"library": "torch", "device": "gpu"}, "of library='torch' on device='gpu' can be made"),
        (lambda q, k, v: torch.softmax(q, -1), {}, "takes no arrays of library='numpy', so declare whose: TypeError"),
    ],
)
def test_what_no_call_can_be_of_is_a_wrong_declaration(forward, declared, message):
    with pytest.raises(DeclarationError, match=message):
        check(Implementation("odd", forward, **declared), **only("plain"))


@pytest.mark.parametrize(
    "option", [{"window": (3, 1)}, {"softcap": 2.0, "gain": 8.0}, {"causal": True}, {"mask": "dense"}]
)
def test_an_option_that_is_ignored_is_guessed(option):
    """As backends do that take an argument for another's sake."""
    impl = replace(PLAIN, forward=lambda q, k, v, **options: PLAIN.forward(q, k, v))
    told = {
        row.quantity: row.diagnosis for row in judge(impl, Case("plain", Problem(**option), "float32")) if not row.law
    }
    assert {told[name] for name in ("o", "lse", "dq", "dv")} == {told["o"]}
    assert told["o"].startswith("the results are those without the ")
    assert told["o"].endswith(": it is ignored")


# ── declarations that cannot be ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"layout": "B H D T"}, r"layout must be one of 'B H T D', .*, got 'B H D T'"),
        ({"mask": True}, "mask must be one of 'True attends', 'True forbids', 'additive', got True"),
        ({"dtypes": ("float8",)}, "dtypes must be a tuple out of 'float64', .*, got .'float8',."),
        ({"dtypes": "float32"}, "dtypes must be a tuple"),
        ({"outputs": ("lse",)}, "outputs must have 'o', got .'lse',."),
        ({"outputs": ("o", "p")}, "outputs must be a tuple out of 'o', 'lse', 'weights'"),
        ({"arithmetic": "fast"}, "arithmetic must be one of 'strict', 'flash'"),
        ({"limits": {"N": 3}}, "limits must be of 'B', .*, got 'N'"),
        ({"limits": {"D": (1, 2, 3, 4)}}, r"limits\['D'\] must be a number, .*, got \(1, 2, 3, 4\)"),
        ({"limits": {"D": (8, 256, 0)}}, r"limits\['D'\] must be"),
        ({"limits": {"E": "X"}}, r"limits\['E'\] must be"),
        ({"forward": 3}, "forward must be a function, got int"),
        ({"forward": lambda qkv: qkv}, "forward must take q, k and v by position, .*: it takes 'qkv'"),
        ({"forward": lambda q, k, v, mask: q}, "forward must take q, k and v by position, .*: it takes .*'mask'"),
        ({"name": 3}, "name must be a string, got int"),
        ({"backward": 3}, "backward must be a function, got int"),
        ({"forward": lambda q, k, v, *, dropout: q}, "forward must take options out of .*, and requires 'dropout'"),
        (
            {"forward": lambda q, k, v, *, is_causal=False: q},
            "forward takes 'is_causal', which is 'causal' here: rename",
        ),
        ({"limits": {"D": (8,)}}, r"limits\['D'\] must be"),
        ({"limits": {"causal": False}}, r"limits\['causal'\] must be True, of what is causal always, got False"),
        ({"gradients": ("mask",)}, "gradients must be out of 'q', .*, got .'mask',."),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(declared, message):
    with pytest.raises(DeclarationError, match=message):
        replace(PLAIN, **declared)


def test_only_an_implementation_is_checked():
    with pytest.raises(TypeError, match="impl must be an Implementation, got function"):
        check(PLAIN.forward)


def test_what_raises_for_a_law_alone_is_told():
    """As a function does that takes no batch of one: a row of the report, and the other cases go on."""

    def forward(q, k, v):
        if q.shape[0] == 1 and q.shape[2] > 16:
            raise NotImplementedError("batch of one")
        return attention(q, k, v)[0]

    report = check(Implementation("odd", forward), select=lambda case: case.feature == "batch")
    (feature,) = report.features
    assert feature.verdict == "wrong"
    assert [(row.quantity, row.why) for row in feature.failures] == [("call", "NotImplementedError: batch of one")]


def test_assert_conforms_raises_with_the_report():
    assert_conforms(replace(PLAIN, gradients=()), seconds=5)
    faulty = implementation(("        dv[:, :, tile] = p.mT @ do\n", "        dv[:, :, tile] = 2 * (p.mT @ do)\n"))
    with pytest.raises(AssertionError, match=r"(?s)WRONG  plain, float32: dv.*2: counted twice.*replay: --case plain/"):
        assert_conforms(faulty, seconds=2)
