#!/usr/bin/env python3
"""MuonClip: Muon with QK-clip, which holds attention logits that grow (Kimi K2, arXiv:2507.20534).

    python examples/muonclip.py                          # from the repository's root
    python examples/muonclip.py --tau 20 --lr 0.005 --seeds 5
    torchrun --standalone --nproc_per_node=2 examples/muonclip.py

Without QK-norm nothing bounds a logit q . k: it grows with the weights that make q and k. This
program trains a small transformer on the text of the track `tiny`, with multi-head attention
(MHA) and with multi-head latent attention (MLA), each without and with the clip. It writes what
it measures to OUT/muonclip.json, draws OUT/muonclip.png and ends with a table. On a CPU, where
its three seeds take 4.5 minutes of one core. A run of it: records/examples/muonclip.txt.
"""
import argparse
import dataclasses
import json
import math
import sys
import time
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402
from train_gpt import MLP, Config, norm, ranks, require  # noqa: E402

# What differs from the track. The option --lr is the rate of the matrices, `lr` that of lm_head.
FIELDS = dict(
    val_tokens=2**16, lr=0.003, update_scale="match_rms_adamw", matrix_weight_decay=0.1,
    momentum_warmup_steps=0)

# ==== 1. The largest logit, and the clip ==========================================
# Shape suffixes: B rows, T tokens, D model_dim, H heads, K channels of a head, L layers.

@torch.no_grad()
def largest_logits(q_BHTK, k_BHTK, scale: float, chunk: int = 64) -> torch.Tensor:
    """Returns (H,): each head's largest scale * q_i . k_j with j <= i, over all rows.

    Holds the logits of `chunk` queries at a time, never the whole (T, T) matrix.
    """
    num_heads, size = q_BHTK.shape[1:3]
    largest_H = q_BHTK.new_full((num_heads,), -math.inf)
    for start in range(0, size, chunk):
        q, k = q_BHTK[:, :, start:start + chunk], k_BHTK[:, :, :start + chunk]
        place = torch.arange(k.size(2), device=k.device)
        later = place > place[start:, None]
        logits = (q @ k.mT).masked_fill_(later, -math.inf)
        largest_H = largest_H.maximum(logits.amax((0, 2, 3)))
    return scale * largest_H

@torch.no_grad()
def qk_clip(model: nn.Module, tau: float) -> torch.Tensor:
    """Shrinks the heads whose largest logit since the last call is above tau (inf: none).

        g = tau / largest;   W_q <- sqrt(g) W_q;   W_k <- sqrt(g) W_k

    Call it after the optimizer's step (Kimi K2, arXiv:2507.20534, algorithm 1). The logits are
    those of the weights before that step, so later ones may be a little above tau. Returns
    (L, H): these logits, over all ranks.
    """
    layers = [block.attention for block in model.blocks]
    largest_LH = torch.stack([layer.largest_H for layer in layers])
    if ranks()[1] > 1:  # each rank sees other rows, and all must shrink alike
        dist.all_reduce(largest_LH, op=dist.ReduceOp.MAX)
    g_LH = torch.where(largest_LH > tau, tau / largest_LH, 1.0)
    for layer, g_H in zip(layers, g_LH, strict=True):
        layer.shrink(g_H)
        layer.largest_H.fill_(-math.inf)
    return largest_LH

def scale_heads(linear: nn.Linear, factor_H: torch.Tensor) -> None:
    # The rows of a head lie together. A factor of 1 leaves them as they are, to the bit.
    linear.weight.unflatten(0, (len(factor_H), -1)).mul_(factor_H[:, None, None])

# ==== 2. The two kinds of attention ===============================================
def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)

def turn(x_BTHK):
    size, channels = x_BTHK.size(1), x_BTHK.size(3)
    return train_gpt.rotate(x_BTHK, *train_gpt.rotary_tables(size, channels, x_BTHK.device))

class Attention(nn.Module):
    """Causal attention without QK-norm. Notes each head's largest logit while it trains."""
    def __init__(self, c: Config):
        super().__init__()
        self.num_heads, self.scale = c.num_heads, c.head_dim ** -0.5
        self.proj = linear(c.model_dim, c.model_dim)
        self.register_buffer("largest_H", torch.full((c.num_heads,), -math.inf))

    def split(self, x_BTD):
        return x_BTD.unflatten(2, (self.num_heads, -1))

    def forward(self, x_BTD):
        q, k, v = (x_BTHK.transpose(1, 2) for x_BTHK in self.heads(x_BTD))
        if self.training:
            largest_H = largest_logits(q.detach(), k.detach(), self.scale)
            self.largest_H.copy_(self.largest_H.maximum(largest_H))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))

class MHA(Attention):
    """Multi-head attention with rotary positions."""
    def __init__(self, c: Config):
        super().__init__(c)
        self.query, self.key, self.value = (linear(c.model_dim, c.model_dim) for _ in range(3))

    def heads(self, x_BTD):
        q, k = self.split(self.query(x_BTD)), self.split(self.key(x_BTD))
        return turn(q), turn(k), self.split(self.value(x_BTD))

    @torch.no_grad()
    def shrink(self, g_H):
        scale_heads(self.query, g_H.sqrt())
        scale_heads(self.key, g_H.sqrt())

class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

        c = norm(W_down x);   k_C, v = W_up c;   q = [q_C, turn(q_R)];   k = [k_C, turn(k_R)]

    The keys and values of all heads come from one short latent vector c, and all heads share the
    rotary key k_R, so a cache of c and k_R is enough. Half of a head's channels are rotary.
    """
    def __init__(self, c: Config):
        super().__init__(c)
        dim, half, latent = c.model_dim, c.model_dim // 2, c.model_dim // 4
        self.query_content, self.query_rotary = linear(dim, half), linear(dim, half)
        self.key_rotary = linear(dim, half // c.num_heads)
        self.down, self.key_content = linear(dim, latent), linear(latent, half)
        self.value = linear(latent, dim)

    def heads(self, x_BTD):
        latent = norm(self.down(x_BTD))
        q_C, k_C = self.split(self.query_content(x_BTD)), self.split(self.key_content(latent))
        q_R = turn(self.split(self.query_rotary(x_BTD)))
        k_R = turn(self.key_rotary(x_BTD)[:, :, None]).expand_as(q_R)
        return torch.cat((q_C, q_R), 3), torch.cat((k_C, k_R), 3), self.split(self.value(latent))

    @torch.no_grad()
    def shrink(self, g_H):
        # A logit is q_C . k_C + q_R . k_R. The other heads need k_R as it is, so q_R takes
        # the whole factor.
        scale_heads(self.query_content, g_H.sqrt())
        scale_heads(self.key_content, g_H.sqrt())
        scale_heads(self.query_rotary, g_H)

# ==== 3. The model and its optimizers =============================================
class Block(nn.Module):
    def __init__(self, c: Config, attention: type):
        super().__init__()
        self.attention, self.mlp = attention(c), MLP(c)

    def forward(self, x_BTD):
        x_BTD = x_BTD + self.attention(norm(x_BTD))
        return x_BTD + self.mlp(norm(x_BTD))

class Transformer(nn.Module):
    def __init__(self, c: Config, attention: type):
        super().__init__()
        self.embed = nn.Embedding(c.padded_vocab_size, c.model_dim)
        self.blocks = nn.ModuleList(Block(c, attention) for _ in range(c.num_layers))
        self.lm_head = linear(c.model_dim, c.padded_vocab_size)

    def forward(self, tokens_BT):
        """Returns the mean cross-entropy of each token after the first, in nats."""
        x_BTD = norm(self.embed(tokens_BT[:, :-1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits = self.lm_head(norm(x_BTD)).flatten(0, 1)
        return F.cross_entropy(logits, tokens_BT[:, 1:].flatten())

def make_optimizers(model: Transformer, c: Config) -> dict:
    # All parameters of the blocks are matrices.
    rates = [(model.blocks, c.matrix_lr_ratio), (model.embed, c.embed_lr_ratio), (model.lm_head, 1)]
    matrices, *others = [
        dict(params=[*part.parameters()], lr=c.lr * ratio, initial_lr=c.lr * ratio)
        for part, ratio in rates]
    return dict(
        muon=train_gpt.Muon([matrices], weight_decay=c.matrix_weight_decay,
                            update_scale=c.update_scale),
        adamw=torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0))

# ==== 4. A run ====================================================================
def train_step(model: Transformer, optimizers: dict, tokens, tau: float) -> torch.Tensor:
    """A step on this rank's tokens (B, T + 1). Returns (L, H): the largest logits before it."""
    model.zero_grad()
    model(tokens).backward()
    if ranks()[1] > 1:
        for p in model.parameters():
            dist.all_reduce(p.grad.div_(ranks()[1]))
    for optimizer in optimizers.values():
        optimizer.step()
    return qk_clip(model, tau)

@torch.no_grad()
def evaluate(model: Transformer, rows: train_gpt.Rows, count: int) -> float:
    model.eval()
    parts = [rows.read(part.tolist()).long() for part in torch.arange(count).split(32)]
    return sum(len(part) * model(part).item() for part in parts) / count

def train(c: Config, attention: type, tau: float, rows: dict) -> dict:
    """Trains one model. Returns its name, seed, loss, seconds and logits (steps, L * H)."""
    starts = [step * c.batch_tokens // c.seq_len for step in range(c.num_steps + 1)]
    batches = train_gpt.load_batches(rows["train"], starts, c.seed, torch.device("cpu"))
    torch.manual_seed(c.seed)
    model = Transformer(c, attention)
    optimizers, logits, clock = make_optimizers(model, c), [], time.perf_counter()
    for step, tokens in enumerate(batches):
        train_gpt.set_schedules(optimizers, c, step)
        logits.append(train_step(model, optimizers, tokens, tau).flatten().tolist())
    seconds = time.perf_counter() - clock
    loss = evaluate(model, rows["val"], min(rows["val"].count, c.val_tokens // c.seq_len))
    return dict(attention=attention.__name__, tau=str(tau), seed=c.seed, val_loss=loss,
                seconds=seconds, logits=logits)

# ==== 5. What came out ============================================================
def clips(run: dict) -> torch.Tensor:
    # (steps, L * H): whether the step clipped the head.
    return torch.tensor(run["logits"], dtype=torch.float64) > float(run["tau"])

def tops(run: dict) -> list:
    return [max(heads) for heads in run["logits"]]  # of each step

def spread(values: list, digits: int) -> str:
    std = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{std}"

def print_table(groups: dict) -> None:
    """groups: {(attention, tau): its runs}, first without and then with the clip."""
    form, before = "{:9}  {:5}  {:17}  {:13}  {:13}  {}", None
    print("\n" + form.format(
        "attention", "tau", "val loss", "largest logit", "at the end", "clipped"))
    for (attention, tau), runs in groups.items():
        losses = [run["val_loss"] for run in runs]
        share = fmean(clips(run).double().mean().item() for run in runs)
        print(form.format(
            attention, tau, spread(losses, 4), spread([max(tops(run)) for run in runs], 1),
            spread([tops(run)[-1] for run in runs], 1), f"{share:.1%}"))
        if tau != "inf":
            costs = [b - a for a, b in zip(before, losses, strict=True)]
            print(f"{attention:9}  the clip changes a seed's loss by {spread(costs, 4)}")
        before = losses
    print(f"loss: nats a byte; ±: standard deviation, n = {len(runs)}; logit: of all heads, before "
          "a step's clip;\nclipped: share of all heads in all steps")

def draw(runs: list, num_heads: int, path: Path) -> None:
    """Draws the largest logits, and below how often each head of the first seed was clipped."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for run in runs:
        tau, first = float(run["tau"]), run["seed"] == 0
        above, below = axes[:, ["MHA", "MLA"].index(run["attention"])]
        label = "without the clip" if tau == math.inf else f"QK-clip at {tau:g} (dashed)"
        above.plot(tops(run), lw=0.9, label=label if first else None,
                   color="#D55E00" if tau == math.inf else "#0072B2")
        if tau < math.inf and first:
            above.axhline(tau, color="black", lw=0.8, ls="--")
            above.set(title=run["attention"], yscale="log", yticks=(1, 3, 10, 30, 100, 300))
            above.yaxis.set_major_formatter("{x:g}")
            above.minorticks_off()
            above.grid(alpha=0.3)
            parts = [100 * part.double().mean(0) for part in clips(run).split(10)]
            image = below.imshow(
                torch.stack(parts, 1).numpy(), vmin=0, vmax=100, cmap="Blues", aspect="auto",
                extent=(0, 10 * len(parts), len(parts[0]), 0))
            below.set(xlabel="step (of 1,024 bytes)")
    names = [f"layer {i // num_heads} head {i % num_heads}" for i in range(len(parts[0]))]
    axes[1, 0].set_yticks([i + 0.5 for i in range(len(names))], names)
    axes[0, 0].set_ylabel("largest logit q·k / √d, each seed")
    axes[0, 0].legend()
    figure.colorbar(image, ax=axes[1], label="steps that clip (first seed), %")
    figure.savefig(path, dpi=100)

def compare(options) -> None:
    for name in ("tau", "lr", "seeds"):
        value = getattr(options, name)
        require(0 < value < math.inf, f"--{name} {value:g}: give a number above 0")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise train_gpt.RunError(f"--out {options.out}: {error.strerror}; give a folder") from None
    c = train_gpt.make_config(dict(
        FIELDS, track="tiny", num_steps=options.num_steps, cooldown_steps=options.num_steps // 2,
        data=options.data, matrix_lr_ratio=options.lr / FIELDS["lr"]))
    train_gpt.join_ranks(c.collective_timeout)
    count, processes, groups = c.batch_tokens // c.seq_len, ranks()[1], {}
    require(count % processes == 0, f"--nproc_per_node {processes}: give a divisor of {count} rows")
    rows = dict(train=train_gpt.Rows("*train_*.bin", c, c.num_steps * count),
                val=train_gpt.Rows("*val_*.bin", c, c.val_tokens // c.seq_len))
    for seed, attention, tau in product(range(options.seeds), (MHA, MLA), (math.inf, options.tau)):
        run = train(dataclasses.replace(c, seed=seed), attention, tau, rows)
        groups.setdefault((run["attention"], run["tau"]), []).append(run)
        if ranks()[0] == 0:
            print(f"{run['attention']} tau {tau} seed {seed}: val loss {run['val_loss']:.4f}, "
                  f"{run['seconds']:.1f} s", flush=True)
    if ranks()[0] == 0:
        runs = sum(groups.values(), [])
        figures = dict(options=vars(options), config=vars(c), runs=runs)
        (options.out / "muonclip.json").write_text(json.dumps(figures, default=str))
        draw(runs, c.num_heads, options.out / "muonclip.png")
        print_table(groups)

def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default, text in (
            ("tau", 30.0, "largest logit that is not clipped"),
            ("lr", 0.02, "learning rate of the matrices"), ("num_steps", 250, "of each run"),
            ("seeds", 3, "of each of the four variants"),
            ("data", train_gpt.TRACKS["tiny"]["data"], "folder of the shards"),
            ("out", Path("examples/out"), "folder of what is written")):
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{text} (default: {default})")
    try:
        compare(parser.parse_args(arguments))
    except train_gpt.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
