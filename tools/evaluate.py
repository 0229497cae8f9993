#!/usr/bin/env python3
"""Scores a trained model: the loss of a run's checkpoint on any shards, and HellaSwag.

    python tools/evaluate.py logs/RUN                                # the run's own validation: its last val_loss again
    python tools/evaluate.py logs/RUN --shards 'second/*.bin'        # other shards of that folder
    python tools/evaluate.py logs/RUN --data data/novels --val_tokens 131072
    python tools/evaluate.py logs/RUN --hellaswag hellaswag_val.jsonl      # or Rowan/hellaswag, from the Hub

The loss is train_gpt.evaluate's: the mean over the tokens, in nats. bits_per_byte is the same sum of losses in bits,
over the bytes of those tokens; an end-of-text token has a loss and no bytes.

HellaSwag (Zellers et al. 2019, arXiv:1905.07830) asks which of four endings goes on with a text. The model chooses
the ending whose tokens have the largest sum of log-probabilities (acc), or the largest sum over the number of the
ending's characters (acc_norm). Texts are made as lm-evaluation-harness makes them: the activity and a colon before the
context, and no marks in brackets. Before the text stands an end-of-text token, as in training.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from runs import LogError, printable, read_log
from sample import ShardError, context, load_model, load_tokenizer

import train_gpt
from train_gpt import RunError, require

PUBLISHED = """published by others, of 124M parameters:
  GPT-2 itself: HellaSwag acc 0.2892, acc_norm 0.3114 by lm-evaluation-harness; acc 0.2859, acc_norm 0.2955 by token
    (karpathy/build-nanogpt, hellaswag.py); loss on llm.c's FineWeb validation 3.424958 (llm.c, dev/vislog.ipynb)
  llm.c's reproduction: loss on FineWeb's validation 3.2847 (modded-nanogpt's first README); small's target is 3.28"""


def make_run(model: train_gpt.GPT, c: train_gpt.Config, text: train_gpt.Rows) -> SimpleNamespace:
    """Returns what train_gpt.evaluate needs of a run, with the kernel and the micro-batch that training would take."""
    device = model.lm_head.weight.device
    size = train_gpt.micro_batch_rows(c, 2**20, device)     # the last rows may be fewer
    model.varlen = train_gpt.choose_attention(c, device) == "torch varlen_attn"
    model.most_documents = text.documents
    return SimpleNamespace(model=model, config=c, device=device, micro_batch=size,
                           validation_loss=train_gpt.validation_loss)


def bytes_of_targets(text: train_gpt.Rows, rows: int, tokenizer) -> int:
    """Returns the number of bytes of the tokens that evaluate predicts; an end-of-text token has none."""
    counts = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for row in range(rows):
        counts += np.bincount(text.read([row])[0, 1:].numpy(), minlength=tokenizer.n_vocab)
    sizes = [len(tokenizer.decode_bytes([token])) for token in range(tokenizer.n_vocab - 1)]
    return int(counts[:-1] @ np.array(sizes))


def score_shards(model, content: dict, args) -> None:
    """Prints the loss on the shards in nats a token, as perplexity and in bits a byte."""
    c = dataclasses.replace(model.config, data=args.data or model.config.data)
    wanted = max(1, (args.val_tokens or c.val_tokens) // c.seq_len)
    text = train_gpt.Rows(args.shards, c, wanted)
    rows = min(wanted, text.count)
    tokens = rows * c.seq_len
    loss = train_gpt.evaluate(make_run(model, c, text), text, range(rows))
    own = text.sha256 == content["sha256"].get("val")
    print(f"run: {args.run_folder}, step {content.get('step')} of {c.num_steps}")
    print(f"data: {c.folder}/{args.shards}, {tokens} tokens, "
          f"{'what the run validates on' if own else 'other than what the run validates on'}")
    print(f"val_loss: {loss:.6f}")
    try:
        losses = read_log(Path(args.run_folder)).losses["val"] if own and tokens == c.val_tokens else {}
    except LogError:
        losses = {}
    if content.get("step") in losses:
        print(f"val_loss_in_log: {losses[content['step']][1]:.6f}")
    print(f"perplexity: {math.exp(loss):.4f}")
    try:
        size = bytes_of_targets(text, rows, load_tokenizer(c))
        print(f"bits_per_byte: {loss * tokens / math.log(2) / size:.6f}", f"bytes: {size}", sep="\n")
    except (ShardError, RunError) as error:
        print(f"evaluate.py: no bits_per_byte: {printable(str(error))}", file=sys.stderr)


def load_questions(name: str) -> list[tuple[str, list[str], int]]:
    """Returns (text, endings, index of the right one) of each line of a file, or of a data set on the Hub."""
    try:
        if Path(name).exists():
            lines = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        else:
            import pyarrow.parquet
            from huggingface_hub import hf_hub_download
            path = hf_hub_download(name, "default/validation/0000.parquet", repo_type="dataset",
                                   revision="refs/convert/parquet")     # which the Hub makes of any data set
            lines = pyarrow.parquet.read_table(path).to_pylist()
        return [(question(line), [clean(ending) for ending in line["endings"]], int(line["label"])) for line in lines]
    except Exception as error:      # of the Hub's client, of pyarrow, and of a line of another form
        raise RunError(f"--hellaswag {name}: {type(error).__name__}: {str(error).splitlines()[0]}; give HellaSwag's "
                       "jsonl, each line with ctx, endings and label, or Rowan/hellaswag") from error


def question(line: dict) -> str:
    text = line["ctx"]
    if "activity_label" in line:     # the second sentence is a beginning, such as "he"
        text = f"{line['activity_label']}: {line['ctx_a']} {line['ctx_b'].capitalize()}"
    return clean(text)


def clean(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


@torch.no_grad()
def log_probabilities(model: train_gpt.GPT, start: list[int], endings: list[list[int]]) -> list[float]:
    """Returns the sum of the log-probabilities of each ending's tokens after `start`; one forward for all."""
    c, longest = model.config, max(map(len, endings))
    filled = [[*start, *ending, *[c.vocab_size - 1] * (longest - len(ending))] for ending in endings]
    tokens_BT = torch.tensor(filled, device=model.lm_head.weight.device)
    model.varlen = False
    x_BTD = model.hidden(tokens_BT[:, :-1], context(c))[:, len(start) - 1:]
    logs = model.logits(x_BTD).log_softmax(-1).gather(2, tokens_BT[:, len(start):, None])[..., 0]
    return [row[:len(ending)].double().sum().item() for row, ending in zip(logs, endings, strict=True)]


def score_hellaswag(model, questions: list) -> None:
    c, tokenizer, right, right_norm = model.config, load_tokenizer(model.config), 0, 0
    for number, (text, endings, label) in enumerate(questions, 1):
        start = [c.vocab_size - 1, *tokenizer.encode_ordinary(text)]
        sums = log_probabilities(model, start, [tokenizer.encode_ordinary(f" {ending}") for ending in endings])
        means = [total / max(1, len(ending)) for total, ending in zip(sums, endings, strict=True)]
        right += sums.index(max(sums)) == label
        right_norm += means.index(max(means)) == label
        if number % 100 == 0 or number == len(questions):
            end = "\n" if number == len(questions) else "\r"
            print(f"hellaswag: {number} of {len(questions)}", end=end, file=sys.stderr, flush=True)
    for name, share in (("acc", right / number), ("acc_norm", right_norm / number)):
        print(f"hellaswag_{name}: {share:.4f} +- {(share * (1 - share) / number) ** 0.5:.4f}")


def score(args) -> None:
    questions = load_questions(args.hellaswag)[:args.questions or None] if args.hellaswag else []
    require(questions or not args.hellaswag, f"--hellaswag {args.hellaswag}: no questions; give another file")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, content = load_model(args.run_folder, device)
    score_shards(model, content, args)
    if questions:
        score_hellaswag(model, questions)
    if model.config.track == "small":
        print(PUBLISHED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", metavar="RUN", help="folder with checkpoint.pt")
    parser.add_argument("--data", metavar="FOLDER", help="of the shards (default: the run's)")
    parser.add_argument("--shards", metavar="PATTERN", default="*val_*.bin", help="default: *val_*.bin")
    parser.add_argument("--val_tokens", type=int, metavar="N", help="most tokens (default: the run's)")
    parser.add_argument("--hellaswag", metavar="FILE", help="jsonl, or a data set of the Hub")
    parser.add_argument("--questions", type=int, metavar="N", help="only the first N")
    args = parser.parse_args()
    try:
        for name in ("val_tokens", "questions"):
            value = getattr(args, name)
            require(value is None or value > 0, f"--{name} {value}: give 1 or more")
        score(args)
    except (RunError, ShardError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
