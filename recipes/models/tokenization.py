"""Loads the tokenizer of a base or an adapter, with a chat template, and without TRL and PEFT, which take seconds."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.cli.errors import UserError, counted
from recipes.cli.screen import say
from recipes.data.preview import sequences
from recipes.data.rows import RowError
from recipes.models.control_tokens import keep_control_tokens_text
from recipes.models.source import ModelSource, find_file, load_errors

# For bases whose tokenizer has no chat template. It adds no token to the vocabulary, ends each answer with EOS, and
# marks what the assistant says for TRL's `assistant_only_loss`.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('This chat template knows the roles system, user and assistant.') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>")
EXAMPLE = {"prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "!"}]}


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Tokenizer with a chat template and, where the vocabulary allows, a padding token that is not EOS.

    With pad = EOS the end of a response and padding look alike, and a model never learns to stop. Control tokens that
    stand in messages are encoded as ordinary text. An adapter without a tokenizer has its base's.
    """
    name = source.path
    if source.base is not None and find_file(name, "tokenizer_config.json") is None:
        name = source.base
    revision = source.revision if name == source.weights else "main"  # of an adapter's own repository
    with load_errors(f"No tokenizer could be loaded from {name}", name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=source.trust_remote_code)
    if not tokenizer.encode("Hello", add_special_tokens=False):
        raise UserError(
            f"The tokenizer of {name} gives no tokens for text: transformers loads it as {type(tokenizer).__name__}, "
            "by the model_type in config.json, and its tokenizer.json is of another kind."
        )
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer of {name} has no EOS token: set eos_token in its tokenizer_config.json.")
    pad, eos = tokenizer.pad_token, tokenizer.eos_token
    scores_before_eos = pad == eos and source.base is not None and source.has_score_head  # a reward adapter
    if pad in (None, eos) and not scores_before_eos:
        spare = [token for token in (*PAD_TOKENS, tokenizer.unk_token) if token in tokenizer.get_vocab()]
        tokenizer.pad_token = next((token for token in spare if token != eos), eos)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    keep_control_tokens_text(tokenizer)  # first, since it also bounds the time of the template
    stop_at_turn_end(tokenizer, source)
    return tokenizer


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, source: ModelSource, path: str | None, may_add_tokens: bool
) -> str | None:
    """Give a model's tokenizer the template of a .jinja file, or template and EOS token of another model's tokenizer.

    What that tokenizer adds to the vocabulary comes with it, or is a `UserError` where nothing may be added.
    Returns the `path` that TRL still has to read, to give the model itself room for what was added.
    """
    if path is None:
        return None
    with load_errors(f"--chat_template_path {path}: no template could be read", path):
        if is_file := os.path.isfile(path):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8-sig")
        else:
            other = AutoTokenizer.from_pretrained(path, trust_remote_code=source.trust_remote_code)
            if other.chat_template is None:
                raise UserError(f"--chat_template_path {path}: its tokenizer has no chat template.")
            tokenizer.chat_template = other.get_chat_template()
    if not is_file:
        known = tokenizer.get_vocab()
        new = [token for token in other.added_tokens_decoder.values() if token.content not in known]
        if new and not may_add_tokens:
            raise UserError(
                f"--chat_template_path {path} adds {counted(len(new), 'token')} that {source.weights} does not have "
                f"({new[0].content}). An adapter has no place for new embeddings: take a .jinja template "
                "of tokens that the model has, or train all weights with --use_peft false."
            )
        tokenizer.add_tokens(new)
        tokenizer.eos_token = other.eos_token or tokenizer.eos_token
    stop_at_turn_end(tokenizer, source)
    return path if may_add_tokens and not is_file else None


def stop_at_turn_end(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Make the token that the chat template ends an answer with the EOS token, where generation stops at another.

    Some bases end text with one token and have a template that ends turns with another, as Qwen's `<|endoftext|>` and
    ChatML's `<|im_end|>`. SFT would then teach a mark at which nothing stops, and every sample would go on into
    invented turns.
    """
    try:
        (example,) = sequences(EXAMPLE, tokenizer)
    except RowError:
        return  # a template that wants more than a question and an answer; the data's rows will tell
    of_answer = example.ids[example.shared :]
    if {tokenizer.eos_token_id, *source.stop_ids} & {*of_answer}:
        return
    others = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    marks = [token for token in of_answer if token in tokenizer.added_tokens_decoder and token not in others]
    if marks:
        before, tokenizer.eos_token = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(marks[-1])
        say(
            f"The EOS token of {source.path} is now {tokenizer.eos_token}, with which its chat template ends an "
            f"answer; it was {before}."
        )
    else:
        say(
            f"Warning: the chat template of {source.path} ends an answer with no token at which generation stops "
            f"(EOS is {tokenizer.eos_token}): a model trained with it will not stop. Use a template that does."
        )


def render_alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two chat templates make the same tokens of a question and an answer; also where one cannot."""
    try:
        mine, theirs = (next(sequences(EXAMPLE, tokenizer)).ids for tokenizer in (one, other))
    except RowError:
        return True
    return mine == theirs


def turn_end(tokenizer: PreTrainedTokenizerBase, stops: list[int], **template_arguments) -> list[int]:
    """What the chat template writes after the stop token of an answer, as ChatML's newline; `stops` are stop tokens.

    RewardTrainer reads the score after it, so scoring has to put it back after a finished response.
    """
    turns = EXAMPLE["prompt"] + EXAMPLE["completion"]
    ids = tokenizer.apply_chat_template(turns, return_dict=False, **template_arguments)
    ends = [position for position, token in enumerate(ids) if token in stops]
    return ids[ends[-1] + 1 :] if ends else []
