"""A model of train_gpt.py for the package transformers: tools/export.py puts this file and train_gpt.py beside weights.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Forward and weights are those of train_gpt.GPT, so there is no second model to drift from it.
"""

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .train_gpt import GPT, Config


class GPTSpeedrunConfig(PretrainedConfig):
    """train_gpt: fields of train_gpt.Config as a dict; those left out have its defaults."""
    model_type = "gpt_speedrun"

    def __init__(self, train_gpt: dict | None = None, **others):
        self.train_gpt = train_gpt or {}
        super().__init__(**others)


class GPTSpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    """train_gpt.GPT with the interface of transformers. The table of n-grams does not learn here."""
    config_class = GPTSpeedrunConfig
    base_model_prefix = "gpt"     # the weights have GPT's names, without it

    def __init__(self, config: GPTSpeedrunConfig):
        super().__init__(config)
        self.gpt = GPT(Config(**config.train_gpt))
        self.post_init()

    def _init_weights(self, module):
        """All weights are in the file."""

    def get_input_embeddings(self):
        return self.gpt.embed

    def forward(self, input_ids, attention_mask=None, labels=None, past: list | None = None, **_):
        """Takes input_ids (B, T) and returns logits (B, T, V), and with labels (B, T) the loss, in nats a token.

        The labels are input_ids again, or -100 where no loss counts. attention_mask (B, T) is 0 at padding, on
        either side. past: as GPT.hidden takes it; the logits are then those of the new tokens alone, (B, new, V).
        """
        c = self.gpt.config
        places = torch.arange(input_ids.size(1), device=input_ids.device)
        if attention_mask is not None:
            # Padding goes to the end of a row, where nothing that comes before it sees it.
            left = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
            input_ids = input_ids.gather(1, (places + left) % len(places))
        x_BTD = self.gpt.hidden(input_ids, c.val_window or c.seq_len, past)
        if attention_mask is not None:
            x_BTD = x_BTD.take_along_dim(((places - left) % len(places))[..., None], 1)
        if self.gpt.ngrams:
            vars(self.gpt.ngrams.table).pop("touched", None)     # what RowAdam would read

        logits_BTV, loss = self.gpt.logits(x_BTD), None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits_BTV[..., :c.vocab_size])

    def generate(self, *arguments, **options):
        return super().generate(*arguments, **options, memory={})

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, memory: dict | None = None, **_):
        """Returns what forward takes: all tokens so far, and in past the keys and values of those it has seen.

        They are those of the same `generate`, whose memory this is; a beam search reorders rows, and starts again.
        """
        padded = attention_mask is not None and not attention_mask.all()
        if padded or memory is None:
            return dict(input_ids=input_ids, attention_mask=attention_mask)
        known = memory.get("input_ids")
        if known is None or not torch.equal(known, input_ids[:, :-1][:, :known.size(1)]):
            weight, c = self.gpt.lm_head.weight, self.gpt.config
            none = torch.empty(len(input_ids), 0, c.num_heads, c.head_dim, device=weight.device,
                               dtype=getattr(torch, c.dtype))
            memory["past"] = [[none, none] for _ in self.gpt.blocks]
        memory["input_ids"] = input_ids
        return dict(input_ids=input_ids, past=memory["past"])
