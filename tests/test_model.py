"""The model, against float64 references written out here."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_gpt


def small_model(**fields) -> train_gpt.GPT:
    given = dict(track="tiny", num_layers=2, num_heads=2, head_dim=16, seq_len=32, batch_tokens=32, dtype="float32",
                 ngram_rows=512)
    model = train_gpt.GPT(train_gpt.make_config({**given, **fields})).initialize()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():     # the zero-initialised projections too
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return model


def reference_ids(tokens: list[int], t: int, c: train_gpt.Config) -> list[int]:
    """The rows of the table for the n-grams that end at token t, by Python's own integers, wrapped to 64 bits."""
    ids, hashed = [], tokens[t]
    for i, n in enumerate(range(2, c.ngram_max + 1)):
        before = tokens[t - n + 1] if t >= n - 1 else -1
        hashed = (hashed * 1_000_003 + before + 2**63) % 2**64 - 2**63
        ids.append(hashed % c.ngram_rows + i * c.ngram_rows)
    return ids


def reference_logits(model: train_gpt.GPT, tokens: list[int]) -> torch.Tensor:
    """The same function in float64, one row, with loops: (T, V)."""
    c, w = model.config, {name: p.double() for name, p in model.named_parameters()}

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x_TK):
        half = c.head_dim // 2
        out = torch.empty_like(x_TK)
        for t in range(len(x_TK)):
            for i in range(half):
                angle = t * 10_000 ** (-2 * i / c.head_dim)
                a, b = x_TK[t, i], x_TK[t, i + half]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + half] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = w["embed.weight"][tokens]
    if c.ngram_rows:
        x = x + torch.stack([w["ngrams.table"][reference_ids(tokens, t, c)].sum(0) for t in range(len(tokens))])
    x = norm(x)
    for layer in range(c.num_layers):
        name = f"blocks.{layer}."
        q, k, v = (norm(x) @ w[name + "attention.qkv.weight"].T).chunk(3, dim=-1)
        heads = []
        for h in range(c.num_heads):
            part = slice(h * c.head_dim, (h + 1) * c.head_dim)
            scores = rotate(norm(q[:, part])) @ rotate(norm(k[:, part])).T * c.attention_scale
            mask = torch.ones_like(scores, dtype=torch.bool).tril()
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, -1) @ w[name + "attention.proj.weight"].T
        x = x + F.relu(norm(x) @ w[name + "mlp.up.weight"].T) ** 2 @ w[name + "mlp.proj.weight"].T
    logits = norm(x) @ w["lm_head.weight"].T
    return c.logit_softcap * torch.tanh(logits / c.logit_softcap)


@pytest.mark.upstream
def test_forward_against_float64():
    model = small_model()
    tokens = torch.randint(257, (1, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference_logits(model, tokens[0].tolist())
        logits = model.logits(model.hidden(tokens))[0]
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
        loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(F.cross_entropy(expected[:-1], tokens[0, 1:]).item(), rel=1e-5)


@pytest.mark.parametrize("length", [1, 100, 128, 300])
def test_attention_of_a_cpu_against_float64(length):
    """The plain products of bfloat16: output and gradients, to bf16's rounding."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, dy = torch.randn(4, 2, 3, length, 40, generator=generator, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        y = train_gpt.attend(*inputs, 0.24)
        y.backward(dy.to(dtype))
        results.append([y.detach(), *(x.grad for x in inputs)])
    scores = (q @ k.mT * 0.24).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(results[0][0], scores.softmax(-1) @ v)
    for right, found in zip(*results, strict=True):
        assert (found.double() - right).norm() < 0.015 * (right.norm() + 0.1)     # of one token, two gradients are 0


def test_an_ngram_of_one_token_is_refused():
    with pytest.raises(train_gpt.RunError, match="--ngram_max 1: give at least 2"):
        train_gpt.GPT(train_gpt.make_config(dict(track="tiny", ngram_max=1)))


def test_ngrams_of_large_tokens():
    """The hash overflows 64 bits as Python's integers say, and its rows are spread over the table."""
    c = train_gpt.make_config(dict(track="tiny", ngram_rows=1000, ngram_max=5))
    tokens = torch.randint(2**31, (1, 2000), generator=torch.Generator().manual_seed(0))
    ids = train_gpt.Ngrams(c).ids(tokens)[:, 0]
    assert ids.T.tolist() == [reference_ids(tokens[0].tolist(), t, c) for t in range(2000)]
    for i, row in enumerate(ids):
        assert row.min() >= 1000 * i and row.max() < 1000 * (i + 1)
        assert len(row.unique()) > 800     # 865 of 1,000 expected


def test_causal():
    """Changing token t changes no output before t, and does change the output at t."""
    model = small_model()
    tokens = torch.randint(257, (1, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model.logits(model.hidden(tokens))
        for t in (0, 1, 15, 31):
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + 1) % 257
            after = model.logits(model.hidden(changed))
            assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


def test_a_parameter_without_a_rule_is_named():
    model = small_model()
    model.blocks[0].extra = torch.nn.Parameter(torch.zeros(3))
    for make in (model.initialize, lambda: train_gpt.make_optimizers(model, model.config)):
        with pytest.raises(train_gpt.RunError, match=r"parameter blocks\.0\.extra: "):
            make()


@pytest.mark.upstream
def test_small_has_124m_parameters_and_tiny_starts_from_a_uniform_guess():
    c = train_gpt.make_config(dict(track="small"))
    assert (c.target, c.val_tokens, c.seq_len, c.padded_vocab_size) == (3.28, 10_485_760, 1024, 50304)
    with torch.device("meta"):
        small = train_gpt.GPT(c)
    assert sum(p.numel() for p in small.blocks.parameters()) == 12 * 12 * 768**2
    assert sum(p.numel() for p in small.parameters()) - small.lm_head.weight.numel() == 123_568_128
    tiny = train_gpt.GPT(train_gpt.make_config(dict(track="tiny", dtype="float32"))).initialize()
    tokens = torch.randint(257, (2, 65))
    assert tiny(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(320), abs=1e-5)
    assert not any(p.any() for name, p in tiny.named_parameters() if name.endswith("proj.weight"))
