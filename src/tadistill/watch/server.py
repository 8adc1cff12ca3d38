"""The web server of the page. It listens on 127.0.0.1 only, writes nothing, and serves only a few files of the study's own folder.

server = make_server(study, store, port=0)
server.serve_forever()                      # until server.shutdown()

/                 the page
/state            the parts of the page, as JSON
/files/NAME       report.html, results.json and other files that the study's folder may have
"""

import contextlib
import gzip
import json
import os
import platform
import socket
import stat
import sys
import zlib
from collections.abc import Container, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tadistill.errors import ConfigError, TadistillError, cause
from tadistill.store import Store
from tadistill.terminal import Terminal
from tadistill.watch import page
from tadistill.watch.machine import Machine
from tadistill.watch.state import Watched

HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Allowed names in the Host header. With other names, a foreign page in the same browser could read the study (DNS rebinding)."""
FILES = {
    "report.html": "text/html",
    "report.md": "text/plain",
    "results.json": "application/json",
    "results.csv": "text/csv",
    "results-summary.csv": "text/csv",
    "plan.json": "application/json",
    "run.log": "text/plain",
}
"""The files of a study's folder that are served, with their media types."""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'"
)
_PAUSES = {"running": 2, "queued": 5}
_TABLE = Path("/proc/net/tcp")  # connections and their owners, on Linux
_REST = 10  # seconds between two updates of the page if nothing runs or waits in the queue


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, study: Path, store: Store, port: int):
        self.study, self.watched, self.machine = study, Watched(study, store), Machine()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an error. Nothing is printed if the browser has only closed the connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def state(self, wanted: Sequence[str] = (), have: Container[str] = ()) -> dict[str, Any]:
        """Return the title, the seconds until the browser should send the next request, and the parts of the page with their digests.

        Args:
            wanted: ids of the graph's nodes whose curves are shown.
            have: digests of the parts that the browser already has. These parts are left out.
        """
        moment = self.watched.look()
        use = self.machine.look(moment.runs, elsewhere=any(stage.elapsed for stage in moment.stages))
        parts = page.render(moment, use, wanted, [name for name in ("report.html", "run.log") if (self.study / name).is_file()])
        digests = {name: f"{zlib.crc32((name + part).encode()):08x}" for name, part in parts.items()}
        new = {name: part for name, part in parts.items() if digests[name] not in have}
        return {"title": page.title(moment), "pause": _PAUSES.get(moment.state, _REST), "parts": new, "digests": digests}


def make_server(study: Path, store: Store, *, port: int) -> Server:
    """Return a server that listens on the port.

    Raises ConfigError if the port cannot be used, and StoreError if the plan of the study cannot be read.
    """
    try:
        server = Server(study, store, port)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"port {port} of 127.0.0.1 cannot be used ({cause(error)}); choose another one with --port, or give 0 for any free port"
        ) from error
    try:
        server.watched.look()
    except TadistillError:
        server.server_close()
        raise
    return server


def serve(study: Path, store: Store, port: int, console: Terminal) -> None:
    """Print the address of the page, and serve the page until Ctrl-C."""
    with make_server(study, store, port=port) as server:
        number = server.server_address[1]
        console.say(f"{study.resolve().name}: {server.url} (Ctrl-C ends the page, but not the study)")
        tunnel = f"ssh -L {number}:localhost:{number} {platform.node()}"
        console.say(f"from another machine: run `{tunnel}`, then open the same address there")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]
    server_version, sys_version = "tadistill", ""
    timeout = 30

    def do_GET(self) -> None:
        if not self._allowed():
            return
        parts = urlsplit(self.path)
        name = parts.path.removeprefix("/files/")
        try:
            if parts.path == "/":
                found = self.server.state()
                self._send(page.shell(self.server.watched.look(), found["parts"]).encode(), "text/html")
            elif parts.path == "/state":
                asked = parse_qs(parts.query)
                content = self.server.state(asked.get("node", []), asked.get("have", []))
                self._send(json.dumps(content, ensure_ascii=False).encode(), "application/json")
            elif name != parts.path and name in FILES and (content := read_file(self.server.study, name)) is not None:
                self._send(content, FILES[name])
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there is no such page; the page of the study is /")
        except TadistillError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    do_HEAD = do_GET

    def _allowed(self) -> bool:
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            self._refuse(HTTPStatus.FORBIDDEN, "this page is served only under the names localhost and 127.0.0.1")
            return False
        if not same_user(*self.client_address[:2], port=self.server.server_address[1]):
            self._refuse(HTTPStatus.FORBIDDEN, "this page is served only to the user who started the server")
            return False
        return True

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(f"{reason}\n".encode(), "text/plain", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        smaller = {"Content-Encoding": "gzip"} if "gzip" in self.headers.get("Accept-Encoding", "") else {}
        content = gzip.compress(content, 3) if smaller else content  # a tunnel may be slow
        headers = smaller | {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        with contextlib.suppress(ConnectionError, TimeoutError):  # the reader has gone
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


def read_file(study: Path, name: str) -> bytes | None:
    """Return the content of a file in the study's folder. Return None if it does not exist.

    Links are not followed, because they may lead out of the folder.
    """
    try:
        descriptor = os.open(study / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def same_user(address: str, client: int, *, port: int) -> bool:
    """Return False if another user of this machine opened the connection. On systems other than Linux, the owner of a connection is not
    known, and the result is always True.

    The check is needed because all users of a login node can connect to a port of 127.0.0.1. `address` and `client` are the address and the
    port of the browser. `port` is the port of this server.
    """
    try:
        lines = _TABLE.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return True
    ends = [f"{_hexadecimal(address)}:{client:04X}", f"{_hexadecimal('127.0.0.1')}:{port:04X}"]
    owner = next((int(fields[7]) for line in lines if (fields := line.split())[1:3] == ends), None)
    return owner is None or owner in (0, os.getuid())


def _hexadecimal(address: str) -> str:
    return f"{int.from_bytes(socket.inet_aton(address), sys.byteorder):08X}"
