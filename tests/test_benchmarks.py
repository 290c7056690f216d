"""The benchmark compares equal things: every peer computes the same, in every case."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are in the repository, not in the package

from benchmarks import cases, peers  # noqa: E402
from benchmarks.peers.funcmha import HAS_ENGINES  # noqa: E402

TAKES_A_MINUTE = "PyTorch compiled"  # and is the eager peer but for one line
SELF_ATTENTION_ONLY = {"PyTorch weights", "Compyute sequential", "Compyute semi", "Compyute parallel"}
CANNOT = {"self": set(), "cross": SELF_ATTENTION_ONLY, "attention": SELF_ATTENTION_ONLY}


def tiny(case):
    """Of odd sizes, so that no axis is taken for another."""
    heads = {"H": 6, "K": 2} if case.K < case.H else {"H": 3, "K": 3}
    case = case._replace(B=min(case.B, 2), T=min(case.T, 29), D=5, window=case.window and 7, **heads)
    return case._replace(S=case.T if case.kind == "self" else 37)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_peers_agree(case):
    """Output and every gradient, by name, shape and dtype, with those of eager PyTorch."""
    case = tiny(case)
    problem = cases.draw(case)
    want = peers.load(peers.EAGER)(case, problem).named()
    one_engine = set() if HAS_ENGINES else {"funcmha sequential"}
    for name in peers.PEERS.keys() - {peers.EAGER, TAKES_A_MINUTE} - CANNOT[case.kind] - one_engine:
        got = peers.load(name)(case, problem).named()
        assert got.keys() == want.keys()
        for quantity, x in want.items():
            assert got[quantity].dtype == np.float32
            np.testing.assert_allclose(got[quantity], x, rtol=1e-4, atol=1e-4, err_msg=f"{name}: {quantity}")


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
