"""The tables of faults do not rot: each still applies to its function; and operations do what they say."""

import ast
from collections import Counter

import pytest
from mutants import MORE, PLANTED, ROOT, catching
from planting import Fault, everywhere, replaced, scope, sites, table

EQUIVALENT = table(ROOT / "tests/equivalent.txt")
NEARLY = table(ROOT / "tests/nearly_right.txt")
MODULES = sorted(path.relative_to(ROOT / "funcmha") for path in (ROOT / "funcmha").rglob("*.py"))


@pytest.mark.parametrize("function", sorted({fault.function for fault in PLANTED + EQUIVALENT + NEARLY}))
def test_every_fault_still_applies(function):
    """If it fails, look at the function, and for the places at `python tests/mutants.py places FUNCTION OPERATION`."""
    for fault in PLANTED + EQUIVALENT + NEARLY:
        if fault.function == function:
            source = (ROOT / "funcmha" / fault.path).read_text()
            compile(fault.plant(source), f"{fault.function} with {fault.operation!r}", "exec")


def test_the_table_names_each_fault_once():
    assert len(PLANTED) >= 100
    assert not [fault for fault, n in Counter(fault[:3] for fault in PLANTED + EQUIVALENT).items() if n > 1]


def test_every_module_has_tests():
    tests = {test for module in MODULES for test in catching(module)}
    assert not [test for test in tests if not (ROOT / "tests" / test).exists()]
    assert not [begin for begin in MORE if not any(str(module).startswith(begin) for module in MODULES)]


# ── operations ───────────────────────────────────────────────────────────────────────────────────────────────────


def first(source, operation):
    """The source after the operation at the first place."""
    return next(replaced(source, *site) for site in sites(scope(ast.parse(source), "f"), operation))


@pytest.mark.parametrize(
    ("was", "operation", "becomes"),
    [
        ("a - b", "α - β → α + β", "(a + b)"),
        ("2 * (a + b)", "α * β → β", "(a + b)"),
        ("xp.sum(a, axis=0)", "sum → mean", "(xp.mean)(a, axis=0)"),
        ("xp.sum(a, axis=0, keepdims=True)", "sum(*α, axis=β) → sum(*α)", "(xp.sum(a, keepdims=True))"),
        ("-xp.sum(a, axis=0)", "-sum(*α) → sum(*α)", "(xp.sum(a, axis=0))"),
        ("namespace(a).where(m, a, 0.0)", "where(α, β, γ) → γ", "(0.0)"),
        ("xp.transpose(a) @ b", "transpose(α) → α", "(a) @ b"),
        ("g(a, mask=b)", "φ(*α, mask=κ) → φ(*α)", "(g(a))"),
        ("a if m else b", "if α → not α", "a if (not m) else b"),
        ("a[1:, 0]", "1: → 2:", None),
        ("a[-1]", "-1 → -2", "a[(-2)]"),
        ("a * a + a * b", "α * α → α", "(a) + a * b"),
        ('a or "δ"', "α or β → β", "('δ')"),
    ],
)
def test_an_operation_of_an_expression(was, operation, becomes):
    source = f'def f(a: "a - b", m=None):\n    """a - b"""\n    return {was}  # δ\n'
    if becomes is None:
        with pytest.raises(SyntaxError):
            first(source, operation)
    else:
        assert first(source, operation) == source.replace(f"return {was}", f"return {becomes}")


def test_an_operation_of_a_statement():
    source = 'def f(a):\n    """δ"""\n    if a < 0:\n        raise ValueError("a")\n    check(a)\n    a += 1\n'
    assert "pass\n    check(a)" in first(source, "raise → pass")
    assert [new for _, new in sites(scope(ast.parse(source), "f"), "statement → pass")] == ["pass"] * 2


def test_a_fault_that_does_not_apply_is_refused():
    fault = Fault("ops.linear", "α + b → α", "1/1", "")
    for source in ("def linear(b): return b", "def linear(b): return b + b + b", "def other(): pass"):
        with pytest.raises(ValueError, match=r"must (have 1 places|be defined once)"):
            fault.plant(source)
    with pytest.raises(ValueError, match="must be in one module"):
        Fault("nowhere.linear", "α → α", "1/1", "").plant("")


def test_mutants_are_python_and_differ():
    for fault in list(everywhere(PLANTED[0].path))[::7]:
        source = (ROOT / "funcmha" / fault.path).read_text()
        assert fault.plant(source) != source
        compile(fault.plant(source), str(fault), "exec")
