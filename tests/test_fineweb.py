"""data/fineweb.py with the real huggingface_hub client, against a hub on loopback that fails in many ways."""

import hashlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat

import pytest
from conftest import ROOT

VAL, *TRAIN = "fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 9))
SITECUSTOMIZE = """import os, shutil, time
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))    # the waits of the program and of the client
shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(0, 0, int(os.environ.get("FREE", 10**12)))
"""


class Hub(ThreadingHTTPServer):
    """Serves `files` as a dataset of the hub. `faults[name]` yields what goes wrong with one request after another, for
    a file or for the "list" of files: a status, or a word of the handler. `gets` names what was asked for."""
    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.gets, self.out = {}, {}, [], folder / "out"
        self.holding, self.release = threading.Event(), threading.Event()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.variables = dict(
            os.environ, HF_ENDPOINT=f"http://127.0.0.1:{self.server_port}", HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1", HF_HOME=str(folder / "home"), PYTHONPATH=str(folder))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, *names):
        for name in names:      # the files of the hub have neither a vocabulary nor a checksum in their header
            tokens = random.Random(name).choices(range(50257), k=1000)
            self.files[name] = struct.pack("<iii1012x1000H", 20240520, 1, 1000, *tokens)

    def start(self, *arguments, **variables) -> subprocess.Popen:
        command = [sys.executable, ROOT / "data/fineweb.py", "--data_dir", self.out, *map(str, arguments)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**self.variables, **variables})

    def fetch(self, *arguments, **variables) -> tuple[str, int]:
        process = self.start(*arguments, **variables)
        return process.communicate(timeout=100)[1], process.returncode

    def there(self) -> list[str]:
        """The names in the output folder, whose shards must be those of the hub."""
        assert all(path.read_bytes() == self.files[path.name] for path in self.out.glob("*.bin"))
        return sorted(path.name for path in self.out.iterdir() if path.name != ".lock")


class Handler(BaseHTTPRequestHandler):
    def answer(self, status: int, body: bytes = b"", fault: str | None = None, **headers):
        self.send_response(status)
        for name, value in dict(headers, Content_Length=len(body)).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if fault == "held":
            self.server.holding.set()
            self.server.release.wait(50)
        self.wfile.write(body[:len(body) // 2] if fault in ("dropped", "reset") else body)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()      # or the connection, which has to be reset, stays open
            self.connection.close()

    def do_HEAD(self):
        data = self.server.files[self.path.rpartition("/")[2]]
        digest = hashlib.sha256(data).hexdigest()
        self.answer(200, X_Repo_Commit="0" * 40, X_Linked_Etag=digest, X_Linked_Size=len(data))

    def do_GET(self):
        hub, name = self.server, "list" if self.path.startswith("/api/") else self.path.rpartition("/")[2]
        hub.gets.append(name)
        fault = next(hub.faults.get(name, iter(())), None)
        if isinstance(fault, int):
            self.answer(fault)
        elif name == "list":
            files = []
            for name, data in hub.files.items():
                digest, size = hashlib.sha256(data).hexdigest(), len(data)
                lfs = dict(oid=digest, sha256=digest, size=size, pointerSize=1)
                files.append(dict(type="file", path=name, rfilename=name, size=size, oid=digest, lfs=lfs))
            body = files if "/tree/" in self.path else dict(id="kjj0/fineweb", sha="0" * 40, siblings=files)
            self.answer(200, json.dumps(body).encode())
        else:
            data = hub.files[name]
            self.answer(200, {"truncated": data[:-10], "wrong byte": data[:-1] + b"!"}.get(fault, data), fault)


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.release.set()
    hub.shutdown()
    hub.server_close()


def test_faults_that_pass_end_with_the_right_files(hub):
    hub.add(VAL, *TRAIN[:7])
    faults = ["dropped"], ["dropped"], ["reset"], [429, 503], ["truncated"], ["wrong byte"], [500], [503, 429]
    hub.faults = dict(zip([*TRAIN[:6], VAL, "list"], map(iter, faults), strict=True))
    stderr, status = hub.fetch("--num_shards", 7)
    assert status == 0 and hub.there() == [*TRAIN[:7], VAL] and "trying again in 1 s" in stderr, stderr
    assert [hub.gets.count(name) for name in TRAIN[:7]] == [2, 2, 2, 3, 2, 2, 1]


def test_faults_that_stay_are_errors_that_cost_the_other_files_nothing(hub):
    hub.add(VAL, *TRAIN[:7])
    hub.files[TRAIN[4]] = hub.files[TRAIN[4]][:-2] + b"\xff\xff"     # a token outside the vocabulary, at the hub itself
    hub.faults = dict(zip(TRAIN, map(repeat, ["dropped", "truncated", "wrong byte", 503]), strict=False))
    stderr, status = hub.fetch("--num_shards", 7)
    assert status == 1 and hub.there() == [".part", *TRAIN[5:7], VAL] and not list(hub.out.glob(".part/*.bin")), stderr
    assert f"missing: {', '.join(TRAIN[:5])}; the same command goes on" in stderr.splitlines()[-1]
    assert re.findall(r"again in (\d+) s", stderr) == "1 2 4 8 16 32 60 60 60".split()


@pytest.mark.parametrize("arguments, variables, message", [
    (["--num_shards", 2], {}, "401 Unauthorized"), (["--num_shards", 4], {}, "has no fineweb_train_000004.bin"),
    (["--num_shards", 3], {"FREE": "5000"}, "has no space for 4 files of 200 MB; give another --data_dir"),
    # 2,100 steps of 2^18 tokens on average, and 70M tokens of each shard.
    ([], {"HF_HUB_OFFLINE": "1"}, "fineweb_train_000008.bin; the same")])
def test_what_cannot_succeed_ends_at_once(hub, arguments, variables, message):
    hub.add(VAL, *TRAIN[:3])
    hub.faults = {"list": repeat(401) if "401" in message else iter(())}
    stderr, status = hub.fetch(*arguments, **variables)
    assert status and message in stderr and "Traceback" not in stderr and hub.gets in ([], ["list"])


def test_what_is_there_and_good_is_not_fetched(hub):
    names = ["finewebedu_train_000001.bin", "finewebedu_train_000002.bin", "finewebedu_val_000000.bin"]
    options = ["--dataset", "finewebedu", "--num_shards"]
    hub.add(*names)
    assert hub.fetch(*options, 1)[1] == 0 and hub.there() == names[::2]
    (hub.out / names[0]).write_bytes(b"damaged")
    assert hub.fetch(*options, 2)[1] == 0 and hub.there() == names
    assert [hub.gets.count(name) for name in names] == [2, 1, 1]
    assert hub.fetch(*options, 2, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1") == ("", 0)


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGKILL])
def test_of_two_at_once_one_waits_and_goes_on_where_the_other_ended(hub, number):
    hub.add(VAL, TRAIN[0])
    hub.faults = {TRAIN[0]: iter(["held"])}
    first = hub.start("--num_shards", 1)
    assert hub.holding.wait(50)
    second = hub.start("--num_shards", 1)
    time.sleep(2)       # so that it waits, or would fetch
    first.send_signal(number) if number else hub.release.set()
    assert first.wait(timeout=40) == -number       # less than the 50 s that the hub would hold it
    assert second.communicate(timeout=50) and second.returncode == 0 and hub.there() == [TRAIN[0], VAL]
    assert hub.gets.count(TRAIN[0]) == (2 if number else 1) and hub.gets.count(VAL) == 1
