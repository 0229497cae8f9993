#!/usr/bin/env python3
"""Train a GPT to a target validation loss, as fast as the machine allows.

    ./run.sh                               # environment, data, training and plot
    python train_gpt.py tiny               # one process: a CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py small
    python train_gpt.py --resume logs/RUN  # go on from the checkpoint of a run

tiny on one CPU core: 1.2743 nats a byte (1.2639 to 1.2918, n = 5; target 1.30).
small has not run on a GPU yet.

Shape suffixes: B rows of a batch, T tokens of a row, D model_dim, H num_heads,
K head_dim, V padded vocabulary; k matrices of m x n. Losses are in nats a token.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import fnmatch
import glob
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class RunError(ValueError):
    """Bad input: the message names the file or option, the value and the remedy."""

def require(holds, message: str) -> None:
    if not holds:
        raise RunError(message)

# ==== 1. Config: every knob of a run ==============================================
# A tweak is a change of this file. For sweeps each field is an option too: `--lr 0.003`.

@dataclasses.dataclass(frozen=True)
class Config:
    track: str = "small"             # a name in TRACKS, which has what differs from below
    # Data. A sha256 is of the shards whose losses compare, "" where it is not known.
    prepare: str = "data/fineweb.py"  # program that makes the shards
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"
    train_sha256: str = ""
    val_sha256: str = ""
    vocab_size: int = 50257          # tokens, of which the last is end-of-text
    val_tokens: int = 10 * 2**20     # tokens that the validation loss is the mean of
    target: float = 3.28             # validation loss to reach
    # Model
    seq_len: int = 1024              # tokens of a row
    num_layers: int = 12             # blocks
    num_heads: int = 6               # attention heads
    head_dim: int = 128              # channels of a head
    attention_scale: float = 0.12    # factor of q . k before the softmax
    logit_softcap: float = 15.0      # c in c * tanh(logits / c)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations (auto: by hardware)
    # Batch
    batch_tokens: int = 524_288      # tokens of a step, over all processes
    micro_batch: int = 0             # most rows that a process runs at once (0: by memory)
    # Optimizers. lr is AdamW's for lm_head; the other rates are ratios to it.
    lr: float = 0.002                # learning rate
    embed_lr_ratio: float = 150.0    # of the embedding
    matrix_lr_ratio: float = 0.0     # of the matrices (0: what belongs to update_scale)
    matrix_optimizer: str = "muon"   # a name in OPTIMIZERS
    update_scale: str = "sqrt_ratio"  # of Muon: a name in UPDATE_SCALES
    momentum: float = 0.95           # of Muon
    momentum_start: float = 0.85     # of Muon at the first step
    momentum_warmup_steps: int = 300  # from momentum_start to momentum (0: off)
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # that Muon keeps it in
    nesterov: Literal["on", "off"] = "on"  # Muon looks ahead by the gradient
    normuon_beta2: float = 0.0       # of NorMuon's second moment (0: off)
    matrix_weight_decay: float = 0.0  # a step takes lr times this off (0: off)
    decay_kind: Literal["plain", "cautious"] = "plain"  # cautious: where signs agree
    adam_weight_decay: float = 0.0   # of lm_head and embedding (0: off)
    grad_clip: float = 0.0           # largest norm of the whole gradient (0: off)
    # Schedule
    num_steps: int = 4600            # optimizer steps
    warmup_steps: int = 0            # of linear warm-up (0: off)
    cooldown_steps: int = 1800       # of linear cool-down at the end (0: off)
    # Run
    seed: int = 0                    # of the first weights and of the data's order
    val_every: int = 125             # steps between validations (0: at the end only)
    save_every: int = 0              # steps between checkpoints (0: on a signal only)
    metrics_every: int = 0           # steps between lines of optimizer metrics (0: off)
    resume: str = ""                 # checkpoint or run folder to go on from
    log_dir: str = "logs"            # folder of the run folders
    run_id: str = ""                 # name of the run folder ("": track and time)
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile (auto: on a GPU)
    prime_steps: int = 2             # dummy steps before the clock starts
    collective_timeout: float = 600.0  # seconds that a process waits for the others

    model_dim = property(lambda self: self.num_heads * self.head_dim)
    padded_vocab_size = property(lambda self: math.ceil(self.vocab_size / 64) * 64)

TRACKS = {
    "small": dict(),
    "tiny": dict(
        prepare="data/local_text.py",
        train_files="data/tiny/train_*.bin", val_files="data/tiny/val_*.bin",
        train_sha256="8c50fa9a10abf3fef5d6cd34ceedb667a62d72251aba450c66b02e151bbedac6",
        val_sha256="709ddb7c9af041164ff67d6e516132236f9070f4f3d20eb9f4b26582240e3e11",
        vocab_size=257, val_tokens=2**20, target=1.30,
        seq_len=256, num_layers=3, num_heads=4, head_dim=40, attention_scale=0.24,
        batch_tokens=1024, embed_lr_ratio=30.0, normuon_beta2=0.95,
        num_steps=840, cooldown_steps=630, momentum_warmup_steps=200, val_every=500),
}
# What a resumed run may have otherwise. A change of any other field is another run.
RESUME_MAY_CHANGE = set("""prepare train_files val_files micro_batch val_every save_every
    metrics_every resume log_dir run_id compile prime_steps collective_timeout""".split())

def check_config(c: Config) -> None:
    for name, value in vars(c).items():
        good = isinstance(value, str) or 0 <= value < math.inf
        require(good, f"--{name} {value}: must be finite, and not negative")
    units = dict(seq_len=1, val_tokens=c.seq_len, batch_tokens=c.seq_len, num_steps=1,
                 num_layers=1, num_heads=1, head_dim=2, vocab_size=1)
    for name, unit in units.items():
        value = getattr(c, name)
        require(value and value % unit == 0, f"--{name} {value}: must be a multiple of {unit}")
    require(re.fullmatch(r"[\w.-]*", c.run_id), f"--run_id {c.run_id}: must be a folder's name")

def parse_command_line(arguments: list[str]) -> dict:
    """The fields given, such as {"track": "tiny", "num_steps": 50}."""
    source = Path(__file__).read_text(encoding="utf-8")
    parser = argparse.ArgumentParser(
        usage="train_gpt.py TRACK [--field value ...]; --help lists the fields",
        description=__doc__, epilog=source[source.index("class Config"):source.index("# What a")],
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", nargs="?", help=" or ".join(TRACKS))
    for field in dataclasses.fields(Config)[1:]:
        parser.add_argument(f"--{field.name}", type=type(field.default), help=argparse.SUPPRESS,
                            choices=get_args(field.type) or None)
    return vars(parser.parse_args(arguments))

def make_config(given: dict, saved: dict | None = None) -> Config:
    """The fields given over those of the track or, on a resume, of the saved run."""
    if saved is None:
        track = given.get("track")
        require(track in TRACKS, f"track {track}: give {' or '.join(TRACKS)}")
        c = Config(**TRACKS[track] | given)
    else:
        resume, known = given["resume"], {field.name for field in dataclasses.fields(Config)}
        require(saved.keys() == known, f"--resume {resume}: another version of this file wrote it")
        for name in given.keys() - RESUME_MAY_CHANGE:
            require(given[name] == saved[name],
                    f"--{name} {given[name]}: the run has {saved[name]}; leave it out")
        # The run goes on in the folder of its checkpoint.
        folder = Path(resume).resolve()
        c = Config(**saved | dict(log_dir=str(folder.parent), run_id=folder.name) | given)
    check_config(c)
    return c

# ==== 2. Processes and log ========================================================
def ranks() -> tuple[int, int]:
    """(rank, number of ranks) of this process; without torchrun, (0, 1)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def gather(value) -> list:
    """The `value` of every rank (anything that pickles), in their order."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values

def join_ranks(timeout: float) -> torch.device:
    """Joins the processes that torchrun started, if it did; returns this one's device."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        # gloo carries the Python objects of `gather`, NCCL the tensors.
        backend, gpus = "cpu:gloo,cuda:nccl", torch.cuda.device_count()
        require(device.index < gpus, f"--nproc_per_node: give at most {gpus}, the GPUs here")
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    return device

def open_log(folder: Path):
    """A function that writes to log.txt and the console, on rank 0 alone."""
    if ranks()[0] > 0:
        return lambda text, console=True: None
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")

    def log(text: str, console: bool = True) -> None:
        for out in [file, sys.stdout][:1 + console]:
            print(text, file=out, flush=True)
    return log

def has_bf16_units(device: torch.device) -> bool:
    # Older GPUs, and the CPUs of most laptops, only emulate bfloat16.
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch 2.11 does not tell.
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))

def describe_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{ranks()[1]} x {torch.cuda.get_device_name(device)}"
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        name = re.search(r"model name\s*: (.*)|$", info.read_text())[1] or name
    return f"{ranks()[1]} x {torch.get_num_threads()} threads of {name}"

# ==== 3. Data =====================================================================
# A shard is 256 int32, the first four being a magic number, a version, the number of tokens
# and the vocabulary (0: GPT-2's), then the tokens as uint16: llm.c's format. run.sh calls
# `data/shards.py verify`, which checks more than is checked here.
HEADER_BYTES, MAGIC, VERSION, GPT2_VOCAB_SIZE = 1024, 20240520, 1, 50257

def open_shard(path: str, vocab_size: int) -> np.ndarray:
    """Its tokens, uint16 (n,), mapped into memory."""
    size, redo = os.path.getsize(path), "delete it and prepare the data again (./run.sh)"
    require(size >= HEADER_BYTES, f"{path}: is too short for a shard; {redo}")
    magic, version, count, vocab = np.fromfile(path, dtype="<i4", count=4).tolist()
    whole = (magic, version, size) == (MAGIC, VERSION, HEADER_BYTES + 2 * count)
    require(whole, f"{path}: magic {magic}, version {version}, {count} tokens in {size} bytes: "
            f"damaged; {redo}")
    vocab = vocab or GPT2_VOCAB_SIZE
    require(vocab == vocab_size, f"{path}: vocabulary {vocab}; give --vocab_size {vocab}")
    tokens = np.memmap(path, dtype="<u2", mode="r")[HEADER_BYTES // 2:]
    top = tokens.max(initial=0)
    require(top < vocab, f"{path}: token {top} is outside the vocabulary of {vocab}; {redo}")
    return tokens

class Rows:
    """Rows of seq_len tokens and the one after, from shards in the order of their names.

    No row spans two shards. Only the shards that hold the first `max_rows` count, so that a
    run does not depend on how many were downloaded.
    """
    def __init__(self, option: str, pattern: str, c: Config, max_rows: int):
        self.seq_len, self.count = c.seq_len, 0
        self.paths, self.shards, self.firsts = [], [], []
        for path in sorted(glob.glob(pattern)):
            if self.count < max_rows:
                self.paths.append(path)
                self.shards.append(open_shard(path, c.vocab_size))
                self.firsts.append(self.count)     # its first row
                self.count += max(0, len(self.shards[-1]) - 1) // c.seq_len
        require(self.count, f"--{option} {pattern}: no row of {c.seq_len} tokens in these "
                f"{len(self.paths)} files; python {c.prepare} makes those of the track")

    def sha256(self) -> str:
        """Of the shard; of several, of the lines of theirs."""
        digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.paths]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(f"{x}\n" for x in digests).encode()).hexdigest()

    def read(self, rows) -> torch.Tensor:
        """Their tokens, uint16 (B, T + 1)."""
        tokens = np.empty((len(rows), self.seq_len + 1), dtype=np.uint16)
        for i, row in enumerate(rows):
            shard = np.searchsorted(self.firsts, row, side="right") - 1
            start = (row - self.firsts[shard]) * self.seq_len
            tokens[i] = self.shards[shard][start:start + self.seq_len + 1]
        return torch.from_numpy(tokens)

@lru_cache(4)
def permutation(seed: int, count: int) -> np.ndarray:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()

def training_order(count: int, seed: int, positions: range) -> list[int]:
    """The rows, of `count`, at these positions: a permutation in each epoch, since
    neighbouring rows are alike and ought to be apart."""
    return [permutation((seed << 20) + i // count, count)[i % count] for i in positions]

def load_batches(rows: Rows, starts: list[int], seed: int, device, first_step: int = 0):
    """The distributed loader: yields this rank's tokens, int64 (B, T + 1), step by step.

    Step i has the positions starts[i] to starts[i + 1] of the training order, and each rank
    an equal share: a function of the step alone, so that a resume needs no state.
    """
    rank, world_size = ranks()

    def prepare(step):
        share = (starts[step + 1] - starts[step]) // world_size
        first = starts[step] + rank * share
        tokens = rows.read(training_order(rows.count, seed, range(first, first + share)))
        # From pinned memory the copy to a GPU does not make the host wait.
        return tokens.pin_memory() if device.type == "cuda" else tokens

    # A thread reads two batches while one is used.
    steps, queue = range(first_step, len(starts) - 1), []
    with ThreadPoolExecutor(1) as thread:
        for step in steps:
            ahead = steps[step - first_step + len(queue):step - first_step + 3]
            queue += [thread.submit(prepare, later) for later in ahead]
            # To int64 on the device: a quarter of the bytes has to travel.
            yield queue.pop(0).result().to(device, non_blocking=True).to(torch.int64)

# ==== 4. Model ====================================================================
def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without parameters (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Linear):
    """Its weight stays in float32 and is cast to the dtype of x."""
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

@lru_cache(4)
def rotary_tables(seq_len: int, head_dim: int, device):
    """(cos, sin) of the angles position * 10000^(-2i/K), float32 (T, 1, K/2)."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 10_000.0 ** -exponents)[:, None, :]
    return angles.cos(), angles.sin()

def rotate(x_BTHK, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turns channels i and i + K/2."""
    # In float32: angles in bfloat16 would be off by whole positions.
    a, b = x_BTHK.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x_BTHK)

class Attention(nn.Module):
    """Causal self-attention. q and k have unit RMS, which bounds q . k (arXiv:2010.04245)."""
    def __init__(self, c: Config):
        super().__init__()
        self.num_heads, self.scale = c.num_heads, c.attention_scale
        # Rows of Q, then of K, then of V.
        self.qkv = Linear(c.model_dim, 3 * c.model_dim, bias=False)
        self.proj = Linear(c.model_dim, c.model_dim, bias=False)

    def forward(self, x_BTD, cos, sin):
        q, k, v = self.qkv(x_BTD).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))

class MLP(nn.Module):
    """W2 relu(W1 x)^2 (So et al. 2021, arXiv:2109.08668)."""
    def __init__(self, c: Config):
        super().__init__()
        self.up = Linear(c.model_dim, 4 * c.model_dim, bias=False)
        self.proj = Linear(4 * c.model_dim, c.model_dim, bias=False)

    def forward(self, x_BTD):
        return self.proj(F.relu(self.up(x_BTD)).square())

class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x_BTD, cos, sin):
        x_BTD = x_BTD + self.attention(norm(x_BTD), cos, sin)
        return x_BTD + self.mlp(norm(x_BTD))

class GPT(nn.Module):
    """Decoder-only transformer; a call returns the loss that is trained on."""
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.padded_vocab_size, c.model_dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.lm_head = Linear(c.model_dim, c.padded_vocab_size, bias=False)

    @torch.no_grad()
    def initialize(self) -> "GPT":
        """Draws the weights, on the CPU and so the same everywhere."""
        std = 0.5 * self.config.model_dim ** -0.5
        # The first pattern that fits counts.
        rules = {"embed.weight": 1.0, "lm_head.weight": 0.0, "*.proj.weight": 0.0,
                 "*.qkv.weight": std, "*.up.weight": std}
        generator = torch.Generator().manual_seed(self.config.seed)
        for name, p in self.named_parameters():
            fits = [pattern for pattern in rules if fnmatch.fnmatchcase(name, pattern)]
            require(fits, f"parameter {name}: no rule of GPT.initialize fits it; add one")
            nn.init.normal_(p, 0.0, rules[fits[0]], generator)
        return self

    def hidden(self, tokens_BT):
        """The output of the last block (B, T, D)."""
        cos, sin = rotary_tables(tokens_BT.size(1), self.config.head_dim, tokens_BT.device)
        x_BTD = norm(self.embed(tokens_BT).to(getattr(torch, self.config.dtype)))
        for block in self.blocks:
            x_BTD = block(x_BTD, cos, sin)
        return x_BTD

    def logits(self, x_BTD):
        """Of the next tokens, float32 (B, T, V), from the output of `hidden`."""
        logits_BTV, cap = self.lm_head(norm(x_BTD)).float(), self.config.logit_softcap
        return cap * torch.tanh(logits_BTV / cap)

    def loss(self, x_BTD, targets_BT):
        """The training loss. Validation has its own, in section 7."""
        return F.cross_entropy(self.logits(x_BTD).flatten(0, 1), targets_BT.flatten())

    def forward(self, tokens_BT, targets_BT):
        return self.loss(self.hidden(tokens_BT), targets_BT)

# ==== 5. Optimizers and the parameter table =======================================
# Of an orthogonal m x n update the scale, and the ratio of Muon's rate to AdamW's for it.
UPDATE_SCALES = {
    "sqrt_ratio": (lambda m, n: max(1, m / n) ** 0.5, 10.0),        # Jordan et al. 2024
    "sqrt_max": (lambda m, n: max(m, n) ** 0.5, 0.1),               # as first published
    "match_rms_adamw": (lambda m, n: 0.2 * max(m, n) ** 0.5, 1.0),  # arXiv:2502.16982
    "none": (lambda m, n: 1.0, 10.0),                               # OrthogonalNesterov
}

def orthogonalize(G_kmn: torch.Tensor, steps: int, dtype: torch.dtype | None = None):
    """About U V^T of each matrix U S V^T, m <= n, by Newton-Schulz in `dtype`: from G / |G|_F,
    X <- a X + b (X X^T) X + c (X X^T)^2 X (Jordan et al. 2024)."""
    # Steep at 0. Five steps leave singular values in about [0.7, 1.2], but for those that
    # were below 0.003 |G|_F.
    a, b, c = 3.4445, -4.7750, 2.0315
    size = G_kmn.norm(dim=(-2, -1), keepdim=True)
    X = (G_kmn / size.clamp_min(1e-20)).to(dtype or G_kmn.dtype)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X

class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, for the matrices of hidden layers.

        v <- mu v + (1 - mu) g;   u <- orthogonalize((1 - mu) g + mu v)
        W <- (1 - lr weight_decay) W - lr scale(m, n) u

    (Jordan et al. 2024, kellerjordan.github.io/posts/muon). A parameter is a matrix m x n,
    or `parts` of them one above the other, as a fused QKV, or with three dimensions a bank
    of k; each matrix is taken apart. Not for gains and biases, embeddings, the output layer
    or sharded tensors; the filters of a convolution are the caller's to flatten. With several
    ranks each orthogonalizes a share; gradients must be, and the state is, the same on all.
    """
    # Every one may stand in a group.
    SETTINGS = dict(
        lr=0.02, momentum=0.95, weight_decay=0.0, parts=1, update_scale="sqrt_ratio",
        nesterov=True,        # False: u of v alone
        accumulate=False,     # True: v <- mu v + g, u of g + mu v (OrthogonalNesterov)
        cautious=False,       # True: decay by lr (lr / initial_lr), where u, W agree in sign
        # NorMuon (Li et al. 2025, arXiv:2510.05491; 0: off): each row of u over its running
        # RMS, at the norm of u. Where m < n each column, unlike the paper.
        beta2=0.0,
        ns_steps=5, ns_dtype=None, momentum_dtype=None)
    orthogonalize = staticmethod(orthogonalize)     # on a GPU a compiled one

    def __init__(self, params, **settings):
        self.last_updates = {}     # {parameter: (u (k, m, n), its factor)}
        super().__init__(params, self.SETTINGS | settings)

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        try:
            self.check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self.param_groups[-1].setdefault("initial_lr", self.param_groups[-1]["lr"])

    def check(self, group: dict) -> None:
        unknown = group.keys() - self.SETTINGS - {"params", "param_names", "initial_lr"}
        require(not unknown, f"Muon has no setting {', '.join(unknown)}")
        for key, least, limit in [("lr", 0, math.inf), ("weight_decay", 0, math.inf),
                                  ("momentum", 0, 1), ("beta2", 0, 1), ("parts", 1, 1e9)]:
            good = least <= group[key] < limit
            require(good, f"Muon: {key} {group[key]}: give {least} or more, below {limit:g}")
        scale, parts = group["update_scale"], group["parts"]
        require(scale in UPDATE_SCALES, f"Muon: update_scale {scale}: give {[*UPDATE_SCALES]}")
        names = group.get("param_names", ["a parameter"] * len(group["params"]))
        for name, p in zip(names, group["params"], strict=True):
            what = f"Muon: {name}, {tuple(p.shape)}"
            require(not hasattr(p, "placements"), f"{what}, is a DTensor; give whole tensors")
            require(p.ndim > 1, f"{what}, is no matrix; give it to AdamW")
            require(p.ndim < 4, f"{what}, has {p.ndim} dimensions; flatten filters to two")
            fused = p.ndim == 2 and p.size(0) % parts == 0
            require(parts == 1 or fused, f"{what}, has no {parts} equal parts")

    def wide(self, x: torch.Tensor, group: dict) -> torch.Tensor:
        """A view of x as matrices (k, m, n), those with m >= n transposed."""
        if x.ndim == 2:
            x = x.unflatten(0, (group["parts"], -1))
        return x.mT if x.size(1) >= x.size(2) else x

    @torch.no_grad()
    def step(self, closure=None):
        loss, turn = None, 0
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = {}     # {shape: parameters}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape, p.dtype), []).append(p)
            for members in shapes.values():
                self.update(group, members, turn)
                turn += 1
        return loss

    def update(self, group: dict, members: list, turn: int) -> None:
        """A step of parameters of one shape."""
        mu, directions = group["momentum"], []
        for p in members:
            g, state = p.grad, self.state[p]
            v = state.get("momentum_buffer", torch.zeros_like(p)).to(p.dtype)
            v = v.mul_(mu).add_(g) if group["accumulate"] else v.lerp_(g, 1 - mu)
            state["momentum_buffer"] = v.to(group["momentum_dtype"] or p.dtype)
            if group["nesterov"]:
                v = g.add(v, alpha=mu) if group["accumulate"] else g.lerp(v, mu)
            directions.append(self.wide(v, group))
        G = torch.cat(directions)

        # The ranks take turns. Each leaves zeros for what the others compute.
        U = torch.zeros_like(G, dtype=group["ns_dtype"])
        rank, world_size = ranks()
        mine = slice((rank + turn) % world_size, None, world_size)
        U[mine] = self.orthogonalize(G[mine], group["ns_steps"], group["ns_dtype"])
        if world_size > 1:
            dist.all_reduce(U)

        if group["beta2"]:
            # The rows of a tall matrix, which lies here, are columns.
            means = U.square().mean(1, keepdim=True, dtype=p.dtype)
            for p, mean in zip(members, means.chunk(len(members)), strict=True):
                moment = self.state[p].setdefault("second_moment", torch.zeros_like(mean))
                moment.lerp_(mean, 1 - group["beta2"])
            moments = torch.cat([self.state[p]["second_moment"] for p in members])
            even = U * moments.clamp_min(1e-10).rsqrt()
            size = even.norm(dim=(1, 2), keepdim=True).clamp_min(1e-10)
            U = (even * (U.norm(dim=(1, 2), keepdim=True) / size)).to(U.dtype)

        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        scale = UPDATE_SCALES[group["update_scale"]][0]
        factor = lr * scale(p.size(-2) / group["parts"], p.size(-1))
        for p, u in zip(members, U.chunk(len(members)), strict=True):
            W = self.wide(p, group)
            if decay and group["cautious"]:
                W.sub_(W * (u * W > 0), alpha=decay * lr / group["initial_lr"])
            elif decay:
                W.sub_(W, alpha=decay)
            W.add_(u, alpha=-factor)
            self.last_updates[p] = u, factor

    @torch.no_grad()
    def get_post_step_metrics(self) -> dict:
        """{parameter: {figure: value}} of the last step: Frobenius norms, of the update without
        decay; of u |u u^T - I|_F / sqrt(m) and the extreme singular values."""
        metrics = {}
        for group in self.param_groups:
            names = group.get("param_names", range(len(group["params"])))
            for name, p in zip(names, group["params"], strict=True):
                u, factor = self.last_updates[p]
                S = torch.linalg.svdvals(u.float().nan_to_num())
                metrics[name] = dict(
                    gradient=p.grad.norm().item(), weight=p.norm().item(),
                    update=factor * u.norm().item(), least_singular=S.min().item(),
                    largest_singular=S.max().item(),
                    orthogonality_error=(S.square() - 1).square().mean().sqrt().item())
        return metrics

    def load_state_dict(self, state_dict: dict) -> None:
        for group in state_dict["param_groups"]:
            require(self.SETTINGS.keys() <= group.keys(), "Muon: this state is of another "
                    "optimizer, such as torch's or Keller Jordan's Muon; start without it")
        super().load_state_dict(state_dict)

def make_adamw(groups: list, c: Config):
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

def make_muon(groups: list, c: Config, **settings):
    common = dict(
        update_scale=c.update_scale, nesterov=c.nesterov == "on", beta2=c.normuon_beta2,
        cautious=c.decay_kind == "cautious", ns_dtype=getattr(torch, c.dtype),
        momentum_dtype=getattr(torch, c.momentum_dtype))
    return Muon(groups, **common | settings)

def make_orthogonal_nesterov(groups: list, c: Config):
    return make_muon(groups, c, accumulate=True, update_scale="none")

# What the parameter table may name.
OPTIMIZERS = dict(adamw=make_adamw, muon=make_muon, orthogonal_nesterov=make_orthogonal_nesterov)

def parameter_table(c: Config) -> list[tuple]:
    """A parameter belongs to the first row whose pattern fits its name."""
    matrix, decay = c.matrix_optimizer, c.matrix_weight_decay
    ratios = dict(muon=UPDATE_SCALES[c.update_scale][1], orthogonal_nesterov=10.0)
    matrix_lr = c.lr * (c.matrix_lr_ratio or ratios.get(matrix, 1.0))
    # OrthogonalNesterov took Q, K and V as one matrix.
    parts = dict(muon=3).get(matrix, 1)
    return [
        # pattern               optimizer  learning rate           weight decay      parts
        ("lm_head.weight",      "adamw", c.lr,                    c.adam_weight_decay, 1),
        ("embed.weight",        "adamw", c.lr * c.embed_lr_ratio, c.adam_weight_decay, 1),
        ("blocks.*.qkv.weight", matrix,  matrix_lr,               decay,           parts),
        ("blocks.*.weight",     matrix,  matrix_lr,               decay,               1),
    ]

def make_optimizers(model: GPT, c: Config) -> tuple[dict, str]:
    """({name: optimizer}, the parameter table as text)."""
    members = {row: [] for row in parameter_table(c)}
    for name, p in model.named_parameters():
        fits = [row for row in members if fnmatch.fnmatchcase(name, row[0])]
        require(fits, f"parameter {name}: no row of parameter_table fits it; add one")
        members[fits[0]].append((name, p))

    groups, table = {}, []
    for (pattern, optimizer, lr, decay, parts), named in members.items():
        require(named, f"parameter_table: {pattern}: no parameter is left; remove the row")
        require(optimizer in OPTIMIZERS, f"parameter_table: {optimizer}: is not in OPTIMIZERS")
        group = dict(params=named, lr=lr, initial_lr=lr, weight_decay=decay, parts=parts)
        groups.setdefault(optimizer, []).append(group)
        table.append(f"  {pattern:20} {optimizer}, lr {lr:g}, weight_decay {decay:g}, parts {parts}: "
                     f"{len(named)} parameters")
    return {name: OPTIMIZERS[name](groups[name], c) for name in groups}, "\n".join(table)

# ==== 6. Schedules: functions of the step, 0 for the first ========================
def lr_multiplier(c: Config, step: int) -> float:
    """Linear warm-up, constant, linear cool-down (Hagele et al. 2024, arXiv:2405.18392)."""
    warmup = (step + 1) / max(1, c.warmup_steps)
    left = (c.num_steps - step) / max(1, min(c.cooldown_steps, c.num_steps))
    return min(1.0, warmup, left)

def muon_momentum(c: Config, step: int) -> float:
    """Linear from momentum_start to momentum, then constant."""
    if step >= c.momentum_warmup_steps:
        return c.momentum
    return c.momentum_start + step / c.momentum_warmup_steps * (c.momentum - c.momentum_start)

def batch_rows(c: Config, step: int) -> int:
    """Rows of the global batch, the same for any number of processes."""
    return c.batch_tokens // c.seq_len

def set_schedules(optimizers: dict, c: Config, step: int) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(c, step)
            if "momentum" in group:
                group["momentum"] = muon_momentum(c, step)

def micro_batch_rows(c: Config, rows: int, device: torch.device) -> int:
    """Of a global batch of `rows` what a process runs at once: at most --micro_batch or, where
    that is 0, 4,096 tokens on a CPU (for its caches), 8,192 for each 20 GB of a GPU."""
    share, left = divmod(rows, ranks()[1])
    require(left == 0, f"--nproc_per_node {ranks()[1]}: give a divisor of the {rows} rows of a step")
    tokens = 4096
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        tokens = 8192 * max(1, int(memory / 20e9))
    most = c.micro_batch or max(1, tokens // c.seq_len)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)

# ==== 7. Evaluation. Do not edit: it defines the target ===========================
def validation_loss(model: GPT, x_BTD, targets_BT):
    """Plain cross-entropy, whatever the training loss is."""
    return F.cross_entropy(model.logits(x_BTD).flatten(0, 1), targets_BT.flatten())

@torch.no_grad()
def evaluate(run: SimpleNamespace, rows: range) -> float:
    """The mean loss of these rows of the validation set, which the ranks share."""
    rank, world_size = ranks()
    model, size, mine = run.model.eval(), run.micro_batch, rows[rank::world_size]
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    for start in range(0, len(mine), size):
        tokens = run.val_rows.read(mine[start:start + size]).to(run.device).to(torch.int64)
        targets = tokens[:, 1:]
        loss = run.validation_loss(model, model.hidden(tokens[:, :-1]), targets)
        total += loss.double() * targets.numel()
    model.train()
    return sum(gather(total.item())) / (len(rows) * run.config.seq_len)

# ==== 8. Checkpoints ==============================================================
class State:
    """What training changes, and exactly what a checkpoint holds."""
    def __init__(self, **parts):
        self.step, self.seconds, self.val_loss = 0, 0.0, None
        # Each has state_dict and load_state_dict; an average of the weights, say, joins here.
        self.parts = parts

    def state_dict(self) -> dict:
        content = {name: part.state_dict() for name, part in self.parts.items()}
        return content | dict(step=self.step, seconds=self.seconds, val_loss=self.val_loss,
                              rng=torch.get_rng_state())

    def load_state_dict(self, content: dict) -> None:
        self.step, self.seconds = content["step"], content["seconds"]
        self.val_loss = content["val_loss"]
        torch.set_rng_state(content["rng"])
        for name, part in self.parts.items():
            part.load_state_dict(content[name])

def save_checkpoint(path: Path, content: dict) -> None:
    """Writes beside `path` and renames, so that a whole file is there at any moment."""
    with open(path.with_name(path.name + ".part"), "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)

def load_checkpoint(folder: str) -> dict:
    path = Path(folder, "checkpoint.pt")
    require(path.is_file(), f"--resume {folder}: has no checkpoint.pt; give a run's folder")
    try:
        # Only data: a file cannot bring code along.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:     # torch.load raises many types for a file not its own
        raise RunError(f"{path}: is damaged ({error}); give another") from None

# ==== 9. The run ==================================================================
def set_up(c: Config, device: torch.device, resumed: dict) -> SimpleNamespace:
    """All that a run needs. What is wrong with it is said here, before anything trains."""
    run = SimpleNamespace(device=device, signals=[], unread=[], stopping=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: run.signals.append(number))
    sizes = [batch_rows(c, step) for step in range(c.num_steps)]
    run.starts = np.cumsum([0, *sizes]).tolist()
    run.micro_batch = micro_batch_rows(c, sizes[0], device)
    run.train_rows = Rows("train_files", c.train_files, c, run.starts[-1])
    run.val_rows = Rows("val_files", c.val_files, c, c.val_tokens // c.seq_len)
    there = run.val_rows.count * c.seq_len
    require(there >= c.val_tokens, f"--val_tokens {c.val_tokens}: --val_files has {there}")
    run.sha256 = dict(train=run.train_rows.sha256(), val=run.val_rows.sha256())
    same = resumed.get("sha256", run.sha256) == run.sha256
    require(same, f"--resume {c.resume}: its run read other data; give its files")

    # One folder and one dtype for all ranks and nodes.
    new_id = f"{c.track}_{time.strftime('%Y%m%d-%H%M%S')}_{os.urandom(4).hex()}"
    dtype = "bfloat16" if all(gather(has_bf16_units(device))) else "float32"
    run.config = c = dataclasses.replace(
        c, run_id=gather(c.run_id or new_id)[0], dtype=c.dtype.replace("auto", dtype))
    run.folder = Path(c.log_dir, c.run_id)
    taken = gather((run.folder / "log.txt").exists())[0] and not resumed
    require(not taken, f"--run_id {c.run_id}: {run.folder} holds a run; give another name")

    torch.manual_seed(c.seed)
    run.model = run.ddp = GPT(c).initialize().to(device)
    run.optimizers, run.table = make_optimizers(run.model, c)
    run.state = State(model=run.model, **run.optimizers)
    run.validation_loss = validation_loss
    run.compiled = c.compile == "on" or (c.compile == "auto" and device.type == "cuda")
    if run.compiled:
        # Block by block: nearly as fast as the model at once, in a fraction of the time.
        for block in run.model.blocks:
            block.compile(dynamic=False)
        run.model.loss = torch.compile(run.model.loss, dynamic=False)
        run.validation_loss = torch.compile(validation_loss, dynamic=False)
        Muon.orthogonalize = staticmethod(torch.compile(orthogonalize, dynamic=False))
    if ranks()[1] > 1:
        run.ddp = DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    return run

def log_header(run: SimpleNamespace) -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    git = subprocess.run("git describe --always --abbrev=40 --exclude='*' --dirty || echo none",
                         shell=True, capture_output=True, text=True).stdout.strip()
    run.log = open_log(run.folder)
    run.log(source + "=" * 100, console=False)
    run.log(f"run folder: {run.folder}")
    run.log(f"config: {json.dumps(vars(run.config))}", console=False)
    run.log(f"""host: {platform.node()}
data sha256: train {run.sha256['train']}, val {run.sha256['val']}
source: sha256 {hashlib.sha256(source.encode()).hexdigest()}, git {git}
versions: python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}
hardware: {describe_hardware(run.device)}
kernels: attention torch SDPA; {run.config.dtype}; torch.compile {run.compiled}
batch: {run.starts[1]} rows of {run.config.seq_len} tokens, {run.micro_batch} at once
data: {run.starts[-1] / run.train_rows.count:.2f} epochs; text seen again teaches less
parameters: {sum(p.numel() for p in run.model.parameters()):,}\n{run.table}""")

def prime(run: SimpleNamespace, start: dict) -> None:
    """Compiles, and warms up on random tokens, before the clock starts; leaves no trace."""
    c, clock, rows = run.config, time.perf_counter(), 2 * run.micro_batch
    for _ in range(c.prime_steps):
        train_step(run, torch.randint(c.vocab_size, (rows, c.seq_len + 1)).to(run.device))
        evaluate(run, range(run.micro_batch * ranks()[1]))
    run.unread.clear()
    run.state.load_state_dict(start)
    run.prime_seconds = time.perf_counter() - clock
    run.log(f"priming: {run.prime_seconds:.1f} s of compilation and dummy steps, not in the clock")

def accumulate_gradients(model: nn.Module, tokens, micro_batch: int) -> torch.Tensor:
    """Makes the gradient of the mean loss over the global batch; returns this rank's loss."""
    parts, total = tokens.split(micro_batch), 0.0
    model.zero_grad(set_to_none=True)
    for part in parts:
        # DDP averages over the ranks after the last part alone, as the forward pass tells it.
        wait = part is not parts[-1] and hasattr(model, "no_sync")
        with model.no_sync() if wait else contextlib.nullcontext():
            loss = model(part[:, :-1], part[:, 1:]) * (len(part) / len(tokens))
            loss.backward()
        total += loss.detach()
    return total

def train_step(run: SimpleNamespace, tokens: torch.Tensor) -> None:
    c, state = run.config, run.state
    loss = accumulate_gradients(run.ddp, tokens, run.micro_batch)
    set_schedules(run.optimizers, c, state.step)
    if c.grad_clip:
        nn.utils.clip_grad_norm_(run.model.parameters(), c.grad_clip)
    for optimizer in run.optimizers.values():
        optimizer.step()
    # What the log has of the step: means over the ranks.
    run.unread.append(dict(train_loss=loss))
    state.step += 1

def read_steps(run: SimpleNamespace) -> None:
    """Logs the steps since the last time: the one place where the host waits for a GPU."""
    state, names = run.state, run.unread[0]
    values = torch.stack([torch.stack([*step.values()]) for step in run.unread]).tolist()
    everyone = gather((values, len(run.signals)))
    means = torch.tensor([values for values, _ in everyone]).div(len(everyone)).sum(0).tolist()
    run.stopping = any(signals for _, signals in everyone)
    now = time.perf_counter()
    for step, row in enumerate(means, state.step - len(means) + 1):
        state.seconds += (now - run.clock) / len(means)
        pairs = [f"{name}:{value:.6f}" for name, value in zip(names, row, strict=True)]
        log_step(run, step, " ".join(pairs), console=step <= 10 or step % 10 == 0)
        require(math.isfinite(row[0]), f"step {step}: the loss is {row[0]}; lower --lr, or give "
                "--warmup_steps or --grad_clip; a checkpoint of before is as it was")
    run.clock, run.unread = now, []

def log_step(run: SimpleNamespace, step: int, pairs: str, console: bool = True) -> None:
    ms = 1e3 * run.state.seconds
    run.log(f"step:{step}/{run.config.num_steps} {pairs} train_time:{ms:.0f}ms "
            f"step_avg:{ms / step:.2f}ms", console)

def validate(run: SimpleNamespace) -> None:
    run.state.val_loss = evaluate(run, range(run.config.val_tokens // run.config.seq_len))
    log_step(run, run.state.step, f"val_loss:{run.state.val_loss:.6f}")

def save(run: SimpleNamespace) -> None:
    path, step = run.folder / "checkpoint.pt", run.state.step
    finite = all(bool(p.isfinite().all()) for p in run.model.parameters())
    require(finite, f"step {step}: a weight is not finite, so it was not saved; lower --lr")
    if ranks()[0] == 0:
        content = dict(config=vars(run.config), sha256=run.sha256)
        save_checkpoint(path, content | run.state.state_dict())
    gather(None)     # no rank leaves before the file is whole
    run.log(f"checkpoint: {path} at step {step}/{run.config.num_steps}")

def log_metrics(run: SimpleNamespace) -> None:
    for optimizer in run.optimizers.values():
        if hasattr(optimizer, "get_post_step_metrics"):
            metrics = dict(step=run.state.step, parameters=optimizer.get_post_step_metrics())
            run.log(f"metrics: {json.dumps(metrics)}", console=False)

def summarize(run: SimpleNamespace) -> None:
    c, state, tokens = run.config, run.state, run.starts[-1] * run.config.seq_len
    known = dict(train=c.train_sha256, val=c.val_sha256)
    run.log(f"""run_id: {c.run_id}
val_loss: {state.val_loss:.6f}
target: {c.target}
target_reached: {json.dumps(state.val_loss <= c.target)}
data_comparable: {json.dumps(run.sha256 == known)}
train_seconds: {state.seconds:.3f}
compile_seconds: {run.prime_seconds:.3f}
tokens_per_second: {tokens / state.seconds:.0f}
gpu_memory_gib: {max(gather(torch.cuda.max_memory_allocated())) / 2**30:.2f}""")

def train(c: Config, device: torch.device, resumed: dict) -> int:
    """Trains to the end, or to a signal; returns the exit status of the process."""
    run = set_up(c, device, resumed)
    c, state = run.config, run.state
    log_header(run)
    prime(run, resumed or copy.deepcopy(state.state_dict()))

    loader = load_batches(run.train_rows, run.starts, c.seed, device, state.step)
    # A CPU's steps are read one by one, a GPU's in tens, so that it never waits for the host.
    every = dict(read=1, metrics=c.metrics_every, save=c.save_every, validate=c.val_every)
    if device.type == "cuda":
        every["read"] = 10
    run.clock = time.perf_counter()
    while state.step < c.num_steps and not run.stopping:
        train_step(run, next(loader))
        due = [name for name in every if every[name] and state.step % every[name] == 0]
        if due or state.step == c.num_steps:
            read_steps(run)     # stops the clock, which counts training alone
            if "metrics" in due:
                log_metrics(run)
            if "save" in due or run.stopping:
                save(run)
            if "validate" in due and state.step < c.num_steps:
                validate(run)
            run.clock = time.perf_counter()

    if state.step < c.num_steps:
        run.log(f"stopped at step {state.step}/{c.num_steps}; go on with: --resume {run.folder}")
        return 128 + (run.signals or [signal.SIGTERM])[0]
    validate(run)
    summarize(run)
    return 0

def main(arguments: list[str]) -> int:
    given, resumed = parse_command_line(arguments), {}
    try:
        if given.get("resume"):
            resumed = load_checkpoint(given["resume"])
        c = make_config(given, resumed.get("config"))
        return train(c, join_ranks(c.collective_timeout), resumed)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError:
        # A collective that failed says little of why.
        print("error: rank {} of {}: if the error is of a connection or a time-out, another rank "
              "died, or was waited for longer than --collective_timeout".format(*ranks()),
              file=sys.stderr, flush=True)
        raise

if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)     # past the finalizers, in which gloo's threads now and then abort
