"""Muon against float64, against its papers, torch.optim.Muon and the README; the parameter table; no waiting."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, losses, train, unchanged
from test_model import small_model

import train_gpt


def normal(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(*shape) -> torch.nn.Parameter:
    """A parameter of ones with a gradient of ones."""
    p = torch.nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    return p


# Newton-Schulz.

def through_svd(G: torch.Tensor, steps: int) -> torch.Tensor:
    """U p(S / |G|) V^T from a float64 SVD, the scalar polynomial applied to each singular value."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = S / S.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U * s[..., None, :] @ Vh


INPUTS = dict(
    square=normal(1, 96, 96), wide=normal(1, 64, 320), batched=normal(5, 32, 96),
    tiny_norm=1e-12 * normal(1, 32, 128), huge_norm=1e15 * normal(1, 32, 128),
    nearly_low_rank=normal(1, 64, 3) @ normal(1, 3, 256) + 1e-5 * normal(1, 64, 256))


@pytest.mark.parametrize("name", INPUTS)
def test_newton_schulz_against_svd(name):
    """The result is what the scalar polynomial makes of the singular values, to the rounding of the dtype times the
    growth of small values, of about 500. In bf16, whose rounding is 0.4%, small values are lost in it."""
    for steps in (1, 5):
        expected = through_svd(INPUTS[name], steps)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-4)):
            result = train_gpt.orthogonalize(INPUTS[name].to(dtype), steps)
            assert result.dtype == dtype
            assert (result - expected).norm() / expected.norm() < tolerance
            values, exact = torch.linalg.svdvals(result.double()), torch.linalg.svdvals(expected)
            torch.testing.assert_close(values, exact, rtol=0, atol=tolerance)
    result = train_gpt.orthogonalize(INPUTS[name].float(), 5, torch.bfloat16).double()
    assert torch.linalg.svdvals(result).max() < 1.3
    assert (result - expected).norm() / expected.norm() < 0.03 or name == "nearly_low_rank"


# Muon.

def newton_schulz(G, steps=5):
    """As its authors write it, for one matrix."""
    X = G.T if G.size(0) > G.size(1) else G
    X = X / X.norm()
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    return X.T if G.size(0) > G.size(1) else X


SCALES = dict(sqrt_ratio=lambda m, n: max(1, m / n) ** 0.5, sqrt_max=lambda m, n: max(m, n) ** 0.5,
              match_rms_adamw=lambda m, n: 0.2 * max(m, n) ** 0.5, none=lambda m, n: 1.0)


def transcribed_step(W, g, state, lr, nesterov=True, accumulate=False, update_scale="sqrt_ratio", beta2=0.0,
                     weight_decay=0.0, ns_steps=5):
    """A step for one matrix, at a learning rate that began at 0.1 and a momentum of 0.9; returns the new matrix."""
    g = g if accumulate else 0.1 * g
    v = state["v"] = 0.9 * state.get("v", 0) + g
    u = newton_schulz(0.9 * v + g if nesterov else v, ns_steps)
    if beta2:     # NorMuon evens the rows of a tall or square matrix, the columns of a wide one
        squares = u.square().mean(1 if W.size(0) >= W.size(1) else 0, keepdim=True)
        state["s"] = beta2 * state.get("s", 0) + (1 - beta2) * squares
        even = u / state["s"].sqrt()
        u = even * u.norm() / even.norm()
    return W - lr * weight_decay * W - lr * SCALES[update_scale](*W.shape) * u


VARIANTS = dict(
    muon=dict(),
    as_first_published=dict(nesterov=False, update_scale="sqrt_max"),
    orthogonal_nesterov=dict(update_scale="none"),
    moonlight=dict(weight_decay=0.5, update_scale="match_rms_adamw", ns_steps=3),
    normuon_with_decay=dict(beta2=0.8, weight_decay=0.5))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (2, 24, 8), (2, 8, 24)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_muon_against_a_transcription(shape, dtype, tolerance):
    """A group a variant, for a matrix of any form and banks of two, whose rows have gradients
    of many sizes."""
    start = normal(*shape, seed=99).to(dtype)
    params = {name: torch.nn.Parameter(start.clone()) for name in VARIANTS}
    exact = {name: list(start.double().reshape(-1, *shape[-2:])) for name in VARIANTS}
    states = {name: [{} for _ in exact[name]] for name in VARIANTS}
    groups = [dict(params=[params[name]], **settings) for name, settings in VARIANTS.items()]
    optimizer = train_gpt.Muon(groups, lr=0.1, momentum=0.9)
    for step, lr in enumerate([0.1, 0.1, 0.1, 0.06, 0.06]):
        gradient = normal(*shape, seed=step).to(dtype) * torch.logspace(0, 2, shape[-2], dtype=dtype)[:, None]
        for group, (name, settings) in zip(optimizer.param_groups, VARIANTS.items(), strict=True):
            group["lr"], params[name].grad = lr, gradient.clone()
            matrices = zip(exact[name], gradient.double().reshape(-1, *exact[name][0].shape), states[name], strict=True)
            summing = name == "orthogonal_nesterov"     # v <- 0.9 v + g
            exact[name] = [transcribed_step(*each, lr, accumulate=summing, **settings) for each in matrices]
        optimizer.step()
    for name, p in params.items():
        end = torch.cat(exact[name]).view(shape)
        error = (p - end).norm() / (end - start).norm()
        assert error < tolerance, name


@pytest.mark.parametrize("scale", ["sqrt_ratio", "match_rms_adamw"])
def test_against_torch_muon(scale):
    """The same recorded gradients through torch.optim.Muon, both in bf16: equal to the rounding of bf16."""
    shapes = [(96, 64), (64, 96), (48, 144)]
    ours, theirs = ([parameter(*shape) for shape in shapes] for _ in range(2))
    a = train_gpt.Muon(ours, lr=0.02, weight_decay=0.1, update_scale=scale, ns_dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True,
                         adjust_lr_fn="original" if scale == "sqrt_ratio" else scale)
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = normal(*p.shape, seed=step, dtype=torch.float32)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert ((p - q).norm() / (q - q.mean()).norm()).item() < 0.01


@pytest.mark.upstream
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_the_readmes_muon_is_this_one(shape):
    section = (ROOT / "README.md").read_text().split("## Muon in eleven lines")[1]
    readme = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], readme)
    p, W, momentum = torch.nn.Parameter(normal(*shape)), normal(*shape), torch.zeros(shape, dtype=torch.float64)
    optimizer = train_gpt.Muon([p])
    for step in range(5):
        p.grad = normal(*shape, seed=step)
        optimizer.step()
        readme["muon_step"](W, p.grad.clone(), momentum)
    torch.testing.assert_close(p.detach(), W, rtol=1e-9, atol=1e-11)


def test_a_copy_goes_on_as_the_original():
    """Bit for bit."""
    def steps(optimizer, numbers):
        (p,) = optimizer.param_groups[0]["params"]
        for step in numbers:
            p.grad = normal(8, 4, seed=step, dtype=torch.float32)
            optimizer.step()
        return p.detach(), optimizer.state[p]["momentum_buffer"]

    settings = dict(beta2=0.9, weight_decay=0.1)
    original = train_gpt.Muon([parameter(8, 4)], **settings)
    p, *_ = steps(original, range(3))
    other = train_gpt.Muon([torch.nn.Parameter(p.clone())], **settings)
    other.load_state_dict(copy.deepcopy(original.state_dict()))     # torch's optimizers share what they load
    (p, v), (q, w) = steps(original, range(3, 6)), steps(other, range(3, 6))
    assert torch.equal(p, q) and torch.equal(v, w)


@pytest.mark.parametrize("name, shape, words", [
    ("blocks.0.gain", (8,), "AdamW"), ("scale", (), "AdamW"), ("conv.weight", (8, 4, 3, 3), "flatten")])
def test_muon_refuses_what_does_not_belong(name, shape, words):
    """By shape, in the constructor and later; the name is in the message."""
    good, bad = parameter(8, 4), dict(params=[(name, parameter(*shape))])
    optimizer = train_gpt.Muon([("good", good)])
    for make in (lambda: train_gpt.Muon([bad]), lambda: optimizer.add_param_group(bad)):
        with pytest.raises(ValueError, match=re.escape(f"{name}, {shape}") + f".*{words}"):
            make()
    train_gpt.Muon([("embedder.weight", good)])     # a name alone says nothing


@pytest.mark.parametrize("gradient, settings", [
    (None, dict(weight_decay=0.1)), (0.0, {}), (0.0, dict(beta2=0.9)), (1.0, dict(lr=0.0, weight_decay=0.1))])
def test_what_stays_where_it_is(gradient, settings):
    """Without a gradient, with one of zero or a rate of zero, beside a parameter that moves."""
    p, other = parameter(8, 4), parameter(8, 4)
    p.grad = gradient if gradient is None else torch.full((8, 4), gradient)
    optimizer = train_gpt.Muon([dict(params=[("p", p)], **settings), dict(params=[("other", other)])])
    for _ in range(2):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(8, 4)) and not torch.equal(other.detach(), torch.ones(8, 4))


# A training step.

def set_up(text, tmp_path, *options, device="cpu"):
    """A run of the small model, as `train` sets it up."""
    given = train_gpt.parse_command_line(["tiny", *SMALL, *text, "--log_dir", str(tmp_path), *options])
    with unchanged():
        return train_gpt.set_up(train_gpt.make_config(given), torch.device(device), {})


WAITS = [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, float, int, bool, torch.nonzero,
         np.asarray, lambda x: x.to("cpu"), lambda x: x[x > 0], lambda x: max(x, 0.0)]


@pytest.mark.parametrize("wait", [None, *WAITS])
def test_a_step_never_waits_for_the_device(wait, text, tmp_path, monkeypatch):
    """On the meta device nothing has a value, so that whatever would copy one to the host is an error, wherever it is
    called. AdamW is left out: torch's refuses that device; on a GPU, test_cuda.py has it."""
    monkeypatch.setitem(train_gpt.OPTIMIZERS, "adamw", lambda groups, c: torch.optim.SGD(groups))
    run = set_up(text, tmp_path, "--normuon_beta2", "0.9", "--matrix_weight_decay", "0.1", "--micro_batch", "2",
                 device="meta")
    tokens = torch.zeros(4, 33, dtype=torch.int64, device="meta")
    if wait is None:
        for _ in range(2):
            train_gpt.train_step(run, tokens)
        return
    accumulate = train_gpt.accumulate_gradients
    monkeypatch.setattr(train_gpt, "accumulate_gradients", lambda *arguments: wait(accumulate(*arguments)))
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="meta"):
        train_gpt.train_step(run, tokens)


def test_row_adam_against_torchs_sparse_adam():
    """Rows that a step touches many times, once or never, in several micro-batches."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    ours, reference = torch.nn.Parameter(start.clone(), requires_grad=False), torch.nn.Parameter(start.clone())
    optimizer = train_gpt.RowAdam([ours], lr=0.1, beta2=0.9)
    sparse = torch.optim.SparseAdam([reference], lr=0.1, betas=(0.0, 0.9), eps=1e-12)
    for step in range(8):
        for _ in range(2):
            ids = torch.randint(20 + step, (3, 7), generator=generator)
            target = torch.randn(7, 4, dtype=torch.float64, generator=generator)
            sums = torch.nn.functional.embedding(ids, ours).sum(0).requires_grad_()
            vars(ours).setdefault("touched", []).append((ids, sums))
            (sums - target).square().sum().backward()
            looked_up = torch.nn.functional.embedding(ids, reference, sparse=True).sum(0)
            (looked_up - target).square().sum().backward()
        optimizer.step()
        sparse.step()
        sparse.zero_grad()
        torch.testing.assert_close(ours.data, reference.data, rtol=1e-9, atol=1e-9)
    assert torch.equal(ours[40:], start[40:])
    optimizer.step()     # nothing was touched
    torch.testing.assert_close(ours.data, reference.data, rtol=1e-9, atol=1e-9)


# The parameter table.

@pytest.mark.upstream
@pytest.mark.parametrize("matrix_optimizer, scale, ratio", [
    ("muon", "sqrt_ratio", 10), ("muon", "sqrt_max", 0.1), ("muon", "match_rms_adamw", 1),
    ("orthogonal_nesterov", "none", 10), ("adamw", "sqrt_ratio", 1)])
def test_each_scale_has_the_ratio_that_belongs_to_it(matrix_optimizer, scale, ratio):
    """OrthogonalNesterov sums in the momentum and has no scale."""
    model = small_model(matrix_optimizer=matrix_optimizer, update_scale=scale, lr=0.002)
    optimizers, table = train_gpt.make_optimizers(model, model.config)
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    groups = {p: group for group in groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    assert groups[model.lm_head.weight]["lr"] == 0.002
    group = groups[model.blocks[1].attention.key.weight]
    assert group["lr"] == pytest.approx(0.002 * ratio)
    assert matrix_optimizer in table and "lm_head.weight" in table
    if matrix_optimizer != "adamw":
        assert group["update_scale"] == scale


@pytest.fixture
def first_row(monkeypatch):
    """Puts a row above the parameter table's, and takes away one of the same pattern."""
    table = train_gpt.parameter_table

    def put(*row):
        monkeypatch.setattr(train_gpt, "parameter_table", lambda c: [
            row, *(other for other in table(c) if other[0] != row[0])])

    return put


@pytest.mark.parametrize("matrix_optimizer", ["muon", "orthogonal_nesterov", "adamw"])
def test_a_new_optimizer_is_an_entry_and_a_row(matrix_optimizer, text, tmp_path, monkeypatch, first_row):
    """Adagrad for the embedding, beside each optimizer of the matrices: it learns, and a resume is bit-equal."""
    first_row("*embed.weight", "new", 0.01, 0.0)
    monkeypatch.setitem(train_gpt.OPTIMIZERS, "new", lambda groups, c: torch.optim.Adagrad(groups))
    options = ["--matrix_optimizer", matrix_optimizer, "--save_every", 12, "--log_dir", tmp_path]
    assert train("tiny", *SMALL, *text, *options, "--run_id", "r") == 0
    log = (tmp_path / "r/log.txt").read_text()
    assert re.search(r"embed\.weight +new", log)
    whole = losses(tmp_path / "r")
    assert train("--resume", tmp_path / "r", "--log_dir", tmp_path / "again") == 0
    assert losses(tmp_path / "again/r") == {key: loss for key, loss in whole.items() if key[1] > 12}
    assert float(whole["val", 20]) < float(whole["train", 1]) - 0.1
