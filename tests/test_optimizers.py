"""Muon against float64, against torch.optim.Muon, and shared out over ranks; the parameter table."""

import copy

import pytest
import torch
from test_model import small_model

import train_gpt


def svd_polar(G: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (32, 256), (256, 32), (6, 40, 64), (6, 64, 40)])
def test_update_against_svd(shape):
    """One step of the optimizer on W = 0 with rate 1: -W is the update. Its singular vectors are those of an
    independent float64 SVD of the gradient, its singular values near 1, times the scale."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts, m, n = (shape if G.ndim == 3 else (1, *shape))
    p = torch.nn.Parameter(torch.zeros(parts * m, n))
    p.grad = G.reshape(parts * m, n).clone()
    train_gpt.Muon([dict(params=[p], parts=parts)], lr=1.0).step()
    update = -p.detach().double().view(parts, m, n) / max(1, m / n) ** 0.5
    values = torch.linalg.svdvals(update)
    assert values.min() >= 0.6 and values.max() <= 1.25
    U, _, Vh = torch.linalg.svd(G.double().view(parts, m, n), full_matrices=False)
    rotated = U.mT @ update @ Vh.mT     # diagonal, where the singular vectors agree
    diagonal = torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert (rotated - diagonal).abs().max() < 1e-4
    assert (update - svd_polar(G.view(parts, m, n))).norm() / update.norm() < 0.4


def test_singular_values_follow_the_polynomial():
    """In float64 each singular value goes through the scalar polynomial five times, whatever it is."""
    G = torch.randn(48, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S = torch.logspace(-6, 0, 48, dtype=torch.float64)
    expected = S / S.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    result = train_gpt.orthogonalize((U * S @ Vh)[None])[0]
    torch.testing.assert_close(torch.linalg.svdvals(result), expected.abs().sort(descending=True).values,
                               rtol=1e-5, atol=1e-9)


def test_zero_gradient_gives_a_zero_update():
    p = torch.nn.Parameter(torch.ones(8, 4))
    p.grad = torch.zeros(8, 4)
    train_gpt.Muon([p]).step()
    assert torch.equal(p.detach(), torch.ones(8, 4))


@pytest.mark.parametrize("scale", ["sqrt_ratio", "match_rms_adamw"])
def test_against_torch_muon(scale):
    """The same recorded gradients through torch.optim.Muon, both in bf16: equal to the rounding of bf16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 64), (64, 96), (48, 144)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    a = train_gpt.Muon(ours, lr=0.02, weight_decay=0.1, update_scale=scale, ns_dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True,
                         adjust_lr_fn="original" if scale == "sqrt_ratio" else scale)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert ((p - q).norm() / (q - q.mean()).norm()).item() < 0.01


def test_orthogonal_nesterov_against_a_transcription():
    """Seed 002's pseudocode, in float64: buf = m buf + g; W -= lr orthogonalize(g + m buf); no scale, QKV whole."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 8, dtype=torch.float64, generator=generator)
    p, buffer = torch.nn.Parameter(W.clone()), torch.zeros_like(W)
    optimizer = train_gpt.Muon([p], lr=0.1, momentum=0.9, accumulate=True, update_scale="none")
    for _ in range(5):
        g = torch.randn(W.shape, dtype=torch.float64, generator=generator)
        buffer = 0.9 * buffer + g
        X = (g + 0.9 * buffer).T
        X = X / (X.norm() + 1e-7)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
        W = W - 0.1 * X.T
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), W, rtol=1e-9, atol=1e-11)


def test_fused_qkv_is_split():
    """A fused weight of three parts moves as three weights of their own do."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(96, 32, generator=generator))
    split = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    a, b = train_gpt.Muon([dict(params=[fused], parts=3)]), train_gpt.Muon(split)
    sizes = torch.tensor([1.0, 10, 100]).repeat_interleave(32)[:, None]
    for _ in range(3):
        fused.grad = torch.randn(96, 32, generator=generator) * sizes
        for p, g in zip(split, fused.grad.chunk(3), strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in split]), rtol=1e-5, atol=1e-6)


def test_state_survives_a_round_trip():
    p, q = (torch.nn.Parameter(torch.ones(8, 4)) for _ in range(2))
    a, b = train_gpt.Muon([p]), train_gpt.Muon([q])
    generator = torch.Generator().manual_seed(0)
    p.grad = torch.randn(8, 4, generator=generator)
    a.step()
    b.load_state_dict(copy.deepcopy(a.state_dict()))     # torch's own would share the buffers
    q.data.copy_(p.data)
    p.grad = torch.randn(8, 4, generator=generator)
    q.grad = p.grad.clone()
    a.step()
    b.step()
    assert torch.equal(p, q)


def test_muon_refuses_what_is_no_matrix():
    for shape in ((8,), (2, 3, 4)):
        with pytest.raises(ValueError, match="not a parameter of"):
            train_gpt.Muon([torch.nn.Parameter(torch.zeros(shape))])
    with pytest.raises(ValueError, match="3 equal parts"):
        train_gpt.Muon([dict(params=[torch.nn.Parameter(torch.zeros(8, 4))], parts=3)])


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
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            train_gpt.Muon([p], lr=1.0, update_scale=scale).step()
            assert p.detach().square().mean().sqrt().item() == pytest.approx(expected, rel=0.15)
