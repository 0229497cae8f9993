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
import shards
from conftest import ROOT

VAL, TRAIN = "fineweb_val_000000.bin", [f"fineweb_train_{i:06d}.bin" for i in range(1, 9)]
SITECUSTOMIZE = """import os, shutil, time
if os.environ["WAITS"] == "no":     # neither the program nor the client
    time.sleep = lambda seconds: None
if "FREE" in os.environ:
    shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(0, 0, int(os.environ["FREE"]))
"""


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as a dataset of the hub.

    `faults[name]` yields what goes wrong with request after request for the bytes of a file, `faults["HEAD " + name]`
    for its hash, and `faults["info"]` for the list of files: a status, or a word of `Handler.send_bytes`. `gets` lists
    (name, first byte) of requests for bytes. Of files in `without_sha256` only a git hash is stated.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.out = folder / "hub", folder / "out"
        self.folder.mkdir()
        self.faults, self.without_sha256, self.gets, self.num_requests = {}, set(), [], 0
        self.holding, self.release = threading.Event(), threading.Event()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.variables = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_DISABLE_XET": "1",
                          "HF_HOME": str(folder / "home"), "PYTHONPATH": str(folder), "WAITS": "no",
                          "HF_HUB_DOWNLOAD_TIMEOUT": "100"}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        pass    # a client that was killed

    def add(self, *names, tokens=1000):
        for name in names:
            random = np.random.default_rng(list(name.encode()))
            with shards.ShardWriter(self.folder / name, shards.GPT2_VOCAB_SIZE) as shard:
                shard.write(random.integers(0, 50257, size=tokens).astype("<u2"))
            data = (self.folder / name).read_bytes()    # the files of the hub have no checksum in their header
            (self.folder / name).write_bytes(data[:16] + bytes(4) + data[20:])

    def start(self, *arguments, **variables) -> subprocess.Popen:
        command = [sys.executable, ROOT / "data/fineweb.py", "--data_dir", self.out, "--num_shards", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**self.variables, **variables})

    def fetch(self, *arguments, **variables) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        _, stderr = process.communicate(timeout=100)
        assert "Traceback" not in stderr
        return process.returncode, stderr

    def there(self) -> list[str]:
        """The names in the output folder, whose shards must be those of the hub."""
        for path in self.out.glob("*.bin"):
            assert path.read_bytes() == (self.folder / path.name).read_bytes(), path.name
        return sorted(path.name for path in self.out.iterdir() if path.name != ".lock")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def begin(self, status: int, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def fault(self, key: str):
        self.server.num_requests += 1
        return next(self.server.faults.get(key, iter(())), None)

    def describe(self, path) -> dict:
        """Of a file, as both lists of the hub state it."""
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        lfs = None if path.name in self.server.without_sha256 else dict(oid=digest, sha256=digest, size=len(data),
                                                                       pointerSize=1)
        return dict(type="file", path=path.name, rfilename=path.name, size=len(data), oid="1" * 40, lfs=lfs)

    def do_HEAD(self):
        name = self.path.rpartition("/")[2]
        if status := self.fault(f"HEAD {name}"):
            return self.begin(status)
        facts = self.describe(self.server.folder / name)
        etag = facts["lfs"]["oid"] if facts["lfs"] else facts["oid"]
        self.begin(302, X_Repo_Commit="0" * 40, X_Linked_Etag=f'"{etag}"', X_Linked_Size=facts["size"],
                   Location=f"http://127.0.0.1:{self.server.server_port}/bytes/{name}")

    def do_GET(self):
        if not self.path.startswith("/api/"):
            return self.send_bytes(self.path.rpartition("/")[2])
        if status := self.fault("info"):
            return self.begin(status)
        files = [self.describe(path) for path in sorted(self.server.folder.iterdir())]
        body = json.dumps(files if "/tree/" in self.path else dict(id="x/y", sha="0" * 40, siblings=files)).encode()
        self.begin(200, Content_Type="application/json", Content_Length=len(body))
        self.wfile.write(body)

    def send_bytes(self, name: str):
        fault, data = self.fault(name), (self.server.folder / name).read_bytes()
        if isinstance(fault, int):
            return self.begin(fault)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.server.gets.append((name, start))
        body = data[start:-10] if fault == "truncated" else data[start:]
        if fault == "wrong byte":
            body = body[:-1] + bytes([body[-1] ^ 1])
        content_range = dict(Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}") if start else {}
        self.begin(206 if start else 200, Content_Length=len(body), **content_range)
        self.wfile.write(body[:len(body) // 2])
        if fault == "dropped":
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()      # or the connection, which has to be reset, stays open
            return self.connection.close()
        if fault == "held":
            self.server.holding.set()
            self.server.release.wait(100)
        self.wfile.write(body[len(body) // 2:])


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.release.set()
    hub.shutdown()
    hub.server_close()


def test_every_fault_that_passes_ends_with_the_right_file(hub):
    hub.add(VAL, *TRAIN[:7])
    hub.add(TRAIN[0], tokens=12_000_000)      # the client writes, and so resumes, in blocks of 10 MiB
    hub.faults = {"info": iter([503, 429]), f"HEAD {VAL}": iter([503, 429]), TRAIN[0]: iter(["dropped"]),
                  TRAIN[1]: iter(["dropped"]), TRAIN[2]: iter(["reset"]), TRAIN[3]: iter([429, 500]),
                  TRAIN[4]: iter(["truncated"]), TRAIN[5]: iter(["wrong byte"])}
    hub.without_sha256 = {TRAIN[6]}
    status, stderr = hub.fetch(7)
    assert status == 0 and hub.there() == sorted([VAL, *TRAIN[:7]]), stderr
    assert (TRAIN[0], 10 * 2**20) in hub.gets and hub.gets.count((TRAIN[5], 0)) == 2
    assert "trying again in 1 s" in stderr


def test_faults_that_stay_are_errors_that_cost_the_other_files_nothing(hub):
    hub.add(VAL, *TRAIN[:7])
    hub.faults = {TRAIN[0]: repeat("dropped"), TRAIN[1]: repeat("truncated"), TRAIN[2]: repeat("wrong byte"),
                  TRAIN[3]: repeat(503)}
    hub.without_sha256 = {TRAIN[4]}
    bad = (hub.folder / TRAIN[4]).read_bytes()      # a token outside the vocabulary, in what the hub means to send
    (hub.folder / TRAIN[4]).write_bytes(bad[:2000] + b"\xff\xff" + bad[2002:])
    status, stderr = hub.fetch(7)
    assert status == 1 and hub.there() == [".part", *TRAIN[5:7], VAL], stderr
    assert not list(hub.out.glob(".part/*.bin"))
    last = stderr.splitlines()[-1]
    assert hub.variables["HF_ENDPOINT"] in last and "the same command goes on" in last
    assert f"missing: {VAL}" not in last and all(name in last for name in TRAIN[:5])
    assert [seconds for seconds in re.findall(r"again in (\d+) s", stderr)[-7:]] == "1 2 4 8 16 32 60".split()
    assert re.search(f"{TRAIN[4]}: token 65535 is outside the vocabulary", stderr)


@pytest.mark.parametrize("given, variables, message", [
    (2, {}, "401 Unauthorized"), (3, {"FREE": "5000"}, "has no space for 3 files of 200 MB; give another --data_dir"),
    (104, {}, "--num_shards 104: there are 1 to 103"), (0, {}, "--num_shards 0"), (2, {"HF_HUB_OFFLINE": "1"}, "OFFLINE")])
def test_what_cannot_succeed_ends_at_once(hub, given, variables, message):
    hub.add(VAL, *TRAIN[:2])
    hub.faults = {"info": repeat(401) if "401" in message else iter([])}
    status, stderr = hub.fetch(given, **variables)
    assert status and message in stderr and hub.num_requests <= 1 and not hub.gets


def test_what_is_there_and_good_is_not_fetched(hub):
    names = ["finewebedu_train_000001.bin", "finewebedu_train_000002.bin", "finewebedu_val_000000.bin"]
    hub.add(*names)
    assert hub.fetch(1, "--dataset", "finewebedu")[0] == 0 and hub.there() == names[::2]
    (hub.out / names[0]).write_bytes(b"damaged")
    status, stderr = hub.fetch(2, "--dataset", "finewebedu")
    assert status == 0 and f"{names[0]}: 7 bytes are less than" in stderr and hub.there() == names
    assert sorted(hub.gets) == sorted((name, 0) for name in [names[0], *names])
    requests = hub.num_requests
    assert hub.fetch(2, "--dataset", "finewebedu", HF_HUB_OFFLINE="1") == (0, "") and hub.num_requests == requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_half_way_only_the_missing_files_are_fetched(hub, number):
    hub.add(VAL, *TRAIN[:2])
    hub.faults = {TRAIN[0]: iter(["held"])}
    process = hub.start(2)
    assert hub.holding.wait(100)
    while len(hub.gets) < 3 or not (hub.out / ".part" / VAL).exists():
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=50)     # less than the 100 s that the hub would hold it
    assert process.returncode == -number and hub.there() == [".part"]
    assert hub.fetch(2)[0] == 0 and hub.there() == sorted([VAL, *TRAIN[:2]])
    assert hub.gets.count((TRAIN[0], 0)) == 2 and hub.gets.count((VAL, 0)) == 1


def test_three_processes_at_once_fetch_each_file_once(hub):
    hub.add(VAL, *TRAIN[:3])
    hub.faults = {VAL: iter(["held"])}
    processes = [hub.start(3, WAITS="yes") for _ in range(3)]
    assert hub.holding.wait(100)
    hub.release.set()
    assert [process.communicate(timeout=100) and process.returncode for process in processes] == [0, 0, 0]
    assert sorted(hub.gets) == sorted((name, 0) for name in hub.there()) and len(hub.gets) == 4


def test_default_is_what_the_small_track_needs(hub):
    """25 shards of 100M tokens for 4,600 steps of 524,288 tokens."""
    stderr = subprocess.run([sys.executable, ROOT / "data/fineweb.py", "--data_dir", hub.out], capture_output=True,
                            text=True, env={**hub.variables, "HF_HUB_OFFLINE": "1"}).stderr
    assert re.findall("fineweb_train_[0-9]+", stderr)[-1] == "fineweb_train_000025"
