"""`funcmha conform`: what it prints and writes, and its exit status."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from published import FAULTS, implementation

from funcmha import ops
from funcmha.__main__ import main
from funcmha.testing.conform import check
from funcmha.testing.conform.ready import READY, ready

ROOT = Path(__file__).parents[1]
MINE = """
import numpy as np
from funcmha.testing.conform import Implementation


def forward(q, k, v, *, causal=False):
    s = q.shape[-1] ** -0.5 * q @ np.swapaxes(k, -1, -2)
    if causal:
        s = np.where(np.tri(*s.shape[-2:], {offset}, dtype=bool), s, -np.inf)
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True) @ v {change}


impl = Implementation("mine", forward, dtypes=("float32",), gqa=None, limits={{"S": (1, 4096)}})
"""
TORCH = """
from funcmha.testing.conform import Implementation
from torch.nn.functional import scaled_dot_product_attention


def forward(q, k, v, *, causal=False, scale=None):
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


impl = Implementation("mine", forward, library="torch", dtypes=("float32", "bfloat16"), gqa=None, limits={"E": "D"})
"""


def only(feature):
    return {"select": lambda case: case.feature == feature}


@pytest.fixture
def mine(tmp_path):
    def write(change="", offset=0):
        path = tmp_path / "mine.py"
        path.write_text(MINE.format(change=change, offset=offset))
        return f"{path}:impl"

    return write


def test_a_file_of_an_author_is_judged(mine, capsys):
    assert main(["conform", mine()]) == 0
    out = capsys.readouterr().out
    assert "plain" in out
    assert out.endswith("mine: right (10 ok)\n")


def test_fifteen_lines_of_torch_are_judged_with_their_gradients(tmp_path, capsys):
    assert len(TORCH.splitlines()) <= 15
    (tmp_path / "of_torch.py").write_text(TORCH)
    features = [f"--feature={name}" for name in ("plain", "causal", "scale")]
    assert main(["conform", f"{tmp_path / 'of_torch.py'}:impl", *features, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {(f["name"], f["dtype"]) for f in report["features"]} == {
        (name, dtype) for name in ("plain", "causal", "scale") for dtype in ("float32", "bfloat16")
    }
    assert all(set(f["worst"]) == {"o", "dq", "dk", "dv"} for f in report["features"])


def test_what_is_wrong_is_told_and_replayed(mine, capsys):
    target = mine(change="* np.float32(1.001)")
    assert main(["conform", target, "--feature", "plain"]) == 1
    out = capsys.readouterr().out
    assert "WRONG  plain, float32: o" in out
    assert "off by one factor: o by 1.001" in out
    name = out.partition("replay: --case ")[2].splitlines()[0]
    assert main(["conform", target, "--case", name, "--json"]) == 1
    (feature,) = json.loads(capsys.readouterr().out)["features"]
    assert (feature["name"], feature["cases"], feature["failures"][0]["case"]) == ("plain", 1, name)


def test_a_replay_names_its_seed(mine, capsys):
    target = mine(change="* np.float32(1.001)")
    assert main(["conform", target, "--feature", "plain", "--seed", "7"]) == 1
    _, case, _, seed = capsys.readouterr().out.partition("replay: ")[2].splitlines()[0].split()
    assert main(["conform", target, "--case", case, "--seed", seed]) == 1
    assert main(["conform", target, "--case", case]) == 2


def test_a_wrong_declaration_is_status_2(mine, capsys):
    assert main(["conform", mine(offset=3)]) == 2
    out = capsys.readouterr().out
    assert "you declare causal='top-left', the kernel is 'bottom-right': with T=5 and S=8 query 0 attends keys" in out
    assert "nothing was judged" in out


def test_a_feature_that_cannot_run_is_status_3(mine):
    assert main(["conform", mine(), "--feature", "sink"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch:sdpa-flesh"], "TARGET must be FILE.py:name, module:name, or one of funcmha:sequential"),
        (["torch:nothing"], "Implementation"),
        (["no_such_file.py:impl"], "there is no file no_such_file.py"),
        (["no_such_module:impl"], "cannot be loaded: ModuleNotFoundError"),
        (["numpy:float32"], "numpy:float32 must be an Implementation, got type"),
        (["funcmha:tiled", "--feature", "sinks"], "there is no feature 'sinks': there are plain, sizes"),
        (
            ["funcmha:tiled", "--case", "weights/float16/1"],
            "there is no case 'weights/float16/1' with --seed 0: there are weights/float64/",
        ),
        (["funcmha:tiled", "--case", "foo"], "there is no case 'foo' with --seed 0: there are plain/float64/"),
        (["funcmha:tiled", "--dtype", "float8"], "dtype float8 is not declared, but float64, float32"),
        (
            ["funcmha:tiled", "funcmha:tiled"],
            "one TARGET is judged at a time, or two after diff, got funcmha:tiled funcmha:tiled",
        ),
    ],
)
def test_bad_input_is_status_2_and_one_line(arguments, message, capsys):
    assert main(["conform", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_junit_has_a_case_for_each_quantity(mine, tmp_path, capsys):
    file = tmp_path / "out.xml"
    assert main(["conform", mine(change="* np.float32(1.001)"), "--feature", "plain", "--junit", str(file)]) == 1
    suite = ElementTree.parse(file).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    (case,) = suite
    assert (case.get("classname"), case.get("name")) == ("plain.float32", "o")
    assert "must be" in case[0].get("message")


def test_strict_fails_on_loose(tmp_path, capsys):
    """PyTorch's fused kernel has a rounding of dv more than the profile flash."""
    arguments = ["conform", "torch:sdpa-flash", "--dtype", "bfloat16", "--feature", "offset values", "--arithmetic"]
    assert main([*arguments, "strict"]) == 1
    assert "as if stored in half: the weights" in capsys.readouterr().out
    assert main([*arguments, "flash"]) == 0


OUTSIDE = (
    "mlx",
    "tinygrad",
    "paddle",
    "openvino",
    "flash-attn",
    "fla",
)  # of what tests have: `make conform-peers` runs these
HERE = {name for name in READY if name.partition(":")[0] not in ("funcmha", *OUTSIDE)} - {"jax:pallas-gpu"}  # slow


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HERE))
def test_a_ready_made_implementation_is_right_where_it_is_plain(name):
    impl = replace(ready(name), dtypes=("float32",))
    report = check(impl, select=lambda case: case.feature in ("plain", "mask") and case.problem.seed == 0, seconds=600)
    assert report.ok, report
    assert {f.name for f in report.features} == ({"plain", "mask"} if "mask" in impl.options else {"plain"})


def test_every_ready_made_name_is_told_of():
    page = (ROOT / "docs/conform.md").read_text()
    assert [name for name in READY if f"`{name}`" not in page] == []


def test_a_library_that_is_not_installed_is_status_2(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx", None)
    assert main(["conform", "mlx:sdpa"]) == 2
    assert "mlx:sdpa cannot be loaded: ModuleNotFoundError" in capsys.readouterr().err


def test_torch_attends_its_appended_key_with_a_mask_and_not_with_the_hint():
    """As published: is_causal=True beside bias_kv is another mask than the one that it stands for."""
    causal = {"select": lambda case: case.feature == "appended key" and case.problem.causal}
    assert check(replace(ready("torch:mha"), dtypes=("float64",)), **only("appended key")).ok
    (feature,) = check(replace(ready("torch:mha-is-causal"), dtypes=("float64",)), **causal).features
    wrong = {row.quantity: row.why for row in feature.failures}
    assert {"o", "dq", "dk", "dv", "dbias_k", "dbias_v"} == wrong.keys()
    assert "all of it is 0" in wrong["dbias_v"]


def test_the_fused_kernel_of_torch_is_wrong_under_the_lowest_mask():
    """As published: a bias of finfo.min all along a row. Forward right, backward off by the number of keys."""
    impl = replace(ready("torch:sdpa-flash"), dtypes=("float32",))
    (feature,) = check(impl, select=lambda case: case.feature == "lowest bias").features
    assert feature.worst["o"] <= 1
    assert {row.quantity for row in feature.failures if row.verdict == "wrong"} == {"dq", "dk", "dv"}


def test_jax_drops_the_gradient_of_its_log_sum_exp():
    impl = replace(ready("jax:nn"), dtypes=("float32",))
    (feature,) = check(impl, select=lambda case: case.feature == "lse" and case.problem.seed == 1).features
    wrong = {row.quantity: row.diagnosis for row in feature.failures}
    assert wrong.keys() == {"dq", "dk"}
    assert set(wrong.values()) == {"the gradients are those without the cotangent of lse: it is dropped"}


def test_a_published_bug_is_told_in_text(capsys):
    from funcmha.testing.conform.text import told

    fault = next(f for f in FAULTS if f.bug == "levanter 449")
    text = told(check(implementation((fault.old, fault.new)), select=lambda case: case.feature == fault.feature))
    assert "dq is right: the sum over a group of heads, or a tile of keys" in text
    assert text.endswith("plain: wrong (1 wrong)")


# ── two implementations, and those outside Python ────────────────────────────────────────────────────────────────


def test_diff_says_which_of_two_is_nearer(capsys):
    two = ["torch:sdpa-math", "torch:sdpa-flash"]
    assert main(["conform", "diff", *two, "--dtype", "bfloat16", "--feature", "plain", "--arithmetic", "flash"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^plain +bfloat16 +dv +0\.\d+ +\d\.\d+ +first$", out, re.MULTILINE)
    assert "nearer: first " in out


DECLARED = """
from dataclasses import replace
from funcmha.testing.conform.ready import ready


def forward(*arrays, **options):
    raise RuntimeError("nobody calls this")


def only(q, k, v, *, bias, mask, sink, causal, window):
    raise RuntimeError("nobody calls this")


impl = replace(
    ready("funcmha:batched"), forward=only, backward=None, gradients=("q", "k", "v", "bias", "sink"), layout="B T H D",
    dtypes=("float32",), causal="bottom-right", lse_base="2", gqa="h % K",
)
"""


def answered(problems, change=lambda name, a: a):
    """What an implementation outside computes of the file, by its own reading of the conventions"""
    answers = {}
    for name in [name.removesuffix("/options") for name in problems.files if name.endswith("/options")]:
        given = {n: problems[f"{name}/{n}"] for n in ("q", "k", "v", "bias", "sink", "mask", "do", "dlse", "dweights")
                 if f"{name}/{n}" in problems.files}  # fmt: skip
        options = json.loads(str(problems[f"{name}/options"]))
        q, k, v, do = (a.swapaxes(1, 2) if a is not None else None for a in map(given.get, ("q", "k", "v", "do")))
        T, S, group = q.shape[2], k.shape[2], q.shape[1] // max(k.shape[1], 1)
        mask = given.get("mask", np.ones((1, 1, T, S), bool))
        distance = np.arange(S) - np.arange(T)[:, None] - (S - T)
        mask = mask & (distance <= 0) if options.get("causal") else mask
        before, after = options.get("window", (S + T, S + T))
        mask = mask & (-before <= distance) & (distance <= after)
        heads = np.arange(q.shape[1]) % k.shape[1]
        o, cache = ops.attention(q, k[:, heads], v[:, heads], given.get("bias"), given.get("sink"), mask=mask)
        dlse = given["dlse"] / np.log(2) if "dlse" in given else None
        do = np.zeros_like(o) if do is None else do
        grads = ops.attention_vjp(cache, do, dlse=dlse, dweights=given.get("dweights"))
        dk, dv = (g.reshape(g.shape[0], group, k.shape[1], *g.shape[2:]).sum(1) for g in grads[1:3])
        found = {
            "o": o.swapaxes(1, 2),
            "lse": cache.lse / np.log(2),
            "weights": cache.p,
            "dbias": grads[3],
            "dsink": grads[4],
        }
        found |= {"dq": grads[0].swapaxes(1, 2), "dk": dk.swapaxes(1, 2), "dv": dv.swapaxes(1, 2)}
        with np.errstate(over="ignore"):  # the lowest float32 in base 2
            answers |= {f"{name}/{n}": change(n, found[n]).astype(np.float32) for n in options["due"]}
    return answers


def test_an_implementation_outside_python_is_judged_by_files(tmp_path, capsys):
    (tmp_path / "declared.py").write_text(DECLARED)
    target, asked, came = f"{tmp_path / 'declared.py'}:impl", str(tmp_path / "asked.npz"), str(tmp_path / "came.npz")
    assert main(["conform", target, "--golden", asked]) == 0
    assert re.search(r"asked.npz: \d\d cases", capsys.readouterr().out)
    with np.load(asked) as problems:
        right = answered(problems)
        wrong = answered(problems, lambda name, a: 1.01 * a if name == "dk" else a)
    np.savez(came, **right)
    assert main(["conform", target, "--answers", came]) == 0, capsys.readouterr().out
    np.savez(came, **wrong)
    assert main(["conform", target, "--answers", came]) == 1
    assert "off by one factor: dk by 1.01" in capsys.readouterr().out
    plain = {name: a for name, a in right.items() if name.startswith("plain/")}
    np.savez(came, **plain)
    assert main(["conform", target, "--answers", came]) == 0
    capsys.readouterr()
    np.savez(came, **{name: a for name, a in plain.items() if not name.endswith("/dq")})
    assert main(["conform", target, "--answers", came]) == 1
    assert re.search(
        r"there is no plain/float32/\w+/dq\n  if it is not among what has a gradient", capsys.readouterr().out
    )
    np.savez(came, **right, **{"plain/float32/00000000/o": np.zeros(3)})
    assert main(["conform", target, "--answers", came]) == 2
    assert "has 'plain/float32/00000000/o', which no case is due" in capsys.readouterr().err
