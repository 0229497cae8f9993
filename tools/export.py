#!/usr/bin/env python3
"""Writes a run's model for others to use: safetensors, and a folder that the package transformers loads.

    python tools/export.py logs/RUN --out FOLDER
    python tools/export.py logs/RUN --out FOLDER --push NAME/REPO     # and uploads it, as whom HF_TOKEN says

Then, on any machine with torch 2.11 and transformers, without this repository:

    from transformers import pipeline
    print(pipeline("text-generation", "FOLDER", trust_remote_code=True)("def main"))

The folder has the weights under the names of train_gpt.GPT, the Config, the tokenizer, train_gpt.py with a thin class
around it, and a model card of what the log says. Neither the data's place nor the name of the machine is in it.
"""

import argparse
import hashlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch
from runs import ROOT, LogError, Run, read_log, tokens_until
from safetensors.torch import save_file
from sample import load_model, load_tokenizer
from shards import ShardError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import train_gpt

END_OF_TEXT = "<|endoftext|>"
OWN = train_gpt.RESUME_MAY_CHANGE     # fields that name places, and no part of the model
CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT with {parameters:,} parameters, trained by train_gpt.py of GPT Speedrun. {source}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{repository}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repository}", trust_remote_code=True)
tokens = model.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=100, do_sample=True)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

It needs torch 2.11 or newer. The tokenizer puts `{end}` before a text, as in training. A token sees at most {window}
tokens back. The table of hashed n-grams, where there is one, does not learn under transformers.

| | |
|---|---|
{table}

The command, where DATA is a folder of shards with these sha256:

```bash
{command}
```

The license is that of the code; it does not speak of the text that the model was trained on.
"""


# The tokenizer.

def byte_characters() -> list[str]:
    """Returns the character that stands for each byte in the vocabulary of a byte-level BPE, as GPT-2 has it.

    Visible characters of Latin-1 stand for themselves, the other bytes in turn for those from 256 on.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Returns the two parts whose merge is the token: what BPE makes of it with the tokens of lower rank.

    Fewer or more than two where the token is no merge: a single byte, or one that no text leads to.
    """
    found = [token[i:i + 1] for i in range(len(token))]
    while len(found) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(found, found[1:], strict=False)]
        best = min(pairs)
        if best >= ranks[token]:
            break
        i = pairs.index(best)
        found[i:i + 2] = [found[i] + found[i + 1]]
    return found


def convert_tokenizer(tokens: list[bytes]) -> Tokenizer:
    """Returns the tokenizer of these tokens, by rank, and last the end of text, which it puts before each text.

    Its ids are tiktoken's, which merges by rank alone: the merges that `tokenizers` asks for follow from the ranks.
    Bytes have none.
    """
    ranks, characters = {token: rank for rank, token in enumerate(tokens)}, byte_characters()
    names = {token: "".join(characters[byte] for byte in token) for token in tokens}
    pairs = [parts(token, ranks) for token in tokens]
    merges = [(names[pair[0]], names[pair[1]]) for pair in pairs if len(pair) == 2]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}

    # A word that is a token needs no merges, as in tiktoken.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)     # GPT-2's split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, len(tokens))])
    return tokenizer


def tokens_of(c: train_gpt.Config) -> list[bytes]:
    """Returns the tokens of the run's vocabulary but the last; raises where the tokenizer found is of another size."""
    tokenizer = load_tokenizer(c)
    size = getattr(tokenizer, "n_vocab", c.vocab_size)
    train_gpt.require(size == c.vocab_size, f"{c.data}/bpe.tiktoken: {size} tokens; give the run's, of {c.vocab_size}")
    return [tokenizer.decode_bytes([token]) for token in range(c.vocab_size - 1)]


# The model card.

def facts(run: Run, content: dict) -> dict[str, str]:
    """Returns what is known of the run of a checkpoint; a loss only where it was measured at the checkpoint's step."""
    step, of = content["step"], run.num_steps
    _, loss = run.losses["val"].get(step, (None, None))
    known = {"run": run.name, "steps": f"{step:,} of {of:,}", "tokens": f"{tokens_until(run.config, step):,}"}
    known["validation loss, nats a token"] = f"not measured at step {step}" if loss is None else f"{loss:.6f}"
    if step == of:     # what the summary says holds for the last step
        shown = {"target": "target", "target_reached": "target reached", "second_loss": "loss on a second text"}
        known |= {title: run.summary.get(name) for name, title in shown.items()}
    known |= {"seconds of training": f"{content['seconds']:.3f}", "hardware": run.hardware, "versions": run.versions,
              "sha256 of the training data": run.train_sha256, "of the validation data": run.val_sha256,
              "of train_gpt.py": run.source_sha256, "git": run.git}
    return {title: str(value) for title, value in known.items() if value not in (None, "nan")}


def command(c: train_gpt.Config, processes: int) -> str:
    """Returns the command line that trains such a model."""
    preset = train_gpt.Config(track=c.track, **train_gpt.TRACKS.get(c.track, {}))
    changed = {name: value for name, value in vars(c).items() if name not in OWN and value != getattr(preset, name)}
    options = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    launch = ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    return shlex.join([*launch, "train_gpt.py", c.track, "--data", "DATA", *options])


def card(model: train_gpt.GPT, run: Run, content: dict, repository: str) -> str:
    """Returns the text of the model card."""
    c, table = model.config, [f"| {name} | {value} |" for name, value in facts(run, content).items()]
    today = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    version = "that of the run" if run.source_sha256 == today else "another version, which reads its weights"
    return CARD.format(
        name=repository.split("/")[-1], repository=repository, end=END_OF_TEXT, window=c.val_window or c.seq_len,
        source=f"The one in this folder is {version}.",
        parameters=sum(p.numel() for p in model.parameters()), command=command(c, run.world_size or 1),
        table="\n".join(table))


# The folder.

def write(folder: Path, model: train_gpt.GPT, tokenizer: Tokenizer, text: str) -> None:
    """Writes all files of the export into the folder, which it makes."""
    c, end = model.config, model.config.vocab_size - 1
    module, class_name = "modeling_gpt_speedrun", "GPTSpeedrunForCausalLM"
    ids = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    contents = {
        "config.json": dict(
            model_type="gpt_speedrun", architectures=[class_name], dtype="float32", **ids,
            vocab_size=c.vocab_size, hidden_size=c.model_dim, num_hidden_layers=c.num_layers,
            auto_map=dict(AutoConfig=f"{module}.GPTSpeedrunConfig", AutoModelForCausalLM=f"{module}.{class_name}"),
            train_gpt={name: value for name, value in vars(c).items() if name not in OWN}),
        "generation_config.json": dict(**ids, use_cache=False),     # the class keeps its own
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT, padding_side="left", model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for source in ("tools/modeling_gpt_speedrun.py", "train_gpt.py", "LICENSE"):
        shutil.copyfile(ROOT / source, folder / Path(source).name)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(text, encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors", metadata=dict(format="pt"))


def push(folder: Path, repository: str) -> str:
    """Uploads the folder as a model of the hub, and returns the address of that commit."""
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(repository, exist_ok=True)
        done = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of a run")
        return done.commit_url
    except Exception as error:     # of the client's HTTP library, too: no list is complete
        cause = str(error).strip().splitlines()[0]
        raise train_gpt.RunError(f"--push {repository}: {cause}; {folder} is whole: mend that, then hf upload "
                                 f"{repository} {folder}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder with checkpoint.pt and log.txt")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="new or empty folder")
    parser.add_argument("--push", metavar="REPO", help="also upload to this model of the Hugging Face hub, NAME/REPO")
    args = parser.parse_args()
    try:
        empty = not args.out.exists() or args.out.is_dir() and not any(args.out.iterdir())
        train_gpt.require(empty, f"--out {args.out}: is there and not an empty folder; give another")
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", args.push or "NAME/REPO")
        train_gpt.require(named, f"--push {args.push}: give NAME/REPO, where NAME is yours at the hub")
        model, content = load_model(args.run_folder, torch.device("cpu"))
        run = read_log(args.run_folder)
        tokenizer = convert_tokenizer(tokens_of(model.config))
        write(args.out, model, tokenizer, card(model, run, content, args.push or args.out.name))
        print(f"{args.out}: written")
        if args.push:
            print(f"{push(args.out, args.push)}: uploaded")
    except (train_gpt.RunError, ShardError, LogError, OSError) as error:
        # torch.load's errors have many lines, and train_gpt.py speaks of its own option.
        print("error:", " ".join(str(error).split()).removeprefix("--resume "), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
