#!/usr/bin/env python3
"""Train a GPT to a target validation loss, as fast as the machine allows, in one file that can be read in an evening.

    ./run.sh                                        # environment, data, training and plot, on whatever is here
    python train_gpt.py tiny --num_steps 50         # one process: a CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py small
    python train_gpt.py --resume logs/RUN           # go on from the checkpoint of a run

Result on tiny, 2 CPU cores: 1.2480 nats a byte (1.2480 to 1.2480, n = 1; target 1.30). small has not run yet.
Sections: 1 Config | 2 processes | 3 data | 4 model | 5 optimizers | 6 schedules | 7 evaluation | 8 checkpoints | 9 main

Shape suffixes: B rows of a micro-batch, R rows of a rank's batch, T tokens of a row, D model_dim, H num_heads,
K head_dim, V padded vocabulary; m x n any matrix. Losses are nats a token, times are seconds unless named ms.
"""
import argparse
import dataclasses
import datetime
import difflib
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
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate, chain, groupby, pairwise, repeat
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class RunError(Exception):
    """Bad input, or a run that cannot go on: the message names the file or option, the value and the remedy."""

# ======== 1. Config and tracks: every tunable of a run. A tweak is a diff of this file; `--name value` serves sweeps. =
FREE = True     # marks a knob that a resume may change

def knob(tiny, small, meaning: str, free: bool = False):
    """A row of Config: its value on each track (`...`: as on tiny), what it means, and whether it is FREE."""
    return dataclasses.field(default=tiny, metadata=dict(tiny=tiny, small=tiny if small is ... else small,
                                                         meaning=meaning, free=free))

@dataclasses.dataclass(frozen=True)
class Config:
    # field                        tiny      small      meaning (unit; what turns it off)
    track: Literal["tiny", "small"] = knob("tiny", "small", "preset of all other values")
    # Data; the sha256 are of the shards whose losses compare ('' = not known)
    train_files: str        = knob("data/tiny/train_*.bin", "data/fineweb10B/fineweb_train_*.bin", "shards", FREE)
    val_files: str          = knob("data/tiny/val_*.bin",   "data/fineweb10B/fineweb_val_*.bin",   "shards", FREE)
    train_sha256: str       = knob("8c50fa9a10abf3fef5d6cd34ceedb667a62d72251aba450c66b02e151bbedac6", "", "of shards")
    val_sha256: str         = knob("709ddb7c9af041164ff67d6e516132236f9070f4f3d20eb9f4b26582240e3e11", "", "of shards")
    vocab_size: int         = knob(257,      50257,     "tokens; end-of-text is the last (padded to a multiple of 64)")
    val_tokens: int         = knob(2**20,    10 * 2**20, "tokens that the validation loss is the mean over")
    target: float           = knob(1.30,     3.28,      "validation loss to reach (nats a token)")
    # Model
    seq_len: int            = knob(256,      1024,      "tokens in a row")
    num_layers: int         = knob(3,        12,        "blocks")
    num_heads: int          = knob(4,        6,         "attention heads")
    head_dim: int           = knob(40,       128,       "channels of a head; model_dim = num_heads * head_dim")
    mlp_ratio: int          = knob(4,        ...,       "hidden channels of the MLP over model_dim")
    rope_base: float        = knob(10_000.0, ...,       "base of the rotary frequencies")
    attention_scale: float  = knob(0.24,     0.12,      "multiplies q . k before the softmax")
    logit_softcap: float    = knob(15.0,     ...,       "c in c * tanh(logits / c)")
    dtype: Literal["auto", "float32", "bfloat16"] = knob("auto", ..., "of activations, Newton-Schulz (auto: by units)")
    # Batch
    batch_tokens: tuple[int, ...] = knob((1024,), (524_288,), "tokens a step (a,b: in equal stages)")
    micro_batch: int        = knob(0,        ...,       "rows a process runs at once (0 = by its memory)", FREE)
    # Optimizers: the lm_head's AdamW has the base rate; the ratios are to it
    matrix_optimizer: Literal["muon", "orthogonal_nesterov", "adamw"] = knob("muon", ..., "of the blocks' matrices")
    lr: float               = knob(0.002,    ...,       "learning rate of the lm_head")
    matrix_lr_ratio: float  = knob(0.0,      ...,       "of the matrices (0 = what belongs to optimizer and scale)")
    embed_lr_ratio: float   = knob(30.0,     150.0,     "of the embedding")
    update_scale: Literal["sqrt_ratio", "sqrt_max", "match_rms_adamw"] = knob("sqrt_ratio", ..., "of Muon's updates")
    momentum: float         = knob(0.95,     ...,       "of Muon")
    momentum_start: float   = knob(0.85,     ...,       "of Muon at step 0")
    momentum_warmup_steps: int = knob(200,   300,       "steps from momentum_start to momentum (0 = off)")
    momentum_dtype: Literal["float32", "bfloat16"] = knob("float32", ..., "in which Muon keeps its momentum")
    nesterov: Literal["on", "off"] = knob("on", ...,    "Muon looks ahead by the gradient")
    polynomial: Literal["quintic", "polar_express"] = knob("quintic", ..., "of Newton-Schulz")
    ns_steps: int           = knob(5,        ...,       "Newton-Schulz iterations")
    normuon_beta2: float    = knob(0.95,     0.0,       "of NorMuon's second moment (0 = off)")
    matrix_weight_decay: float = knob(0.0,   ...,       "decoupled: a step takes lr times this (0 = off)")
    decay_kind: Literal["plain", "cautious"] = knob("plain", ..., "cautious: where update and weight agree in sign")
    betas: tuple[float, ...] = knob((0.9, 0.95), ...,   "of AdamW")
    adam_eps: float         = knob(1e-8,     ...,       "of AdamW")
    adam_weight_decay: float = knob(0.0,     ...,       "of lm_head and embedding, decoupled (0 = off)")
    grad_clip: float        = knob(0.0,      ...,       "largest norm of the whole gradient (0 = off)")
    # Schedule
    num_steps: int          = knob(1000,     4600,      "optimizer steps")
    warmup_steps: int       = knob(0,        ...,       "steps of linear warm-up (0 = off)")
    cooldown_steps: int     = knob(750,      1800,      "steps of linear cool-down at the end (0 = off)")
    final_lr_frac: float    = knob(0.0,      ...,       "rate at the end of the cool-down over its peak")
    # Run
    seed: int               = knob(0,        ...,       "of the initial weights and of the data's order")
    val_every: int          = knob(500,      125,       "steps between validations (0 = at the end only)", FREE)
    save_every: int         = knob(0,        ...,       "steps between checkpoints (0 = on a signal only)", FREE)
    optimizer_metrics_every: int = knob(0,   ...,       "steps between lines of metrics.jsonl (0 = off)", FREE)
    resume: str             = knob("",       ...,       "checkpoint, or its run folder, to go on from ('' = off)", FREE)
    init_from: str          = knob("",       ...,       "checkpoint to take the weights alone from ('' = off)")
    log_dir: str            = knob("logs",   ...,       "folder of the run folders", FREE)
    run_id: str             = knob("",       ...,       "name of the run folder ('' = track and time)", FREE)
    compile: Literal["auto", "on", "off"] = knob("auto", ..., "torch.compile, per block (auto = on a GPU only)", FREE)
    prime_steps: int        = knob(2,        ...,       "dummy steps before the clock starts, for compilation", FREE)
    collective_timeout: float = knob(600.0,  ...,       "seconds that a rank waits for the others", FREE)
    model_dim = property(lambda self: self.num_heads * self.head_dim)
    padded_vocab_size = property(lambda self: -(-self.vocab_size // 64) * 64)
    def __post_init__(self):
        def require(names, holds, remedy):
            for name in names:
                value = getattr(self, name)
                if not all(map(holds, value if isinstance(value, tuple) else [value])):
                    raise RunError(f"--{name} {value}: {remedy}")
        require(FIELDS, lambda x: isinstance(x, str) or 0 <= x < math.inf, "must be a finite number, not negative")
        require("vocab_size seq_len num_layers num_heads head_dim mlp_ratio rope_base attention_scale logit_softcap lr "
                "num_steps ns_steps collective_timeout".split(), lambda x: x > 0, "must be above 0")
        require(["vocab_size"], lambda x: x <= 2**16, "shards hold uint16: at most 65536")
        require(["head_dim"], lambda x: x % 2 == 0, "rotary positions turn pairs of channels: give an even number")
        require(["val_tokens", "batch_tokens"], lambda x: x and x % self.seq_len == 0,
                f"must be a positive multiple of --seq_len {self.seq_len}")
        require(["betas"], lambda x: len(self.betas) == 2 and x < 1, "must be two numbers below 1, such as 0.9,0.95")
        require(["seed"], lambda x: x <= 2**32, f"must be at most {2**32}")
        require(["warmup_steps"], lambda x: x <= self.num_steps, f"must be at most {self.num_steps}")
        require(["momentum", "momentum_start", "normuon_beta2", "final_lr_frac"], lambda x: x <= 1, "must be at most 1")
        require(["run_id"], re.compile(r"[\w.-]*").fullmatch, "names a folder: letters, digits, '.', '_' and '-' only")

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
TRACKS = get_args(FIELDS["track"].type)

def parse_command_line(arguments: list[str]) -> dict:
    """Returns {field: value} of a command line such as `tiny --num_steps 50`; `track` is in it where it was named."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", nargs="?", help=" or ".join(TRACKS))
    for f in list(FIELDS.values())[1:]:
        def numbers(text, f=f):
            return tuple(map(get_args(f.type)[0], text.split(",")))
        options = {Literal: dict(choices=get_args(f.type)), tuple: dict(type=numbers, metavar="N,..")}.get(
            get_origin(f.type), dict(type=f.type, metavar={int: "N", float: "X", str: "TEXT"}.get(f.type)))
        options.update(dict(nargs="?", const="on") if f.name == "compile" else {})     # --compile alone means on
        small = "" if f.metadata["small"] == f.default else f"; small {f.metadata['small']!r}"
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['meaning']} [{f.default!r}{small}]", **options)
    try:
        known, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise RunError(f"{error}; --help lists the fields and their kinds") from None
    if unknown or known.track not in (None, *TRACKS):
        word, kind, names = (unknown[0], "field of Config", FIELDS) if unknown else (known.track, "track", TRACKS)
        near = difflib.get_close_matches(word.lstrip("-").split("=")[0], names, n=1)
        raise RunError(f"{word}: no such {kind}; "
                       + (f"did you mean {near[0]}?" if near else f"--help lists them: {', '.join(names)}"))
    return {name: value for name, value in vars(known).items() if value is not None}

def make_config(given: dict, saved: dict | None = None) -> Config:
    """Config of the track named, with the fields given; or, on a resume, the saved one with the FREE fields given."""
    if saved is None:
        if "track" not in given:
            raise RunError(f"no track named: give one of {', '.join(TRACKS)} (./run.sh chooses one by the hardware)")
        return Config(**{name: f.metadata[given["track"]] for name, f in FIELDS.items()} | given)
    if odd := sorted(saved.keys() ^ FIELDS.keys()):
        raise RunError(f"--resume {given['resume']}: a version of this file without, or with, {', '.join(odd)} wrote "
                       "it; resume with that version, or take the weights alone with --init_from")
    for name, value in given.items():
        if not FIELDS[name].metadata["free"] and value != saved[name]:
            raise RunError(f"--{name} {value}: would change the run, whose checkpoint has {saved[name]}; leave it out, "
                           "or start a new run from the weights with --init_from")
    path = Path(given["resume"]).resolve()
    folder = path if path.is_dir() else path.parent     # the run goes on where its checkpoint lies
    return Config(**{**saved, "log_dir": str(folder.parent), "run_id": folder.name, **given})

# ======== 2. Processes, log and clock. ================================================================================
class World(NamedTuple):
    """Where this process stands among the processes of the run; alone, without torchrun, it is rank 0 of 1."""
    rank: int
    size: int
    device: torch.device
    timeout: float     # seconds that a collective may take
    @contextmanager
    def collective(self, what: str):
        """Names the collective in which a rank waits too long or its peer dies; on NCCL its own watchdog does so."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.search(r"tim(ed|e) ?out|connection|peer|nccl", str(error), re.IGNORECASE):
                raise
            raise RunError(f"rank {self.rank} of {self.size}: the {what} failed; another rank died, or was waited for "
                           f"longer than --collective_timeout {self.timeout:g} s ({error})") from error
    def gather(self, value, what: str = "exchange of facts at the start or end") -> list:
        """Returns every rank's `value` (any picklable object), in the order of the ranks."""
        values = [value] * self.size
        if self.size > 1:
            with self.collective(what):
                dist.all_gather_object(values, value)
        return values

def start_world(timeout: float) -> World:
    """Joins the process group that torchrun describes in the environment, if there is one."""
    rank, size, local_rank = map(int, map(os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK"), (0, 1, 0)))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus <= local_rank:
        raise RunError(f"rank {rank}: no GPU {local_rank}, this node has {gpus}; give at most --nproc_per_node {gpus}")
    device, backend = (f"cuda:{local_rank}", "cpu:gloo,cuda:nccl") if gpus else ("cpu", "gloo")
    world = World(rank, size, torch.device(device), timeout)
    if gpus:
        torch.cuda.set_device(device)
    if size > 1:
        with world.collective("rendezvous"):
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    return world

class RunLog:
    """log.txt and console of rank 0; on the other ranks a call does nothing."""
    def __init__(self, folder: Path, rank: int):
        self.file, self.last_line = None, 0.0
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")     # written line by line
    def __call__(self, text: str, console: bool = True) -> None:
        if self.file is not None:
            self.file.write(text + "\n")
            if console:
                tqdm.write(text)     # print, above a progress bar where there is one
                sys.stdout.flush()
    def step(self, text: str, bar: tqdm) -> None:
        """Logs a training step: all go to the file; the console gets the bar, or a line every two seconds."""
        due = bar.disable and time.monotonic() - self.last_line > 2
        self.last_line = time.monotonic() if due else self.last_line
        self(text, console=due)
        bar.update()

class Clock:
    """Training time in seconds: it runs from the first step on, and is paused for validation and checkpoints."""
    def __init__(self, device: torch.device):
        self.device, self.elapsed, self.started = device, 0.0, None
    def start(self) -> None:
        self.pause()
        self.started = time.perf_counter()
    def pause(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.elapsed, self.started = self.read(), None
    def read(self) -> float:
        return self.elapsed + (0.0 if self.started is None else time.perf_counter() - self.started)

def catch_signals() -> list[int]:
    """Returns a list that gets each SIGTERM and Ctrl-C, for the run to save and stop; a second Ctrl-C exits at once."""
    caught = []
    def receive(number, frame):
        if number == signal.SIGINT and signal.SIGINT in caught:
            os._exit(128 + number)
        caught.append(number)
    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)
    return caught

def has_bf16_units(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 itself; older GPUs, and CPUs of most laptops, only emulate that, slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(map(getattr(torch.cpu, "get_capabilities", dict)().get, ("avx512_bf16", "amx_bf16")))

# Dense bf16 peaks (FLOP/s) from NVIDIA's data sheets; the first entry that the GPU's name contains counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
              "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}

def describe_hardware(world: World) -> str:
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [*re.findall(r"model name\s*: (.*)", info), platform.processor(), platform.machine()]
    return f"{world.size} x {torch.get_num_threads()} threads of {next(filter(None, names))}"

def peak_memory_gib(device: torch.device) -> float:
    """Returns the most memory that this process has held: on the GPU, or on a CPU as a whole (GiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)

# ======== 3. Data: shards of 256 int32 of header (magic, version, tokens, vocabulary, CRC-32) and then uint16 tokens. =
HEADER_INTS, MAGIC, VERSION, GPT2_VOCAB_SIZE = 256, 20240520, 1, 50257
REDO = "delete it and prepare the data again (./run.sh, data/local_text.py or data/fineweb.py)"

def open_shard(path: str, vocab_size: int) -> torch.Tensor:
    """Returns the shard's tokens, uint16 (n,), memory-mapped; raises RunError where its header or size is wrong."""
    size, header_bytes = os.path.getsize(path), 4 * HEADER_INTS
    if size < header_bytes:
        raise RunError(f"{path}: {size} bytes are less than a shard's header of {header_bytes}; {REDO}")
    magic, version, num_tokens, vocab = torch.from_file(path, size=HEADER_INTS, dtype=torch.int32)[:4].tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise RunError(f"{path}: magic {magic}, version {version}, but a shard has {MAGIC} and {VERSION}; {REDO}")
    if size != (whole := header_bytes + 2 * num_tokens):
        raise RunError(f"{path}: the header's {num_tokens} tokens make {whole} bytes, not {size}: truncated; {REDO}")
    if (vocab or GPT2_VOCAB_SIZE) != vocab_size:
        raise RunError(f"{path}: has a vocabulary of {vocab or GPT2_VOCAB_SIZE}; give --vocab_size that, or others")
    return torch.from_file(path, size=2 * HEADER_INTS + num_tokens, dtype=torch.uint16)[2 * HEADER_INTS:]

def check_shard(path: str, vocab_size: int) -> str:
    """Reads the whole shard: returns its sha256, or raises RunError where a token or the checksum is wrong."""
    tokens, content = open_shard(path, vocab_size), memoryview(Path(path).read_bytes())
    if (top := tokens.numpy().max(initial=0)) >= vocab_size:     # uint16 tensors have no max
        raise RunError(f"{path}: token {top} is outside the vocabulary of {vocab_size}; {REDO}")
    if (checksum := int.from_bytes(content[16:20], "little")) and zlib.crc32(content[4 * HEADER_INTS:]) != checksum:
        raise RunError(f"{path}: the tokens do not match the checksum {checksum:#010x} in the header; {REDO}")
    return hashlib.sha256(content).hexdigest()

class Rows:
    """Rows of `seq_len` tokens and the one after, over shards in the order of their names; none spans two shards. Of
    the shards only those that hold the first `max_rows` count: a run does not depend on how many were downloaded."""
    def __init__(self, option: str, pattern: str, vocab_size: int, seq_len: int, max_rows: int):
        found = sorted(glob.glob(pattern))
        if not found:
            raise RunError(f"--{option} {pattern}: no file matches; `python data/fineweb.py` fetches small's shards, "
                           "`python data/local_text.py` makes tiny's, and those of your own text")
        self.seq_len, self.vocab_size, self.num_found = seq_len, vocab_size, len(found)
        self.windows, self.num_rows, self.num_tokens, self.order = [], 0, 0, {}
        while self.num_rows < max_rows and len(self.windows) < len(found):
            tokens = open_shard(found[len(self.windows)], vocab_size)
            rows = max(0, len(tokens) - 1) // seq_len
            self.windows.append(tokens.as_strided((rows, seq_len + 1), (seq_len, 1)).numpy())     # they overlap
            self.num_rows += rows
            self.num_tokens += len(tokens)
        self.paths, self.ends = found[:len(self.windows)], np.cumsum([0, *map(len, self.windows)])
        if self.num_rows == 0:
            raise RunError(f"--{option} {pattern}: {self.num_tokens} tokens do not fill a row of --seq_len {seq_len} "
                           "and its next token; give more text")
    def check(self, world: World) -> str:
        """Reads all tokens, shared among the ranks; returns their sha256 (of several shards: that of their lines)."""
        mine = self.paths[world.rank::world.size]
        with ThreadPoolExecutor(4) as pool:
            digests = zip(mine, pool.map(check_shard, mine, repeat(self.vocab_size)), strict=True)
        lines = [digest for _, digest in sorted(sum(world.gather(list(digests)), []))]
        return lines[0] if len(lines) == 1 else hashlib.sha256("".join(f"{x}\n" for x in lines).encode()).hexdigest()
    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Returns tokens uint16 (len(rows), seq_len + 1); by numpy, which copies rows several times faster."""
        tokens, order = np.empty((len(rows), self.seq_len + 1), dtype=np.uint16), np.argsort(rows)     # as in the files
        shares = np.split(order, np.searchsorted(rows[order], self.ends[1:]))     # of each shard
        for windows, before, here in zip(self.windows, self.ends, shares, strict=False):
            tokens[here] = windows[rows[here] - before]
        return torch.from_numpy(tokens)
    def shuffled(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Returns the rows at `positions` of the training order: a permutation an epoch, a pure function of the seed.
        Neighbouring rows are alike, so they are shuffled apart; ranks and micro-steps only group what it gives."""
        epochs, rows = positions // self.num_rows, np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            if (key := (seed << 20) + epoch) not in self.order:
                self.order = {key: torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(key)).numpy()}
            rows[epochs == epoch] = self.order[key][positions[epochs == epoch] % self.num_rows]
        return rows

def load_batches(rows: Rows, positions: list[int], seed: int, world: World, step: int = 0, ahead: int = 2**20):
    """The distributed loader: yields this rank's tokens, int64 (R, T + 1) on its device, of each step from `step` on.
    Step i takes the rows at positions[i] to [i + 1] of the training order, a function of i alone: to resume takes no
    state. A thread prepares about `ahead` tokens while those before are used; to a GPU it copies on a side stream."""
    stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
    def prepare(steps):     # -> the batches of `steps`, uint16, as a copy to the GPU that may still be under way
        shares = [np.arange(*positions[i:i + 2]).reshape(world.size, -1)[world.rank] for i in steps]
        tokens = rows.read(rows.shuffled(seed, np.concatenate(shares)))
        with torch.cuda.stream(stream):     # does nothing for None
            tokens = tokens.pin_memory().to(world.device, non_blocking=True) if stream else tokens
        return tokens.split(list(map(len, shares)))
    pool, queue = ThreadPoolExecutor(1, initializer=lambda: stream and torch.cuda.set_device(world.device)), deque()
    chunks = groupby(range(step, len(positions) - 1), lambda i: positions[i] * rows.seq_len // (ahead * world.size))
    for chunk in [*(list(steps) for _, steps in chunks), None, None]:     # two are always under way
        queue.append(chunk and pool.submit(prepare, chunk))
        if len(queue) > 2:
            batches = queue.popleft().result()
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
                batches[0].record_stream(torch.cuda.current_stream())
            yield from (batch.to(torch.int64) for batch in batches)     # here: a fourth of the bytes had to travel

def document_starts(tokens_BT: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Returns the positions in tokens_BT, flattened, of each row's start and end-of-text, and then B T: int32 (n + 1,),
    the cu_seqlens of variable-length attention that stays inside documents."""
    starts = tokens_BT == end_of_text
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=starts.numel()).to(torch.int32)

# ======== 4. Model. ===================================================================================================
def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, with no parameters (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))

def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x W^T; the weight is kept in fp32 and cast to the dtype of x."""
    return F.linear(x, layer.weight.to(x.dtype))

@lru_cache(4)
def rotary_tables(seq_len: int, head_dim: int, base: float, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (cos, sin), fp32 (T, 1, K/2), of the angles position * base^(-2i/K)."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequencies)[:, None, :]
    return angles.cos(), angles.sin()

def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of x (B, T, H, K): turns channels i and i + K/2, in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)

class Attention(nn.Module):
    """Causal self-attention with QK-norm: q and k have unit RMS, which bounds the logits (arXiv:2010.04245)."""
    def __init__(self, config: Config):
        super().__init__()
        self.num_heads, self.scale = config.num_heads, config.attention_scale
        self.qkv = nn.Linear(config.model_dim, 3 * config.model_dim, bias=False)     # rows: Q, then K, then V
        self.proj = nn.Linear(config.model_dim, config.model_dim, bias=False)
    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = linear(self.qkv, x_BTD).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v))
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return linear(self.proj, y_BHTK.transpose(1, 2).flatten(2))

class MLP(nn.Module):
    """W2 relu(W1 x)^2 (So et al. 2021, arXiv:2109.08668)."""
    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.model_dim, config.mlp_ratio * config.model_dim, bias=False)
        self.proj = nn.Linear(config.mlp_ratio * config.model_dim, config.model_dim, bias=False)
    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return linear(self.proj, F.relu(linear(self.up, x_BTD)).square())

class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention, self.mlp = Attention(config), MLP(config)
    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(norm(x_BTD), cos, sin)
        return x_BTD + self.mlp(norm(x_BTD))

class GPT(nn.Module):
    """Decoder-only transformer with activations in `dtype`; a call returns the targets' mean cross-entropy."""
    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = nn.Embedding(config.padded_vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(config.model_dim, config.padded_vocab_size, bias=False)
    def initialize(self, seed: int) -> "GPT":
        """Draws the weights, on the CPU and so the same everywhere: the first pattern that matches the name counts."""
        generator = torch.Generator().manual_seed(seed)
        rules = {r"embed\.weight": lambda p: 1.0, r"lm_head\.weight|.*\.proj\.weight": lambda p: 0.0,
                 r".*\.(qkv|up)\.weight": lambda p: 0.5 * p.size(1) ** -0.5}
        for name, p in self.named_parameters():
            std = next((std for pattern, std in rules.items() if re.fullmatch(pattern, name)), None)
            if std is None:
                raise RunError(f"parameter {name}: no rule of GPT.initialize matches it; add one")
            nn.init.normal_(p, 0.0, std(p), generator)
        return self
    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Returns the last block's output (B, T, D)."""
        cos, sin = rotary_tables(tokens_BT.size(1), self.config.head_dim, self.config.rope_base, tokens_BT.device)
        x_BTD = norm(self.embed(tokens_BT).to(self.dtype))
        for block in self.blocks:
            x_BTD = block(x_BTD, cos, sin)
        return x_BTD
    def logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the soft-capped logits (B, T, V), fp32, for the token after each token, of `hidden`'s result."""
        logits_BTV = linear(self.lm_head, norm(x_BTD)).float()
        return self.config.logit_softcap * torch.tanh(logits_BTV / self.config.logit_softcap)
    def loss(self, x_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(x_BTD).flatten(0, 1), targets_BT.flatten())
    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return self.loss(self.hidden(tokens_BT), targets_BT)

# ======== 5. Optimizers and the parameter table. ======================================================================
POLYNOMIALS = {     # a factor of |G|_F, and (a, b, c) of each step, s <- a s + b s^3 + c s^5; the last repeats
    "quintic": (1.0, [(3.4445, -4.7750, 2.0315)]),     # Jordan et al. 2024: steep at 0, ends within about [0.7, 1.2]
    "polar_express": (1.02, [(8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061),
                             (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232)]),     # Amsel et al. 2025, 2505.16932
}

def symmetric(A: torch.Tensor, B: torch.Tensor, C=None, beta=0.0, alpha=1.0, strip=256) -> torch.Tensor:
    """Returns alpha A B + beta C, for A (k, m, n) or (m, n), where that is symmetric. On a CPU, for m >= 2 strips, what
    is below the diagonal is copied from above it: two thirds of the operations for m = 768."""
    add, m = torch.addmm if A.ndim == 2 else torch.baddbmm, A.size(-2)
    if A.is_cuda or m < 2 * strip:
        return A @ B if C is None else add(C, A, B, beta=beta, alpha=alpha)
    S = A.new_empty(*A.shape[:-1], m)
    for i, j in pairwise([*range(0, m, strip), m]):
        S[..., i:j, i:] = symmetric(A[..., i:j, :], B[..., i:], None if C is None else C[..., i:j, i:], beta, alpha)
        S[..., j:, i:j] = S[..., i:j, j:].mT
    return S

def orthogonalize(G: torch.Tensor, steps=5, dtype=None, polynomial="quintic", gram=None) -> torch.Tensor:
    """Returns about U V^T of each matrix U S V^T in a batch G (k, m, n), m <= n, by Newton-Schulz in `dtype`.

    X <- a X + b (X X^T) X + c (X X^T)^2 X from X = G / |G|_F. Five steps do not lift singular values below 0.003 |G|_F
    to 1. With `gram` (None: for n >= 2 m in float32 and 64) they run on R = X X^T (k, m, m), half of the operations for
    n = 4 m, and X is multiplied once (Zhang et al. 2026, Gram Newton-Schulz); half precision would need restarts.
    """
    if G.ndim == 3 and not G.is_cuda and G.size(1) >= 512:     # one by one, large ones stay in a CPU's caches
        return torch.stack([orthogonalize(g, steps, dtype, polynomial, gram) for g in G])
    factor, coefficients = POLYNOMIALS[polynomial]
    coefficients = [coefficients[min(i, len(coefficients) - 1)] for i in range(steps)]
    X = (G / (factor * G.norm(dim=(-2, -1), keepdim=True)).clamp_min(1e-20)).to(dtype or G.dtype)
    if not (X.size(-1) >= 2 * X.size(-2) and X.dtype.itemsize >= 4 if gram is None else gram):
        for a, b, c in coefficients:
            A = symmetric(X, X.mT)
            X = (torch.addmm if X.ndim == 2 else torch.baddbmm)(X, symmetric(A, A, A, b, c), X, beta=a)
        return X
    R, P, Q = symmetric(X, X.mT), None, None     # a step multiplies X by a polynomial P of R; Q is the product of all
    for a, b, c in coefficients:
        R = R if P is None else symmetric(symmetric(P, R), P)
        P = symmetric(R, R, R, b, c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else symmetric(P, Q)
    return Q @ X

UPDATE_SCALES = {     # scale of an orthogonal m x n update, and the ratio of Muon's rate to AdamW's that belongs to it
    "sqrt_ratio":      (lambda m, n: max(1, m / n) ** 0.5,   10.0),     # Jordan et al. 2024
    "sqrt_max":        (lambda m, n: max(m, n) ** 0.5,       0.1),      # Muon as first published
    "match_rms_adamw": (lambda m, n: 0.2 * max(m, n) ** 0.5, 1.0),      # Liu et al. 2025, arXiv:2502.16982
    "none":            (lambda m, n: 1.0,                    10.0),     # OrthogonalNesterov
}

def matrices(p: torch.Tensor, parts: int) -> torch.Tensor:
    """Returns the m x n matrices of a parameter as (k, m, n): of a bank each, of a fused weight its `parts`."""
    return p if p.ndim == 3 else p.unflatten(0, (parts, -1))

class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for matrices.

        v <- mu v + (1 - mu) g;   u <- orthogonalize((1 - mu) g + mu v);   W <- (1 - lr wd) W - lr scale(m, n) u

    A parameter is a matrix, a bank (k, m, n), or by `parts` of its group fused (parts m, n); each matrix of it is taken
    apart. Not for gains, biases, embeddings, the lm_head or sharded tensors; convolution filters are the caller's to
    flatten. `accumulate`: v <- mu v + g, and then g + mu v (OrthogonalNesterov); `nesterov=False`: v itself. `beta2` is
    NorMuon's (Li et al. 2025, arXiv:2510.05491; 0 = off): u over the running RMS of its rows or, where they are more,
    columns, at the norm of u. `cautious`: decay of lr wd (lr / base_lr), where u and W agree in sign. Each parameter
    has an owner in the process group, which alone holds its state and computes its update, from gradients that are
    the same on all ranks; a batch of matrices is gathered while the next is computed.
    """
    def __init__(self, params, lr=0.03, momentum=0.95, weight_decay=0.0, parts=1, update_scale="sqrt_ratio",
                 nesterov=True, accumulate=False, cautious=False, beta2=0.0, ns_steps=5, polynomial="quintic",
                 ns_dtype=None, momentum_dtype=None, compiled=False, world=None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, parts=parts,
                                      update_scale=update_scale))
        self.nesterov, self.accumulate, self.cautious, self.beta2 = nesterov, accumulate, cautious, beta2
        self.ns_dtype, self.momentum_dtype, self.cpu_batch = ns_dtype, momentum_dtype, 2**20     # numbers: its caches'
        function = torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize
        self.orthogonalize = partial(function, steps=ns_steps, polynomial=polynomial, dtype=ns_dtype)
        self.owners, self.observed = {}, None     # observed: a dict that is given each parameter's u, for the metrics
        own = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.rank, self.world_size = world or own
        costs, loads = {}, [0] * self.world_size
        for group in self.param_groups:
            group.setdefault("base_lr", group["lr"])
            for name, p in zip(group.get("param_names", repeat("a parameter")), group["params"], strict=False):
                outside = p.ndim < 2 or re.search("embed|lm_head", name)
                wrong = ("is a DTensor; give whole tensors" if hasattr(p, "placements") else
                         "is no matrix of a hidden layer; give it to AdamW" if outside else
                         "has more than 3 dimensions; flatten filters to (out, in h w)" if p.ndim > 3 else
                         f"has no {group['parts']} equal parts"
                         if (p.size(0) if p.ndim == 2 else 1) % group["parts"] else "")
                if wrong:
                    raise ValueError(f"Muon: {name}, {tuple(p.shape)}, {wrong}")
                costs[p] = p.numel() * min(matrices(p, group["parts"]).shape[1:])
        for p in sorted(costs, key=costs.get, reverse=True):     # the costliest first, each to the least loaded rank
            self.owners[p] = loads.index(min(loads))
            loads[self.owners[p]] += costs[p]
    members = property(lambda self: [(p, group) for group in self.param_groups for p in group["params"]])
    @torch.no_grad()
    def step(self, closure=None):
        batches, seen = {}, Counter()     # of same-shaped matrices, tall ones transposed: each owner's [(p, group)]
        for p, group in self.members:
            if p.grad is not None:
                shape, owner = tuple(sorted(matrices(p, group["parts"]).shape[1:])), self.owners[p]
                i = 0 if p.is_cuda else seen[shape, owner] * math.prod(shape) // self.cpu_batch
                batches.setdefault((shape, i), [[] for _ in range(self.world_size)])[owner].append((p, group))
                seen[shape, owner] += 1
        started = (self.start(shape, owned) for (shape, _), owned in sorted(batches.items(), reverse=True))
        for (updates, gathering, _), _ in pairwise(chain(started, [None])):     # by now the next one is under way
            _ = gathering and gathering.wait()
            for p, group, u in updates:
                W, lr, decay = matrices(p, group["parts"]), group["lr"], group["lr"] * group["weight_decay"]
                u = u.mT if W.size(1) >= W.size(2) else u
                if self.observed is not None:
                    self.observed[p] = u
                if decay:
                    decay *= lr / group["base_lr"] if self.cautious else 1
                    W.sub_(W * (u * W > 0) if self.cautious else W, alpha=decay)
                W.add_(u, alpha=-lr * UPDATE_SCALES[group["update_scale"]][0](*W.shape[1:]))
    def start(self, shape: tuple, owned: list) -> tuple:
        """Computes this rank's updates of owned[rank] [(p, group)], whose matrices, or their transposes, have `shape`;
        returns [(p, group, u (k, *shape))] of all ranks, the gathering to wait for, and what must live until then."""
        counts = [[len(matrices(p, group["parts"])) for p, group in part] for part in owned]
        mine, U = owned[self.rank], next(filter(None, owned))[0][0].new_empty(0, *shape, dtype=self.ns_dtype)
        if mine:
            U = self.orthogonalize(torch.cat([self.direction(p, group) for p, group in mine]))
            U = self.normalize(U, mine, counts[self.rank]).to(U.dtype) if self.beta2 else U
        gathered, gathering = U, None
        if self.world_size > 1:
            U = torch.cat((U, U.new_zeros(max(map(sum, counts)) - len(U), *shape)))     # padded to the longest
            gathered = U.new_empty(self.world_size * len(U), *shape)
            all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)     # renamed in torch 2.13
            gathering = all_gather(gathered, U, async_op=True)
        shares = zip(owned, counts, gathered.split(len(U)), strict=True)
        return [(*item, u) for part, sizes, share in shares
                for item, u in zip(part, share[:sum(sizes)].split(sizes), strict=True)], gathering, U
    def direction(self, p: torch.Tensor, group: dict) -> torch.Tensor:
        """Updates the momentum of p; returns what is to be orthogonalised, (k, m, n) with m <= n."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=self.momentum_dtype)
        stored, g, mu = self.state[p]["momentum_buffer"], p.grad, group["momentum"]
        v = stored.to(p.dtype)     # `stored` itself where the dtypes agree
        v = v.mul_(mu).add_(g) if self.accumulate else v.lerp_(g, 1 - mu)
        stored.copy_(v)
        if self.nesterov:
            v = g.add(v, alpha=mu) if self.accumulate else g.lerp(v, mu)
        M = matrices(v, group["parts"])
        return M.mT if M.size(1) >= M.size(2) else M
    def normalize(self, U: torch.Tensor, mine: list, counts: list[int]) -> torch.Tensor:
        """NorMuon's second step, of U (k, m, n), m <= n, of all of `mine`: each column's mean square is tracked."""
        r = U.square().mean(1, keepdim=True, dtype=mine[0][0].dtype)
        for state, new in zip((self.state[p] for p, _ in mine), r.split(counts), strict=True):
            state["second_moment"] = torch.lerp(state.get("second_moment", torch.zeros_like(new)), new, 1 - self.beta2)
        even = U * torch.cat([self.state[p]["second_moment"] for p, _ in mine]).clamp_min(1e-10).rsqrt()
        before, after = (x.norm(dim=(1, 2), keepdim=True) for x in (U, even))
        return even * (before / after.clamp_min(1e-10))
    def state_dict(self) -> dict:
        """Returns the state, on rank 0 of several the whole, on the CPU; all ranks must call this together."""
        whole, shares = super().state_dict(), [{}] * self.world_size
        if self.world_size > 1:
            mine = {i: {key: x.cpu() for key, x in state.items()} for i, state in whole["state"].items()}
            dist.gather_object(mine, shares if self.rank == 0 else None)
            whole["state"] = {i: state for share in shares for i, state in share.items()}
        return whole
    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({**state_dict, "state": {}})     # it would cast each tensor to its parameter's dtype
        saved = sum((group["params"] for group in state_dict["param_groups"]), [])
        for i, (p, _) in zip(saved, self.members, strict=True):
            if self.owners[p] == self.rank and i in state_dict["state"]:
                self.state[p] = {key: x.to(p.device, copy=True) for key, x in state_dict["state"][i].items()}

def parameter_rules(c: Config) -> list[tuple]:
    """The rows of the parameter table: a parameter belongs to the first whose pattern matches its whole name."""
    scale = {"muon": c.update_scale, "orthogonal_nesterov": "none"}.get(c.matrix_optimizer)
    matrix_lr = c.lr * (c.matrix_lr_ratio or (UPDATE_SCALES[scale][1] if scale else 1.0))
    matrix, decay, qkv_parts = c.matrix_optimizer, c.matrix_weight_decay, 3 if c.matrix_optimizer == "muon" else 1
    return [
        # pattern                         optimizer  learning rate             weight decay         matrices in a weight
        (r"lm_head\.weight",              "adamw",   c.lr,                     c.adam_weight_decay, 1),
        (r"embed\.weight",                "adamw",   c.lr * c.embed_lr_ratio,  c.adam_weight_decay, 1),
        (r"blocks\..*\.qkv\.weight",      matrix,    matrix_lr,                decay,               qkv_parts),
        (r"blocks\..*\.(proj|up)\.weight", matrix,   matrix_lr,                decay,               1),
        (r".*(gain|bias|scale|lambda)s?", "adamw",   c.lr,                     0.0,                 1),
    ]

def make_optimizers(model: GPT, c: Config, ns_dtype=None, compiled=False) -> tuple[list, str]:
    """Returns ([AdamW, and Muon where the table has it], the table as text); each parameter is in one row, once."""
    rules, members = parameter_rules(c), {}
    for name, p in model.named_parameters():
        rule = next((rule for rule in rules if re.fullmatch(rule[0], name)), None)
        if rule is None:
            raise RunError(f"parameter {name}: no row of parameter_rules matches it; add one")
        members.setdefault(rule, []).append((name, p))
    groups, lines = {True: [], False: []}, [("parameter", "shape", "optimizer", "lr", "weight decay", "matrices")]
    for (_, optimizer, lr, weight_decay, parts), named in members.items():
        group = dict(params=named, lr=lr, base_lr=lr, weight_decay=weight_decay)
        groups[optimizer == "adamw"].append(group if optimizer == "adamw" else dict(group, parts=parts))
        kinds = Counter((re.sub(r"\.\d+\.", ".*.", name), "x".join(map(str, p.shape))) for name, p in named)
        for (name, shape), count in kinds.items():
            lines.append((name, f"{count} of {shape}", optimizer, f"{lr:g}", f"{weight_decay:g}", str(parts)))
    optimizers = [torch.optim.AdamW(groups[True], betas=c.betas, eps=c.adam_eps, fused=True)]
    if groups[False]:
        seed_002 = c.matrix_optimizer == "orthogonal_nesterov"
        optimizers.append(Muon(groups[False], momentum=c.momentum, nesterov=c.nesterov == "on", accumulate=seed_002,
                               cautious=c.decay_kind == "cautious", beta2=c.normuon_beta2, ns_steps=c.ns_steps,
                               polynomial=c.polynomial, update_scale="none" if seed_002 else c.update_scale,
                               ns_dtype=ns_dtype, momentum_dtype=getattr(torch, c.momentum_dtype), compiled=compiled))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return optimizers, "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

# ======== 6. Schedules: pure functions of the step (0 for the first). =================================================
def lr_multiplier(c: Config, step: int) -> float:
    """Trapezoid: linear warm-up, constant, linear cool-down to final_lr_frac (Hagele et al. 2024, arXiv:2405.18392)."""
    up = (step + 1) / c.warmup_steps if c.warmup_steps else 1.0
    left = min(1.0, (c.num_steps - step) / max(1, min(c.cooldown_steps, c.num_steps)))
    return min(up, c.final_lr_frac + left * (1 - c.final_lr_frac))

def muon_momentum(c: Config, step: int) -> float:
    """Linear from momentum_start to momentum, then constant."""
    up = min(1.0, step / c.momentum_warmup_steps) if c.momentum_warmup_steps else 1.0
    return c.momentum_start + up * (c.momentum - c.momentum_start)

def batch_rows(c: Config, step: int) -> int:
    """Rows of the global batch: the entries of batch_tokens in turn, each for an equal share of the steps."""
    return c.batch_tokens[step * len(c.batch_tokens) // c.num_steps] // c.seq_len

def set_schedules(optimizers: list, c: Config, step: int) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["base_lr"] * lr_multiplier(c, step)
        if "momentum" in group:
            group["momentum"] = muon_momentum(c, step)

def micro_batch_rows(c: Config, rows: int, world_size: int, gpu_bytes: int = 0) -> int:
    """Returns the rows of a micro-batch for a global batch of `rows`: --micro_batch, or, where that is 0, the most that
    divide a rank's share within 4,096 tokens on a CPU (its caches), 8,192 for every 20 GB of a GPU's memory."""
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    if world_size not in divisors:
        raise RunError(f"--batch_tokens: {rows} rows of --seq_len {c.seq_len} cannot be shared by {world_size} "
                       f"processes; start {', '.join(map(str, divisors))} of them")
    per_rank = rows // world_size
    divisors = [n for n in divisors if per_rank % n == 0]
    by_memory = (8192 * max(1, int(gpu_bytes / 20e9)) if gpu_bytes else 4096) // c.seq_len
    micro_batch = max(n for n in divisors if n <= max(1, c.micro_batch or by_memory))
    if micro_batch < min(c.micro_batch, per_rank):
        raise RunError(f"--micro_batch {c.micro_batch}: does not divide the {per_rank} rows of a step that each of "
                       f"{world_size} processes has; give {', '.join(map(str, divisors))}, or 0")
    return micro_batch

# ======== 7. Evaluation. Do not edit: it defines the target. ==========================================================
@torch.no_grad()
def evaluate(model: GPT, rows: Rows, c: Config, world: World, micro_batch: int) -> float:
    """Returns the mean loss over the first val_tokens tokens: the ranks share the rows, and the sum goes over all."""
    mine = range(world.rank, c.val_tokens // c.seq_len, world.size)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for start in range(0, len(mine), micro_batch):
        tokens = rows.read(np.array(mine[start:start + micro_batch])).to(world.device).to(torch.int64)
        total += model(tokens[:, :-1], tokens[:, 1:]).double() * tokens[:, 1:].numel()
    return sum(world.gather(total.item(), "sum of the validation loss")) / c.val_tokens

# ======== 8. Checkpoints. =============================================================================================
CHECKPOINT = "checkpoint.pt"
def save_checkpoint(path: Path, content: dict) -> None:
    """Writes beside `path`, syncs and renames: at any moment `path` is a whole checkpoint, the old one or the new."""
    with open(path.with_name(path.name + ".part"), "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)

def load_checkpoint(option: str, name: str, model: nn.Module | None = None) -> dict:
    """Returns the checkpoint in the file, or run folder, `name`, loaded into `model`; unpickles no code."""
    path = Path(name) / CHECKPOINT if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise RunError(f"--{option} {name}: no checkpoint there; give a {CHECKPOINT}, or a run folder that holds one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["config"], content["model"], content["optimizers"], content["step"]
        _ = model is None or model.load_state_dict(content["model"])
        return content
    except Exception as error:     # torch.load raises many types on a file that is not its own
        raise RunError(f"--{option} {name}: {path} is damaged, or of another model ({error}); give another") from None

# ======== 9. Main: set-up, priming, loop, summary. ====================================================================
def accumulate_gradients(model: nn.Module, tokens: torch.Tensor, micro_batch: int, world: World) -> torch.Tensor:
    """Makes the gradient of the mean loss over the global batch; returns the loss over this rank's `tokens` (R, T + 1).
    All micro-steps but the last run inside no_sync, the forward too: DDP decides there whether to reduce."""
    micro_batches, total = tokens.split(micro_batch), 0.0
    model.zero_grad(set_to_none=True)
    for part in micro_batches:
        last = part is micro_batches[-1] or world.size == 1
        with world.collective("average of the gradients") if last else model.no_sync():
            loss = model(part[:, :-1], part[:, 1:]) / len(micro_batches)
            loss.backward()
        total += loss.detach()
    return total

def update(optimizers: list, c: Config, step: int, world: World) -> None:
    """A step of all optimizers on the gradients, which stay until the next are made."""
    set_schedules(optimizers, c, step)
    if c.grad_clip:     # g <- g min(1, c / |g|), of all parameters together
        nn.utils.clip_grad_norm_([p for o in optimizers for row in o.param_groups for p in row["params"]], c.grad_clip)
    for optimizer in optimizers:
        with world.collective("exchange of the matrices' updates"):
            optimizer.step()

def measure(model: nn.Module, before: dict, observed: dict) -> dict:
    """Returns the figures of the last step, {parameters that differ in their layer alone: {figure: value}}: Frobenius
    norms of (clipped) gradient, weight `before` it and update, and the update's RMS, and norm over the weight's. Of
    Muon's u, `observed`, after NorMuon, before rate and scale: orthogonality error |u u^T - I|_F / sqrt(m), m <= n,
    extreme singular values, and the share of entries that agree in sign with the weight: where cautious decay acts."""
    kinds, figures = {}, {}
    for name, p in ((name, p) for name, p in model.named_parameters() if p.grad is not None):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append((p, p.detach(), before[name], p.grad))
    for kind, members in kinds.items():
        matrices, *flat = zip(*members, strict=True)
        new, weight, gradient = (torch.cat([x.flatten() for x in column]) for column in flat)
        update = new - weight
        found = dict(gradient=gradient.norm(), weight=weight.norm(), update=update.norm(),
                     update_rms=update.square().mean().sqrt(), update_to_weight=update.norm() / weight.norm())
        if u := [observed[p].float() for p in matrices if p in observed]:
            S, agree = torch.linalg.svdvals(torch.cat(u).nan_to_num()), torch.cat([x.flatten() for x in u]) * weight > 0
            found.update(orthogonality_error=(S.square() - 1).square().mean().sqrt(), least_singular=S.min(),
                         largest_singular=S.max(), decay_share=agree.float().mean())
        figures[kind] = {key: x.item() if x.isfinite() else None for key, x in found.items()}
    return figures

def train(c: Config, world: World, resumed: dict | None) -> int:
    """Trains to the end, or to a signal; returns the exit status of the process."""
    signals, source, device = catch_signals(), Path(__file__).read_text(encoding="utf-8"), world.device
    # Sizes and data: what is wrong with them is said here, before anything trains.
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    micro_batches = {n // c.seq_len: micro_batch_rows(c, n // c.seq_len, world.size, memory) for n in c.batch_tokens}
    positions = list(accumulate((batch_rows(c, i) for i in range(c.num_steps)), initial=0))     # rows before each step
    train_rows = Rows("train_files", c.train_files, c.vocab_size, c.seq_len, positions[-1])
    val_rows = Rows("val_files", c.val_files, c.vocab_size, c.seq_len, c.val_tokens // c.seq_len)
    if (found := val_rows.num_rows * c.seq_len) < c.val_tokens:
        raise RunError(f"--val_tokens {c.val_tokens}: {c.val_files} has {found}; give that or less, or more text")
    data = dict(train=train_rows.check(world), val=val_rows.check(world))
    known, val_tokens = dict(train=c.train_sha256, val=c.val_sha256), FIELDS["val_tokens"].metadata[c.track]
    comparable = data == known and c.val_tokens == val_tokens if all(known.values()) else None     # None: not known
    if resumed and resumed["data"] != data:
        raise RunError(f"--resume {c.resume}: its run read other data; give that run's --train_files and --val_files "
                       f"(sha256 {resumed['data']}, here {data})")
    # The run folder: one id for all ranks and nodes.
    new_id = f"{c.track}_{datetime.datetime.now():%Y%m%d-%H%M%S}_{os.urandom(4).hex()}"
    native = "bfloat16" if all(world.gather(has_bf16_units(device))) else "float32"
    c = dataclasses.replace(c, run_id=world.gather(c.run_id or new_id)[0], dtype=c.dtype.replace("auto", native))
    folder = Path(c.log_dir) / c.run_id
    if not resumed and world.gather((folder / "log.txt").exists())[0]:
        raise RunError(f"--run_id {c.run_id}: {folder} holds a run; give another name, or go on with --resume {folder}")
    log = RunLog(folder, world.rank)
    # Model and optimizers.
    torch.manual_seed(c.seed)
    model = raw = GPT(c, dtype := getattr(torch, c.dtype)).initialize(c.seed).to(device)
    if c.init_from and not resumed:
        load_checkpoint("init_from", c.init_from, raw)
    if compiled := c.compile == "on" or (c.compile == "auto" and device.type == "cuda"):
        for block in raw.blocks:     # almost as fast as the whole graph, in a fraction of the time to compile
            block.compile(dynamic=False)
        raw.loss = torch.compile(raw.loss, dynamic=False)
    if world.size > 1:
        with world.collective("start-up broadcast of the weights"):
            model = nn.parallel.DistributedDataParallel(raw, gradient_as_bucket_view=True)
    optimizers, table = make_optimizers(raw, c, dtype, compiled)
    tokens_total, epochs = positions[-1] * c.seq_len, positions[-1] / train_rows.num_rows
    hardware = describe_hardware(world)
    commit = subprocess.check_output("git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || echo none",
                                     shell=True, text=True, cwd=Path(__file__).resolve().parent).strip()
    parameters, in_blocks = (sum(p.numel() for p in part.parameters()) for part in (raw, raw.blocks))
    log(source + "=" * 100, console=False)
    log(f"run folder: {folder}")
    log(f"config: {json.dumps(dataclasses.asdict(c))}\nhost: {platform.node()}\ndata sha256: train {data['train']}, "
        f"val {data['val']}\nsource: sha256 {hashlib.sha256(source.encode()).hexdigest()}, git {commit}", console=False)
    log(f"versions: python {platform.python_version()}, torch {torch.__version__}, cuda {torch.version.cuda}, "
        f"{platform.platform()}\nhardware: {hardware}")
    log(f"kernels: attention torch SDPA; activations and Newton-Schulz {str(dtype)[6:]}; torch.compile "
        + ("per block, of the loss and of Newton-Schulz" if compiled else "off"))
    left_out = train_rows.num_tokens - train_rows.num_rows * c.seq_len
    log(f"data: {train_rows.num_tokens:,} training tokens in {len(train_rows.paths)} of {train_rows.num_found} shards "
        f"({left_out:,} at their ends left out); the run takes {tokens_total:,}, or {epochs:.2f} epochs")
    if epochs > 1:
        log(f"warning: the run goes round the data {epochs:.2f} times; text seen again teaches less, so prepare more")
    if comparable is False:
        log(f"warning: this loss does not compare: {'--val_tokens' if data == known else 'data'} is not the track's")
    log(f"batch: {', '.join(f'{n:,}' for n in c.batch_tokens)} tokens a step; a process runs "
        f"{', '.join(map(str, micro_batches.values()))} rows of {c.seq_len} at once")
    log(f"model: {parameters:,} parameters, of which {in_blocks:,} in the blocks\n{table}")
    def snapshot() -> dict:
        with world.collective("collection of the optimizers' state"):
            states = [optimizer.state_dict() for optimizer in optimizers]
        return dict(config=dataclasses.asdict(c), data=data, step=step, position=positions[step], elapsed=clock.elapsed,
                    val_loss=val_loss, rng=torch.get_rng_state(), optimizers=states,
                    model={name: p.to("cpu", copy=True) for name, p in raw.state_dict().items()})

    step, val_loss, clock = 0, None, Clock(device)
    start = resumed or snapshot()
    clock.start()     # of the priming, which leaves no trace
    for micro_batch in sorted(set(micro_batches.values())) * c.prime_steps:
        tokens = torch.randint(c.vocab_size, (2 * micro_batch, c.seq_len + 1)).to(device)
        accumulate_gradients(model, tokens, micro_batch, world)
        update(optimizers, c, 0, world)
        with torch.no_grad():
            raw(tokens[:micro_batch, :-1], tokens[:micro_batch, 1:])
    clock.pause()
    log(f"priming: {clock.elapsed:.1f} s of compilation and dummy steps, outside the training time")
    raw.load_state_dict(start["model"])
    for optimizer, state in zip(optimizers, start["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    torch.set_rng_state(start["rng"])
    prime_seconds, step, val_loss, clock.elapsed = clock.elapsed, start["step"], start["val_loss"], start["elapsed"]
    if resumed:
        log(f"resumed: {c.resume} at step {step}/{c.num_steps}, after {clock.elapsed:.1f} s of training")
    start, loader, data_wait = None, load_batches(train_rows, positions, c.seed, world, step), 0.0
    def require_finite(finite: bool, what: str) -> None:
        if not finite:
            good = f"the last good checkpoint is in {folder}" if (folder / CHECKPOINT).exists() else "none was saved"
            log(f"error: {what} is not finite", console=False)
            raise RunError(f"{what} is not finite; lower --lr, or give --warmup_steps or --grad_clip; {good}")
    def save() -> None:
        content = snapshot()
        require_finite(all(bool(p.isfinite().all()) for p in raw.parameters()), f"step {step}: a weight")
        if world.rank == 0:
            save_checkpoint(folder / CHECKPOINT, content)
        world.gather(None)     # no rank leaves before the file is whole
        log(f"checkpoint: {folder / CHECKPOINT} at step {step}/{c.num_steps}")
    def finish(done: int, statistics: torch.Tensor, queued) -> bool:
        """Reads and logs the statistics of step `done`; returns whether some rank was told to stop."""
        _ = queued and queued.synchronize()     # waits for that step alone, not for the next, which is queued behind it
        loss, stopped = statistics.tolist()
        require_finite(math.isfinite(loss), f"step {done}: the training loss, {loss},")
        seconds = clock.read()
        bar.set_postfix_str(f"loss {loss:.3f}, {positions[done] * c.seq_len / seconds:,.0f} tokens/s", refresh=False)
        log.step(f"step:{done}/{c.num_steps} train_loss:{loss:.6f} train_time:{1e3 * seconds:.0f}ms "
                 f"step_avg:{1e3 * seconds / done:.2f}ms", bar)
        return stopped > 0
    # The clock counts all of the loop but validation and checkpoints. A GPU's step is read when the next one is queued,
    # so that it never waits for the host.
    pending, stopping = None, False
    bar = tqdm(total=c.num_steps, initial=step, unit="step", dynamic_ncols=True,
               disable=world.rank > 0 or not sys.stderr.isatty())
    clock.start()
    while step < c.num_steps and not stopping:
        if step and (epoch := positions[step] // train_rows.num_rows) > positions[step - 1] // train_rows.num_rows:
            log(f"data: epoch {epoch + 1} has begun, in a new order")
        asked = time.perf_counter()
        tokens = next(loader)
        data_wait += time.perf_counter() - asked
        loss = accumulate_gradients(model, tokens, micro_batches[batch_rows(c, step)], world)
        statistics = torch.stack((loss / world.size, torch.full_like(loss, len(signals))))
        if world.size > 1:
            with world.collective("average of the loss"):
                dist.all_reduce(statistics)
        statistics = statistics.to("cpu", non_blocking=True)
        queued = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
        if measures := c.optimizer_metrics_every and (step + 1) % c.optimizer_metrics_every == 0:     # not in the clock
            clock.pause()
            before, optimizers[-1].observed = {name: p.detach().clone() for name, p in raw.named_parameters()}, {}
            clock.start()
        update(optimizers, c, step, world)
        step += 1
        stopping = finish(*pending) if pending else False
        pending = (step, statistics, queued)
        validates = step == c.num_steps or (c.val_every and step % c.val_every == 0)
        saves = c.save_every and step % c.save_every == 0
        if validates or saves or stopping or measures or device.type == "cpu":
            stopping, pending = finish(*pending) or stopping, None
            clock.pause()
            if measures and world.rank == 0:
                figures = dict(step=step, parameters=measure(raw, before, optimizers[-1].observed))
                with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
            optimizers[-1].observed, before, ends = None, None, step == c.num_steps
            if (saves or stopping) and not ends:     # before a validation, which might fail
                save()
            if validates and (ends or not stopping):
                val_loss = evaluate(raw, val_rows, c, world, max(micro_batches.values()))
                require_finite(math.isfinite(val_loss), f"step {step}: the validation loss, {val_loss},")
                log(f"step:{step}/{c.num_steps} val_loss:{val_loss:.6f} train_time:{1e3 * clock.elapsed:.0f}ms "
                    f"step_avg:{1e3 * clock.elapsed / step:.2f}ms")
            if saves and ends:
                save()
            clock.start()
    clock.pause()
    bar.close()
    if step < c.num_steps:
        log(f"stopped by a signal at step {step}/{c.num_steps}; go on with: --resume {folder}")
        return 128 + (signals or [signal.SIGTERM])[0]
    # FLOP a token of a step: 6 a matrix weight, and 12 L T D for attention (PaLM, arXiv:2204.02311, appendix B).
    speed = tokens_total / clock.elapsed
    flops = 6 * (parameters - raw.embed.weight.numel()) + 12 * c.num_layers * c.seq_len * c.model_dim
    peak = next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", hardware)), None)
    summary = dict(
        run_id=c.run_id, track=c.track, val_loss=val_loss, target=c.target, target_reached=val_loss <= c.target,
        data_comparable=comparable, train_seconds=clock.elapsed, compile_seconds=prime_seconds,
        data_wait_seconds=data_wait, steps=c.num_steps, tokens=tokens_total, tokens_per_second=speed,
        mfu=speed * flops / (peak * world.size) if peak and memory and dtype == torch.bfloat16 else None,
        peak_memory_gib=max(world.gather(peak_memory_gib(device))), parameters=parameters, seed=c.seed,
        world_size=world.size, hardware=hardware, torch=torch.__version__, git=commit,
        train_sha256=data["train"], val_sha256=data["val"])
    for key, value in summary.items():
        log(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {json.dumps(value).strip(chr(34))}")
    if world.rank == 0:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0

def main(arguments: list[str]) -> int:
    try:
        given = parse_command_line(arguments)
        resumed = load_checkpoint("resume", given["resume"]) if given.get("resume") else None
        config = make_config(given, resumed["config"] if resumed else None)
        status = train(config, start_world(config.collective_timeout), resumed)
        if dist.is_initialized():
            dist.destroy_process_group()
        return status
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2

if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_status)     # past the finalizers, in which gloo's threads now and then abort (torch 2.13)
