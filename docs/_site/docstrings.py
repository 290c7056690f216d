"""Docstrings of funcmha as reStructuredText: the formula on line 1, then prose, lists of arguments and code."""

import re

from sphinx.util import inspect
from sphinx.util.nodes import make_refnode

FORMULA = re.compile(r"[=→≤⌊⟨]|\S {3,}\S")
NAME = re.compile(r"[A-Za-z]\w*(\.\w+)*(\(.*\))?")
ARGUMENT = re.compile(r"(?P<names>[\w*][\w*, ]*?)(?:  +|: )(?P<text>\S.*)")


def rendered(docstring, formula):
    """The lines of a docstring, converted paragraph by paragraph; the first may be a formula."""
    for i, paragraph in enumerate(re.split(r"\n\s*\n", docstring.strip("\n"))):
        is_formula = formula and i == 0 and FORMULA.search(paragraph)
        yield from literal(paragraph, ":class: formula") if is_formula else converted(paragraph)


def converted(paragraph):
    """One paragraph, of which the first line says what it is."""
    first = paragraph.splitlines()[0]
    if first.startswith("    "):
        return literal(paragraph)
    if is_list_of_arguments(paragraph):
        return arguments(paragraph)
    if re.search(r"\S {3,}\S", paragraph):  # columns
        return literal(paragraph)
    return [*(escaped(line) for line in paragraph.splitlines()), ""]


def is_list_of_arguments(paragraph):
    """Whether names stand at the margin, and what is said of them beside or below."""
    starts = [line for line in paragraph.splitlines() if not line.startswith(" ")]
    hanging = any(line.startswith("  ") for line in paragraph.splitlines())
    aligned = all(re.match(r"[\w*][\w*, ]*?  +\S", line) for line in starts)
    return aligned or (hanging and all(ARGUMENT.fullmatch(line) for line in starts))


def arguments(paragraph):
    """A definition list."""
    for line in paragraph.splitlines():
        start = None if line.startswith(" ") else ARGUMENT.fullmatch(line)
        if start:
            yield from ["", f"``{start['names']}``"]
        yield "    " + escaped(start["text"] if start else line.strip())
    yield ""


def literal(text, *options):
    """Text that stays as it is."""
    return [".. code-block:: none", *(f"    {o}" for o in options), "", *(f"    {x}" for x in text.splitlines()), ""]


def escaped(line):
    """A line of prose in which only backticks mean anything: code, and a link where it is a name."""
    prose_and_code = line.split("`")
    prose_and_code[::2] = [re.sub(r"([*|_\\])", r"\\\1", prose) for prose in prose_and_code[::2]]
    prose_and_code[1::2] = [f"`{x}`" if NAME.fullmatch(x) else f"``{x}``" for x in prose_and_code[1::2]]
    return "".join(prose_and_code)


def process(app, what, name, obj, options, lines):
    """The event of autodoc: `lines` is changed in place."""
    if what == "data" or not getattr(obj, "__doc__", None) or is_of_namedtuple(obj):
        lines[:] = []
    else:
        lines[:] = rendered("\n".join(lines), formula=what in ("function", "method"))


def shorten(app, what, name, obj, options, arguments, returns):
    """A default that is a function has no text of its own."""
    return re.sub(r"<function .*?>+", "…", arguments or "") or None, returns


def is_of_namedtuple(obj):
    """Whether the docstring is the one that NamedTuple makes, which says nothing that the signature does not."""
    return isinstance(obj, type) and obj.__doc__.startswith(f"{obj.__name__}(")


def is_field(app, what, name, obj, skip, options):
    """A field of a NamedTuple is in the signature, and has no entry of its own."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def find(app, env, node, content):
    """The link of a name that is dotted or a class, and the end of one public name, as `biases.alibi(…)` is."""
    name = node["reftarget"].partition("(")[0]
    if "." in name or name[:1].isupper():
        objects = env.get_domain("py").objects
        found = sorted((key for key in objects if key.endswith(f".{name}")), key=lambda key: key.count("."))
        if found and (len(found) == 1 or found[0].count(".") < found[1].count(".")):
            entry = objects[found[0]]
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, found[0])
    return None


def setup(app):
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", is_field)
    app.connect("missing-reference", find)
    inspect.is_singledispatch_function = lambda function: False  # the signatures of all caches are one
    return {"parallel_read_safe": True, "parallel_write_safe": True}
