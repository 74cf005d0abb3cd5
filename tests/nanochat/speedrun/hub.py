"""A server on this machine that speaks as much of the hub's protocol as a download needs, and fails on request."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """files: "owner/name/path" → content. faults: path → list of words, one used up by each GET of the file:
    "cut" sends half, "slow" drips, "wrong" other bytes, "404", "500", "429" as statuses; "hold" waits for `release`.
    status: that of every answer, if it is not 0."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.gets, self.status = files, {}, [], 0
        self.release = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def do_CONNECT(self):  # as a proxy
                self.answer(body=False)

            def answer(self, body: bool):
                if hub.status:
                    self.close_connection = True
                    return self.send(hub.status, b"", {"Connection": "close"}, body)
                path = unquote(urlsplit(self.path).path)
                if path.startswith("/api/datasets/") and "/tree/" in path:
                    repo = path.removeprefix("/api/datasets/").partition("/tree/")[0]
                    names = [name.removeprefix(repo + "/") for name in hub.files if name.startswith(repo + "/")]
                    tree = [
                        {"type": "file", "path": n, "size": len(hub.files[f"{repo}/{n}"]), "oid": "0"} for n in names
                    ]
                    return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
                name = path.removeprefix("/datasets/").replace("/resolve/main/", "/").lstrip("/")
                if name not in hub.files:
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                self.file(name, hub.files[name], body)

            def file(self, name: str, content: bytes, body: bool):
                act = ""
                if body:
                    hub.gets.append((name, self.headers.get("Range")))
                    act = hub.faults[name].pop(0) if hub.faults.get(name) else ""
                if act in ("404", "429", "500"):
                    code = {"X-Error-Code": "EntryNotFound"} if act == "404" else {"Retry-After": "1"}
                    return self.send(int(act), b"", code, body)
                digest = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                if act == "hold":
                    hub.release.wait(600)
                if act == "wrong":
                    content = bytes(len(content))
                status, first = 200, 0
                if body and (asked := self.headers.get("Range")):
                    first = int(asked.removeprefix("bytes=").partition("-")[0])
                    status = 206
                    headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                self.send(status, content[first:], headers, body, act)

            def send(self, status: int, content: bytes, headers: dict, body: bool, act: str = ""):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if not body:
                    return
                if act == "cut":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                elif act == "slow":
                    for start in range(0, len(content), max(1, len(content) // 20)):
                        self.wfile.write(content[start : start + max(1, len(content) // 20)])
                        self.wfile.flush()
                        time.sleep(0.1)
                else:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
