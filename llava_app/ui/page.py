"""The page: a head with the model list, and the chat below it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr

from llava_app.checkpoints import Card, find
from llava_app.engine.process import ModelProcess
from llava_app.errors import UserError
from llava_app.evaluations import Evaluation
from llava_app.feedback import Feedback
from llava_app.ui import api
from llava_app.ui.chat_tab import chat, model_list
from llava_app.ui.compare_tab import compare
from llava_app.ui.data_tab import DataHandlers, data
from llava_app.ui.examples import EXAMPLES, read_examples
from llava_app.ui.handlers import Handlers
from llava_app.ui.measure_tab import MeasureHandlers, measure
from llava_app.ui.models import Models, Ready, ask_remotely, connect, load_locally
from llava_app.ui.theme import MARK, SCRIPT, Lava, head
from llava_app.ui.train_tab import train

TITLE = "LLaVA"
UPLOAD_LIMIT = "64mb"  # a file; what is in it is bounded by images.py
UPLOADS_KEPT = 3600  # s; a picture that was sent lives on in the session, one that was not is forgotten after this


def build(models: Models, runs: Path, *, public: bool = False) -> gr.Blocks:
    """The page on the models of this process; what people say of them is kept in `runs`.

    A `public` one keeps nothing, starts no processes and reads no files: it is the chat alone.
    """
    handlers = Handlers(models, read_examples())
    mark = MARK.read_text(encoding="utf-8")
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, UPLOADS_KEPT), fill_height=True) as page:
        with gr.Row(elem_id="head"):
            gr.HTML(f"{mark}<h1>{TITLE}</h1>", elem_id="brand")
            model = model_list(handlers)
        if public:
            chat(handlers, page, model, None)
        else:
            with gr.Tabs(elem_id="tabs"):
                with gr.Tab("Chat", elem_id="chat-tab"):
                    chat(handlers, page, model, Feedback(runs / "feedback"))
                with gr.Tab("Compare", elem_id="compare-tab") as tab:
                    compare(models, tab, runs)
                train(models, runs, model=model)
                with gr.Tab("Data", elem_id="data-tab"):
                    data(DataHandlers(runs / "data"))
                with gr.Tab("Measure", elem_id="measure-tab"):
                    measure(MeasureHandlers(models, Evaluation()), page)
        api.offer(models)
    return page


def _serve(page: gr.Blocks, *, host: str, port: int, mcp: bool) -> None:
    """Answer at `host` and `port` from now on. Raises UserError when the port is taken."""
    page.queue(max_size=256)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            theme=Lava(),
            js=SCRIPT.read_text(encoding="utf-8"),
            head=head(),
            favicon_path=MARK,
            allowed_paths=[str(EXAMPLES)],
            max_file_size=UPLOAD_LIMIT,
            state_session_capacity=500,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            show_error=False,
            mcp_server=mcp,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"The page cannot open port {port} on {host}. Choose another one with --port.") from error


def open_page(
    model: str | None, *, precision: str, runs: Path, host: str, port: int, mcp: bool, servers: Sequence[str]
) -> None:
    """Serve the page until it is interrupted, with `mcp` also as an MCP server.

    Raises UserError: no such `model`, a port that is taken, no package for `mcp`, one of `servers` no address.
    """
    if mcp:
        api.check_mcp()
    remote = connect(servers)
    elsewhere: Callable[[], list[Card]] = remote.cards if remote else list
    on_server = next((card for card in elsewhere() if model in (card.name, card.source)), None)
    chosen = on_server or (find(model, runs) if model else None)
    process = ModelProcess()

    def choose() -> tuple[Card, str]:
        return (chosen, "Chosen with --model.") if chosen else process.choose()

    def load(card: Card) -> Ready:
        if remote and card.kind == "server":
            return ask_remotely(card, remote)
        return load_locally(process, card, precision)

    def load_half(card: Card) -> Ready:
        return load_locally(process, card, precision, share=0.5)

    models = Models(load, choose, runs=runs, load_half=load_half, elsewhere=elsewhere)
    models.start()  # beside the page: neither waits for the other
    page = build(models, runs, public="SPACE_ID" in os.environ)
    _serve(page, host=host, port=port, mcp=mcp)
    print(f"The page is at {page.local_url} (Ctrl-C ends it).", flush=True)
    page.block_thread()
