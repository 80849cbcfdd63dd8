"""Loads the tokenizer of a base or an adapter, with a chat template, and without TRL and PEFT, which take seconds."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.cli.errors import UserError, first_line
from recipes.models.control_tokens import keep_control_tokens_text
from recipes.models.source import ModelSource

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


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Tokenizer with a chat template and, where the vocabulary allows, a padding token that is not EOS.

    With pad = EOS the end of a response and padding look alike, and a model never learns to stop. Control tokens that
    stand in messages are encoded as ordinary text. An adapter without a tokenizer has its base's.

    Raises:
        UserError: there is no tokenizer, or none that can be used.
    """
    name = source.path
    if source.base is not None and not os.path.exists(os.path.join(name, "tokenizer_config.json")):
        name = source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
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
