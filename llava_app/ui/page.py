"""The page: a head with the model list, and the chat below it."""

from pathlib import Path

import gradio as gr

from llava_app.checkpoints import Card, find
from llava_app.engine.process import ModelProcess
from llava_app.errors import UserError
from llava_app.feedback import Feedback
from llava_app.ui.chat_tab import chat, model_list
from llava_app.ui.examples import EXAMPLES, read_examples
from llava_app.ui.handlers import Handlers
from llava_app.ui.models import Models, load_locally
from llava_app.ui.theme import HEAD, MARK, SCRIPT, STYLE, Lava

TITLE = "LLaVA"
SUBTITLE = "Show it a picture and ask about it."
UPLOAD_LIMIT = "64mb"  # a file; what is in it is bounded by images.py
UPLOADS_KEPT = 3600  # s; a picture that was sent lives on in the session, one that was not is forgotten after this


def build(models: Models, feedback: Path | None = None) -> gr.Blocks:
    """The page on the models of this process. `feedback` is the folder for votes and corrections; None: no such
    buttons."""
    handlers = Handlers(models, read_examples())
    mark = MARK.read_text(encoding="utf-8")
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, UPLOADS_KEPT), fill_height=True) as page:
        with gr.Row(elem_id="head"):
            gr.HTML(f"{mark}<div><h1>{TITLE}</h1><p>{SUBTITLE}</p></div>", elem_id="brand")
            model = model_list(handlers)
        chat(handlers, page, model, Feedback(feedback) if feedback else None)
    return page


def _serve(page: gr.Blocks, *, host: str, port: int) -> None:
    """Answer at `host` and `port` from now on. Raises UserError when the port is taken."""
    page.queue(max_size=256)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            theme=Lava(),
            css_paths=STYLE,
            js=SCRIPT.read_text(encoding="utf-8"),
            head=HEAD,
            favicon_path=MARK,
            allowed_paths=[str(EXAMPLES)],
            max_file_size=UPLOAD_LIMIT,
            state_session_capacity=500,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"The page cannot open port {port} on {host}. Choose another one with --port.") from error


def open_page(model: str | None, *, precision: str, runs: Path, host: str, port: int, feedback: bool = True) -> None:
    """Serve the page until it is interrupted; with `feedback`, votes and corrections are kept below `runs`.

    Raises UserError: no such `model`, or a port that is taken.
    """
    chosen = find(model, runs) if model else None
    process = ModelProcess()

    def choose() -> tuple[Card, str]:
        return (chosen, "Chosen with --model.") if chosen else process.choose()

    models = Models(lambda card: load_locally(process, card, precision), choose, runs=runs)
    models.start()  # beside the page: neither waits for the other
    page = build(models, runs / "feedback" if feedback else None)
    _serve(page, host=host, port=port)
    print(f"The page is at {page.local_url} (Ctrl-C ends it).", flush=True)
    page.block_thread()
