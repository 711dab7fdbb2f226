"""Charts are well-formed SVG that says what it shows, with marks where the numbers are."""

from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest
from alexnet_triton.bench import units
from alexnet_triton.bench.report.blocks import Block, blocks, steps
from alexnet_triton.bench.report.charts import (
    Bar,
    Curve,
    Errors,
    Point,
    bars,
    curves,
    errors,
    roofline,
)
from alexnet_triton.bench.report.svg import (
    RAMP,
    Scale,
    beside,
    element,
    mark,
    shade,
    spread,
    standalone,
    text,
)

SVG = "{http://www.w3.org/2000/svg}"
LAYERS = (Block("conv<1>", 30, 50, 1.2), Block("pool1", 10, None, None), Block("fc6", 60, 90, 0.8))


def parsed(drawing: str) -> ET.Element:
    return ET.fromstring(drawing)


def texts(drawing: str) -> list[str]:
    return [node.text or "" for node in parsed(drawing).iter(f"{SVG}text")]


def titles(drawing: str) -> list[str]:
    return [node.text or "" for node in parsed(drawing).iter(f"{SVG}title")]


def place(node: ET.Element) -> tuple[float, float]:
    x, y = node.attrib["transform"].removeprefix("translate(").rstrip(")").split()
    return float(x), float(y)


def marks(drawing: str, class_: str) -> list[tuple[float, float]]:
    return [
        place(node)
        for node in parsed(drawing).iter(f"{SVG}path")
        if f" {class_}" in node.get("class", "") and "transform" in node.attrib
    ]


@pytest.mark.parametrize(
    ("us", "words"),
    [
        (0.1234, "0.123 µs"),
        (9.996, "10.0 µs"),
        (123.4, "123 µs"),
        (999.6, "1.00 ms"),
        (21_340, "21.3 ms"),
        (999_700, "1.00 s"),
        (None, "-"),
    ],
)
def test_times_have_three_digits_and_a_unit(us: float | None, words: str) -> None:
    assert units.time(us) == words


def test_numbers_in_words() -> None:
    assert units.whole(553_214) == "553,000"
    assert units.si(6.1234e14, "FLOP/s") == "612 TFLOP/s"
    assert units.si(999.9e9, "B/s") == "1.00 TB/s"
    assert units.si(12, "") == "12.0"
    assert units.percent(61.6) == "62 %"
    assert units.percent(0.44) == "0.4 %"
    assert units.times(1.5249) == "1.52x"
    assert units.power(2.09e-4) == "2.1e-4"
    assert units.power(math.inf) == "not finite"
    assert units.span(13.5, 14) == "13.5 to 14.0 µs"
    assert units.span(990, 1200) == "990 µs to 1.20 ms"
    for words, short in (("10.0 µs", "10 µs"), ("1.50 ms", "1.5 ms"), ("1.0e-10", "1e-10")):
        assert units.trim(words) == short
    assert units.trim("500,000") == "500,000"


@pytest.mark.parametrize("log", [True, False])
def test_a_scale_goes_from_end_to_end_and_back(log: bool) -> None:
    scale = Scale(2, 2000, 300, 10, log)
    assert scale(2) == pytest.approx(300)
    assert scale(2000) == pytest.approx(10)
    assert scale(1e9) == pytest.approx(10)
    assert scale.inverse(scale(77)) == pytest.approx(77)
    middle = scale(math.sqrt(2 * 2000) if log else 1001)
    assert middle == pytest.approx(155)
    assert all(2 <= tick <= 2000 for tick in scale.ticks())
    assert 3 <= len(scale.ticks()) <= 8


def test_things_that_are_spread_do_not_overlap() -> None:
    draw = random.Random(1)
    for _ in range(50):
        sizes = [draw.uniform(1, 9) for _ in range(10)]
        wanted = sorted(draw.uniform(0, 100) for _ in sizes)
        found = spread(wanted, sizes, 0, 100)
        edges = [(at - size / 2, at + size / 2) for at, size in zip(found, sizes, strict=True)]
        assert edges[0][0] >= -1e-9
        assert edges[-1][1] <= 100 + 1e-9
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(edges))
    assert spread([10, 50], [5, 5], 0, 100) == [10, 50]


def test_names_beside_points_keep_clear_of_each_other() -> None:
    draw = random.Random(2)
    points = [(draw.uniform(100, 200), draw.uniform(100, 150)) for _ in range(8)]
    names = [f"conv{i}" for i in range(8)]
    found = beside(points, names, 13, (0, 0, 400, 300))
    half = 5 * 13 * 0.6 / 2
    for (ax, ay), (bx, by) in combinations(found, 2):
        assert abs(ax - bx) >= 2 * half or abs(ay - by) >= 13
    for (x, y), (px, py) in ((name, point) for name in found for point in points):
        assert abs(x - px) > half or abs(y - py) > 6


def test_text_and_attributes_are_escaped() -> None:
    hostile = "</text><script>alert('\"&')</script>"
    drawing = element("svg", text(0, 0, hostile), mark(1, 0, 0, hostile), aria_label=hostile)
    root = ET.fromstring(drawing)
    assert root.attrib["aria-label"] == hostile
    assert [node.text for node in root.iter("text")] == [hostile]
    assert [node.text for node in root.iter("title")] == [hostile]


def test_the_ramp_brightens_and_its_ink_can_be_read() -> None:
    def bright(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    shades = [shade(i / 40) for i in range(41)]
    levels = [bright(fill) for fill, _ in shades]
    assert levels == sorted(levels)
    assert shades[0][0] == "#" + "".join(f"{c:02x}" for c in RAMP[0])
    for (_, ink), level in zip(shades, levels, strict=True):
        contrast = (level + 0.05) / 0.05 if ink == "#000" else 1.05 / (level + 0.05)
        assert contrast >= 4.4


def test_contestants_differ_in_marker_or_colour() -> None:
    drawn = [mark(style, 0, 0, "") for style in (*range(20), "straw", "lost")]
    assert len(set(drawn)) == len(drawn)


def test_a_block_is_as_wide_as_its_share() -> None:
    drawing = blocks(LAYERS, width=1000)
    groups = [g for g in parsed(drawing).iter(f"{SVG}g") if g.get("class") == "block"]
    assert [g.attrib["data-layer"] for g in groups] == ["conv<1>", "pool1", "fc6"]
    assert all(g.attrib["role"] == "button" and g.attrib["tabindex"] == "0" for g in groups)
    widths = [float(next(g.iter(f"{SVG}rect")).attrib["width"]) + 2 for g in groups]
    assert widths == pytest.approx([300, 100, 600])
    fills = [next(g.iter(f"{SVG}rect")).attrib["fill"] for g in groups]
    assert fills[0] == shade(0.5)[0]
    assert fills[2] == shade(0.9)[0]
    assert titles(drawing)[2] == (
        "fc6: 60.0 µs, 60 % of the time, 90 % of the roof, 0.800x the best peer's speed"
    )
    assert "▲ 1.20x" in texts(drawing)
    assert "▼ 0.800x" in texts(drawing)


def test_steps_tell_the_same_as_blocks() -> None:
    assert titles(steps(LAYERS)) == titles(blocks(LAYERS))


def test_roofline_stands_under_its_roofs() -> None:
    points = [
        Point("conv4", 1000, 400e12, ("cudnn", 1, 300e12)),
        Point("pool1", 1, 3e12, None),
    ]
    drawing = roofline(points, 780e12, 4.3e12)
    (cx, cy), (px, _) = marks(drawing, "s-0")
    ((rx, ry),) = marks(drawing, "s-1")
    assert rx == cx
    assert ry > cy  # slower is lower
    assert px < cx
    assert {"780 TFLOP/s", "4.30 TB/s", "conv4", "pool1"} <= set(texts(drawing))
    roofs = [n for n in parsed(drawing).iter(f"{SVG}line") if n.get("class") == "roof"]
    flat, slope = roofs
    assert flat.attrib["y1"] == flat.attrib["y2"]
    assert float(flat.attrib["y1"]) < cy
    assert (slope.attrib["x2"], slope.attrib["y2"]) == (flat.attrib["x1"], flat.attrib["y1"])
    assert "conv4, cudnn: 300 TFLOP/s" in titles(drawing)
    assert "roof" not in roofline(points, None, None).replace("Roofline", "")


def test_curves_are_logarithmic_with_bands() -> None:
    series = [
        Curve("ours", 0, ((1, 9, 10, 12), (10, 90, 100, 120), (100, 900, 1000, 1200))),
        Curve("straw", "straw", ((1, 90, 100, 120),)),
    ]
    drawing = curves(series, "latency", "time")
    (ax, ay), (bx, by), (cx, cy) = marks(drawing, "s-0")
    assert bx - ax == pytest.approx(cx - bx, abs=0.2)
    assert ay - by == pytest.approx(by - cy, abs=0.2)
    assert "ours, batch 10: 100 µs (90.0 µs to 120 µs)" in titles(drawing)
    classes = [n.get("class") for n in parsed(drawing).iter(f"{SVG}path")]
    assert classes.count("band s-0") == classes.count("curve s-0") == 1
    assert {"1", "10", "100"} <= set(texts(drawing))


def test_errors_out_of_tolerance_are_ringed() -> None:
    rows = [
        Errors("conv1", 1e-3, (("ours", 0, 1e-4), ("peer", 1, 2e-3))),
        Errors("conv2", 1e-3, (("ours", 0, 0.0), ("peer", 1, math.inf))),
        Errors("conv3", None, (("ours", 0, 1e-4),)),
    ]
    drawing = errors(rows)
    rings = [n for n in parsed(drawing).iter(f"{SVG}circle") if n.get("class") == "wrong"]
    assert len(rings) == 3  # both of the peer's, and what has no tolerance to be within
    said = titles(drawing)
    assert "peer, conv1: 2.0e-3, WRONG, tolerance 1.0e-3" in said
    assert "peer, conv2: not finite, WRONG, tolerance 1.0e-3" in said
    assert "ours, conv1: 1.0e-4, tolerance 1.0e-3" in said
    width = float(parsed(drawing).attrib["viewBox"].split()[2])
    assert all(0 <= x <= width for x, _ in marks(drawing, "s-1"))


def test_bars_are_parts_of_the_whole() -> None:
    drawing = bars([Bar("conv4", 12, 64, "12 of 64 warps"), Bar("fc<6>", 80, 64, "all")])
    rects = list(parsed(drawing).iter(f"{SVG}rect"))
    track, fill, _, full = (float(rect.attrib["width"]) for rect in rects)
    assert fill == pytest.approx(track * 12 / 64, abs=0.1)
    assert full == track
    assert "fc<6>" in texts(drawing)
    assert parsed(bars([])) is not None


def test_a_drawing_of_its_own_brings_its_style() -> None:
    alone = standalone(bars([Bar("a", 1, 2, "half")]))
    root = ET.fromstring(alone)
    style = root.find(f"{SVG}style")
    assert style is not None
    assert "prefers-color-scheme: dark" in (style.text or "")
