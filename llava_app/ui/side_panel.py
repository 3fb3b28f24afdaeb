"""The panel beside the chat: the list of conversations, and what can be done with the open one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from llava_app.ui.conversations import Conversations

KEEPER = (Path(__file__).parent / "keeper.js").read_text(encoding="utf-8")
# What the browser keeps, as Conversations.restore takes it.
STORED = """() => [{
  current: sessionStorage.getItem("llava.current"),
  talks: Object.keys(localStorage).filter((key) => key.startsWith("llava.talk."))
    .map((key) => [key.slice("llava.talk.".length), localStorage.getItem(key)]),
}]"""
DOWNLOAD = "() => setTimeout(() => document.querySelector('#download').click(), 100)"


@dataclass(frozen=True)
class Panel:
    """The components of the panel."""

    listing: gr.Radio
    new: gr.Button
    title: gr.Textbox
    export: gr.Button
    download: gr.DownloadButton
    take_in: gr.UploadButton
    delete: gr.Button


def side_panel() -> Panel:
    """Lay the panel out."""
    with gr.Sidebar(open=False, label="Conversations", elem_id="panel", width=300):
        gr.HTML("<h2>Conversations</h2>", padding=False)
        new = gr.Button("New chat", size="sm", elem_id="new")
        listing = gr.Radio([], label="Conversations", show_label=False, elem_id="listing", interactive=True)
        title = gr.Textbox(label="New title", placeholder="Type a title, then Enter", elem_id="title", max_length=60)
        with gr.Row():
            export = gr.Button("Export", size="sm", elem_id="export")
            take_in = gr.UploadButton("Import", size="sm", file_types=[".zip"], elem_id="import")
            delete = gr.Button("Delete", size="sm", elem_id="delete")
        gr.HTML(
            "<p>The text is kept in this browser, the pictures on the server while it has room. "
            "An export holds both.</p>",
            padding=False,
        )
        download = gr.DownloadButton("Download", elem_id="download", elem_classes="unseen")
    return Panel(listing, new, title, export, download, take_in, delete)


def connect_panel(
    conversations: Conversations,
    page: gr.Blocks,
    panel: Panel,
    *,
    tab: gr.State,
    talk: gr.State,
    window: gr.Chatbot,
    clear: gr.Button,
    changes: list[Dependency],
    how: dict[str, Any],
) -> None:
    """Connect the panel, and note every change of the conversation; leaving one ends its answer."""
    shelf = gr.State(())
    keeper = gr.HTML({}, html_template="", js_on_load=KEEPER, elem_id="keeper")
    shown = [talk, window, shelf, panel.listing, keeper]
    noted = [shelf, panel.listing, keeper]
    page.load(conversations.restore, keeper, shown, js=STORED, **how)
    for change in changes:
        change.then(conversations.keep, [talk, shelf], noted, **how)
    left = [tab, talk, shelf]
    gr.on([panel.new.click, clear.click], conversations.new, left, shown, **how)
    panel.listing.input(conversations.open, [panel.listing, *left], shown, **how)
    panel.delete.click(conversations.delete, left, shown, **how)
    panel.take_in.upload(conversations.take_in, [panel.take_in, *left], shown, **how)
    renamed = panel.title.submit(conversations.rename, [panel.title, talk, shelf], noted, **how)
    renamed.then(None, None, panel.title, js="() => ''", **how)
    exported = panel.export.click(conversations.export, talk, panel.download, **how)
    exported.then(None, None, None, js=DOWNLOAD, **how)
