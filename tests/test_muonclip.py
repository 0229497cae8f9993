"""examples/muonclip.py: its attention and largest logits against float64, the clip, two processes, bad input."""

import copy
import json
import math
import multiprocessing
import os
import socket
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from examples import muonclip
from examples.muonclip import MHA, MLA

CONFIG = train_gpt.make_config(dict(
    track="tiny", num_layers=2, num_heads=4, head_dim=8, matrix_lr_ratio=1.0, matrix_weight_decay=0.1,
    update_scale="match_rms_adamw"))
TAUS = (23.5, 22.5)     # of two steps: of the model below, between the logits of its heads


def make_model(attention: type) -> muonclip.Transformer:
    """A model whose logits are large."""
    torch.manual_seed(0)
    model = muonclip.Transformer(CONFIG, attention)
    with torch.no_grad():
        for name, p in model.blocks.named_parameters():
            p.mul_(4 if "query" in name or "key" in name else 1)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(257, (4, 71), generator=torch.Generator().manual_seed(1))


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (B, T, K) by complex numbers: channel i with channel i + K / 2."""
    a, b = x.chunk(2, dim=-1)
    rates = 10_000.0 ** -(torch.arange(a.size(-1), dtype=torch.float64) / a.size(-1))
    turns = torch.polar(torch.ones(()).double(), torch.arange(x.size(1)).double()[:, None] * rates)
    z = torch.complex(a, b) * turns
    return torch.cat((z.real, z.imag), -1)


def reference(layer: muonclip.Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and each head's largest logit, head by head, with the whole matrix, in float64."""
    x, w = x.double(), {name: p.double() for name, p in layer.named_parameters()}
    outputs, largest = [], []
    for head in range(CONFIG.num_heads):
        def of(name, x, head=head):     # this head's part of a projection
            return x @ w[name + ".weight"].chunk(CONFIG.num_heads)[head].T

        if isinstance(layer, MHA):
            q, k, v = turned(of("query", x)), turned(of("key", x)), of("value", x)
        else:
            c = x @ w["down.weight"].T
            c = c / (c.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
            q = torch.cat((of("query_content", x), turned(of("query_rotary", x))), -1)
            k = torch.cat((of("key_content", c), turned(x @ w["key_rotary.weight"].T)), -1)
            v = of("value", c)
        seen = torch.ones(x.size(1), x.size(1)).tril().bool()
        logits = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~seen, -math.inf)
        outputs.append(logits.softmax(-1) @ v)
        largest.append(logits.max())
    return torch.cat(outputs, -1) @ w["proj.weight"].T, torch.stack(largest)


@pytest.mark.parametrize("attention", [MHA, MLA])
def test_attention_and_its_largest_logits_against_float64(attention):
    layer = make_model(attention).blocks[0].attention
    x = torch.randn(3, 71, CONFIG.model_dim)
    output, largest = reference(layer, x)
    torch.testing.assert_close(layer(x).double(), output, rtol=0, atol=1e-5 * output.abs().max().item())
    torch.testing.assert_close(layer.largest_H.double(), largest, rtol=1e-5, atol=0)
    before = layer.largest_H.clone()
    layer(0.5 * x)      # a second micro-step: the largest of both
    assert torch.equal(layer.largest_H, before)
    layer.eval()(2 * x)
    assert torch.equal(layer.largest_H, before)     # validation does not count


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that an operation gives."""
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("chunk", [1, 16, 64, 100, 1000])
def test_largest_logits_by_chunks(chunk):
    """As from the whole float64 matrix, of which they never hold more than some rows; where the keys that a query does
    not see have the largest logits, they do not count."""
    q, k = torch.randn(2, 2, 3, 100, 8, generator=torch.Generator().manual_seed(0)).unbind()
    k = k * torch.linspace(1, 9, 100)[:, None]
    whole = 0.25 * q.double() @ k.double().mT
    expected = whole.masked_fill(torch.ones(100, 100).triu(1).bool(), -math.inf).amax((0, 2, 3))
    assert (expected < whole.amax((0, 2, 3))).any()
    with Sizes() as sizes:
        largest = muonclip.largest_logits(q, k, 0.25, chunk)
    torch.testing.assert_close(largest.double(), expected, rtol=1e-6, atol=0)
    assert sizes.most <= 2 * 3 * 100 * min(max(chunk, 8), 100)     # the keys have 8 channels


@pytest.mark.parametrize("attention", [MHA, MLA])
def test_a_clipped_head_is_at_tau_and_the_others_are_untouched(attention):
    """With a rate of zero, on the same input of each layer."""
    model, inputs = make_model(attention), []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda layer, x: inputs.append(x[0].detach()))
    optimizers = muonclip.make_optimizers(model, CONFIG)
    for group in optimizers["muon"].param_groups + optimizers["adamw"].param_groups:
        group["lr"] = 0.0
    model(tokens())
    tau = torch.stack([block.attention.largest_H for block in model.blocks]).median().item()
    before = copy.deepcopy(model.state_dict())
    first = muonclip.train_step(model, optimizers, tokens(), tau)
    assert 0 < (first > tau).sum() < first.numel()

    clipped = {}
    for number, (block, x) in enumerate(zip(model.blocks, inputs[-len(model.blocks):], strict=True)):
        block.attention(x)
        again = block.attention.largest_H
        over = first[number] > tau
        assert (again[over] <= tau * (1 + 1e-5)).all() and (again[over] >= tau * (1 - 1e-5)).all()
        assert torch.equal(again[~over], first[number][~over])
        clipped[f"blocks.{number}.attention"] = over
    shrunk = ["query.weight", "key.weight", "query_content.weight", "key_content.weight", "query_rotary.weight"]
    for name, p in model.named_parameters():
        layer, _, rest = name.partition(".attention.")
        changed = (p != before[name]).flatten(1).any(1)
        expected = torch.zeros_like(changed)
        if rest in shrunk:
            expected = clipped[layer + ".attention"].repeat_interleave(len(p) // CONFIG.num_heads)
        assert torch.equal(changed, expected), name


def test_tau_of_infinity_and_negative_logits_clip_nothing():
    model = make_model(MHA)
    before = copy.deepcopy(model.state_dict())
    for tau, largest in ((math.inf, 1e30), (5.0, -100.0), (5.0, 0.0)):
        for block in model.blocks:
            block.attention.largest_H.fill_(largest)
        muonclip.qk_clip(model, tau)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def two_steps(attention: type, mine: slice) -> tuple[dict, list]:
    """Two steps on these rows of the batch, in float64: the parameters and the logits."""
    model = make_model(attention).double()
    optimizers = muonclip.make_optimizers(model, CONFIG)
    logits = [muonclip.train_step(model, optimizers, tokens()[mine], tau) for tau in TAUS]
    return {name: p.detach() for name, p in model.named_parameters()}, logits


def on_a_rank(rank: int, port: int) -> list:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train_gpt.join_ranks(60)
    facts = [two_steps(attention, slice(2 * rank, 2 * rank + 2)) for attention in (MHA, MLA)]
    dist.destroy_process_group()
    return facts


@pytest.mark.slow
def test_two_processes_clip_as_one():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(2, context) as pool:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        ranks = [pool.submit(on_a_rank, rank, port) for rank in range(2)]
        results = [rank.result(timeout=100) for rank in ranks]
    for number, attention in enumerate((MHA, MLA)):
        expected, logits = two_steps(attention, slice(None))
        assert all((step > tau).any() and (step < tau).any() for step, tau in zip(logits, TAUS, strict=True))
        for parameters, found in (rank[number] for rank in results):
            torch.testing.assert_close(found, logits, rtol=1e-9, atol=0)
            for name, p in parameters.items():
                torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-9, msg=name)


def test_the_program_ends_with_a_table(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(muonclip, "FIELDS", dict(muonclip.FIELDS, head_dim=8, batch_tokens=256))
    options = ["--num_steps", "3", "--seeds", "2", "--tau", "1", "--out", str(tmp_path / "out")]
    assert muonclip.main([*text, *options]) == 0
    printed = capsys.readouterr().out
    runs = json.loads((tmp_path / "out/muonclip.json").read_text())["runs"]
    assert {run["attention"] + run["tau"] for run in runs} == {"MHAinf", "MHA1.0", "MLAinf", "MLA1.0"}
    assert len(runs) == 8 and all(len(run["logits"]) == 3 for run in runs)
    assert (tmp_path / "out/muonclip.png").stat().st_size > 10_000
    assert len([line for line in printed.splitlines() if " ± 0." in line]) == 6


@pytest.mark.parametrize("option, value", [
    ("tau", "0"), ("tau", "-3"), ("tau", "nan"), ("lr", "-1"), ("seeds", "0"), ("num_steps", "0"),
    ("data", "nowhere"), ("out", __file__)])
def test_bad_input_is_one_line(text, tmp_path, capsys, option, value):
    assert muonclip.main([*text, "--out", str(tmp_path), f"--{option}", value]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: --{option} {value}: ") and printed.err.count("\n") == 1
