"""The command line: its tables, its JSON, its exit status, and that it fails when funcmha is wrong."""

import importlib
import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import funcmha.testing.verify
from funcmha import attention, init, npz, tree
from funcmha.__main__ import command, main
from funcmha.commands.info import info
from funcmha.engines.plan import FEW_SCORES
from funcmha.testing.tolerance import mha_bounds
from funcmha.testing.verify import (
    PROBLEMS,
    Row,
    everything_problem,
    run_bounds,
    run_funcmha,
    self_attention_problem,
    verify,
)

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")

SMALL = ["--batch", "3", "--length", "11", "--width", "14", "--heads", "2"]
SIZES = {"batch": 3, "length": 11, "width": 14, "heads": 2}

SEED = ["output", "input gradient", *(f"{name}_proj.w gradient" for name in ("q", "k", "v", "out"))]
EVERYTHING = [
    *("output", "weights", "query gradient", "key gradient", "value gradient"),
    *(f"{name}_proj.{leaf} gradient" for name in ("q", "k", "v", "out") for leaf in "wb"),
    *("bias_kv.k gradient", "bias_kv.v gradient", "bias gradient"),
]


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def rows():
    return list(verify(**SIZES))


def test_verify_compares_every_value(rows):
    for problem, quantities in zip(PROBLEMS, (SEED, EVERYTHING), strict=True):
        for dtype in ("float32", "float64"):
            assert [r.quantity for r in rows if (r.problem, r.dtype) == (problem, dtype)] == quantities


def test_verify_has_nothing_to_report(rows):
    assert [row for row in rows if not row.ok] == []


def test_the_numbers_of_a_row_are_not_trivial(rows):
    for row in rows:
        assert 0 < row.error < (1e-5 if row.dtype == "float32" else 1e-13)
        assert 0 < row.of_tolerance < 1
        assert 0 < row.of_bound < 1


@pytest.mark.parametrize("numbers", [(2.0, 0.5), (0.5, 2.0), (np.nan, 0.5), (0.5, np.inf)])
def test_a_row_fails_by_its_tolerance_by_its_bound_and_by_nan(numbers):
    assert not Row("problem", "float32", "output", (1,), 0.0, *numbers).ok
    assert Row("problem", "float32", "output", (1,), 0.0, 0.5, 0.5).ok


def test_the_tolerance_is_that_of_allclose(monkeypatch):
    """The verdict at 0.9 and at 1.1 of the tolerance, with the bound out of the way."""
    want = {"output": np.array([0.0, 100.0], np.float32)}
    monkeypatch.setattr(funcmha.testing.verify, "run_torch", lambda problem: want)
    monkeypatch.setattr(funcmha.testing.verify, "run_bounds", lambda problem: {"output": np.array([1.0, 1.0])})
    for factor in (0.9, 1.1):
        got = {"output": want["output"] + np.array([0, factor * (1e-5 + 1e-5 * 100)], np.float32)}
        monkeypatch.setattr(funcmha.testing.verify, "run_funcmha", lambda problem, engine, got=got: got)
        (row, *_) = verify(**SIZES, dtypes=["float32"])
        assert row.ok == np.allclose(got["output"], want["output"], rtol=1e-5, atol=1e-5) == (factor < 1)


def test_the_problems_are_what_they_say():
    B, T, C, H = 3, 11, 14, 2
    problem = self_attention_problem(0, B, T, C, H)
    assert list(tree.flatten(problem.params)) == ["q_proj.w", "k_proj.w", "v_proj.w", "out_proj.w"]
    problem = everything_problem(0, B, T, C, H)
    leaves = tree.flatten(problem.params)
    assert len(leaves) == 10
    assert all(leaf.any() for leaf in leaves.values())
    assert problem.zero_attn
    assert len({problem.query.shape[-1], problem.key.shape[-1], problem.value.shape[-1]}) == 3
    assert 0 < problem.forbidden.mean() < 1
    assert 0 < problem.padding.mean() < 1
    assert (~(problem.forbidden | problem.padding[:, None])).any(-1).all()  # no row is empty


def test_bounds_are_proportional_to_the_unit_roundoff():
    for problem in (self_attention_problem(0, 3, 11, 14, 2), everything_problem(0, 3, 11, 14, 2)):
        bounds = run_bounds(problem)
        inputs = (problem.query, problem.query, problem.query) if problem.key is None else problem[1:4]
        static = {"zero_attn": problem.zero_attn, "dweights": problem.dweights, "dtype": "float64"}
        if problem.forbidden is not None:
            static["mask"] = ~(problem.forbidden | problem.padding[:, None, None])
        double = mha_bounds(problem.params, *inputs, problem.bias, problem.dy, **static)
        np.testing.assert_allclose(2.0**-29 * bounds["output"], double.y, rtol=0.01)
        for leaf, bound in tree.flatten(double.dparams).items():
            np.testing.assert_allclose(2.0**-29 * bounds[f"{leaf} gradient"], bound, rtol=0.01)


def test_float32_inputs_are_those_of_float64_rounded():
    problem = everything_problem(0, 3, 11, 14, 2)
    assert problem.astype("float32").query.dtype == np.float32
    assert problem.astype("float32").forbidden.dtype == bool
    assert {x.dtype for x in run_funcmha(problem.astype("float32")).values()} == {np.dtype("float32")}
    assert {x.dtype for x in run_funcmha(problem).values()} == {np.dtype("float64")}


@needs_torch
def test_verify_prints_tables_and_succeeds(capsys):
    assert main(["verify", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("funcmha 0.")
    assert "NumPy" in out.splitlines()[0]
    assert "B, T, C, H = 3, 11, 14, 2, seed 0" in out
    for problem in PROBLEMS:
        assert f"{problem}, float32: |got − want| ≤ 1e-5 + 1e-5 |want|" in out
        assert f"{problem}, float64: |got − want| ≤ 1e-11 max(1, max |want|)" in out
    assert sum(line.endswith("  ok") for line in out.splitlines()) == 2 * (len(SEED) + len(EVERYTHING))
    assert out.endswith("\nAll 44 values agree with PyTorch.\n")
    assert err == ""


@needs_torch
def test_verify_in_one_precision_with_another_seed(capsys):
    assert main(["verify", *SMALL, "--dtype", "float64", "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert "seed 7" in out
    assert "float32" not in out
    assert out.endswith("All 22 values agree with PyTorch.\n")


@needs_torch
@pytest.mark.parametrize("engine", ["sequential", "batched", "tiled"])
def test_verify_is_of_the_engine_that_is_named(engine, monkeypatch, capsys):
    seen = []
    right = funcmha.testing.verify.mha
    monkeypatch.setattr(
        funcmha.testing.verify, "mha", lambda *x, **options: (seen.append(options["engine"]), right(*x, **options))[1]
    )
    assert main(["verify", *SMALL, "--engine", engine]) == 0
    assert f"seed 0, engine {engine}\n" in capsys.readouterr().out
    assert seen == 4 * [engine]


@needs_torch
def test_verify_prints_json(capsys):
    assert main(["verify", *SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["batch"] == 3
    assert report["versions"].keys() >= {"funcmha", "NumPy", "PyTorch"}
    assert [row["quantity"] for row in report["rows"]] == 2 * (SEED + EVERYTHING)
    assert report["rows"][0].keys() == {*Row._fields, "ok"}


def plant(monkeypatch, wrong):
    """Let `wrong` spoil what mha_vjp returns."""
    right = funcmha.testing.verify.mha_vjp
    monkeypatch.setattr(funcmha.testing.verify, "mha_vjp", lambda *args, **kwargs: wrong(right(*args, **kwargs)))


@needs_torch
def test_verify_fails_on_a_fault(monkeypatch, capsys):
    """A gradient of the queries that lacks a factor."""
    plant(monkeypatch, lambda grads: (grads[0], 1.001 * grads[1], *grads[2:]))
    assert main(["verify", *SMALL]) == 1
    out = capsys.readouterr().out
    failed = [line.split("  ")[0] for line in out.splitlines() if "FAILS: tolerance and bound" in line]
    assert failed == 2 * ["input gradient", "query gradient"]
    assert out.endswith("\n4 of 44 values do not agree with PyTorch.\n")


@needs_torch
def test_verify_fails_on_nan_and_its_json_can_be_read(monkeypatch, capsys):
    plant(monkeypatch, lambda grads: (grads[0], np.nan * grads[1], *grads[2:]))
    assert main(["verify", *SMALL, "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert not report["ok"]
    failed = [row for row in report["rows"] if not row["ok"]]
    assert {row["quantity"] for row in failed} == {"input gradient", "query gradient"}
    assert {row["error"] for row in failed} == {None}


@needs_torch
@pytest.mark.parametrize(("dtype", "error"), [("float32", 5e-5), ("float64", 1e-13)])
def test_verify_fails_on_an_error_below_the_tolerance(dtype, error, monkeypatch, capsys):
    """A bias gradient of 0.2 at most, off by less than the tolerance: the bound knows better."""

    def off(dbias):
        return dbias if dbias is None else dbias * dbias.dtype.type(1 + error)

    plant(monkeypatch, lambda grads: (*grads[:4], off(grads[4])))
    assert main(["verify", *SMALL, "--dtype", dtype]) == 1
    (failed,) = (line for line in capsys.readouterr().out.splitlines() if "FAILS" in line)
    assert failed.startswith("bias gradient")
    assert failed.endswith("FAILS: bound")


def test_the_bound_is_held_against_torch_in_float64(monkeypatch):
    """A PyTorch that is off in float32 changes the error, but not the error over the bound."""
    want = list(verify(**SIZES, dtypes=["float32"]))
    right = funcmha.testing.verify.run_torch

    def wrong(problem):
        off = 1e-4 if problem.dy.dtype == np.float32 else 0.0
        return {name: x + x.dtype.type(off) for name, x in right(problem).items()}

    monkeypatch.setattr(funcmha.testing.verify, "run_torch", wrong)
    for row, wanted in zip(verify(**SIZES, dtypes=["float32"]), want, strict=True):
        assert row.error > 9e-5
        assert row.of_bound == wanted.of_bound


@needs_torch
def test_verify_runs_as_a_command():
    run = subprocess.run(
        [sys.executable, "-m", "funcmha", "verify", *SMALL],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    assert run.stdout.endswith("All 44 values agree with PyTorch.\n")
    assert run.stderr == ""


@needs_torch
def test_progress_is_told_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["verify", *SMALL]) == 0
    err = capsys.readouterr().err
    assert "everything on, float64 …" in err
    assert err.endswith("\r\x1b[K")


# ── inspect ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.npz"
    blocks = {"0": {"attn": init(0, 12, 4, bias=False)}, "1": {"attn": init(0, 15, 6, num_kv_heads=2, head_dim=7)}}
    npz.save(path, {"blocks": blocks, "norm": {"w": np.ones(12)}, "odd": {"v_proj": {"w": np.ones((2, 3, 4))}}})
    return str(path)


def test_inspect_lists_leaves_and_sizes(file, capsys):
    assert main(["inspect", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == file
    cells = {line.split("  ")[0]: [cell.strip() for cell in line.split("  ")[1:] if cell.strip()] for line in lines[3:]}
    assert cells["leaf"] == ["axes", "shape", "dtype", "bytes"]
    assert cells["blocks.0.attn.q_proj.w"] == ["H D Cq", "4 × 3 × 12", "float32", "576"]
    assert cells["blocks.1.attn.v_proj.b"] == ["K E", "2 × 7", "float32", "56"]
    assert cells["norm.w"] == ["12", "float64", "96"]
    assert "blocks.0.attn: H=4  K=4  D=3  E=3  Cq=12  Ck=12  Cv=12  O=12" in lines
    assert "blocks.1.attn: H=6  K=2  D=7  E=7  Cq=15  Ck=15  Cv=15  O=15" in lines
    assert any(line.startswith("odd: no attention: params must have q_proj.w") for line in lines)
    assert lines[-1].startswith("14 leaves, ")


def test_inspect_prints_json(file, capsys):
    assert main(["inspect", file, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["leaves"]["blocks.0.attn.q_proj.w"] == {
        "axes": "H D Cq",
        "shape": [4, 3, 12],
        "dtype": "float32",
        "bytes": 576,
    }
    assert report["leaves"]["norm.w"]["axes"] is None
    assert report["attention"]["blocks.1.attn"] == {
        "H": 6,
        "K": 2,
        "D": 7,
        "E": 7,
        "Cq": 15,
        "Ck": 15,
        "Cv": 15,
        "O": 15,
    }
    with np.load(file) as archive:
        assert report["bytes"] == sum(a.nbytes for a in archive.values())
        assert report["numbers"] == sum(a.size for a in archive.values())


def test_inspect_of_one_attention(tmp_path, capsys):
    npz.save(tmp_path / "a.npz", init(0, 12, 4))
    assert main(["inspect", str(tmp_path / "a.npz")]) == 0
    assert "\nattention: H=4  K=4" in capsys.readouterr().out


def test_inspect_needs_numpy_alone(file):
    """Where nothing else can be imported."""
    code = f"""
import sys
for name in ("torch", "rich", "ml_dtypes", "hypothesis", "jax", "array_api_compat"):
    sys.modules[name] = None
from funcmha.__main__ import command, main
from funcmha.commands.info import info
sys.exit(main(["inspect", {file!r}]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60, check=True)
    assert "blocks.0.attn: H=4" in run.stdout


def test_tables_on_a_terminal_are_by_rich(file, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["inspect", file]) == 0
    out = capsys.readouterr().out
    assert "┏" in out
    assert "blocks.0.attn.q_proj.w" in out


# ── info ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_info_says_what_a_report_needs(monkeypatch, capsys):
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "3")
    monkeypatch.setattr("funcmha.commands.info.find_spec", lambda name: None)
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {name: text.strip() for name, text in lines.items()}
    assert found["funcmha"].startswith(f"{funcmha.__version__}, ")
    assert found["NumPy"] == np.__version__
    assert found["threads"].startswith("3, FUNCMHA_NUM_THREADS=3")
    assert f"hypothesis {version('hypothesis')}" in found["libraries"]
    assert found["GPU"] == "none: CuPy is not installed"


def test_info_names_the_blas_that_numpy_has_loaded(capsys):
    """Oracle: threadpoolctl, of the library under NumPy's own folder."""
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    assert blas
    for library in blas:
        assert f"{library['version']}, kernels for {library['architecture']}" in found["BLAS"]


def test_info_says_which_engine_is_picked():
    text = info()["default engine"]
    for n in (1, FEW_SCORES, FEW_SCORES + 1):
        _, cache = attention(*(np.zeros((m, 4), np.float32) for m in (1, n, n)))
        name = type(cache).__module__.split(".")[2]
        stated = text.partition("beyond")[0].split(", ")[n > FEW_SCORES]
        assert name in stated
    assert f" {FEW_SCORES} " in text
    assert text.endswith("of all others batched")


def test_info_names_the_devices_of_cupy(monkeypatch):
    device = {"name": b"NVIDIA H200", "major": 9, "minor": 0}
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda i: device,
        runtimeGetVersion=lambda: 12090,
        driverGetVersion=lambda: 13000,
    )
    here = SimpleNamespace(__version__="14.0", is_available=lambda: True, cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr("funcmha.commands.info.find_spec", lambda name: name == "cupy")
    monkeypatch.setitem(sys.modules, "cupy", here)
    assert info()["GPU"] == "NVIDIA H200, sm_90; NVIDIA H200, sm_90; CUDA 12090, driver 13000"
    here.is_available = lambda: False
    assert info()["GPU"] == "none: CuPy 14.0 finds no CUDA device"


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"funcmha {funcmha.__version__}\n"


def test_the_console_script_is_the_command():
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    (module, name) = scripts["funcmha"].split(":")
    assert getattr(importlib.import_module(module), name) is command


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["conquer"], "invalid choice: 'conquer'"),
        pytest.param(
            ["verify", "--width", "25"], "argument --width: must be a multiple of --heads 6, got 25", marks=needs_torch
        ),
        (["verify", "--batch", "0"], "argument --batch: must be an integer of at least 1, got '0'"),
        (["verify", "--heads", "-2"], "argument --heads: must be an integer of at least 1, got '-2'"),
        (["verify", "--seed", "x"], "argument --seed: must be an integer of at least 0, got 'x'"),
        (["verify", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["verify", "--colour"], "unrecognized arguments: --colour"),
        (["inspect"], "the following arguments are required: FILE.npz"),
        (["inspect", "/nowhere/model.npz"], "/nowhere/model.npz: No such file or directory"),
        (["inspect", "/"], "/: Is a directory"),
        (
            ["inspect", str(Path(__file__).with_name("kernels.txt"))],
            "kernels.txt: no npz file: it starts with '# What `'",
        ),
        (["verify", "--engine", "fastest"], "argument --engine: invalid choice: 'fastest'"),
        pytest.param(["verify", "--length", "99999999"], "Unable to allocate", marks=needs_torch),
    ],
)
def test_bad_input_gets_one_line_and_status_2(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("funcmha: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_verify_without_torch(monkeypatch, capsys):
    monkeypatch.setattr("funcmha.commands.verify.find_spec", lambda name: None)
    assert main(["verify"]) == 2
    assert capsys.readouterr().err == (
        "funcmha: error: verify compares with PyTorch, which is not installed: pip install 'funcmha[torch]'\n"
    )


def test_a_reader_who_leaves_is_no_error(file):
    run = subprocess.run(
        f"{sys.executable} -m funcmha inspect {file} | true", shell=True, capture_output=True, timeout=60, check=True
    )
    assert run.stderr == b""


def test_info_says_what_is_wrong_with_the_number_of_threads(monkeypatch):
    monkeypatch.setenv("FUNCMHA_NUM_THREADS", "0")
    assert "FUNCMHA_NUM_THREADS must be an integer of at least 1, got '0'" in info().values()
