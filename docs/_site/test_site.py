"""The site that `make docs` has built: nothing of it comes from elsewhere, and every link leads somewhere."""

import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import funcmha

SITE = Path(__file__).parents[1] / "_build/html"
PAGES = sorted(SITE.rglob("*.html"))
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
NOT_FETCHED = {"canonical", "next", "prev", "search", "index"}  # of <link rel=…>
ELSEWHERE = {
    "https://keepachangelog.com/en/1.1.0/",
    "https://onnx.ai/onnx/operators/onnx__Attention.html",
    "https://semver.org/",
    "https://www.sphinx-doc.org/",  # the foot of each page, by the theme
    "https://github.com/pradyunsg/furo",
    "https://pradyunsg.me",
}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(not PAGES, reason="there is no site: `make docs` builds it, and runs these tests")


class Page(HTMLParser):
    """What a page links to, what a browser fetches for it, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.fetched, self.anchors, self.formulas = [], [], {""}, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.update(given[name] for name in ("id", "name") if given.get(name))
        self.formulas += "math" in (given.get("class") or "").split()
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(FETCHED.get(tag)) and given.get("rel") not in NOT_FETCHED:
            self.fetched.append(given[FETCHED[tag]])
        self.fetched += [part.split()[0] for part in (given.get("srcset") or "").split(",") if part]


def name_of(page):
    return str(page.relative_to(SITE))


@cache
def parsed(path):
    return Page(path.read_text(encoding="utf-8"))


def from_elsewhere(fetched):
    """Addresses that are not in the site's own folder."""
    return [address for address in fetched if re.match(r"(https?:)?//", address)]


def fetched_by_css(text):
    """What a style sheet makes a browser fetch."""
    return [a or b for a, b in re.findall(r"url\(\s*[\"']?([^)\"']+)|@import\s+[\"']([^\"']+)", text)]


def broken(page):
    """The links of a page to files or anchors that are not there."""
    for link in parsed(page).links:
        if re.match(r"\w+:|//", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / unquote(path)).resolve() if path else page
        if not target.is_file() or (target.suffix == ".html" and unquote(anchor) not in parsed(target).anchors):
            yield link


def test_nothing_is_fetched_from_elsewhere():
    found = {page: from_elsewhere(parsed(page).fetched) for page in PAGES}
    assert not {name_of(page): addresses for page, addresses in found.items() if addresses}
    for sheet in SITE.rglob("*.css"):
        assert not from_elsewhere(fetched_by_css(sheet.read_text(encoding="utf-8"))), sheet


def test_what_is_fetched_is_there():
    for page in PAGES:
        for address in parsed(page).fetched:
            assert (page.parent / unquote(re.sub(r"[?#].*", "", address))).is_file(), f"{page}: {address}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    assert not [*broken(page)]


def test_links_to_other_sites_are_those_that_were_looked_at():
    """None of them is followed here, so each is listed."""
    found = {link for page in PAGES for link in parsed(page).links if re.match(r"\w+:|//", link)}
    assert {link.partition("#")[0] for link in found} == ELSEWHERE


def test_every_name_of_the_package_has_its_entry():
    anchors = set().union(*(parsed(page).anchors for page in SITE.glob("reference/*.html")))
    modules = {name for name in funcmha.__all__ if type(getattr(funcmha, name)).__name__ == "module"}
    assert {f"funcmha.{name}" for name in set(funcmha.__all__) - modules} <= anchors
    assert {f"module-funcmha.{name}" for name in modules} <= anchors


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to run the pages' scripts in")
@pytest.mark.parametrize("page", [page for page in PAGES if 'class="math' in page.read_text()], ids=name_of)
def test_every_formula_is_rendered(page, tmp_path):
    alone = [f"--user-data-dir={tmp_path}", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", *alone, "--virtual-time-budget=10000", "--dump-dom"]
    out = subprocess.run([CHROMIUM, *arguments, page.as_uri()], capture_output=True, text=True, check=True, timeout=300)
    assert out.stdout.count("<mjx-container") >= parsed(page).formulas > 0
    assert "merror" not in re.sub(r"<style.*?</style>|<script.*?</script>", "", out.stdout, flags=re.DOTALL)


FAULTS = {
    "a script from elsewhere": lambda: from_elsewhere(Page('<script src="https://cdn.org/x.js"></script>').fetched),
    "a font from elsewhere": lambda: from_elsewhere(fetched_by_css("@font-face { src: url(//fonts.org/x.woff2) }")),
    "a style sheet from elsewhere": lambda: from_elsewhere(fetched_by_css('@import "https://cdn.org/x.css"')),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault):
    assert fault()
