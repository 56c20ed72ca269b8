"""`samebit watch RUN...`: a page that follows runs while they go on, for this machine alone."""

import json
import threading
from collections.abc import Sequence
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from samebit.recipes.run.kept_samples import Query, found_in
from samebit.recipes.run.pages import open_runs, page, page_data, title_of
from samebit.recipes.run.run_data import RunData
from samebit.recipes.tools_config import WatchRun

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")


class WatchServer(ThreadingHTTPServer):
    """Serves the page of some runs at the loopback; `port` 0 chooses one."""

    daemon_threads = True

    def __init__(self, runs: Sequence[RunData], port: int) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self._runs = runs
        self._title = title_of(runs)
        self._lock = threading.Lock()
        self._data = page_data(runs, live=True)
        self._is_old = False

    @property
    def address(self) -> str:
        """A browser of this machine opens this."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def data(self) -> str:
        """Return the page's data as of now. Raises ValueError for a damaged file."""
        with self._lock:
            is_old, self._is_old = self._is_old, True  # also where one of them raises
            # A summary appears after the last row.
            if sum(run.refresh() for run in self._runs) or self._has_ended() or is_old:
                self._data = page_data(self._runs, live=True)
            self._is_old = False
            return self._data

    def samples(self, words: str) -> str:
        """Return the samples, as JSON, that the words of an address ask for: a Query, and `runs`,
        the numbers of theirs. Raises BadQuestion for other words."""
        query, chosen = _question(words)
        with self._lock:
            runs = [(i, run.samples.copy()) for i, run in enumerate(self._runs) if i in chosen]
        return json.dumps(found_in(runs, query), allow_nan=False)

    def page(self) -> str:
        """Return the whole page."""
        return page(self._title, self.data())

    def _has_ended(self) -> bool:
        return any(run.has_new_summary() for run in self._runs)


class BadQuestion(ValueError):
    """An address asks for what there is not."""


def _question(words: str) -> tuple[Query, list[int]]:
    """What is asked for, and of which runs."""
    asked = dict(parse_qsl(words, keep_blank_values=True))
    if unknown := sorted(asked.keys() - {"runs", "words", "kind", "order", "page"}):
        raise BadQuestion(f"samples are not asked for by {unknown}")
    runs, pages = (_whole_numbers(key, asked.pop(key, "")) for key in ("runs", "page"))
    try:
        return Query(**asked, page=next(iter(pages), 0)), runs
    except ValueError as error:
        raise BadQuestion(str(error)) from error


def _whole_numbers(key: str, text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(map(str.isdecimal, parts)):
        raise BadQuestion(f"{key} is {text!r}; give whole numbers, by commas")
    return [int(part) for part in parts]


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer

    def do_GET(self) -> None:
        # Another site's page that a browser was told is at the loopback has another host.
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in NAMES:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "open it at 127.0.0.1")
            return
        path, _, words = self.path.partition("?")
        try:
            if path == "/":
                self._answer(HTTPStatus.OK, "text/html", self.server.page())
            elif path == "/data":
                self._answer(HTTPStatus.OK, "application/json", self.server.data())
            elif path == "/samples":
                self._answer(HTTPStatus.OK, "application/json", self.server.samples(words))
            else:
                there = "there is /, /data and /samples"
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", there)
        except BadQuestion as error:
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", str(error))
        except (OSError, ValueError) as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error))

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        tag = f'"{sha256(content).hexdigest()[:16]}"'
        if status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status, content = HTTPStatus.NOT_MODIFIED, b""
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        headers |= {"ETag": tag, "Cache-Control": "no-cache", "X-Frame-Options": "DENY"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing: a page that follows asks every two seconds."""


def main(run: WatchRun) -> int:
    """Run the command `samebit watch`; serves until Ctrl-C."""
    with WatchServer(open_runs(run.runs, "runs"), run.port) as server:
        print(f"{server.address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
