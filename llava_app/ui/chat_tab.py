"""The chat: its components, and which event calls which handler."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from llava_app.feedback import Feedback
from llava_app.ui import settings
from llava_app.ui.asked import Tab
from llava_app.ui.conversations import Conversations
from llava_app.ui.display import Talk, choices, status
from llava_app.ui.examples import gallery
from llava_app.ui.handlers import MAX_CHARACTERS, Handlers
from llava_app.ui.models import Models
from llava_app.ui.picker import Picker
from llava_app.ui.side_panel import connect_panel, side_panel
from llava_app.ui.verdicts import Verdicts
from llava_app.ui.viewer import Viewer

HERE = Path(__file__).parent
REFRESH = 5  # s between two looks at the model list, so that a finished training run appears by itself
INVITATION = "## Drop a meme here. Ask what the joke is.\nOr start with one of these."
QUICK = ("Explain the joke.", "Describe the picture.", "What does the text say?")
# Nothing here is an endpoint for others, and no component greys out while an answer comes.
EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
KEPT = (
    "<p class='kept'>👍, 👎 and Correct keep the conversation up to that answer, with its pictures, on this server in "
    "<code>runs/feedback</code>. A model can be trained on what was liked and corrected.</p>"
)
EDITOR = """
<dialog class="sheet" aria-labelledby="editor-title">
  <form method="dialog">
    <h2 id="editor-title"></h2>
    <textarea rows="4"></textarea>
    <menu><button value="cancel" formnovalidate>Cancel</button><button value="save" class="main">Save</button></menu>
  </form>
</dialog>
"""
CAMERA = """
<dialog class="sheet" aria-label="Camera">
  <h2>Take a picture</h2>
  <video autoplay muted playsinline></video>
  <p role="status"></p>
  <menu><button data-do="close">Cancel</button><button data-do="take" class="main" disabled>Take it</button></menu>
</dialog>
"""


def model_list(models: Models) -> tuple[gr.Dropdown, gr.Button]:
    """The list of models, which is filled anew for each tab and whenever it changes, and the way to all about them."""
    listing = gr.Dropdown(
        choices=choices(models.cards()),
        value=None,
        label="Model",
        elem_id="model",
        filterable=False,
        interactive=True,
    )
    return listing, gr.Button("All models", size="sm", elem_id="all-models")


def chat(
    handlers: Handlers, page: gr.Blocks, model: gr.Dropdown, every: gr.Button, feedback: Feedback | None
) -> gr.Accordion:
    """Lay the chat out below what is on `page`, and connect it and the model list; returns its drawer of settings."""
    panel = side_panel()
    line = gr.HTML(status("Starting …", state="loading"), elem_id="status")
    window = _conversation(handlers, votes=feedback is not None)
    with gr.Row(elem_id="quick"):
        quick = [gr.Button(question.rstrip("."), size="sm") for question in QUICK]
        gr.Button("Camera", size="sm", elem_id="camera-open")
    gr.HTML("", html_template=CAMERA, js_on_load=_script("camera.js"), elem_id="camera")
    box = _box()
    with gr.Column(elem_id="below"):
        with gr.Accordion("Settings", open=False, elem_id="settings") as drawer:
            controls = settings.controls(handlers.limits.new_tokens)
            reset = gr.Button("Reset to defaults", size="sm", elem_id="reset")
            context = gr.HTML(elem_id="context", padding=False)
            engine = gr.HTML(elem_id="engine", padding=False)
            gr.HTML(KEPT if feedback else "", elem_id="kept", padding=False)
        gr.Button("Copy all", size="sm", elem_id="copy-all")
        clear = gr.Button("New chat", size="sm", elem_id="clear")
    bridge = gr.HTML("", html_template=EDITOR, js_on_load=_script("bridge.js"), elem_id="bridge")
    sheet = gr.HTML("", js_on_load=_script("viewer.js"), elem_id="viewer")
    tab, talk = gr.State(Tab()), gr.State(Talk())
    settled = _connect_answers(handlers, window, box, bridge=bridge, quick=quick, inputs=[tab, talk, model, *controls])
    verdicts = Verdicts(handlers.models, feedback, handlers.gate)
    votes = _connect_votes(verdicts, bridge, outputs=[talk, window], model=model)
    conversations = Conversations(handlers.live, handlers.gate)
    changes = [*settled, *votes]
    connect_panel(
        conversations, page, panel, tab=tab, talk=talk, window=window, clear=clear, changes=changes, how=EVENT
    )
    viewer = Viewer(handlers.models)
    what = [talk, model, controls[-1]]
    bridge.select(viewer.show, what, sheet, **EVENT)
    sheet.input(viewer.part, [box, talk], box, **EVENT)
    drawer.expand(viewer.measure, what, context, **EVENT)
    _connect_models(
        Picker(handlers.models, handlers.gate), page, model, every=every, sheet=sheet, line=line, engine=engine
    )
    page.load(handlers.begun, None, box, **EVENT)
    model.change(handlers.offer, model, window, **EVENT)
    settings.connect(page, controls, reset)
    return drawer


def _script(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _conversation(handlers: Handlers, *, votes: bool) -> gr.Chatbot:
    return gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="conversation",
        elem_classes=[] if votes else ["no-votes"],
        layout="bubble",
        height="100%",
        placeholder=INVITATION,
        examples=gallery(handlers.examples),
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


def _connect_answers(
    handlers: Handlers,
    window: gr.Chatbot,
    box: gr.MultimodalTextbox,
    *,
    bridge: gr.HTML,
    quick: Sequence[gr.Button],
    inputs: list[Any],
) -> list[Dependency]:
    """The events of an answer, from the question to the settled page, and Stop; what follows them can note the change.

    An answer is three events: ask, stream with the Chatbot alone, settle.
    """
    tab, talk, *_ = inputs
    outputs = [talk, window, box]
    asked = [
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
    always = EVENT | {"trigger_mode": "multiple"}  # also while the last one of its kind is still ending
    streamed = [event.then(handlers.stream, [tab, talk], window, **always) for event in asked]
    one_by_one = always | {"concurrency_limit": 1}  # every click counts, in its turn
    undone = window.undo(handlers.undo, [tab, talk], outputs, **one_by_one)
    box.stop(handlers.stop, tab, None, **EVENT)
    bridge.pause(handlers.slow, tab, None, **EVENT)
    return [event.then(handlers.settle, [tab, talk], outputs, **always) for event in [*streamed, undone]]


def _connect_votes(votes: Verdicts, bridge: gr.HTML, *, outputs: list[Any], model: gr.Dropdown) -> list[Dependency]:
    return [
        bridge.like(votes.vote, [outputs[0], model], outputs, **EVENT),
        bridge.submit(votes.correct, [outputs[0], model], outputs, **EVENT),
    ]


def _connect_models(
    picker: Picker,
    page: gr.Blocks,
    model: gr.Dropdown,
    *,
    every: gr.Button,
    sheet: gr.HTML,
    line: gr.HTML,
    engine: gr.HTML,
) -> None:
    listed = gr.State([])
    page.load(picker.greet, None, [model, line], **EVENT)
    model.change(picker.choose, model, line, **EVENT)
    every.click(picker.table, None, sheet, **EVENT)
    sheet.select(picker.use, None, model, **EVENT)
    clock = gr.Timer(REFRESH)
    clock.tick(picker.refresh, [listed, model], [listed, model, line], **EVENT)
    clock.tick(picker.watch, model, engine, **EVENT)
