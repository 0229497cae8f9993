"""data/fineweb.py with the real huggingface_hub client, against a hub on loopback."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import shards
from conftest import ROOT


@pytest.fixture
def hub(tmp_path):
    """Serves the files of tmp_path/hub as a dataset; yields (folder, names of the files that were fetched, fetch)."""
    folder, fetched = tmp_path / "hub", []
    folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            path = folder / self.path.rpartition("/")[2]
            if "/resolve/" not in self.path or not path.exists():
                self.send_error(404)
                return None
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return path

        def do_GET(self):
            if path := self.do_HEAD():
                fetched.append(path.name)
                self.wfile.write(path.read_bytes())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1",
                 "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def fetch(*arguments):
        return subprocess.run([sys.executable, ROOT / "data/fineweb.py", "--data_dir", tmp_path / "out", *arguments],
                              capture_output=True, text=True, env=variables, timeout=60)

    yield folder, fetched, fetch
    server.shutdown()


def serve(folder, name, tokens=1000):
    with shards.ShardWriter(folder / name, shards.GPT2_VOCAB_SIZE) as shard:
        shard.write(np.random.default_rng(len(name)).integers(0, 50257, size=tokens).astype("<u2"))


def test_fetches_what_is_missing_and_only_that(hub, tmp_path):
    folder, fetched, fetch = hub
    names = ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    for name in names:
        serve(folder, name)
    result = fetch("--num_shards", "1")
    assert result.returncode == 0, result.stderr
    assert sorted(fetched) == [names[0], names[2]]
    (tmp_path / "out" / names[0]).write_bytes(b"damaged")
    result = fetch("--num_shards", "2")
    assert result.returncode == 0 and "fetching it again" in result.stderr
    assert sorted(fetched[2:]) == names[:2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_what_is_not_there_or_not_good_is_an_error_and_leaves_nothing(hub, tmp_path):
    folder, _, fetch = hub
    result = fetch("--num_shards", "1")
    assert result.returncode != 0 and "fineweb_val_000000.bin: the download from kjj0" in result.stderr
    serve(folder, "fineweb_val_000000.bin")
    data = (folder / "fineweb_val_000000.bin").read_bytes()
    (folder / "fineweb_val_000000.bin").write_bytes(data[:-10])
    result = fetch("--num_shards", "1")
    assert result.returncode != 0 and "no good shard" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*.bin"))


def test_default_is_what_the_small_preset_needs():
    """25 shards of 100M tokens for 4,600 steps of 524,288 tokens."""
    result = subprocess.run([sys.executable, "-c", "import fineweb; print(fineweb.shards_needed())"], text=True,
                            capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT / "data")})
    assert result.stdout == "25\n"
