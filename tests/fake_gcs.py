"""A small Google Cloud Storage, for tests: the part of its JSON API that google-cloud-storage and TensorStore speak.

Objects are kept in memory, with generations and checksums, and are replaced in one piece. `faults` sees each request
before it is answered and may refuse it, delay it, or cut its connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CUT = "cut"
"""What a fault answers to have the connection cut before anything is kept."""


@dataclass(frozen=True)
class Object:
    data: bytes
    generation: int
    md5: bool = True


@dataclass(frozen=True)
class Request:
    """What a fault sees: `name` is the object's, or the prefix of a listing."""

    method: str
    name: str
    size: int


class FakeGcs(ThreadingHTTPServer):
    """Listens on a free port of this machine.

    Attributes:
        url: of the server.
        objects: name -> object, of its one bucket.
        requests: all there were so far.
        faults: each is asked about each request, and answers None, an HTTP status, or `CUT`; it may also sleep.
        page: entries of a page of a listing.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, bucket: str = "bucket") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket, self.url = bucket, f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, Object] = {}
        self.requests: list[Request] = []
        self.faults: list[Callable[[Request], int | str | None]] = []
        self.page = 1000
        self.lock = threading.RLock()
        self._generation = time.time_ns() // 1000

    def put(self, name: str, data: bytes, *, md5: bool = True) -> Object:
        with self.lock:
            self._generation += 1
            self.objects[name] = Object(data, self._generation, md5)
            return self.objects[name]

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed is no error of the server."""


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeGcs

    def log_message(self, *args: Any) -> None:
        pass

    def _any(self) -> None:
        self.close_connection = False
        body = self._body()
        try:
            self._route(body)
        except _Refused as refused:
            reasons = {404: "Not Found", 412: "Precondition Failed", 403: "denied by the test"}
            message = reasons.get(refused.status, "by the test")
            self._send_json({"error": {"code": refused.status, "message": message}}, refused.status)
        except ConnectionAbortedError:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self, body: bytes) -> None:
        split = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        self.query = query
        path = re.sub("^/(upload/|download/)?(storage/v1/)?", "", split.path)
        kind, bucket, rest = ([*path.split("/", 2), "", ""])[:3]
        if kind != "b" or unquote(bucket) != self.server.bucket:
            raise _Refused(404)
        name = unquote(rest.removeprefix("o").removeprefix("/").split("/rewriteTo/")[0])
        if "/upload/" in split.path:
            return self._upload(query, body)
        self._consider(name or query.get("prefix", ""), 0)
        with self.server.lock:
            if "/rewriteTo/" in rest:
                return self._copy(name, unquote(rest.rpartition("/o/")[2]))
            if not name:
                return self._list(query) if rest.startswith("o") else self._send_json({"name": bucket})
            found = self.server.objects.get(name)
            if found is None:
                raise _Refused(404)
            self._check_generation(query, found)
            if self.command == "DELETE":
                del self.server.objects[name]
                return self._send(204, b"")
        if query.get("alt") == "media":
            return self._media(found)
        return self._send_json(self._resource(name, found))

    def _consider(self, name: str, size: int) -> None:
        request = Request(self.command, name, size)
        with self.server.lock:
            self.server.requests.append(request)
        for fault in list(self.server.faults):
            answer = fault(request)
            if answer == CUT:
                raise ConnectionAbortedError
            if answer is not None:
                raise _Refused(int(answer))

    def _check_generation(self, query: dict[str, str], found: Object | None) -> None:
        now = found.generation if found else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            raise _Refused(412)
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            raise _Refused(304)
        if "generation" in query and int(query["generation"]) != now:
            raise _Refused(404)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType", "media")
        if kind not in ("media", "multipart"):
            raise _Refused(400)  # what is larger than a test's objects is uploaded in pieces
        name = query.get("name", "")
        if kind == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, described, content, *_ = body.split(b"--" + boundary)
            name = json.loads(described.split(b"\r\n\r\n", 1)[1])["name"]
            body = content.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
        self._consider(name, len(body))
        with self.server.lock:
            self._check_generation(query, self.server.objects.get(name))
            self._send_json(self._resource(name, self.server.put(name, body)))

    def _copy(self, name: str, to: str) -> None:
        if name not in self.server.objects:
            raise _Refused(404)
        self._check_generation(self.query, self.server.objects.get(to))
        made = self.server.put(to, self.server.objects[name].data)
        size = str(len(made.data))
        done = {"done": True, "objectSize": size, "totalBytesRewritten": size}
        self._send_json({"kind": "storage#rewriteResponse", **done, "resource": self._resource(to, made)})

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, Object | None] = {}
        for name in self.server.names(prefix):
            if not query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                continue
            rest = name[len(prefix) :]
            folded = delimiter and delimiter in rest
            key = prefix + rest.partition(delimiter)[0] + delimiter if folded else name
            entries[key] = None if folded else self.server.objects[name]
        after = query.get("pageToken", "")
        keys = [key for key in sorted(entries) if key > after]
        size = min(self.server.page, int(query.get("maxResults", 1000)))
        page = keys[:size]
        found: dict[str, Any] = {"kind": "storage#objects"}
        found["items"] = [self._resource(key, entries[key]) for key in page if entries[key]]
        found["prefixes"] = [key for key in page if not entries[key]]
        if len(keys) > size:
            found["nextPageToken"] = page[-1]
        self._send_json(found)

    def _media(self, found: Object) -> None:
        data, status, extra = found.data, 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and data:
            begin, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            if begin >= len(data):
                raise _Refused(416)
            extra["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        else:
            extra["X-Goog-Hash"] = f"md5={_md5(found.data)}"
        self._send(status, data, {**extra, "X-Goog-Generation": str(found.generation)})

    def _resource(self, name: str, found: Object) -> dict[str, Any]:
        resource = {
            "kind": "storage#object",
            "name": name,
            "bucket": self.server.bucket,
            "generation": str(found.generation),
            "metageneration": "1",
            "size": str(len(found.data)),
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }
        return resource | ({"md5Hash": _md5(found.data)} if found.md5 else {})

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@contextmanager
def serving(bucket: str = "bucket") -> Iterator[FakeGcs]:
    """A server that answers in threads of this process, until the end of the block."""
    with FakeGcs(bucket) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def standing_in(monkeypatch: Any, patience: float = 2.0) -> Iterator[FakeGcs]:
    """A server that stands in for Google's in this process and in those it starts."""
    from tokenlab.core import bucket

    with serving() as server:
        monkeypatch.setenv(bucket.EMULATOR, server.url)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        monkeypatch.setattr(bucket, "PATIENCE", patience)
        yield server
        if server.url in bucket._clients:
            bucket._clients.pop(server.url).close()
