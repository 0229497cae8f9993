"""examples/vision.py on small synthetic pictures, which this file writes in the published formats."""

import dataclasses
import gzip
import hashlib
import io
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

from examples import vision

COUNTS = dict(train=200, test=50)
MNIST = "mnist/train-images-idx3-ubyte.gz"


def draw_pictures(shape: tuple, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns noisy copies of ten patterns, and which pattern each is."""
    patterns = np.random.default_rng(0).integers(0, 200, size=(10, *shape))
    random = np.random.default_rng(count)
    labels = random.integers(0, 10, size=count)
    return (patterns[labels] + random.integers(0, 56, size=(count, *shape))).astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for part, name in dict(train="train", test="t10k").items():
        x, y = draw_pictures((28, 28), COUNTS[part])
        for kind, head, array in (("images-idx3", struct.pack(">4I", 2051, *x.shape), x),
                                  ("labels-idx1", struct.pack(">2I", 2049, len(y)), y)):
            (tmp_path / f"mnist/{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
        x, y = draw_pictures((3, 32, 32), COUNTS[part])
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if part == "train" else ["test_batch.bin"]
        for name, rows in zip(names, np.split(np.arange(len(y)), len(names)), strict=True):
            data = b"".join(bytes([y[i]]) + x[i].tobytes() for i in rows)
            (tmp_path / "cifar-10-batches-bin" / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("title, shape", [("mnist", (1, 28, 28)), ("cifar-10", (3, 32, 32))])
def test_pictures_are_read_split_and_standardised(folder, monkeypatch, title, shape):
    monkeypatch.setattr(vision, "BATCH", 32)
    (x, y), (held_x, held_y), (test_x, test_y) = vision.load(vision.TASKS[title], folder)
    expected, labels = draw_pictures(shape, COUNTS["train"])
    assert y.tolist() == labels[:180].tolist() and held_y.tolist() == labels[180:].tolist()
    expected = expected.astype(np.float64)
    mean, std = expected[:180].mean((0, 2, 3), keepdims=True), expected[:180].std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(x, (expected[:180] - mean) / std, atol=1e-4)
    np.testing.assert_allclose(held_x, (expected[180:] - mean) / std, atol=1e-4)
    expected, labels = draw_pictures(shape, COUNTS["test"])
    np.testing.assert_allclose(test_x, (expected - mean) / std, atol=1e-4)
    assert test_y.tolist() == labels.tolist()


def test_idx_files_may_be_unpacked(folder):
    packed, expected = folder / MNIST, draw_pictures((28, 28), COUNTS["train"])[0]
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    np.testing.assert_array_equal(vision.read_idx(packed, 3), expected)


@pytest.mark.parametrize("name, spoil", {
    "no folder": (MNIST, None),
    "truncated gzip": (MNIST, lambda data: data[:-20]),
    "truncated IDX": (MNIST, lambda data: gzip.compress(gzip.decompress(data)[:-1])),
    "no header": (MNIST, lambda data: gzip.compress(b"\0\0\x08\x03\0")),
    "wrong magic": (MNIST, lambda data: gzip.compress(b"\0\0\x0d\x03" + gzip.decompress(data)[4:])),
    "label of MNIST": ("mnist/t10k-labels-idx1-ubyte.gz",
                       lambda data: gzip.compress(gzip.decompress(data)[:-1] + b"\x0a")),
    "truncated CIFAR": ("cifar-10-batches-bin/data_batch_3.bin", lambda data: data[:-1]),
    "label of CIFAR": ("cifar-10-batches-bin/test_batch.bin", lambda data: b"\x0a" + data[1:])}.values())
def test_bad_input_is_one_line(folder, monkeypatch, capsys, name, spoil):
    monkeypatch.setattr(vision, "BATCH", 32)
    path = folder / name
    if spoil:
        path.write_bytes(spoil(path.read_bytes()))
    else:
        folder, path = folder / "none", folder / "none" / name
    assert vision.main(["--data", str(folder), "--out", str(folder / "out")]) == 2
    output = capsys.readouterr()
    assert not output.out and output.err.count("\n") == 1 and output.err.startswith(f"error: {path}")


def test_filters_as_a_matrix_are_a_convolution():
    torch.manual_seed(0)
    conv, reference = vision.Conv(3, 5).double(), nn.Conv2d(3, 5, 3, stride=2, padding=1).double()
    reference.load_state_dict(dict(weight=conv.weight.detach().view(5, 3, 3, 3), bias=conv.bias.detach()))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(conv(x), reference(x), atol=1e-12)


@pytest.mark.parametrize("network", [vision.mlp, vision.convolutional])
def test_each_parameter_has_one_optimizer(network):
    model = network()
    for name, (make, lr) in vision.OPTIMIZERS.items():
        groups = [(type(optimizer).__name__, optimizer.param_groups[0]["params"]) for optimizer in make(model, lr)]
        given = [id(p) for _, members in groups for p in members]
        assert sorted(given) == sorted(map(id, model.parameters()))
        if name == "Muon":
            assert {tuple(p.shape) for p in dict(groups)["Muon"]} == {tuple(m.weight.shape) for m in model[:-1]
                                                                      if isinstance(m, nn.Linear)}


def test_search_finds_the_best_rate_with_equal_budgets(monkeypatch):
    best = dict(Muon=0.04, AdamW=0.00025, SGD=0.2)

    def train(task, name, lr, seed, *others):
        loss = abs(np.log(lr / best[name])) if lr != 0.08 else np.nan
        return vision.Run(name, lr, seed, [9.0, loss], [0, 0], 1.0)

    monkeypatch.setattr(vision, "train", train)
    runs = vision.tune(vision.TASKS["mnist"], None, None, print)
    assert [sum(run.optimizer == name for run in runs) for name in best] == [5, 5, 5]
    assert {name: vision.best_lr(runs, name) for name in best} == pytest.approx(best)


def test_verdict():
    def runs(name, losses):
        return [vision.Run(name, 0.1, seed, [9.0, loss], [0, 90 + loss], 1 + loss) for seed, loss in enumerate(losses)]
    ours = runs("Muon", [0.10, 0.11, 0.12])
    # All stds are 0.01, so Welch's test is Student's, with 4 degrees of freedom.
    half = stats.t.isf(0.05 / 2 / 2, 4) * 0.01 * (2 / 3) ** 0.5
    text = vision.verdicts(ours + runs("AdamW", [0.20, 0.21, 0.22]) + runs("SGD", [0.04, 0.11, 0.17]))
    assert "loss after equal epochs is lower than AdamW's and not told apart from SGD's" in text
    assert f"test loss: -0.1000 (97.5% confidence interval {-0.1 - half:.4f} to {-0.1 + half:.4f}, p = 0.00026" in text
    text = vision.verdicts(ours + runs("AdamW", [0.01, 0.02, 0.03]) + runs("SGD", [1, 1, 1]))
    assert "loss after equal epochs is higher than AdamW's and lower than SGD's" in text


@pytest.fixture
def server(folder, monkeypatch):
    """Serves the folder's files and an archive of CIFAR-10, whose sha256 take the place of the published ones."""
    archive = folder / vision.CIFAR_ARCHIVE
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder / "cifar-10-batches-bin", "cifar-10-batches-bin")
        file.addfile(tarfile.TarInfo("cifar-10-batches-bin/readme.html"), io.BytesIO())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in vision.SOURCES:
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(vision.SOURCES, name, (f"http://127.0.0.1:{server.server_port}/", digest))
    yield server
    server.shutdown()


def test_download(server, folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("fetched")
    vision.download(target)
    for path in [*folder.glob("*/*.bin"), *folder.glob("mnist/*.gz")]:
        assert (target / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert len(list(target.rglob("*.*"))) == 11
    assert vision.origin(target, "cifar") == "the published files"
    (target / MNIST).write_bytes(b"another copy")
    assert "another copy" in vision.origin(target, "mnist")
    server.shutdown()
    server.server_close()
    with pytest.raises(vision.RunError, match="Connection refused"):    # only for the one that is not the published
        vision.download(target)


def test_a_wrong_download_leaves_no_file(server, folder, tmp_path_factory, capsys):
    target = tmp_path_factory.mktemp("fetched")
    (folder / MNIST).write_bytes((folder / MNIST).read_bytes()[:-1])
    assert vision.main(["--download", "--data", str(target)]) == 2
    assert "sha256" in capsys.readouterr().err and not any(path.is_file() for path in target.rglob("*"))


def test_all_of_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(vision, "BATCH", 64)
    for title, task in vision.TASKS.items():
        monkeypatch.setitem(vision.TASKS, title, dataclasses.replace(task, epochs=2))
    out = folder / "out"
    assert vision.main(["--data", str(folder), "--out", str(out), "--seeds", "2"]) == 0
    text = (out / "vision.txt").read_text()
    assert text == capsys.readouterr().out
    assert text.count(" lr ") - text.count("| lr ") == 2 * 3 * (5 + 2) and text.count("verdict:") == 2
    assert text.count("not the published files") == 2 and "| 0.0475 | - |" in text
    assert Image.open(out / "vision.png").width == 800


def test_runs_beside_one_another_are_those_alone(folder, monkeypatch):
    monkeypatch.setattr(vision, "BATCH", 64)
    task, wanted = vision.TASKS["mnist"], [(name, 0.01, seed) for seed in (1, 2) for name in vision.OPTIMIZERS]
    pictures, held_out, _ = vision.load(task, folder)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        runs = vision.train_all(task, wanted, pictures, held_out, print)
        assert [(run.optimizer, run.lr, run.seed) for run in runs] == wanted
        results.append([run.losses for run in runs])
    assert results[0] == results[1] and results[0][0] != results[0][3]     # another seed is another run
