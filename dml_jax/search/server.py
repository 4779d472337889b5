"""A small server with a page on which dropping an image searches a gallery, and a JSON route.

Images of the gallery are requested by their row in the index, never by a path, and are sent as
newly encoded JPEGs; no other file can be read.
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
from dml_jax.search import api, html
from dml_jax.search.gallery import Gallery, Neighbour, search

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_LARGE = 1600  # Longer side of an enlarged image, pixels.
_IMAGE_PATH = re.compile(r"/(thumbnail|image)/(0|[1-9][0-9]{0,17})")
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


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        """Takes the status and the message of the answer."""
        super().__init__(message)
        self.status = status


def make_server(
    gallery: Gallery,
    embed_one: Callable[[bytes, str], Float32[np.ndarray, "1 d"]],
    *,
    host: str,
    port: int,
    neighbours: int,
    threshold: float | None = None,
    rerank: str | None = None,
) -> ThreadingHTTPServer:
    """Returns a listening server, which answers once `serve_forever` is called.

    Args:
        gallery: the gallery to search.
        embed_one: maps an encoded image and its name to its embedding.
        host: the address to listen on.
        port: the port; 0 for any free one.
        neighbours: number of neighbours to show.
        threshold: the similarity below which a neighbour's class is unknown.
        rerank: how neighbours are re-ranked; see `gallery.search`.

    Returns:
        The server; `server_address` has the port.

    Raises:
        OSError: the address or the port is not available.
    """

    def find(image: bytes) -> list[Neighbour]:
        data.check_upload(image)
        embedding = embed_one(image, "this image")
        return search(gallery, embedding, neighbours, threshold=threshold, rerank=rerank)

    try:
        return _Server((host, port), gallery, find, threshold)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from error


class _Server(ThreadingHTTPServer):
    """Produces the contents of the answers; the handler sends them."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        gallery: Gallery,
        find: Callable[[bytes], list[Neighbour]],
        threshold: float | None,
    ) -> None:
        self.local = address[0] in LOOPBACK
        self.start_page = html.search_page(gallery).encode()
        self._gallery, self._find, self.threshold = gallery, find, threshold
        self._search_lock = threading.Lock()
        super().__init__(address, _Handler)

    def gallery_image(self, row: int, *, side: int) -> bytes | None:
        """Returns an image of the gallery as JPEG; None if there is none."""
        return html.thumbnail(self._gallery, row, side=side)

    def search(self, image: bytes) -> list[Neighbour]:
        """Returns the neighbours of an encoded image."""
        with self._search_lock:
            return self._find(image)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Reports errors, except those of clients that disconnected."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dml_jax", ""
    timeout = 30  # Seconds without data until a connection is closed.

    def do_GET(self) -> None:  # noqa: N802
        """Answers with the page or an image."""
        self._answer(self._get)

    def do_POST(self) -> None:  # noqa: N802
        """Answers with the neighbours of an uploaded image."""
        self._answer(self._post)

    def _answer(self, respond: Callable[[], tuple[str, bytes]]) -> None:
        status, kind, content = HTTPStatus.OK, "text/plain; charset=utf-8", b""
        try:
            self._check_host()
            kind, content = respond()
        except RequestError as error:
            status, content = error.status, str(error).encode()
            self.close_connection = True  # The body of the request may not have been read.
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
        """Rejects requests to other host names, against DNS rebinding."""
        name = re.sub(r":\d*$", "", self.headers.get("Host", "")).strip("[]").lower()
        if self.server.local and name not in LOOPBACK:
            raise RequestError(HTTPStatus.FORBIDDEN, "use the host name localhost")

    def _get(self) -> tuple[str, bytes]:
        if self.path == "/":
            return "text/html; charset=utf-8", self.server.start_page
        if self.path == api.DESCRIPTION_PATH:
            return "application/json", api.DESCRIPTION
        match = _IMAGE_PATH.fullmatch(self.path)
        if match:
            side = html.THUMBNAIL if match[1] == "thumbnail" else _LARGE
            image = self.server.gallery_image(int(match[2]), side=side)
            if image is not None:
                return "image/jpeg", image
        raise RequestError(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> tuple[str, bytes]:
        # Read first: the answer is lost if a connection is closed before its body is read.
        image = self._body()
        if self.path not in ("/search", api.PATH):
            raise RequestError(HTTPStatus.NOT_FOUND, "there is no such page")
        if not self.headers.get_content_type().startswith("image/"):
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "only images are accepted")
        try:
            found = self.server.search(image)
        except ValueError as error:
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, str(error)) from error
        if self.path == api.PATH:
            return "application/json", api.answer(found, self.server.threshold)
        return "text/html; charset=utf-8", html.results(found).encode()

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length")
        if int(length) > html.MAX_UPLOAD_BYTES:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"images of up to {html.MAX_UPLOAD_BYTES >> 20} MB are accepted",
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RequestError(HTTPStatus.BAD_REQUEST, "the image is incomplete")
        return body

    def log_message(self, *_: object) -> None:
        """Writes no access log to the terminal."""
