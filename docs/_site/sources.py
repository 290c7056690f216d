"""Pages of source code, to which the reference and the links of pages to files of the repository lead."""

import inspect
import re
from importlib import import_module
from os.path import relpath
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from sphinx import addnodes
from sphinx.util.osutil import relative_uri

ROOT = Path(__file__).parents[2]
SHOWN = {*(ROOT / "funcmha").rglob("*.py"), *(ROOT / "examples").glob("*.py")}  # and what pages link to
OF_THE_ROOT = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}


def source_page(path):
    """The name of the page of a file."""
    return f"source/{path.relative_to(ROOT).as_posix()}"


def pages(app):
    """Each file, highlighted, with an anchor L-n on line n."""
    formatter = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True, wrapcode=True)
    for path in sorted(SHOWN):
        name = path.relative_to(ROOT).as_posix()
        code = highlight(path.read_text(), get_lexer_for_filename(name), formatter)
        context = {"title": name, "body": f"<h1><code>{name}</code></h1>{code}", "toc": "", "display_toc": False}
        yield source_page(path), context, "page.html"


def linkcode_resolve(domain, info):
    """Where the source of an object of the reference is. All pages of the reference are one folder deep."""
    node = import_module(info["module"])
    for part in info["fullname"].split("."):
        node = getattr(node, part, None)
    node = inspect.unwrap(getattr(node, "fget", None) or node)
    try:
        path, line = Path(inspect.getsourcefile(node)), inspect.getsourcelines(node)[1]
    except TypeError:  # a constant
        return None
    return f"../{source_page(path)}.html#L-{line}" if path in SHOWN else None


def link_to_sources(app, doctree):
    """Links to files of the repository, which MyST takes for downloads, lead to their pages."""
    docname = app.env.docname
    for node in list(doctree.findall(addnodes.download_reference)):
        path = (Path(app.env.doc2path(docname)).parent / node["reftarget"].lstrip("/")).resolve()
        if path.suffix == ".py" and path.is_relative_to(ROOT):
            SHOWN.add(path)
            here = app.builder.get_target_uri(docname)
            link = nodes.reference("", "", *node.children, refuri=relative_uri(here, f"{source_page(path)}.html"))
            node.replace_self(link)


def read_page(app, docname, source):
    """`changelog` and `contributing` are files of the root, whose links start there; a link to a package is one to its
    `__init__.py`.
    """
    folder = Path(app.env.doc2path(docname)).parent
    if docname in OF_THE_ROOT:
        source[0], folder = (ROOT / OF_THE_ROOT[docname]).read_text(), ROOT

    def led_from_docs(match):
        path, _, heading = match[1].partition("#")
        target = folder / path
        target = target / "__init__.py" if (target / "__init__.py").exists() else target
        return f"]({relpath(target, Path(app.env.doc2path(docname)).parent)}{heading and '#'}{heading})"

    source[0] = re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", led_from_docs, source[0])


def setup(app):
    """What Sphinx calls."""
    app.connect("source-read", read_page)
    app.connect("doctree-read", link_to_sources, priority=100)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
