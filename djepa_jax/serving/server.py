"""`--mode=serve`: a page in the browser to play with a trained model, on this machine alone.

One job runs at a time, the others wait in a line of bounded length. The answer to a job is a stream
of events, which ends when it is done or when its browser goes away.
"""

import collections
import contextlib
import http.server
import json
import pathlib
import secrets
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from djepa_jax.config.experiment import Experiment
from djepa_jax.runtime.errors import UserError, expected
from djepa_jax.sampling.sample_to_npz import check_pictures
from djepa_jax.serving.studio import RequestError, Studio, load_model

PAGE = pathlib.Path(__file__).with_name("assets") / "page.html"
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; connect-src 'self'; base-uri 'none'; "
    "style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; form-action 'none'; "
    "frame-ancestors 'none'"
)
LOCAL_NAMES = ("localhost", "127.0.0.1")
MAX_BODY = 8 * 2**20  # bytes of a request
MAX_WAITING = 8  # jobs behind the one that runs
RETRY_SECONDS = 10
SILENCE = 30  # seconds after which a browser that neither sends nor takes anything is given up
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
HEADERS |= {"X-Content-Type-Options": "nosniff"}


class Gone(Exception):
    """Nobody is there any more to take what is made."""


class Line:
    """Those who wait, one behind the other; the first is served."""

    def __init__(self, longest: int):
        self._longest, self._places = longest, collections.deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def place(self) -> Iterator[Callable[[], int]]:
        """A place at the end, as a function that says, within a second, how many are before it.

        Raises:
            RequestError: the line is full.
        """
        place = object()
        with self._changed:
            if len(self._places) > self._longest:
                raise RequestError("too many are waiting; try again in a few seconds.", 503)
            self._places.append(place)

        def ahead() -> int:
            with self._changed:
                before = self._places.index(place)
                self._changed.wait_for(lambda: self._places.index(place) < max(before, 1), 1)
                return self._places.index(place)

        try:
            yield ahead
        finally:
            with self._changed:
                self._places.remove(place)
                self._changed.notify_all()

    def wait_for_end(self) -> None:
        """Return when nobody is left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._places)


class Server(http.server.ThreadingHTTPServer):
    """The address, the studio behind it (given when it is ready), and the line in front."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, max_waiting: int = MAX_WAITING):
        self.studio: Studio | None = None
        self.host, self.line, self.ending = host, Line(max_waiting), threading.Event()
        self.reading = threading.Lock()  # pictures may be large: one at a time
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.host}:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """Say nothing of connections that were lost."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    timeout = SILENCE
    error_message_format, error_content_type = "%(message)s\n", "text/plain"

    def version_string(self) -> str:
        """Whose answer it is; no versions."""
        return "djepa"

    def log_message(self, *args) -> None:
        """Requests are not written down."""

    def do_GET(self) -> None:
        """The page, and what it has to know."""
        self._answer({"/": self._page, "/model": self._model})

    def do_POST(self) -> None:
        """A job, or a picture to be read."""
        self._answer({"/samples": self._samples, "/picture": self._picture})

    def _answer(self, actions: dict[str, Callable[[], None]]) -> None:
        try:
            self._check_caller()
            action = actions.get(self.path.partition("?")[0])
            if action is None:
                raise RequestError("there is nothing here; the page is at /.", 404)
            action()
        except UserError as error:
            status = getattr(error, "status", 400)
            headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {}
            self._send(status, "text/plain", f"{error}\n".encode(errors="replace"), headers)
            self._drain()

    def _check_caller(self) -> None:
        """Refuse pages of others, some of which have their own name lead to this machine."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        is_local = self.server.host in LOCAL_NAMES
        if is_local and host.partition(":")[0] not in LOCAL_NAMES:
            raise RequestError(f"this page is at {self.server.url} alone.", 403)
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestError("other pages may not ask for anything here.", 403)

    def _page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        html = PAGE.read_text("utf-8").replace("{{nonce}}", nonce).encode()
        self._send(200, "text/html", html, {"Content-Security-Policy": POLICY.format(nonce=nonce)})

    def _model(self) -> None:
        self._send(200, "application/json", json.dumps(self.server.studio.describe()).encode())

    def _picture(self) -> None:
        studio = self.server.studio
        data = self._body("application/octet-stream")
        with self.server.reading:
            picture = studio.address(studio.read_picture(data))
        self._send(200, "application/json", json.dumps({"picture": picture}).encode())

    def _samples(self) -> None:
        data = self._body("application/json")
        try:
            request = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request is not JSON ({error}).") from error
        with self.server.reading:
            job = self.server.studio.check(request)
        with self.server.line.place() as ahead, contextlib.suppress(Gone):
            self._begin(200, "text/event-stream")
            while count := ahead():
                self._event({"ahead": count})
            try:
                self.server.studio.make(job, self._event)
            except Gone:
                raise
            except Exception as error:
                text = expected(error)
                if text is None:
                    traceback.print_exc()
                    text = "this failed; where the page was started it says why."
                self._event({"error": text})

    def _body(self, kind: str) -> bytes:
        """What comes with a request, of a type that pages of others cannot send unasked."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != kind:
            raise RequestError(f"this takes {kind}.", 415)
        if not (length.isascii() and length.isdigit()):
            raise RequestError("a request is to say how long it is.", 411)
        if len(length) > 9 or int(length) > MAX_BODY:
            raise RequestError(f"a request has at most {MAX_BODY:,} bytes; send fewer.", 413)
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise RequestError("the request is cut off.")
        return data

    def _drain(self) -> None:
        """Take what still comes, in bounds: else the answer would be lost with the connection."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(1024):
                if not self.rfile.read1(2**16):
                    return

    def _event(self, event: dict) -> None:
        """Send an event; raises Gone if there is nobody who takes it."""
        try:
            if self._has_left() or self.server.ending.is_set():
                raise Gone
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        except OSError as error:
            raise Gone from error

    def _has_left(self) -> bool:
        """Whether the browser has closed the connection, which writing may not tell at once."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(SILENCE)

    def _send(self, status: int, kind: str, data: bytes, headers: dict | None = None) -> None:
        self._begin(status, kind, {"Content-Length": len(data)} | (headers or {}))
        self.wfile.write(data)

    def _begin(self, status: int, kind: str, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, text in (HEADERS | (headers or {})).items():
            self.send_header(name, text)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()


def open_server(host: str, port: int, **options) -> Server:
    """A server that has its address; UserError if it cannot be had."""
    try:
        return Server(host, port, **options)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"port {port} of {host} cannot be had ({reason}); name another, such as --port=8081."
        raise UserError(text) from error


def run_serve(experiment: Experiment, workdir: str, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the address cannot be had.
        CheckpointError, ConfigError: there is no such model, or no autoencoder for its latents.
    """
    check_pictures(experiment, "", latents_only=False)
    with open_server(host, port) as server:
        server.studio = studio = Studio(*load_model(experiment, workdir), workdir)
        print("compiling the program of the default settings", flush=True)
        studio.make(studio.check({}), lambda event: None)
        if host not in LOCAL_NAMES:
            print(f"WARNING: whoever reaches {host} can use this machine; there is no password.")
        print(f"open {server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ending after the step that is being made", flush=True)
        server.ending.set()
        server.line.wait_for_end()
