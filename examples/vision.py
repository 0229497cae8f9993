#!/usr/bin/env python3
"""Does Muon train small picture models better than AdamW and SGD? An MLP on MNIST, a convolutional network on CIFAR-10.

    python examples/vision.py --download       # fetches both sets into data/vision first, 182 MB
    python examples/vision.py --data FOLDER    # has mnist/ and cifar-10-batches-bin/, in their published formats

Each optimizer tries five learning rates on pictures held out of training, and then trains with the best from fresh
seeds. The test pictures are judged by these runs alone, with Welch's t-test as in tools/compare.py. Everything but the
optimizer is equal: first weights, order of the pictures, batch, epochs, a learning rate that falls linearly to 0, no
weight decay, no augmentation. Writes its log, vision.txt, and vision.png into --out.
"""

import argparse
import gzip
import hashlib
import http.client
import math
import platform
import sys
import tarfile
import time
import urllib.request
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from compare import t_test  # noqa: E402

from train_gpt import Muon, RunError, describe_hardware, require  # noqa: E402

# Pictures. Both sets come as bytes, here (N, C, H, W), with a label from 0 to 9 each.

MNIST, CIFAR = "https://ossci-datasets.s3.amazonaws.com/", "https://www.cs.toronto.edu/~kriz/"
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
SOURCES = {     # file: where it is published, and its sha256
    "mnist/train-images-idx3-ubyte.gz": (MNIST, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "mnist/train-labels-idx1-ubyte.gz": (MNIST, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "mnist/t10k-images-idx3-ubyte.gz": (MNIST, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "mnist/t10k-labels-idx1-ubyte.gz": (MNIST, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    CIFAR_ARCHIVE: (CIFAR, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")}


def is_published(path: Path, digest: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def download(folder: Path) -> None:
    """Fetches the published files where they are not there, and unpacks CIFAR-10; raises RunError."""
    for name, (site, digest) in SOURCES.items():
        address, path = site + name, folder / name
        if is_published(path, digest):
            continue
        print(f"fetching {address}", flush=True)
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise RunError(f"{address}: {error}: try again, or put that file at {path}") from None
        found = hashlib.sha256(content).hexdigest()
        require(found == digest, f"{address}: sha256 {found}, published is {digest}: try again, or find another copy")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(content)
        part.replace(path)          # so that the file at `path` is always whole

    with tarfile.open(folder / CIFAR_ARCHIVE) as archive:
        for member in archive:
            if member.name.endswith(".bin"):
                path = folder / "cifar-10-batches-bin" / Path(member.name).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())


def origin(folder: Path, prefix: str) -> str:
    """Says whether the files of a set are the published ones; for CIFAR-10, whether its archive is there."""
    for name, (_, digest) in SOURCES.items():
        if name.startswith(prefix) and not is_published(folder / name, digest):
            return ("not the published files but another copy, such as one by way of JPEG: accuracies do not compare "
                    "with published ones to the last decimals")
    return "the published files"


def read_file(path: Path) -> bytes:
    remedy = "add --download, or give the folder of the pictures as --data"
    require(path.exists(), f"{path}: not there: {remedy}")
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise RunError(f"{path}: damaged ({error}): delete it, then {remedy}") from None


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Returns the bytes of an IDX file, with that many axes; raises RunError.

    The format, of yann.lecun.com/exdb/mnist: 0, 0, 8 for bytes, the number of axes, the length of each as a big-endian
    int32, and then the bytes. The file may be there without .gz, and then is not compressed.
    """
    path = path if path.exists() or not path.with_suffix("").exists() else path.with_suffix("")
    content, start = read_file(path), 4 + 4 * axes
    magic = bytes([0, 0, 8, axes])
    require(content[:4] == magic, f"{path}: starts with {content[:4].hex()}, not {magic.hex()}: give an IDX file of "
            f"bytes with {axes} axes")
    shape = np.frombuffer(content[4:start].ljust(4 * axes, b"\0"), ">u4").tolist()
    size = start + math.prod(shape)
    require(len(content) == size, f"{path}: {len(content)} bytes, not {size}: truncated or damaged: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def check_labels(path: Path, labels: np.ndarray) -> None:
    require(labels.max(initial=0) < 10, f"{path}: a label is {labels.max()}, and 9 is the highest: fetch it again")


def read_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    name = dict(train="train", test="t10k")[part]
    path = folder / f"mnist/{name}-labels-idx1-ubyte.gz"
    pictures, labels = read_idx(folder / f"mnist/{name}-images-idx3-ubyte.gz", 3), read_idx(path, 1)
    require(pictures.shape == (len(labels), 28, 28), f"{path}: {len(labels)} labels for pictures of shape "
            f"{pictures.shape}: give as many, of 28 x 28 pixels")
    check_labels(path, labels)
    return pictures[:, None], labels


def read_cifar(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The format, of cs.toronto.edu/~kriz/cifar.html: for each picture its label, and 3 x 32 x 32 bytes."""
    names = dict(train=[f"data_batch_{i}.bin" for i in range(1, 6)], test=["test_batch.bin"])[part]
    rows, size = [], 1 + 3 * 32 * 32
    for name in names:
        path = folder / "cifar-10-batches-bin" / name
        content = read_file(path)
        whole = len(content) and len(content) % size == 0
        require(whole, f"{path}: {len(content)} bytes, not a multiple of {size}: truncated or damaged: fetch it again")
        rows.append(np.frombuffer(content, np.uint8).reshape(-1, size))
        check_labels(path, rows[-1][:, 0])
    table = np.concatenate(rows)
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0]


# Networks. Muon takes matrices, so a convolution holds its filters as one.

class Conv(nn.Linear):
    """A 3 x 3 convolution that halves height and width. Its filters are a matrix (outputs, inputs * 3 * 3), whose first
    values are of the same distribution as those of torch's Conv2d."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__(9 * inputs, outputs)

    def forward(self, x_BCHW):
        return F.conv2d(x_BCHW, self.weight.unflatten(1, (-1, 3, 3)), self.bias, stride=2, padding=1)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(28 * 28, 128), nn.ReLU(),
        nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        Conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(),
        Conv(16, 32), nn.BatchNorm2d(32), nn.ReLU(),
        Conv(32, 64), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


@dataclass(frozen=True)
class Task:
    read: Callable              # (folder, "train" or "test") -> pictures and labels
    network: Callable
    describe: str
    most: int                   # pictures to train with
    epochs: int
    published: dict             # {optimizer: (loss, accuracy in %)}; None: not given


BATCH = 256                     # pictures of a step
JUDGED = 5000                   # pictures at most, that are held out, and of the test set
PUBLISHED = ("published: Wei 2025, huggingface.co/datasets/bird-of-paradise/muon-tutorial, section 7; it names neither "
             "its networks nor the pictures of its loss")
TASKS = {
    "mnist": Task(read_mnist, mlp, "MLP 784-128-128-10", 60_000, 3,
                  dict(Muon=(0.0475, None), AdamW=(0.0717, None), SGD=(0.3931, None))),
    "cifar-10": Task(read_cifar, convolutional, "convolutions 3-16-32-64 with batch norm", 15_000, 5,
                     dict(Muon=(0.6279, 80.79), AdamW=(0.8955, 71.66), SGD=(1.1023, 64.40)))}


# Optimizers: each of a model and one learning rate.

def muon(model: nn.Sequential, lr: float) -> list[torch.optim.Optimizer]:
    """Muon has the matrices of the hidden layers. AdamW, with a tenth of the rate as in train_gpt.py, has the rest: the
    output layer, biases and gains."""
    matrices = [p for p in model[:-1].parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p not in set(matrices)]
    return [Muon(matrices, lr=lr), *adamw(rest, lr / 10)]


def adamw(parameters, lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)]


def sgd(parameters, lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, fused=True)]


OPTIMIZERS = {          # with the learning rate in the middle of those that are tried
    "Muon": (muon, 0.02),
    "AdamW": (lambda model, lr: adamw(model.parameters(), lr), 0.002),
    "SGD": (lambda model, lr: sgd(model.parameters(), lr), 0.05)}


# Training.

@dataclass(frozen=True)
class Run:
    optimizer: str
    lr: float
    seed: int
    losses: list                # after each epoch, in nats, of the pictures that judge it
    accuracies: list            # in %
    seconds: float              # of training alone, of one CPU core

    def __str__(self) -> str:
        losses = " ".join(f"{loss:.4f}" for loss in self.losses)
        accuracies = " ".join(f"{accuracy:.2f}" for accuracy in self.accuracies)
        return (f"{self.optimizer:5} lr {self.lr:<8g} seed {self.seed}  loss {losses}  accuracy {accuracies} %  "
                f"{self.seconds:.2f} s")


def load(task: Task, folder: Path) -> tuple[tuple, tuple, tuple]:
    """Returns (pictures, labels) to train with, of the last of the training set, which are held out, and of the test.

    Pictures are float32 (N, C, H, W): of those to train with, each channel has mean 0 and standard deviation 1.
    """
    pictures, labels = task.read(folder, "train")
    held_out = min(JUDGED, len(labels) // 10)
    count = min(task.most, len(labels) - held_out)
    require(count >= BATCH, f"{folder}: {count} pictures to train with: give at least {BATCH}")
    test_pictures, test_labels = task.read(folder, "test")
    parts = [(pictures[:count], labels[:count]), (pictures[-held_out:], labels[-held_out:]),
             (test_pictures[:JUDGED], test_labels[:JUDGED])]
    tensors = [(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)) for x, y in parts]
    std, mean = torch.std_mean(tensors[0][0], dim=(0, 2, 3), keepdim=True)
    for x, _ in tensors:
        x.sub_(mean).div_(std)
    return tuple(tensors)


@torch.no_grad()
def judge(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Returns (mean loss in nats, accuracy in %)."""
    model.eval()
    logits = torch.cat([model(part) for part in x.split(BATCH)])
    model.train()
    right = logits.argmax(1) == y
    return F.cross_entropy(logits, y).item(), 100 * right.float().mean().item()


def train(task: Task, name: str, lr: float, seed: int, model: nn.Module, pictures: tuple, judged: tuple) -> Run:
    optimizers, (x, y) = OPTIMIZERS[name][0](model, lr), pictures
    batches = len(y) // BATCH
    steps = task.epochs * batches
    schedules = [LambdaLR(optimizer, lambda step: 1 - step / steps) for optimizer in optimizers]
    order = torch.Generator().manual_seed(seed)
    losses, accuracies, seconds = [], [], 0.0
    for _ in range(task.epochs):
        clock = time.thread_time()      # of this thread: the other runs beside it do not count
        shuffled = torch.randperm(len(y), generator=order)[:batches * BATCH]
        for rows in shuffled.split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            model.zero_grad()
            loss.backward()
            for part in (*optimizers, *schedules):
                part.step()
        seconds += time.thread_time() - clock
        loss, accuracy = judge(model, *judged)
        losses.append(loss)
        accuracies.append(accuracy)
    return Run(name, lr, seed, losses, accuracies, seconds)


def train_all(task: Task, wanted: list[tuple], pictures: tuple, judged: tuple, say: Callable) -> list[Run]:
    """Trains (optimizer, learning rate, seed) of `wanted`, as many at once as torch has threads."""
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started, runs = [], []
        for name, lr, seed in wanted:
            torch.manual_seed(seed)     # the weights are drawn here, one model after the other
            started.append(pool.submit(train, task, name, lr, seed, task.network(), pictures, judged))
        for job in started:
            runs.append(job.result())
            say(str(runs[-1]))
    return runs


def best_lr(runs: list[Run], name: str) -> float:
    """Returns the learning rate with the lowest loss after the last epoch. A loss that is not a number is the worst."""
    return min((run.losses[-1] if math.isfinite(run.losses[-1]) else math.inf, run.lr)
               for run in runs if run.optimizer == name)[1]


def tune(task: Task, pictures: tuple, held_out: tuple, say: Callable) -> list[Run]:
    """Tries, for each optimizer, a rate, 1/4 and 4 times that, and then 1/2 and 2 times the best of the three."""
    centres = {name: lr for name, (_, lr) in OPTIMIZERS.items()}
    runs = []
    for factors in ((1 / 4, 1, 4), (1 / 2, 2)):
        wanted = [(name, factor * lr, 0) for factor in factors for name, lr in centres.items()]
        runs += train_all(task, wanted, pictures, held_out, say)
        centres = {name: best_lr(runs, name) for name in centres}
    return runs


# The comparison.

MEASURES = {            # with the decimals that are shown
    "test loss": (lambda run: run.losses[-1], 4),
    "accuracy, %": (lambda run: run.accuracies[-1], 2),
    "CPU seconds": (lambda run: run.seconds, 2)}


def values(runs: list[Run], name: str, measure: str) -> list[float]:
    return [MEASURES[measure][0](run) for run in runs if run.optimizer == name]


def mean_text(numbers: list[float], digits: int) -> str:
    """Returns the mean, and half the width of its 95% confidence interval where there are several numbers."""
    interval = t_test(None, numbers, 0.05)
    half = f" ± {(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
    return f"{fmean(numbers):.{digits}f}{half}"


def table(task: Task, runs: list[Run]) -> str:
    lines = [f"| optimizer | lr | {' | '.join(MEASURES)} | published loss | published accuracy, % |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for name in OPTIMIZERS:
        lr = next(run.lr for run in runs if run.optimizer == name)
        cells = [mean_text(values(runs, name, measure), digits) for measure, (_, digits) in MEASURES.items()]
        theirs = ["-" if number is None else f"{number:g}" for number in task.published[name]]
        lines.append(f"| {' | '.join([name, f'{lr:g}', *cells, *theirs])} |")
    return "\n".join(lines)


def verdicts(runs: list[Run]) -> str:
    """Compares Muon with each other optimizer, at that comparison's share of 5%. The loss decides."""
    rivals = [name for name in OPTIMIZERS if name != "Muon"]
    alpha, lines, decisions = 0.05 / len(rivals), [], []
    for rival in rivals:
        for measure, (_, digits) in MEASURES.items():
            ours, theirs = values(runs, "Muon", measure), values(runs, rival, measure)
            low, high, p = t_test(theirs, ours, alpha) or (-math.inf, math.inf, 1.0)
            lines.append(f"Muon - {rival}, {measure}: {fmean(ours) - fmean(theirs):+.{digits}f} "
                         f"({100 * (1 - alpha):g}% confidence interval {low:+.{digits}f} to {high:+.{digits}f}, "
                         f"p = {p:.2g})")
            if measure == "test loss":
                word = "lower than" if high < 0 else "higher than" if low > 0 else "not told apart from"
                decisions.append(f"{word} {rival}'s")
    return "\n".join([*lines, f"verdict: Muon's test loss after equal epochs is {' and '.join(decisions)}"])


LOOKS = dict(Muon=dict(color="#0072B2", marker="o"), AdamW=dict(color="#D55E00", marker="s"),
             SGD=dict(color="#009E73", marker="^"))     # Okabe and Ito 2008: told apart by the colour-blind


def draw(results: dict[str, tuple[list[Run], list[Run]]], path: Path) -> None:
    """Draws, for each task, the test loss by epoch with its standard deviation, and below it the search of the rate."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for (title, (tried, runs)), (above, below) in zip(results.items(), axes.T, strict=True):
        for name, look in LOOKS.items():
            curves = np.array([run.losses for run in runs if run.optimizer == name])
            epochs, mean = np.arange(1, curves.shape[1] + 1), curves.mean(0)
            spread = curves.std(0, ddof=min(1, len(curves) - 1))
            above.plot(epochs, mean, label=f"{name} {mean[-1]:.4f}", **look)
            above.fill_between(epochs, mean - spread, mean + spread, color=look["color"], alpha=0.25, linewidth=0)
            points = sorted((run.lr, run.losses[-1]) for run in tried if run.optimizer == name)
            below.plot(*np.array(points).T, label=name, **look)
        above.set(title=f"{title}: mean ± std of {len(curves)} seeds", xlabel="epoch", xticks=epochs,
                  ylabel="test loss (nats)")
        below.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats)",
                  title=f"{title}: search, one seed")
        for panel in (above, below):
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(128).save(path, optimize=True)      # a third of the bytes


def experiment(title: str, sets: tuple, seeds: int, say: Callable) -> tuple[list[Run], list[Run]]:
    """Returns the runs of the search, which the held-out pictures judge, and those that the test pictures judge."""
    task, (train_set, held_out, test) = TASKS[title], sets
    say(f"\n{title}: {task.describe}; {len(train_set[1]):,} training pictures, {len(held_out[1]):,} held out, "
        f"{len(test[1]):,} of the test; batch {BATCH}, {task.epochs} epochs")
    if len(train_set[1]) == task.most:
        say("That is a part of the training set, so that the whole takes at most 5 minutes on 2 CPU cores.")
    say("search of the learning rate, judged by the held-out pictures")
    tried = tune(task, train_set, held_out, say)
    best = {name: best_lr(tried, name) for name in OPTIMIZERS}
    for name, lr in best.items():
        rates = [run.lr for run in tried if run.optimizer == name]
        if lr in (min(rates), max(rates)):
            say(f"{name}: the best rate, {lr:g}, is at an end of those that were tried")
    say("runs from fresh seeds, judged by the test pictures")
    wanted = [(name, lr, seed) for seed in range(1, seeds + 1) for name, lr in best.items()]
    return tried, train_all(task, wanted, train_set, test, say)


def run_all(folder: Path, out: Path, seeds: int) -> None:
    """Runs all tasks; writes out/vision.txt and out/vision.png; raises RunError before anything trains."""
    clock, cpu_clock = time.perf_counter(), time.process_time()
    sets = {title: load(task, folder) for title, task in TASKS.items()}
    out.mkdir(parents=True, exist_ok=True)
    log = out / "vision.txt"
    log.write_text("")

    def say(line: str) -> None:
        print(line, flush=True)
        with log.open("a", encoding="utf-8") as file:
            print(line, file=file)

    say(f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}, "
        f"{describe_hardware(torch.device('cpu'))}; a run has one thread, and as many run at once as there are threads")
    for title in TASKS:
        say(f"{title}: {origin(folder, title.partition('-')[0])}")
    results = {title: experiment(title, sets[title], seeds, say) for title in TASKS}
    for title, (_, runs) in results.items():
        say(f"\n{title}: mean of {seeds} seeds ± half its 95% confidence interval\n\n{table(TASKS[title], runs)}\n")
        say(verdicts(runs))
    draw(results, out / "vision.png")
    say(f"\n{PUBLISHED}")
    say(f"{time.perf_counter() - clock:.0f} s in all, {time.process_time() - cpu_clock:.0f} s of CPU cores")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/vision", help="folder of the pictures (data/vision)")
    parser.add_argument("--download", action="store_true", help="fetch the published files into that folder first")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each optimizer after the search (5)")
    parser.add_argument("--out", type=Path, default=ROOT / "examples/out", help="folder of the results (examples/out)")
    args = parser.parse_args(arguments)
    try:
        require(args.seeds >= 1, f"--seeds {args.seeds}: give 1 or more")
        if args.download:
            download(args.data)
        run_all(args.data, args.out, args.seeds)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
