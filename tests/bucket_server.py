"""A bucket that lives in this process: as much of Cloud Storage's JSON API, over HTTP, as gcsfs, TensorStore and Orbax ask for.

Objects have generations, and what is asked on the condition of one (`ifGenerationMatch`) is refused where another is there, since checkpoints
rely on it.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

OBJECT = re.compile(
    r"(?:/download|/upload)?/storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<name>[^/]+))?)?(?:/rewriteTo/b/bucket/o/(?P<to>[^/]+))?$"
)


class Bucket:
    """Objects by name: (generation, bytes)."""

    def __init__(self):
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.open_uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}

    def refuses(self, name: str, query: dict[str, str]) -> bool:
        """Whether a condition of the request is not met."""
        wanted = query.get("ifGenerationMatch")
        return wanted is not None and self.objects.get(name, (0, b""))[0] != int(wanted)

    def put(self, name: str, content: bytes, query: dict[str, str]) -> tuple[int, Any]:
        with self.lock:
            if self.refuses(name, query):
                return 412, {}
            self.objects[name] = (next(self.numbers), content)
            return 200, self.described(name)

    def described(self, name: str) -> dict[str, Any]:
        generation, content = self.objects[name]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        told = {"kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(content)), "generation": str(generation)}
        return {**told, "metageneration": "1", "md5Hash": digest, "etag": digest, "id": f"bucket/{name}/{generation}", **times}

    def listed(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, cut, items, folders = query.get("prefix", ""), query.get("delimiter", ""), [], set()
        with self.lock:
            for name in sorted(name for name in self.objects if name.startswith(prefix)):
                head, found, _ = name[len(prefix) :].partition(cut) if cut else (name, "", "")
                if found:
                    folders.add(prefix + head + cut)
                else:
                    items.append(self.described(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are two writes
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0" if status in (204, 304) else str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            with contextlib.suppress(ConnectionError):  # gcsfs leaves answers that it no longer wants
                self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_all(self) -> None:
        url, body = urlsplit(self.path), self.body()
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path.startswith("/batch"):
            return self.batch(body)
        match = OBJECT.match(url.path)
        if match is None:
            return self.answer(404, {})
        name = unquote(match["name"] or "")
        if match["bucket"] != "bucket":
            return self.answer(404, {})
        if url.path.startswith("/upload"):
            return self.upload(query, body)
        if match["to"]:
            return self.rewrite(name, unquote(match["to"]), query)
        if self.command == "DELETE":
            return self.answer(*self.delete(name, query))
        if not name:
            whole = {"kind": "storage#bucket", "name": "bucket", "id": "bucket", "locationType": "region"}
            return self.answer(200, self.server.bucket.listed(query) if url.path.endswith("/o") else whole)
        return self.read(name, query, media=query.get("alt") == "media")

    def read(self, name: str, query: dict[str, str], *, media: bool) -> None:
        bucket = self.server.bucket
        with bucket.lock:
            there, refused = bucket.objects.get(name), bucket.refuses(name, query)
            told = bucket.described(name) if there else {}
        if there is None:
            return self.answer(404, {"error": {"code": 404, "message": f"No such object: bucket/{name}"}})
        generation, content = there
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        if refused:
            return self.answer(412, {})
        if not media:
            return self.answer(200, told)
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        if asked is None:
            return self.answer(200, content, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return self.answer(416, b"", **headers)
        return self.answer(206, content[first : last + 1], **headers, **{"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def upload(self, query: dict[str, str], body: bytes) -> None:
        bucket, kind = self.server.bucket, query.get("uploadType")
        if kind == "media":
            return self.answer(*bucket.put(query["name"], body, query))
        if kind == "multipart":
            boundary = re.search(r"boundary=\"?([^\";]+)", self.headers["Content-Type"])[1].encode()
            told, content = (part.split(b"\n\n", 1)[1].removesuffix(b"\n") for part in body.split(b"--" + boundary)[1:3])
            return self.answer(*bucket.put(json.loads(told)["name"], content, query))
        if "upload_id" not in query:
            number = str(next(bucket.numbers))
            name = query.get("name") or json.loads(body)["name"]
            bucket.open_uploads[number] = name, query, bytearray()
            return self.answer(
                200, b"", Location=f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={number}"
            )
        name, conditions, held = bucket.open_uploads[query["upload_id"]]
        held += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self.answer(308, b"", Range=f"bytes=0-{len(held) - 1}")
        return self.answer(*bucket.put(name, bytes(held), conditions))

    def rewrite(self, name: str, to: str, query: dict[str, str]) -> None:
        bucket = self.server.bucket
        if name not in bucket.objects:
            return self.answer(404, {})
        status, told = bucket.put(to, bucket.objects[name][1], query)
        return self.answer(status, {"kind": "storage#rewriteResponse", "done": True, "resource": told})

    def delete(self, name: str, query: dict[str, str]) -> tuple[int, Any]:
        bucket = self.server.bucket
        with bucket.lock:
            if bucket.refuses(name, query):
                return 412, {}
            return (204, b"") if bucket.objects.pop(name, None) else (404, {"error": {"code": 404, "message": "No such object"}})

    def batch(self, body: bytes) -> None:
        """Deletions, of which gcsfs sends many in one request."""
        parts = []
        for number, target in enumerate(re.findall(rb"DELETE (\S+)", body), 1):
            url = urlsplit(target.decode())
            status, _ = self.delete(unquote(OBJECT.match(url.path)["name"]), {})
            parts.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\nHTTP/1.1 {status} Done\r\n\r\n\r\n"
            )
        return self.answer(200, ("".join(parts) + "--batch--\r\n").encode(), Content_Type="multipart/mixed; boundary=batch")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_all


class BucketServer:
    """Serves the bucket named `bucket` while it is open; `environment` is what programs that are to use it need."""

    def __enter__(self) -> "BucketServer":
        self._server = ThreadingHTTPServer(("localhost", 0), Handler)
        self._server.daemon_threads = True
        self.bucket = self._server.bucket = Bucket()  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://localhost:{self._server.server_address[1]}"
        self.environment = {
            **{"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url},
            **{"NO_GCE_CHECK": "true", "FSSPEC_GS_TOKEN": "anon"},  # there is no account
            **{"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},  # and one kind of bucket
        }
        return self

    @contextlib.contextmanager
    def used_here(self) -> Iterator[Bucket]:
        """This process's own libraries ask the server too."""
        import fsspec
        import gcsfs

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # its environment is read once
            gcsfs.GCSFileSystem.clear_instance_cache()
            yield self.bucket
        gcsfs.GCSFileSystem.clear_instance_cache()

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
