#!/usr/bin/env python3
"""Writes text with a trained model: a run's checkpoint, on a CPU or a GPU.

    python tools/sample.py logs/RUN --prompt "def main"              # 200 tokens after the prompt, as they come
    python tools/sample.py logs/RUN --samples 3 --temperature 0.8 --top_k 50 --top_p 0.95 --seed 1
    python tools/sample.py logs/RUN --interactive                    # asks for a prompt again and again

The model is built from the Config in the checkpoint, by today's train_gpt.py: no code of a checkpoint runs. Keys and
values of the tokens so far are kept, so that a new token costs one token's forward. A token sees what it sees in
validation, and no more than the last --seq_len tokens. --temperature 0 takes the most likely token each time.
"""

import argparse
import codecs
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from runs import ROOT, printable

sys.path.append(str(ROOT / "data"))
from shards import BYTES_VOCAB_SIZE, GPT2_VOCAB_SIZE, ShardError, load_bpe

import train_gpt
from train_gpt import RunError, require


def load_model(folder: str | Path, device: torch.device) -> tuple[train_gpt.GPT, dict]:
    """Returns the model of FOLDER/checkpoint.pt, for evaluation, and the checkpoint's content.

    Raises RunError where the file is missing, damaged, or of another version or architecture. Says on stderr where
    the run's train_gpt.py was not today's.
    """
    path = Path(folder, "checkpoint.pt")
    try:
        content = train_gpt.load_checkpoint(str(folder))
        require(all(isinstance(content.get(part), dict) for part in ("config", "model", "sha256")),
                f"{path}: not a checkpoint of train_gpt.py; give a run's folder")
        odd = content["config"].keys() ^ vars(train_gpt.Config()).keys()
        require(not odd, f"{path}: of another version, whose Config differs in {', '.join(sorted(map(str, odd)))}; "
                "use the train_gpt.py that its log.txt begins with")
        model = train_gpt.GPT(train_gpt.make_config(dict(resume=str(folder), run_id=""), content["config"]))
    except RunError as error:
        raise RunError(str(error).removeprefix("--resume ").splitlines()[0]) from None
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: of another architecture than its Config: {str(error).splitlines()[-1].strip()}; "
                       "use the train_gpt.py that its log.txt begins with") from None
    log, today = Path(folder, "log.txt"), hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    sources = re.findall(r"^source: sha256 (\w+)", log.read_text(errors="replace"), re.M) if log.exists() else []
    if sources[-1:] != [today]:
        print(f"{path}: of train_gpt.py {(sources or ['unknown'])[-1][:12]}, read by today's, {today[:12]}",
              file=sys.stderr)
    return model.to(device).eval(), content


class Bytes:
    """The tokenizer of text in bytes: a token is a byte, and the last the end of a text."""
    n_vocab = BYTES_VOCAB_SIZE
    encode_ordinary = staticmethod(lambda text: list(text.encode("utf-8", "replace")))
    decode_bytes = staticmethod(lambda tokens: bytes(token for token in tokens if token < 256))


def load_tokenizer(c: train_gpt.Config):
    """Returns what has n_vocab, encode_ordinary(text) and decode_bytes(tokens), for the vocabulary of the run's data.

    Bytes, GPT-2's BPE, or the bpe.tiktoken beside the shards. Raises ShardError where that cannot be read.
    """
    if c.vocab_size == BYTES_VOCAB_SIZE:
        return Bytes()
    path = c.folder / "bpe.tiktoken"
    tokenizer = load_bpe("gpt2" if c.vocab_size == GPT2_VOCAB_SIZE else str(path))
    require(tokenizer.n_vocab == c.vocab_size, f"{path}: {tokenizer.n_vocab} tokens; the run has {c.vocab_size}")
    return tokenizer


def context(c: train_gpt.Config) -> int:
    """Returns the window for text of any length. With validation's 0, which is the whole row for each layer, it is a
    row of training; it counts for the long layers, and the short ones see half of it."""
    return c.val_window or c.seq_len * (2 if "S" in c.windows else 1)


def choose(logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draws a token by its probability; top_k (0: off) and top_p (1: off; Holtzman et al. 2020, arXiv:1904.09751)
    leave the most likely ones alone: so many of them, or the fewest that have that probability together."""
    if temperature == 0:
        return int(logits_V.argmax())
    scores = (logits_V - logits_V.max()).double() / temperature
    probabilities, tokens = scores.softmax(-1).cpu().sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities     # of those more likely
    probabilities[before >= top_p] = 0.0
    if top_k:
        probabilities[top_k:] = 0.0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate(model: train_gpt.GPT, tokens: list[int], count: int, draw) -> Iterator[int]:
    """Yields `count` tokens after `tokens`; `draw` takes logits (V,) of the vocabulary and returns a token."""
    c, device = model.config, model.lm_head.weight.device
    none = torch.empty(1, 0, c.num_heads, c.head_dim, device=device, dtype=getattr(torch, c.dtype))
    past, model.varlen = [[none, none] for _ in model.blocks], False
    for _ in range(count):
        x_BTD = model.hidden(torch.tensor([tokens], device=device), context(c), past)
        tokens = [*tokens, draw(model.logits(x_BTD[:, -1:])[0, 0, :c.vocab_size])]
        yield tokens[-1]


def write(model, tokenizer, prompt: str, args, generator: torch.Generator) -> None:
    """Prints the prompt and what follows, as soon as its characters are whole, to the end of the text."""
    c, decoder = model.config, codecs.getincrementaldecoder("utf-8")("replace")
    start = [c.vocab_size - 1, *tokenizer.encode_ordinary(prompt)]     # the end-of-text token begins a text
    print(printable(prompt), end="", flush=True)
    for token in generate(model, start, args.tokens,
                          lambda logits: choose(logits, args.temperature, args.top_k, args.top_p, generator)):
        if token == c.vocab_size - 1:
            break
        print(printable(decoder.decode(tokenizer.decode_bytes([token]))), end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)


def write_samples(args) -> None:
    limits = dict(tokens=(1, 10**6), samples=(1, 10**6), temperature=(0, 100), top_k=(0, 10**6), top_p=(1e-9, 1))
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        require(low <= value <= high, f"--{name} {value}: give {low} to {high}")
    model = load_model(args.run_folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))[0]
    for part in model.modules():
        if isinstance(part, train_gpt.Linear):
            part.to(getattr(torch, model.config.dtype))     # once, and not for each token
    tokenizer, generator = load_tokenizer(model.config), torch.Generator().manual_seed(args.seed)
    while True:
        prompt = input("prompt: ") if args.interactive else args.prompt
        for i in range(args.samples):
            if args.samples > 1:
                print(f"---- sample {i + 1} of {args.samples}")
            write(model, tokenizer, prompt, args, generator)
        if not args.interactive:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", metavar="RUN", help="folder with checkpoint.pt")
    parser.add_argument("--prompt", default="", help="text to go on with (default: none)")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts, to the end of the input")
    for name, default, text in [("tokens", 200, "most tokens of a sample"), ("samples", 1, "how many"),
                                ("temperature", 0.8, "0: the most likely token"), ("top_k", 0, "0: off"),
                                ("top_p", 1.0, "1: off"), ("seed", 0, "of the draws")]:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        write_samples(parser.parse_args())
    except (EOFError, KeyboardInterrupt):
        print()
    except BrokenPipeError:     # the reader, such as `head`, has enough
        os._exit(0)
    except (RunError, ShardError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
