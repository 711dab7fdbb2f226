"""The report: the right words for the right figures, labels inside pictures, nothing fetched."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.records import EMPTY, OURS, RecordError, Results, Row, Times, load, save
from alexnet_triton.bench.report import figures, story
from alexnet_triton.bench.report import page as pages
from alexnet_triton.bench.report.report import combined, markdown, page, summary, text
from alexnet_triton.bench.report.story import Duel
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

ROOT = Path(__file__).parents[1]
H100 = ROOT / "bench" / "results" / "h100"
BATCHES = (1, 8, 64, 256, 1024, 4096)
LAYERS = {"conv1": 40.0, "conv<2>": 60.0, "pool2": 9.0, "fc6": 20.0, "conv1+pool1": 50.0}
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789ab+",
    "gpu name": "Synthetic <H200> & more",
}
PEERS = {"torch channels last": 1.5, "torch.compile": 1.2, "torch NCHW": 3.0}


def row(section: str, problem: str, batch: int, contestant: str, us: float, **more: Any) -> Row:
    given: dict[str, Any] = {
        **{"network": "alexnet", "dtype": "fp16", "clock": "graph", "runs": 25},
        **{"flops": 10**9 * batch, "bytes": 10**6 * (len(problem) + batch), "roof_us": us / 2},
        **{"max_error": 3e-4, "rms_error": 5e-5, "tolerance": 2e-3},
        **{"median_us": us, "p20_us": us * 0.99, "p80_us": us * 1.02},
        **more,
    }
    return Row(section, problem, batch=batch, contestant=contestant, **given)  # type: ignore[arg-type]


def trial(stages: int, **more: Any) -> dict[str, Any]:
    names = {"layer": "conv2", "batch": 256, "dtype": "fp16", "device": "Synthetic"}
    return {
        **names,
        "config": {"num_stages": stages},
        "status": "ok",
        "median_us": 90.0 + stages,
    } | more


@pytest.fixture(scope="module")
def results() -> Results:
    """A GPU's results as they might be, with a peer that is wrong and one that is not there."""
    rows = []
    for batch, clock, (who, slower) in product(
        BATCHES, ("cold", "graph"), [(OURS, 1.0), *PEERS.items()]
    ):
        named = {"clock": clock, "straw_man": who == "torch NCHW"}
        rows.append(row("model", "alexnet", batch, who, slower * (80 + 3 * batch), **named))
        for layer, us in LAYERS.items():
            rows.append(row("layers", layer, batch, who, slower * us * (1 + batch / 64), **named))
    wrong = row("layers", "fc6", 1, "cudnn", 1.0, max_error=math.inf)
    gone = {"median_us": None, "max_error": None, "tolerance": None, "note": "needs a package"}
    rows += [wrong, *(row("layers", layer, 1, "absent", 1.0, **gone) for layer in LAYERS)]
    trials = [trial(stages) for stages in (4, 2, 3)]
    trials += [trial(5, status="wrong", reason="<crashed> & burned", median_us=None)]
    roofs = {"fp16": 780e12, "copy": 4.3e12}
    notes = ("clocks <not> locked",)
    return Results(dict(ENVIRONMENT), roofs, tuple(rows), tuple(trials), notes)


@pytest.fixture(scope="module")
def report(results: Results) -> str:
    return page(results)


def interpreted() -> Results:
    """Few rows by the host's clock, as a CPU gives them."""
    host: dict[str, Any] = {"clock": "host", "dtype": "fp32", "network": "digits"}
    rows = [
        row("layers", layer, 1, who, us, **host)
        for layer, us in (("conv1", 21_000.0), ("fc8", 900.0))
        for who in (OURS, "torch channels_last")
    ]
    return Results(
        {"date": "2026-01-02T00:00:00", "commit": "abc", "gpu name": None}, {}, tuple(rows)
    )


# --- pictures ---------------------------------------------------------------------------------


def drawn(results: Results) -> list[tuple[str, Any]]:
    makers = (pages.network, pages.layers, pages.tuning, pages.order)
    parts = [part for make in makers for part in make(results)]
    return [(part.caption, part.figure) for part in parts if part.figure]


@pytest.mark.parametrize("stored", [None, "results", "layers-peers", "model-batch1"])
def test_every_label_is_inside_its_picture(
    stored: str | None, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none lies on another."""
    written: list[Text] = []
    draw = Text.draw

    def noted(label: Text, renderer: Any) -> None:
        written.append(label)
        draw(label, renderer)

    monkeypatch.setattr(Text, "draw", noted)
    with figures.style():
        for caption, figure in drawn(load(H100 / f"{stored}.json") if stored else results):
            written.clear()
            canvas: Any = FigureCanvasAgg(figure)
            canvas.draw()
            shown = (label for label in written if label.get_text() and label.get_visible())
            labels = {id(label): label for label in shown}.values()
            boxes = [(label.get_text(), Text.get_window_extent(label)) for label in labels]
            assert len(boxes) > 4
            whole = figure.bbox.padded(1)
            for words, box in boxes:
                inside = [whole.contains(x, y) for x, y in (box.min, box.max)]
                assert all(inside), (caption, words, box)
            for (words, box), (others, other) in combinations(boxes, 2):
                assert not box.padded(-1).overlaps(other.padded(-1)), (caption, words, others)


def test_pictures_follow_light_and_dark_and_stand_alone(report: str) -> None:
    """Every colour is one of the style sheet's, and says itself what it is without one."""
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", report, re.S)]
    assert len(drawings) == 3
    assert all(svg.findtext("{http://www.w3.org/2000/svg}title") for svg in drawings)
    known = {f"var(--{name}, {value})" for name, value in figures.COLOURS.items()}
    inside = "".join(re.findall(r"<svg.*?</svg>", report, re.S))
    assert set(re.findall(r"var\([^)]*\)", inside)) <= known
    assert not re.findall(r"(?<!, )#[0-9a-f]{6}\b", inside)
    ids = re.findall(r'id="([^"]+)"', report)
    assert len(set(ids)) == len(ids)


def test_a_picture_says_numbers_whole() -> None:
    """Coordinates are cut to be short; what is written is not."""
    one = Duel(made := row("layers", "0.98765", 1, OURS, 0.12345), made, None)
    with figures.style():
        text = figures.svg(figures.bars({"0.0001": one}), "a", "0.123456")
    said = re.sub(r"<[^>]*>", " ", text).split()
    assert {"0.0001", "0.123456"} <= {*said}
    assert not re.search(r"<[^>]*\.\d{3}", text)


def test_a_picture_shows_the_numbers(results: Results) -> None:
    view = story.views(results, "layers")[0]
    duels = {duel.row.problem: duel for duel in view.duels(64)}
    with figures.style():
        axes: Any = figures.bars(duels).axes[0]
        widths = [bar.get_width() for bar in axes.patches]
        assert widths == [us * 2 for us in LAYERS.values()] + [us * 2.4 for us in LAYERS.values()]
        curves: Any = figures.curves(story.views(results, "model")[0]).axes[0]
        assert curves.lines[0].get_label() == OURS
        assert list(curves.lines[0].get_ydata()) == [b / (80 + 3 * b) * 1e6 for b in BATCHES]


# --- the page ---------------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_is_short(report: str) -> None:
    assert not re.search(r"<script|@import|url\((?!#)|\ssrc=|href=\"(?!#)", report)
    assert "default-src 'none'" in report
    assert re.findall(r'<section id="(\w+)"', report) == [
        *("verdict", "network", "layers", "tuning", "order", "origin")
    ]
    shipped = ROOT / "bench" / "results" / "cpu-digits" / "report.html"
    assert max(len(report.encode()), shipped.stat().st_size) < 300_000


def test_a_long_run_still_makes_a_short_page(results: Results) -> None:
    rows = [
        replace(r, dtype=dtype) for dtype in ("fp16", "bf16", "tf32", "fp32") for r in results.rows
    ]
    trials = [trial(i, batch=batch) for batch in range(60) for i in range(40)]
    made = page(replace(results, rows=tuple(rows), searches=tuple(trials)))
    assert len(made.encode()) < 300_000
    assert "would make this page too long" in made
    assert "48 of 60 searches" in made


def test_the_headline_is_the_fastest_batch_and_the_smallest(results: Results, report: str) -> None:
    told = summary(results)
    assert told["images_per_second"] == 4096 / (80 + 3 * 4096) * 1e6
    assert told["latency_us"] == 83
    assert ("x best peer, batch 1", "1.20x", "torch.compile takes 99.6 µs") in story.figures(
        results
    )
    assert "<dd>1.20x</dd>" in report


def test_names_from_outside_are_escaped(report: str) -> None:
    assert "Synthetic &lt;H200&gt; &amp; more" in report
    assert "clocks &lt;not&gt; locked" in report
    assert not re.search("<H200>|<not>|<2>|<crashed>", report)


def test_what_is_not_right_has_no_speed(results: Results) -> None:
    (wrong,) = (
        line
        for line in pages.contestants(story.views(results, "layers")[0]).rows
        if line[1] == "cudnn"
    )
    assert wrong[3] == "not shown"
    assert not any("µs" in cell for cell in wrong)
    assert wrong[-1] == "NO"


def test_warnings_are_in_words(results: Results) -> None:
    told = " ".join(story.warnings(results))
    assert "Files differed from commit 0123456789ab" in told
    assert "cudnn: not timed or not right in 1 row: error not finite in fc6." in told
    assert story.NO_GPU not in told
    gone, tensorrt = story.absences(results)
    assert gone == "absent: not timed or not right in 5 rows: needs a package."
    assert "TensorRT" in tensorrt
    assert story.match_verdict(results)[0] is True
    spoilt = replace(results, rows=(replace(results.rows[0], max_error=1.0), *results.rows))
    matched, words = story.match_verdict(spoilt)
    assert matched is False
    assert "alexnet at batch 1" in words


def test_where_a_peer_is_faster_is_told() -> None:
    slow = interpreted()
    rows = [
        replace(r, median_us=(r.median_us or 0) / 4) if r.contestant != OURS else r
        for r in slow.rows
    ]
    told = " ".join(story.warnings(replace(slow, rows=tuple(rows))))
    assert "Slower than the best peer, digits, fp32, host clock" in told
    assert "conv1 at batch 1 (1/4.00)" in told
    assert "Slower" not in " ".join(story.warnings(slow))


def test_layers_of_ours_that_could_not_be_timed_are_warned_of_and_peers_shown() -> None:
    lost = load(H100 / "layers-peers.json")
    assert any(
        f"{OURS}: not timed" in line and "unhashable" in line for line in story.warnings(lost)
    )
    (view,) = story.views(lost, "layers")
    assert {duel.ours for duel in view.duels()} == {None}
    assert story.tables(lost)[0].rows[0][:3] == ("conv1", "-", "cudnn conv+relu C4")


def test_a_ratio_is_of_one_race_and_the_strongest_peer_s() -> None:
    """A later race of ours with other peers stands beside the first one."""

    def raced(race: str, ours: float, peer: str, slower: float) -> list[Row]:
        rows = [row("model", "alexnet", 1, name, at) for name, at in ((OURS, ours), (peer, slower))]
        noise = (0.99, 1.0, 1.01, 1.0, 0.995, 1.005)
        return [
            replace(
                r.timed(Times("graph", tuple((r.median_us or 0) * n for n in noise))), race=race
            )
            for r in rows
        ]

    rows = (*raced("first", 100.0, "torch", 150.0), *raced("second", 120.0, "compile", 144.0))
    both = Results(dict(ENVIRONMENT), {}, rows)
    (line,) = story.tables(both)[0].rows
    assert line[1:5] == ("120 µs", "compile", "144 µs", "1.20x [1.20, 1.20]")
    races = {cells[1]: cells[9] for cells in pages.network(both)[0].rows if cells[1] != OURS}
    assert races == {"torch": "first", "compile": "second"}
    assert "1.20x [1.20, 1.20]" in page(both)


def test_an_empty_kernel_is_shown_and_is_no_peer(results: Results) -> None:
    gone = {"max_error": None, "tolerance": None, "roof_us": None, "note": "the clock itself"}
    empty = row("layers", "fc6", 1, EMPTY, 1.9, **gone)
    with_it = replace(results, rows=(*results.rows, empty))
    view = story.views(with_it, "layers")[0]
    (line,) = (line for line in pages.contestants(view).rows if line[1] == EMPTY)
    assert line[3] == "1.90 µs"
    assert not any(EMPTY in words for words in (*story.absences(with_it), *story.warnings(with_it)))
    assert EMPTY not in {duel.peer.contestant for duel in view.duels(1) if duel.peer}


def test_a_page_of_nothing_says_what_would_fill_it() -> None:
    made = page(Results({}, {}, ()))
    assert made.count('class="soft none"') == 6
    assert "<svg" not in made
    assert "nothing of ours was checked" in text(Results({}, {}, ()))


def test_text_has_verdict_and_layers(results: Results) -> None:
    assert story.NO_GPU in text(interpreted())
    said = text(results)
    assert "stored results: Synthetic <H200> & more, 2026-01-02, commit 0123456789ab+" in said
    assert re.search(r"^images per second +[\d,]+ +batch 4096", said, re.M)
    assert re.search(r"^ *fc6 +1.30 ms +torch.compile +1.56 ms +1.20x +50 %$", said, re.M)


@pytest.mark.parametrize("kept", ["ok", "wrong"])
def test_a_search_has_one_winner(results: Results, kept: str) -> None:
    trials = [each for each in results.searches if each["status"] == kept]
    part, *_ = pages.tuning(replace(results, searches=tuple(trials)))
    (line,) = part.rows
    assert line[5:] == (("92.0 µs", "num_stages=2") if kept == "ok" else ("-", "-"))


# --- several results, the verb and README -----------------------------------------------------


def test_several_results_of_one_device_make_one() -> None:
    runs = [load(H100 / f"{name}.json") for name in ("results", "model-batch1", "layers-peers")]
    one = combined(runs)
    assert len(one.rows) == sum(len(run.rows) for run in runs)
    assert len(one.searches) == 370
    assert combined([runs[1], runs[1]]).rows == runs[1].rows
    with pytest.raises(RecordError, match="one device"):
        combined([runs[0], interpreted()])


def test_the_verb_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], results: Results
) -> None:
    stored, out = tmp_path / "results.json", tmp_path / "report.html"
    save(interpreted(), stored)
    assert main(["report", str(stored), str(stored), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    save(results, stored)
    assert main(["report", str(stored), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["matched"] is True
    assert told["figures"][0]["what"] == "images per second"


def test_refusals_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, readme = tmp_path / "results.json", tmp_path / "README.md"
    save(interpreted(), stored)
    readme.write_text("# no marks\n")
    assert main(["report", str(stored), "--readme", str(readme)]) == 1
    assert "no `<!-- results:begin results.json -->` in it" in capsys.readouterr().err
    assert main(["report", str(stored), "-o", str(tmp_path / "nowhere" / "x.html")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    assert main(["report", str(stored), "-o", str(tmp_path / "x.html")]) == 1
    assert "pip install -e '.[plot]'" in capsys.readouterr().err
    assert main(["report", str(stored), "--text"]) == 0


def test_readme_is_rewritten_between_its_marks(tmp_path: Path, results: Results) -> None:
    (tmp_path / "bench").mkdir()
    stored, readme = tmp_path / "bench" / "r.json", tmp_path / "README.md"
    save(results, stored)
    begin, end = (
        "# Name\n\n<!-- results:begin bench/r.json -->\n",
        "<!-- results:end -->\n\nafter\n",
    )
    other = "<!-- results:begin bench/other.json -->\nkept\n<!-- results:end -->\n"
    readme.write_text(f"{begin}old\n{end}{other}")
    for _ in range(2):
        assert main(["report", str(stored), "--readme", str(readme)]) == 0
        assert readme.read_text() == f"{begin}{markdown(results)}{end}{other}"


def test_the_table_tells_origin_and_ratios(results: Results) -> None:
    lines = [line for line in markdown(results).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(BATCHES) + 2 + len(LAYERS)
    assert lines[2].startswith("| 1 | 83.0 µs | torch.compile | 99.6 µs | 1.20x | 50 % |")
    assert "commit 0123456789ab+." in markdown(results)
    assert "say nothing of a GPU" in markdown(interpreted())
    assert "Nothing was right and timed" in markdown(Results({}, {}, ()))


def test_readme_shows_what_is_stored() -> None:
    shown = re.findall(
        r"<!-- results:begin (\S+) -->\n(.*?)<!-- results:end -->",
        (ROOT / "README.md").read_text(),
        re.S,
    )
    assert shown
    for stored, table in shown:
        assert table == markdown(load(ROOT / stored)), f"bench report {stored} --readme README.md"
