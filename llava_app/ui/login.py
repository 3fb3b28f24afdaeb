"""Signing in with Hugging Face, where the owner of a Space wants to know who asks.

Gradio's own routes talk to Hugging Face and keep the outcome in a signed cookie. Here is whom that lets in, and what
everybody else gets in place of each page, file and event: a page with a button, or 401.
"""

import base64
import logging
import os
import time
from importlib.util import find_spec
from pathlib import Path
from string import Template

from gradio.utils import get_space
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from llava_app.errors import UserError
from llava_app.ui.door import Application, Receive, Scope, Send
from llava_app.ui.theme import MARK

HERE = Path(__file__).parent
WAYS_IN = ("/login/huggingface", "/login/callback", "/logout")  # Gradio's
STARTED = "/gradio_api/startup-events"  # Gradio asks itself this, once; it only says whether that has been
SCHEMES = ("light", "dark")  # that a Space can be told with ?__theme=
FIRST = "Sign in with Hugging Face first: open this page in another tab and sign in there, then go on here."
FAILED = "Signing in did not work. Try again."
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
}

logger = logging.getLogger(__name__)


def is_required() -> bool:
    """Whether this is a Space with `hf_oauth: true`, which the Hub gives an OAuth client of its own."""
    return get_space() is not None and "OAUTH_CLIENT_ID" in os.environ


def check_login(*, with_passwords: bool) -> None:
    """Raises UserError when there are passwords as well, or a package is missing."""
    if with_passwords:
        raise UserError(
            "This Space asks for a login on Hugging Face and --auth for a password. Leave --auth out, or take "
            "“hf_oauth: true” out of the Space's README.md."
        )
    if find_spec("authlib") is None or find_spec("itsdangerous") is None:
        raise UserError("A login on Hugging Face needs two more packages. Add gradio[oauth] to requirements.txt.")


def account(request: Request) -> str | None:
    """The name on Hugging Face of whoever sent this, while the login lasts."""
    login = request.session.get("oauth_info", {})  # where Gradio keeps it
    return login["userinfo"]["preferred_username"] if login.get("expires_at", 0) > time.time() else None


class Login:
    """ASGI middleware that lets nobody any further who has not signed in."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        if scope["path"] in WAYS_IN:
            await self._let_in(request, receive, send)
            return
        refusal = _refuse(request)
        await (refusal or self._app)(scope, receive, send)

    async def _let_in(self, request: Request, receive: Receive, send: Send) -> None:
        """One step of signing in or out; whatever goes wrong with it (denied, forged, not reachable) is told."""
        try:
            await self._app(request.scope, receive, send)
        except Exception as error:
            logger.warning("Signing in failed: %s", type(error).__name__)  # its words are the provider's, or anybody's
            await sign_in(request, failed=True)(request.scope, receive, send)


def _refuse(request: Request) -> Response | None:
    """What a request gets that goes no further. Those that a page elsewhere sends were refused at the Door."""
    if account(request) is not None or request.scope["path"] == STARTED:
        return None
    return sign_in(request) if request.scope["path"] == "/" else JSONResponse({"error": FIRST}, 401)


def sign_in(request: Request, *, failed: bool = False) -> Response:
    """The page for whoever has not signed in. In a frame it opens another tab, where cookies arrive for certain."""
    scheme = request.query_params.get("__theme")
    known = scheme if scheme in SCHEMES else None
    text = Template((HERE / "sign_in.html").read_text(encoding="utf-8")).substitute(
        scheme=known or " ".join(SCHEMES),
        mark=MARK.read_text(encoding="utf-8"),
        icon=base64.b64encode(MARK.read_bytes()).decode(),
        target=f"/?__theme={known}" if known else "/",
        tab="_blank" if request.headers.get("sec-fetch-dest") == "iframe" else "_self",
        failed=f"<p role='alert'>{FAILED}</p>" if failed else "",
    )
    return HTMLResponse(text, 400 if failed else 200, HEADERS)
