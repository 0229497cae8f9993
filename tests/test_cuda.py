"""What only a GPU can show; bench/gpu.sh runs these on one."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, losses, run
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


@pytest.mark.parametrize("shape", [(4, 512, 768), (2, 768, 3072)])
def test_bf16_newton_schulz(shape):
    G = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    values = torch.linalg.svdvals(train_gpt.orthogonalize(G, 5, torch.bfloat16).double())
    assert values.min() >= 0.6 and values.max() <= 1.25


def test_a_step_of_muon_compiled_and_eager_with_no_synchronisation():
    """The same update to bf16's rounding; after the first step nothing makes the host wait for the GPU."""
    results = []
    for compiled in (False, True):
        model = small_model(normuon_beta2=0.9, matrix_weight_decay=0.1, decay_kind="cautious", dtype="bfloat16").cuda()
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


def test_a_run_learns_compiled_and_eager_and_resumes(text, tmp_path):
    """The same losses to bf16's rounding with and without torch.compile, and after a resume."""
    for name in ("on", "off"):
        options = ["--dtype", "bfloat16", "--compile", name, "--save_every", 12, "--log_dir", tmp_path,
                   "--run_id", name]
        result = run("tiny", *SMALL, *text, *options, timeout=400, gpu=True)
        assert result.returncode == 0, result.stderr
    log = (tmp_path / "on/log.txt").read_text()
    assert re.search("^kernels: .*bfloat16", log, re.MULTILINE)
    compiled, eager = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert float(eager["val", 20]) < 4.7
    assert max(abs(float(compiled[key]) - float(eager[key])) for key in eager) < 0.05
    options = ["--log_dir", tmp_path / "again", "--compile", "off"]
    result = run("--resume", tmp_path / "off", *options, timeout=400, gpu=True)
    assert result.returncode == 0, result.stderr
    resumed = losses(tmp_path / "again/off")
    assert max(abs(float(loss) - float(eager[key])) for key, loss in resumed.items()) < 0.02


def test_losses_do_not_depend_on_the_micro_batch(text, tmp_path):
    for micro_batch in (16, 2):
        options = ["--dtype", "bfloat16", "--micro_batch", micro_batch, "--compile", "off", "--log_dir", tmp_path,
                   "--run_id", micro_batch]
        assert run("tiny", *SMALL, *text, *options, timeout=400, gpu=True).returncode == 0
    a, b = losses(tmp_path / "16"), losses(tmp_path / "2")
    assert max(abs(float(a[key]) - float(b[key])) for key in a) < 0.02


def test_the_loader_gives_the_gpu_the_cpus_batches(text):
    """Copied while the GPU is kept busy; compared after the fact, so that a race would show."""
    c = SimpleNamespace(vocab_size=257, seq_len=32, prepare="data/local_text.py")
    rows = train_gpt.Rows("train_files", text[1], c, 10**9)
    starts = list(range(0, 4001, 40))
    expected = list(train_gpt.load_batches(rows, starts, 0, torch.device("cpu")))
    busy, copies = torch.randn(4096, 4096, device="cuda"), []
    for batch in train_gpt.load_batches(rows, starts, 0, torch.device("cuda", 0)):
        busy = (busy @ busy).clamp(-1, 1)
        copies.append(batch.clone())
        del batch
    assert all(torch.equal(copy.cpu(), batch) for copy, batch in zip(copies, expected, strict=True))
