"""The Compare tab: its components, and which event calls which handler."""

from functools import partial
from pathlib import Path

import gradio as gr

from llava_app.engine import Sampling
from llava_app.limits import Gate
from llava_app.ui.api import MAX_CHARACTERS
from llava_app.ui.chat_tab import EVENT
from llava_app.ui.compare import HIDDEN, Compare, Match
from llava_app.ui.models import Models
from llava_app.ui.votes import VERDICTS, Votes

VOTES = "compare.jsonl"  # in the folder of runs
BUTTONS = ("Left is better", "Right is better", "Equally good", "Neither")  # for VERDICTS, in their order
INVITATIONS = {
    "left": "### One question, two models\nBoth are shown the same pictures and asked the same words.",
    "right": "### Which answer is better?\nVote below. Blind hides the names until you have voted.",
}


def compare(models: Models, tab: gr.Tab, runs: Path, gate: Gate) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Lay `tab` out and connect it; its votes are kept in `runs`. Gives the lists of the two models."""
    handlers = Compare(models, Votes(runs / VOTES), gate)
    with gr.Row(elem_id="compare-models"):
        left = gr.Dropdown([], label="Left", elem_id="compare-left", filterable=False)
        right = gr.Dropdown([], label="Right", elem_id="compare-right", filterable=False)
        tuned = gr.Button("Base against tuned", elem_id="compare-tuned")
        blind = gr.Checkbox(False, label="Blind", info="Hides who is who until you vote.", elem_id="compare-blind")
    with gr.Row(elem_id="compare-windows"):
        windows = [_window(name, side) for name, side in zip(HIDDEN, ("left", "right"), strict=True)]
    line = gr.HTML("", elem_id="compare-line", padding=False)
    with gr.Row(elem_id="compare-votes"):
        votes = [gr.Button(text, size="sm") for text in BUTTONS]
    box = gr.MultimodalTextbox(
        label="Your question to both",
        show_label=False,
        elem_id="compare-box",
        placeholder="Ask both …",
        file_count="multiple",
        max_plain_text_length=MAX_CHARACTERS,
    )
    with gr.Row(elem_id="compare-settings"):
        temperature = gr.Slider(
            *Sampling.TEMPERATURE, value=Sampling().temperature, step=0.05, label="Variety (temperature)"
        )
        longest = gr.Slider(
            *Sampling.MAX_NEW_TOKENS, value=Sampling().max_new_tokens, step=1, label="Length of the answers"
        )
        clear = gr.Button("New comparison", size="sm", elem_id="compare-clear")
    match = gr.State(Match())

    shown = [match, *windows]
    inputs = [box, match, left, right, blind, temperature, longest]
    answer = box.submit(handlers.send, inputs, [*shown, box, line], **EVENT)
    box.stop(None, cancels=answer, **EVENT)
    ends = [clear.click(handlers.clear, None, [*shown, line], cancels=answer, **EVENT)]
    for button, verdict in zip(votes, VERDICTS, strict=True):
        vote = partial(handlers.vote, verdict=verdict)
        ends.append(button.click(vote, match, [*shown, line], cancels=answer, **EVENT))
    for event in [answer, *ends]:
        event.then(handlers.settle, match, [*windows, box, line], **EVENT)
    tuned.click(handlers.base_against_tuned, right, [left, right], **EVENT)
    tab.select(handlers.choices, None, [left, right], **EVENT)
    return left, right


def _window(name: str, side: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=name,
        elem_id=f"compare-{side}-window",
        elem_classes="versus",
        layout="bubble",
        height="100%",
        placeholder=INVITATIONS[side],
        allow_tags=False,
        sanitize_html=True,
        latex_delimiters=[],
        group_consecutive_messages=True,
        buttons=[],
    )
