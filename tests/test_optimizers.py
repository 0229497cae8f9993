"""Muon against float64, against the seeds' algorithms, torch.optim.Muon and NorMuon's paper; the parameter table."""

import copy
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, environment, losses, one_thread, train
from test_model import small_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt


def normal(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


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
    growth of small values, of about 500."""
    for steps in (1, 5):
        expected = through_svd(INPUTS[name], steps)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-4)):
            result = train_gpt.orthogonalize(INPUTS[name].to(dtype), steps)
            assert result.dtype == dtype
            assert (result - expected).norm() / expected.norm() < tolerance
            values, exact = torch.linalg.svdvals(result.double()), torch.linalg.svdvals(expected)
            torch.testing.assert_close(values, exact, rtol=0, atol=tolerance)


def test_newton_schulz_in_bf16():
    """bf16's rounding is 0.4%, and the input's alone is that."""
    for name in ("square", "wide", "batched", "tiny_norm", "huge_norm"):
        result = train_gpt.orthogonalize(INPUTS[name].float(), 5, torch.bfloat16).double()
        expected = through_svd(INPUTS[name], 5)
        assert (result - expected).norm() / expected.norm() < 0.03
    low = train_gpt.orthogonalize(INPUTS["nearly_low_rank"].float(), 5, torch.bfloat16)
    assert torch.linalg.svdvals(low.double()).max() < 1.3


@pytest.mark.parametrize("options", [{}, dict(beta2=0.9), dict(accumulate=True)])
def test_zero_gradient_gives_a_zero_update(options):
    p = torch.nn.Parameter(torch.ones(8, 4))
    p.grad = torch.zeros(8, 4)
    optimizer = train_gpt.Muon([p], **options)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(8, 4))


@pytest.mark.parametrize("scale", ["sqrt_ratio", "match_rms_adamw"])
def test_against_torch_muon(scale):
    """The same recorded gradients through torch.optim.Muon, both in bf16: equal to the rounding of bf16."""
    shapes = [(96, 64), (64, 96), (48, 144)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
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


def newton_schulz(G):
    """As the seeds write it, for one matrix."""
    X = G.T if G.size(0) > G.size(1) else G
    X = X / X.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    return X.T if G.size(0) > G.size(1) else X


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_muon_against_a_transcription(dtype, tolerance):
    """Seed 000's Algorithm 1 in float64, QKV split: v <- beta v + (1 - beta) g; W <- W - lr sqrt(max(m, n)) NS(v)."""
    shapes = dict(qkv=(72, 24), proj=(24, 24), up=(96, 24), down=(24, 96))
    W = {name: normal(*shape) for name, shape in shapes.items()}
    start, v = copy.deepcopy(W), {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    ours = {name: torch.nn.Parameter(w.to(dtype)) for name, w in W.items()}
    groups = [dict(params=[p], parts=3 if name == "qkv" else 1) for name, p in ours.items()]
    optimizer = train_gpt.Muon(groups, lr=0.01, momentum=0.9, nesterov=False, update_scale="sqrt_max")
    for step in range(20):
        for name, shape in shapes.items():
            g = normal(*shape, seed=step).to(dtype)
            ours[name].grad = g
            v[name] = 0.9 * v[name] + 0.1 * g.double()
            parts = v[name].chunk(3) if name == "qkv" else [v[name]]
            W[name] = W[name] - 0.01 * max(parts[0].shape) ** 0.5 * torch.cat([newton_schulz(part) for part in parts])
        optimizer.step()
    for name, p in ours.items():
        assert (p.double() - W[name]).norm() / (W[name] - start[name]).norm() < tolerance


def test_orthogonal_nesterov_against_a_transcription():
    """Seed 002's pseudocode, in float64: buf = m buf + g; W -= lr orthogonalize(g + m buf); no scale, QKV whole."""
    W = normal(24, 8)
    p, buffer = torch.nn.Parameter(W.clone()), torch.zeros_like(W)
    optimizer = train_gpt.Muon([p], lr=0.1, momentum=0.9, accumulate=True, update_scale="none")
    for step in range(5):
        p.grad = normal(24, 8, seed=step)
        buffer = 0.9 * buffer + p.grad
        W = W - 0.1 * newton_schulz(p.grad + 0.9 * buffer)
        optimizer.step()
    torch.testing.assert_close(p.detach(), W, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (2, 24, 8), (2, 8, 24)])
def test_normuon_and_cautious_decay_against_a_transcription(shape):
    """NorMuon evens the rows of a tall or square matrix, the columns of a wide one; cautious decay
    takes lr wd (lr / initial_lr) where u and W agree in sign."""
    W, p = normal(*shape, seed=9), torch.nn.Parameter(normal(*shape, seed=9))
    optimizer = train_gpt.Muon([p], lr=0.1, momentum=0.9, beta2=0.8, weight_decay=0.5, cautious=True)
    optimizer.param_groups[0]["lr"] = 0.06     # later in the schedule
    banks = W.view(-1, *shape[-2:]).clone()
    rows = shape[-2] >= shape[-1]
    v, s = torch.zeros_like(banks), torch.zeros(len(banks), max(shape[-2:]), dtype=torch.float64)
    for step in range(6):
        p.grad = normal(*shape, seed=step)
        for i, g in enumerate(p.grad.view_as(banks)):
            v[i] = 0.9 * v[i] + 0.1 * g
            u = newton_schulz(0.1 * g + 0.9 * v[i])
            s[i] = 0.8 * s[i] + 0.2 * u.square().mean(1 if rows else 0)
            even = u / s[i].sqrt().unsqueeze(1 if rows else 0)
            u = even * u.norm() / even.norm()
            keep = 1 - 0.06 * 0.5 * 0.6 * ((u > 0) & (banks[i] > 0) | (u < 0) & (banks[i] < 0)).double()
            banks[i] = banks[i] * keep - 0.06 * max(1, shape[-2] / shape[-1]) ** 0.5 * u
        optimizer.step()
    torch.testing.assert_close(p.detach().view_as(banks), banks, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, dict(beta2=0.9, weight_decay=0.1, cautious=True)])
def test_fused_and_banked_matrices_move_as_those_of_their_own(options):
    fused, bank = torch.nn.Parameter(normal(96, 32)), torch.nn.Parameter(normal(96, 32).view(3, 32, 32))
    split = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    optimizers = [train_gpt.Muon(params, **options) for params in ([dict(params=[fused], parts=3)], [bank], split)]
    sizes = torch.tensor([1.0, 10, 100]).repeat_interleave(32)[:, None]
    for step in range(3):
        fused.grad = normal(96, 32, seed=step) * sizes
        bank.grad = fused.grad.view(3, 32, 32).clone()
        for p, g in zip(split, fused.grad.chunk(3), strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p in (fused, bank):
        torch.testing.assert_close(p.detach().view(96, 32), torch.cat([p.detach() for p in split]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_round_trip(dtype):
    """Bit for bit, in its dtype, which torch's own load_state_dict would change to the parameter's."""
    p, q = (torch.nn.Parameter(torch.ones(8, 4)) for _ in range(2))
    a, b = (train_gpt.Muon([x], momentum_dtype=dtype, beta2=0.9) for x in (p, q))
    for step in range(3):
        p.grad = normal(8, 4, seed=step, dtype=torch.float32)
        a.step()
        if step == 0:
            b.load_state_dict(copy.deepcopy(a.state_dict()))     # torch's optimizers share what they load
            q.data.copy_(p.data)
        else:
            q.grad = p.grad.clone()
            b.step()
    assert torch.equal(p, q) and b.state[q]["momentum_buffer"].dtype == dtype


def test_bf16_momentum_halves_the_state_and_follows_float32():
    steps, sizes = 50, {}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.zeros(64, 32))
        optimizer = train_gpt.Muon([p], lr=0.01, momentum_dtype=dtype)
        for step in range(steps):
            p.grad = normal(64, 32, seed=step // 5, dtype=torch.float32)
            optimizer.step()
        sizes[dtype] = optimizer.state[p]["momentum_buffer"].nbytes
        results.append(p.detach())
    assert sizes[torch.bfloat16] * 2 == sizes[torch.float32] == 64 * 32 * 4
    assert 0 < (results[0] - results[1]).norm() / results[0].norm() < 0.02


def test_muon_refuses_what_does_not_belong():
    """By shape, and by what the caller says; the name is in the message."""
    class Sharded(torch.nn.Parameter):
        placements = ("Shard(0)",)     # what tells a DTensor from other tensors

    good = torch.nn.Parameter(torch.zeros(8, 4))
    for name, p, parts, words in (
            ("blocks.0.gain", torch.zeros(8), 1, "AdamW"), ("scale", torch.zeros(()), 1, "AdamW"),
            ("conv.weight", torch.zeros(8, 4, 3, 3), 1, "flatten"), ("qkv.weight", torch.zeros(8, 4), 3, "3"),
            ("bank", torch.zeros(6, 8, 4), 3, "3"), ("up.weight", Sharded(torch.zeros(8, 4)), 1, "DTensor")):
        p = p if isinstance(p, Sharded) else torch.nn.Parameter(p)
        with pytest.raises(ValueError, match=re.escape(f"{name}, {tuple(p.shape)}") + f".*{words}"):
            train_gpt.Muon([dict(params=[(name, p)], parts=parts)])
        optimizer = train_gpt.Muon([dict(params=[("good", good)])])
        with pytest.raises(ValueError, match=words):     # a group that is added later is checked the same
            optimizer.add_param_group(dict(params=[(name, p)], parts=parts))
        assert len(optimizer.param_groups) == 1
        good.grad = torch.ones(8, 4)
        optimizer.step()
    train_gpt.Muon([("embedder.weight", torch.nn.Parameter(torch.zeros(8, 4)))])     # a name alone says nothing


@pytest.mark.parametrize("setting", [
    dict(lr=-0.1), dict(lr=float("nan")), dict(momentum=1.5), dict(momentum=1.0), dict(momentum=-0.1), dict(beta2=1.0),
    dict(weight_decay=-1), dict(parts=0), dict(ns_steps=0), dict(update_scale="sqrt"), dict(nesterof=True)])
def test_bad_settings_are_refused_in_the_constructor_and_in_a_group(setting):
    (name, value), = setting.items()
    p = torch.nn.Parameter(torch.zeros(8, 4))
    for make in (lambda: train_gpt.Muon([p], **setting), lambda: train_gpt.Muon([dict(params=[p], **setting)])):
        with pytest.raises(ValueError, match=name):
            make()


def test_every_setting_may_stand_in_a_group_and_is_in_the_state():
    """Each group moves as an optimizer of its own with these settings, and the state names all of them."""
    settings = [dict(lr=0.1, momentum=0.5, nesterov=False), dict(lr=0.01, accumulate=True, update_scale="none"),
                dict(beta2=0.9, weight_decay=0.2, cautious=True, ns_steps=3), dict(parts=2, ns_dtype=torch.bfloat16,
                                                                                    momentum_dtype=torch.bfloat16)]
    grouped, alone = ([torch.nn.Parameter(normal(8, 4, dtype=torch.float32)) for _ in settings] for _ in range(2))
    together = train_gpt.Muon([dict(params=[p], **one) for p, one in zip(grouped, settings, strict=True)])
    single = [train_gpt.Muon([p], **one) for p, one in zip(alone, settings, strict=True)]
    for step in range(3):
        for p, q in zip(grouped, alone, strict=True):
            p.grad = normal(8, 4, seed=step, dtype=torch.float32)
            q.grad = p.grad.clone()
        for optimizer in (together, *single):
            optimizer.step()
    for p, q in zip(grouped, alone, strict=True):
        assert torch.equal(p, q)
    for group, one in zip(together.state_dict()["param_groups"], settings, strict=True):
        assert group.keys() >= train_gpt.Muon.SETTINGS.keys() and one.items() <= group.items()


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    p = torch.nn.Parameter(torch.ones(8, 4))
    optimizer, before = train_gpt.Muon([p]), torch.ones(8, 4)

    def closure():
        optimizer.zero_grad()
        loss = (p * normal(8, 4, dtype=torch.float32)).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(normal(8, 4, dtype=torch.float32).square().sum().item(), rel=1e-5)
    assert not torch.equal(p.detach(), before)
    assert train_gpt.Muon([p]).step() is None


def test_deepcopy_and_pickle_go_on_as_the_original(tmp_path):
    def stepped(optimizer, steps):
        (p,) = optimizer.param_groups[0]["params"]
        for step in steps:
            p.grad = normal(8, 4, seed=step, dtype=torch.float32)
            optimizer.step()
        return p.detach()

    optimizer = train_gpt.Muon([torch.nn.Parameter(torch.ones(8, 4))], beta2=0.9, weight_decay=0.1, cautious=True)
    stepped(optimizer, range(3))
    copied = copy.deepcopy(optimizer)
    torch.save(optimizer, tmp_path / "muon.pt")
    loaded = torch.load(tmp_path / "muon.pt", weights_only=False)
    expected = stepped(optimizer, range(3, 6))
    assert torch.equal(stepped(copied, range(3, 6)), expected) and torch.equal(stepped(loaded, range(3, 6)), expected)
    assert copied.get_post_step_metrics()[0] == optimizer.get_post_step_metrics()[0]


def test_states_of_other_muons_are_refused_in_words():
    """torch's own, and Keller Jordan's, whose groups have lr, weight_decay and momentum alone."""
    p = torch.nn.Parameter(torch.ones(8, 4))
    p.grad = torch.ones(8, 4)
    theirs = torch.optim.Muon([p])
    theirs.step()
    jordan = dict(state={0: dict(momentum_buffer=torch.ones(8, 4))},
                  param_groups=[dict(lr=0.02, weight_decay=0, momentum=0.95, params=[0])])
    for state in (theirs.state_dict(), jordan):
        optimizer = train_gpt.Muon([p])
        with pytest.raises(ValueError, match="another optimizer"):
            optimizer.load_state_dict(state)
        assert not optimizer.state


def test_a_rate_of_zero_with_cautious_decay_moves_nothing():
    p = torch.nn.Parameter(torch.ones(8, 4))
    p.grad = torch.ones(8, 4)
    optimizer = train_gpt.Muon([p], lr=0.0, weight_decay=0.1, cautious=True)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(8, 4))


def test_a_parameter_without_a_gradient_stays_and_the_others_move():
    idle, p = torch.nn.Parameter(torch.ones(8, 4)), torch.nn.Parameter(torch.ones(8, 4))
    optimizer = train_gpt.Muon([idle, p], weight_decay=0.1)
    p.grad = torch.ones(8, 4)
    optimizer.step()
    assert torch.equal(idle.detach(), torch.ones(8, 4)) and not torch.equal(p.detach(), torch.ones(8, 4))
    assert len(optimizer.get_post_step_metrics()) == 1


def test_a_real_dtensor_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        p = torch.nn.Parameter(distribute_tensor(torch.zeros(8, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(ValueError, match="is a DTensor"):
            train_gpt.Muon([p])
    finally:
        torch.distributed.destroy_process_group()


class NoWaitInTorch(TorchDispatchMode):
    """Fails on the operators through which the host would wait for a GPU, wherever they are called."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "is_nonzero"))
        return function(*args, **(kwargs or {}))


class NoWaitInPython(TorchFunctionMode):
    """And on the methods that copy a tensor to the host, which no operator shows on a CPU."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        waits = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
        assert getattr(function, "__name__", "") not in waits, function
        return function(*args, **(kwargs or {}))


def set_up(text, tmp_path, *options):
    """A run of the small model, as `train` sets it up."""
    given = train_gpt.parse_command_line(["tiny", *SMALL, *text, "--log_dir", str(tmp_path), *options])
    with one_thread():
        return train_gpt.set_up(train_gpt.make_config(given), torch.device("cpu"), {})


def test_a_step_never_waits_for_the_device(text, tmp_path):
    """Of the whole training step: data are there, and the losses are read elsewhere."""
    run = set_up(text, tmp_path, "--normuon_beta2", "0.9", "--matrix_weight_decay", "0.1", "--decay_kind", "cautious",
                 "--momentum_dtype", "bfloat16", "--grad_clip", "1")
    run.optimizers.pop("adamw")     # torch's AdamW keeps its step count on the CPU
    with NoWaitInTorch(), NoWaitInPython():
        train_gpt.train_step(run, torch.zeros(4, 33, dtype=torch.int64))
    for wait in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.nonzero, bool):
        with pytest.raises(AssertionError), NoWaitInTorch(), NoWaitInPython():
            wait(torch.ones(()))


@pytest.mark.parametrize("matrix_optimizer, scale, ratio", [
    ("muon", "sqrt_ratio", 10), ("muon", "sqrt_max", 0.1), ("muon", "match_rms_adamw", 1),
    ("orthogonal_nesterov", "sqrt_ratio", 10), ("adamw", "sqrt_ratio", 1)])
def test_each_scale_has_the_ratio_that_belongs_to_it(matrix_optimizer, scale, ratio):
    model = small_model(matrix_optimizer=matrix_optimizer, update_scale=scale, lr=0.002)
    optimizers, table = train_gpt.make_optimizers(model, model.config)
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[model.lm_head.weight] == 0.002
    assert rates[model.blocks[1].mlp.up.weight] == pytest.approx(0.002 * ratio)
    assert table.count(matrix_optimizer) >= 2 and "lm_head.weight" in table


def test_update_rms_of_the_scales():
    """match_rms_adamw gives an update of RMS near 0.2 whatever the shape; sqrt_max one of norm sqrt(max(m, n))."""
    for shape in ((128, 64), (64, 256)):
        for scale, expected in (("match_rms_adamw", 0.2), ("sqrt_max", 1.0)):
            p = torch.nn.Parameter(torch.zeros(shape))
            p.grad = normal(*shape, dtype=torch.float32)
            train_gpt.Muon([p], lr=1.0, update_scale=scale).step()
            assert p.detach().square().mean().sqrt().item() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_gradients_are_clipped_by_their_whole_norm(clip, text, tmp_path):
    """g min(1, c / |g|), against the norm of all gradients laid end to end; 0 is off."""
    run = set_up(text, tmp_path, "--grad_clip", str(clip))
    tokens = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(0))
    train_gpt.accumulate_gradients(run.model, tokens, 2)
    before = torch.cat([p.grad.flatten() for p in run.model.parameters()]).double()
    run.optimizers.clear()
    train_gpt.train_step(run, tokens)
    after = torch.cat([p.grad.flatten() for p in run.model.parameters()]).double()
    factor = min(1, clip / before.norm().item()) if clip else 1
    torch.testing.assert_close(after, before * factor, rtol=1e-5, atol=0)


def test_metrics_of_a_step():
    """Each figure against its definition, computed here in float64 for one matrix."""
    p = torch.nn.Parameter(normal(64, 16, dtype=torch.float32))
    old = p.detach().double()
    optimizer = train_gpt.Muon([("up.weight", p)], lr=0.01)
    p.grad = normal(64, 16, seed=1, dtype=torch.float32)
    optimizer.step()
    u = through_svd(p.grad, 5)     # the first momentum is parallel to the gradient
    S = torch.linalg.svdvals(u)
    expected = dict(
        gradient=p.grad.double().norm(), weight=p.detach().double().norm(), update=(p.detach().double() - old).norm(),
        orthogonality_error=(u.T @ u - torch.eye(16)).norm() / 4, least_singular=S.min(), largest_singular=S.max())
    assert optimizer.get_post_step_metrics() == {
        "up.weight": {key: pytest.approx(value.item(), rel=1e-3) for key, value in expected.items()}}
    p.grad.fill_(torch.inf)     # a diverged run is measured still
    optimizer.step()
    assert not math.isfinite(optimizer.get_post_step_metrics()["up.weight"]["gradient"])


# The parameter table.

class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv:2302.06675."""
    def __init__(self, params):
        super().__init__(params, dict(lr=1e-4, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                p.sub_(m.lerp(p.grad, 0.1).sign(), alpha=group["lr"])
                m.lerp_(p.grad, 0.01)


def test_a_new_optimizer_is_one_class_and_one_row(text, tmp_path, monkeypatch):
    """Lion for the embedding, ahead of Muon: it learns, and a resume is bit-equal."""
    table = train_gpt.parameter_table

    def rows(c):
        return [("*embed.weight", "new", 0.01, 0.0, 1), *(row for row in table(c) if row[0] != "*embed.weight")]

    monkeypatch.setattr(train_gpt, "parameter_table", rows)
    monkeypatch.setitem(train_gpt.OPTIMIZERS, "new", lambda groups, c: Lion(groups))
    options = [*SMALL, *text, "--save_every", 12, "--metrics_every", 5, "--log_dir", tmp_path, "--run_id", "r"]
    assert train("tiny", *options) == 0
    log = (tmp_path / "r/log.txt").read_text()
    assert re.search(r"embed\.weight +new", log) and "metrics: " in log
    whole = losses(tmp_path / "r")
    assert train("--resume", tmp_path / "r", "--log_dir", tmp_path / "again") == 0
    assert losses(tmp_path / "again/r") == {key: loss for key, loss in whole.items() if key[1] > 12}
    assert float(whole["val", 20]) < float(whole["train", 1]) - 0.1


@pytest.mark.parametrize("row, words", [
    (("*embed.weight", "no_such_one", 0.1, 0.0, 1), ["no_such_one", "muon"]),
    (("*.gain", "adamw", 0.1, 0.0, 1), ["*.gain", "drop"])])
def test_a_row_that_nothing_knows_or_fits_is_an_error(row, words, monkeypatch):
    model, table = small_model(), train_gpt.parameter_table
    monkeypatch.setattr(train_gpt, "parameter_table", lambda c: [row, *table(c)] if row[0] == "*.gain" else [
        row, *(other for other in table(c) if other[0] != row[0])])
    with pytest.raises(train_gpt.RunError) as error:
        train_gpt.make_optimizers(model, model.config)
    assert all(word in str(error.value) for word in words)


def test_one_parameters_own_rate_is_one_row(monkeypatch):
    model, table = small_model(), train_gpt.parameter_table
    monkeypatch.setattr(train_gpt, "parameter_table",
                        lambda c: [("blocks.1.mlp.up.weight", "muon", 0.123, 0.0, 1), *table(c)])
    optimizers, text = train_gpt.make_optimizers(model, model.config)
    rates = {p: group["lr"] for group in optimizers["muon"].param_groups for p in group["params"]}
    assert rates[model.blocks[1].mlp.up.weight] == 0.123 and rates[model.blocks[0].mlp.up.weight] != 0.123
    assert "0.123" in text


def test_orthogonal_nesterov_is_seed_002():
    """Sums in the momentum, no scale, QKV as one matrix."""
    model = small_model(matrix_optimizer="orthogonal_nesterov")
    (optimizer,) = [o for o in train_gpt.make_optimizers(model, model.config)[0].values()
                    if isinstance(o, train_gpt.Muon)]
    for group in optimizer.param_groups:
        assert group["accumulate"] and group["update_scale"] == "none" and group["parts"] == 1


def test_the_benchmark_runs_and_its_memory_is_that_of_the_shapes():
    """On tiny's matrices: two float32 of AdamW or one of Muon each."""
    result = subprocess.run([sys.executable, ROOT / "bench/optimizers.py", "--track", "tiny", "--rounds", "1"],
                            capture_output=True, text=True, timeout=100, env=environment())
    assert result.returncode == 0, result.stderr
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("| ").split("|")]
                                              for line in result.stdout.splitlines() if line.startswith("|"))}
    assert float(rows["torch.optim.Muon"][1]) == 1
    matrices, rest = 3 * 12 * 160 * 160, 2 * 320 * 160
    found = {name: int(size) for name, size in re.findall(r"^\| (.*) \| (\d+) \|$", result.stdout, re.MULTILINE)}
    for name, size in (("AdamW", 8 * (matrices + rest)), ("Muon", 4 * matrices + 8 * rest),
                       ("Muon, bf16 momentum", 2 * matrices + 8 * rest)):
        assert found[name] == round(size / 2**20)
