"""A page to hum into: music from a melody and words, heard in the browser while it is made.

    python sample.py --serve            # then open http://127.0.0.1:7860

    POST /melody    a recording            -> its number, seconds and pitch classes
    POST /play      a wish, as JSON        -> lines of JSON as they come: place in the queue, sound, the take
    POST /stop      {"job": number}        -> what is made till then becomes a take
    GET  /takes, /take/7.wav, /melody/3.wav, /about, and the page, whose files are in serve/

Only this machine reaches it: it listens on the loopback address, and refuses requests that a page from
elsewhere makes a browser send (by Host, Origin and Sec-Fetch-Site). Recordings are bounded and read as audio
alone. One take is made at a time, the others wait in a queue; a tab that is closed ends its own. Takes lie in
a temporary folder until the server ends; of many, the oldest are forgotten.
"""
import contextlib
import functools
import io
import itertools
import json
import re
import signal
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from system.errors import UserError
from tools.studio import Studio, check_wish

LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")     # Host; any port, as it may be forwarded
PAGE = Path(__file__).parent / "serve"
STATIC = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"),
          "/page.js": ("page.js", "text/javascript"), "/pictures.js": ("pictures.js", "text/javascript")}
KINDS = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg", "mp3": "audio/mpeg",
         "json": "application/json"}
FILE = re.compile(r"/(take|melody)/([0-9]{1,9})\.(wav|flac|ogg|mp3|json)")
HEADERS = {     # nothing from elsewhere is loaded, nothing is put into a frame, no text is run as script
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "media-src blob:; img-src data:; form-action 'none'; base-uri 'none'; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin"}
MAX_UPLOAD, MAX_JSON = 2 ** 25, 2 ** 16     # bytes of a recording, of what the page asks for


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    timeout = 30    # seconds that a connection may say nothing, or read nothing
    server_version = "nanoMusicGen"

    def __init__(self, studio, *args):
        self.studio = studio
        super().__init__(*args)

    def do_GET(self):
        if not self.is_ours():
            return
        if self.path in STATIC:
            name, kind = STATIC[self.path]
            content = (PAGE / name).read_bytes()
            self.answer(200, content, f"{kind}; charset=utf-8")
        elif self.path == "/about":
            self.answer_json(200, self.studio.about())
        elif self.path == "/takes":
            self.answer_json(200, self.studio.list_takes())
        elif match := FILE.fullmatch(self.path):
            name, number, kind = match.groups()
            try:
                self.answer(200, self.studio.file(name, int(number), kind), KINDS[kind])
            except UserError as error:
                self.answer_json(404, {"error": str(error)})
        else:
            self.answer_json(404, {"error": "there is no such page"})

    def do_POST(self):
        limit = MAX_UPLOAD if self.path == "/melody" else MAX_JSON
        if not self.is_ours() or not self.is_short(limit):
            return
        try:
            if self.path == "/melody":
                with tempfile.NamedTemporaryFile() as file:
                    self.receive(file)
                    self.answer_json(200, self.studio.add_melody(file.name))
            elif self.path == "/play":
                self.play(check_wish(self.receive_json()))
            elif self.path == "/stop":
                self.studio.stop(self.receive_json().get("job"))
                self.answer_json(200, {})
            else:
                self.close_connection = True
                self.answer_json(404, {"error": "there is no such page"})
        except UserError as error:
            self.answer_json(400, {"error": str(error)})

    # --- what comes in ------------------------------------------------------------------------------------

    def is_ours(self) -> bool:
        """Whether a request comes from our own page or from no page; any other is refused.

        A page from elsewhere can make the browser send requests here, even under a name of its own that
        leads to 127.0.0.1: then Host tells.
        """
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")
        site = self.headers.get("Sec-Fetch-Site", "none")
        if LOCAL.fullmatch(host) and origin == f"http://{host}" and site in ("none", "same-origin"):
            return True
        self.close_connection = True
        self.answer_json(403, {"error": "only the page of this server may ask"})
        return False

    def is_short(self, limit: int) -> bool:
        """Whether a request tells its length and is within the limit; any other is refused unread."""
        length = self.headers.get("Content-Length", "")
        if re.fullmatch(r"[0-9]{1,15}", length) and int(length) <= limit:
            return True
        self.close_connection = True
        self.answer_json(413, {"error": f"too long: at most {limit / 2 ** 20:.2g} MB, and tell the length"})
        return False

    def receive(self, file):
        """The body of the request, into a file."""
        left = int(self.headers["Content-Length"])
        while left:
            block = self.rfile.read(min(left, 2 ** 16))
            if not block:
                raise ConnectionResetError("the upload ended early")
            file.write(block)
            left -= len(block)
        file.flush()

    def receive_json(self) -> dict:
        with io.BytesIO() as file:
            self.receive(file)
            body = file.getvalue()
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError("not a JSON object")
        return value

    # --- what goes out ------------------------------------------------------------------------------------

    def play(self, wish: dict):
        """Answers with the events of a wish as they come, a line of JSON each. A closed tab ends the work."""
        events = self.studio.play(wish)
        first = next(events)        # a full queue is told before the answer begins
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.closing(events):
            try:
                for event in itertools.chain([first], events):
                    self.send_event(event)
            except UserError as error:
                self.send_event({"error": str(error)})
        self.wfile.write(b"0\r\n\r\n")

    def send_event(self, event: dict):
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def answer_json(self, status: int, value):
        self.answer(status, json.dumps(value).encode(), "application/json")

    def answer(self, status: int, content: bytes, kind: str):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        """No line for every request."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):     # the tab is closed
            super().handle_error(request, address)


@contextlib.contextmanager
def open_server(model, loading: dict, port: int):
    """Inside, a server that is bound to the loopback address; its takes are gone afterwards. See `Studio`."""
    with tempfile.TemporaryDirectory(prefix="nanomusicgen-") as folder:
        studio = Studio(model, loading, folder)
        try:
            server = Server(("127.0.0.1", port), functools.partial(Handler, studio))
        except OSError as error:
            raise UserError(f"--serve {port}: this port cannot be had ({error.strerror}); give another one"
                            ) from None
        with server:
            yield server
        studio.close()


def serve(model, loading: dict, port: int):
    """Serves the page until Ctrl-C, or until it is told to end, which leaves no files behind either."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open_server(model, loading, port) as server:
        host, port = server.server_address
        print(f"http://{host}:{port}    Ctrl-C ends it; save the takes that you want to keep", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
