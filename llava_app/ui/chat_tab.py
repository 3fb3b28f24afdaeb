"""The chat: its components, and which event calls which handler."""

from typing import Any

import gradio as gr

from llava_app.engine import Sampling
from llava_app.ui.display import Talk, choices, status
from llava_app.ui.handlers import MAX_CHARACTERS, Handlers

REFRESH = 5  # s between two looks at the model list, so that a finished training run appears by itself
INVITATION = "## Drop a meme here and ask what the joke is\nor start with one of these"
# Nothing here is an endpoint for others, and no component greys out while an answer comes.
EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}


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
    window = gr.Chatbot(
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
    box = gr.MultimodalTextbox(
        label="Your question",
        show_label=False,
        elem_id="box",
        placeholder="Ask about a picture …",
        file_count="multiple",
        max_plain_text_length=MAX_CHARACTERS,
        html_attributes=gr.InputHTMLAttributes(enterkeyhint="send"),
    )
    with gr.Column(elem_id="below"):
        settings, engine = _settings()
        clear = gr.Button("Clear", size="sm", elem_id="clear")
    talk = gr.State(Talk())
    _connect_chat(handlers, window, box, clear=clear, talk=talk, inputs=[talk, model, *settings])
    _connect_models(handlers, page, model, line=line, engine=engine)


def _settings() -> tuple[list[gr.components.Component], gr.HTML]:
    """The controls of Sampling, in the order in which the handlers take them, and a line about the engine."""
    default = Sampling()
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        controls: list[gr.components.Component] = [
            gr.Slider(
                *Sampling.TEMPERATURE,
                value=default.temperature,
                step=0.05,
                label="Temperature",
                info="0 always takes the likeliest word; higher is more varied.",
            ),
            gr.Slider(
                *Sampling.TOP_P,
                value=default.top_p,
                step=0.05,
                label="Top-p",
                info="Leaves out the unlikely words; 1 keeps them all.",
            ),
            gr.Slider(
                *Sampling.MAX_NEW_TOKENS,
                value=default.max_new_tokens,
                step=1,
                label="Longest answer",
                info="In tokens; about four letters each.",
            ),
            gr.Textbox(
                "",
                placeholder="random",
                max_length=len(str(Sampling.SEED[1])),
                label="Seed",
                info="A number that makes an answer repeatable; empty is a new one each time.",
            ),
        ]
        return controls, gr.HTML(elem_id="engine", padding=False)


def _connect_chat(
    handlers: Handlers,
    window: gr.Chatbot,
    box: gr.MultimodalTextbox,
    *,
    clear: gr.Button,
    talk: gr.State,
    inputs: list[Any],
) -> None:
    outputs = [talk, window, box]
    answers = [
        box.submit(handlers.send, [box, *inputs], outputs, **EVENT),
        window.example_select(handlers.example, inputs, outputs, **EVENT),
        window.retry(handlers.retry, inputs, outputs, **EVENT),
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
