#!/usr/bin/env python3
"""Train a GPT to a target validation loss, as fast as the machine allows.

    ./run.sh                               # data, training and plot
    python train_gpt.py tiny               # a CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py small
    python train_gpt.py --resume logs/RUN  # go on with a run

tiny: 1.2042 nats per byte (1.1984 to 1.2169, n = 5), two CPU cores. small: no run yet.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import fnmatch
import hashlib
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.attention.varlen import varlen_attn
from torch.utils._pytree import tree_flatten_with_path


class RunError(ValueError):
    """Bad input: names the file or option, value and remedy."""

HERE = Path(__file__).resolve().parent

def require(holds, message: str) -> None:
    if not holds:
        raise RunError(message)

@contextlib.contextmanager
def naming(path, remedy="make room or give another --log_dir, then --resume the run"):
    # What goes wrong with a file inside: an error that names it.
    try:
        yield
    except Exception as error:  # torch raises many types
        reason = getattr(error, "strerror", None) or f"not whole, {type(error).__name__}"
        raise RunError(f"{path}: {reason}; {remedy}") from error

# ==== 1. Config: every knob of a run, and an option: --lr 0.003 ===================
@dataclasses.dataclass(frozen=True)
class Config:
    track: str = "small"  # a name in TRACKS
    # Data
    prepare: str = "data/fineweb.py"  # makes the shards
    data: str = "data/fineweb10B"  # their folder: *train_*.bin and *val_*.bin
    sha256: str = ""  # of train and val that compare: 16 digits
    vocab_size: int = 50257  # tokens; the last is end-of-text
    val_tokens: int = 10 * 2**20  # of a validation
    target: float = 3.28  # validation loss, in nats a token
    # Model
    seq_len: int = 8192  # tokens of a row
    document_tokens: int = 2048  # most of a document (0: running text)
    num_layers: int = 12
    num_heads: int = 6
    head_dim: int = 128  # channels
    windows: str = "SSSL"  # of layers in turn: L is a stage's, S half of it
    mixing: str = "on"  # each block's input: a sum with the embedding
    value_tables: int = 3  # of as many first and last layers (0: off)
    ngram_rows: int = 2**20  # of each n's table (0: off)
    ngram_max: int = 3  # n from 2 on
    ngram_dim: int = 192  # channels (0: all)
    attention_scale: float = 0.12  # factor of q . k
    logit_softcap: float = 15.0  # c in c * tanh(logits / c)
    dtype: str = "auto"  # of activations; auto: by hardware
    # Batch
    batch_tokens: int = 131_072  # tokens of a step, times a stage's factor
    micro_batch: int = 0  # most rows at once (0: auto)
    reduce_dtype: str = "float32"  # of gradients between ranks
    # Optimizers. The rates of other parameters are ratios to lr.
    lr: float = 0.0023  # learning rate of lm_head
    embed_lr_ratio: float = 260.0  # of embeddings
    mixing_lr_ratio: float = 15.0
    matrix_lr_ratio: float = 0.0  # of matrices (0: update_scale's)
    matrix_optimizer: str = "muon"  # a name in OPTIMIZERS
    update_scale: str = "sqrt_ratio"  # a name in UPDATE_SCALES
    momentum: float = 0.95  # of Muon
    momentum_start: float = 0.85  # at the first step
    momentum_warmup_steps: int = 300  # between the two (0: off)
    nesterov: str = "on"  # off: Muon does not look ahead
    normuon_beta2: float = 0.95  # of NorMuon's second moment (0: off)
    matrix_weight_decay: float = 0.0  # times lr (0: off)
    # Schedule
    num_steps: int = 2000
    stages: str = "1:384 2:896 3:1408"  # factor:window, for equal shares of the steps
    val_window: int = 2560  # tokens (0: the whole row)
    warmup_steps: int = 0  # linear (0: off)
    cooldown_steps: int = 1100  # linear (0: off)
    # Run
    seed: int = 0  # of weights and data order
    val_every: int = 125  # steps (0: at end)
    save_every: int = 0  # steps (0: on a signal)
    resume: str = ""  # run folder
    log_dir: str = "logs"  # of the run folders
    run_id: str = ""  # ("": track and time)
    compile: str = "auto"  # auto: on a GPU
    prime_steps: int = 2  # before the clock starts
    collective_timeout: float = 600.0  # seconds
    model_dim = property(lambda self: self.num_heads * self.head_dim)
    padded_vocab_size = property(lambda self: math.ceil(self.vocab_size / 64) * 64)
    # Where there is no such folder here, it is that of the repository.
    folder = property(lambda self: max(Path(self.data), HERE / self.data, key=Path.exists))

TRACKS = {
    "small": dict(),
    "lab": dict(
        prepare=r"data/local_text.py --train_bpe 1024 --separator \n\n\n --out data/lab",
        data="data/lab", sha256="ec1164e96a45b25c 1757957470087c35", vocab_size=1024,
        val_tokens=2**19, target=3.13, seq_len=512, document_tokens=512, num_layers=6,
        num_heads=2, head_dim=64, value_tables=2, ngram_rows=65_536, ngram_dim=32,
        attention_scale=0.17, batch_tokens=2048, stages="2:64 2:128 2:192", val_window=320,
        val_every=0, num_steps=200, cooldown_steps=110, momentum_warmup_steps=100),
    "tiny": dict(
        prepare="data/local_text.py", data="data/tiny",
        sha256="8c50fa9a10abf3fe 709ddb7c9af04116", vocab_size=257, val_tokens=2**20,
        target=1.30, seq_len=128, document_tokens=0, num_layers=2, num_heads=4, head_dim=32,
        windows="L", mixing="off", value_tables=0, ngram_rows=65_536, ngram_max=6, ngram_dim=0,
        attention_scale=0.24, batch_tokens=1024, lr=0.003, embed_lr_ratio=30.0, stages="1:0",
        val_window=0, val_every=0, num_steps=500, cooldown_steps=380,
        momentum_warmup_steps=200)}
# A change of any other field makes another run.
RESUME_MAY_CHANGE = set("""prepare data micro_batch val_every save_every resume
    log_dir run_id compile prime_steps collective_timeout""".split())

def parse_command_line(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser(
        usage="train_gpt.py TRACK [--field value ...], or --help",
        description=__doc__, epilog=inspect.getsource(Config), allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("track", nargs="?", help=" or ".join(TRACKS))
    for name, default in list(vars(Config()).items())[1:]:
        parser.add_argument(f"--{name}", type=type(default), help=argparse.SUPPRESS)
    return vars(parser.parse_args(arguments))

def make_config(given: dict, saved: dict | None = None) -> Config:
    # The given fields replace those of the track or, on a resume, those of the saved run.
    if saved is None:
        track = given.get("track", "")
        require(track in TRACKS, f"track {track}: give {' or '.join(TRACKS)}")
        c = Config(**TRACKS[track] | given)
    else:
        folder = Path(given["resume"]).resolve()
        known = describe(saved)[0] == describe(vars(Config()))[0]
        require(known, f"--resume {folder}: another version")
        for name in given.keys() - RESUME_MAY_CHANGE:
            same = given[name] == saved[name]
            require(same, f"--{name} {given[name]}: the run has {saved[name]}; leave it out")
        c = Config(**saved | dict(log_dir=str(folder.parent), run_id=folder.name) | given)
    limits = dict(
        momentum=(0, 1), momentum_start=(0, 1), normuon_beta2=(0, 1), num_steps=(1, 10**6),
        num_layers=(1, 10**3), num_heads=(1, 10**3), head_dim=(2, 1025), seq_len=(1, 2**20),
        vocab_size=(1, 2**16), ngram_max=(2, 99), batch_tokens=(1, 2**30), val_tokens=(1, 2**30))
    forms = dict(
        stages=r"([1-9]\d?:\d{1,7} ?){1,99}", windows="[SL]+", run_id=r"(\w[\w.-]{,99})?",
        dtype="auto|float32|bfloat16", reduce_dtype="float32|bfloat16", mixing="on|off",
        compile="auto|on|off", nesterov="on|off", matrix_optimizer="|".join(OPTIMIZERS),
        update_scale="|".join(UPDATE_SCALES), track="|".join(TRACKS))
    for name, value in vars(c).items():
        low, high = limits.get(name, (0, 10**9))
        if name in forms:
            fits = re.fullmatch(forms[name], value)
            require(fits, f"--{name} {value}: give {forms[name]}")
        elif not isinstance(value, str):
            require(low <= value < high, f"--{name} {value}: give {low} or more, below {high}")
    for name, unit in dict(val_tokens=c.seq_len, batch_tokens=c.seq_len, head_dim=2).items():
        value = getattr(c, name)
        require(value % unit == 0, f"--{name} {value}: give a multiple of {unit}")
    return c

# ==== 2. Processes and log ========================================================
def ranks() -> tuple[int, int]:  # this rank, and how many there are
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def gather(value) -> list:
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values

def join_ranks(timeout: float) -> torch.device:
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo carries the Python objects of `gather`
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    return device

def watch(hosts: list[str]) -> None:
    # A thread of each rank. Once one has failed, each answers in the store, says which
    # others do not, and ends. The launcher of rank 0 holds the store.
    store, rank, size = next(dist.rendezvous("env://"))
    lost = [f"rank 0 (host {hosts[0]}) or its launcher"]
    with contextlib.suppress(RuntimeError):  # the store is gone
        while not store.check(["failed"]):
            time.sleep(0.5)
        store.set(f"alive {rank}", "")
        time.sleep(2)
        lost = [f"rank {r} (host {host})" for r, host in enumerate(hosts)
                if not store.check([f"alive {r}"])]
    time.sleep(1)  # a run that is over ends by itself
    print(f"rank {rank} of {size}: lost {', '.join(lost) or 'no rank'}; did one die, "
          "hang or pass --collective_timeout?\n", end="", file=sys.stderr, flush=True)
    os._exit(1)

def log(run, text: str, console: bool = True) -> None:
    if ranks()[0] == 0:
        path = run.folder / "log.txt"
        with naming(path), open(path, "a", encoding="utf-8") as file:
            print(text, file=file)
        if console:
            print(text, flush=True)

def has_bf16_units(device: torch.device) -> bool:
    # Older GPUs and most CPUs only emulate it; torch 2.11 does not say for a CPU.
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))

def describe_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{ranks()[1]} x {torch.cuda.get_device_name(device)}"
    cpu = os.popen("grep -m 1 'model name' /proc/cpuinfo 2>/dev/null").read().partition(": ")[2]
    return f"{ranks()[1]} x {torch.get_num_threads()} threads of {cpu.strip() or 'a CPU'}"

# ==== 3. Data =====================================================================
# A shard has llm.c's format: a header of 256 int32, which starts with a magic number, a version,
# the number of tokens and the vocabulary (0: GPT-2's), and then the tokens as uint16.
HEADER_BYTES, MAGIC, VERSION, GPT2_VOCAB_SIZE = 1024, 20240520, 1, 50257

def open_shard(path: Path, vocab_size: int) -> np.ndarray:
    # Read whole: what happens to the file during a run changes nothing.
    remedy = "move it away, then ./run.sh"
    with naming(path, remedy):
        data = path.read_bytes()
    header = np.frombuffer(data[:16].ljust(16), dtype="<i4").tolist()
    size, vocab = (len(data) - HEADER_BYTES) / 2, header[3] or GPT2_VOCAB_SIZE
    whole = [*header[:3], vocab] == [MAGIC, VERSION, size, vocab_size]
    require(whole, f"{path}: header {header} in {len(data)} bytes: damaged, or not of "
            f"--vocab_size {vocab_size}; {remedy}")
    tokens = np.frombuffer(data, dtype="<u2", offset=HEADER_BYTES)
    require(tokens.max(initial=0) < vocab, f"{path}: a token is {vocab} or more; {remedy}")
    return tokens

class Rows:
    # Rows of seq_len tokens and the next, within a shard. With `cut`, they begin with
    # a document and have at most so many tokens of each. Shards beyond the first `max_rows`
    # rows are left out, so that it does not matter how many there are.
    def __init__(self, pattern: str, c: Config, max_rows: int, cut=None):
        self.seq_len, self.cut, self.count, self.documents = c.seq_len, cut, 0, 1
        self.shards, self.firsts, self.digest = [], [], hashlib.sha256()
        for path in sorted(c.folder.glob(pattern)):
            if self.count < max_rows:
                self.firsts.append(self.count)  # its first row
                self.add(open_shard(path, c.vocab_size), c)
        require(self.count, f"--data {c.folder}: no row in {pattern}; run {c.prepare}")
        self.sha256 = self.digest.hexdigest()
    def add(self, tokens: np.ndarray, c: Config) -> None:
        self.digest.update(tokens.base)  # the whole file
        starts = np.zeros(1, dtype=np.int64)  # of documents
        if c.document_tokens:
            starts = np.union1d(starts, np.flatnonzero(tokens == c.vocab_size - 1))
        marked = not self.cut or len(starts) > 1
        require(marked, f"--document_tokens {self.cut}: no end-of-text in a shard; give 0")
        lengths = np.diff(starts, append=len(tokens)).clip(max=self.cut)
        ends = lengths.cumsum()
        begins = ends - lengths  # in what is kept
        self.shards.append((tokens, begins, starts - begins))
        self.count += max(0, int(ends[-1]) - 1) // c.seq_len
        # At most so many documents share a row: those that start in it, and one before.
        starting = np.searchsorted(begins, begins + c.seq_len) - np.arange(len(begins))
        self.documents = max(self.documents, int(starting.max()) + 1)
    def read(self, rows) -> torch.Tensor:
        tokens = np.empty((len(rows), self.seq_len + 1), dtype=np.uint16)
        for i, row in enumerate(rows):
            shard = np.searchsorted(self.firsts, row, side="right") - 1
            source, begins, shifts = self.shards[shard]
            place = (row - self.firsts[shard]) * self.seq_len
            if self.cut:
                place = begins[np.searchsorted(begins, place, side="right") - 1]
            places = place + np.arange(self.seq_len + 1)
            document = np.searchsorted(begins, places, side="right") - 1
            tokens[i] = source[places + shifts[document]]
        return torch.from_numpy(tokens)

@lru_cache(4)
def permutation(seed: int, count: int) -> np.ndarray:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()

def training_order(count: int, seed: int, positions: range) -> list[int]:
    return [permutation((seed << 20) + i // count, count)[i % count] for i in positions]

def load_batches(rows: Rows, starts: list[int], seed: int, device, first_step: int = 0):
    # The distributed loader: yields this rank's tokens of each step, int64 (B, T + 1).
    for step in range(first_step, len(starts) - 1):
        share = (starts[step + 1] - starts[step]) // ranks()[1]
        first = starts[step] + ranks()[0] * share
        tokens = rows.read(training_order(rows.count, seed, range(first, first + share)))
        if device.type == "cuda":
            tokens = tokens.pin_memory()  # the host need not wait
        yield tokens.to(device, non_blocking=True).to(torch.int64)

# ==== 4. Model ====================================================================
# Shape suffixes: B rows of a batch, T tokens of a row, D model_dim, H num_heads,
# K head_dim, V padded vocabulary; k matrices of m x n.

def norm(x: torch.Tensor) -> torch.Tensor:
    # RMSNorm without parameters (Zhang and Sennrich 2019, arXiv:1910.07467).
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

def rotary_tables(seq_len: int, head_dim: int, device):
    # (cos, sin) of the angles position * 10000^(-2i/K), float32 (T, 1, K/2).
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles = torch.outer(torch.arange(seq_len, device=device), 10_000.0 ** -exponents)
    return angles.cos()[:, None], angles.sin()[:, None]

def rotate(x_BTHK, cos, sin):
    # Rotary positions (Su et al. 2021, arXiv:2104.09864): turns channels i and i + K/2.
    a, b = x_BTHK.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x_BTHK)

def choose_attention(c: Config, device: torch.device) -> str:
    # FlashAttention over documents where all ranks have it: tried forward and backward.
    if device.type == "cpu":
        return "plain products" if c.dtype == "bfloat16" else "torch SDPA"
    works, dtype = False, getattr(torch, c.dtype)
    x = torch.ones(64, c.num_heads, c.head_dim, device=device, dtype=dtype, requires_grad=True)
    bounds = torch.arange(0, 65, 32, device=device, dtype=torch.int32)
    with contextlib.suppress(RuntimeError):
        varlen_attn(x, x, x, bounds, bounds, 32, 32, window_size=(16, 0)).sum().backward()
        works = True
    return "torch varlen_attn" if all(gather(works)) else "torch SDPA"

def attend(q_BTHK, k_BTHK, v_BTHK, scale: float, seen):
    # seen: as GPT.seen gives it.
    if isinstance(seen, tuple):
        bounds, longest, window = seen
        q, k, v = q_BTHK.flatten(0, 1), k_BTHK.flatten(0, 1), v_BTHK.flatten(0, 1)
        y = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale,
                        window_size=(window, 0))
        return y.view_as(q_BTHK)

    q, k, v = q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # torch's is slower
        y = torch.add(seen, q @ k.mT, alpha=scale).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, seen, scale=scale)
    return y.transpose(1, 2)

class Attention(nn.Module):
    # q and k have unit RMS, which bounds q . k (arXiv:2010.04245).
    def __init__(self, c: Config):
        super().__init__()
        self.num_heads, self.scale = c.num_heads, c.attention_scale
        for name in ("query", "key", "value", "proj"):
            self.add_module(name, Linear(c.model_dim, c.model_dim, bias=False))
    def forward(self, x_BTD, values_BTD, seen, cos, sin, past):
        weight = torch.cat((self.query.weight, self.key.weight, self.value.weight))
        qkv = F.linear(x_BTD, weight.to(x_BTD.dtype))  # one product is faster
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        if values_BTD is not None:
            v = v + values_BTD.view_as(v)
        if past:
            k, v = past[:] = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        return self.proj(attend(q, k, v, self.scale, seen).flatten(2))

class MLP(nn.Module):
    # W2 relu(W1 x)^2 (So et al. 2021, arXiv:2109.08668).
    def __init__(self, c: Config):
        super().__init__()
        self.up = Linear(c.model_dim, 4 * c.model_dim, bias=False)
        self.proj = Linear(4 * c.model_dim, c.model_dim, bias=False)
    def forward(self, x_BTD):
        return self.proj(F.relu(self.up(x_BTD)).square())

class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention, self.mlp = Attention(c), MLP(c)
        self.mix = nn.Parameter(torch.zeros(2)) if c.mixing == "on" else None
    def forward(self, x_BTD, embedded_BTD, *others):
        if self.mix is not None:
            a, b = self.mix.to(x_BTD.dtype)
            x_BTD = x_BTD + a * x_BTD + b * embedded_BTD
        x_BTD = x_BTD + self.attention(norm(x_BTD), *others)
        return x_BTD + self.mlp(norm(x_BTD))

class Ngrams(nn.Module):
    # Sums, for each token, the embeddings of the 2-, 3- ... grams that end with it: rows
    # of a table, by their hash. A step touches few of them: autograd and DDP do not see the
    # table, and RowAdam takes the rows' gradients from `touched`.
    def __init__(self, c: Config):
        super().__init__()
        self.rows, self.sizes = c.ngram_rows, range(2, c.ngram_max + 1)
        dim = min(c.ngram_dim or c.model_dim, c.model_dim)
        self.padding = c.model_dim - dim  # the other channels have none
        table = torch.empty(len(self.sizes) * c.ngram_rows, dim)
        self.table = nn.Parameter(table, requires_grad=False)
    def ids(self, tokens_BT):
        ids, hashed = [], tokens_BT
        for i, n in enumerate(self.sizes):
            before = F.pad(tokens_BT, (n - 1, 0), value=-1)[:, :tokens_BT.size(1)]
            hashed = hashed * 1_000_003 + before  # overflows alike everywhere
            ids.append(hashed % self.rows + i * self.rows)
        return torch.stack(ids)
    def forward(self, tokens_BT):
        ids = self.ids(tokens_BT)
        sums = F.embedding(ids, self.table).sum(0)
        if torch.is_grad_enabled():
            vars(self.table).setdefault("touched", []).append((ids, sums.requires_grad_()))
        return F.pad(sums, (0, self.padding)) if self.padding else sums

class GPT(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        shape, count = (c.padded_vocab_size, c.model_dim), min(c.value_tables, c.num_layers // 2)
        self.embed = nn.Embedding(*shape)
        self.ngrams = Ngrams(c) if c.ngram_rows else None
        self.value_embeds = nn.ModuleList(nn.Embedding(*shape) for _ in range(count))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.lm_head = Linear(c.model_dim, c.padded_vocab_size, bias=False)
        self.varlen, self.most_documents = False, c.seq_len  # by set_up
    @torch.no_grad()
    def initialize(self) -> "GPT":
        # Draws the weights on the CPU, so that they are the same everywhere.
        std = 0.5 * self.config.model_dim ** -0.5
        stds = {"embed.weight": 1.0, "value_embeds.*": 0.0, "table": 0.0, "mix": 0.0,
                "lm_head.weight": 0.0, "proj.weight": 0.0, "blocks.*.weight": std}
        generator = torch.Generator().manual_seed(self.config.seed)
        for name, p in self.named_parameters():
            fits = [stds[end] for end in stds if fnmatch.fnmatchcase(name, f"*{end}")]
            require(fits, f"parameter {name}: add it to GPT.initialize")
            nn.init.normal_(p, 0.0, fits[0], generator)
        return self
    def seen(self, tokens_BT, window: int, known: int = 0):
        # What a token sees: its document, `window` tokens back at most (0: all). For
        # varlen_attn: bounds of the documents in the flattened rows, their greatest length
        # and the window; otherwise a mask (T, T) or (B, 1, T, T), from row `known` on.
        c, size = self.config, tokens_BT.size(1)
        first_BT = tokens_BT == (c.vocab_size - 1 if c.document_tokens else -1)
        first_BT[:, 0] = True
        if self.varlen:
            # The last documents are empty, so that no shape depends on their number.
            place = torch.arange(first_BT.numel(), device=first_BT.device)
            starts = place.where(first_BT.flatten(), len(place)).sort().values
            starts = starts[:len(tokens_BT) * self.most_documents]
            bounds = F.pad(starts, (0, 1), value=len(place)).int()
            longest = c.document_tokens if c.document_tokens and self.training else size
            return bounds, longest, window or -1

        place = torch.arange(size, device=first_BT.device)
        back = place[known:, None] - place
        seen = (back >= 0) & (back <= (window or size))
        if c.document_tokens:
            number = first_BT.cumsum(1)[:, None]
            seen = seen & (number[..., known:, None] == number[..., None, :])
        mask = torch.zeros_like(seen, dtype=getattr(torch, c.dtype))
        return mask.masked_fill_(~seen, -torch.inf)
    def hidden(self, tokens_BT, window: int = 0, past: list | None = None):
        # window: of the long layers (0: the whole row). past: of each layer the keys and
        # values of the first tokens (B, T, H, K); only the tokens after those are computed.
        c, dtype = self.config, getattr(torch, self.config.dtype)
        known = past[0][0].size(1) if past else 0
        x_BTD = self.embed(tokens_BT)
        if self.ngrams:
            x_BTD = x_BTD + self.ngrams(tokens_BT)
        x_BTD = embedded_BTD = norm(x_BTD[:, known:].to(dtype))
        # The last layers have the value embeddings of the first.
        values = [embed(tokens_BT[:, known:]).to(dtype) for embed in self.value_embeds]
        values += [None] * (c.num_layers - 2 * len(values)) + values
        windows = dict(L=window, S=window // 2)
        seen = {kind: self.seen(tokens_BT, windows[kind], known) for kind in set(c.windows)}
        cos, sin = rotary_tables(tokens_BT.size(1), c.head_dim, x_BTD.device)

        for layer, block in enumerate(self.blocks):
            kind = c.windows[layer % len(c.windows)]
            x_BTD = block(x_BTD, embedded_BTD, values[layer], seen[kind], cos[known:],
                          sin[known:], past[layer] if past else None)
        return x_BTD
    def logits(self, x_BTD):
        cap = self.config.logit_softcap
        return cap * torch.tanh(self.lm_head(norm(x_BTD)).float() / cap)
    def loss(self, x_BTD, targets_BT):
        return F.cross_entropy(self.logits(x_BTD).flatten(0, 1), targets_BT.flatten())
    def forward(self, tokens_BT, targets_BT, window: int = 0):
        return self.loss(self.hidden(tokens_BT, window), targets_BT)

# ==== 5. Optimizers and the parameter table =======================================
# The scale of an orthogonal m x n update, and the ratio of its learning rate to AdamW's.
UPDATE_SCALES = {
    "sqrt_ratio": (lambda m, n: max(1, m / n) ** 0.5, 10.0),  # Jordan et al. 2024
    "sqrt_max": (lambda m, n: max(m, n) ** 0.5, 0.1),  # as first published
    "match_rms_adamw": (lambda m, n: 0.2 * max(m, n) ** 0.5, 1.0),  # arXiv:2502.16982
    "none": (lambda m, n: 1.0, 10.0)}  # OrthogonalNesterov

def orthogonalize(G_kmn, steps: int, dtype: torch.dtype | None = None):
    # Newton-Schulz in `dtype` (Jordan et al. 2024). Brings the singular values of matrices
    # with m <= n to about [0.7, 1.2], except those below 0.003 of the Frobenius norm.
    X = F.normalize(G_kmn, dim=(-2, -1), eps=1e-20).to(dtype or G_kmn.dtype)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X

class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, for the matrices of hidden layers.

        v <- mu v + (1 - mu) g;   u <- orthogonalize((1 - mu) g + mu v)
        W <- (1 - lr weight_decay) W - lr scale(m, n) u

    (Jordan et al. 2024, kellerjordan.github.io/posts/muon). A parameter is a matrix or a bank
    of them (k, m, n); split a fused QKV, flatten filters. Not for embeddings, the output
    layer, gains, biases. All ranks must have the same gradients. Without `nesterov` u is of
    v alone. NorMuon (Li et al. 2025, arXiv:2510.05491), beta2 > 0, divides each row of u (if
    m < n, unlike the paper, each column) by its running RMS, and keeps the norm of u.
    """
    orthogonalize = staticmethod(orthogonalize)  # set_up may compile it
    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, beta2=0.0,
                 update_scale="sqrt_ratio", nesterov=True, ns_steps=5, ns_dtype=None):
        super().__init__(params, dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, beta2=beta2,
            update_scale=update_scale, nesterov=nesterov, ns_steps=ns_steps,
            ns_dtype=ns_dtype))
    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        params = self.param_groups[-1]["params"]
        names = self.param_groups[-1].get("param_names", ["a parameter"] * len(params))
        for name, p in zip(names, params, strict=True):
            fits = p.ndim in (2, 3) and not hasattr(p, "placements")  # which a DTensor has
            require(fits, f"Muon: {name}, {tuple(p.shape)}: give whole matrices; flatten "
                    "filters; AdamW takes the rest")
    def wide(self, x):
        # A view of x as matrices (k, m, n), transposed where m >= n.
        x = x.view(-1, *x.shape[-2:])
        return x.mT if x.size(1) >= x.size(2) else x
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}  # {shape: parameters}
            for p in [p for p in group["params"] if p.grad is not None]:
                shapes.setdefault((p.shape, p.dtype), []).append(p)
            for members in shapes.values():
                self.update(group, members)
    def update(self, group: dict, members: list) -> None:
        mu, G = group["momentum"], []
        for p in members:
            g, state = p.grad, self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            v = state["momentum_buffer"].lerp_(g, 1 - mu)
            G.append(self.wide(g.lerp(v, mu) if group["nesterov"] else v))
        # Each rank orthogonalizes a share, of which zeros make the last ones whole.
        (rank, size), count = ranks(), sum(map(len, G))
        G.append(G[0].new_zeros(-count % size, *G[0].shape[1:]))
        mine = torch.cat(G).chunk(size)[rank]
        U = gather_rows(self.orthogonalize(mine, group["ns_steps"], group["ns_dtype"]))[:count]
        if group["beta2"]:  # the rows of a tall matrix are columns here
            means = U.square().mean(1, keepdim=True, dtype=p.dtype)
            state = self.state[members[0]]  # has that of all
            moment = state.setdefault("second_moment", torch.zeros_like(means))
            moment.lerp_(means, 1 - group["beta2"])
            even = U * moment.clamp_min(1e-10).rsqrt()
            size = even.norm(dim=(1, 2), keepdim=True).clamp_min(1e-10)
            U = (even * (U.norm(dim=(1, 2), keepdim=True) / size)).to(U.dtype)
        factor = group["lr"] * UPDATE_SCALES[group["update_scale"]][0](*p.shape[-2:])
        for p, u in zip(members, U.chunk(len(members)), strict=True):
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            self.wide(p).add_(u, alpha=-factor)

class RowAdam(torch.optim.Optimizer):
    """Adam without momentum, for the rows of a table (as in Ngrams) that a step touches.

        s <- beta2 s + (1 - beta2) g^2;   w <- w - lr g / sqrt(s / (1 - beta2^t))

    (arXiv:1412.6980, beta1 = 0.) An idle row keeps its weights and its s, as in SparseAdam.
    `touched` of a parameter: ids (n, ...), sums (..., D); gradients travel in `dtype`.
    """
    def __init__(self, params, lr=0.01, beta2=0.99, dtype=None):
        super().__init__(params, dict(lr=lr, beta2=beta2, dtype=dtype))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in [p for p in group["params"] if hasattr(p, "touched")]:
                self.update(p, group["lr"], group["beta2"], group["dtype"])
    def update(self, p, lr: float, beta2: float, dtype) -> None:
        touched = vars(p).pop("touched")
        ids = torch.cat([ids.flatten(1) for ids, _ in touched], 1)
        ids = gather_rows(ids.T.contiguous()).T
        grads = torch.cat([sums.grad.flatten(0, -2) for _, sums in touched])
        grads = gather_rows(grads.div_(ranks()[1]).to(dtype or p.dtype)).type_as(p)
        # The sum of each row's gradients, at each of its places in ids: a row that is there
        # many times is written many times, alike. The host need not know how many differ.
        if not hasattr(p, "sums"):
            p.sums = torch.zeros_like(p)
        for part in ids:
            p.sums.index_add_(0, part, grads)
        ids = ids.flatten()
        g = p.sums.index_select(0, ids)
        p.sums.index_fill_(0, ids, 0.0)

        state = self.state[p]
        if not state:
            state.update(step=0, square=torch.zeros_like(p))
        state["step"] += 1
        square = state["square"].index_select(0, ids).lerp_(g.square(), 1 - beta2)
        state["square"].index_copy_(0, ids, square)
        lr *= (1 - beta2 ** state["step"]) ** 0.5
        size = square.sqrt_().clamp_min_(1e-10)
        p.index_copy_(0, ids, p.index_select(0, ids).addcdiv_(g, size, value=-lr))

def gather_rows(x):
    if ranks()[1] == 1:
        return x
    everyone = x.new_empty(ranks()[1] * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x)
    return everyone

def make_muon(groups: list, c: Config, update_scale: str) -> Muon:
    return Muon(groups, momentum=c.momentum, beta2=c.normuon_beta2, update_scale=update_scale,
                nesterov=c.nesterov == "on", ns_dtype=getattr(torch, c.dtype))

# OrthogonalNesterov's v <- mu v + g is the same but for a factor, which has no effect.
OPTIMIZERS = dict(
    row_adam=lambda groups, c: RowAdam(groups, dtype=getattr(torch, c.reduce_dtype)),
    adamw=lambda groups, c: torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
    muon=lambda groups, c: make_muon(groups, c, c.update_scale),
    orthogonal_nesterov=lambda groups, c: make_muon(groups, c, "none"))

def parameter_table(c: Config) -> list[tuple]:
    # Rows of pattern, optimizer, learning rate and weight decay; the first whose pattern
    # fits the name of a parameter has it.
    ratios = dict(muon=UPDATE_SCALES[c.update_scale][1], orthogonal_nesterov=10.0)
    matrix_lr = c.lr * (c.matrix_lr_ratio or ratios.get(c.matrix_optimizer, 1.0))
    return [
        ("lm_head.weight", "adamw", c.lr, 0.0),
        ("*embed*.weight", "adamw", c.lr * c.embed_lr_ratio, 0.0),
        ("ngrams.table", "row_adam", c.lr * c.embed_lr_ratio, 0.0),
        ("blocks.*.mix", "adamw", c.lr * c.mixing_lr_ratio, 0.0),
        ("blocks.*.weight", c.matrix_optimizer, matrix_lr, c.matrix_weight_decay)]

def make_optimizers(model: GPT, c: Config) -> tuple[dict, str]:
    # ({name: optimizer}, the table as text).
    left, groups, table = dict(model.named_parameters()), {}, ""
    for pattern, optimizer, lr, decay in parameter_table(c):
        fits = [name for name in left if fnmatch.fnmatchcase(name, pattern)]
        if not fits:  # is off
            continue
        named = [(name, left.pop(name)) for name in fits]
        group = dict(params=named, lr=lr, initial_lr=lr, weight_decay=decay)
        groups.setdefault(optimizer, []).append(group)
        table += f"\n  {pattern:20} {optimizer} for {len(fits)}, lr {lr:g}, decay {decay:g}"
    require(not left, f"parameter {', '.join(left)}: add a row to parameter_table")
    return {name: OPTIMIZERS[name](groups[name], c) for name in groups}, table

# ==== 6. Schedules: functions of the step, 0 for the first ========================
def stage(c: Config, step: int) -> tuple[int, int]:
    # The factor of batch_tokens and the window of this step.
    stages = c.stages.split()
    return tuple(map(int, stages[step * len(stages) // c.num_steps].split(":")))

def lr_multiplier(c: Config, step: int) -> float:
    # Linear warm-up, constant, linear cool-down (Hagele et al. 2024, arXiv:2405.18392),
    # times the root of the batch (Malladi et al. 2022, arXiv:2205.10287).
    warmup = (step + 1) / max(1, c.warmup_steps)
    left = (c.num_steps - step) / max(1, min(c.cooldown_steps, c.num_steps))
    return min(1.0, warmup, left) * stage(c, step)[0] ** 0.5

def muon_momentum(c: Config, step: int) -> float:
    return np.interp(step, [0, c.momentum_warmup_steps], [c.momentum_start, c.momentum]).item()

def batch_rows(c: Config, step: int) -> int:
    return stage(c, step)[0] * c.batch_tokens // c.seq_len

def set_schedules(optimizers: dict, c: Config, step: int) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(c, step)
            if "momentum" in group:
                group["momentum"] = muon_momentum(c, step)

def micro_batch_rows(c: Config, share: int, device: torch.device) -> int:
    # How many of a rank's share of rows run at once. --micro_batch 0: 4,096 tokens on a
    # CPU, for its caches; 49,152 on a GPU, with which small needs 31 GiB, or 16,384.
    tokens = 4096
    if device.type == "cuda":
        tokens = 49_152 if torch.cuda.mem_get_info(device)[1] > 36e9 else 16_384
    most = c.micro_batch or max(1, tokens // c.seq_len)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)

# ==== 7. Evaluation. Do not edit: it defines the target ===========================
def validation_loss(model: GPT, x_BTD, targets_BT):
    # Plain cross-entropy, whatever the training loss is.
    return F.cross_entropy(model.logits(x_BTD).flatten(0, 1), targets_BT.flatten())

@torch.no_grad()
def evaluate(run, text: Rows, rows: range) -> float:
    model, size, mine = run.model.eval(), run.micro_batch, rows[ranks()[0]::ranks()[1]]
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    for start in range(0, len(mine), size):
        tokens = text.read(mine[start:start + size]).to(run.device, torch.int64)
        x_BTD = model.hidden(tokens[:, :-1], run.config.val_window)
        loss = run.validation_loss(model, x_BTD, tokens[:, 1:])
        total += loss.double() * len(tokens)
    model.train()
    return sum(gather(total.item())) / len(rows)

# ==== 8. Checkpoints ==============================================================
# What training changes: run.step, run.seconds and run.saved, parts that have a state_dict.
def state_dict(run) -> dict:
    content = dict(config=vars(run.config), sha256=run.sha256, step=run.step,
                   seconds=run.seconds, rng=torch.get_rng_state())
    return content | {name: part.state_dict() for name, part in run.saved.items()}

def describe(content: dict) -> tuple[list, str]:
    # The place and kind of each value, of a tensor its dtype and shape; a digest of all.
    kinds, digest = [], hashlib.sha256()
    for place, x in tree_flatten_with_path(content)[0]:
        kind, data = type(x), repr(x).encode()
        if isinstance(x, torch.Tensor):
            kind, data = (x.dtype, x.shape), x.cpu().flatten().view(torch.uint8).numpy()
        kinds.append((str(place), kind))
        digest.update(data)
    return kinds, digest.hexdigest()

def load_checkpoint(folder: str) -> dict:
    path = Path(folder, "checkpoint.pt")
    with naming(f"--resume {path}", "give a run that has a whole one"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("digest") != describe(content)[1] or int(content["step"]) < 0:
            raise ValueError(path)
    return content

# ==== 9. The run ==================================================================
def set_up(c: Config, device: torch.device, resumed: dict):
    # Prepares all that a run needs. Bad input is an error here, before anything trains.
    run = argparse.Namespace(device=device, step=0, seconds=0.0, unread=[], signals=[])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: run.signals.append(number))
    sizes, world = [batch_rows(c, step) for step in range(c.num_steps)], ranks()[1]
    run.starts = np.cumsum([0, *sizes]).tolist()
    fits = math.gcd(*sizes) % world == 0
    require(fits, f"--nproc_per_node {world}: give a divisor of {math.gcd(*sizes)} rows")
    cut = min(c.document_tokens, c.seq_len) or None
    run.train_rows = Rows("*train_*.bin", c, run.starts[-1], cut)
    run.val_rows = Rows("*val_*.bin", c, c.val_tokens // c.seq_len)
    there = all(gather(any(c.folder.glob("second/*.bin"))))  # another text
    run.second = there and Rows("second/*.bin", c, 2048)
    fits = run.val_rows.count * c.seq_len >= c.val_tokens
    require(fits, f"--val_tokens {c.val_tokens}: {c.data} has fewer")
    run.sha256 = dict(train=run.train_rows.sha256, val=run.val_rows.sha256)
    same = resumed.get("sha256", run.sha256) == run.sha256
    require(same, f"--resume {c.resume}: it read other data; give that")
    dtype = "bfloat16" if all(gather(has_bf16_units(device))) else "float32"
    new_id = f"{c.track}_{time.strftime('%Y%m%d-%H%M%S')}_{os.urandom(4).hex()}"

    run.config = c = dataclasses.replace(
        c, run_id=gather(c.run_id or new_id)[0], dtype=c.dtype.replace("auto", dtype))
    # {rows of a step: rows of a process at once}; a validation has the fewest.
    run.at_once = {n: micro_batch_rows(c, n // world, device) for n in sorted(set(sizes))}
    run.micro_batch = min(run.at_once.values())
    run.folder = Path(c.log_dir, c.run_id)
    taken = gather((run.folder / "log.txt").exists())[0] and not resumed
    require(not taken, f"--run_id {c.run_id}: has run; give another")
    with naming(run.folder, "end what runs there, or give another --log_dir or --run_id"):
        run.folder.mkdir(parents=True, exist_ok=True)
        if ranks()[0] == 0:  # the lock ends with the process
            run.lock = open(run.folder / "lock", "w")
            fcntl.lockf(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    set_up_model(run)
    return run

def set_up_model(run) -> None:
    c, device = run.config, run.device
    torch.manual_seed(c.seed)
    run.model = run.ddp = GPT(c).initialize().to(device)
    run.attention = choose_attention(c, device)
    run.model.varlen = run.attention == "torch varlen_attn"
    texts = run.train_rows, run.val_rows, run.second or run.val_rows
    run.model.most_documents = max(text.documents for text in texts)
    run.optimizers, run.table = make_optimizers(run.model, c)
    run.saved = dict(model=run.model, **run.optimizers)
    run.validation_loss = validation_loss
    run.compiled = c.compile == "on" or (c.compile == "auto" and device.type == "cuda")
    if run.compiled:
        # Blocks, not the model: quick to compile. DDP need not split them at its buckets.
        torch._dynamo.config.optimize_ddp = False
        torch._dynamo.config.recompile_limit = 64  # a window is a graph
        for block in run.model.blocks:
            block.compile(dynamic=False)
        run.model.loss = torch.compile(run.model.loss, dynamic=False)
        run.validation_loss = torch.compile(validation_loss, dynamic=False)
        Muon.orthogonalize = staticmethod(torch.compile(orthogonalize, dynamic=False))
    if ranks()[1] > 1:
        run.ddp = nn.parallel.DistributedDataParallel(run.model, gradient_as_bucket_view=True)
        if c.reduce_dtype == "bfloat16":
            hook = default_hooks.bf16_compress_hook  # by name refused on a CPU
            run.ddp.register_comm_hook(None, lambda state, bucket: hook(state, bucket))

def log_header(run) -> None:
    c, source = run.config, Path(__file__).read_text(encoding="utf-8")
    git = f"git -C '{HERE}' describe --always --abbrev=40 --exclude='*' --dirty"
    git = os.popen(f"{git} 2>/dev/null || echo none").read().strip()
    log(run, source + "=" * 100, console=False)
    log(run, f"""run folder: {run.folder}
host: {platform.node()}
data sha256: train {run.sha256["train"]}, val {run.sha256["val"]}
source: sha256 {hashlib.sha256(source.encode()).hexdigest()}, git {git}
versions: python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}
hardware: {describe_hardware(run.device)}
kernels: attention {run.attention}; {c.dtype}; torch.compile {run.compiled}
rows of a step, and at once: {run.at_once}{run.table}""")
    log(run, f"config: {json.dumps(vars(c))}", console=False)

def prime(run, start: dict) -> None:
    # Compiles, and warms up at each stage, before the clock starts. Leaves no trace.
    c, clock, few = run.config, time.perf_counter(), run.micro_batch * ranks()[1]
    firsts = {stage(c, step): step for step in reversed(range(c.num_steps))}
    for run.step in [*firsts.values()] * (c.prime_steps or min(1, start["step"])):
        rows = [0] * (batch_rows(c, run.step) // ranks()[1])
        train_step(run, run.train_rows.read(rows).to(run.device, torch.int64))
        evaluate(run, run.val_rows, range(min(run.val_rows.count, few)))
    run.unread.clear()
    if start["step"]:
        fits = describe(start)[0] == describe(state_dict(run))[0]
        fits = fits and 0 <= start["seconds"] and start["step"] <= c.num_steps
        require(fits, f"--resume {c.resume}: not a state of its Config; give another run")
    run.step, run.seconds = start["step"], start["seconds"]
    torch.set_rng_state(start["rng"])
    for name, part in run.saved.items():
        part.load_state_dict(start[name])
    torch._dynamo.utils.counters.clear()  # counts what is compiled from here on
    run.prime_seconds = time.perf_counter() - clock
    log(run, f"priming: {run.prime_seconds:.1f} s")

def accumulate_gradients(model, tokens, micro_batch: int, window: int = 0):
    parts, total = tokens.split(micro_batch), 0.0
    # DDP's gradients are views of its buckets: new ones would have to be copied there.
    model.zero_grad(set_to_none=not hasattr(model, "no_sync"))
    for part in parts:
        # DDP averages over the ranks after the last part alone.
        wait = part is not parts[-1] and hasattr(model, "no_sync")
        with model.no_sync() if wait else contextlib.nullcontext():
            loss = model(part[:, :-1], part[:, 1:], window) * (len(part) / len(tokens))
            loss.backward()
        total += loss.detach()
    return total

def train_step(run, tokens):
    c, step = run.config, run.step
    size, window = run.at_once[batch_rows(c, step)], stage(c, step)[1]
    loss = accumulate_gradients(run.ddp, tokens, size, window)
    set_schedules(run.optimizers, c, step)
    for optimizer in run.optimizers.values():
        optimizer.step()
    # What is logged of the step, each as its mean over the ranks.
    run.unread.append(dict(train_loss=loss))
    run.step += 1

def read_steps(run) -> None:
    # Logs the steps since the last call. Only here does the host wait for a GPU.
    values = torch.stack([torch.stack([*step.values()]) for step in run.unread]).tolist()
    everyone = gather((values, len(run.signals)))
    run.stopping = any(signals for _, signals in everyone)
    means = torch.tensor([values for values, _ in everyone]).div(len(everyone)).sum(0)
    now = time.perf_counter()
    for step, row in enumerate(means.tolist(), run.step - len(means) + 1):
        run.seconds += (now - run.clock) / len(means)
        pairs = " ".join(f"{k}:{x:.6f}" for k, x in zip(run.unread[0], row, strict=True))
        log_step(run, step, pairs, console=step <= 10 or step % 10 == 0)
        require(math.isfinite(sum(row)), f"step {step}: {pairs}: not finite; lower --lr")
    run.clock, run.unread = now, []

def log_step(run, step: int, pairs: str, console: bool = True) -> None:
    log(run, f"step:{step}/{run.config.num_steps} {pairs} "
        f"train_time:{1e3 * run.seconds:.0f}ms step_avg:{1e3 * run.seconds / step:.2f}ms", console)

def validate(run) -> float:
    loss = evaluate(run, run.val_rows, range(run.config.val_tokens // run.config.seq_len))
    log_step(run, run.step, f"val_loss:{loss:.6f}")
    return loss

def save(run) -> None:
    path, step = run.folder / "checkpoint.pt", run.step
    finite = all(bool(p.isfinite().all()) for p in run.model.parameters())
    require(finite, f"step {step}: a weight is not finite; lower --lr")
    if ranks()[0] == 0:
        # Writes beside `path` and renames, so that the file at `path` is always whole.
        content, part = state_dict(run), Path(f"{path}.part")
        with naming(part):
            try:
                with open(part, "wb") as file:
                    torch.save(content | dict(digest=describe(content)[1]), file)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    gather(None)  # no rank leaves before the file is whole
    log(run, f"checkpoint: {path} at step {step}/{run.config.num_steps}")

def summarize(run, val_loss: float) -> None:
    c, seconds = run.config, run.seconds
    # Other data, or fewer validation tokens than the track's, give another loss.
    there = [*c.sha256.split(), Config(**TRACKS[c.track]).val_tokens]
    digests = [digest[:16] for digest in run.sha256.values()]
    comparable = [*digests, c.val_tokens] == there if c.sha256 else None
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    looked_up = sum(sizes[name] for name in sizes if "embed" in name or "table" in name)
    second = run.second and evaluate(run, run.second, range(run.second.count)[:2048])
    late = sum(gather(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    log(run, f"""run_id: {c.run_id}
val_loss: {val_loss:.6f}
target: {c.target}
target_reached: {json.dumps(val_loss <= c.target)}
data_comparable: {json.dumps(comparable)}
second_loss: {second or math.nan:.6f}
parameters: {sum(sizes.values())}
parameters_that_multiply: {sum(sizes.values()) - looked_up}
train_seconds: {seconds:.3f}
compile_seconds: {run.prime_seconds:.3f}
late_compilations: {late}
tokens_per_second: {run.starts[-1] * c.seq_len / seconds:.0f}
gpu_memory_gib: {max(gather(torch.cuda.max_memory_allocated())) / 2**30:.2f}""")

def train(c: Config, device: torch.device, resumed: dict) -> int:
    run = set_up(c, device, resumed)
    c = run.config
    log_header(run)
    prime(run, resumed or copy.deepcopy(state_dict(run)))
    loader = load_batches(run.train_rows, run.starts, c.seed, device, run.step)
    every = dict(read=10 if device.type == "cuda" else 1,  # a GPU need not wait
                 save=c.save_every, validate=c.val_every)
    run.clock, run.stopping = time.perf_counter(), False
    while run.step < c.num_steps and not run.stopping:
        train_step(run, next(loader))
        due = [name for name in every if every[name] and run.step % every[name] == 0]
        if due or run.step == c.num_steps:
            read_steps(run)  # stops the clock, which counts training alone
            if "save" in due or run.stopping:
                save(run)
            if "validate" in due and run.step < c.num_steps:
                validate(run)
            run.clock = time.perf_counter()
    if run.step < c.num_steps:
        log(run, f"stopped at step {run.step}/{c.num_steps}; --resume {run.folder}")
        return 128 + (run.signals or [signal.SIGTERM])[0]
    summarize(run, validate(run))
    return 0

def main(arguments: list[str]) -> int:
    given = parse_command_line(arguments)
    try:
        resumed = load_checkpoint(given["resume"]) if given.get("resume") else {}
        c = make_config(given, resumed.get("config"))
        device = join_ranks(c.collective_timeout)
        if ranks()[1] > 1:
            threading.Thread(target=watch, args=[gather(platform.node())], daemon=True).start()
        return train(c, device, resumed)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError:
        if ranks()[1] > 1:
            sys.excepthook(*sys.exc_info())
            next(dist.rendezvous("env://"))[0].set("failed", "")
            time.sleep(10)  # `watch` ends the process
        raise

if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # without finalizers, in which gloo may abort
