"""Talks with a policy in the terminal, or with two side by side.

    python scripts/chat.py --model_name_or_path runs/ppo --compare runs/sft

`/reset` starts a new conversation, `/quit` or Ctrl-D ends. The flags of scripts/sample_responses.py that say how to
sample work here too.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

from dataclasses import dataclass, field, replace

from transformers import TextStreamer

from recipes.cli.errors import UserError, visible
from recipes.cli.run import run
from recipes.models.sampling import (
    PolicyArguments,
    Prompt,
    SamplingArguments,
    check_lengths,
    derived_seed,
    generate,
    load_generator,
)


@dataclass
class ChatArguments:
    compare: str | None = field(default=None, metadata={"help": "A second model that answers the same."})
    system: str | None = field(default=None, metadata={"help": "System message."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the models."})


@dataclass
class ChatSampling(SamplingArguments):
    """How answers are sampled, one to each message."""

    num_generations: int = field(default=1, init=False)


ARGUMENTS = (ChatSampling, PolicyArguments, ChatArguments)
COMMANDS = "Type a message. /reset starts a new conversation, /quit ends."


class SafeStreamer(TextStreamer):
    """Prints text as it comes, with control characters, which could control the terminal, as escapes."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        print(visible(text.replace("\r", "")), end="\n" if stream_end else "", flush=True)


def turns():
    """The user's messages; `/reset` for a new conversation."""
    print(COMMANDS, file=sys.stderr)
    while True:
        try:
            text = input("you: " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/quit":
            return
        if text.startswith("/") and text != "/reset":
            print(COMMANDS, file=sys.stderr)
        elif text:
            yield text


def main(sampling: SamplingArguments, policy: PolicyArguments, chat_args: ChatArguments):
    policies = {}
    for name in (policy.model_name_or_path, *([chat_args.compare] if chat_args.compare else [])):
        own_args = replace(policy, model_name_or_path=name).model_config()
        policies[name] = load_generator(own_args, chat_args.trust_remote_code)
    opening = [{"role": "system", "content": chat_args.system}] if chat_args.system else []
    conversations = {name: list(opening) for name in policies}
    for number, text in enumerate(turns()):
        if text == "/reset":
            conversations = {name: list(opening) for name in policies}
            continue
        for name, (model, tokenizer) in policies.items():
            conversations[name].append({"role": "user", "content": text})
            try:
                check_lengths(model, tokenizer, [Prompt("", conversations[name], name)], sampling)
            except UserError as error:
                print(f"{error} /reset starts a new conversation.", file=sys.stderr)
                conversations[name].pop()
                continue
            print(f"{name}: ", end="", flush=True)
            streamer = SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            seed = derived_seed(sampling.seed, number)
            (answer,) = generate(model, tokenizer, [conversations[name]], sampling, seed, streamer=streamer)
            conversations[name].append({"role": "assistant", "content": answer.text})


if __name__ == "__main__":
    run(main, ARGUMENTS)
