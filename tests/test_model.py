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


STAGED = dict(windows="SL", document_tokens=32, mixing="on", value_tables=1, ngram_max=3, ngram_dim=8)


def reference_mask(tokens: list[int], window: int, c: train_gpt.Config) -> torch.Tensor:
    """(T, T): whether the token of a row sees that of a column, by its definition."""
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for t in range(len(tokens)):
        for s in range(t + 1):
            between = tokens[s + 1:t + 1] if c.document_tokens else []
            mask[t, s] = (t - s <= window or not window) and c.vocab_size - 1 not in between
    return mask


def reference_logits(model: train_gpt.GPT, tokens: list[int], window: int = 0) -> torch.Tensor:
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
        sums = torch.stack([w["ngrams.table"][reference_ids(tokens, t, c)].sum(0) for t in range(len(tokens))])
        x[:, :sums.size(1)] += sums
    x = x0 = norm(x)
    for layer in range(c.num_layers):
        name = f"blocks.{layer}."
        if c.mixing == "on":
            a, b = w[name + "mix"]
            x = (1 + a) * x + b * x0
        table = min(layer, layer - c.num_layers + c.value_tables, key=lambda i: not 0 <= i < c.value_tables)
        q, k, v = (norm(x) @ w[f"{name}attention.{part}.weight"].T for part in ("query", "key", "value"))
        heads = []
        for h in range(c.num_heads):
            part = slice(h * c.head_dim, (h + 1) * c.head_dim)
            values = v[:, part]
            if 0 <= table < c.value_tables:
                values = values + w[f"value_embeds.{table}.weight"][tokens][:, part]
            scores = rotate(norm(q[:, part])) @ rotate(norm(k[:, part])).T * c.attention_scale
            mask = reference_mask(tokens, window // 2 if c.windows[layer % len(c.windows)] == "S" else window, c)
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ values)
        x = x + torch.cat(heads, -1) @ w[name + "attention.proj.weight"].T
        x = x + F.relu(norm(x) @ w[name + "mlp.up.weight"].T) ** 2 @ w[name + "mlp.proj.weight"].T
    logits = norm(x) @ w["lm_head.weight"].T
    return c.logit_softcap * torch.tanh(logits / c.logit_softcap)


@pytest.mark.upstream
@pytest.mark.parametrize("fields, window", [({}, 0), (STAGED | dict(num_layers=3), 0), (STAGED, 6), (STAGED, 50)])
def test_forward_against_float64(fields, window):
    """As tiny is, and with every other part, by windows of the whole row, of less and of more than it has."""
    model = small_model(**fields)
    tokens = torch.randint(257, (1, 21), generator=torch.Generator().manual_seed(2))
    tokens[0, [4, 5, 12]] = 256
    with torch.no_grad():
        expected = reference_logits(model, tokens[0].tolist(), window)
        logits = model.logits(model.hidden(tokens, window))[0]
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
        loss = model(tokens[:, :-1], tokens[:, 1:], window)
    assert loss.item() == pytest.approx(F.cross_entropy(expected[:-1], tokens[0, 1:]).item(), rel=1e-5)


@pytest.mark.parametrize("window", [0, 3, 8, 40])
def test_documents_do_not_see_each_other_and_windows_are_exact(window):
    """One layer: the loss at token t moves with token s exactly where t sees s. Documents of 1 to 12 tokens."""
    model = small_model(num_layers=1, windows="L", document_tokens=32, ngram_rows=0, mixing="off")
    for seed in range(5):
        tokens = torch.randint(256, (24,), generator=torch.Generator().manual_seed(seed))
        tokens[torch.randint(24, (5,), generator=torch.Generator().manual_seed(seed))] = 256
        mask = reference_mask(tokens.tolist(), window, model.config)
        embedded = model.embed(tokens[None]).detach().requires_grad_()
        hook = model.embed.register_forward_hook(lambda *given, embedded=embedded: embedded)
        x_TD = model.hidden(tokens[None], window)[0]
        hook.remove()
        for t in range(24):
            gradient, = torch.autograd.grad(x_TD[t].sum(), embedded, retain_graph=True)
            assert (gradient[0].abs().sum(1) > 0).tolist() == mask[t].tolist()


def test_the_bounds_of_documents_say_what_the_mask_says():
    """For FlashAttention, which a CPU has not: bounds of as many documents as there may be, the rest empty."""
    model = small_model(document_tokens=16)
    tokens = torch.randint(250, 257, (3, 16), generator=torch.Generator().manual_seed(0))
    mask = model.seen(tokens, 5)
    model.varlen = True
    for most in (16, 13):     # of a row
        model.most_documents = most
        bounds, longest, window = model.seen(tokens, 5)
        bounds = bounds.tolist()
        assert (longest, window, len(bounds)) == (16, 5, 3 * most + 1)
        assert bounds == sorted(bounds) and bounds[-1] == 48
        for t in range(48):
            start = max(max(bound for bound in bounds if bound <= t), t - window)
            found = (mask[t // 16, 0, t % 16] == 0).nonzero().flatten() + t // 16 * 16
            assert found.tolist() == list(range(start, t + 1))
    assert model.seen(tokens, 0)[2] == -1


@pytest.mark.parametrize("length", [1, 100, 128, 300])
def test_attention_of_a_cpu_against_float64(length):
    """The plain products of bfloat16: output and gradients, to bf16's rounding."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, dy = torch.randn(4, 2, 3, length, 40, generator=generator, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        mask = torch.full((length, length), -torch.inf, dtype=dtype).triu(1)
        y = train_gpt.attend(*(x.transpose(1, 2) for x in inputs), 0.24, mask).transpose(1, 2)
        y.backward(dy.to(dtype))
        results.append([y.detach(), *(x.grad for x in inputs)])
    scores = (q @ k.mT * 0.24).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(results[0][0], scores.softmax(-1) @ v)
    for right, found in zip(*results, strict=True):
        assert (found.double() - right).norm() < 0.015 * (right.norm() + 0.1)     # of one token, two gradients are 0


def test_an_ngram_of_one_token_is_refused():
    with pytest.raises(train_gpt.RunError, match="--ngram_max 1: give 2 or more"):
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
    assert (c.target, c.val_tokens, c.padded_vocab_size) == (3.28, 10_485_760, 50304)
    with torch.device("meta"):
        small = train_gpt.GPT(c)
    matrices = [p for name, p in small.blocks.named_parameters() if p.ndim == 2]
    assert sum(p.numel() for p in [*matrices, small.lm_head.weight]) == 123_568_128
    tiny = train_gpt.GPT(train_gpt.make_config(dict(track="tiny", dtype="float32"))).initialize()
    tokens = torch.randint(257, (2, 65))
    assert tiny(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(320), abs=1e-5)
    assert not any(p.any() for name, p in tiny.named_parameters() if name.endswith("proj.weight"))
