"""What only a GPU can show; bench/gpu.sh runs these on one."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, STAGED, losses, run, train
from test_model import small_model

import train_gpt

pytestmark = pytest.mark.cuda


def test_bf16_forward_against_float64():
    """bf16 has 8 bits of precision: a few layers of it end within some percent of the float64 logits."""
    tokens = torch.randint(257, (1, 24), generator=torch.Generator().manual_seed(2))
    exact, model = small_model(dtype="float64").double(), small_model(dtype="bfloat16").cuda()
    with torch.no_grad():
        expected = exact.logits(exact.hidden(tokens)).double()
        logits = model.logits(model.hidden(tokens.cuda())).double().cpu()
    assert (logits - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("window", [0, 7, 100])
def test_attention_over_documents_against_the_mask_in_float64(window):
    """Both forms of a GPU: varlen_attn over the bounds, where the probe finds it, and torch's SDPA with the mask."""
    model = small_model(document_tokens=32, dtype="bfloat16").cuda().train()
    tokens = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0)).cuda()
    tokens[:, [5, 6, 20]] = 256
    q, k, v, dy = torch.randn(4, 3, 32, 2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    works = train_gpt.choose_attention(model.config, torch.device("cuda", 0)) == "torch varlen_attn"
    seen = {"mask": model.seen(tokens, window)}
    if works:
        model.varlen, model.most_documents = True, 7
        seen["bounds"] = model.seen(tokens, window)
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    right = train_gpt.attend(*exact, 0.12, seen["mask"].double().cpu())
    right.backward(dy)
    for name, what in seen.items():
        inputs = [x.bfloat16().cuda().requires_grad_() for x in (q, k, v)]
        y = train_gpt.attend(*inputs, 0.12, what)
        y.backward(dy.bfloat16().cuda())
        for x, expected in zip([y, *(x.grad for x in inputs)], [right, *(x.grad for x in exact)], strict=True):
            assert (x.double().cpu() - expected).norm() / expected.norm() < 0.02, name
    assert works == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.parametrize("shape", [(4, 512, 768), (2, 768, 3072)])
def test_bf16_newton_schulz(shape):
    G = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    values = torch.linalg.svdvals(train_gpt.orthogonalize(G, 5, torch.bfloat16).double())
    assert values.min() >= 0.6 and values.max() <= 1.25


def test_a_step_of_muon_compiled_and_eager_with_no_synchronisation():
    """The same update to bf16's rounding; after the first step nothing makes the host wait for the GPU."""
    results = []
    for compiled in (False, True):
        model = small_model(normuon_beta2=0.9, matrix_weight_decay=0.1, dtype="bfloat16").cuda()
        optimizer = train_gpt.make_optimizers(model, model.config)[0]["muon"]
        if compiled:
            optimizer.orthogonalize = torch.compile(train_gpt.orthogonalize, dynamic=False)
        generator = torch.Generator("cuda").manual_seed(0)
        for step in range(3):
            for p in model.blocks.parameters():
                p.grad = torch.randn(p.shape, device="cuda", generator=generator)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append(torch.cat([p.detach().flatten() for p in model.blocks.parameters()]))
    assert (results[0] - results[1]).norm() / results[0].norm() < 0.01


def test_a_run_learns_in_any_way_and_resumes(text, tmp_path):
    """The same losses to bf16's rounding with and without torch.compile, with another micro-batch, after a resume."""
    for name, options in dict(on=["--compile", "on"], off=["--compile", "off"],
                              two=["--compile", "off", "--micro_batch", 2]).items():
        options += ["--dtype", "bfloat16", "--save_every", 12, "--log_dir", tmp_path, "--run_id", name]
        result = run("tiny", *SMALL, *STAGED, *text, *options, timeout=400, gpu=True)
        assert result.returncode == 0, result.stderr
    assert re.search("^kernels: .*bfloat16", (tmp_path / "on/log.txt").read_text(), re.MULTILINE)
    options = ["--log_dir", tmp_path / "again", "--compile", "off"]
    result = run("--resume", tmp_path / "off", *options, timeout=400, gpu=True)
    assert result.returncode == 0, result.stderr
    eager = losses(tmp_path / "off")
    assert float(eager["val", 20]) < float(eager["train", 1]) - 0.3
    for name, tolerance in {"on": 0.05, "two": 0.02, "again/off": 0.02}.items():
        assert all(abs(float(loss) - float(eager[key])) < tolerance for key, loss in losses(tmp_path / name).items())


def test_a_step_of_training_never_waits_for_the_gpu(text, tmp_path, monkeypatch):
    """What tests/fake_gpu counts, by torch's own check: an error where the host would wait inside a step."""
    step, primed = train_gpt.train_step, []

    def checked_step(run, tokens):
        torch.cuda.set_sync_debug_mode("error" if hasattr(run, "prime_seconds") else "default")
        try:
            step(run, tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        primed.append(hasattr(run, "prime_seconds"))
    monkeypatch.setattr(train_gpt, "train_step", checked_step)
    assert train("tiny", *SMALL, *text, "--dtype", "bfloat16", "--log_dir", tmp_path, "--run_id", "r") == 0
    assert primed.count(True) == 20
    assert re.search("^late_compilations: 0$", (tmp_path / "r/log.txt").read_text(), re.MULTILINE)


def test_the_loader_gives_the_gpu_the_cpus_batches(text):
    """Copied while the GPU is kept busy; compared after the fact, so that a race would show."""
    c = SimpleNamespace(folder=Path(text[1]), vocab_size=257, seq_len=32, document_tokens=0, prepare="data/mine.py")
    rows = train_gpt.Rows("*train_*.bin", c, 10**9)
    starts = list(range(0, 4001, 40))
    expected = list(train_gpt.load_batches(rows, starts, 0, torch.device("cpu")))
    busy, copies = torch.randn(4096, 4096, device="cuda"), []
    for batch in train_gpt.load_batches(rows, starts, 0, torch.device("cuda", 0)):
        busy = (busy @ busy).clamp(-1, 1)
        copies.append(batch.clone())
        del batch
    assert all(torch.equal(copy.cpu(), batch) for copy, batch in zip(copies, expected, strict=True))
