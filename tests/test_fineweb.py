"""data/fineweb.py with the real huggingface_hub client, against a hub on loopback that fails in many ways."""

import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat

import numpy as np
import pytest
from conftest import ROOT

VAL, *TRAIN = "fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 9))
SITECUSTOMIZE = """import os, shutil, time
if os.environ["WAITS"] == "no":     # neither the program nor the client
    time.sleep = lambda seconds: None
if "FREE" in os.environ:
    shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(0, 0, int(os.environ["FREE"]))
"""


class Hub(ThreadingHTTPServer):
    """Serves `files`, {name: bytes}, as a dataset of the hub; those in `without_sha256` have a git hash alone.

    `faults[name]` yields what goes wrong with request after request for the bytes of a file, and `faults["list"]` for
    the list of files: a status, or a word of `Handler.do_GET`. `gets` lists (name, first byte) of requests for bytes.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.without_sha256, self.gets, self.num_requests = {}, {}, set(), [], 0
        self.holding, self.release, self.out = threading.Event(), threading.Event(), folder / "out"
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.variables = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_DISABLE_XET": "1",
                          "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "100", "WAITS": "no",
                          "HF_HOME": str(folder / "home"), "PYTHONPATH": str(folder)}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        pass    # a client that was killed

    def add(self, *names, tokens=1000):
        for name in names:      # the files of the hub have neither a vocabulary nor a checksum in their header
            random = np.random.default_rng(list(name.encode()))
            header = struct.pack("<iii", 20240520, 1, tokens).ljust(1024, b"\0")
            self.files[name] = header + random.integers(0, 50257, size=tokens).astype("<u2").tobytes()

    def start(self, *arguments, **variables) -> subprocess.Popen:
        command = [sys.executable, ROOT / "data/fineweb.py", "--data_dir", self.out, *map(str, arguments)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**self.variables, **variables})

    def fetch(self, *arguments, **variables) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        _, stderr = process.communicate(timeout=100)
        assert "Traceback" not in stderr
        return process.returncode, stderr

    def there(self) -> list[str]:
        """The names in the output folder, whose shards must be those of the hub."""
        assert all(path.read_bytes() == self.files[path.name] for path in self.out.glob("*.bin"))
        return sorted(path.name for path in self.out.iterdir() if path.name != ".lock")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in dict(headers, Content_Length=len(body)).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def facts(self, name: str) -> dict:
        """What both lists of the hub state of a file."""
        data = self.server.files[name]
        digest = hashlib.sha256(data).hexdigest()
        lfs = None if name in self.server.without_sha256 else dict(oid=digest, sha256=digest, size=len(data), pointerSize=1)
        return dict(type="file", path=name, rfilename=name, size=len(data), oid="1" * 40, lfs=lfs)

    def do_HEAD(self):
        facts = self.facts(self.path.rpartition("/")[2])
        self.answer(200, X_Repo_Commit="0" * 40, X_Linked_Etag=(facts["lfs"] or facts)["oid"], X_Linked_Size=facts["size"])

    def do_GET(self):
        hub, name = self.server, "list" if self.path.startswith("/api/") else self.path.rpartition("/")[2]
        fault = next(hub.faults.get(name, iter(())), None)
        hub.num_requests += 1
        if isinstance(fault, int):
            return self.answer(fault)
        if name == "list":
            files = [self.facts(name) for name in sorted(hub.files)]
            files = files if "/tree/" in self.path else dict(id="kjj0/fineweb", sha="0" * 40, siblings=files)
            return self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
        data, start = hub.files[name], int(self.headers.get("Range", "bytes=0-")[6:-1])
        hub.gets.append((name, start))
        body = data[start:-10] if fault == "truncated" else data[start:]
        if fault == "wrong byte":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2])
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()      # or the connection, which has to be reset, stays open
            self.connection.close()
        elif fault != "dropped":
            if fault == "held":
                hub.holding.set()
                hub.release.wait(100)
            self.wfile.write(body[len(body) // 2:])


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.release.set()
    hub.shutdown()
    hub.server_close()


def test_faults_that_pass_end_with_the_right_files(hub):
    hub.add(VAL, *TRAIN[:7])
    hub.add(TRAIN[0], tokens=12_000_000)      # the client writes, and so resumes, in blocks of 10 MiB
    hub.faults = {"list": iter([503, 429]), TRAIN[0]: iter(["dropped"]), TRAIN[1]: iter(["dropped"]), VAL: iter([500]),
                  TRAIN[2]: iter(["reset"]), TRAIN[3]: iter([429, 503]), TRAIN[4]: iter(["truncated"]),
                  TRAIN[5]: iter(["wrong byte"])}
    hub.without_sha256 = {TRAIN[6]}
    status, stderr = hub.fetch("--num_shards", 7)
    assert status == 0 and hub.there() == [*TRAIN[:7], VAL], stderr
    assert (TRAIN[0], 10 * 2**20) in hub.gets and hub.gets.count((TRAIN[5], 0)) == 2
    assert "503 Service Unavailable" in stderr and "trying again in 1 s" in stderr


def test_faults_that_stay_are_errors_that_cost_the_other_files_nothing(hub):
    hub.add(VAL, *TRAIN[:7])
    hub.files[TRAIN[4]] = hub.files[TRAIN[4]][:-2] + b"\xff\xff"     # outside the vocabulary, in what the hub means to send
    hub.faults = {TRAIN[0]: repeat("dropped"), TRAIN[1]: repeat("truncated"), TRAIN[2]: repeat("wrong byte"),
                  TRAIN[3]: repeat(503)}
    status, stderr = hub.fetch("--num_shards", 7)
    assert status == 1 and hub.there() == [".part", *TRAIN[5:7], VAL] and not list(hub.out.glob(".part/*.bin")), stderr
    last = stderr.splitlines()[-1]
    assert hub.variables["HF_ENDPOINT"] in last and f"missing: {', '.join(TRAIN[:5])}; the same command goes on" in last
    assert re.findall(r"again in (\d+) s", stderr)[-7:] == "1 2 4 8 16 32 60".split()
    assert f"{TRAIN[4]}: token 65535 is outside the vocabulary" in stderr


@pytest.mark.parametrize("num_shards, variables, message", [
    (2, {}, "401 Unauthorized"), (3, {"FREE": "5000"}, "has no space for 3 files of 200 MB; give another --data_dir"),
    (104, {}, "--num_shards 104: there are 1 to 103"), (0, {}, "--num_shards 0"), (2, {"HF_HUB_OFFLINE": "1"}, "OFFLINE")])
def test_what_cannot_succeed_ends_at_once(hub, num_shards, variables, message):
    hub.add(VAL, *TRAIN[:2])
    hub.faults = {"list": repeat(401) if "401" in message else iter(())}
    status, stderr = hub.fetch("--num_shards", num_shards, **variables)
    assert status and message in stderr and hub.num_requests <= 1


def test_what_is_there_and_good_is_not_fetched(hub):
    names = ["finewebedu_train_000001.bin", "finewebedu_train_000002.bin", "finewebedu_val_000000.bin"]
    options = ["--dataset", "finewebedu", "--num_shards"]
    hub.add(*names)
    assert hub.fetch(*options, 1)[0] == 0 and hub.there() == names[::2]
    (hub.out / names[0]).write_bytes(b"damaged")
    status, stderr = hub.fetch(*options, 2)
    assert status == 0 and f"{names[0]}: 7 bytes are less than" in stderr and hub.there() == names
    assert sorted(hub.gets) == sorted((name, 0) for name in [names[0], *names])
    assert hub.fetch(*options, 2, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1") == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_half_way_only_the_missing_files_are_fetched(hub, number):
    hub.add(VAL, TRAIN[0])
    hub.faults = {TRAIN[0]: iter(["held"])}
    process = hub.start("--num_shards", 1)
    assert hub.holding.wait(100)
    while not (hub.out / ".part" / VAL).exists():
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=50)     # less than the 100 s that the hub would hold it
    assert process.returncode == -number and hub.there() == [".part"]
    assert hub.fetch("--num_shards", 1)[0] == 0 and hub.there() == [TRAIN[0], VAL]
    assert hub.gets.count((TRAIN[0], 0)) == 2 and hub.gets.count((VAL, 0)) == 1


def test_three_processes_at_once_fetch_each_file_once(hub):
    hub.add(VAL, *TRAIN[:3])
    hub.faults = {VAL: iter(["held"])}
    processes = [hub.start("--num_shards", 3, WAITS="yes") for _ in range(3)]
    assert hub.holding.wait(100)
    hub.release.set()
    assert [process.communicate(timeout=100) and process.returncode for process in processes] == [0, 0, 0]
    assert sorted(hub.gets) == [(name, 0) for name in hub.there()] == [(name, 0) for name in [*TRAIN[:3], VAL]]


def test_default_is_what_the_small_track_needs(hub):
    """25 shards of 100M tokens for 4,600 steps of 524,288 tokens."""
    _, stderr = hub.fetch(HF_HUB_OFFLINE="1")
    assert re.findall("fineweb_train_[0-9]+", stderr)[-1] == "fineweb_train_000025"
