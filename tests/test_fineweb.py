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
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))      # the waits of the program and of the client
shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(0, 0, int(os.environ.get("FREE", 10**12)))
"""


class Hub(ThreadingHTTPServer):
    """Serves `files`, {name: bytes}, as a dataset of the hub. `faults[name]` yields what goes wrong with request after
    request for a file, or for the "list" of files: a status, or a word of the handler. `gets` names what was asked for.
    """

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

    def fetch(self, *arguments, **variables) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        _, stderr = process.communicate(timeout=100)
        return process.returncode, stderr

    def there(self) -> list[str]:
        """The names in the output folder, whose shards must be those of the hub."""
        assert all(path.read_bytes() == self.files[path.name] for path in self.out.glob("*.bin"))
        return sorted(path.name for path in self.out.iterdir() if path.name != ".lock")


class Handler(BaseHTTPRequestHandler):
    def facts(self, name: str) -> dict:
        """What the lists of the hub state of a file."""
        size, digest = len(self.server.files[name]), hashlib.sha256(self.server.files[name]).hexdigest()
        lfs = dict(oid=digest, sha256=digest, size=size, pointerSize=1)
        return dict(type="file", path=name, rfilename=name, size=size, oid="1" * 40, lfs=lfs)

    def answer(self, status: int, body: bytes = b"", fault: str | None = None, **headers):
        self.send_response(status)
        for name, value in dict(headers, Content_Length=len(body)).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2])
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()      # or the connection, which has to be reset, stays open
            self.connection.close()
        elif fault != "dropped":
            if fault == "held":
                self.server.holding.set()
                self.server.release.wait(50)
            self.wfile.write(body[len(body) // 2:])

    def do_HEAD(self):
        lfs = self.facts(self.path.rpartition("/")[2])["lfs"]
        self.answer(200, X_Repo_Commit="0" * 40, X_Linked_Etag=lfs["oid"], X_Linked_Size=lfs["size"])

    def do_GET(self):
        hub, name = self.server, "list" if self.path.startswith("/api/") else self.path.rpartition("/")[2]
        hub.gets.append(name)
        fault = next(hub.faults.get(name, iter(())), None)
        if isinstance(fault, int):
            self.answer(fault)
        elif name == "list":
            files = [self.facts(name) for name in sorted(hub.files)]
            body = files if "/tree/" in self.path else dict(id="kjj0/fineweb", sha="0" * 40, siblings=files)
            self.answer(200, json.dumps(body).encode())
        else:
            *start, last = hub.files[name]
            end = {"truncated": [], "wrong byte": [last ^ 1]}.get(fault, [last])
            self.answer(200, bytes(start + end), fault)


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.release.set()
    hub.shutdown()


def test_faults_that_pass_end_with_the_right_files(hub):
    hub.add(VAL, *TRAIN[:7])
    faults = ["dropped"], ["dropped"], ["reset"], [429, 503], ["truncated"], ["wrong byte"], [500], [503, 429]
    hub.faults = dict(zip([*TRAIN[:6], VAL, "list"], map(iter, faults), strict=True))
    status, stderr = hub.fetch("--num_shards", 7)
    assert status == 0 and hub.there() == [*TRAIN[:7], VAL], stderr
    assert [hub.gets.count(name) for name in TRAIN[:7]] == [2, 2, 2, 3, 2, 2, 1]
    assert "503 Service Unavailable" in stderr and "trying again in 1 s" in stderr


def test_faults_that_stay_are_errors_that_cost_the_other_files_nothing(hub):
    hub.add(VAL, *TRAIN[:7])
    hub.files[TRAIN[4]] = hub.files[TRAIN[4]][:-2] + b"\xff\xff"     # a token outside the vocabulary, at the hub itself
    hub.faults = dict(zip(TRAIN, map(repeat, ["dropped", "truncated", "wrong byte", 503]), strict=False))
    status, stderr = hub.fetch("--num_shards", 7)
    assert status == 1 and hub.there() == [".part", *TRAIN[5:7], VAL] and not list(hub.out.glob(".part/*.bin")), stderr
    last = stderr.splitlines()[-1]
    assert hub.variables["HF_ENDPOINT"] in last and f"missing: {', '.join(TRAIN[:5])}; the same command goes on" in last
    assert re.findall(r"again in (\d+) s", stderr)[-7:] == "1 2 4 8 16 32 60".split()
    assert f"{TRAIN[4]}: token 65535 is outside the vocabulary" in stderr


@pytest.mark.parametrize("arguments, variables, message", [
    (["--num_shards", 2], {}, "401 Unauthorized"), (["--num_shards", 0], {}, "--num_shards 0: there are 1 to 103"),
    (["--num_shards", 3], {"FREE": "5000"}, "has no space for 3 files of 200 MB; give another --data_dir"),
    ([], {"HF_HUB_OFFLINE": "1"}, "fineweb_train_000025.bin; the same")])     # 25 x 100M tokens for 4,600 steps of 2^19
def test_what_cannot_succeed_ends_at_once(hub, arguments, variables, message):
    hub.add(VAL, *TRAIN[:2])
    hub.faults = {"list": repeat(401) if "401" in message else iter(())}
    status, stderr = hub.fetch(*arguments, **variables)
    assert status and message in stderr and "Traceback" not in stderr and hub.gets in ([], ["list"])


def test_what_is_there_and_good_is_not_fetched(hub):
    names = ["finewebedu_train_000001.bin", "finewebedu_train_000002.bin", "finewebedu_val_000000.bin"]
    options = ["--dataset", "finewebedu", "--num_shards"]
    hub.add(*names)
    assert hub.fetch(*options, 1)[0] == 0 and hub.there() == names[::2]
    (hub.out / names[0]).write_bytes(b"damaged")
    status, stderr = hub.fetch(*options, 2)
    assert status == 0 and f"{names[0]}: 7 bytes are less than" in stderr and hub.there() == names
    assert [hub.gets.count(name) for name in names] == [2, 1, 1]
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
    assert hub.gets.count(TRAIN[0]) == 2 and hub.gets.count(VAL) == 1


def test_three_processes_at_once_fetch_each_file_once(hub):
    hub.add(VAL, *TRAIN[:3])
    hub.faults = {VAL: iter(["held"])}
    processes = [hub.start("--num_shards", 3) for _ in range(3)]
    assert hub.holding.wait(100)
    time.sleep(3)      # until the other two wait, too
    hub.release.set()
    assert [process.communicate(timeout=100) and process.returncode for process in processes] == [0, 0, 0]
    assert sorted(hub.gets) == [*hub.there(), "list", "list"] == [*TRAIN[:3], VAL, "list", "list"]
