"""Docstrings of funcmha as reStructuredText: the formula on line 1, then prose, lists of arguments and code."""

import re

ARGUMENT = re.compile(r"(?P<names>[\w*][\w*, ]*?)(?:  +|: )(?P<text>\S.*)")


def rendered(docstring):
    """The lines of a docstring, converted paragraph by paragraph."""
    formula, *rest = re.split(r"\n\s*\n", docstring.strip("\n"))
    yield from literal(formula, ":class: formula")
    for paragraph in rest:
        yield from converted(paragraph)


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
    """A line of prose in which only backticks mean anything."""
    parts = line.split("`")
    return "`".join(re.sub(r"([*|_\\])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def process(app, what, name, obj, options, lines):
    """The event of autodoc: `lines` is changed in place."""
    if not getattr(obj, "__doc__", None) or is_of_namedtuple(obj):
        lines[:] = []
    elif what != "module":
        lines[:] = rendered("\n".join(lines))


def is_of_namedtuple(obj):
    """Whether the docstring is the one that NamedTuple makes, which says nothing that the signature does not."""
    return isinstance(obj, type) and obj.__doc__.startswith(f"{obj.__name__}(")


def setup(app):
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
