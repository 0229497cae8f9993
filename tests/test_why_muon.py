"""examples/why_muon.py: its measures against numpy and known spectra, its training against train_gpt.py's own."""

import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from conftest import SMALL, losses, train, unchanged
from PIL import Image

import train_gpt
from examples import why_muon


def known(values, m: int, n: int) -> torch.Tensor:
    """An m x n matrix with these singular values, in float64."""
    generator = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(k, len(values), dtype=torch.float64, generator=generator))[0] for k in (m, n))
    return U * torch.tensor(values, dtype=torch.float64) @ V.T


def test_measures_on_known_spectra():
    """n equal values count as n; a halving series has the entropy that its closed form gives."""
    for m, n in ((24, 40), (40, 24)):
        equal = why_muon.singular_values(known([3.0] * 7, m, n))
        assert equal.shape == (24,) and math.isclose(why_muon.effective_rank(equal), 7, rel_tol=1e-6)
        assert [why_muon.directions(equal, share) for share in (0.1, 0.5, 0.9, 1)] == [1, 4, 7, 7]
        halves = why_muon.singular_values(known([0.5**i for i in range(24)], m, n))
        assert math.isclose(why_muon.effective_rank(halves), 4, rel_tol=1e-4)      # 2^H, and H of the series is 2 bits
        assert [why_muon.directions(halves, share) for share in (0.74, 0.76, 0.93, 0.94)] == [1, 2, 2, 3]
    assert why_muon.effective_rank(np.array([5.0, 0.0])) == 1


def test_singular_values_against_numpy():
    """float32 and bfloat16 matrices are taken apart in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        matrix = known(np.geomspace(1, 1e-6, 30), 30, 50).to(dtype)
        expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        np.testing.assert_allclose(why_muon.singular_values(matrix), expected, rtol=0, atol=1e-14)


def test_polynomial_against_newton_schulz():
    values = np.geomspace(1, 1e-3, 12)
    after = train_gpt.orthogonalize(torch.diag(torch.tensor(values))[None], 5)[0]
    expected = why_muon.newton_schulz(values / np.linalg.norm(values), 5)
    np.testing.assert_allclose(after.diagonal().numpy(), expected, rtol=0, atol=1e-12)


def test_update_along_some_directions():
    """Those kept are as Newton-Schulz makes them, the others are gone; both together are all."""
    G = torch.stack([known(np.geomspace(1, 1e-2, 20), 20, 30)] * 2).float()
    whole = train_gpt.orthogonalize(G, 5)
    strong, weak = (why_muon.along(kept, G, 5, None) for kept in (slice(0, 6), slice(6, None)))
    torch.testing.assert_close(strong + weak, whole, rtol=0, atol=1e-4)
    U = np.linalg.svd(G[0].double().numpy())[0]
    left = np.linalg.norm(U.T @ strong[0].double().numpy(), axis=1)
    assert left[6:].max() < 1e-3 < 0.5 < left[:6].min()


def test_trains_and_measures_what_train_gpt_does(text, tmp_path, monkeypatch):
    """The same loss as train_gpt.py's run; before and after are what Newton-Schulz really had and gave."""
    options = [*SMALL, *text, "--normuon_beta2", "0"]
    assert train("tiny", *options, "--log_dir", tmp_path, "--run_id", "own") == 0
    calls = []

    def spy(G, *others):
        calls.append((G.clone(), train_gpt.orthogonalize(G, *others)))
        return calls[-1][1]

    monkeypatch.setattr(train_gpt.Muon, "orthogonalize", staticmethod(spy))
    c = train_gpt.make_config(train_gpt.parse_command_line(["tiny", *options]))
    with unchanged():
        found = why_muon.train("Muon", c, slice(None))
    assert math.isclose(found.val_loss, float(losses(tmp_path / "own")["val", 20]), abs_tol=2e-6)

    each_step = len(calls) // c.num_steps
    for kind, place, tolerance in (("before", 0, 1e-6), ("update", 1, 2e-3)):
        real = []
        for call in calls[-each_step:]:
            real += [np.linalg.svd(matrix.double().numpy(), compute_uv=False) for matrix in call[place]]
        measured = sorted(found.spectra[kind][20].values(), key=lambda values: tuple(values))
        for values, expected in zip(measured, sorted(real, key=lambda values: tuple(values)), strict=True):
            np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance * expected[0])
    before, after = found.gains[20]
    np.testing.assert_allclose(after, why_muon.newton_schulz(before, 5), rtol=0, atol=5e-3)


def test_one_command(text, tmp_path, capsys):
    """Pictures of 800 pixels, a page that needs no other file, and tables at the end."""
    with unchanged():
        assert why_muon.main([*SMALL, *text, "--num_steps", "10", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "why_muon.html").read_text()
    pictures = re.findall(r"src='([^']*)'", page)
    assert len(pictures) == 4 == len([*tmp_path.glob("*.png")])
    for picture in pictures:
        data = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).size[0] == 800
    output = capsys.readouterr().out
    rows = [line.split(" | ") for line in output.splitlines() if line.startswith("| Muon | ")]
    assert [row[1] for row in rows[:-1]] == [*why_muon.KINDS]
    assert all(f"| {run} | " in output and f"| {run} | " in page for run in why_muon.RUNS)


@pytest.mark.parametrize("options, named", [
    (["--data", "nowhere"], "--data nowhere: no row in *train_*.bin; run data/local_text.py"),
    (["--num_steps", "9", "--cooldown_steps", "4"], "--num_steps 9: give at least 10"),
    (["--lr", "0"], "--lr 0.0: give more than 0"),
    (["--matrix_optimizer", "adamw"], "--matrix_optimizer adamw: leave it out"),
    (["--out", __file__], f"{__file__}: File exists; give another --out"),
    (["--lr", "9e8"], "--lr 900000000.0: no gradient is left; lower it")])
def test_bad_input(text, options, named, capsys, tmp_path):
    with unchanged():
        assert why_muon.main(["--out", str(tmp_path), *SMALL, *text, *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {named}")
