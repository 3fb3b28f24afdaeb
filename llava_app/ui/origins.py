"""Which page in a browser a request comes from. The cookie comes along when a page elsewhere sends one, too.

Programs (curl, gradio_client, MCP clients) say nothing of that and go on.
"""

import os
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

FOREIGN = "Another page sent this. Open the page itself. A proxy in front of it must pass on the Host header."
RENAMED = "This page is only for this computer. Open it as http://localhost:{port}/."
HERE = ("localhost", "127.0.0.1", "::1")


def refusal(scope: Scope) -> str | None:
    """What a request from elsewhere is told, None for others. A link to the page, or a frame with it, may be opened."""
    headers = Headers(scope=scope)
    if _is_renamed(scope, headers.get("host", "")):
        return RENAMED.format(port=scope["server"][1])
    opens = headers.get("sec-fetch-mode") == "navigate" and scope["method"] in ("GET", "HEAD")
    return FOREIGN if _is_foreign(headers) and not opens else None


def _is_foreign(headers: Headers) -> bool:
    """Whether another page sent this, as the browser says; pages cannot forge what it says that with. Over plain HTTP,
    and if it is old, it names the origin only, whose port Host may lack behind a proxy.

    X-Forwarded-Host is no help: a page elsewhere may send it, since Gradio allows any header to any origin.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site or not origin:
        return site in ("cross-site", "same-site")
    own = {_name(headers.get("host", "")), os.environ.get("SPACE_HOST")} - {None}
    return _name(urlsplit(origin).netloc) not in own


def _is_renamed(scope: Scope, host: str) -> bool:
    """Whether a name elsewhere was made to mean this computer (DNS rebinding), on a connection from itself.

    Such a request comes straight from the browser, which writes our port behind the name and lets no page change that.
    A proxy in front has another port, so the name that it passes on is not looked at.
    """
    address, port = scope.get("server") or ("", None)
    name, asked = _parts(host)
    return address in HERE and name not in HERE and (asked or 80) == port


def _name(host: str) -> str | None:
    return _parts(host)[0]


def _parts(host: str) -> tuple[str | None, int | None]:
    """Name and port; neither of what is no host."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname, parts.port
    except ValueError:
        return None, None
