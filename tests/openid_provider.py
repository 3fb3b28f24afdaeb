"""An OpenID provider in this process, as much of Hugging Face's as a login needs: it asks, and signs who agreed.

with openid_provider() as provider:
    provider.name = "ada"  # whoever agrees from now on
    with serving(environment=provider.environment, …) as address:
        …
"""

import base64
import html
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT, SECRET = "client-of-the-space", "canary-of-the-client-4711"
TOKEN = "hf_oauth_canary_0815"
SCOPES = "openid profile"


@dataclass
class Provider:
    """What it is and what it will say."""

    address: str = ""
    name: str = "ada"
    lasts: int = 28_800  # s
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "1"}))
    signs_with: RSAKey | None = None  # in place of its published key
    given: list[str] = field(default_factory=list)  # all secrets that it handed out
    _agreed: dict[str, dict[str, str]] = field(default_factory=dict)  # code → what was asked for, by whom

    @property
    def environment(self) -> dict[str, str]:
        """What the Hub puts into a Space with `hf_oauth: true`."""
        return {
            "OAUTH_CLIENT_ID": CLIENT,
            "OAUTH_CLIENT_SECRET": SECRET,
            "OAUTH_SCOPES": SCOPES,
            "OPENID_PROVIDER_URL": self.address,
        }

    def metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.address,
            "authorization_endpoint": f"{self.address}/oauth/authorize",
            "token_endpoint": f"{self.address}/oauth/token",
            "userinfo_endpoint": f"{self.address}/oauth/userinfo",
            "jwks_uri": f"{self.address}/oauth/jwks",
            "id_token_signing_alg_values_supported": ["RS256"],
        }

    def consent(self, asked: dict[str, str]) -> str:
        """The page that asks whether to tell."""
        assert (asked["client_id"], asked["scope"], asked["response_type"]) == (CLIENT, SCOPES, "code")
        code = secrets.token_urlsafe()
        self.given.append(code)
        self._agreed[code] = asked | {"name": self.name}
        denied = {"error": "access_denied", "error_description": f"{self.name} said no", "state": asked["state"]}
        links = {"Authorize": {"code": code, "state": asked["state"]}, "Cancel": denied}
        target = asked["redirect_uri"] + ("&" if "?" in asked["redirect_uri"] else "?")
        return "".join(f'<a href="{html.escape(target + urlencode(more))}">{said}</a>' for said, more in links.items())

    def token(self, sent: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        """Access and identity for a code, once; status and answer."""
        known = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        asked = self._agreed.pop(sent.get("code", ""), None)
        if asked is None or authorization != f"Basic {known}" or sent["redirect_uri"] != asked["redirect_uri"]:
            return 400, {"error": "invalid_grant", "error_description": f"not {sent.get('code')}"}
        identity = self._identity(asked)
        self.given += [TOKEN, identity]
        answer = {"access_token": TOKEN, "id_token": identity, "token_type": "bearer", "expires_in": self.lasts}
        return 200, answer | {"scope": SCOPES}

    def _identity(self, asked: dict[str, str]) -> str:
        profile = f"{self.address}/{asked['name']}"
        who = {"sub": asked["name"], "name": asked["name"].title(), "preferred_username": asked["name"]}
        about = {"iss": self.address, "aud": CLIENT, "iat": int(time.time()), "exp": int(time.time()) + 3600}
        claims = {**who, **about, "nonce": asked["nonce"], "profile": profile, "picture": f"{profile}.png"}
        return jwt.encode({"alg": "RS256", "kid": "1"}, claims, self.signs_with or self.key)


class _Handler(BaseHTTPRequestHandler):
    provider: Provider

    def do_GET(self) -> None:
        path, asked = urlsplit(self.path).path, dict(parse_qsl(urlsplit(self.path).query))
        if path == "/.well-known/openid-configuration":
            self._reply(json.dumps(self.provider.metadata()))
        elif path == "/oauth/jwks":
            self._reply(json.dumps({"keys": [self.provider.key.as_dict(private=False)]}))
        elif path == "/oauth/authorize":
            self._reply(self.provider.consent(asked), kind="text/html")
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        sent = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        code, answer = self.provider.token(sent, self.headers["Authorization"])
        self._reply(json.dumps(answer), code=code)

    def _reply(self, text: str, *, kind: str = "application/json", code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def openid_provider() -> Iterator[Provider]:
    """A provider that answers."""
    provider = Provider()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("One", (_Handler,), {"provider": provider}))
    provider.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield provider
    server.shutdown()
    thread.join()
    server.server_close()
