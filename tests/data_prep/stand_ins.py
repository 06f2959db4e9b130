"""Servers on 127.0.0.1 that stand in for the remote side, with its real paths, headers and formats."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Files(BaseHTTPRequestHandler):
    """Serves `files` (path: bytes), whole or from where a Range begins; `requests`: the paths asked for."""

    files: dict[str, bytes]
    requests: list[str]
    cut: int | None = None  # the connection ends after so many bytes of a body
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def headers_of(self, path: str, body: bytes) -> dict[str, str]:
        return {}

    def find(self, path: str) -> bytes | None:
        return self.files.get(path)

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def do_GET(self, head: bool = False) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(path)
        body = self.find(path)
        if body is None:
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if body and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if "Range" in self.headers else 200)
        for name, value in self.headers_of(path, body).items():
            self.send_header(name, value)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if not head:
            self.wfile.write(body[start : None if self.cut is None else self.cut])
            if self.cut is not None:
                self.close_connection = True


class Hub(Files):
    """The part of the Hugging Face hub's HTTP interface by which a data set is listed and downloaded."""

    repo: str
    damaged: tuple[str, ...] = ()  # listed with the SHA-256 of other bytes

    def find(self, path: str) -> bytes | None:
        api = f"/api/datasets/{self.repo}"
        if path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            return json.dumps({"id": self.repo, "sha": COMMIT, "siblings": siblings}).encode()
        if path.startswith(f"{api}/tree/{COMMIT}"):
            return json.dumps([self.entry(name, body) for name, body in self.files.items()]).encode()
        return self.files.get(path.removeprefix(f"/datasets/{self.repo}/resolve/{COMMIT}/"))

    def entry(self, name: str, body: bytes) -> dict[str, object]:
        oid = hashlib.sha256(body + (b"!" if name in self.damaged else b"")).hexdigest()
        lfs = {"oid": oid, "size": len(body), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(body), "oid": oid[:40], "lfs": lfs}

    def headers_of(self, path: str, body: bytes) -> dict[str, str]:
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return {"ETag": etag, "X-Repo-Commit": COMMIT, "Content-Type": "application/json"}


def parquet(rows: list[str]) -> bytes:
    packed = io.BytesIO()
    pq.write_table(pa.table({"text": rows, "other": list(range(len(rows)))}), packed)
    return packed.getvalue()


@contextmanager
def serve(
    kind: type[Files], files: dict[str, bytes], **settings: object
) -> Iterator[tuple[str, type[Files]]]:
    """The server's URL, and its handler's class, whose settings may change while it runs."""
    handler = type("Handler", (kind,), {"files": files, "requests": [], **settings})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
