"""A formatted row as the model will see it: the rendered text, the part that is trained on, the number of tokens."""

import json
import os
from collections.abc import Iterator
from typing import NamedTuple


class Rendered(NamedTuple):
    """`prompt` is context; `response` is what is trained on (sft) or scored (preference); tokens count both."""

    name: str
    prompt: str
    response: str
    prompt_tokens: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    def __str__(self) -> str:
        counts = f"{self.tokens} tokens, {self.response_tokens} of them in the marked part"
        return (
            f"{self.name}: {counts}\n{self.prompt}⟦{self.response}⟧" if self.response else f"{counts}\n{self.prompt}"
        )


def render(row: dict, tokenizer) -> Iterator[Rendered]:
    """Renders each sequence of a row as TRL's trainers do: prompt, generation prompt, response."""
    tools = json.loads(row["tools"]) if row.get("tools") else None
    responses = [(column, row[column]) for column in ("completion", "chosen", "rejected") if column in row]
    ranked = zip(row.get("ranks", ()), row.get("completions", ()), strict=True)
    responses += [(f"rank {rank:g}", response) for rank, response in ranked]
    prompt = row.get("prompt")
    if "messages" in row:
        prompt, responses = row["messages"][:-1], [("last turn", row["messages"][-1:])]
    start = _ids(tokenizer, prompt, tools, add_generation_prompt=True)
    if not responses:
        yield Rendered("prompt", tokenizer.decode(start), "", len(start), 0)
    for name, response in responses:
        whole = _ids(tokenizer, prompt + response, tools)
        shared = len(os.path.commonprefix([start, whole]))
        texts = tokenizer.decode(whole[:shared]), tokenizer.decode(whole[shared:])
        yield Rendered(name, *texts, shared, len(whole) - shared)


def _ids(tokenizer, messages: list[dict], tools: list | None, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, **options)["input_ids"]
