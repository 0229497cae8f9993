#!/usr/bin/env python3
"""MuonW under FSDP2: the model of train_gpt.py, for when it outgrows the memory of one GPU.

    python examples/fsdp.py                                              # one process
    torchrun --standalone --nproc_per_node=4 examples/fsdp.py            # each has a quarter
    torchrun ... examples/fsdp.py --replicas 2        # two nodes: sharded inside, alike across
    torchrun ... examples/fsdp.py --save_every 100    # then, with any number of processes:
    torchrun ... examples/fsdp.py --resume examples/out/fsdp/step_100

Options beside --replicas and --gradients are train_gpt.py's, which has the model, the data and
the schedules; without a track it is tiny. The rows of every parameter, of its gradient and of
its optimizer's state are shared out over the ranks. AdamW works on shares as they are, Muon
does not: the polar factor of some rows is not those rows of the polar factor. So MuonW brings
each matrix to one rank, its owner. N-grams are off, since autograd and with it FSDP do not
see their table; NorMuon, too, is left out.
"""
import argparse
import json
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
from train_gpt import ranks, require  # noqa: E402

DEFAULTS = dict(track="tiny", ngram_rows=0, normuon_beta2=0.0,
                log_dir=str(Path(__file__).resolve().parent / "out/fsdp"))

# ==== 1. MuonW ====================================================================

def deal(costs: list[float], owners: int) -> list[int]:
    """Returns an owner for each piece of work, so that all have about as much: the largest piece
    first, each to the owner with the least so far (Graham 1969)."""
    loads, owner_of = [0.0] * owners, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner_of[i] = loads.index(min(loads))
        loads[owner_of[i]] += costs[i]
    return owner_of

def newton_schulz_cost(p, parts: int) -> float:
    """Multiplications of a step of Newton-Schulz for `parts` matrices of a x b, a <= b."""
    a, b = sorted((p.size(0) // parts, p.size(1)))
    return parts * (2 * a * a * b + a**3)

class MuonW(torch.optim.Optimizer):
    """Muon with decoupled weight decay, for matrices whose rows FSDP2 has shared out.

    A step is train_gpt.Muon's, and so are its settings; the scale is that of the whole matrix.
    All ranks send their rows of the momentum to the owners of the matrices, in one all-to-all
    in ns_dtype. Each owner orthogonalizes its matrices, which are about 1/n of all, and a second
    all-to-all brings the rows back. Of several replicas each has owners for a part of the
    matrices, and an all-reduce spreads the result. All matrices must have a gradient.
    mesh: (replicate, shard).
    """
    SETTINGS = dict(lr=0.02, momentum=0.95, weight_decay=0.0, parts=1, nesterov=True,
                    update_scale="sqrt_ratio", ns_steps=5, ns_dtype=None)

    def __init__(self, params, mesh, **settings):
        super().__init__(params, self.SETTINGS | settings)
        self.mesh, costs = mesh, []
        for p, group in self.members():
            sharded = isinstance(p, DTensor) and p.placements[-1] == Shard(0)
            fits = sharded and p.ndim == 2 and p.size(0) % group["parts"] == 0
            require(fits, f"MuonW: a parameter of {tuple(p.shape)}: give matrices of "
                    f"{group['parts']} equal parts that fully_shard has sharded by rows")
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)  # sharded like p
            costs.append(newton_schulz_cost(p, group["parts"]))
        self.owners = deal(costs, mesh.size())

    def members(self) -> list[tuple]:
        return [(p, group) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self):
        shards, members = self.mesh.size(1), self.members()
        rows = []  # of each matrix: this rank's of the momentum, flat
        for p, group in members:
            g, v = p.grad.to_local(), self.state[p]["momentum_buffer"].to_local()
            v.lerp_(g, 1 - group["momentum"])
            direction = g.lerp(v, group["momentum"]) if group["nesterov"] else v
            flat = direction.flatten().to(group["ns_dtype"] or v.dtype)
            # The last ranks may have fewer rows, or none: zeros fill them up.
            most = -(-p.size(0) // shards) * p.size(1)
            rows.append(F.pad(flat, (0, most - len(flat))))
        updates = self.orthogonalize_once(members, rows)
        for i, (p, group) in enumerate(members):
            m, n = p.size(0) / group["parts"], p.size(1)
            scale = train_gpt.UPDATE_SCALES[group["update_scale"]][0](m, n)
            share = p.to_local()
            share.mul_(1 - group["lr"] * group["weight_decay"])
            u = updates[i][:share.numel()].view_as(share)
            share.add_(u, alpha=-group["lr"] * scale)

    def orthogonalize_once(self, members: list, rows: list) -> dict[int, torch.Tensor]:
        """Returns this rank's rows of the orthogonalized matrices, as flat as it gets them."""
        shards, (replica, here) = self.mesh.size(1), self.mesh.get_coordinate()
        group = self.mesh.get_group("shard")
        # By owner, so that what a rank sends to another, and what a replica does, is in one piece.
        order = sorted(range(len(rows)), key=self.owners.__getitem__)
        flat = torch.cat([rows[i] for i in order])
        counts = [0] * self.mesh.size()
        for i, owner in enumerate(self.owners):
            counts[owner] += len(rows[i])
        splits = counts[replica * shards:(replica + 1) * shards]
        first = sum(counts[:replica * shards])
        part = slice(first, first + sum(splits))

        # A row of `mine` is what a rank has of this owner's matrices.
        mine, alike = flat.new_empty(shards, splits[here]), [splits[here]] * shards
        dist.all_to_all_single(mine.view(-1), flat[part], alike, splits, group=group)
        place = 0
        for i in [i for i in order if self.owners[i] == replica * shards + here]:
            p, settings = members[i]
            columns = mine[:, place:place + len(rows[i])]
            place += len(rows[i])
            matrix = columns.reshape(-1, p.size(1))[:p.size(0)]
            matrix.copy_(orthogonalize(matrix, settings["parts"], settings["ns_steps"]))
            columns.copy_(F.pad(matrix.flatten(), (0, columns.numel() - p.numel())).view_as(columns))
        updates = torch.zeros_like(flat)
        dist.all_to_all_single(updates[part], mine.view(-1), splits, alike, group=group)
        if self.mesh.size(0) > 1:
            dist.all_reduce(updates, group=self.mesh.get_group("replicate"))
        return dict(zip(order, updates.split([len(rows[i]) for i in order]), strict=True))

def orthogonalize(G_mn: torch.Tensor, parts: int, steps: int) -> torch.Tensor:
    """Each of `parts` matrices one above the other (a fused QKV) by itself."""
    G_kmn = G_mn.unflatten(0, (parts, -1))
    if G_kmn.size(1) >= G_kmn.size(2):
        return train_gpt.orthogonalize(G_kmn.mT, steps).mT.flatten(0, 1)
    return train_gpt.orthogonalize(G_kmn, steps).flatten(0, 1)

# ==== 2. The run: a model, its mesh and optimizers ================================

def set_up(c: train_gpt.Config, device: torch.device, replicas: int = 1,
           gradients: str = "whole") -> SimpleNamespace:
    run = SimpleNamespace(config=c, device=device, gradients=gradients, step=0)
    shape = replicas, ranks()[1] // replicas
    run.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    sizes = [train_gpt.batch_rows(c, step) for step in range(c.num_steps)]
    run.starts = np.cumsum([0, *sizes]).tolist()
    least = int(np.gcd.reduce(sizes))
    fits = least % ranks()[1] == 0
    require(fits, f"--nproc_per_node {ranks()[1]}: give a divisor of {least} rows")
    run.micro_batch = train_gpt.micro_batch_rows(c, least // ranks()[1], device)
    # Drawn on the CPU, whole. A block moves to the GPU and is cut up before the next one is.
    run.model = train_gpt.GPT(c).initialize()
    for module in (*run.model.blocks, run.model):
        fully_shard(module, mesh=run.mesh if replicas > 1 else run.mesh["shard"])
    ours = dict(muon=lambda groups, c: MuonW(
        groups, run.mesh, momentum=c.momentum, nesterov=c.nesterov == "on",
        update_scale=c.update_scale, ns_dtype=getattr(torch, c.dtype)))
    train_gpt.OPTIMIZERS = train_gpt.OPTIMIZERS | ours
    run.optimizers, run.table = train_gpt.make_optimizers(run.model, c)
    return run

def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x

def states(run) -> dict:
    """{parameter: its optimizer's state}."""
    return {p: state for optimizer in run.optimizers.values() for p, state in optimizer.state.items()}

def bytes_held(run) -> tuple[int, int]:
    """This rank's bytes of parameters and of optimizer state."""
    tensors = [local(x) for state in states(run).values() for x in state.values()]
    return sum(local(p).nbytes for p in run.model.parameters()), sum(x.nbytes for x in tensors)

def accumulate_gradients(run, tokens: torch.Tensor) -> torch.Tensor:
    """Leaves the mean over all ranks in the gradients; returns the mean loss of this rank's rows.

    gradients "whole": a rank adds up those of the whole model, which FSDP reduces and shares out
    after the last part; "sharded": after every part, for more traffic and 1/n of the memory.
    """
    window, total = train_gpt.stage(run.config, run.step)[1], 0.0
    run.model.zero_grad()
    parts = tokens.split(run.micro_batch)
    for part in parts:
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

@torch.no_grad()
def get_post_step_metrics(run, before: list[torch.Tensor]) -> dict[str, tuple]:
    """What the last step did: {kind of parameter: (norm of the update, norm of the parameters,
    cosine of momentum and gradient)}, of all layers together. From the ranks' shares, `before`
    being those of the parameters before the step, and one all-reduce."""
    sums, state_of = {}, states(run)
    for (name, p), old in zip(run.model.named_parameters(), before, strict=True):
        x, g, state = local(p).double(), local(p.grad).double(), state_of[p]
        v = local(state.get("momentum_buffer", state.get("exp_avg"))).double()
        u = x - old
        products = [(a * b).sum() for a, b in ((u, u), (x, x), (v, g), (v, v), (g, g))]
        kind = re.sub(r"\.\d+", "", name)
        sums[kind] = sums.get(kind, 0) + torch.stack(products)
    table = torch.stack([*sums.values()])
    dist.all_reduce(table, group=run.mesh.get_group("shard"))  # replicas have the same
    u, x, vg, v, g = table.T
    columns = u.sqrt(), x.sqrt(), vg / (v * g).sqrt().clamp_min(1e-300)
    return dict(zip(sums, torch.stack(columns, 1).tolist(), strict=True))

@torch.no_grad()
def evaluate(run, text: train_gpt.Rows) -> float:
    """Mean loss of the first val_tokens, but for rows that do not fill a micro-batch of all
    ranks: they must run the model equally often, since it gathers its parameters."""
    c, size = run.config, run.micro_batch * ranks()[1]
    starts = range(ranks()[0] * run.micro_batch, c.val_tokens // c.seq_len // size * size, size)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    run.model.eval()
    for start in starts:
        tokens = text.read(range(start, start + run.micro_batch)).to(run.device, torch.int64)
        total += run.model(tokens[:, :-1], tokens[:, 1:], c.val_window).double()
    run.model.train()
    run.model.reshard()
    return sum(train_gpt.gather(total.item() / len(starts))) / ranks()[1]

# ==== 3. Checkpoints, which any number of processes can load ======================

def save(run, folder: Path) -> None:
    model, optimizers = get_state_dict(run.model, [*run.optimizers.values()])
    if ranks()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(run.config)))
    # Each rank writes its shares; the file .metadata, which comes last, says where all are.
    dcp.save(dict(model=model, optimizers=optimizers, step=run.step), checkpoint_id=folder)

def load(run, folder: Path) -> None:
    optimizers = [*run.optimizers.values()]
    model_state, optimizer_state = get_state_dict(run.model, optimizers)
    content = dict(model=model_state, optimizers=optimizer_state, step=0)
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(run.model, optimizers, model_state_dict=content["model"],
                   optim_state_dict=content["optimizers"])
    run.step = content["step"]

def saved_config(folder: str) -> dict | None:
    if not folder:
        return None
    whole = Path(folder, ".metadata").exists() and Path(folder, "config.json").exists()
    require(whole, f"--resume {folder}: no whole checkpoint; give a step_N that --save_every wrote")
    return json.loads(Path(folder, "config.json").read_text())

# ==== 4. Training =================================================================

def train(run) -> None:
    c = run.config
    cut = min(c.document_tokens, c.seq_len) or None
    train_rows = train_gpt.Rows("*train_*.bin", c, run.starts[-1], cut)
    val_rows = train_gpt.Rows("*val_*.bin", c, c.val_tokens // c.seq_len)
    run.model.varlen = train_gpt.choose_attention(c, run.device) == "torch varlen_attn"
    run.model.most_documents = run.micro_batch * max(train_rows.documents, val_rows.documents)
    run.folder = Path(c.log_dir)
    run.folder.mkdir(parents=True, exist_ok=True)
    train_gpt.log(run, f"{ranks()[1]} processes, mesh {tuple(run.mesh.shape)}, {c.dtype}{run.table}")
    batches = train_gpt.load_batches(train_rows, run.starts, c.seed, run.device, run.step)
    clock = time.perf_counter()
    for tokens in batches:
        if run.step == c.num_steps - 1:
            before = [local(p).detach().clone() for p in run.model.parameters()]
        loss = train_step(run, tokens)
        if run.step % 20 == 0 or run.step == c.num_steps:  # only here does the host wait for a GPU
            mean = sum(train_gpt.gather(loss.item())) / ranks()[1]
            seconds = time.perf_counter() - clock
            train_gpt.log(run, f"step:{run.step}/{c.num_steps} train_loss:{mean:.6f} {seconds:.1f} s")
        if c.save_every and run.step % c.save_every == 0:
            save(run, run.folder / f"step_{run.step}")
    summarize(run, get_post_step_metrics(run, before), mean, evaluate(run, val_rows))

def summarize(run, metrics: dict, train_loss: float, val_loss: float) -> None:
    whole = sum(p.nbytes for p in run.model.parameters())
    lines = ["", f"train_loss: {train_loss:.6f}", f"val_loss: {val_loss:.6f}", "",
             "| rank | bytes of parameters | of them | bytes of optimizer state |",
             "| --- | --- | --- | --- |"]
    for rank, (parameters, state) in enumerate(train_gpt.gather(bytes_held(run))):
        lines.append(f"| {rank} | {parameters:,} | {parameters / whole:.1%} | {state:,} |")
    lines += ["", "| last step | update norm | parameter norm | cosine of momentum and gradient |",
              "| --- | --- | --- | --- |"]
    for kind, (update, size, cosine) in metrics.items():
        lines.append(f"| {kind} | {update:.4f} | {size:.2f} | {cosine:.3f} |")
    train_gpt.log(run, "\n".join(lines))

def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        usage="fsdp.py [TRACK] [--replicas N] [--gradients whole|sharded] [--field value ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--replicas", type=int, default=1, metavar="N",
                        help="copies of the model, each shared out over 1/N of the processes [1]")
    parser.add_argument("--gradients", choices=["whole", "sharded"], default="whole",
                        help="of micro-batches: reduced once a step, or after each [whole]")
    options, others = parser.parse_known_args(arguments)
    try:
        given = train_gpt.parse_command_line(others)
        saved = saved_config(given.get("resume", ""))
        c = train_gpt.make_config(given if saved else DEFAULTS | given, saved)
        absent = c.ngram_rows == c.normuon_beta2 == 0 and c.matrix_optimizer == "muon"
        require(absent, "--ngram_rows, --normuon_beta2, --matrix_optimizer: not here; leave them out")
        size, replicas = int(os.environ.get("WORLD_SIZE", 1)), options.replicas
        fits = replicas > 0 and size % replicas == 0
        require(fits, f"--replicas {replicas}: give a divisor of the {size} processes")
        device = train_gpt.join_ranks(c.collective_timeout)
        if not dist.is_initialized():
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        dtype = "bfloat16" if all(train_gpt.gather(train_gpt.has_bf16_units(device))) else "float32"
        c = train_gpt.dataclasses.replace(c, dtype=c.dtype.replace("auto", dtype))
        run = set_up(c, device, replicas, options.gradients)
        if c.resume:
            load(run, Path(c.resume))
        train(run)
        return 0
    except train_gpt.RunError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # without finalizers, in which gloo may abort
