"""Pictures: what is drawn is what was given, and each is a file that can be read."""

import re
import struct
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from funcmha import attention, attention_weights, init, masks, mha, npz
from funcmha.__main__ import main
from funcmha.testing.verify import Row

pytest.importorskip("matplotlib")

from matplotlib import colors

from funcmha.testing import pictures

BLOCKS = {colors.to_hex(colour): name for name, colour in pictures.BLOCKS.items()}


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">2I", data[16:24])


def drawn(panel):
    """The pairs (i, j) of the points of a panel."""
    (points,) = panel.lines
    return {(int(i), int(j)) for j, i in zip(*points.get_data(), strict=True)}


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.causal() & masks.lengths(np.array([3, 11])),
        np.random.default_rng(0).random((2, 3, 7, 11)) < 0.4,
        np.zeros((7, 11), bool),
    ],
    ids=["causal", "lengths", "heads", "empty"],
)
def test_a_picture_of_a_mask_shows_its_pairs_and_blocks(mask):
    """Oracle: the dense mask, block by block."""
    T, S, rows, cols = 7, 11, 3, 4
    given = masks.as_mask(mask)
    dense = given.dense(T, S)
    dense = np.broadcast_to(dense, (*dense.shape[:-2], T, S)).reshape(-1, T, S)
    panels = pictures.mask(mask, T, S, block=(rows, cols)).axes
    assert len(panels) == len(dense)
    for panel, one in zip(panels, dense, strict=True):
        assert drawn(panel) == {(int(i), int(j)) for i, j in np.argwhere(one)}
        told = {}
        for patch in panel.patches:
            i, j = int(patch.get_y() + 0.5), int(patch.get_x() + 0.5)
            told[i, j] = BLOCKS[colors.to_hex(patch.get_facecolor())]
        want = {}
        for i in range(0, T, rows):
            for j in range(0, S, cols):
                block = one[i : i + rows, j : j + cols]
                want[i, j] = "full" if block.all() else "mixed" if block.any() else "empty"
        assert given.on_host
        if len(dense) == 1 or given.shape(T, S)[0] == 2:
            assert told == want


def test_sizes_of_a_picture_of_a_mask_are_checked():
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="T, S and block must be at least 1"):
            pictures.mask(masks.causal(), *sizes)
    with pytest.raises(ValueError, match="block must be at least 1"):
        pictures.mask(masks.causal(), 4, 4, block=(0, 2))


# ── weights, parameters ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_of_weights_shows_each_head_of_the_sample():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 12))
    _, cache = mha(init(0, 12, 3, dtype=np.float64), x, x, x, mask=masks.causal())
    for sample in (0, 1):
        panels = [ax for ax in pictures.weights(cache, sample=sample).axes if ax.get_title()]
        shown = [ax.images[0].get_array() for ax in panels]
        np.testing.assert_array_equal(np.stack(shown), attention_weights(cache)[sample])
        assert panels[2].get_title().startswith("head 2   max 1.00")
    with pytest.raises(IndexError):
        pictures.weights(cache, sample=2)
    with pytest.raises(ValueError, match="an index for each"):
        pictures.weights(attention(*3 * [rng.standard_normal((2, 2, 3, 5, 4))])[1])


def test_the_entropy_of_equal_weights_is_1_and_of_one_key_0():
    assert pictures._entropy(np.full((3, 8), 1 / 8)) == pytest.approx(1)
    assert pictures._entropy(np.full((3, 8), 1 / 16)) == pytest.approx(1)  # a sink has the other half
    assert pictures._entropy(np.eye(8)) == 0
    assert pictures._entropy(np.zeros((3, 8))) == 0


def test_a_picture_of_parameters_shows_the_norm_of_each_head():
    params = init(0, 12, 6, num_kv_heads=2, head_dim=5, dtype=np.float64)
    params["q_proj"]["w"][4] *= 10
    top, below = np.array(pictures.parameters(params).axes).reshape(2, 4)
    for ax, name, axis in zip(top, ("q_proj", "k_proj", "v_proj", "out_proj"), (0, 0, 0, 1), strict=True):
        w = params[name]["w"]
        want = np.sqrt((np.moveaxis(w, axis, 0) ** 2).mean(axis=(1, 2)))
        np.testing.assert_allclose([bar.get_height() for bar in ax.patches], want)
        assert ax.get_title() == name
    for ax, heads in zip(below, (6, 2, 2, 6), strict=True):
        assert len(ax.patches) == heads
        for line in ax.patches:
            assert line.get_data().values.sum() == pytest.approx(1)


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_draws_each_attention_of_a_file(tmp_path, capsys):
    npz.save(tmp_path / "two.npz", {"a": {"x": init(0, 12, 4)}, "b": init(0, 12, 2), "norm": {"w": np.ones(3)}})
    npz.save(tmp_path / "one.npz", init(0, 12, 4))
    assert main(["inspect", str(tmp_path / "two.npz"), "--plot", str(tmp_path / "two.png")]) == 0
    assert main(["inspect", str(tmp_path / "one.npz"), "--plot", str(tmp_path / "one.png")]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"one.png", "two.a.x.png", "two.b.png"}
    assert all(min(png_size(path)) > 400 for path in tmp_path.glob("*.png"))
    assert "16 leaves" not in capsys.readouterr().err


def test_what_cannot_be_drawn_gets_one_line_and_status_2(tmp_path, capsys):
    npz.save(tmp_path / "none.npz", {"norm": {"w": np.ones(3)}})
    npz.save(tmp_path / "one.npz", init(0, 12, 4))
    for argv, message in (
        (["inspect", str(tmp_path / "none.npz"), "--plot", "x.png"], "nothing to plot"),
        (["inspect", str(tmp_path / "one.npz"), "--plot", str(tmp_path / "x.what")], "'what' is not supported"),
        (["inspect", str(tmp_path / "one.npz"), "--plot", "/nowhere/x.png"], "/nowhere/x.png: No such file"),
        (["verify", "--html", "/nowhere/x.html"], "/nowhere/x.html: No such file"),
    ):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_the_page_of_verify_is_whole_and_fetches_nothing(tmp_path):
    page = tmp_path / "v.html"
    sizes = ["--batch", "2", "--length", "5", "--width", "6", "--heads", "2", "--dtype", "float32"]
    assert main(["verify", *sizes, "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"<tr class=\"ok\">", text)) == 22
    assert "All 22 values agree with PyTorch." in text
    fetched = re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"|url\((?!#)[^)]*\)|@import|<script|<link", text)
    assert fetched == []
    start, end = text.index("<svg"), text.index("</svg>") + len("</svg>")
    ElementTree.fromstring(text[start:end])


def test_a_failure_stands_out_in_the_page():
    rows = [
        Row("self-attention", "float32", "a < b", (2, 3), 1e-6, 0.1, 0.2),
        Row("self-attention", "float32", "off", (2, 3), 1e-3, 0.1, 20.0),
        Row("self-attention", "float32", "nan", (), np.nan, np.nan, np.inf),
    ]
    text = pictures.errors_html(rows, title="t", lines=["x & y"])
    assert re.findall(r'<tr class="(\w+)">', text) == ["ok", "fails", "fails"]
    assert "a &lt; b" in text
    assert "x &amp; y" in text
    (ax,) = pictures.errors(rows).axes
    orange = colors.to_rgb(pictures.ORANGE)
    marks = [line for line in ax.lines if line.get_marker() in "oD"]
    assert [colors.to_rgb(line.get_color()) == orange for line in marks] == [False, False, False, True, True, True]
    least, most = ax.get_xlim()
    assert all(least < line.get_xdata()[0] < most for line in marks)


def test_the_same_picture_is_the_same_text():
    one, two = (pictures.svg(pictures.mask(masks.causal(), 6, 6)) for _ in range(2))
    assert one == two


def test_without_matplotlib_the_extra_is_named(tmp_path):
    """By every function, and by both commands, before any work."""
    npz.save(tmp_path / "one.npz", init(0, 12, 4))
    code = f"""
import sys
sys.modules["matplotlib"] = None
from funcmha import masks
from funcmha.__main__ import main
from funcmha.testing import pictures
try:
    pictures.mask(masks.causal(), 4, 4)
except ModuleNotFoundError as error:
    print(error)
assert main(["inspect", {str(tmp_path / "one.npz")!r}, "--plot", "x.png"]) == 2
assert main(["verify", "--html", {str(tmp_path / "x.html")!r}]) == 2
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra = "pip install 'funcmha[plot]'"
    assert [extra in line for line in (run.stdout + run.stderr).splitlines()] == [True, True, True]
    assert not (tmp_path / "x.html").exists()
