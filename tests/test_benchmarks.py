"""The benchmark compares equal things: every peer computes the same, in every case."""

import json
import subprocess
import sys
from pathlib import Path

import fake_cupy
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are in the repository, not in the package

from benchmarks import cases, gpu, peers, timing  # noqa: E402
from benchmarks.peers.funcmha import HAS_ENGINES  # noqa: E402

TAKES_A_MINUTE = "PyTorch compiled"  # and is the eager peer but for one line
OTHER_KERNELS = peers.KERNELS.keys()  # which are those of a process
FORWARD_ONLY = {"ONNX Runtime"}
SELF_ATTENTION_ONLY = {
    "PyTorch weights",
    "PyTorch SDPA",
    "ONNX Runtime",
    "Compyute sequential",
    "Compyute semi",
    "Compyute parallel",
}
CANNOT = {"self": set(), "cross": SELF_ATTENTION_ONLY, "attention": SELF_ATTENTION_ONLY}


def tiny(case):
    """Of odd sizes, so that no axis is taken for another."""
    heads = {"H": 6, "K": 2} if case.K < case.H else {"H": 3, "K": 3}
    case = case._replace(B=min(case.B, 2), T=min(case.T, 29), D=5, window=case.window and 7, **heads)
    return case._replace(S=case.T if case.kind == "self" else 37)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_peers_agree(case):
    """Output and every gradient, by name, shape and dtype, with those of eager PyTorch."""
    case = tiny(case)
    problem = cases.draw(case)
    want = peers.load(peers.EAGER)(case, problem).named()
    one_engine = set() if HAS_ENGINES else {"funcmha sequential"}
    cannot = CANNOT[case.kind] | (FORWARD_ONLY if case.window else set()) | one_engine
    for name in peers.PEERS.keys() - {peers.EAGER, TAKES_A_MINUTE} - OTHER_KERNELS - cannot:
        got = peers.load(name)(case, problem).named()
        assert got.keys() == (want.keys() if name not in FORWARD_ONLY else {"y"})
        for quantity, x in got.items():
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, want[quantity], rtol=1e-4, atol=1e-4, err_msg=f"{name}: {quantity}")


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.kind == "self"], ids=lambda case: case.name)
def test_products_counts_the_tiles_that_the_mask_leaves(case):
    """Against its booleans, at a length that tiles do not divide."""
    case = cases.shortened(case, 700)
    allowed = np.ones((case.T, case.S), bool) if case.mask() is None else case.mask().dense(case.T, case.S)
    tiles = [
        allowed[i : i + cases.TILE, j : j + cases.TILE]
        for i in range(0, case.T, cases.TILE)
        for j in range(0, case.S, cases.TILE)
    ]
    pairs = sum(tile.size for tile in tiles if tile.any())
    projections = 4 * 2 * case.B * case.T * case.width**2
    assert cases.products(case, "forward") == 2 * 2 * case.D * case.B * case.H * pairs + projections
    assert cases.products(case, "both") == 7 * 2 * case.D * case.B * case.H * pairs + 3 * projections


@pytest.mark.slow
def test_the_command_line(tmp_path):
    """Times and peaks by way of the pipe; what cannot be done is a row with its reason."""
    told = [
        "--threads",
        "1",
        "--peers",
        "funcmha",
        "--peers",
        "Compyute semi",
        "--only",
        "cross",
        "--quick",
        "--repeats",
        "2",
    ]
    command = [sys.executable, "-m", "benchmarks", "time", "memory", *told, "--json", str(tmp_path / "all.json")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "skipped: Compyute has self-attention only" in out.stdout
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    ours = [r for r in records if r["peer"] == "funcmha"]
    assert [r["pass"] for r in ours] == ["forward", "forward + backward", "forward + backward"]
    assert [len(r["seconds"]) for r in ours[:2]] == [2, 2]
    assert 0 < ours[0]["median"] < ours[1]["median"]
    gradients = 4 * 512 * (256 + 256)  # of the two inputs, in bytes
    assert gradients < ours[2]["bytes"] < 100 * gradients


class Told:
    """A process whose runs take a second of a clock and both cores; others take so many more."""

    def __init__(self, monkeypatch, others):
        self.clock, self.others, self.runs = 0.0, iter(others), 0
        monkeypatch.setattr(timing, "PAUSE", 0)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.clock)
        monkeypatch.setattr(timing, "cores", lambda: 2)
        monkeypatch.setattr(timing, "busy", lambda: self.taken)
        self.taken = 0.0

    def seconds_of_processors(self):
        return 2 * self.clock

    def __call__(self, do, direction, calls):
        self.runs, self.clock = self.runs + 1, self.clock + 1
        self.taken += 2 + next(self.others)
        return float(self.runs)


@pytest.mark.parametrize(("others", "counts"), [((0.1, 9), 1), ((0.5, 0.5, 0.1), 3), ((1,) * 9, timing.TRIES)])
def test_a_disturbed_run_is_made_again(monkeypatch, others, counts):
    assert timing._undisturbed(Told(monkeypatch, others), "forward", 1, timing.TRIES) == counts


@pytest.mark.slow
def test_the_script_of_ranks_runs():
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.parallel", "96", "--repeats", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    rows = [line.split("|") for line in out.stdout.splitlines() if line.startswith("| ") and "ranks" not in line]
    assert [row[1].strip() for row in rows] == ["1", "2", "4"]
    assert all(row[5].strip() == "1.000" for row in rows)
    assert "µs a step of the ring" in out.stdout


def test_the_script_for_a_gpu_runs_up_to_the_kernels(capsys):
    """On the stand-in: all its rows are there, and nothing is wrong and nothing waits."""
    with fake_cupy.installed():
        gpu.main(["--small"])
    out = capsys.readouterr().out
    assert out.startswith("card   no device: a stand-in\n")
    assert "WRONG" not in out
    assert "missing" not in out
    rows = [line.split() for line in out.splitlines()]
    told = [row[-1] for row in rows if row[-2:-1] in (["sequential"], ["batched"]) and row[-1] in ("yes", "no")]
    assert told == ["no"] * 12
    assert len([row for row in rows if row[-1:] == ["there"]]) == len(gpu.SMALL) * len(gpu.DTYPES)


@pytest.mark.parametrize("reason", ["CuPy is not installed", "CuPy finds no CUDA device"])
def test_the_script_for_a_gpu_says_that_there_is_none(monkeypatch, reason):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.MODULE if "device" in reason else None)
    monkeypatch.setattr(fake_cupy.MODULE, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"No GPU: {reason}. Nothing was measured."):
        gpu.main([])
