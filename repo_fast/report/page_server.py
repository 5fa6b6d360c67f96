"""A run's page on the loopback, made anew when the run has written something.

It is for the eyes of who sits at this machine: only GET and HEAD are answered, and only who calls the server by its own
name, so that a page from elsewhere in the same browser, whose name leads here, reads nothing. Given are the page, made
in memory, and those files that it links to: by name alone, so that no path leads out of the folder.
"""

import mimetypes
import os
import shutil
import socketserver
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from repo_fast.errors import InputError, first_line
from repo_fast.report.page_links import PAGE, link
from repo_fast.report.run_page import RunPage

_LOOPBACK = "127.0.0.1"
# A visitor that says nothing for so long (seconds) is hung up on.
_PATIENCE = 30
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class PageServer(ThreadingHTTPServer):
    """Serves the page of a run.

    Args:
        page: It.
        folder: The run's output folder.
        port: To listen at; 0 chooses one that is free.

    Raises:
        InputError: The port cannot be had.
    """

    daemon_threads = True

    def __init__(self, page: RunPage, folder: Path, port: int) -> None:
        self._page, self.folder = page, folder
        # A page's log is read on from where it was: by one visitor at a time.
        self._lock, self._made = threading.Lock(), ("", b"")
        try:
            super().__init__((_LOOPBACK, port), _Visit)
        except OSError as error:
            raise InputError(
                f"--port {port} cannot be had ({error.strerror}), expected a free one, or 0, which chooses one"
            ) from error

    def server_bind(self) -> None:
        """Without asking for the host's name, which may take long where there is no network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _LOOPBACK, self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{_LOOPBACK}:{self.server_port}/"

    @property
    def names(self) -> set[str]:
        """What visitors may call this server."""
        names = {_LOOPBACK, "localhost"}
        return {f"{name}:{self.server_port}" for name in names} | (names if self.server_port == 80 else set())

    def version(self) -> str:
        """Of the page as it would be now."""
        return self._page.version()

    def page(self) -> tuple[str, bytes]:
        """The version of the page, and the page."""
        with self._lock:
            version = self._page.version()
            if self._made[0] != version:
                # It may change meanwhile: then it is made again, the next time.
                self._made = version, "".join(self._page.parts(version)).encode()
            return self._made

    def file(self, path: str) -> Path | None:
        """What the page links to by a path; None where it links to no such thing."""
        linked = {f"/{href}": name for name, href in map(link, self._page.links())}
        return self.folder / linked[path] if path in linked else None

    def handle_error(self, request: object, client_address: object) -> None:
        """A visitor that goes is nothing to talk about; anything else is one line, and the next visit may go well."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"the page could not be made: {type(error).__name__}: {first_line(error)}", file=sys.stderr)


class _Visit(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "repo_fast", ""
    timeout = _PATIENCE

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *words: object) -> None:
        """Nothing: the terminal is for what the run's owner asked."""

    def _answer(self, with_body: bool) -> None:
        if self.headers.get("Host") not in self.server.names:
            return self.send_error(HTTPStatus.FORBIDDEN, "Ask for the page by the address that was printed")
        path = urlsplit(self.path).path
        if path in ("/", f"/{PAGE}"):
            if not with_body:
                return self._head("text/html; charset=utf-8", None, self.server.version())
            version, text = self.server.page()
            self._head("text/html; charset=utf-8", len(text), version)
            self.wfile.write(text)
            return None
        found = self.server.file(path)
        try:
            # Not even a link that took its place meanwhile.
            opened = None if found is None else os.fdopen(os.open(found, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except OSError:
            opened = None
        if found is None or opened is None:
            return self.send_error(HTTPStatus.NOT_FOUND, "The page links to no such file")
        with opened:
            self._head(_kind(found), os.fstat(opened.fileno()).st_size, None)
            if with_body:
                shutil.copyfileobj(opened, self.wfile)
        return None

    def _head(self, kind: str, size: int | None, version: str | None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        if size is not None:
            self.send_header("Content-Length", str(size))
        if version is not None:
            self.send_header("ETag", version)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()


def _kind(path: Path) -> str:
    """What a browser is told a file is; a text, where it is neither a page nor a picture."""
    kind = mimetypes.guess_type(path.name)[0]
    return kind if kind == "image/png" else f"text/{'html' if kind == 'text/html' else 'plain'}; charset=utf-8"
