"""The page: a head with the model list, and the chat below it."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from starlette.middleware import Middleware
from starlette.routing import Route

from llava_app.checkpoints import HUB_PRESETS, Card, Outlook, find
from llava_app.engine.process import ModelProcess
from llava_app.errors import UserError
from llava_app.evaluations import Evaluation
from llava_app.feedback import Feedback
from llava_app.limits import LOCAL, PUBLIC, Gate, Limits
from llava_app.logs import start_log
from llava_app.metrics import check_prometheus
from llava_app.passwords import Passwords, read_passwords
from llava_app.ui import api
from llava_app.ui.calls import HANDLERS, Page
from llava_app.ui.chat_tab import chat, model_list
from llava_app.ui.compare_tab import compare
from llava_app.ui.data_tab import DataHandlers, data
from llava_app.ui.door import Door
from llava_app.ui.examples import EXAMPLES, WORLD, read_examples
from llava_app.ui.handlers import Handlers
from llava_app.ui.lens import lens
from llava_app.ui.login import Login, account, check_login, is_required
from llava_app.ui.measure_tab import MeasureHandlers, measure
from llava_app.ui.models import LIGHT, Models, Ready, ask_remotely, connect, load_locally
from llava_app.ui.operations import give_back_pictures, routes, serve_until_told
from llava_app.ui.other_model import other_model
from llava_app.ui.theme import MARK, SCRIPT, Lava, head
from llava_app.ui.train_tab import train
from llava_app.ui.uploads import Uploads

if TYPE_CHECKING:
    from llava_app.engine.zero import ZeroEngine

TITLE = "LLaVA"
UPLOAD_LIMIT = "64mb"  # a file; what is in it is bounded by images.py
# Who asks on a Space, its proxies say: uvicorn believes those in private networks, and here no one else can reach it.
PROXIES = "127.0.0.1,::1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"
MOST_TABS = 500  # at once; each takes 0.06 MB and what it shows, and the one that was used longest ago goes first
MOST_EVENTS = 256  # at once, an answer for as long as it is written; Stop needs a place beside them
UPLOADS_KEPT = 3600  # s; a picture that was sent lives on in the session, one that was not is forgotten after this


def build(models: Models, runs: Path, *, public: bool = False, feedback: bool = False, login: bool = False) -> Page:
    """The page on the models of this process; what people say of them is kept in `runs`.

    A `public` one starts no processes and reads no files, and keeps nothing but `feedback`, where that is asked for:
    it is the chat alone. With `login` it has Gradio's button, which says who is signed in and signs out.
    """
    gate, kept = Gate(PUBLIC if public else LOCAL), Feedback(runs / "feedback") if feedback or not public else None
    handlers = Handlers(models, read_examples(), gate, world=read_examples(WORLD))
    mark = MARK.read_text(encoding="utf-8")
    with Page(
        tabs=gate.limits.tabs,
        title=TITLE,
        analytics_enabled=False,
        delete_cache=(600, UPLOADS_KEPT),
        fill_height=True,
    ) as page:
        with gr.Row(elem_id="head"):
            gr.HTML(f"{mark}<h1>{TITLE}</h1>", elem_id="brand")
            model, every = model_list(models)
            if login:
                gr.LoginButton(logout_value="Sign out {}", variant="secondary", size="sm", elem_id="account")
        if public:
            chat(handlers, page, model, every, kept)
        else:
            with gr.Tabs(elem_id="tabs"):
                with gr.Tab("Chat", elem_id="chat-tab"), chat(handlers, page, model, every, kept):
                    other_model(models, model)
                with gr.Tab("Compare", elem_id="compare-tab") as tab:
                    versus = compare(models, tab, runs, gate)
                train(models, runs, model=model, versus=versus)
                with gr.Tab("Data", elem_id="data-tab"):
                    data(DataHandlers(runs / "data"))
                with gr.Tab("Measure", elem_id="measure-tab"):
                    measure(MeasureHandlers(models, Evaluation()), page)
                    lens(models, page)
        api.offer(models, gate)
        page.unload(page.left)
    return page


def _serve(
    page: Page,
    *,
    host: str,
    port: int,
    mcp: bool,
    limits: Limits,
    passwords: Mapping[str, str],
    login: bool,
    extra: Sequence[Route],
) -> None:
    """Answer at `host` and `port` from now on, and to `extra`. Raises UserError when the port is taken."""
    page.queue(max_size=MOST_EVENTS)
    doors = [Middleware(Door, limits=limits), *([Middleware(Login)] if login else [])]
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
            state_session_capacity=MOST_TABS,
            max_threads=MOST_EVENTS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            show_error=False,
            mcp_server=mcp,
            auth=Passwords(passwords).check if passwords else None,
            auth_dependency=account if login else None,  # who asks, for the limits
            app_kwargs={
                "middleware": doors,
                "routes": list(extra),
                "exception_handlers": HANDLERS,
                "openapi_url": None,  # it would list every address to whoever has no password, too
            },
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"The page cannot open port {port} on {host}. Choose another one with --port.") from error


def _on_zero(chosen: Card | None) -> "ZeroEngine | None":
    """The chosen model, or LLaVA-1.5-7B, on the GPU that ZeroGPU lends; None where it does not."""
    if "SPACES_ZERO_GPU" not in os.environ or (chosen and chosen.kind in LIGHT):
        return None
    from llava_app.engine.zero import ZeroEngine  # it imports torch, and `spaces`, which only a Space has

    return ZeroEngine(chosen or next(card for card in HUB_PRESETS if card.name == "LLaVA-1.5-7B"))


def _find_models(model: str | None, *, precision: str, runs: Path, servers: Sequence[str], public: bool) -> Models:
    """The models of this machine, of the Hub and of `servers`, beginning with `model`. Raises UserError for one that
    there is not."""
    remote = connect(servers)
    elsewhere: Callable[[], list[Card]] = partial(remote.cards, public=public) if remote else list
    on_server = next((card for card in elsewhere() if model in (card.name, card.source)), None)
    chosen = on_server or (find(model, runs) if model else None)
    zero = _on_zero(chosen)
    chosen = zero.card if zero else chosen
    process = ModelProcess()

    def choose() -> tuple[Card, str]:
        return (chosen, "Chosen with --model." if model else "") if chosen else process.choose()

    def load(card: Card) -> Ready:
        if remote and card.kind == "server":
            return ask_remotely(card, remote)
        if zero and card == zero.card:
            return Ready(zero, zero.why)
        return load_locally(process, card, precision)

    def load_half(card: Card) -> Ready:
        return load_locally(process, card, precision, share=0.5)

    def weigh(cards: Sequence[Card]) -> dict[Card, Outlook]:
        return process.weigh(cards, precision)

    return Models(
        load,
        choose,
        runs=runs,
        load_half=load_half,
        elsewhere=elsewhere,
        reaches=lambda card: bool(remote and remote.offering(card.source)),
        let_go=process.clear,
        weigh=weigh,
        free=process.free,
        public=public,
    )


def open_page(
    model: str | None,
    *,
    precision: str,
    runs: Path,
    host: str,
    port: int,
    mcp: bool,
    servers: Sequence[str],
    public: bool,
    feedback: bool,
    auth: Sequence[str],
    metrics: bool,
    log_json: bool,
) -> None:
    """Serve the page until it is told to end, with `mcp` also as an MCP server; the flags are those of `flags.parse`.

    Raises UserError: no such `model`, a port that is taken, no package for `mcp`, one of `servers` no address, one of
    `auth` without a password.
    """
    start_log(as_json=log_json)
    give_back_pictures()
    passwords = read_passwords(auth)
    login = is_required()
    if login:
        check_login(with_passwords=bool(passwords))
    if metrics:
        check_prometheus()
    if mcp:
        api.check_mcp(with_passwords=bool(passwords))
    if "SPACE_ID" in os.environ:
        os.environ.setdefault("FORWARDED_ALLOW_IPS", PROXIES)
    models = _find_models(model, precision=precision, runs=runs, servers=servers, public=public)
    models.start()  # beside the page: neither waits for the other
    uploads = Uploads(Path(os.environ.get("GRADIO_TEMP_DIR") or runs) / "llava-uploads")
    page = build(models, runs, public=public, feedback=feedback, login=login)
    extra = routes(models) if metrics else []
    limits = PUBLIC if public else LOCAL
    _serve(page, host=host, port=port, mcp=mcp, limits=limits, passwords=passwords, login=login, extra=extra)
    uploads.settle()
    uploads.watch()
    print(f"The page is at {page.local_url} (Ctrl-C ends it).", flush=True)
    serve_until_told(page, models)
    uploads.remove()
