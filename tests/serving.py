"""Servers on the loopback address, for one test each."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler


@contextmanager
def serving(handler: type[StreamRequestHandler] | partial) -> Iterator[str]:
    """The address of a server that gives each connection to `handler` until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class FolderHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def serving_folder(folder: Path):
    """The address of a server of a folder's files."""
    return serving(partial(FolderHandler, directory=str(folder)))
