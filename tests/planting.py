"""Faults in the syntax tree of a function: what `tests/faults.txt` says, and where in the source it is done.

An operation is a pattern and what comes in its place, in Python, with Greek letters for any expression:

    α - β → α + β                     a sign
    α * β → α                         a factor is dropped
    sum → mean                        another name: of a function, an attribute, a parameter
    matrix_transpose(α) → α           a call is left out; of whatever object it is: xp.matrix_transpose, namespace(q). …
    where(α, β, γ) → where(α, γ, β)   keywords that a pattern does not name are kept
    sum(*α, axis=β) → sum(*α)         a keyword is dropped
    if α → if not α                   a condition: of an `if`, a conditional expression, a `while`, a comprehension
    raise → pass                      a refusal is dropped
    statement → pass                  a call whose result nobody takes, or what adds to something

It applies to one of all the places in the function, in the order of the source, that have the form: 2/3 is the second
of three. Where there are no longer three, the fault does not apply, and is to be looked at.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

GENERAL = """
α + β → α - β; α - β → α + β; α * β → α / β; α / β → α * β; α // β → α; α ** β → α * β; -α → α; ~α → α
α + β → α; α - β → α; α * β → α; α * β → β; α / β → α; α & β → α; α & β → β; α | β → α; α and β → α; α or β → α
α < β → α <= β; α <= β → α < β; α > β → α >= β; α >= β → α > β; α == β → α != β; α != β → α == β
0 → 1; 1 → 0; 1 → 2; 2 → 3; -1 → -2; -2 → -1; 0.0 → 1.0; 1.0 → 0.0; True → False; False → True
max → min; min → max; sum → max; mean → sum; any → all; all → any; maximum → minimum; minimum → maximum
floor → ceil; ceil → floor; zeros → ones; zeros_like → ones_like; log → log2; sqrt(α) → α; abs(α) → α
where(α, β, γ) → β; where(α, β, γ) → γ; clip(α, β, γ) → α; flip(α, *β) → α; matrix_transpose(α) → α
moveaxis(α, *β) → α; widen(α) → α; narrow(α, β) → α; unbroadcast(α, β) → α
φ(*α, axis=κ) → φ(*α); φ(*α, mask=κ) → φ(*α); φ(*α, scale=κ) → φ(*α); φ(*α, dlse=κ) → φ(*α)
φ(*α, dweights=κ) → φ(*α); φ(*α, side=κ) → φ(*α); φ(*α, initial=κ) → φ(*α)
if α → not α; α if β else γ → α; α if β else γ → γ; raise → pass; statement → pass
"""  # what may be wrong anywhere
ROOT = Path(__file__).resolve().parents[1]
STATEMENTS = {"raise": ast.Raise, "statement": ast.Expr | ast.AugAssign}


class Fault(NamedTuple):
    function: str  # "ops.softmax_vjp": a function, a method, a class or a constant of a module in funcmha/
    operation: str
    place: str  # "2/3"
    says: str

    @property
    def path(self) -> Path:
        """The file, from funcmha/ on: that of the module, or the one of a package that has the name."""
        return self._found()[0]

    @property
    def name(self) -> str:
        """The function in that file."""
        return self._found()[1]

    def _found(self) -> tuple[Path, str]:
        parts, package = self.function.split("."), ROOT / "funcmha"
        for n in range(len(parts) - 1, 0, -1):
            file, folder = package.joinpath(*parts[:n]).with_suffix(".py"), package.joinpath(*parts[:n])
            found = [
                path for path in (file, *sorted(folder.rglob("*.py"))) if path.exists() and defines(path, parts[n])
            ]
            if len(found) == 1:
                return found[0].relative_to(package), ".".join(parts[n:])
        raise ValueError(f"{self.function} must be in one module, and is in none, or in many of a package")

    def plant(self, source: str) -> str:
        """The source with the fault in it; ValueError if it does not apply."""
        found = list(sites(scope(ast.parse(source), self.name), self.operation))
        k, n = map(int, self.place.split("/"))
        if len(found) != n:
            raise ValueError(f"{self.function} must have {n} places for {self.operation!r}, and has {len(found)}")
        node, new = found[k - 1]
        return replaced(source, node, new)


def defines(path: Path, name: str) -> bool:
    return any(name in names(node) for node in ast.parse(path.read_text()).body)


def table(path: Path) -> list[Fault]:
    """The faults of a file: a function, then indented an operation, its place and what is wrong, two spaces apart."""
    found, function = [], ""
    for line in path.read_text().splitlines():
        if line.startswith("    "):
            operation, place, says = re.split(" {2,}", line.strip())
            found.append(Fault(function, operation, place, says))
        elif line and not line.startswith("#"):
            function = line
    return found


def everywhere(path: Path) -> Iterator[Fault]:
    """All that GENERAL does to the functions and methods of a file of funcmha/."""
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    tree = ast.parse((ROOT / "funcmha" / path).read_text())
    for node in tree.body:
        for function in [node] if isinstance(node, ast.FunctionDef) else getattr(node, "body", []):
            if isinstance(function, ast.FunctionDef):
                name = ".".join([*parts, *(names(node) if function is not node else []), *names(function)])
                for operation in re.split("; |\n", GENERAL.strip()):
                    n = sum(1 for _ in sites(function, operation))
                    yield from (Fault(name, operation, f"{k}/{n}", "") for k in range(1, n + 1))


def scope(tree: Any, name: str) -> ast.AST:
    """The definition or assignment of this name, dotted where it is inside another; ValueError if there is none."""
    for part in name.split("."):
        named = [node for node in tree.body if part in names(node)]
        if len(named) != 1:
            raise ValueError(f"{name} must be defined once, and is {len(named)} times")
        tree = named[0]
    return tree


def names(node: ast.AST) -> list[str]:
    """What a statement defines. `_`, registered for a type, is called `function_Type`."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        register = [f.value for f in node.decorator_list if isinstance(f, ast.Attribute) and f.attr == "register"]
        if node.name == "_" and register:
            kind = (node.args.posonlyargs + node.args.args)[0].annotation
            return [f"{ast.unparse(register[0])}_{ast.unparse(kind).replace('.', '_')}"]
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


# ── patterns ─────────────────────────────────────────────────────────────────────────────────────────────────────


def sites(tree: ast.AST, operation: str) -> Iterator[tuple[ast.AST, str]]:
    """Each node that has the form, and the source that comes in its place."""
    old, new = operation.split(" → ")
    if old in STATEMENTS:
        yield from ((node, new) for node in walk(tree) if isinstance(node, STATEMENTS[old]) and not said(node))
        return
    condition = old.startswith("if ")
    old, new = parsed(old.removeprefix("if ")), new.removeprefix("if ")
    for node in walk(tree):
        for part in conditions(node) if condition else [node]:
            bound: dict = {}
            if not isinstance(getattr(part, "ctx", None), ast.Store) and matches(old, part, bound):
                yield part, ast.unparse(filled(new, bound, old, part))


def said(node: ast.AST) -> bool:
    """Whether it is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def parsed(side: str) -> ast.expr:
    return ast.parse(side, mode="eval").body


def conditions(node: ast.AST) -> list[ast.expr]:
    return getattr(node, "ifs", []) + ([node.test] if isinstance(node, ast.If | ast.IfExp | ast.While) else [])


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """In the order of the source, but for annotations, decorators, docstrings and messages."""
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list", "ctx"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                    yield from walk(child)


def greek(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and "α" <= node.id <= "ω"


def matches(pattern: Any, node: Any, bound: dict) -> bool:
    """Whether the node has the form; what Greek letters stand for is then in `bound`. A starred one: the rest."""
    if not isinstance(pattern, ast.AST | list):
        return type(pattern) is type(node) and pattern == node
    if isinstance(pattern, list):
        if pattern and isinstance(pattern[-1], ast.Starred) and greek(pattern[-1].value):
            n = len(pattern) - 1
            bound[pattern[-1].value.id] = node[n:]
            return len(node) >= n and matches(pattern[:-1], node[:n], bound)
        return len(pattern) == len(node) and all(map(lambda p, x: matches(p, x, bound), pattern, node))
    if greek(pattern):
        same = pattern.id not in bound or ast.dump(bound[pattern.id]) == ast.dump(node)
        bound[pattern.id] = node
        return same and isinstance(node, ast.expr)
    if isinstance(pattern, ast.Name):
        return pattern.id == getattr(node, "id", getattr(node, "attr", None))
    if type(pattern) is not type(node) or (type(node) is ast.UnaryOp and isinstance(node.operand, ast.Constant)):
        return type(pattern) is type(node) and ast.dump(pattern) == ast.dump(node)  # −1 is a number, and not − of 1
    if isinstance(pattern, ast.Call) and isinstance(pattern.func, ast.Name):
        given, named = {k.arg: k.value for k in node.keywords}, {k.arg: k.value for k in pattern.keywords}
        bound[f"{pattern.func.id}()"] = node.func, [k for k in node.keywords if k.arg not in named]
        return (
            matches(pattern.func, node.func, bound)
            and matches(pattern.args, node.args, bound)
            and all(name in given and matches(value, given[name], bound) for name, value in named.items())
        )
    fields = [field for field in pattern._fields if field != "ctx"]
    return all(matches(getattr(pattern, field), getattr(node, field), bound) for field in fields)


class Fill(ast.NodeTransformer):
    """What Greek letters stand for in their place, and calls of what they were of, with the keywords they had."""

    def __init__(self, bound, outermost):
        self.bound, self.outermost = bound, outermost

    def visit_Name(self, node):
        return self.bound[node.id] if greek(node) else node

    def visit_Starred(self, node):
        return self.bound[node.value.id] if greek(node.value) else self.generic_visit(node)

    def visit_Call(self, node):
        name = getattr(node.func, "id", "")
        was = self.bound.get(f"{name}()", self.outermost if node is self.new else None)
        self.generic_visit(node)
        if was:
            func, keywords = was
            if isinstance(func, ast.Attribute) and isinstance(node.func, ast.Name):
                node.func = ast.Attribute(func.value, name)
            node.keywords += keywords
        return node

    def visit(self, node):
        self.new = getattr(self, "new", node)
        return super().visit(node)


def filled(new: str, bound: dict, old: ast.expr, node: ast.AST) -> ast.AST:
    """What comes in place of the node."""
    tree = parsed(new)
    if isinstance(tree, ast.Name) and isinstance(node, ast.Attribute) and not greek(tree):
        return ast.Attribute(node.value, tree.id)
    outermost = f"{getattr(old.func, 'id', '')}()" if isinstance(old, ast.Call) else ""
    return Fill(bound, bound.get(outermost)).visit(tree)


def replaced(source: str, node: ast.AST, new: str) -> str:
    """The source with something else in place of a node; all else is as it was, to the byte."""
    lines = source.encode().splitlines(keepends=True)
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    if isinstance(node, ast.Tuple) and any(isinstance(part, ast.Slice) for part in node.elts):
        new = new[1:-1]  # of a subscript, which has no parentheses
    elif not isinstance(node, ast.stmt | ast.Slice):
        new = f"({new})"
    return (before + new.encode() + after).decode()
