"""The HTTP server of the page: static assets, and the API as JSON."""

from __future__ import annotations

import gzip
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable

import orjson

from megatron_implicit.errors import LaunchError
from megatron_implicit.telemetry.dashboard.grafana import grafana_dashboard
from megatron_implicit.telemetry.dashboard.view import Dashboard

ASSETS = Path(__file__).parent / "assets"
TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}  # fmt: skip
COMPRESSED_FROM = 4096
"""Bytes from which an answer is compressed."""


class DashboardServer(ThreadingHTTPServer):
    """Serves a dashboard at host:port; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, dashboard: Dashboard, host: str, port: int) -> None:
        self.dashboard = dashboard
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise LaunchError(
                f"{host}:{port} cannot be used ({error.strerror}): give another --port, or --host"
            ) from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.server_address[0]}:{self.server_port}/"

    def serve_in_background(self) -> None:
        """Serves on a thread."""
        threading.Thread(target=self.serve_forever, name="dashboard", daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader who left is no error."""
        if not isinstance(sys.exc_info()[1], (BrokenPipeError, ConnectionResetError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: DashboardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        if address.path.startswith("/api/"):
            self._answer_api(address.path.removeprefix("/api/"), urllib.parse.parse_qs(address.query))
        else:
            self._send_asset(address.path.lstrip("/") or "index.html")

    def log_message(self, format: str, *args: Any) -> None:
        """A line a request would bury what the command says."""

    def _answer_api(self, name: str, query: dict[str, list[str]]) -> None:
        dashboard = self.server.dashboard
        key = query.get("id", [""])[0]
        first, last = (int(query.get(name, [default])[0]) for name, default in (("first", "0"), ("last", str(2**62))))
        answers: dict[str, Callable[[], Any]] = {
            "panels": dashboard.panels,
            "overview": dashboard.overview,
            "run": lambda: dashboard.run(key, first, last),
            "ranks": lambda: dashboard.ranks(key),
            "config": lambda: dashboard.config(key),
            "compare": lambda: dashboard.compare(query.get("id", [])),
            "grafana": grafana_dashboard,
        }
        if name not in answers:
            return self._send_error(404, f"no /api/{name}")
        try:
            content = answers[name]()
        except KeyError:
            return self._send_error(404, f"no run '{key}'")
        options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS  # a damaged configuration may have any keys
        self._send(200, "application/json", orjson.dumps(content, option=options))

    def _send_asset(self, name: str) -> None:
        path = ASSETS / name
        if "/" in name or not path.is_file():
            return self._send_error(404, f"no {name}")
        self._send(200, TYPES.get(path.suffix, "application/octet-stream"), path.read_bytes())

    def _send_error(self, code: int, message: str) -> None:
        self._send(code, "application/json", orjson.dumps({"error": message}))

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        if len(body) >= COMPRESSED_FROM and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        self.wfile.write(body)
