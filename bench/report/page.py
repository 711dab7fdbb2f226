"""The parts a report is put together from: sections, tables, legends, and views one can switch.

What is not shown at first is kept compressed (gzip, base64) in the page, and a few lines of
JavaScript bring it out when it is chosen. Without JavaScript the first views and all tables behind
the charts are there.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from ..records import OURS
from .svg import mark

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What a browser may fetch: nothing."""


ELSEWHERE = "they are in the results file, and would make this page too long."
"""What is said of views for which there is no room."""


def document(title: str, *body: str) -> str:
    """A whole page that fetches nothing."""
    here = files(__package__)
    style = "".join(here.joinpath(name).read_text("utf-8") for name in ("charts.css", "page.css"))
    script = here.joinpath("page.js").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *body: str) -> str:
    """A panel under its heading."""
    inside = "\n".join(body)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(title)}</h2>\n{inside}\n</section>'
    )


def paragraph(words: str, class_: str = "") -> str:
    """A line of text, escaped."""
    kind = f' class="{class_}"' if class_ else ""
    return f"<p{kind}>{escape(words)}</p>"


def missing(words: str, command: str) -> str:
    """What a panel without data says: what is not there, and what would bring it."""
    return f'<p class="none">{escape(words)} <code>{escape(command)}</code></p>'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table; the first `words` columns are text at the left, the others numbers at the right.

    A row that has our name among its words stands out.
    """
    top = "".join(f'<th scope="col">{escape(name)}' for name in head)
    lines = []
    for row in rows:
        first, *rest = (escape(cell) for cell in row)
        ours = ' class="ours"' if OURS in row[:words] else ""
        lines.append(f'<tr{ours}><th scope="row">{first}' + "".join(f"<td>{cell}" for cell in rest))
    inside = "\n".join(lines)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="w{words}"><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{top}</thead>\n<tbody>\n{inside}\n</tbody></table></div>"
    )


def details(summary: str, *body: str) -> str:
    """Something folded away."""
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(body) + "\n</details>"


def legend(contestants: Iterable[str], styles: Mapping[str, int | str]) -> str:
    """Contestants with their markers."""
    lines = "".join(
        f'<li><svg class="chart" viewBox="-8 -8 16 16" aria-hidden="true">'
        f"{mark(styles[name], 0, 0, name)}</svg>{escape(name)}</li>"
        for name in contestants
    )
    return f'<ul class="legend">{lines}</ul>'


def packed(text: str) -> str:
    """Text as base64 of gzip, the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def hidden(text: str) -> str:
    """Packed text where the script finds it; base64 has no character that could end the element."""
    return f'<script type="text/plain" class="packed">{packed(text)}</script>'


def switch(
    name: str, label: str, views: Mapping[str, Sequence[str]], limit: float, rest: str = ELSEWHERE
) -> str:
    """Several views of which one shows, the first at first; a list chooses.

    A view is its parts, and parts that views share are packed once. Views at the end are left out
    until the others fit in `limit` bytes; `rest` then says where they are.
    """
    names = list(views)
    store = _store([views[key] for key in names])
    while len(store) > limit and len(names) > 1:
        names = names[: max(1, min(len(names) - 1, int(len(names) * limit / len(store))))]
        store = _store([views[key] for key in names])
    options = "".join(f'<option value="{i}">{escape(key)}</option>' for i, key in enumerate(names))
    chooser = (
        f'<label class="chooser">{escape(label)} '
        f'<select autocomplete="off" aria-controls="{name}-view">{options}</select></label>{store}'
        if len(names) > 1
        else ""
    )
    left_out = len(views) - len(names)
    more = paragraph(f"{left_out} more: {rest}", "note") if left_out else ""
    return (
        f'<div class="switch" id="{name}-switch">{chooser}'
        f'<div class="view" id="{name}-view" aria-live="polite">{"".join(views[names[0]])}</div>'
        f"{more}</div>"
    )


def _store(views: Sequence[Sequence[str]]) -> str:
    """Views as lists of places among the parts, packed."""
    parts: dict[str, int] = {}
    places = [[parts.setdefault(part, len(parts)) for part in view] for view in views]
    return hidden(json.dumps({"parts": list(parts), "views": places}))


def either(wide: str, narrow: str) -> str:
    """Two drawings of the same, for a desk and for a hand."""
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def pair(*parts: str) -> str:
    """Things side by side where there is room."""
    return '<div class="pair">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def figure(caption: str, drawing: str) -> str:
    """A drawing with its words above."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"
