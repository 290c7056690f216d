"""The site: MyST pages, docstrings and the notebook, rendered by Sphinx. `make docs` builds it."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_site"))

import mathjax  # noqa: E402 — the package of its files, django-static-mathjax
from sources import linkcode_resolve  # noqa: E402, F401 — Sphinx reads it here

import funcmha  # noqa: E402

project = "funcmha"
version = release = funcmha.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "docstrings",
    "sources",
]
exclude_patterns = ["_build"]
smartquotes = False  # pages quote code
nitpicky = False  # a word in backticks is a link where it is a public name, and code elsewhere
default_role = "py:obj"

# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────

myst_enable_extensions = ["deflist", "dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # `make docs` has run the notebook
nb_merge_streams = True

# ── docstrings ───────────────────────────────────────────────────────────────────────────────────────────────────

autodoc_typehints = "none"  # line 1 has shapes, which say more
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# ── html: everything is served from the folder itself ────────────────────────────────────────────────────────────

html_theme = "furo"
html_title = f"funcmha {release}"
html_static_path = ["_site/static", str(Path(mathjax.__path__[0], "static/mathjax/es5/tex-svg.js"))]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
mathjax_path = "tex-svg.js"
mathjax3_config = {
    "tex": {"packages": {"[-]": ["noundefined"]}},  # an unknown macro is an error, and not its name in red
    "svg": {"fontCache": "global"},
    "options": {"enableMenu": False},
}
pygments_style = "tango"
pygments_dark_style = "monokai"
