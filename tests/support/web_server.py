"""A web server in a process of its own that serves ranges of files, and can misbehave."""

import gzip
import os
import re
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BLOCK = 1 << 16


class WebServer:
    """Serves a folder on a free port of the loopback; `log` has a line for every request.

    Args:
        folder: The files to serve.
        seconds: To wait after every block of 64 KiB.
        fail_every: Every how many requests one is answered with `status`, 503 by default.
        only: What the names of the files hold for which requests fail.
        cut_after: Bytes after which each answer breaks off.
        ranges: Whether ranges are served.
        encoding: A `Content-Encoding` that every answer claims.
        packs: Pack answers for clients that accept it.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.options = folder, options
        self.log_path = folder.parent / f"{folder.name}.log"
        self.log_path.touch()
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-S", __file__, self.folder, self.log_path, self.port]
        command += [f"{name}={value}" for name, value in self.options.items()]
        self.process = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def restart(self, **options: Any) -> None:
        """Start again at the same port, with other options."""
        self.kill()
        self.options = options
        self.__enter__()

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def log(self, method: str = "GET", name: str = "") -> list[str]:
        """Return the requests of a kind, such as `GET a.tar bytes=5- 206`."""
        lines = self.log_path.read_text().splitlines()
        return [line for line in lines if line.startswith(method) and name in line]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback for clients that tests have killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    log_path: Path
    options: dict[str, Any]
    requests = 0

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        type(self).requests += 1
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        fails = self.requests % int(self.options.get("fail_every", 1 << 30)) == 0
        if fails and str(self.options.get("only", "")) in path.name:
            status = int(self.options.get("status", 503))
        elif not path.exists():
            status = 404
        content = path.read_bytes() if status == 200 else b"no"
        if self.options.get("packs") and "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content)
        total = len(content)
        if status == 200 and asked and self.options.get("ranges", 1):
            status, end = 206, int(asked[2] or total - 1)
            content = content[int(asked[1]) : end + 1]
        with self.log_path.open("a") as log:  # one write a line, so that lines stay whole
            log.write(f"{self.command} {path.name} {self.headers.get('Range', '-')} {status}\n")
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status in (200, 206):
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if status == 206 and asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{end}/{total}")
        if "encoding" in self.options:
            self.send_header("Content-Encoding", str(self.options["encoding"]))
        self.end_headers()
        if body:
            self.send(content)

    def send(self, content: bytes) -> None:
        cut = int(self.options.get("cut_after", 1 << 40))
        for start in range(0, min(len(content), cut), BLOCK):
            self.wfile.write(content[start : min(start + BLOCK, cut)])
            time.sleep(self.options.get("seconds", 0.0))
        self.close_connection = cut < len(content)

    def log_message(self, *arguments: object) -> None:
        pass


def _serve(folder: str, log: str, port: str, *options: str) -> None:
    values: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        values[name] = value if name in ("encoding", "only") else float(value)
    _Handler.folder, _Handler.log_path, _Handler.options = Path(folder), Path(log), values
    server = _Server(("127.0.0.1", int(port)), _Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # a killed test leaves no server
        server.timeout = 1.0
        server.handle_request()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
