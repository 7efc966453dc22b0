"""ClickHouse's engine (package chdb) behind the part of its HTTP interface that the gateway's export uses.

The statements are parsed and run by the engine itself; only HTTP is spoken here. `POST /fail` with `down`, `lost` or
`ok`: answers 503, runs the statement and closes without an answer, or works. Prints its port, then serves until stdin
ends."""

import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from chdb import session

state = {"mode": "ok"}
directory = tempfile.TemporaryDirectory()
engine = session.Session(directory.name)
one_at_a_time = threading.Lock()


def run(query, body):
    settings = [f"{name}={value if value.isdigit() else repr(value)}" for name, value in query.items() if name != "query"]
    statement = query.get("query", "")
    if not statement:
        return engine.query(body).bytes()
    if " FORMAT " in statement and statement.startswith("INSERT"):
        insert, form = statement.split(" FORMAT ", 1)
        setting = " SETTINGS " + ", ".join(settings) if settings else ""
        return engine.query(f"{insert}{setting} FORMAT {form}\n{body}").bytes()
    return engine.query(statement + body, "TabSeparated").bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0))) if "content-length" in self.headers else self.chunks()
        url = urlsplit(self.path)
        if url.path == "/fail":
            state["mode"] = body.decode()
            return self.answer(200, b"")
        query = dict(parse_qsl(url.query))
        is_test = "x-test" in self.headers
        if state["mode"] == "down" and not is_test:
            return self.answer(503, b"Code: 999. The server is down for the test\n")
        try:
            with one_at_a_time:
                result = run(query, body.decode())
        except Exception as error:
            return self.answer(400, str(error).encode())
        if state["mode"] == "lost" and not is_test and query:
            state["mode"] = "ok"
            self.close_connection = True
            return None
        return self.answer(200, result)

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
server.serve_forever()
