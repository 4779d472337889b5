"""A small server on which people search a gallery by dropping an image on a page.

Images of the gallery are asked for by their number in the index, never by a path, and are sent as
newly made JPEGs; there is no way to any other file.
"""

import re
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from jaxtyping import Float32

from dml_jax import data
from dml_jax.search import html
from dml_jax.search.index import Gallery

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_LARGE = 1600  # The longer side of a picture that was clicked on, pixels.
_PICTURE = re.compile(r"/(thumbnail|image)/(0|[1-9][0-9]{0,17})")
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{html.SCRIPT_HASH}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Refused(Exception):
    """A request that is not answered as it wants."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        """Says with what status, and why."""
        super().__init__(message)
        self.status = status


def make_server(
    gallery: Gallery,
    embed_one: Callable[[bytes, str], Float32[np.ndarray, "1 d"]],
    *,
    host: str,
    port: int,
    neighbours: int,
) -> ThreadingHTTPServer:
    """A server that listens, and answers once `serve_forever` is called.

    Args:
        gallery: to search in.
        embed_one: from an encoded image and what to call it to its embedding.
        host: the address to listen at.
        port: the port; 0 for any that is free.
        neighbours: how many to show.

    Returns:
        The server; `server_address` tells the port.

    Raises:
        OSError: the address or the port is not to be had.
    """
    try:
        return _Server((host, port), gallery, embed_one, neighbours)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from error


class _Server(ThreadingHTTPServer):
    """What there is to tell; how it is told is the handler's."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        gallery: Gallery,
        embed_one: Callable[[bytes, str], Float32[np.ndarray, "1 d"]],
        neighbours: int,
    ) -> None:
        self.local = address[0] in LOOPBACK
        self.start_page = html.search_page(gallery).encode()
        self._gallery, self._embed_one, self._neighbours = gallery, embed_one, neighbours
        self._one_at_a_time = threading.Lock()
        super().__init__(address, _Handler)

    def picture(self, row: int, *, side: int) -> bytes | None:
        """An image of the gallery as JPEG; None if there is none."""
        there = row < len(self._gallery.names)
        return html.thumbnail(self._gallery, row, side=side) if there else None

    def search(self, image: bytes) -> str:
        """What is found for an encoded image, as HTML."""
        with self._one_at_a_time:
            data.check_upload(image)
            embedding = self._embed_one(image, "this image")
            return html.results(self._gallery.nearest(embedding, self._neighbours))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dml_jax", ""
    timeout = 30  # Seconds without a byte, after which a client is left.

    def do_GET(self) -> None:  # noqa: N802
        """Answers with the page, or a picture."""
        self._answer(self._get)

    def do_POST(self) -> None:  # noqa: N802
        """Answers an image with its neighbours."""
        self._answer(self._post)

    def _answer(self, respond: Callable[[], tuple[str, bytes]]) -> None:
        status, kind, content = HTTPStatus.OK, "text/plain; charset=utf-8", b""
        try:
            self._check_host()
            kind, content = respond()
        except Refused as refusal:
            status, content = refusal.status, str(refusal).encode()
            self.close_connection = True  # What it sent may not have been read.
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in _SECURITY.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _check_host(self) -> None:
        """Keeps pages of other sites out, whose name their owner may point at this machine."""
        name = re.sub(r":\d*$", "", self.headers.get("Host", "")).strip("[]").lower()
        if self.server.local and name not in LOOPBACK:
            raise Refused(HTTPStatus.FORBIDDEN, "ask for localhost")

    def _get(self) -> tuple[str, bytes]:
        if self.path == "/":
            return "text/html; charset=utf-8", self.server.start_page
        asked = _PICTURE.fullmatch(self.path)
        if asked:
            side = html.THUMBNAIL if asked[1] == "thumbnail" else _LARGE
            picture = self.server.picture(int(asked[2]), side=side)
            if picture is not None:
                return "image/jpeg", picture
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> tuple[str, bytes]:
        # Read first: a connection that is closed with something unread takes the answer with it.
        image = self._body()
        if self.path != "/search":
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        if not self.headers.get_content_type().startswith("image/"):
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "only images are searched for")
        try:
            return "text/html; charset=utf-8", self.server.search(image).encode()
        except ValueError as error:
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, str(error)) from error

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "say how large the image is")
        if int(length) > html.MOST_BYTES:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"images of up to {html.MOST_BYTES >> 20} MB are searched for",
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, "the image is not whole")
        return body

    def log_message(self, *_: object) -> None:
        """Keeps the terminal for what its user wants to know."""
