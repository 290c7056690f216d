"""The page of a report: complete, in one file, with pictures that show where an error is."""

import re
import struct
import zlib
from base64 import b64decode, b64encode
from html.parser import HTMLParser

import numpy as np
import pytest
from published import FAULTS, implementation

from funcmha.__main__ import main
from funcmha.testing.conform import Implementation, check
from funcmha.testing.conform.heatmap import LEGEND, MOST, classes, maps, png
from funcmha.testing.conform.html import as_html
from funcmha.testing.conform.verdicts import errors

CLOSED = {"meta", "img", "br"}  # elements without an end


class Page(HTMLParser):
    """The elements of a page, the text within each, and what it asks for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asked, self.images, self.text = [], [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.asked += [given[name] for name in ("src", "href", "srcset", "action") if name in given]
        self.images += [given] if tag == "img" else []
        self.open += [] if tag in CLOSED else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def planted(bug, **declared):
    fault = next(fault for fault in FAULTS if fault.bug == bug)
    return implementation((fault.old, fault.new), **declared)


def page_of(impl, *features, **options):
    report = check(impl, select=lambda case: case.feature in features)
    return report, as_html(report, "mine:impl", **options)


def decoded(url):
    """The colours of a PNG of 8 bits a pixel by palette, read by its chunks"""
    data = b64decode(url.removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        (n,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + n]
        assert struct.unpack(">I", data[at + 8 + n : at + 12 + n]) == (zlib.crc32(kind + body),)
        chunks[kind], at = body, at + 12 + n
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()  # no filter
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[rows[:, 1:]]


COLOURS = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, colour, _ in LEGEND])


def test_a_failure_has_its_picture_its_script_and_a_guess():
    report, text = page_of(planted("levanter 449"), "plain", "grouped heads", seconds=2)
    page = Page(text)
    assert not page.open
    assert all(url.startswith(("data:image/png;base64,", "#failure-")) for url in page.asked)
    assert not re.search(r"https?:|<script|@import|url\(", text)
    assert {"plain", "grouped heads"} <= set(page.text["th"])
    assert len(page.text["h3"]) == sum(len(f.failures) for f in report.features) > 0
    assert [s for s in page.text["pre"] if "from mine import impl" in s and "np.array" in s]
    assert any("the sum over a group of heads" in s for s in page.text["p"])
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 4  # of dk and dv: all heads, and the worst


def test_what_is_right_has_no_failure():
    _, text = page_of(implementation(), "plain")
    assert "<p>None.</p>" in text
    assert "<img" not in text


def test_what_is_written_is_escaped():
    def forward(q, k, v):
        raise ValueError("<b>a & b</b>")

    _, text = page_of(Implementation("<i>", forward), "plain")
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in text
    assert "<b>a & b" not in text
    assert "<i>" not in text.replace('<i style="background', "")


def test_the_last_tile_is_seen():
    """The gradient has no last tile where that is not whole: keys from there on are outside, those before are not."""
    report, _ = page_of(planted("pytorch 153799"), "sizes", again=False)
    row = next(row for f in report.features for row in f.failures if row.quantity == "dv" and not row.law)
    ratios = errors(planted("pytorch 153799"), row.case)["dv"]
    heads, worst = maps("dv", ratios)
    begin = row.case.problem.S // 32 * 32
    ok = (decoded(heads.source) == COLOURS[0]).all(-1)
    assert ok[:, :begin].all()
    assert not ok[:, begin:].any()
    assert heads.across == f"key 0 … {row.case.problem.S - 1}"
    assert decoded(worst.source).shape[:2] == (row.case.problem.S, row.case.problem.E)


def test_a_pixel_has_the_colour_of_its_ratio():
    ratios = np.array([[0, 0.5, 1, 1.01, 8, 9], [100, 101, 1e4, 1e5, np.inf, np.nan]])
    by_hand = [[0, 0, 0, 1, 1, 2], [2, 3, 3, 4, 5, 5]]
    np.testing.assert_array_equal(classes(ratios), by_hand)
    picture = decoded("data:image/png;base64," + b64encode(png(classes(ratios))).decode())
    np.testing.assert_array_equal(picture, COLOURS[np.array(by_hand)])


def test_colours_differ_in_lightness():
    """So that they are told apart in grey, by every eye."""
    light = COLOURS @ [0.2126, 0.7152, 0.0722]
    assert np.all(np.diff(light) < -12)


@pytest.mark.parametrize(("shape", "pixels"), [((1, 1, 500, 7), (125, 7)), ((2, 3, 5, 321), (5, 107))])
def test_what_is_long_is_pooled_by_its_largest(shape, pixels):
    ratios = np.zeros(shape)
    ratios[0, 0, -1, -1] = 1e9
    worst = maps("dq", ratios)[1]
    assert worst.shape == pixels
    assert max(pixels) <= MOST
    np.testing.assert_array_equal((decoded(worst.source) != COLOURS[0]).any(-1).nonzero(), [[n - 1] for n in pixels])


def test_what_has_another_shape_has_no_picture():
    assert maps("dq", np.full((), np.inf)) == []
    assert maps("o", np.zeros((2, 0, 3, 4))) == []


def test_the_command_writes_the_page(tmp_path, capsys):
    pytest.importorskip("torch")
    file = tmp_path / "out.html"
    assert main(["conform", "torch:mha-is-causal", "--feature", "appended key", "--html", str(file)]) == 1
    page = Page(file.read_text(encoding="utf-8"))
    assert page.text["h1"] == page.text["title"]
    assert page.images
    assert main(["conform", "diff", "torch:mha", "torch:flex", "--html", str(file)]) == 2
    assert "diff prints one table: leave out --html" in capsys.readouterr().err
