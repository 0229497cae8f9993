"""tools/export.py --push with the real huggingface_hub client, against a hub on loopback."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import train
from test_export import SAVED, command


class Handler(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs: files above 10 kB go to large storage, the others into the commit."""
    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            answer = dict(url=f"{hub.address}/me/model")
        elif self.path == "/api/models/me/model/preupload/main":
            answer = dict(files=[dict(path=file["path"], uploadMode="lfs" if file["size"] > 10_000 else "regular",
                                      shouldIgnore=False) for file in json.loads(body)["files"]])
        elif self.path == "/me/model.git/info/lfs/objects/batch":
            answer = dict(objects=[one | dict(actions=dict(upload=dict(href=f"{hub.address}/large/{one['oid']}")))
                                   for one in json.loads(body)["objects"]])
        elif self.path == "/api/models/me/model/commit/main":
            hub.commit = [json.loads(line) for line in body.splitlines()]
            answer = dict(commitUrl=f"{hub.address}/me/model/commit/{'0' * 40}", commitOid="0" * 40)
        else:
            answer = {}
        self.answer(hub.status, json.dumps(answer).encode())

    def do_PUT(self):
        name = self.path.rpartition("/")[2]
        self.server.large[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"")

    def answer(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.slow
def test_push_uploads_the_folder_and_says_where_it_failed(text, tmp_path):
    assert train(*SAVED, *text, "--save_every", 20, "--log_dir", tmp_path, "--run_id", "r") == 0
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address, hub.status, hub.requests, hub.large = f"http://127.0.0.1:{hub.server_port}", 200, [], {}
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    variables = dict(HF_ENDPOINT=hub.address, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_TOKEN="hf_test",
                     HF_HOME=str(tmp_path / "home"))
    done = command(tmp_path / "r", "--out", tmp_path / "good", "--push", "me/model", **variables)
    assert done.returncode == 0 and f"{hub.address}/me/model/commit" in done.stdout, done.stderr
    there = {}
    for line in hub.commit[1:]:
        value = line["value"]
        content = hub.large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
        there[value["path"]] = content
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()} and hub.large
    assert all(token == "Bearer hf_test" for _, token in hub.requests)
    hub.status = 401
    done = command(tmp_path / "r", "--out", tmp_path / "other", "--push", "me/model", **variables)
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: --push me/model: ")
    assert "401" in line and "hf upload me/model" in line
    hub.shutdown()
    hub.server_close()
