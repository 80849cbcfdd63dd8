"""Loads the tokenizer of a base or an adapter, with a chat template, and without TRL and PEFT, which take seconds."""

import json
import os
import re

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from recipes.cli.errors import UserError, first_line
from recipes.models.control_tokens import keep_control_tokens_text

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


def adapter_base(model_name_or_path: str) -> str | None:
    """Name of the base an adapter was trained on, or `None` when `model_name_or_path` is not an adapter.

    Raises:
        UserError: an adapter's configuration cannot be read, or its local base folder is gone.
    """
    if not os.path.isdir(model_name_or_path) and not is_hub_name(model_name_or_path):
        raise UserError(f"There is no folder {model_name_or_path}, and it is not the name of a Hub model.")
    config = find_adapter_config_file(model_name_or_path)
    if config is None:
        return None
    try:
        with open(config, encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} cannot be read: {first_line(error)}.") from error
    if not base:
        raise UserError(f"{model_name_or_path}/adapter_config.json names no base model (base_model_name_or_path).")
    if not os.path.isdir(base) and not is_hub_name(base):
        raise UserError(
            f"{model_name_or_path} is an adapter on the base {base}, and there is no such folder here: "
            f"run from where that path is valid, or correct base_model_name_or_path in its adapter_config.json."
        )
    return base


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form of a Hub repository, `model` or `owner/model`."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def load_tokenizer(
    model_name_or_path: str, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Tokenizer with a chat template and, where the vocabulary allows, a padding token that is not EOS.

    With pad = EOS the end of a response and padding look alike, and a model never learns to stop. Control tokens that
    stand in messages are encoded as ordinary text.
    """
    name = model_name_or_path
    base = adapter_base(name)
    if base is not None and not os.path.exists(os.path.join(name, "tokenizer_config.json")):
        name = base
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"No tokenizer could be loaded from {name}: {first_line(error)}") from error
    if not tokenizer.encode("Hello", add_special_tokens=False):
        raise UserError(
            f"The tokenizer of {name} gives no tokens for text: transformers loads it as {type(tokenizer).__name__}, "
            "by the model_type in config.json, and its tokenizer.json is of another kind."
        )
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer of {name} has no EOS token: set eos_token in its tokenizer_config.json.")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        vocabulary = tokenizer.get_vocab()
        candidates = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>", tokenizer.unk_token)
        spare = (token for token in candidates if token in vocabulary and token != tokenizer.eos_token)
        tokenizer.pad_token = next(spare, tokenizer.eos_token)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return keep_control_tokens_text(tokenizer)


def turn_end(tokenizer: PreTrainedTokenizerBase, stops: list[int], **template_arguments) -> list[int]:
    """What the chat template writes after the stop token of an answer, as ChatML's newline; `stops` are stop tokens.

    RewardTrainer reads the score after it, so scoring has to put it back after a finished response.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False, **template_arguments)
    ends = [position for position, token in enumerate(ids) if token in stops]
    return ids[ends[-1] + 1 :] if ends else []
