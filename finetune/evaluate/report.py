"""What a suite found, for people: Markdown, and one HTML page that needs no other file."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import Any

from finetune.evaluate.plots import FEWEST_SPOKES, bars, radar, spokes
from finetune.evaluate.published import PUBLISHED
from finetune.evaluate.results import Result, Scores
from llava_app.errors import ImageError
from llava_app.images import Picture

EXAMPLES = 6  # best ones, and as many worst ones
LISTED = 20  # a suite of so few results is listed whole
THUMBNAIL = 224  # pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #26222f; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .6rem 0 1.4rem }
td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; vertical-align: top }
.examples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
figure { margin: 0; padding: .8rem; border: 1px solid #ddd; border-radius: .5rem }
img, svg { max-width: 100% }
figcaption { font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere }
.missing { color: #a02030 }
"""


def headline(found: Scores) -> str:
    """The score in one sentence, and what it is not made of."""
    if found.score is None:
        text = f"{found.suite}: no score, because nothing could be marked"
    else:
        between = f" (95 % interval {found.interval[0]:.1f} to {found.interval[1]:.1f})" if found.interval else ""
        text = f"{found.suite}: {found.score:.1f} % {found.measure}{between}, {found.count} questions"
    return text + "".join(f"; {count} missing: {why}" for why, count in found.missing.items())


def markdown(found: Scores, results: Sequence[Result]) -> str:
    """Tables; a small suite is listed whole."""
    parts = [f"# {found.model}: {found.suite}", headline(found), _by_category(found, markdown_table)]
    parts += [f"## {title}\n\n{markdown_table([('', ''), *_cells(table)])}" for title, table in found.tables.items()]
    if len(results) <= LISTED:
        rows = [(r.question.text, " or ".join(r.question.right), r.answer, _mark(r)) for r in results]
        parts.append("## Every answer\n\n" + markdown_table([("question", "right", "answer", "mark"), *rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


def page(found: Scores, results: Sequence[Result]) -> str:
    """The report as HTML with its plots and pictures inside."""
    missing = "".join(f"<li>{count} missing: {escape(why)}</li>" for why, count in found.missing.items())
    tables = [f"<h2>{escape(title)}</h2>{html_table(_cells(table))}" for title, table in found.tables.items()]
    body = [
        f"<h1>{escape(found.model)}: {escape(found.suite)}</h1><p>{escape(headline(found))}</p>",
        f'<ul class="missing">{missing}</ul>' * bool(missing),
        _by_category(found, html_table),
        _plots(found),
        *tables,
        _examples(results),
    ]
    return document(f"{found.model}: {found.suite}", "\n".join(body))


def document(title: str, body: str) -> str:
    """A whole HTML document that loads nothing."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{body}</body></html>\n"


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def html_table(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["".join(f"<td>{escape(shown(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def shown(value: Any) -> str:
    """A cell: a number with one place, a dash where there is none."""
    if isinstance(value, float):
        return f"{value:.1f}"
    return "–" if value is None else str(value)


def _by_category(found: Scores, table: Any) -> str:
    if len(found.by_category) < 2:
        return ""
    return table([("category", "%"), *found.by_category.items()])


def _plots(found: Scores) -> str:
    parts = []
    by_model = {found.model: found.by_category}
    if len(spokes(by_model)) >= FEWEST_SPOKES:
        parts.append(radar(f"{found.suite} by category, %", by_model))
    published = PUBLISHED.get(found.suite, ())
    if published and found.score is not None:
        rows = [(found.model, found.score, found.interval, True)]
        rows += [(other.model, other.score, None, False) for other in published]
        sources = html_table([(other.model, other.score, other.source) for other in published])
        parts.append(bars(f"{found.suite}, % {found.measure}", rows) + f"<p>Published elsewhere:</p>{sources}")
    return "".join(parts)


def _examples(results: Sequence[Result]) -> str:
    counted = sorted((r for r in results if r.points is not None), key=_share)
    worst = [r for r in counted if _share(r) < 1][:EXAMPLES]
    best = [r for r in counted[::-1] if r not in worst][:EXAMPLES]
    parts = []
    for title, some in (("Worst answers", worst), ("Best answers", best)):
        if some:
            parts.append(f"<h2>{title}</h2><div class=examples>{''.join(map(_example, some))}</div>")
    return "".join(parts)


def _example(result: Result) -> str:
    right = " or ".join(result.question.right)
    lines = [result.question.text, f"Right: {right}" * bool(right), f"Said: {result.answer}", _mark(result)]
    caption = "\n".join(line for line in lines if line)
    return f"<figure>{_thumbnails(result)}<figcaption>{escape(caption)}</figcaption></figure>"


def _thumbnails(result: Result) -> str:
    try:
        return "".join(map(_thumbnail, result.question.pictures()))
    except ImageError:
        return "<p>(its picture is gone)</p>"


def _thumbnail(picture: Picture) -> str:
    image = picture.image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    image.save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}">'


def _mark(result: Result) -> str:
    if result.points is None:
        return f"missing: {result.why}"
    return f"{result.points:g} of {result.out_of:g}" + f". {result.why}" * bool(result.why)


def _share(result: Result) -> float:
    return (result.points or 0.0) / result.out_of if result.out_of else 0.0


def _cells(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(table.items())


def _markdown_cell(cell: Any) -> str:
    return shown(cell).replace("|", "\\|").replace("\n", "<br>")
