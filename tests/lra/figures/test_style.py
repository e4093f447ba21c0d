"""One colour per method, told apart by people who are colour blind, and figures that are the same bytes twice."""

import itertools

import numpy as np
import pytest

from lra.figures import style

SEVERE = {  # linear RGB of what is seen, Machado, Oliveira & Fernandes 2009, severity 1
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
# Linear RGB to OKLab, Ottosson 2020
LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
       [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
       [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip


def linear(color):
    """Linear RGB of #rrggbb."""
    c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """OKLab of linear RGB."""
    return np.array(LAB) @ np.cbrt(np.clip(np.array(LMS) @ rgb, 0, None))


def luminance(color):
    """Relative luminance of WCAG 2."""
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("vision", SEVERE)
def test_any_two_methods_are_told_apart_by_every_kind_of_eye(vision):
    seen = [oklab(np.array(SEVERE[vision]) @ linear(c)) for c in (style.INK, style.GREY, *style.PALETTE)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.07  # 0.02 is just seen


def test_colours_stand_out_from_white_and_from_near_black():
    for c in (style.GREY, *style.PALETTE):
        assert 1.05 / (luminance(c) + 0.05) > 2.2 and (luminance(c) + 0.05) / (luminance("#111418") + 0.05) > 2.2


def test_every_method_has_one_colour_and_marker_unknown_ones_too():
    names = list(style.METHODS)
    assert len({style.color(n) for n in names}) == len({style.marker(n) for n in names}) == len(names)
    for name in ("package.module:Class", "mine", "<script>", ""):
        assert style.color(name) == style.color(name) in style.PALETTE and style.marker(name) in style.MARKERS
    assert (style.color("mine"), style.marker("mine")) != (style.color("yours"), style.marker("yours"))


def test_variants_and_peers_have_the_colour_of_their_method_and_lines_of_their_own():
    names = ("softmax", "softmax bf16", "softmax causal", "softmax unfused", "pypi:softmax-thing")
    assert {style.color(n) for n in names} == {style.INK}
    assert len({str(style.look(n)["linestyle"]) for n in names}) == len(names)
    for peer, method in (("pypi:linformer", "linformer"), ("pypi:performer-pytorch", "performer"),
                         ("pypi:nystrom-attention", "nystrom"), ("pypi:darkformer-pytorch", "darkformer")):  # fmt: skip
        assert style.color(peer) == style.color(method) and style.look(peer) != style.look(method)


def test_a_figure_takes_the_baselines_and_ones_own_method_before_others():
    names = sorted([*style.METHODS, "mine", "softmax bf16", "pypi:linformer"])
    shown = style.selection(names)
    assert len(shown) == style.SERIES and {"softmax", "constant", "mine", "performer", "darkformer"} <= set(shown)
    assert shown == sorted(shown) and not {"softmax bf16", "pypi:linformer"} & set(shown)
    assert style.selection(names, everything=True) == names


def drawn(path):
    """A figure with lines, text and a clip, saved."""
    with style.drawing():
        figure, axes = style.subplots(width=3, height=2)
        axes.plot([1, 2, 3], [1, 4, 9], color=style.color("performer"), marker="o", label="$x$ <b>")
        axes.legend()
    return style.save(figure, path)


def test_same_figure_is_the_same_bytes_without_a_date(tmp_path):
    svg, png = drawn(tmp_path / "one")
    again = drawn(tmp_path / "two")
    assert (svg.name, png.name) == ("one.svg", "one.png")
    assert [p.read_bytes() for p in (svg, png)] == [p.read_bytes() for p in again]
    text = svg.read_text()
    assert "$x$ &lt;b&gt;" in text and "<dc:date>" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "one.svg", "two.png", "two.svg"]
