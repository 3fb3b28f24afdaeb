"""The chat: its components, and which event calls which handler."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from llava_app.ui import settings
from llava_app.ui.display import Talk, choices, status
from llava_app.ui.handlers import MAX_CHARACTERS, Handlers

HERE = Path(__file__).parent
REFRESH = 5  # s between two looks at the model list, so that a finished training run appears by itself
INVITATION = "## Drop a meme here and ask what the joke is\nor start with one of these"
QUICK = ("Explain the joke.", "Describe the picture.", "What does the text say?")
# Nothing here is an endpoint for others, and no component greys out while an answer comes.
EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
EDITOR = """
<dialog class="sheet" aria-labelledby="editor-title">
  <form method="dialog">
    <h2 id="editor-title"></h2>
    <textarea rows="4"></textarea>
    <menu><button value="cancel" formnovalidate>Cancel</button><button value="save" class="main">Save</button></menu>
  </form>
</dialog>
"""


def model_list(handlers: Handlers) -> gr.Dropdown:
    """The list of models; it is filled anew for each tab and whenever it changes."""
    return gr.Dropdown(
        choices=choices(handlers.models.cards()),
        value=None,
        label="Model",
        elem_id="model",
        filterable=False,
        interactive=True,
    )


def chat(handlers: Handlers, page: gr.Blocks, model: gr.Dropdown) -> None:
    """Lay the chat out below what is on `page`, and connect it and the model list."""
    line = gr.HTML(status("Starting …", state="loading"), elem_id="status")
    window = _conversation(handlers)
    with gr.Row(elem_id="quick"):
        quick = [gr.Button(question.rstrip("."), size="sm") for question in QUICK]
    box = _box()
    with gr.Column(elem_id="below"):
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            controls = settings.controls()
            reset = gr.Button("Reset to defaults", size="sm", elem_id="reset")
            engine = gr.HTML(elem_id="engine", padding=False)
        clear = gr.Button("New chat", size="sm", elem_id="clear")
    bridge = gr.HTML("", html_template=EDITOR, js_on_load=(HERE / "bridge.js").read_text("utf-8"), elem_id="bridge")
    talk = gr.State(Talk())
    inputs = [talk, model, *controls]
    _connect_chat(handlers, window, box, bridge=bridge, quick=quick, clear=clear, inputs=inputs)
    _connect_models(handlers, page, model, line=line, engine=engine)
    settings.connect(page, controls, reset)


def _conversation(handlers: Handlers) -> gr.Chatbot:
    return gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="conversation",
        layout="bubble",
        height="100%",
        placeholder=INVITATION,
        examples=[
            {"text": example.question, "icon": str(example.image), "files": [str(example.image)]}
            for example in handlers.examples
        ],
        allow_tags=False,
        sanitize_html=True,
        latex_delimiters=[],
        group_consecutive_messages=True,
        buttons=[],
    )


def _box() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        label="Your question",
        show_label=False,
        elem_id="box",
        placeholder="Ask about a picture …",
        file_count="multiple",
        max_plain_text_length=MAX_CHARACTERS,
        html_attributes=gr.InputHTMLAttributes(enterkeyhint="send"),
    )


def _connect_chat(
    handlers: Handlers,
    window: gr.Chatbot,
    box: gr.MultimodalTextbox,
    *,
    bridge: gr.HTML,
    quick: Sequence[gr.Button],
    clear: gr.Button,
    inputs: list[Any],
) -> None:
    talk = inputs[0]
    outputs = [talk, window, box]
    answers = [
        box.submit(handlers.send, [box, *inputs], outputs, **EVENT),
        window.example_select(handlers.example, inputs, outputs, **EVENT),
        window.retry(handlers.retry, inputs, outputs, **EVENT),
        window.option_select(handlers.resume, inputs, outputs, **EVENT),
        bridge.edit(handlers.edit, inputs, outputs, **EVENT),
        *(
            button.click(partial(handlers.quick, question), [box, *inputs], outputs, **EVENT)
            for button, question in zip(quick, QUICK, strict=True)
        ),
    ]
    box.stop(None, cancels=answers, **EVENT)
    one_by_one = EVENT | {"concurrency_limit": 1, "trigger_mode": "multiple"}  # every click counts, in its turn
    ends = [
        window.undo(handlers.undo, talk, outputs, cancels=answers, **one_by_one),
        clear.click(handlers.clear, None, outputs, cancels=answers, **EVENT),
    ]
    for event in [*answers, *ends]:
        event.then(handlers.settle, talk, [window, box], **EVENT)


def _connect_models(handlers: Handlers, page: gr.Blocks, model: gr.Dropdown, *, line: gr.HTML, engine: gr.HTML) -> None:
    listed = gr.State([])
    page.load(handlers.greet, None, [model, line], **EVENT)
    model.change(handlers.choose, model, line, **EVENT)
    clock = gr.Timer(REFRESH)
    clock.tick(handlers.refresh, [listed, model], [listed, model], **EVENT)
    clock.tick(handlers.watch, model, engine, **EVENT)
