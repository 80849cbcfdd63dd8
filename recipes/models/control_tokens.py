"""Renders messages so that control tokens in them stay text, and within a time limit.

A message that says `<|im_end|>` would end its own turn: tokenizers look for their control tokens in the whole rendered
chat and do not know who wrote them. transformers can tell the template's own from those in messages
(`sanitize_control_tokens`), but has to be asked in each call.
"""

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recipes.cli.errors import UserError
from recipes.data.control_tokens import control_tokens, own_marks

RENDER_SECONDS = 20  # of computing for one conversation, which takes a template milliseconds


def keep_control_tokens_text(tokenizer):
    """Makes `tokenizer.apply_chat_template` encode the control tokens that stand in messages as ordinary text.

    Everything that tokenizes chats with this tokenizer is safe then, TRL's trainers included; other chats get the same
    ids as before. Two uses cannot be covered, and keep what transformers does: `tokenize=False`, whose text does not
    tell who wrote a token, and `return_assistant_tokens_mask=True` (`assistant_only_loss`). Leave such rows out there,
    with `on_special=drop`. A template that computes for longer than `RENDER_SECONDS` is stopped with a `UserError`.
    The tokenizer is changed in place, and the change is not saved with it.
    """
    # A partial holds the tokenizer where a closure would hide it, so that copies and pickles of both belong together.
    tokenizer.apply_chat_template = functools.partial(_apply_chat_template, tokenizer)
    return tokenizer


def _apply_chat_template(tokenizer, conversation, tools=None, **options):
    covered = options.get("tokenize", True) and not options.get("return_assistant_tokens_mask")
    if covered and _mentions([conversation, tools], control_tokens(tokenizer)):
        options.setdefault("sanitize_control_tokens", True)
    several = bool(conversation) and not isinstance(conversation[0], dict)
    with _time_limit(RENDER_SECONDS * (len(conversation) if several else 1)):
        return type(tokenizer).apply_chat_template(tokenizer, conversation, tools, **options)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stops what runs within after so much CPU time of the process; only its main thread can be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise UserError(
            f"The chat template takes more than {RENDER_SECONDS} s for one conversation: does it have nested loops?"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def _mentions(value: Any, tokens: list[str]) -> bool:
    if isinstance(value, str):
        return any(token in value for token in tokens)
    if isinstance(value, dict):
        own = own_marks(value)
        tokens = [token for token in tokens if token not in own]
        return any(_mentions(item, tokens) for item in value.values())
    return isinstance(value, list | tuple) and any(_mentions(item, tokens) for item in value)
