"""The context lens: how much of a context one picture takes in each family, and where a model's parameters are."""

import html
from typing import Any

import gradio as gr

from llava_app.errors import UserError
from llava_app.lens import Economy, Share, economy, families, shares, size_of
from llava_app.ui.display import status
from llava_app.ui.models import Models

EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}
STYLE = """<style>
.lens { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
.lens th, .lens td { padding: 4px 8px; text-align: left; border-bottom: 1px solid var(--border-color-primary) }
.lens .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden }
.lens .bar span { display: block; height: 100%; background: var(--color-accent) }
</style>"""


def lens(models: Models, page: gr.Blocks) -> None:
    """Lay the lens out, closed, and connect it."""
    with gr.Accordion("Context lens: what a picture takes, where the parameters are", open=False, elem_id="lens"):
        gr.HTML(STYLE, padding=False)
        with gr.Row():
            size = gr.Textbox("1344x672", label="Size of the picture", info="WIDTHxHEIGHT", elem_id="lens-size")
            model = gr.Dropdown([], label="Model", elem_id="lens-model", filterable=False)
            show = gr.Button("Show", elem_id="lens-show")
        chart, parts = gr.HTML(elem_id="lens-chart", padding=False), gr.HTML(elem_id="lens-parts", padding=False)
    show.click(share_chart, size, chart, **EVENT)
    show.click(lambda key: parts_table(models, key), model, parts, **EVENT)
    page.load(lambda: _choices(models), None, model, **EVENT)


def share_chart(size: str) -> str:
    """What a picture of this size takes of each context, a row for each family."""
    try:
        rows = [share for family in families() for share in shares(family, [size_of(size or "")])]
    except UserError as error:
        return status(str(error), state="failed")
    contexts = "".join(f"<th>of {int(context) // 1024}k</th>" for context in rows[0].share)
    head = f"<tr><th>family</th><th>tiles</th><th>tokens</th>{contexts}</tr>"
    return f"<table class='lens'>{head}{''.join(map(_share_row, rows))}</table>"


def parts_table(models: Models, key: str | None) -> str:
    """The parameters of the model's parts, and which stage trains them."""
    try:
        rows = economy(models.card(key or "").source)
    except UserError as error:
        return status(str(error), state="failed")
    stages = "".join(f"<th>{stage}</th>" for stage in rows[0].trained)
    head = f"<tr><th>part</th><th>parameters</th><th>share</th>{stages}</tr>"
    return f"<table class='lens'>{head}{''.join(map(_part_row, rows))}</table>"


def _share_row(row: Share) -> str:
    bars = "".join(
        f"<td>{taken:.1%}<div class='bar'><span style='width:{min(100.0, 100 * taken):.1f}%'></span></div></td>"
        for taken in row.share.values()
    )
    return f"<tr><td>{row.family}</td><td>{row.tiles}</td><td>{row.visual_tokens:,}</td>{bars}</tr>"


def _part_row(row: Economy) -> str:
    stages = "".join(f"<td>{'trains' if learns else 'frozen'}</td>" for learns in row.trained.values())
    return f"<tr><td>{html.escape(row.part)}</td><td>{row.parameters:,}</td><td>{row.of_all:.1%}</td>{stages}</tr>"


def _choices(models: Models) -> Any:
    cards = {key: card for key, card in models.cards().items() if card.kind != "server"}
    return gr.Dropdown(choices=[(card.name, key) for key, card in cards.items()], value=next(iter(cards)))
