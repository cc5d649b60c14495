"""As much of the hub's HTTP interface as an upload of its own client needs, on a port of this machine."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "x" * 34


class FakeHub(ThreadingHTTPServer):
    """As much of the hub as an upload needs: repositories, branches, small files in the commit, weights by LFS."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.repos: dict[str, dict] = {}
        self.branches: list[str] = []
        self.commits: list[dict] = []
        self.lfs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Requests(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *arguments) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        self.server.lfs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        found = self.server.repos.get(name)
        self._answer({"id": name, **found} if found else {"error": "Repository not found"}, 200 if found else 404)

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in hub.repos
            hub.repos.setdefault(name, {"private": asked.get("private") or asked.get("visibility") == "private"})
            return self._answer({"url": f"{hub.url}/{name}"}, 409 if there else 200)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            modes = [
                {"path": one["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            return self._answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if "/branch/" in path:
            hub.branches.append(path.rpartition("/")[2])
            return self._answer({})
        assert "/commit/" in path, path
        lines = [json.loads(line) for line in body.splitlines()]
        hub.commits.append({"branch": path.rpartition("/")[2], **lines[0]["value"]})
        for line in lines[1:]:
            value = line["value"]
            content = base64.b64decode(value["content"]) if line["key"] == "file" else hub.lfs[value["oid"]]
            hub.files[value["path"]] = content
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        return self._answer({"commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})
