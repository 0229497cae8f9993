#!/usr/bin/env python3
"""MuonW under FSDP2: the model of train_gpt.py, for when it outgrows the memory of a GPU.

    python examples/fsdp.py                                      # one process
    torchrun --standalone --nproc_per_node=4 examples/fsdp.py    # each holds a quarter
    torchrun ... examples/fsdp.py --replicas 2     # on two nodes: cut up within each alone
    torchrun ... examples/fsdp.py --save_every 100
    torchrun ... examples/fsdp.py --resume examples/out/fsdp/step_100    # on any number

Each rank holds some rows of every parameter, of its gradient and of its optimizer's state.
AdamW can work on some rows alone, Muon cannot: the orthogonal factor of a part is no part of
the orthogonal factor. So MuonW brings each matrix to one rank. The model, the data, the
schedules and all options but the two below are train_gpt.py's; the track is tiny unless
another is given. N-grams are off, because autograd, and so FSDP, does not see their table;
NorMuon is left out.
"""
import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402
from train_gpt import gather, ranks, require  # noqa: E402

OUT = Path(__file__).resolve().parent / "out" / "fsdp"
DEFAULTS = dict(track="tiny", ngram_rows=0, normuon_beta2=0.0, log_dir=str(OUT))

# ==== 1. MuonW ====================================================================

def deal(costs: list[float], owners: int) -> list[int]:
    """Gives each piece of work an owner, so that all have about as much to do: the largest
    piece first, each to the owner with the least so far (Graham 1969)."""
    loads, owner_of = [0.0] * owners, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner_of[i] = loads.index(min(loads))
        loads[owner_of[i]] += costs[i]
    return owner_of

def orthogonalize(G_mn: torch.Tensor, steps: int) -> torch.Tensor:
    if G_mn.size(0) >= G_mn.size(1):
        return train_gpt.orthogonalize(G_mn.mT[None], steps)[0].mT
    return train_gpt.orthogonalize(G_mn[None], steps)[0]

class MuonW(torch.optim.Optimizer):
    """Muon with decoupled weight decay, for matrices that fully_shard has cut into rows.

    The formulas and settings are train_gpt.Muon's; the scale is that of the whole matrix.
    A fused QKV must be split first.
    Each matrix has an owner. In one all-to-all every rank sends the owners its rows of the
    momentum, in ns_dtype; each owner orthogonalizes its matrices; a second
    all-to-all takes the rows back. Under a mesh of (replicate, shard) the owners are in all
    replicas, and an all-reduce between these follows. Every matrix must have a gradient.
    """
    SETTINGS = dict(
        lr=0.02, momentum=0.95, weight_decay=0.0, update_scale="sqrt_ratio", nesterov=True,
        ns_steps=5, ns_dtype=None)
    def __init__(self, params, **settings):
        super().__init__(params, self.SETTINGS | settings)
        matrices, costs = [], []
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                cut = isinstance(p, DTensor) and p.placements[-1] == Shard(0)
                require(cut and p.ndim == 2, f"MuonW: {tuple(p.shape)}: give matrices that "
                        "fully_shard has cut into rows; AdamW takes the rest")
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)  # cut up like p
                matrices.append((p, number))
                a, b = sorted(p.shape)
                costs.append(a * a * (2 * b + a))  # of Newton-Schulz
        self.mesh = p.device_mesh
        owners = deal(costs, self.mesh.size())
        # In the order of the owners: what goes to one of them lies together, and so does what
        # goes to all owners of a replica.
        order = sorted(range(len(owners)), key=owners.__getitem__)
        self.matrices = [(owners[i], *matrices[i]) for i in order]  # owner, p, group's number
    @torch.no_grad()
    def step(self):
        rows = []  # of each matrix: this rank's of what is to be orthogonalized, flat
        for _, p, number in self.matrices:
            group = self.param_groups[number]
            g, v = local(p.grad), local(self.state[p]["momentum_buffer"])
            v.lerp_(g, 1 - group["momentum"])
            direction = g.lerp(v, group["momentum"]) if group["nesterov"] else v
            flat = direction.flatten().to(group["ns_dtype"] or v.dtype)
            # The last ranks may have fewer rows, or none: zeros fill them up.
            most = math.ceil(p.size(0) / self.mesh.size(-1)) * p.size(1)
            rows.append(F.pad(flat, (0, most - len(flat))))

        updates = self.orthogonalize_all(rows)
        for (_, p, number), u in zip(self.matrices, updates, strict=True):
            group = self.param_groups[number]
            scale = train_gpt.UPDATE_SCALES[group["update_scale"]][0](*p.shape)
            mine = local(p).mul_(1 - group["lr"] * group["weight_decay"])
            mine.add_(u[:mine.numel()].view_as(mine), alpha=-group["lr"] * scale)
    def orthogonalize_all(self, rows: list) -> tuple:
        # Takes and returns this rank's rows of each matrix, flat.
        shards, (*replica, here) = self.mesh.size(-1), self.mesh.get_coordinate()
        first = sum(replica) * shards  # of this replica's owners
        group = self.mesh.get_group(self.mesh.ndim - 1)
        sizes = [0] * self.mesh.size()  # of what goes to each owner
        for (owner, _, _), x in zip(self.matrices, rows, strict=True):
            sizes[owner] += len(x)
        sent, start = torch.cat(rows), sum(sizes[:first])
        splits = sizes[first:first + shards]
        part = slice(start, start + sum(splits))

        owned = sent.new_empty(shards, splits[here])  # what this owner has of each rank
        same, place = [splits[here]] * shards, 0
        dist.all_to_all_single(owned.view(-1), sent[part], same, splits, group=group)
        for (owner, p, number), x in zip(self.matrices, rows, strict=True):
            if owner == first + here:
                columns, place = owned[:, place:place + len(x)], place + len(x)
                matrix = columns.reshape(-1, p.size(1))[:p.size(0)]
                u = orthogonalize(matrix, self.param_groups[number]["ns_steps"]).flatten()
                columns.copy_(F.pad(u, (0, columns.numel() - len(u))).view_as(columns))
        updates = torch.zeros_like(sent)
        dist.all_to_all_single(updates[part], owned.view(-1), splits, same, group=group)
        if replica:
            dist.all_reduce(updates, group=self.mesh.get_group(0))
        return updates.split([len(x) for x in rows])

def local(x: torch.Tensor) -> torch.Tensor:
    """The rows that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x

# ==== 2. The run: model, mesh, optimizers, a step =================================

def make_muonw(groups: list, c: train_gpt.Config) -> MuonW:
    return MuonW(groups, momentum=c.momentum, nesterov=c.nesterov == "on",
                 update_scale=c.update_scale, ns_dtype=getattr(torch, c.dtype))

def set_up(c: train_gpt.Config, device, replicas: int = 1, gradients: str = "whole"):
    run = SimpleNamespace(config=c, device=device, gradients=gradients, step=0)
    sizes = [train_gpt.batch_rows(c, step) for step in range(c.num_steps)]
    run.starts = np.cumsum([0, *sizes]).tolist()
    least = math.gcd(*sizes)
    fits = least % ranks()[1] == 0
    require(fits, f"--nproc_per_node {ranks()[1]}: give a divisor of {least} rows")
    run.micro_batch = train_gpt.micro_batch_rows(c, least // ranks()[1], device)

    run.mesh = init_device_mesh(device.type, (replicas, ranks()[1] // replicas),
                                mesh_dim_names=("replicate", "shard"))
    mesh = run.mesh if replicas > 1 else run.mesh["shard"]
    # The weights are drawn on the host, and go to the GPU block by block, each cut up there.
    run.model = train_gpt.GPT(c).initialize()
    for module in (*run.model.blocks, run.model):
        fully_shard(module, mesh=mesh)
    train_gpt.OPTIMIZERS["muon"] = make_muonw  # which parameter_table gives the matrices to
    run.optimizers, run.table = train_gpt.make_optimizers(run.model, c)
    return run

def accumulate_gradients(run, tokens: torch.Tensor) -> torch.Tensor:
    """Leaves the mean over all ranks in the gradients, and returns this rank's mean loss."""
    window, total = train_gpt.stage(run.config, run.step)[1], 0.0
    run.model.zero_grad()
    parts = tokens.split(run.micro_batch)
    for part in parts:
        # "whole" adds up the gradients of the whole model, and FSDP cuts up the sum after
        # the last part; "sharded" cuts up those of each part: more traffic, less memory.
        last = part is parts[-1]
        run.model.set_is_last_backward(last)
        run.model.set_requires_gradient_sync(last or run.gradients == "sharded")
        loss = run.model(part[:, :-1], part[:, 1:], window) * (len(part) / len(tokens))
        loss.backward()
        total += loss.detach()
    return total

def train_step(run, tokens: torch.Tensor) -> torch.Tensor:
    loss = accumulate_gradients(run, tokens)
    train_gpt.set_schedules(run.optimizers, run.config, run.step)
    for optimizer in run.optimizers.values():
        optimizer.step()
    run.step += 1
    return loss

def optimizer_states(run) -> dict:  # {parameter: state}
    optimizers = run.optimizers.values()
    return {p: state for optimizer in optimizers for p, state in optimizer.state.items()}

def bytes_held(run) -> tuple[int, int]:
    """Of parameters and of optimizer state, on this rank."""
    parameters = sum(local(p).nbytes for p in run.model.parameters())
    states = optimizer_states(run).values()
    return parameters, sum(local(x).nbytes for state in states for x in state.values())

@torch.no_grad()
def get_post_step_metrics(run, before: list) -> dict[str, list[float]]:
    """{kind of parameter: [norm of the last update, norm of the parameters, cosine of momentum
    and gradient]}, over all layers: sums over local rows, and one all-reduce of all of them.
    before: the local rows of all parameters before the step."""
    sums, states = {}, optimizer_states(run)
    for (name, p), old in zip(run.model.named_parameters(), before, strict=True):
        state = states[p]
        v = local(state["momentum_buffer" if "momentum_buffer" in state else "exp_avg"])
        x, v, g = local(p).double(), v.double(), local(p.grad).double()
        u = x - old
        products = [(a * b).sum() for a, b in [(u, u), (x, x), (v, g), (v, v), (g, g)]]
        kind = re.sub(r"\.\d+", "", name)
        sums[kind] = sums.get(kind, 0.0) + torch.stack(products)
    totals = torch.stack([*sums.values()])
    dist.all_reduce(totals, group=run.mesh.get_group("shard"))  # replicas hold the same
    uu, xx, vg, vv, gg = totals.unbind(1)
    columns = uu.sqrt(), xx.sqrt(), vg / (vv * gg).sqrt().clamp_min(1e-300)
    return dict(zip(sums, torch.stack(columns, 1).tolist(), strict=True))

@torch.no_grad()
def evaluate(run, text: train_gpt.Rows) -> float:
    """The mean loss of val_tokens, less those that do not fill a micro-batch of every rank: all
    must run the model as often, because it is gathered each time."""
    c, size = run.config, run.micro_batch
    together = size * ranks()[1]
    count = c.val_tokens // c.seq_len // together
    require(count, f"--val_tokens {c.val_tokens}: give {together * c.seq_len} or more")
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    run.model.eval()
    for i in range(count):
        first = i * together + ranks()[0] * size
        tokens = text.read(range(first, first + size)).to(run.device, torch.int64)
        total += run.model(tokens[:, :-1], tokens[:, 1:], c.val_window)
    run.model.train()
    run.model.reshard()  # without a backward pass the embeddings stay gathered
    return sum(gather(total.item())) / count / ranks()[1]

# ==== 3. Checkpoints ==============================================================
# Each rank writes its rows, and any number of ranks can read them.

def save(run, folder: Path) -> None:
    if ranks()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".metadata").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(run.config)))
    gather(None)  # no rank writes into an older checkpoint
    model, optimizers = get_state_dict(run.model, [*run.optimizers.values()])
    content = dict(model=model, optimizers=optimizers, step=run.step)
    dcp.save(content, checkpoint_id=folder)  # writes .metadata when all else is there

def load(run, folder: Path) -> None:
    optimizers = [*run.optimizers.values()]
    model, states = get_state_dict(run.model, optimizers)
    content = dict(model=model, optimizers=states, step=0)
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(run.model, optimizers, model_state_dict=model, optim_state_dict=states)
    run.step = content["step"]

def saved_config(folder: str) -> dict:
    whole = Path(folder, ".metadata").exists()
    require(whole, f"--resume {folder}: no whole checkpoint; give a step_N of --save_every")
    return json.loads(Path(folder, "config.json").read_text())

# ==== 4. Training =================================================================

def train(run) -> None:
    c, cut = run.config, min(run.config.document_tokens, run.config.seq_len) or None
    rows = train_gpt.Rows("*train_*.bin", c, run.starts[-1], cut)
    val_rows = train_gpt.Rows("*val_*.bin", c, c.val_tokens // c.seq_len)
    run.model.varlen = train_gpt.choose_attention(c, run.device) == "torch varlen_attn"
    run.model.most_documents = max(rows.documents, val_rows.documents)
    run.folder = Path(c.log_dir)
    run.folder.mkdir(parents=True, exist_ok=True)
    mesh = "replicas x shards: {} x {}".format(*run.mesh.shape)
    train_gpt.log(run, f"{mesh}, {run.micro_batch} rows at once, {c.dtype}{run.table}")

    clock = time.perf_counter()
    for tokens in train_gpt.load_batches(rows, run.starts, c.seed, run.device, run.step):
        before = []
        if run.step == c.num_steps - 1:
            before = [local(p).detach().clone() for p in run.model.parameters()]
        loss = train_step(run, tokens)
        if run.step % 20 == 0 or before:  # only here does the host wait for a GPU
            loss, seconds = sum(gather(loss.item())) / ranks()[1], time.perf_counter() - clock
            step = f"step:{run.step}/{c.num_steps}"
            train_gpt.log(run, f"{step} train_loss:{loss:.6f} train_time:{seconds:.1f}s")
        if c.save_every and run.step % c.save_every == 0:
            save(run, run.folder / f"step_{run.step}")
    summarize(run, loss, get_post_step_metrics(run, before), evaluate(run, val_rows))

def summarize(run, train_loss: float, metrics: dict, val_loss: float) -> None:
    whole = sum(p.nbytes for p in run.model.parameters())
    table = f"\ntrain_loss: {train_loss:.6f}\nval_loss: {val_loss:.6f}\n"
    table += f"\n| rank | bytes of parameters, of {whole:,} | bytes of optimizer state |"
    table += "\n| --- | --- | --- |"
    for rank, (parameters, state) in enumerate(gather(bytes_held(run))):
        table += f"\n| {rank} | {parameters:,} | {state:,} |"
    table += "\n\n| last step | norm of update | of parameters | cosine of momentum, gradient |"
    table += "\n| --- | --- | --- | --- |"
    for kind, (update, size, cosine) in metrics.items():
        table += f"\n| {kind} | {update:.4f} | {size:.2f} | {cosine:.3f} |"
    train_gpt.log(run, table)

def start(options, arguments: list[str]) -> None:
    given, saved = train_gpt.parse_command_line(arguments), None
    if given.get("resume"):
        saved = saved_config(given["resume"])
    c = train_gpt.make_config(given if saved else DEFAULTS | given, saved)
    for name, value in dict(ngram_rows=0, normuon_beta2=0, matrix_optimizer="muon").items():
        require(getattr(c, name) == value, f"--{name} {getattr(c, name)}: give {value}")
    size, replicas = int(os.environ.get("WORLD_SIZE", 1)), options.replicas
    fits = replicas > 0 and size % replicas == 0
    require(fits, f"--replicas {replicas}: give a divisor of the number of processes, {size}")
    device = train_gpt.join_ranks(c.collective_timeout)
    if not dist.is_initialized():  # a single process is a group of one
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    has_bf16 = all(gather(train_gpt.has_bf16_units(device)))
    dtype = c.dtype.replace("auto", "bfloat16" if has_bf16 else "float32")
    run = set_up(dataclasses.replace(c, dtype=dtype), device, replicas, options.gradients)
    if saved:
        load(run, Path(c.resume))
        require(run.step < c.num_steps, f"--resume {c.resume}: is the end of its run")
    train(run)

def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        usage="fsdp.py [TRACK] [--replicas N] [--gradients KIND] [--field value ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--replicas", type=int, default=1, metavar="N",
                        help="copies of the model, each cut up over 1/N of the processes [1]")
    parser.add_argument("--gradients", choices=["whole", "sharded"], default="whole",
                        help="of micro-batches: cut up once a step, or each time [whole]")
    try:
        start(*parser.parse_known_args(arguments))
    except train_gpt.RunError as error:
        # The launcher ends all processes when the first one has ended.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # without finalizers, in which gloo may abort
