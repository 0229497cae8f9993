"""Muon against float64, against the seeds' algorithms, torch.optim.Muon and NorMuon's paper; the parameter table."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from test_model import small_model
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt


def normal(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def through_svd(G: torch.Tensor, steps: int, polynomial: str) -> torch.Tensor:
    """U p(S / |G|) V^T from a float64 SVD, the scalar polynomial applied to each singular value."""
    factor, coefficients = train_gpt.POLYNOMIALS[polynomial]
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = S / (factor * S.norm(dim=-1, keepdim=True)).clamp_min(1e-300)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        s = a * s + b * s**3 + c * s**5
    return U * s[..., None, :] @ Vh


INPUTS = dict(
    square=normal(1, 96, 96), wide=normal(1, 64, 320), batched=normal(5, 32, 96), in_strips=normal(2, 520, 1100),
    tiny_norm=1e-12 * normal(1, 32, 128), huge_norm=1e15 * normal(1, 32, 128),
    nearly_low_rank=normal(1, 64, 3) @ normal(1, 3, 256) + 1e-5 * normal(1, 64, 256))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("polynomial", train_gpt.POLYNOMIALS)
@pytest.mark.parametrize("name", INPUTS)
def test_newton_schulz_against_svd(name, polynomial, gram):
    """The result is what the scalar polynomial makes of the singular values, to the rounding of the dtype times the
    growth of small values, of about 500 (quintic) and 1000 (polar_express)."""
    expected = through_svd(INPUTS[name], 5, polynomial)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-4)):
        result = train_gpt.orthogonalize(INPUTS[name].to(dtype), 5, polynomial=polynomial, gram=gram)
        assert result.dtype == dtype
        assert (result - expected).norm() / expected.norm() < tolerance
        values, exact = torch.linalg.svdvals(result.double()), torch.linalg.svdvals(expected)
        torch.testing.assert_close(values, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("polynomial", train_gpt.POLYNOMIALS)
def test_newton_schulz_in_bf16(polynomial):
    """bf16's rounding is 0.4%, and the input's alone is that; the Gram form is not taken there, as it diverges."""
    for name in ("square", "wide", "batched", "in_strips", "tiny_norm", "huge_norm"):
        result = train_gpt.orthogonalize(INPUTS[name].float(), 5, torch.bfloat16, polynomial).double()
        expected = through_svd(INPUTS[name], 5, polynomial)
        assert (result - expected).norm() / expected.norm() < 0.03
    low = INPUTS["nearly_low_rank"].float()
    assert torch.linalg.svdvals(train_gpt.orthogonalize(low, 5, torch.bfloat16, polynomial).double()).max() < 1.3
    assert not train_gpt.orthogonalize(low, 5, torch.bfloat16, polynomial, gram=True).norm() < 1e2


def test_polynomials_of_other_lengths():
    for steps in (1, 3, 7):
        for polynomial in train_gpt.POLYNOMIALS:
            result = train_gpt.orthogonalize(INPUTS["wide"], steps, polynomial=polynomial)
            torch.testing.assert_close(result, through_svd(INPUTS["wide"], steps, polynomial), rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{}, dict(polynomial="polar_express", beta2=0.9), dict(accumulate=True)])
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
    """NorMuon's rows are the longer side's; cautious decay takes lr wd (lr / base_lr) where u and W agree in sign."""
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


@pytest.mark.parametrize("cpu_batch, batches", [(1, 5), (4096, 3), (2**20, 2)])
def test_batches_do_not_change_the_result(cpu_batch, batches):
    """Two fused and two plain parameters of one shape of matrix, in one batch, two, or one each; and one of another."""
    shapes = [(96, 32), (96, 32), (32, 32), (32, 32), (64, 32)]
    results, calls = [], []
    for size in (2**20, cpu_batch):
        parameters = [torch.nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
        optimizer = train_gpt.Muon([dict(params=parameters[:2], parts=3), dict(params=parameters[2:])], beta2=0.9)
        optimizer.cpu_batch, start = size, optimizer.start
        optimizer.start = lambda *batch, start=start: calls.append(batch) or start(*batch)
        for step in range(3):
            calls.clear()
            for i, p in enumerate(parameters):
                p.grad = normal(*p.shape, seed=100 * step + i)
            optimizer.step()
        results.append(parameters)
    assert len(calls) == batches
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_round_trip(dtype):
    """Bit for bit, in its dtype, which torch's own load_state_dict would change to the parameter's."""
    p, q = (torch.nn.Parameter(torch.ones(8, 4)) for _ in range(2))
    a, b = (train_gpt.Muon([x], momentum_dtype=dtype, beta2=0.9) for x in (p, q))
    for step in range(3):
        p.grad = normal(8, 4, seed=step, dtype=torch.float32)
        a.step()
        if step == 0:
            b.load_state_dict(a.state_dict())
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
    class Sharded(torch.nn.Parameter):
        placements = ("Shard(0)",)     # what tells a DTensor from other tensors

    for name, p, parts, reason in (
            ("blocks.0.gain", torch.zeros(8), 1, r"blocks.0.gain, \(8,\), is no matrix of a hidden layer"),
            ("embed.weight", torch.zeros(8, 4), 1, "embed.weight.* is no matrix of a hidden layer"),
            ("lm_head.weight", torch.zeros(8, 4), 1, "lm_head.weight.* is no matrix of a hidden layer"),
            ("conv.weight", torch.zeros(8, 4, 3, 3), 1, "conv.weight.*flatten filters to"),
            ("qkv.weight", torch.zeros(8, 4), 3, "qkv.weight.* has no 3 equal parts"),
            ("up.weight", Sharded(torch.zeros(8, 4)), 1, "up.weight.* is a DTensor; give whole tensors")):
        p = p if isinstance(p, Sharded) else torch.nn.Parameter(p)
        with pytest.raises(ValueError, match=reason):
            train_gpt.Muon([dict(params=[(name, p)], parts=parts)])
    with pytest.raises(ValueError, match="a parameter, .* is no matrix"):
        train_gpt.Muon([torch.nn.Parameter(torch.zeros(8))])


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


class NoSynchronisation(TorchDispatchMode):
    """Fails on the operators through which the host would wait for a GPU."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "_to_cpu"))
        return function(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device():
    c = train_gpt.make_config(dict(track="tiny", normuon_beta2=0.9, matrix_weight_decay=0.1, decay_kind="cautious",
                                   polynomial="polar_express", momentum_dtype="bfloat16", grad_clip=1.0))
    model = train_gpt.GPT(c)
    optimizers, _ = train_gpt.make_optimizers(model, c)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    world = train_gpt.World(0, 1, torch.device("cpu"), 60)
    with NoSynchronisation():
        train_gpt.update(optimizers[1:], c, 0, world)     # torch's own AdamW keeps its step count on the CPU
    with pytest.raises(AssertionError), NoSynchronisation():
        torch.ones(()).item()


@pytest.mark.parametrize("matrix_optimizer, scale, ratio", [
    ("muon", "sqrt_ratio", 10), ("muon", "sqrt_max", 0.1), ("muon", "match_rms_adamw", 1),
    ("orthogonal_nesterov", "sqrt_ratio", 10), ("adamw", "sqrt_ratio", 1)])
def test_each_scale_has_the_ratio_that_belongs_to_it(matrix_optimizer, scale, ratio):
    model = small_model(matrix_optimizer=matrix_optimizer, update_scale=scale, lr=0.002)
    optimizers, table = train_gpt.make_optimizers(model, model.config)
    rates = {p: group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[model.lm_head.weight] == 0.002
    assert rates[model.blocks[1].mlp.up.weight] == pytest.approx(0.002 * ratio)
    assert table.count(matrix_optimizer) >= 4 and "lm_head.weight" in table


def test_update_rms_of_the_scales():
    """match_rms_adamw gives an update of RMS near 0.2 whatever the shape; sqrt_max one of norm sqrt(max(m, n))."""
    for shape in ((128, 64), (64, 256)):
        for scale, expected in (("match_rms_adamw", 0.2), ("sqrt_max", 1.0)):
            p = torch.nn.Parameter(torch.zeros(shape))
            p.grad = normal(*shape, dtype=torch.float32)
            train_gpt.Muon([p], lr=1.0, update_scale=scale).step()
            assert p.detach().square().mean().sqrt().item() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_gradients_are_clipped_by_their_whole_norm(clip):
    """g min(1, c / |g|), against the norm of all gradients laid end to end; 0 is off."""
    model = small_model(grad_clip=clip)
    for i, p in enumerate(model.parameters()):
        p.grad = normal(*p.shape, seed=i, dtype=torch.float32)
    before = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    optimizers, _ = train_gpt.make_optimizers(model, model.config)
    train_gpt.update(optimizers, model.config, 0, train_gpt.World(0, 1, torch.device("cpu"), 60))
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    factor = min(1, clip / before.norm().item()) if clip else 1
    torch.testing.assert_close(after, before * factor, rtol=1e-5, atol=0)


def test_measures_of_a_step():
    """Each figure of metrics.jsonl against its definition, computed here in float64 for one matrix."""
    model = small_model(num_layers=1, matrix_weight_decay=0.1, decay_kind="cautious", normuon_beta2=0)
    optimizers, _ = train_gpt.make_optimizers(model, model.config)
    for i, p in enumerate(model.parameters()):
        p.grad = normal(*p.shape, seed=i, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers[1].observed = observed = {}
    train_gpt.update(optimizers, model.config, 0, train_gpt.World(0, 1, torch.device("cpu"), 60))
    figures = train_gpt.measure(model, before, observed)
    p, old = model.blocks[0].mlp.up.weight, before["blocks.0.mlp.up.weight"].double()
    change, u = p.detach().double() - old, through_svd(p.grad, 5, "quintic")
    S = torch.linalg.svdvals(u)
    expected = dict(
        gradient=p.grad.double().norm(), weight=old.norm(), update=change.norm(),
        update_rms=change.square().mean().sqrt(), update_to_weight=change.norm() / old.norm(),
        orthogonality_error=(u.T @ u - torch.eye(u.size(1))).norm() / u.size(1) ** 0.5,
        least_singular=S.min(), largest_singular=S.max(), decay_share=(u.sign() == old.sign()).double().mean())
    assert figures["blocks.*.mlp.up.weight"] == {
        key: pytest.approx(value.item(), rel=1e-3) for key, value in expected.items()}
    assert figures.keys() == {"embed.weight", "lm_head.weight", "blocks.*.attention.qkv.weight",
                              "blocks.*.attention.proj.weight", "blocks.*.mlp.up.weight", "blocks.*.mlp.proj.weight"}
    assert "least_singular" not in figures["embed.weight"]


def test_measures_leave_out_what_has_no_gradient_and_survive_what_is_not_finite():
    model = small_model(num_layers=1)
    optimizers, _ = train_gpt.make_optimizers(model, model.config)
    for p in model.blocks.parameters():
        p.grad = torch.full_like(p, torch.inf)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers[1].observed = observed = {}
    train_gpt.update(optimizers, model.config, 0, train_gpt.World(0, 1, torch.device("cpu"), 60))
    figures = train_gpt.measure(model, before, observed)
    assert "embed.weight" not in figures and figures["blocks.*.mlp.up.weight"]["gradient"] is None


def test_orthogonal_nesterov_takes_muons_fields():
    fields = dict(normuon_beta2=0.9, nesterov="off", decay_kind="cautious")
    model = small_model(matrix_optimizer="orthogonal_nesterov", **fields)
    muon = train_gpt.make_optimizers(model, model.config)[0][1]
    assert muon.accumulate and not muon.nesterov and muon.beta2 == 0.9 and muon.cautious


def test_the_benchmark_runs_and_its_memory_is_that_of_the_shapes():
    """On tiny's matrices: two float32 of AdamW or one of Muon each, an eighth of it, at least, on the fullest rank."""
    result = subprocess.run([sys.executable, ROOT / "bench/optimizers.py", "--track", "tiny", "--rounds", "1"],
                            capture_output=True, text=True, timeout=100, env=environment())
    assert result.returncode == 0, result.stderr
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("| ").split("|")]
                                              for line in result.stdout.splitlines() if line.startswith("|"))}
    assert float(rows["torch.optim.Muon"][1]) == 1 and float(rows["Muon"][0].split()[0]) > 0
    matrices, rest = 3 * 12 * 160 * 160, 2 * 320 * 160
    mib = {name: round(numbers / 2**20) for name, numbers in (
        ("AdamW", 8 * (matrices + rest)), ("Muon", 4 * matrices + 8 * rest), ("half", 2 * matrices + 8 * rest))}
    found = {name: [int(one), int(eight)] for name, one, eight in
             re.findall(r"^\| (.*) \| (\d+) \| (\d+) \|$", result.stdout, re.MULTILINE)}
    assert found["AdamW"] == [mib["AdamW"]] * 2
    assert found["Muon"][0] == mib["Muon"] and found["Muon, bf16 momentum"][0] == mib["half"]
    assert all(few <= all_of_it for all_of_it, few in found.values())
