"""A Google Cloud Storage bucket in memory, on loopback: enough of its JSON interface for gcsfs,
TensorStore and Orbax.

with ObjectStore() as store:
    subprocess.run(command, env=os.environ | store.environment)  # may use gs://bucket/...
    store.objects["run/config.json"]  # what it left there: to read, replace or delete
"""

import base64
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c

PAGE = 1000  # names in one answer to a listing, at most


class Refused(Exception):
    """Becomes an answer with an error status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclasses.dataclass(frozen=True)
class Version:
    """Content that a name had at some time."""

    name: str
    data: bytes
    generation: int
    stamp: str = dataclasses.field(
        default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    )

    def resource(self) -> dict:
        """What clients are told about it."""
        return {
            "kind": "storage#object",
            "name": self.name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "timeCreated": self.stamp,
            "updated": self.stamp,
            "md5Hash": base64.b64encode(hashlib.md5(self.data).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(self.data).digest()).decode(),
        }


class ObjectStore:
    """One bucket and the server that gives access to it; a context manager.

    Args:
        bucket: the only bucket there is.
        page: names in one answer to a listing, at most.

    Attributes:
        objects: content by name. Whatever is assigned or deleted here is a change like any other
            for clients.
        requests: methods and paths, in the order of their arrival.
        before_upload: called with name and content before something is stored. A status that it
            returns becomes the answer, and nothing is stored.
        bucket_readable: whether clients may see the bucket itself (`storage.buckets.get`), as well
            as its objects.
    """

    def __init__(self, bucket: str = "bucket", page: int = PAGE):
        self.bucket, self.page, self.bucket_readable = bucket, page, True
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.before_upload: Callable[[str, bytes], int | None] | None = None
        self.begun: dict[
            str, tuple[str, dict, bytearray]
        ] = {}  # resumable uploads: name, query, content up to now
        self._versions: dict[str, Version] = {}
        self._generation = int(time.time() * 1e6)
        self._lock = threading.RLock()
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Of the server."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a process here instead of to Google, without credentials or a
        metadata server.
        """
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs and google-cloud-storage
            "FSSPEC_GCS": json.dumps({"token": "anon"}),
            # would ask over gRPC what kind of bucket it is
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore sends it and looks for no other
            "GCE_METADATA_ROOT": "127.0.0.1:9",
            "NO_GCE_CHECK": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @contextlib.contextmanager
    def refused_uploads(
        self, pattern: str = "*", status: int = 403, after_bytes: int = 0
    ) -> Iterator[None]:
        """Answer uploads of names that match `pattern` with `status`, once `after_bytes` of them
        have been stored.

        403 is final; after 429 and 5xx clients try again, TensorStore for many minutes.
        """
        left = after_bytes

        def refuse(name: str, data: bytes) -> int | None:
            nonlocal left
            matches = fnmatch.fnmatchcase(name, pattern)
            left -= len(data) if matches else 0
            return status if matches and left < 0 else None

        with self._hooked(refuse):
            yield

    @contextlib.contextmanager
    def held_uploads(self, pattern: str) -> Iterator[threading.Event]:
        """Let uploads of names that match `pattern` wait; the event is set when the first one does.

        At the end they get the answer 503: who is still there tries again, what a killed process
        sent is lost.
        """
        reached, released = threading.Event(), threading.Event()

        def hold(name: str, data: bytes) -> int | None:
            if not fnmatch.fnmatchcase(name, pattern):
                return None
            reached.set()
            released.wait()
            return 503

        with self._hooked(hold):
            try:
                yield reached
            finally:
                released.set()

    @contextlib.contextmanager
    def _hooked(self, hook: Callable[[str, bytes], int | None]) -> Iterator[None]:
        self.before_upload = hook
        try:
            yield
        finally:
            self.before_upload = None

    def find(self, name: str, query: dict[str, str]) -> Version | None:
        """What a name holds now, or None; conditions in the query that do not hold are refused."""
        with self._lock:
            version, data = self._versions.get(name), self.objects.get(name)
            if data is None:
                version = self._versions.pop(name, None) and None
            elif version is None or version.data is not data:  # a test has changed it
                version = self._store(name, data)
        generation = version.generation if version else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get("ifGenerationNotMatch") == str(generation):
            raise Refused(304, "Not modified")
        return version

    def get(self, name: str, query: dict[str, str]) -> Version:
        """What a name holds now; refused where it holds nothing."""
        version = self.find(name, query)
        if version is None:
            raise Refused(404, f"No such object: {self.bucket}/{name}")
        return version

    def _store(self, name: str, data: bytes) -> Version:
        self._generation += 1
        self.objects[name] = data
        self._versions[name] = version = Version(name, data, self._generation)
        return version

    def put(self, name: str, data: bytes, query: dict[str, str]) -> dict:
        """Store an upload that has arrived whole."""
        status = self.before_upload(name, data) if self.before_upload else None
        if status:
            raise Refused(status, f"The test refuses to store {name}.")
        with self._lock:
            self.find(name, query)
            return self._store(name, data).resource()

    def delete(self, name: str, query: dict[str, str]) -> None:
        """Forget an object, or that generation of it."""
        with self._lock:
            generation = str(self.get(name, query).generation)
            if query.get("generation", generation) != generation:
                raise Refused(404, f"No such object: {self.bucket}/{name}#{query['generation']}")
            del self.objects[name]

    def listing(self, query: dict[str, str]) -> dict:
        """One page of names and folders, in their order."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, last = (
            max(query.get("startOffset", ""), query.get("pageToken", "")),
            query.get("endOffset"),
        )
        size = min(int(query.get("maxResults", PAGE)), self.page)
        answer, items, folders = {"kind": "storage#objects"}, [], []
        with self._lock:
            for name in sorted(self.objects):
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                key = name if cut < 0 else name[: cut + len(delimiter)]
                if (
                    not name.startswith(prefix)
                    or key < first
                    or (last and name >= last)
                    or key in folders
                ):
                    continue
                if len(items) + len(folders) == size:
                    answer["nextPageToken"] = key
                    break
                if cut < 0:
                    items.append(self.get(name, {}).resource())
                else:
                    folders.append(key)
        return (
            answer
            | ({"items": items} if items else {})
            | ({"prefixes": folders} if folders else {})
        )


class _Server(ThreadingHTTPServer):
    """Many connections at once, and no complaint about clients that are gone."""

    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def __init__(self, store: ObjectStore):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store

    def handle_error(self, request, client_address):
        pass


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1
    server: _Server

    def do_GET(self):
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [
            unquote(part)
            for part in re.sub("^(/upload|/download)?/(storage/v1/)?", "", url.path).split("/")
        ]
        self.store = self.server.store
        self.store.requests.append(f"{self.command} {unquote(url.path)}")
        try:
            if parts[:2] != ["b", self.store.bucket]:
                raise Refused(404, "The specified bucket does not exist.")
            if url.path.startswith("/upload/"):
                self._upload(query, body)
            elif len(parts) < 4:
                self._bucket(parts[2:] == ["o"], query)
            else:
                self._object(parts[3], parts[4:], query)
        except Refused as error:
            self._send(error.status, {"error": {"code": error.status, "message": error.message}})

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format, *args):
        pass

    def _bucket(self, objects: bool, query: dict[str, str]) -> None:
        if self.command != "GET" or not (objects or self.store.bucket_readable):
            raise Refused(403, "The bucket itself is not yours.")
        self._send(
            200,
            self.store.listing(query)
            if objects
            else {"kind": "storage#bucket", "name": self.store.bucket},
        )

    def _object(self, name: str, action: list[str], query: dict[str, str]) -> None:
        """Answer about an object; `action` is what follows its name, and ends with the name that a
        copy shall have.
        """
        if self.command == "DELETE":
            self.store.delete(name, query)
            self._send(204)
        elif action:
            data = bytes(
                bytearray(self.store.get(name, {}).data)
            )  # another object, so that it is another generation
            resource = self.store.put(action[-1], data, query)
            if action[0] == "moveTo":
                self.store.delete(name, {})
            self._send(
                200, {"done": True, "resource": resource} if action[0] == "rewriteTo" else resource
            )
        elif query.get("alt") == "media":
            self._media(self.store.get(name, query))
        else:
            self._send(200, self.store.get(name, query).resource())

    def _media(self, version: Version) -> None:
        data, size, status = version.data, len(version.data), 200
        headers = {"X-Goog-Generation": version.generation}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, stop = wanted.groups()
            first = int(start) if start else max(0, size - int(stop))
            last = min(int(stop), size - 1) if start and stop else size - 1
            if first > last:
                raise Refused(416, "The requested range is not satisfiable: InvalidRange")
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._send(status, data, headers)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            self._resume(query["upload_id"], body)
        elif query["uploadType"] == "resumable":
            key = uuid.uuid4().hex
            self.store.begun[key] = (
                query.get("name") or json.loads(body)["name"],
                query,
                bytearray(),
            )
            objects = f"{self.store.url}/upload/storage/v1/b/{self.store.bucket}/o"
            location = f"{objects}?uploadType=resumable&upload_id={key}"
            self._send(200, headers={"Location": location})
        elif query["uploadType"] == "multipart":
            name, data = _parts(self.headers["Content-Type"], body)
            self._send(200, self.store.put(name, data, query))
        else:
            self._send(200, self.store.put(query["name"], body, query))

    def _resume(self, key: str, body: bytes) -> None:
        """Add to a resumable upload; `Content-Range` says where, and the whole size once that is
        known.
        """
        if self.command == "DELETE":
            self.store.begun.pop(key, None)
            raise Refused(499, "The upload was cancelled.")
        if key not in self.store.begun:
            raise Refused(410, "There is no such upload.")
        name, query, data = self.store.begun[key]
        start, size = re.fullmatch(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]
        ).groups()
        if start:
            data[int(start) :] = body
        if size == str(len(data)):
            self._send(200, self.store.put(name, bytes(data), query))
            del self.store.begun[key]
        else:
            self._send(308, headers={"Range": f"bytes=0-{len(data) - 1}"} if data else {})

    def _send(self, status: int, content: bytes | dict = b"", headers: dict | None = None) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        if status not in (204, 304):
            self.send_header(
                "Content-Type",
                "application/json" if isinstance(content, dict) else "application/octet-stream",
            )
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)


def _parts(content_type: str, body: bytes) -> tuple[str, bytes]:
    """The name and the content in a multipart upload."""
    boundary = b"--" + re.search('boundary="?([^";]+)', content_type).group(1).encode()
    _, description, content = body[: body.rindex(boundary)].split(boundary, 2)
    line = b"\r\n" if description.startswith(b"\r\n") else b"\n"
    return json.loads(description.partition(line * 2)[2])["name"], content.partition(line * 2)[
        2
    ].removesuffix(line)
