"""Whether base, adapters and tokenizer belong together, told by their small files before any weights load."""

import os

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

from recipes.cli.errors import UserError, first_line
from recipes.models.loading import check_reward_adapter
from recipes.models.tokenization import adapter_base, load_tokenizer


def check_model(model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> None:
    """Check the model that a step trains: its tokenizer and, where it is an adapter, its base.

    Raises:
        UserError: the adapter or the tokenizer belongs to another base, or a configuration cannot be read.
    """
    name = model_args.model_name_or_path
    base = adapter_base(name)
    config = read_config(base or name, model_args.model_revision, trust_remote_code)
    check_vocabulary(tokenizer, config, name)
    if base is not None:
        check_adapter(name, base, config, trust_remote_code)
        check_same_tokens(tokenizer, name, own_tokenizer(base, trust_remote_code), base)


def check_reward_base(model_args: ModelConfig, trust_remote_code: bool = False) -> None:
    """Check that a reward model can be trained on this base.

    Raises:
        UserError: transformers has no sequence classifier for it.
    """
    name = adapter_base(model_args.model_name_or_path) or model_args.model_name_or_path
    config = read_config(name, model_args.model_revision, trust_remote_code)
    if not has_classifier(config):
        raise UserError(
            f"transformers has no sequence classifier for models of the type {config.model_type}, such as {name}, to "
            "keep a reward model in: train it on another base, and PPO takes it with --separate_reward_model true."
        )


def check_ppo_models(
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    reward_path: str | None,
    separate: bool,
    trust_remote_code: bool = False,
) -> None:
    """Check the reward model beside the policy, which [`check_model`] has passed.

    Raises:
        UserError: the reward adapter does not fit its base, it reads other tokens than the policy writes, or full
            fine-tuning has no critic of the policy's type.
    """
    policy = model_args.model_name_or_path
    policy = adapter_base(policy) or policy
    config = read_config(policy, model_args.model_revision, trust_remote_code)
    if not model_args.use_peft and not has_classifier(config):
        raise UserError(
            "Full fine-tuning needs a critic of the policy's type, and transformers has no sequence classifier for "
            f"models of the type {config.model_type}, such as {policy}: set use_peft: true (the critic is an adapter)."
        )
    base = None if reward_path is None else adapter_base(reward_path)
    if base is not None:
        check_adapter(reward_path, base, read_config(base, "main", trust_remote_code), trust_remote_code)
        if not separate and check_reward_adapter(reward_path, policy):
            check_same_tokens(own_tokenizer(reward_path, trust_remote_code), reward_path, tokenizer, policy)


def read_config(name: str, revision: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"The configuration of {name} could not be loaded: {first_line(error)}") from error


def has_classifier(config: PretrainedConfig) -> bool:
    remote = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or "AutoModelForSequenceClassification" in remote


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, name: str) -> None:
    """Every token that can come up needs an embedding.

    Added tokens beyond the model's vocabulary are fine where nothing writes them, as Gemma 3's image token.
    """
    size = config.get_text_config().vocab_size
    added, template = tokenizer.added_tokens_decoder, str(tokenizer.chat_template)
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index >= size and (index not in added or index in needed or token in template):
            raise UserError(
                f"The tokenizer of {name} belongs to another model: its token {token!r} has the id {index}, and the "
                f"model's vocabulary has {size} tokens (vocab_size in config.json)."
            )


def check_adapter(folder: str, base: str, config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """Compare the tensors of a local adapter, by its file's header, with those it would have on `config`."""
    file = os.path.join(folder, "adapter_model.safetensors")
    if not os.path.exists(file):
        return
    peft_config = PeftConfig.from_pretrained(folder)
    auto_class = AutoModelForCausalLM
    if peft_config.task_type == "SEQ_CLS":
        auto_class, config.num_labels = AutoModelForSequenceClassification, 1
        if not has_classifier(config):
            return
    wrong = f"The adapter {folder} does not fit the base {base}: it was trained on another"
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise UserError(f"{wrong} ({first_line(error)})") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(file, "pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    for name, tensor in expected.items():
        # A missing head has an error of its own.
        if name in shapes and shapes[name] != tuple(tensor.shape):
            raise UserError(f"{wrong} ({name} is {list(shapes[name])}, where the base needs {list(tensor.shape)}).")
        if name not in shapes and "lora_" in name:
            raise UserError(f"{wrong} ({name} is missing).")
    unknown = [name for name in shapes if name not in expected and "lora_" in name]
    if unknown:
        raise UserError(f"{wrong} (the base has no place for {unknown[0]}).")


def own_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's own folder or repository, where it has one."""
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "tokenizer_config.json")):
        return None
    try:
        return load_tokenizer(name, trust_remote_code=trust_remote_code)
    except UserError:
        return None


def check_same_tokens(
    own: PreTrainedTokenizerBase | None, adapter: str, theirs: PreTrainedTokenizerBase | None, base: str
) -> None:
    """The tokenizer of an adapter may add tokens to its base's, but not give one another id."""
    if own is None or theirs is None:
        return
    vocabulary = own.get_vocab()
    for token, index in theirs.get_vocab().items():
        if vocabulary.get(token) != index:
            raise UserError(
                f"The tokenizer in {adapter} is another than that of {base}: the token {token!r} is {index} there and "
                f"{vocabulary.get(token, 'missing')} here. Copy the tokenizer that the adapter was trained with."
            )
