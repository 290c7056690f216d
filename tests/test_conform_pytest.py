"""The plugin of pytest, in a pytest of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPL = """
import sys
sys.path.insert(0, {tests!r})
from published import implementation
impl = implementation({changes}expected={expected})
"""
DROPPED = '("        along = along + dlse[..., None]\\n", "        along = along\\n"), '


@pytest.fixture
def run(tmp_path):
    def run(changes="", expected=None, *, only="lse"):
        (tmp_path / "mine.py").write_text(
            IMPL.format(tests=str(ROOT / "tests"), changes=changes, expected=expected or {})
        )
        (tmp_path / "pytest.ini").write_text("[pytest]\n")  # which is not looked for further up
        command = [sys.executable, "-m", "pytest", "-p", "funcmha.testing.pytest", "--conform=mine.py:impl", "-rA"]
        out = subprocess.run(
            [*command, "-p", "no:cacheprovider", "-k", f"conventions or conform[{only}-"],
            cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return out.returncode, out.stdout + out.stderr

    return run


def test_what_is_right_passes(run):
    code, out = run()
    assert code == 0, out
    assert "PASSED ::conform[lse-float32-dq]" in out
    assert "PASSED ::conform[conventions]" in out


def test_what_is_wrong_fails_with_the_report(run):
    code, out = run(DROPPED)
    assert code == 1
    assert "FAILED ::conform[lse-float32-dq]" in out
    assert "PASSED ::conform[lse-float32-dv]" in out
    assert "the gradients are those without the cotangent of lse: it is dropped" in out


def test_what_is_expected_to_fail_is_a_strict_xfail(run):
    code, out = run(DROPPED, {"lse/dq": "issue 1", "lse/dk": "issue 1"})
    assert code == 0, out
    assert "XFAIL ::conform[lse-float32-dq] - issue 1" in out
    code, out = run("", {"lse/dq": "issue 1"})
    assert code == 1
    assert "expected to fail and does not: issue 1" in out
