"""data/fineweb.py with the real huggingface_hub client, against a hub on loopback that fails in many ways."""

import hashlib
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fineweb
import numpy as np
import pytest
import shards
from conftest import ROOT

VAL = "fineweb_val_000000.bin"
NO_WAIT = """import os, time
def sleep(seconds):
    with open(os.environ["SLEEPS"], "a") as file:
        file.write(f"{float(seconds)}\\n")
time.sleep = sleep
"""


def train(i: int) -> str:
    return f"fineweb_train_{i:06d}.bin"


class Hub:
    """A hub and its CDN, on two ports: the first one states sizes and hashes and sends to the second for the bytes.

    `faults[name]` (or `faults["HEAD " + name]` for the first port) yields what goes wrong with request after request.
    `gets` lists (name, first byte asked for) of the requests to the CDN, `requests` all paths. `git_hash` holds names
    whose hash is not stated as a sha256. A held request sets `holding` and waits for `release` in the middle.
    """

    def __init__(self, folder):
        folder.mkdir(parents=True)
        self.folder, self.out = folder / "hub", folder / "out"
        self.folder.mkdir()
        self.faults, self.git_hash, self.gets, self.requests = {}, set(), [], []
        self.holding, self.release = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.requests.append(self.path)
                name = self.path.rpartition("/")[2]
                fault = next(hub.faults.get(f"HEAD {name}", iter(())), None)
                if fault or "/resolve/" not in self.path or not (hub.folder / name).exists():
                    return self.send_error(fault or 404)
                data = (hub.folder / name).read_bytes()
                hashed = (hashlib.sha1 if name in hub.git_hash else hashlib.sha256)(data).hexdigest()
                self.send_response(302)
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("X-Linked-Etag", f'"{hashed}"')
                self.send_header("X-Linked-Size", str(len(data)))
                self.send_header("Location", f"http://127.0.0.1:{hub.servers[1].server_port}/{name}")
                self.end_headers()

            def do_GET(self):
                name = self.path.rpartition("/")[2]
                data = (hub.folder / name).read_bytes()
                start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
                hub.requests.append(self.path)
                hub.gets.append((name, start))
                fault = next(hub.faults.get(name, iter(())), None)
                if isinstance(fault, tuple):
                    self.send_response(fault[0])
                    self.send_header("Retry-After", str(fault[1]))
                    return self.end_headers()
                body = data[start:]
                if fault == "wrong byte":
                    body = body[:-1] + bytes([body[-1] ^ 1])
                if fault == "truncated":
                    body = body[:-10]
                self.send_response(206 if "Range" in self.headers else 200)
                if "Range" in self.headers:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2])
                if fault == "dropped":
                    return None
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.rfile.close()      # or the connection, which has to be reset, stays open
                    return self.connection.close()
                if fault == "held":
                    hub.holding.set()
                    hub.release.wait(100)
                self.wfile.write(body[len(body) // 2:])

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):     # a client that was killed
                pass

        self.servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.variables = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.servers[0].server_port}",
                          "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
                          "HF_HUB_DOWNLOAD_TIMEOUT": "100"}
        self.sleeps = folder / "sleeps.txt"
        (folder / "no_wait").mkdir()
        (folder / "no_wait" / "sitecustomize.py").write_text(NO_WAIT)
        self.no_wait = {"PYTHONPATH": str(folder / "no_wait"), "SLEEPS": str(self.sleeps)}

    def serve(self, *names, tokens=1000):
        for name in names:
            with shards.ShardWriter(self.folder / name, shards.GPT2_VOCAB_SIZE) as shard:
                random = np.random.default_rng(list(name.encode()))
                shard.write(random.integers(0, 50257, size=tokens).astype("<u2"))
            with open(self.folder / name, "r+b") as file:       # the files of the hub have no checksum in the header
                file.seek(16)
                file.write(bytes(4))

    def start(self, *arguments, **variables):
        return subprocess.Popen([sys.executable, ROOT / "data/fineweb.py", "--data_dir", self.out, *arguments],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**self.variables, **variables})

    def fetch(self, *arguments, **variables):
        process = self.start(*arguments, **variables)
        stdout, stderr = process.communicate(timeout=100)
        assert "Traceback" not in stderr
        return process.returncode, stdout, stderr

    def there(self) -> list[str]:
        """Returns the names of everything in the output folder, whose shards must be those of the hub."""
        names = sorted(path.name for path in self.out.iterdir())
        for name in names:
            if name.endswith(".bin"):
                assert (self.out / name).read_bytes() == (self.folder / name).read_bytes(), name
        return names


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path / "all")
    yield hub
    hub.release.set()
    for server in hub.servers:
        server.shutdown()
        server.server_close()


def test_every_fault_that_passes_ends_with_the_right_file(hub):
    names = [VAL, *map(train, range(1, 8))]
    hub.serve(*names)
    hub.serve(train(1), tokens=12_000_000)      # the client writes, and so resumes, in blocks of 10 MiB
    hub.faults = {f"HEAD {VAL}": iter([503, 429]), train(1): iter(["dropped"]), train(2): iter(["dropped"]),
                  train(3): iter(["reset"]), train(4): iter([(429, 3), (500, 7)]), train(5): iter(["truncated"]),
                  train(6): iter(["wrong byte"])}
    hub.git_hash = {train(7)}
    status, stdout, stderr = hub.fetch("--num_shards", "7", **hub.no_wait)
    assert status == 0, stderr
    assert hub.there() == sorted(names)
    assert sorted(hub.gets) == [*((train(i), start) for i, start in (
        (1, 0), (1, 10 * 2**20), (2, 0), (2, 0), (3, 0), (3, 0), (4, 0), (4, 0), (4, 0), (5, 0), (5, 0), (6, 0), (6, 0),
        (7, 0))), (VAL, 0)]
    assert f"{train(3)}: ConnectionResetError" in stderr
    assert f"{train(4)}: HTTP 500 Internal Server Error; attempt 2 of 10 in 7 s" in stderr
    assert {"4.0", "7.0"} < set(hub.sleeps.read_text().split())     # the client adds a second to the 3 of the 429
    assert re.search(rf"{train(6)}: no good shard: .* its sha256 is ", stderr)
    assert all(f"{name}: " in stdout for name in names) and "(8 of 8)" in stdout


def test_faults_that_stay_are_errors_that_cost_the_other_files_nothing(hub):
    hub.serve(VAL, *map(train, (1, 2, 3, 5, 6, 7)))
    hub.faults = {train(i): itertools.repeat(fault) for i, fault in
                  ((1, "dropped"), (2, "truncated"), (3, "wrong byte"), (7, (503, "Wed, 21 Oct 2026 07:28:00 GMT")))}
    hub.git_hash = {train(5)}
    with open(hub.folder / train(5), "r+b") as file:    # a token outside the vocabulary, in what the hub means to send
        file.seek(2000)
        file.write(b"\xff\xff")
    (hub.folder / train(6)).write_bytes((hub.folder / train(6)).read_bytes()[:-10])     # and a truncated file
    status, _, stderr = hub.fetch("--num_shards", "7", "--workers", "8", **hub.no_wait)
    assert status == 1
    assert [name for name in hub.there() if name != ".part"] == [VAL]
    assert not [path for path in hub.out.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != VAL]
    summary = stderr[stderr.index("did not give these files of kjj0/fineweb10B-gpt2:"):]
    for i, message in ((1, "RemoteProtocolError"), (2, "Consistency check failed"), (3, "its sha256 is"),
                       (4, "HTTP 404 "), (5, "token 65535 is outside the vocabulary"),
                       (6, "the header states 1000 tokens"), (7, "HTTP 503 ")):
        assert re.search(rf"^  {train(i)}: .*{message}", summary, re.M), summary
        waits = re.findall(rf"{train(i)}: .* in (\d+) s$", stderr, re.M)
        assert waits == ([] if i == 4 else "1 2 4 8 16 32 60 60 60".split())
    assert "7 of 8 files are still missing; run the same command again" in summary
    assert {"16.0", "32.0", "60.0"} < set(hub.sleeps.read_text().split())


def test_a_hub_that_refuses_is_asked_once(hub):
    hub.serve(VAL, train(1), train(2))
    hub.faults = {f"HEAD {name}": itertools.repeat(401) for name in (VAL, train(1), train(2))}
    status, _, stderr = hub.fetch("--num_shards", "2", "--workers", "1")
    assert status == 1 and f"{VAL}: HTTP 401 Unauthorized" in stderr and "HF_TOKEN" in stderr
    assert hub.variables["HF_ENDPOINT"] in stderr and "3 of 3 files are still missing" in stderr
    assert len(hub.requests) == 1


def test_what_is_there_and_good_is_not_fetched_and_what_is_bad_is_put_aside(hub):
    names = ["finewebedu_train_000001.bin", "finewebedu_train_000002.bin", "finewebedu_val_000000.bin"]
    hub.serve(*names)
    cache = hub.folder.parent / "home/hub/datasets--kjj0--finewebedu10B-gpt2/snapshots" / ("0" * 40)
    cache.mkdir(parents=True)
    (cache / names[0]).write_bytes(b"damaged")      # the client's cache, which it does not check
    assert hub.fetch("--dataset", "finewebedu", "--num_shards", "1")[0] == 0
    assert sorted(hub.gets) == [(names[0], 0), (names[2], 0)]
    assert any(path.startswith("/datasets/kjj0/finewebedu10B-gpt2/resolve/main/") for path in hub.requests)
    (hub.out / names[0]).write_bytes(b"damaged")
    status, _, stderr = hub.fetch("--dataset", "finewebedu", "--num_shards", "2")
    assert status == 0 and f"kept as {names[0]}.corrupt, fetching it again" in stderr
    assert sorted(hub.gets[2:]) == [(name, 0) for name in names[:2]]
    assert hub.there() == sorted([*names, f"{names[0]}.corrupt"])
    assert (hub.out / f"{names[0]}.corrupt").read_bytes() == b"damaged"
    requests = len(hub.requests)
    status, stdout, stderr = hub.fetch("--dataset", "finewebedu", "--num_shards", "2", HF_HUB_OFFLINE="1")
    assert status == 0 and "2 training shards are there" in stdout
    status, stdout, stderr = hub.fetch("--dataset", "finewebedu", "--num_shards", "3", HF_HUB_OFFLINE="1")
    assert status == 1 and "finewebedu_train_000003.bin is the first, and HF_HUB_OFFLINE forbids" in stderr
    assert len(hub.requests) == requests


def test_killed_half_way_only_the_missing_files_are_fetched(hub):
    hub.serve(VAL, train(1), train(2))
    hub.faults = {train(1): iter(["held"])}
    process = hub.start("--num_shards", "2", "--workers", "1")
    assert hub.holding.wait(100)
    process.kill()
    process.communicate()
    assert hub.there() == [".part", VAL]
    assert [path for path in (hub.out / ".part").rglob("*.incomplete")]
    status, _, stderr = hub.fetch("--num_shards", "2")
    assert status == 0, stderr
    assert hub.there() == [train(1), train(2), VAL]
    assert sorted(hub.gets) == [(train(1), 0), (train(1), 0), (train(2), 0), (VAL, 0)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once_and_leaves_no_final_name(hub, number):
    hub.serve(VAL, train(1))
    hub.faults = {VAL: iter(["held"]), train(1): iter(["held"])}
    process = hub.start("--num_shards", "1")
    assert hub.holding.wait(100)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=50)     # less than the 100 s that the hub would hold it
    assert process.returncode == 128 + number and "Traceback" not in stderr
    assert "stopped; run the same command again" in stderr
    assert hub.there() == [".part"]


def test_three_processes_at_once_fetch_each_file_once(hub):
    """None of the files is there before all three have seen that all are missing."""
    names = [VAL, *map(train, range(1, 4))]
    hub.serve(*names)
    hub.faults = {VAL: iter(["held"]), train(1): iter(["held"])}
    processes = [hub.start("--num_shards", "3", "--workers", "2") for _ in range(3)]
    for process in processes:
        assert "fetching 4 missing files of kjj0/fineweb10B-gpt2" in process.stdout.readline()
    hub.release.set()
    for process in processes:
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 0, stderr
    assert sorted(hub.gets) == sorted((name, 0) for name in names)
    assert hub.there() == sorted(names)


def test_options_and_disk_space_are_checked_before_the_hub_is_asked(tmp_path, monkeypatch, capsys):
    def message(*arguments):
        monkeypatch.setattr(sys, "argv", ["fineweb.py", "--data_dir", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as error:
            fineweb.main()
        assert error.value.code != 0
        return f"{error.value.code}{capsys.readouterr().err}"

    monkeypatch.setattr(fineweb, "fetch_all", lambda *_: {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - 10**9, 10**9))
    too_small = message("--num_shards", "103")
    assert "104 missing shards need 20.8 GB, 1.0 GB are free" in too_small and "--data_dir" in too_small
    assert "--num_shards 104: there are 1 to 103" in message("--num_shards", "104")
    assert "--num_shards 100: there are 1 to 99" in message("--num_shards", "100", "--dataset", "finewebedu")
    assert "--num_shards 0" in message("--num_shards", "0")
    assert "--workers 0" in message("--num_shards", "1", "--workers", "0")
    (tmp_path / "file").touch()
    assert "file" in message("--num_shards", "1", "--data_dir", str(tmp_path / "file" / "out"))


def test_default_is_what_the_small_preset_needs():
    """25 shards of 100M tokens for 4,600 steps of 524,288 tokens."""
    result = subprocess.run([sys.executable, "-c", "import fineweb; print(fineweb.shards_needed())"], text=True,
                            capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT / "data")})
    assert result.stdout == "25\n"
