"""A model that is not in the list: typed as a Hub id or a folder, on a page of one's own."""

import html
from functools import partial
from typing import Any

import gradio as gr

from llava_app.errors import UserError
from llava_app.ui.display import choices
from llava_app.ui.models import Models

EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}


def other_model(models: Models, model: gr.Dropdown) -> None:
    """Lay the box out, and choose in the list of models what is typed into it."""
    box = gr.Textbox(
        label="Another model",
        info="a Hub id (OWNER/NAME) or a folder of this machine, then Enter",
        elem_id="other-model",
        max_length=300,
    )
    box.submit(partial(add, models), box, [model, box], **EVENT)


def add(models: Models, name: str) -> tuple[Any, Any]:
    """The list with the model that was typed, chosen, and an empty box; both as they are where there is no such one."""
    try:
        key = models.add(name.strip())
    except UserError as error:
        gr.Warning(html.escape(str(error)), duration=20)
        return gr.skip(), gr.skip()
    return gr.update(choices=choices(models.cards()), value=key), ""
