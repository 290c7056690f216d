"""A failing case is made small, and comes as a script that shows it."""

import contextlib
import io
import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from published import FAULTS, implementation

from funcmha.testing.conform import check
from funcmha.testing.conform.ready import ready
from funcmha.testing.conform.reproduction import reproduction
from funcmha.testing.conform.shrink import shrink


def first_wrong(impl, feature):
    report = check(impl, select=lambda case: case.feature == feature)
    return next(row for f in report.features for row in f.failures if row.verdict == "wrong" and row.quantity != "call")


def printed(script):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(script, "reproduction", "exec"), {"array": np.array, "float32": np.float32})
    return out.getvalue()


@pytest.mark.parametrize(
    "bug", ["torchtitan 4796", "levanter 449", "FastVideo 925", "xformers 854", "TransformerEngine, masks"]
)
def test_a_planted_fault_is_shown_by_a_few_numbers(bug):
    fault = next(f for f in FAULTS if f.bug == bug)
    impl = implementation((fault.old, fault.new))
    small = shrink(impl, first_wrong(impl, fault.feature), seconds=30)
    p, x = small.case.problem, small.x
    assert small.row.verdict == "wrong"
    assert p.B * p.H * p.T * p.S <= 16
    assert all(a is None or a.shape for a in x)
    module = sys.modules["planted"] = types.ModuleType("planted")
    module.impl = impl
    script = reproduction(impl, small, "planted:impl")
    assert len(script.splitlines()) <= 16
    shown = printed(script)
    got = re.search(r"got (\S+);", script)
    if got:  # the entry that is wrong is among what is printed, to the digits of either
        numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", shown)]
        assert np.isclose(numbers, float(got[1]), rtol=1e-4, atol=1e-9).any()
    sys.modules.pop("planted")


def test_the_fault_of_a_fused_kernel_is_shown_by_torch_alone():
    impl = replace(ready("torch:sdpa-flash"), dtypes=("float32",))
    small = shrink(impl, first_wrong(impl, "lowest bias"), seconds=20)
    script = reproduction(impl, small, "torch:sdpa-flash")
    assert "torch.autograd.grad" in script
    assert "impl = ready('torch:sdpa-flash')" in script
    assert "tensor" in printed(script)
    assert small.case.problem.T * small.case.problem.S <= 16


def test_a_law_that_is_broken_stays_the_law():
    fault = next(f for f in FAULTS if f.bug == "jax-flash-attn2 1")
    impl = implementation((fault.old, fault.new))
    report = check(impl, select=lambda case: case.feature == "plain")
    row = next(row for f in report.features for row in f.failures if row.law)
    small = shrink(impl, row, seconds=20)
    assert small.row.why == row.why
    assert small.case.problem.T == 1


def test_what_is_random_is_left_as_it_is():
    """What failed once, and does not again, is no smaller than it was."""
    row = first_wrong(implementation(("    o = p @ vh\n", "    o = p @ vh + np.float32(1)\n")), "plain")
    assert shrink(implementation(), row, seconds=5).row is row
