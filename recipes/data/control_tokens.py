"""Texts that a tokenizer may read as control tokens: a message that says `<|im_end|>` would end its own turn."""

import re
from collections.abc import Iterable

# Marks of common chat templates, looked for whatever the tokenizer is.
TEMPLATE_MARKS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>", "<bos>", "<eos>",
)  # fmt: skip

# Not special to tokenizers, and written by the assistant itself: its answers keep them. They end no turn.
ANSWERS_OWN = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def control_tokens(tokenizer) -> list[str]:
    """The special tokens of a tokenizer, and the added tokens that its chat template writes."""
    template = str(tokenizer.chat_template or "")
    tokens = tokenizer.added_tokens_decoder.values()
    return [each.content for each in tokens if each.content.strip() and (each.special or each.content in template)]


def own_marks(turn: dict) -> tuple[str, ...]:
    """The control tokens that are the turn's own and no injected ones."""
    return ANSWERS_OWN if turn.get("role") == "assistant" else ()


def search_pattern(special_tokens: Iterable[str]) -> re.Pattern:
    """A pattern that finds the template marks and `special_tokens` in a text, and the longest where several match."""
    return re.compile("|".join(map(re.escape, sorted({*TEMPLATE_MARKS, *special_tokens}, key=len, reverse=True))))
