"""What benchmarks share: random models, a tokenizer of made-up words, prompts, and the length of each response.

In PPO lengths are forced, as a random model does not stop where a benchmark needs it: the last token of a prompt names
the length of its response, and [`ForcedLengths`] samples EOS there and nowhere else. Both sides then train on the same
number of tokens, row by row.
"""

import functools
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

PAD, EOS, FIRST_LENGTH, FIRST_WORD = 0, 1, 2, 300
SIZES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "42M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
# Of a trainer that leaves no files and says nothing
ALONE = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


@dataclass(frozen=True)
class Shape:
    """One setting: `batch` episodes a rollout in micro-batches of `micro_batch` rows, one optimizer step an epoch.

    Prompts and responses have lengths evenly spread from the first to the second number of tokens. Only responses
    shorter than the longest end with EOS; the others are cut at the limit.
    """

    size: str = "42M"
    vocabulary: int = 32000
    batch: int = 32
    micro_batch: int = 8
    epochs: int = 4
    prompt: tuple[int, int] = (32, 32)
    response: tuple[int, int] = (64, 64)

    def config(self, **kwargs) -> LlamaConfig:
        ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
        sizes = SIZES[self.size] | {"tie_word_embeddings": True, "max_position_embeddings": 1024}
        return LlamaConfig(vocab_size=self.vocabulary, **ids, **sizes, **kwargs)

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of prompt and response of each row of a rollout."""
        generator = torch.Generator().manual_seed(0)

        def spread(first: int, last: int) -> list[int]:
            evenly = torch.linspace(first, last, self.batch).round().long()
            return evenly[torch.randperm(self.batch, generator=generator)].tolist()

        return list(zip(spread(*self.prompt), spread(*self.response), strict=True))

    def prompts(self, rollouts: int, warm_up: bool) -> list[list[int]]:
        """Token ids of the prompts of some rollouts; `warm_up` makes the first one short."""
        generator = torch.Generator().manual_seed(1)
        rows = []
        for rollout in range(rollouts):
            for prompt, response in self.lengths():
                if warm_up and rollout == 0:
                    prompt, response = min(prompt, 8), min(response, 8)
                ids = torch.randint(FIRST_WORD, self.vocabulary, (prompt - 1,), generator=generator).tolist()
                rows.append([*ids, FIRST_LENGTH + response])
        return rows

    def limit(self) -> int:
        """Most tokens of a response."""
        return self.response[1]


def word(token: int) -> str:
    return f"<{token}>"


def word_tokenizer(vocabulary: int, pad: int = PAD, eos: int = EOS, **options) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words `<0>`, `<1>`, …; `options` are transformers'."""
    words = {word(token): token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(vocabulary - 1)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": word(pad), "eos_token": word(eos)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special, **options)


def turn(role: str, length: int, vocabulary: int, generator: torch.Generator) -> list[dict]:
    """A message of so many random words."""
    ids = torch.randint(FIRST_WORD, vocabulary, (length,), generator=generator).tolist()
    return [{"role": role, "content": " ".join(map(word, ids))}]


class ForcedLengths(LogitsProcessor):
    """Ends each response with EOS at the length that the last token of its prompt names; never samples padding."""

    def __init__(self, limit: int):
        self.limit, self.width = limit, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.width = self.width or input_ids.shape[1]
        length = input_ids.shape[1] - self.width + 1
        wanted = input_ids[:, self.width - 1] - FIRST_LENGTH
        scores[:, (PAD, EOS)] = -torch.inf
        if length < self.limit:
            ends = wanted == length
            scores[ends] = -torch.inf
            scores[ends, EOS] = 0.0
        return scores


def force_lengths(limit: int) -> None:
    """Make every `generate` of this process use [`ForcedLengths`]."""
    generate = GenerationMixin.generate

    @functools.wraps(generate)
    def forced(self, *args, **kwargs):
        return generate(self, *args, logits_processor=LogitsProcessorList([ForcedLengths(limit)]), **kwargs)

    GenerationMixin.generate = forced


def response_tokens(responses: list[list[int]]) -> int:
    """Tokens of responses up to their first EOS, with it."""
    return sum(row.index(EOS) + 1 if EOS in row else len(row) for row in responses)
