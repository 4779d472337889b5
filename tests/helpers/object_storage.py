"""Object storage on this machine: an emulator of GCS, and moto's S3."""

import contextlib
import logging
import os
import socket
import threading
import uuid
from http.server import ThreadingHTTPServer
from unittest import mock

import fsspec
from gcp_storage_emulator.server import Router, create_server
from moto.server import ThreadedMotoServer

SCHEMES = ("memory", "gs", "s3")


class Concurrent(ThreadingHTTPServer):
    """A server that takes many connections at once, as fsspec's clients make them."""

    request_queue_size = 256


@contextlib.contextmanager
def one_request_at_a_time():
    """Makes the emulator handle requests one after another: its store is not safe for threads."""
    handle, lock = Router.handle, threading.Lock()

    def handle_alone(router, method):
        with lock:
            handle(router, method)

    with mock.patch.object(Router, "handle", handle_alone):
        yield


@contextlib.contextmanager
def served():
    """Serves GCS and S3, and points fsspec's clients to them, those of subprocesses too."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # It logs each request.
    port = free_port()
    google = create_server("127.0.0.1", port, in_memory=True)
    amazon = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    with mock.patch("gcp_storage_emulator.server.server.HTTPServer", Concurrent):
        google.start()
    amazon.start()
    settings = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        # Its gRPC client cannot reach the emulator.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*amazon.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    # An earlier server's clients are cached.
    for scheme in ("gs", "s3"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
    try:
        with one_request_at_a_time():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        amazon.stop()
        google.stop()


def new_bucket(scheme):
    """Returns the URL of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem(scheme).mkdir(name)
    return f"{scheme}://{name}"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
