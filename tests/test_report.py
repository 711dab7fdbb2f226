"""The report: the right words for the right figures, every panel filled, nothing that is fetched.

All figures here are made up by `synthetic`: rooflines times a random factor.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure.problem import problems
from alexnet_triton.bench.records import OURS, RecordError, Results, Row, load, save
from alexnet_triton.bench.report import story
from alexnet_triton.bench.report.landscape import searches
from alexnet_triton.bench.report.readme import markdown, marked, rewrite
from alexnet_triton.bench.report.report import page, search_page, search_svg, summary, text
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network

ROOT = Path(__file__).parents[1]
BATCHES = (1, 8, 64, 256, 1024, 4096)
ROOFS = {"fp16": 780e12, "bf16": 775e12, "copy": 4.3e12}
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789ab+",
    "cpu": "Made-up CPU",
    "cores": "16",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "gpu name": "Synthetic <H200> & more",
    "gpu power.limit": "700.00 W",
}


ABSENT = "needs the package nvidia-cudnn-frontend"


def row(section: str, problem: str, batch: int, contestant: str, us: float, **more: Any) -> Row:
    given: dict[str, Any] = {
        "network": "alexnet",
        "dtype": "fp16",
        "clock": "graph",
        "flops": 1_000_000,
        "bytes": 10_000,
        "max_error": 3e-4,
        "rms_error": 5e-5,
        "tolerance": 2e-3,
        "median_us": us,
        "p20_us": us * 0.99,
        "p80_us": us * 1.02,
        "runs": 25,
        **more,
    }
    return Row(section, problem, batch=batch, contestant=contestant, **given)  # type: ignore[arg-type]


def synthetic(dtypes: tuple[str, ...] = ("fp16",), seed: int = 0) -> Results:
    """A GPU's results as they might be: counted work, measured-looking roofs, random factors."""
    draw = random.Random(seed)
    rows: list[Row] = []
    factors = {
        OURS: 0.62,
        "torch channels last": 0.45,
        "torch cudnn_convolution_relu": 0.55,
        "torch.compile": 0.5,
        "torch NCHW": 0.2,
        "cudnn frontend": 0.3,
    }

    def rival(section: str, name: str, batch: int, dtype: str, clock: str, *work: int) -> None:
        flops, nbytes = work
        roof = 1e6 * max(flops / ROOFS[dtype], nbytes / ROOFS["copy"])
        for who, factor in factors.items():
            us = 2.0 + roof / (factor * draw.uniform(0.8, 1.3)) + (5 if clock == "host" else 0)
            made = row(
                *(section, name, batch, who, us),
                network=name if section == "model" else "alexnet",
                dtype=dtype,
                clock=clock,
                flops=flops,
                bytes=nbytes,
                max_error=2e-4 * draw.uniform(0.5, 2),
                roof_us=roof,
                straw_man=who == "torch NCHW",
                p80_us=us * draw.uniform(1.005, 1.07),
            )
            if who == "cudnn frontend":  # as where it cannot be installed
                made = replace(made, median_us=None, p20_us=None, p80_us=None, runs=0)
                made = replace(made, max_error=None, rms_error=None, note=ABSENT)
            if (who, name, batch) == ("torch.compile", "conv2", 64):
                made = replace(made, max_error=0.3, note="does not match: error 0.3")
            rows.append(made)

    for dtype in dtypes:
        planner = Planner(network("alexnet"), ARITHMETIC[dtype], 90)
        for batch, clock in product(BATCHES, ("cold", "graph")):
            made = problems(planner, dtype, batch)
            for problem in made:
                counted = problem.work
                rival("layers", problem.name, batch, dtype, clock, counted.flops, counted.bytes)
            total = [sum(getattr(p.work, kind) for p in made) for kind in ("flops", "bytes")]
            rival("model", "alexnet", batch, dtype, clock, *total)
            rival("model", "alexnet uint8", batch, dtype, clock, *total)
    notes = ("made up by a test; clocks <not> locked",)
    return Results(dict(ENVIRONMENT), ROOFS, tuple(rows), tuple(cache(draw)), notes)


def cache(
    draw: random.Random, layers: tuple[str, ...] = ("conv2", "conv4")
) -> list[dict[str, Any]]:
    """Lines of searches: a valley with noise, and every way to fail."""
    lines = []
    for layer in layers:
        space = product((64, 128, 256), (64, 128, 192, 256), (32, 64, 128), (4, 8), (2, 3, 4))
        for m, n, k, warps, stages in space:
            shared = 2 * (m + n) * k * stages
            us = 90 * (1 + abs(math.log2(m / 128)) / 3 + abs(math.log2(n / 192)) / 4)
            us *= draw.uniform(1, 1.2) * (1.3 if warps == 4 and m == 256 else 1)
            status, reason = "ok", ""
            if shared > 232_448:
                status, reason = "refused", f"shared memory {shared} over the limit 232448"
            elif draw.random() < 0.03:
                status, reason = "wrong", "max error 0.2 over 2e-3"
            elif draw.random() < 0.02:
                status, reason = "failed", "PTXAS <crashed> & burned"
            elif draw.random() < 0.01:
                status, reason = "timeout", "over 30 s"
            good = status == "ok"
            config = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps}
            lines.append(
                {
                    "device": "Synthetic",
                    "triton": "3.6.0",
                    "source": "abc",
                    "network": "alexnet",
                    "layer": layer,
                    "batch": 256,
                    "dtype": "fp16",
                    "config": {**config, "num_stages": stages, "descriptors": True},
                    "status": status,
                    "reason": reason,
                    "median_us": us if good else None,
                    "p20_us": us * 0.99 if good else None,
                    "p80_us": us * 1.01 if good else None,
                    "max_error": 3e-4 if good else None,
                    "registers": min(255, 40 + m * n // (32 * warps * 4)) if good else None,
                    "shared": shared,
                    "date": "2026-01-02",
                }
            )
    return lines


@pytest.fixture(scope="module")
def results() -> Results:
    return synthetic()


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


class Structure(HTMLParser):
    """Ids, links, texts of headings, and whatever a browser would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.open.append(tag)
        self.ids += [str(given["id"])] if "id" in given else []
        for name in ("aria-labelledby", "aria-controls"):
            self.refers += [str(given[name])] if name in given else []
        if "href" in given:
            (self.refers if str(given["href"]).startswith("#") else self.fetched).append(
                str(given["href"]).removeprefix("#")
            )
        self.fetched += [str(given[name]) for name in ("src", "srcset", "data") if name in given]

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data.strip())


def packed_views(html: str) -> list[dict[str, Any]]:
    found = re.findall(r'class="packed">([^<]*)<', html)
    return [json.loads(gzip.decompress(base64.b64decode(text))) for text in found]


def drawings(html: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]


def test_the_page_fetches_nothing_and_is_short(report: str) -> None:
    seen = Structure(report)
    assert seen.fetched == []
    assert "@import" not in report
    assert "url(" not in report
    assert "default-src 'none'" in report
    assert len(report.encode()) < 300_000
    assert len(set(seen.ids)) == len(seen.ids)
    assert set(seen.refers) <= set(seen.ids)


def test_panels_stand_in_order(report: str) -> None:
    order = re.findall(r'<section id="(\w+)"', report)
    wanted = ["verdict", "layers", "roofline", "batches", "tuning", "errors", "environment"]
    assert order == wanted
    assert 'class="none"' not in report


def test_a_long_run_still_makes_a_short_page() -> None:
    many = synthetic(("fp16", "bf16"), seed=1)
    layers = ("conv1", "conv2", "conv3", "conv4", "conv5")
    searched = tuple(cache(random.Random(2), layers))
    made = page(replace(many, searches=searched))
    assert len(made.encode()) < 300_000
    assert re.search(r"\d+ more: they are in the results file", made)


def test_every_drawing_is_well_formed_also_the_packed_ones(report: str) -> None:
    shown = drawings(report)
    assert len(shown) > 10
    packed = [part for store in packed_views(report) for part in store.get("parts", ())]
    assert len([svg for part in packed for svg in drawings(part)]) > 50
    for svg in shown:
        if svg.attrib.get("aria-hidden") != "true":
            assert svg.attrib["aria-label"]


def test_packed_views_are_what_the_lists_offer(report: str) -> None:
    boxes = re.findall(r"<select.*?</select></label>(<script[^>]*>[^<]*</script>)", report, re.S)
    lists = re.findall(r"<select.*?</select>", report, re.S)
    assert len(boxes) == len(lists) >= 5
    for box, options in zip(boxes, lists, strict=True):
        (store,) = packed_views(box)
        assert len(store["views"]) == options.count("<option")
        assert all(part < len(store["parts"]) for view in store["views"] for part in view)


def test_the_headline_is_the_fastest_batch_and_the_smallest(results: Results, report: str) -> None:
    model = [r for r in results.rows if r.problem == "alexnet" and r.clock == "graph"]
    ours = [r for r in model if r.contestant == OURS]
    fast = max(ours, key=lambda r: r.images_per_second or 0)
    told = summary(results)
    assert told["images_per_second"] == fast.images_per_second
    assert told["latency_us"] == next(r.median_us for r in ours if r.batch == 1)
    peers = [r for r in model if r.batch == fast.batch and not r.straw_man and r not in ours]
    best = min(r.median_us for r in peers if r.median_us and r.matched)
    ratio = best / (fast.median_us or 0)
    assert f"<dd>{ratio:.3g}" in report


def test_names_from_outside_are_escaped(report: str) -> None:
    assert "Synthetic &lt;H200&gt; &amp; more" in report
    assert "<H200>" not in report
    assert "clocks &lt;not&gt; locked" in report
    parts = [part for store in packed_views(report) for part in store.get("parts", ())]
    assert not any("<crashed>" in part for part in parts)
    assert any("&lt;crashed&gt;" in part for part in parts)


def test_what_is_not_right_has_no_speed(results: Results) -> None:
    wrong = next(r for r in results.rows if r.max_error == 0.3 and r.clock == "graph")
    assert wrong.median_us is not None
    alone = replace(results, searches=(), notes=())
    made = page(alone)
    parts = [part for store in packed_views(made) for part in store.get("parts", ())]
    (table,) = (part for part in parts if "conv2 of alexnet, every contestant" in part)
    lines = [line for line in table.split("<tr") if "torch.compile" in line and "<td>64" in line]
    assert len(lines) == 2
    assert all("not shown" in line and " µs" not in line for line in lines)
    assert "torch.compile was not timed or did not match in 2 rows" in made


def test_warnings_are_in_words(results: Results) -> None:
    told = " ".join(story.warnings(results))
    assert "Files differed from commit 0123456789ab" in told
    assert "cudnn frontend was not timed" in told
    assert "needs the package nvidia-cudnn-frontend" in told
    assert "p80 - p20 is" in told
    assert story.NO_GPU not in told
    ours = next(r for r in results.rows if r.contestant == OURS)
    wrong = replace(ours, max_error=1.0)
    spoilt = replace(results, rows=(wrong, *results.rows))
    assert story.match_verdict(results)[0] is True
    matched, words = story.match_verdict(spoilt)
    assert matched is False
    assert f"{wrong.problem} at batch {wrong.batch}" in words


def test_where_a_peer_is_faster_is_told() -> None:
    slow = interpreted()
    rows = tuple(
        replace(r, median_us=r.median_us / 2) if r.median_us and r.contestant != OURS else r
        for r in slow.rows
    )
    told = " ".join(story.warnings(replace(slow, rows=rows)))
    assert "Slower than the best peer, digits, fp32, host clock" in told
    assert "conv1 at batch 1 (0.500x)" in told
    assert "Slower" not in " ".join(story.warnings(slow))


def test_goals_are_judged_only_with_a_gpu(report: str) -> None:
    assert re.search(r'class="(good|bad|unknown)">(Met|Missed|Not known): images/s', report)
    assert "Missed" not in page(interpreted())


def test_interpreter_times_say_that_they_are(report: str) -> None:
    made = page(interpreted())
    assert story.NO_GPU.replace("'", "&#x27;") in made
    assert "stored results" in made
    assert story.NO_GPU.replace("'", "&#x27;") not in report
    for missing in (
        "alexnet-triton-bench model --json FILE",
        "alexnet-triton-bench round --out DIR",
    ):
        assert f"<code>{missing}</code>" in made


def test_a_page_of_nothing_says_what_would_fill_it() -> None:
    made = page(Results({}, {}, ()))
    assert made.count('class="none"') == 7
    assert "<svg" not in made
    assert "nothing of ours was checked" in text(Results({}, {}, ()))


def test_raw_results_are_in_the_page() -> None:
    found = interpreted()
    raw = packed_views(page(found))[-1]
    assert raw["schema"] == 1
    assert len(raw["rows"]) == len(found.rows)
    assert raw["rows"][0]["median_us"] == 21_000.0


def test_layers_that_overlap_are_counted_once() -> None:
    rows = [
        row("layers", name, 1, OURS, 10.0)
        for name in ("conv1", "conv2", "conv1+pool1", "conv5+pool5")
    ]
    assert [r.problem for r in story.apart(rows)] == ["conv1", "conv2", "conv5+pool5"]


def test_text_has_verdict_and_blocks(results: Results) -> None:
    said = text(results)
    assert "stored results: Synthetic <H200> & more, 2026-01-02, commit 0123456789ab+" in said
    assert re.search(r"^images per second +[\d,]+ +batch \d+", said, re.M)
    assert re.search(r"^conv2 +[\d.]+ [mµ]s +\d+ % +█+ +\d+ % of roof +[\d.]+x ", said, re.M)
    shares = [float(s) for s in re.findall(r"[mµ]s +([\d.]+) % ", said)]
    assert sum(shares) == pytest.approx(100, abs=2)


# --- searches --------------------------------------------------------------------------------


def test_search_page_shows_the_best_over_the_rest() -> None:
    lines = cache(random.Random(3), ("conv4",))
    made = search_page(lines, "BLOCK_M", "BLOCK_N")
    assert "BLOCK_M by BLOCK_N" in made
    (search,) = searches(lines)
    best = min(
        line["median_us"]
        for line in lines
        if line["status"] == "ok"
        and line["config"]["BLOCK_M"] == 128
        and line["config"]["BLOCK_N"] == 192
    )
    assert f"BLOCK_M=128, BLOCK_N=192: {best:.3g} µs with" in made
    assert search.right[0]["median_us"] == min(at["median_us"] or 1e9 for at in lines)
    assert set(search.parameters) == {"BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"}
    assert 'class="mark cross s-lost"' in made


def test_failures_are_counted_by_reason_without_their_numbers() -> None:
    lines = cache(random.Random(3), ("conv4",))
    (search,) = searches(lines)
    assert sum(search.failures.values()) == sum(line["status"] != "ok" for line in lines)
    refused = [(key, n) for key, n in search.failures.items() if key[0] == "refused"]
    assert len(refused) == 1
    assert refused[0][1] == sum(line["status"] == "refused" for line in lines)


def test_a_search_of_failures_alone_can_be_shown() -> None:
    lines = [line for line in cache(random.Random(3), ("conv4",)) if line["status"] != "ok"]
    assert "all" in search_page(lines)
    assert ET.fromstring(search_svg(lines)) is not None


def test_an_interpreted_search_has_no_picture_of_registers() -> None:
    lines = [{**line, "registers": None} for line in cache(random.Random(3), ("conv4",))]
    assert "registers a thread" not in search_page(lines) + search_svg(lines)


def test_search_svg_is_one_file() -> None:
    lines = cache(random.Random(3), ("conv4",))
    root = ET.fromstring(search_svg(lines, "num_warps", "num_stages"))
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"num_warps", "num_stages", "registers a thread", "refused"} <= set(words)


def test_an_unknown_parameter_is_one_line() -> None:
    lines = cache(random.Random(3), ("conv4",))
    with pytest.raises(RecordError, match=r"no parameter 'BLOCK_Q' in conv4.*BLOCK_M, BLOCK_N"):
        search_page(lines, "BLOCK_Q", "BLOCK_N")
    with pytest.raises(RecordError, match="nothing to draw"):
        search_svg([])


# --- the verb and README ---------------------------------------------------------------------


def test_the_verb_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], results: Results
) -> None:
    stored, out = tmp_path / "results.json", tmp_path / "report.html"
    save(results, stored)
    assert main(["report", str(stored), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["report", str(stored), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["matched"] is True
    assert told["figures"][0]["what"] == "images per second"
    assert main(["report", str(stored), "--text"]) == 0
    assert "time by layer" in capsys.readouterr().out


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "results.json"
    assert main(["report", str(stored)]) == 1
    assert "results.json: No such file" in capsys.readouterr().err
    save(interpreted(), stored)
    readme = tmp_path / "README.md"
    readme.write_text("# no marks\n")
    assert main(["report", str(stored), "--readme", str(readme)]) == 1
    assert "no `<!-- results:begin results.json -->` in it" in capsys.readouterr().err
    assert main(["report", str(stored), "-o", str(tmp_path / "nowhere" / "x.html")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_readme_is_rewritten_between_its_marks(tmp_path: Path, results: Results) -> None:
    (tmp_path / "bench").mkdir()
    stored, readme = tmp_path / "bench" / "r.json", tmp_path / "README.md"
    save(results, stored)
    before = "# Name\n\n<!-- results:begin bench/r.json -->\nold\n<!-- results:end -->\n\nafter\n"
    other = "<!-- results:begin bench/other.json -->\nkept\n<!-- results:end -->\n"
    readme.write_text(before + other)
    assert main(["report", str(stored), "--readme", str(readme)]) == 0
    after = readme.read_text()
    assert "old" not in after
    assert after.startswith("# Name\n\n<!-- results:begin")
    assert after.endswith("\n\nafter\n" + other)
    assert marked(readme)[stored] == markdown(load(stored))
    rewrite(readme, stored)
    assert readme.read_text() == after


def test_the_table_tells_origin_and_ratios(results: Results) -> None:
    made = markdown(results)
    lines = [line for line in made.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(BATCHES) + 2 + 11
    assert len({line.count("|") for line in lines[: 2 + len(BATCHES)]}) == 1
    assert made.rstrip().endswith(
        "Stored results: Synthetic <H200> & more, 2026-01-02, commit 0123456789ab+."
    )
    assert "say nothing of a GPU" in markdown(interpreted())
    assert "Nothing was right and timed" in markdown(Results({}, {}, ()))


def test_readme_shows_what_is_stored() -> None:
    for stored, table in marked(ROOT / "README.md").items():
        assert table == markdown(load(stored)), f"bench report {stored} --readme README.md"
