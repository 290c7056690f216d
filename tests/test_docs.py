"""The pages are true: their code runs, their links lead somewhere, what they name is there."""

import ast
import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

import funcmha.interop
import funcmha.testing

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MATH = (ROOT / "docs/math.md").read_text()
PROMISES = (ROOT / "docs/promises.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
REFERENCE = "".join(page.read_text() for page in sorted(ROOT.glob("docs/reference/*.md")))
INTERNAL = {  # of funcmha.testing: what the rest is made of
    f"funcmha.testing.{name}"
    for name in ("gradcheck", "gradient", "pytest", "rounding", "rounding_attention", "rounding_position", "slope",
                 "structure", "table")
}  # fmt: skip
DECISIONS = sorted(ROOT.glob("docs/decisions/*.md"))
MANUAL = "".join(page.read_text() for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))])
MAKEFILE = (ROOT / "Makefile").read_text()
TABLES_OF_TESTS = {"docs/promises.md": PROMISES, "docs/interop.md": (ROOT / "docs/interop.md").read_text()}


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def blocks_with_output(text):
    """Each block, the number of lines before it, and what stands under it as its output, or None."""
    for block in re.finditer(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", text, re.DOTALL):
        yield block[1], text.count("\n", 0, block.start(1)), block[2]


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# ── the code of the pages ────────────────────────────────────────────────────────────────────────────────────────


def test_the_readme_example_needs_numpy_and_threadpoolctl_alone(tmp_path):
    """In a process that can import the standard library, NumPy and funcmha, and in which a warning is an error."""
    example, *_ = blocks(README)
    assert len([line for line in example.splitlines() if line]) == 12
    guard = f"""
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {{*sys.stdlib_module_names, "numpy", "threadpoolctl", "funcmha"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Guard())
sys.path.insert(0, {str(ROOT)!r})
"""
    end = "\nassert weights.shape == (8, 4, 32, 32) and not np.triu(weights, 1).any()"
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", guard + example + end],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    losses = [float(line.split()[1]) for line in out.stdout.splitlines()]
    assert len(losses) == 50
    assert np.all(np.diff(losses) < 0)
    first, last = re.search(r"# from ([\d.]+) to ([\d.]+)\n", example).groups()
    assert f"{losses[0]:.3f}" == first
    assert f"{losses[-1]:.3f}" == last


def run(page, folder, monkeypatch):
    """The names that the blocks of a page define, run one after another in an empty folder; outputs are compared."""
    monkeypatch.chdir(folder)
    return run_text(page.read_text(), name_of(page))


def run_text(text, name):
    names = {}
    for block, line, shown in blocks_with_output(text):
        with redirect_stdout(StringIO()) as printed:
            exec(compile("\n" * line + block, name, "exec"), names)  # errors name the line of the page
        assert shown in (None, printed.getvalue()), f"{name}, the output of line {line}: {printed.getvalue()}"
    return names


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text())], ids=name_of)
def test_the_code_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    assert run(page, tmp_path, monkeypatch)


def test_the_readme_saves_what_numpy_loads(tmp_path, monkeypatch):
    names = run(ROOT / "README.md", tmp_path, monkeypatch)
    np.testing.assert_array_equal(np.load("mean.npz")["q_proj.w"], names["params"]["q_proj"]["w"])
    assert names["dlayer"]["sink"]["w"].shape == (4,)
    assert names["dlayer"]["q_norm"]["w"].shape == (16,)


def test_the_gradients_of_the_interop_page_match_torch(tmp_path, monkeypatch):
    """What PyTorch's own backward pass leaves in .grad."""
    names = run(ROOT / "docs/interop.md", tmp_path, monkeypatch)
    names["module"].train()
    x = names["torch"].tensor(names["x"])
    y, _ = names["module"](x, x, x, attn_mask=names["causal"])
    np.testing.assert_allclose(names["y"], y.detach(), rtol=1e-5, atol=1e-5)
    y.backward(names["torch"].tensor(names["y"]))
    for name, parameter in names["module"].named_parameters():
        np.testing.assert_allclose(names["grads"][name], parameter.grad, rtol=1e-4, atol=1e-4)


# ── what the pages name ──────────────────────────────────────────────────────────────────────────────────────────
#
# Each check returns what is wrong with a text, so that the last test can show it a text with a fault.


@cache
def functions_in(path):
    """The names of the functions of one file."""
    with suppress(FileNotFoundError):
        return {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    return set()


def rows_without_test(text):
    """What is wrong with the rows of a page's table of tests: the row, and the test that is missing."""
    (table,) = re.findall(r"\| test \|\n(?:\|---)+\|\n((?:\|.*\|\n)*)", text)
    for row in table.splitlines():
        _, what, *_, cell, _ = (cell.strip() for cell in row.split("|"))
        nodes = re.findall(r"`(tests/\w+\.py)::(\w+)`", cell)
        if not nodes and not re.fullmatch(r"\*\*.*\*\*", what):  # a row in bold is a heading
            yield f"no test is named for: {what}"
        for path, name in nodes:
            if name not in functions_in(path):
                yield f"{path} has no {name}, which is named for: {what}"


def unknown_tests(text):
    """Names of tests that no test has."""
    known = set().union(*(functions_in(f"tests/{path.name}") for path in ROOT.glob("tests/test_*.py")))
    return set(re.findall(r"`(?:tests/\w+\.py::)?(test_\w+)`", text)) - known


def broken_links(text, folder):
    """Relative links to files, and to headings of files, that are not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        if not (folder / path).exists() or (heading and heading not in headings((folder / path).read_text())):
            yield target


def headings(text):
    """The anchors that GitHub gives to the headings of a page."""
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def unknown_names(text):
    """Dotted names like `funcmha.tree.map` that lead nowhere."""
    for dotted in re.findall(r"`(funcmha(?:\.\w+)+)", text):
        if dotted.endswith((".py", ".md")):
            continue
        module, *rest = dotted.split(".")
        node = importlib.import_module(module)
        for part in rest:
            module = f"{module}.{part}"
            with suppress(ModuleNotFoundError):
                importlib.import_module(module)
            node = getattr(node, part, None)
        if node is None:
            yield dotted


def unknown_verbs(text):
    """`make something` that the Makefile does not know."""
    known = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    return set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", text, re.MULTILINE)) - {(v, "") for v in known} - {
        ("", v) for v in known
    }  # fmt: skip


def unknown_extras(text):
    """Extras in the README's paragraph on installing that the project does not have."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return set(re.findall(r"`(\w+)`", re.search(r"Extras: (.*?)\. ", text, re.DOTALL)[1])) - known.keys() - {"verify"}


def wrong_places(text):
    """The `Where:` lines of docs/math.md that name no function of that file."""
    for line in re.findall(r"^Where: (.*)$", text, re.MULTILINE):
        for path, names in re.findall(r"\[`([\w/.]+)`\]\([\w/.]+\): ((?:`\w+`(?:, )?)+)", line):
            module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            yield from (f"{path}: {n}" for n in re.findall(r"`(\w+)`", names) if not hasattr(module, n))


def sections_without_place(text):
    """The headings of docs/math.md, from the first op to the laws, under which there are formulas and no `Where:`."""
    ops = text[text.index("## linear") : text.index("## What follows")]
    for section in re.split(r"^##+ ", ops, flags=re.MULTILINE):
        if "```math" in section and "Where: " not in section:
            yield section.splitlines()[0]


def undocumented(names, text):
    """Public names without a docstring of their own, or that no code on a page tells of."""
    code = " ".join(re.findall(r"```python\n.*?```|(?<!`)`[^`\n]+`", text, re.DOTALL))
    for name in names:
        node = getattr(funcmha, name)
        own = node.__doc__ and node.__doc__ != type(node).__doc__
        if not own or not re.search(rf"\b{name}\b", code):
            yield name


def public_modules():
    """The modules of the package, and those of `interop` and `testing`, which are imported by their own name."""
    yield funcmha
    yield from (module for module in map(vars(funcmha).get, funcmha.__all__) if inspect.ismodule(module))
    for package in (funcmha.interop, funcmha.testing):
        for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if "._" not in each.name and each.name not in INTERNAL:
                yield importlib.import_module(each.name)
    yield importlib.import_module("funcmha.interop.torch.autograd")


def documented(text):
    """The names, and the objects, that a page of the reference has entries for."""
    module = None
    for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", text, re.MULTILINE):
        if directive in ("automodule", "currentmodule"):
            module = importlib.import_module(name)
            yield name, module
        elif directive.startswith("auto"):
            yield f"{module.__name__}.{name}", getattr(module, name)


def without_entry(reference):
    """Names in the `__all__` of a public module that the reference has no entry for, under this or another name."""
    entries = [*documented(reference)]
    names, objects = {name for name, _ in entries}, {id(x) for _, x in entries if callable(x) or inspect.ismodule(x)}
    for module in public_modules():
        for name in module.__all__:
            if f"{module.__name__}.{name}" not in names and id(getattr(module, name)) not in objects:
                yield f"{module.__name__}.{name}"


@pytest.mark.parametrize("page", TABLES_OF_TESTS)
def test_every_promise_has_its_test(page):
    missing = list(rows_without_test(TABLES_OF_TESTS[page]))
    assert not missing, f"{page}:\n" + "\n".join(missing)


def test_every_public_name_is_told_of():
    assert not list(undocumented(funcmha.__all__, MANUAL))


def test_every_public_name_is_in_the_reference():
    assert not list(without_entry(REFERENCE))


def test_every_formula_has_its_place_in_the_code():
    assert MATH.count("\nWhere: ") >= 10
    assert not list(wrong_places(MATH))
    assert not list(sections_without_place(MATH))


def test_every_extra_of_the_readme_exists():
    assert not unknown_extras(README)


@every_page
def test_links_and_names_of_a_page_lead_somewhere(page):
    text = page.read_text()
    assert not list(broken_links(text, page.parent))
    assert not list(unknown_names(text))
    assert not unknown_verbs(text)
    assert not unknown_tests(text)


# ── the picture ──────────────────────────────────────────────────────────────────────────────────────────────────


def formulas_of_the_picture(names):
    """Those of docs/pipeline.py, as axes.md writes them."""
    for formula in (*names["FORWARD"].values(), *names["REVERSE"].values(), *names["GRADIENTS"].values()):
        text = " ".join(line.strip() for line in formula)
        yield from re.split(r",  | (?=(?:z|dk) = )", text)


def test_the_picture_is_what_its_script_draws():
    names = runpy.run_path(str(ROOT / "docs/pipeline.py"))
    assert (ROOT / "docs/pipeline.svg").read_text(encoding="utf-8") == names["picture"]()


def test_the_formulas_of_the_picture_are_those_of_axes_md():
    lines = {re.split(r" {3,}", line.strip())[0] for line in (ROOT / "docs/axes.md").read_text().splitlines()}
    drawn = [*formulas_of_the_picture(runpy.run_path(str(ROOT / "docs/pipeline.py")))]
    assert len(drawn) == 16
    assert set(drawn) <= lines


# ── the form of the pages ────────────────────────────────────────────────────────────────────────────────────────


def test_the_readme_is_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def test_one_version_is_named_everywhere():
    version = funcmha.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


def test_decisions_are_numbered_in_a_row_and_have_one_form():
    assert [page.name[:5] for page in DECISIONS] == [f"{i:04}-" for i in range(1, len(DECISIONS) + 1)]
    for page in DECISIONS:
        text = page.read_text()
        assert re.match(rf"# {page.name[:4]} \S", text), page.name
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"], page.name


@every_page
def test_fences_and_formulas_of_a_page_are_closed(page):
    text = page.read_text()
    assert text.endswith("\n")
    assert text.count("\n```") % 2 == 0
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not [line for line in prose.splitlines() if line.count("$") % 2 or line.count("`") % 2]


# ── the checks find faults ───────────────────────────────────────────────────────────────────────────────────────

PLANTED = {
    "a promise without a test": lambda: rows_without_test(PROMISES.replace("|---|---|\n", "|---|---|\n| x | - |\n")),
    "a promise to a test that is gone": lambda: rows_without_test(PROMISES.replace("::test_", "::test_no_", 1)),
    "a test file that is gone": lambda: rows_without_test(PROMISES.replace("tests/test_mha.py", "tests/test_x.py")),
    "a test that is gone": lambda: unknown_tests("`test_that_was_renamed`"),
    "a link to no file": lambda: broken_links("[x](docs/nothing.md)", ROOT),
    "a link to no heading": lambda: broken_links("[x](docs/math.md#nothing)", ROOT),
    "a name that is gone": lambda: unknown_names("`funcmha.tree.fold(x)`"),
    "a module that is gone": lambda: unknown_names("`funcmha.nothing`"),
    "a verb that make does not know": lambda: unknown_verbs("run `make coffee`"),
    "an extra that is not there": lambda: unknown_extras("Extras: `torch`, `cuda11`. "),
    "a place without the function": lambda: wrong_places(MATH.replace("`linear_vjp`", "`linear_backward`")),
    "a section without a place": lambda: sections_without_place(re.sub(r"\nWhere: .*`drop`", "", MATH)
                                                               .replace("diagonal", "```math\n```")),
    "a name without entry": lambda: without_entry(REFERENCE.replace(".. autofunction:: alibi_vjp\n", "")),
    "a class without entry": lambda: without_entry(REFERENCE.replace(".. autoclass:: KVCache\n", "")),
    "a public name no page tells of": lambda: undocumented(["sizes"], MANUAL.replace("sizes", "shapes")),
    "a public name without docstring": lambda: undocumented(["__version__"], "`__version__`"),
}  # fmt: skip


def test_an_output_that_is_not_printed_is_found():
    page = "```python\nprint(1)\n```\n\n```text\n{}\n```\n"
    run_text(page.format(1), "page")
    with pytest.raises(AssertionError, match="the output of line 1: 1"):
        run_text(page.format(2), "page")


@pytest.mark.parametrize("check", PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(check):
    assert list(check())
