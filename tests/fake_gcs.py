"""The part of Cloud Storage's JSON API that gcsfs and tensorstore use, in memory, with one bucket named ``bucket``."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

BUCKET = "bucket"


class Storage:
    """Objects by name. Every write gives an object a new generation."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.Lock()
        self._generation = 1000

    def write(self, name: str, data: bytes) -> dict:
        self._generation += 1
        self.objects[name] = self._generation, bytes(data)
        return self.about(name)

    def about(self, name: str) -> dict:
        generation, data = self.objects[name]
        crc = base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
        times = {"updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z"}
        numbers = {"size": str(len(data)), "generation": str(generation), "metageneration": "1", "crc32c": crc}
        return {"kind": "storage#object", "bucket": BUCKET, "name": name, "id": f"{BUCKET}/{name}"} | times | numbers

    def listing(self, prefix: str = "", delimiter: str = "", **_: str) -> dict:
        items, prefixes = [], set()
        for name in sorted(self.objects):
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(BaseHTTPRequestHandler):
    """One request; answers as the service does, errors included."""

    protocol_version = "HTTP/1.1"
    storage: Storage

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has hung up
            self.close_connection = True

    def answer(self, status: int, body: dict | bytes | None = None, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        given = {"Content-Length": str(len(raw))} | (headers or {})
        if isinstance(body, dict):
            given = {"Content-Type": "application/json"} | given
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"code": status, "message": message}})

    def do_GET(self) -> None:
        with self.storage.lock:
            path, query = self._asked()
            if not (found := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", path)):
                return self.refuse(404, f"no {path}")
            bucket, objects, name = found.groups()
            if unquote(bucket) != BUCKET:
                return self.refuse(404, "The specified bucket does not exist.")
            if not objects:
                return self.answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
            if name is None:
                return self.answer(200, self.storage.listing(**query))
            name = unquote(name)
            if name not in self.storage.objects:
                return self.refuse(404, f"No such object: {BUCKET}/{name}")
            if query.get("alt") != "media":
                return self.answer(200, self.storage.about(name))
            self._content(name, query)

    def _content(self, name: str, query: dict[str, str]) -> None:
        generation, data = self.storage.objects[name]
        marks = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304, headers=marks)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self.refuse(412, "conditionNotMet")
        if not (span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            return self.answer(200, data, marks)
        first = int(span[1]) if span[1] else max(0, len(data) - int(span[2]))
        last = min(int(span[2]), len(data) - 1) if span[1] and span[2] else len(data) - 1
        if first > last:
            return self.answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
        self.answer(206, data[first : last + 1], marks | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def do_POST(self) -> None:
        path, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.storage.lock:
            if path.startswith("/batch/"):
                return self._batch(body)
            if path.startswith("/upload/"):
                if f"/b/{BUCKET}/" not in path:
                    return self.refuse(404, "The specified bucket does not exist.")
                return self._upload(query, body)
            moved = re.fullmatch(r"/storage/v1/b/[^/]+/o/([^/]+)/(moveTo|rewriteTo/b/[^/]+)/o/([^/]+)", path)
            if not moved:
                return self.refuse(501, f"no {path}")
            source, target = unquote(moved[1]), unquote(moved[3])
            if source not in self.storage.objects:
                return self.refuse(404, f"No such object: {BUCKET}/{source}")
            resource = self.storage.write(target, self.storage.objects[source][1])
            if moved[2] == "moveTo":
                del self.storage.objects[source]
                return self.answer(200, resource)
            self.answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": resource})

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        kind, name = query.get("uploadType"), query.get("name", "")
        if kind == "resumable" and "upload_id" not in query:
            token = str(len(self.storage.uploads))
            self.storage.uploads[token] = json.loads(body or b"{}").get("name", name), bytearray()
            host = self.headers["Host"]
            place = f"http://{host}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={token}"
            return self.answer(200, {}, {"Location": place})
        if kind == "resumable":
            name, held = self.storage.uploads[query["upload_id"]]
            held += body
            if self.headers.get("Content-Range", "/*").endswith("/*"):
                return self.answer(308, headers={"Range": f"bytes=0-{len(held) - 1}"})
            return self.answer(200, self.storage.write(name, held))
        if kind == "multipart":
            boundary = self.headers["Content-Type"].split("boundary=")[1].strip("'\"").encode()
            about, data = (part.split(b"\r\n\r\n", 1)[1][:-2] for part in body.split(b"--" + boundary)[1:3])
            name, body = json.loads(about).get("name", name), data
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != self.storage.objects.get(name, (0,))[0]:
            return self.refuse(412, "conditionNotMet")
        self.answer(200, self.storage.write(name, body))

    do_PUT = do_POST

    def do_DELETE(self) -> None:
        path, query = self._asked()
        with self.storage.lock:
            self.answer(self._delete(path, query))

    def _delete(self, path: str, query: dict[str, str]) -> int:
        name = unquote(path.split("/o/", 1)[1])
        if name not in self.storage.objects:
            return 404
        if query.get("ifGenerationMatch", str(self.storage.objects[name][0])) != str(self.storage.objects[name][0]):
            return 412
        del self.storage.objects[name]
        return 204

    def _batch(self, body: bytes) -> None:
        boundary, answers = "end-of-part", []
        for path in re.findall(r"^DELETE (\S+)", body.decode(), re.MULTILINE):
            status = self._delete(urlsplit(path).path, {})
            part = f"--{boundary}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} OK\r\n\r\n\r\n"
            answers.append(part)
        text = "".join(answers) + f"--{boundary}--"
        self.answer(200, text.encode(), {"Content-Type": f"multipart/mixed; boundary={boundary}"})

    def _asked(self) -> tuple[str, dict[str, str]]:
        split = urlsplit(self.path)
        return split.path, {name: values[0] for name, values in parse_qs(split.query).items()}


def serve(port: int = 0) -> ThreadingHTTPServer:
    """The service in a thread of its own, on ``server_port``; ``shutdown`` ends it."""
    handler = type("OneStorage", (Handler,), {"storage": Storage()})
    server = ThreadingHTTPServer(("localhost", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
