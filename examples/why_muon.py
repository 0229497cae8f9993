#!/usr/bin/env python3
"""Why Muon works: the singular values of its updates, measured in real runs of `tiny`.

    python examples/why_muon.py                     # four runs, on 2 cores
    python examples/why_muon.py --num_steps 100     # and options of train_gpt.py, for all runs

A matrix is a sum of directions: pairs of a left and a right singular vector, each times its
singular value. Muon keeps the directions of the momentum and brings their singular values to
about 1 (Newton-Schulz; Jordan et al. 2024, kellerjordan.github.io/posts/muon). A tutorial (Wei
2025, huggingface.co/datasets/bird-of-paradise/muon-tutorial) gives as the reason that the usual
update of a 256 x 128 matrix uses "10-20" of its 128 directions, so that the rest is wasted.

This program trains `tiny`, whose matrices have 128 directions each, with four optimizers of the
matrices: AdamW, Muon, and Muon along the 16 strongest directions alone or along all but these.
At some steps it takes each matrix apart:

    gradient          of the step's batch
    momentum          running mean of the gradients (Adam's first moment)
    before            Muon's momentum with Nesterov's look-ahead, which goes into Newton-Schulz
    update            what the step took from the weight, over the learning rate and Muon's scale
    all updates       what all steps until then took from the weight

It writes four pictures and one page with all of them, why_muon.html. The last lines are tables.
"""

import argparse
import base64
import io
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

# Plain Muon: the preset has NorMuon, which changes the update once more. AdamW's rate is the
# best of those in records/examples/why_muon.txt.
ADAMW = dict(matrix_optimizer="adamw", normuon_beta2=0.0, matrix_lr_ratio=0.5)
MUON = dict(matrix_optimizer="muon", normuon_beta2=0.0)
STRONG = 16  # directions
RUNS = {  # name: fields of Config, and the directions that an update keeps
    "AdamW": (ADAMW, slice(None)),
    "Muon": (MUON, slice(None)),
    f"Muon, {STRONG} strongest": (MUON, slice(0, STRONG)),
    "Muon, all but these": (MUON, slice(STRONG, None))}
KINDS = ("gradient", "momentum", "before", "update", "all updates")
# In the first two steps lm_head and the projections are still zero, and so are gradients.
WATCHED = (3, 5, 10, 20, 50, 100, 150, 200, 250, 300)  # steps, and the last
SHOWN = (3, 10, 50, 150)  # steps whose spectra are drawn, and the last
CLAIM = (10, 20)  # directions, by the tutorial
SAID = "{} to {}".format(*CLAIM)
SHARES = (0.9, 0.99)  # of the squared norm
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # colour-blind safe: Okabe and Ito, 2008


# ==== What is measured ============================================================

def singular_values(matrix: torch.Tensor) -> np.ndarray:
    """The singular values of an m x n matrix, float64 (min(m, n),), the largest first."""
    return torch.linalg.svdvals(matrix.double()).numpy()


def effective_rank(values: np.ndarray) -> float:
    """How many directions a matrix with these singular values uses: exp(H), from 1 to their number.

    H is the entropy of the shares values / sum(values) (Roy and Vetterli 2007, "The effective
    rank: a measure of effective dimensionality"). n equal values give n. Not all may be zero.
    """
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def directions(values: np.ndarray, share: float) -> int:
    """How many of the largest singular values carry `share` (0 to 1) of the squared norm."""
    carried = np.cumsum(np.sort(values)[::-1] ** 2)
    return int(np.searchsorted(carried, share * carried[-1] * (1 - 1e-12))) + 1


def newton_schulz(x: np.ndarray, steps: int) -> np.ndarray:
    """What `steps` of Newton-Schulz make of singular values x in [0, 1]: the scalar polynomial."""
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


# ==== Training ====================================================================

def along(kept: slice, G_kmn: torch.Tensor, steps: int, dtype) -> torch.Tensor:
    """Muon's orthogonalization of matrices with m <= n, along the `kept` directions alone.

    The strongest is number 0. The left singular vectors are the eigenvectors of G G'.
    """
    G = G_kmn.float()
    U_kmm = torch.linalg.eigh(G @ G.mT).eigenvectors.flip(-1)[..., kept]
    update = train_gpt.orthogonalize(G_kmn, steps, dtype)
    return (U_kmm @ (U_kmm.mT @ update.float())).to(update.dtype)


def matrix_groups(optimizer) -> list[tuple]:
    """Rows of group, name and parameter, one for each matrix of the blocks."""
    rows = []
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if name.startswith("blocks.") and p.ndim == 2:
                rows.append((group, name.removeprefix("blocks.").removesuffix(".weight"), p))
    return rows


@torch.no_grad()
def take_apart(optimizer, first: dict, before: dict) -> dict:
    """Returns {kind: {name: matrix}} after a step; first and before hold earlier weights."""
    found = {kind: {} for kind in KINDS}
    for group, name, p in matrix_groups(optimizer):
        state, rate = optimizer.state[p], group["lr"]
        found["gradient"][name] = p.grad
        if "momentum_buffer" in state:  # Muon's
            momentum, look_ahead = state["momentum_buffer"], group["nesterov"]
            v = p.grad.lerp(momentum, group["momentum"]) if look_ahead else momentum
            found["before"][name] = v
            scale = train_gpt.UPDATE_SCALES[group["update_scale"]][0]
            rate *= scale(*p.shape)
        else:
            momentum = state["exp_avg"]
        found["momentum"][name] = momentum
        found["update"][name] = (before[name] - p) / rate
        found["all updates"][name] = first[name] - p
    return found


def gains(before: torch.Tensor, update: torch.Tensor) -> np.ndarray:
    """Returns two rows: the singular values over the Frobenius norm before Newton-Schulz, and
    the length of the update along each of these directions, which is what became of them."""
    U, S, Vh = torch.linalg.svd(before.double(), full_matrices=False)
    after = (U.mT @ update.double() * Vh).sum(1)
    return torch.stack([S / S.norm(), after]).numpy()


def train(name: str, c: train_gpt.Config, kept: slice) -> SimpleNamespace:
    """Trains as train_gpt.py does, in one process on the CPU, and measures at WATCHED steps.

    Returns spectra, {kind: {step: {matrix: singular values}}} without the matrices of zeros;
    gains, {step: 2 x n array} of all matrices; val_loss in nats; and seconds of the CPU.
    """
    started, device = time.process_time(), torch.device("cpu")
    sizes = [train_gpt.batch_rows(c, step) for step in range(c.num_steps)]
    starts = np.cumsum([0, *sizes]).tolist()
    at_once = train_gpt.micro_batch_rows(c, math.gcd(*sizes), device)
    cut = min(c.document_tokens, c.seq_len) or None
    text = train_gpt.Rows("*train_*.bin", c, starts[-1], cut)
    val_text = train_gpt.Rows("*val_*.bin", c, c.val_tokens // c.seq_len)

    torch.manual_seed(c.seed)
    model = train_gpt.GPT(c).initialize()
    optimizers, _ = train_gpt.make_optimizers(model, c)
    optimizer = optimizers[c.matrix_optimizer]
    if kept != slice(None):
        optimizer.orthogonalize = partial(along, kept)
    watched = {*WATCHED, c.num_steps}
    found = SimpleNamespace(spectra={kind: {} for kind in KINDS}, gains={})
    first = {name: p.detach().clone() for _, name, p in matrix_groups(optimizer)}

    loader = train_gpt.load_batches(text, starts, c.seed, device)
    for step, tokens in enumerate(loader, 1):
        window = train_gpt.stage(c, step - 1)[1]
        loss = train_gpt.accumulate_gradients(model, tokens, at_once, window)
        train_gpt.require(loss.isfinite(), f"--lr {c.lr}: loss {loss:g} at step {step}; lower it")
        train_gpt.set_schedules(optimizers, c, step - 1)
        before = {name: p.detach().clone() for _, name, p in matrix_groups(optimizer)}
        for each in optimizers.values():
            each.step()
        if step in watched:
            print(f"{name}: step {step}/{c.num_steps}, training loss {loss:.4f}", flush=True)
            record(found, step, take_apart(optimizer, first, before))

    train_gpt.require(found.spectra["gradient"], f"--lr {c.lr}: no gradient is left; lower it")
    run = SimpleNamespace(model=model, config=c, device=device, micro_batch=at_once,
                          validation_loss=train_gpt.validation_loss)
    rows = range(min(val_text.count, c.val_tokens // c.seq_len))
    found.val_loss = train_gpt.evaluate(run, val_text, rows)
    found.seconds = time.process_time() - started
    return found


def record(found: SimpleNamespace, step: int, matrices: dict) -> None:
    """Adds the singular values of take_apart's matrices to found.spectra and found.gains."""
    for kind in KINDS:
        for name, matrix in matrices[kind].items():
            if matrix.any():
                values = singular_values(matrix)
                found.spectra[kind].setdefault(step, {})[name] = values
    pairs = []
    for name, matrix in matrices["before"].items():
        if matrix.any():
            pairs.append(gains(matrix, matrices["update"][name]))
    if pairs:
        found.gains[step] = np.hstack(pairs)


# ==== Pictures ====================================================================
# 800 pixels wide.
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 100, "font.size": 9.5, "axes.titlesize": 10,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def draw_polynomial(muon: SimpleNamespace) -> Figure:
    """The polynomial of Newton-Schulz and its iterates, and what they did in the run."""
    figure = Figure((8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.linspace(0, 1, 2001)
    for steps in range(1, 6):
        look = dict(color=matplotlib.colormaps["viridis"](1.1 - steps / 5), linewidth=1 + steps / 5)
        left.plot(x, newton_schulz(x, steps), label=f"{steps}", **look)
    left.legend(title="iterations", ncols=5, loc="upper center", columnspacing=0.8, handlelength=1)
    left.set(title="p(x) = 3.4445 x - 4.7750 x³ + 2.0315 x⁵, iterated", ylim=(-0.05, 1.7),
             xlabel="singular value / Frobenius norm, before", ylabel="singular value, after")

    step = min(muon.gains, key=lambda step: abs(step - 150))
    before, after = muon.gains[step]
    x = np.geomspace(1e-5, 1, 2001)
    right.plot(x, newton_schulz(x, 5), color="black", linewidth=0.8, label="5 iterations of p")
    right.plot(before, after, ".", markersize=3, color=COLORS[1], alpha=0.6,
               label=f"measured at step {step}")
    right.plot(x, x, color="black", linewidth=1, linestyle=":", label="unchanged")
    right.set(title="all directions of all matrices in the run", xscale="log", xlim=(1e-5, 1),
              ylim=(-0.05, 1.7), xlabel="singular value / Frobenius norm, before (log)")
    right.legend(loc="upper left", markerscale=3)
    return figure


def draw_spectra(runs: dict) -> Figure:
    """The singular values of one matrix, the last of the model, at some steps."""
    figure = Figure((8, 5.4), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    titles = dict(gradient="gradient", momentum="momentum",
                  before="before\nNewton-Schulz", update="update")
    for run, row in zip(("AdamW", "Muon"), axes, strict=True):
        for axis, kind in zip(row, titles, strict=True):
            axis.set_title(f"{run}: {titles[kind]}")
            spectra = runs[run].spectra[kind]
            for step in [step for step in spectra if step in SHOWN or step == max(spectra)]:
                name, values = list(spectra[step].items())[-1]
                color = matplotlib.colormaps["viridis"](0.9 * math.log(step, max(spectra)))
                axis.plot(np.arange(len(values)) + 1, values / values[0], color=color, label=step)
    axes[0, 0].set(yscale="log", ylim=(1e-4, 1.5))
    axes[0, 2].set_axis_off()  # AdamW has no Newton-Schulz
    axes[0, 2].set_title("")
    axes[0, 2].legend(*axes[0, 0].get_legend_handles_labels(), title="step", loc="center")
    figure.supxlabel(f"direction of {name}, {len(values)} in all, the strongest first", fontsize=10)
    figure.supylabel("singular value / largest (log)", fontsize=10)
    return figure


def draw_ranks(runs: dict) -> Figure:
    """Effective rank over training: median and range over the matrices."""
    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    kinds = [kind for kind in KINDS if kind != "before"]
    for axis, run in zip(axes, ("AdamW", "Muon"), strict=True):
        for kind, color in zip(kinds, COLORS, strict=True):
            rows = []
            for step, spectra in runs[run].spectra[kind].items():
                ranks = [effective_rank(values) for values in spectra.values()]
                rows.append((step, np.median(ranks), min(ranks), max(ranks)))
            steps, median, low, high = np.transpose(rows)
            axis.plot(steps, median, color=color, marker=".", label=kind)
            axis.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set(title=f"matrices by {run}", xlabel="step")
    axes[0].set(ylabel="effective rank, exp(entropy)\n(directions)", ylim=(0, None))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4,
                  title="line: median of the matrices; band: all of them")
    return figure


def draw_directions(runs: dict) -> Figure:
    """How many directions carry most of the momentum of each matrix, over the steps."""
    figure = Figure((8, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, run in zip(axes, ("AdamW", "Muon"), strict=True):
        spectra = list(runs[run].spectra["momentum"].values())
        names = sorted(spectra[-1])
        for share, color, shift in zip(SHARES, COLORS, (0.15, -0.15), strict=False):
            for place, name in enumerate(reversed(names)):
                counts = [directions(found[name], share) for found in spectra if name in found]
                label = f"{share:.0%} of the squared norm" if place == 0 else None
                axis.plot([min(counts), max(counts)], [place + shift] * 2, color=color, linewidth=3,
                          solid_capstyle="butt", alpha=0.5, label=label)
                axis.plot(np.median(counts), place + shift, "o", color=color, markersize=5)
        axis.axvspan(*CLAIM, color="black", alpha=0.12, linewidth=0, label=f"the tutorial's {SAID}")
        axis.set(title=f"momentum, matrices by {run}", yticks=range(len(names)),
                 yticklabels=names[::-1], xlabel=f"directions, of {len(spectra[-1][name])}")
    axes[0].set_xlim(0, None)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3,
                  title="dot: median of the steps; bar: all of them")
    return figure


# ==== Tables and the page =========================================================

def spread(values: list) -> str:
    return f"{np.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def spectra_table(runs: dict) -> str:
    """A row for each run and kind: medians, and the ranges over all matrices and steps."""
    heads = ["run", "what", "effective rank"]
    for share in SHARES:
        heads += [f"directions of {share:.0%}", f"in {SAID}"]
    rows = [heads, ["---"] * len(heads)]
    for run, found in runs.items():
        for kind, steps in found.spectra.items():
            if steps:
                values = []
                for spectra in steps.values():
                    values += spectra.values()
                rows.append([run, kind, *figures_of(values)])
    size = len(values[0])
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    rows.append(["random numbers", f"{size} x {size}", *figures_of([singular_values(noise)])])
    return table(rows)


def figures_of(spectra: list[np.ndarray]) -> list[str]:
    """Effective rank, and for each of SHARES the directions that carry it, and how many spectra
    have them within the tutorial's claim."""
    cells = [spread([effective_rank(values) for values in spectra])]
    for share in SHARES:
        counts = np.array([directions(values, share) for values in spectra])
        within = (counts >= CLAIM[0]) & (counts <= CLAIM[1])
        cells += [spread(counts), f"{within.mean():.0%}"]
    return cells


def loss_table(runs: dict) -> str:
    rows = [["run", "validation loss (nats)", "CPU seconds, with measuring"],
            ["---"] * 3]
    for run, found in runs.items():
        rows.append([run, f"{found.val_loss:.4f}", f"{found.seconds:.0f}"])
    return table(rows)


def table(rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


CAPTIONS = dict(
    polynomial="""Newton-Schulz divides a matrix by its Frobenius norm, so that its singular values
        are at most 1, and applies the polynomial p to each, five times. Left: after one to five
        iterations all but the smallest lie near 1. Right: the same curve over the logarithm, and
        what the run measured.""",
    spectra="""Singular values of one matrix, over the largest of them. A line that falls steeply
        is a matrix in which few directions dominate; a flat line uses all of them alike.""",
    rank="""Effective rank of all matrices over training. It counts directions, not what they are
        worth: random numbers have a high one, too.""",
    directions="""The tutorial's claim, measured: how many of the strongest directions carry 90% and
        99% of the squared norm of the momentum, in each matrix.""")


def html(figures: dict, texts: list[str]) -> str:
    """One page that needs no other file."""
    page = ["<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>Why Muon works</title>",
            "<style>body { max-width: 820px; margin: 2em auto; font-family: sans-serif; } "
            "pre { overflow-x: auto; font-size: 12px; }</style>",
            f"<h1>Why Muon works</h1><pre>{__doc__.strip()}</pre>"]
    for name, file in figures.items():
        data = base64.b64encode(file.read_bytes()).decode()
        page.append(f"<h2>{name}</h2><p>{CAPTIONS[name]}</p>"
                    f"<img width='800' alt='{name}' src='data:image/png;base64,{data}'>")
    page += [f"<pre>{text}</pre>" for text in texts]
    return "\n".join(page)


@matplotlib.rc_context(STYLE)
def write(folder: Path, runs: dict, texts: list[str]) -> None:
    """Draws the pictures into the folder, and the page with them."""
    figures = dict(polynomial=draw_polynomial(runs["Muon"]), spectra=draw_spectra(runs),
                   rank=draw_ranks(runs), directions=draw_directions(runs))
    files = {}
    for name, figure in figures.items():
        files[name] = folder / f"why_muon_{name}.png"
        data = io.BytesIO()
        figure.savefig(data, format="png")
        # 256 colours take half the space.
        Image.open(data).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(files[name])
    (folder / "why_muon.html").write_text(html(files, texts), encoding="utf-8")


# ==== The program =================================================================

def configurations(options: list[str]) -> dict:
    """Returns {run: Config}; the options of train_gpt.py change all runs."""
    given = train_gpt.parse_command_line(["tiny", *options])
    for name in ("matrix_optimizer", "normuon_beta2", "resume"):
        train_gpt.require(name not in given, f"--{name} {given.get(name)}: leave it out")
    dtype = "bfloat16" if train_gpt.has_bf16_units(torch.device("cpu")) else "float32"
    given = dict(dtype=dtype, val_tokens=2**18, num_steps=330, cooldown_steps=250) | given
    configs = {run: train_gpt.make_config(given | fields) for run, (fields, _) in RUNS.items()}
    c = configs["Muon"]
    train_gpt.require(c.lr > 0, f"--lr {c.lr}: give more than 0")
    train_gpt.require(c.num_steps >= 10, f"--num_steps {c.num_steps}: give at least 10")
    return configs


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, usage="why_muon.py [--out FOLDER] [--field value ...]")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "out", metavar="FOLDER",
                        help="of the pictures and the page [examples/out]")
    own, options = parser.parse_known_args(arguments)
    try:
        configs = configurations(options)
        own.out.mkdir(parents=True, exist_ok=True)
        runs = {}
        for run, c in configs.items():
            runs[run] = train(run, c, RUNS[run][1])
        texts = [spectra_table(runs), loss_table(runs)]
        write(own.out, runs, texts)
    except train_gpt.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; give another --out", file=sys.stderr)
        return 2
    hardware = train_gpt.describe_hardware(torch.device("cpu"))
    print(f"\npictures: {own.out}/why_muon.html")
    print(f"torch {torch.__version__}, {hardware}, {c.dtype}", *texts, sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
