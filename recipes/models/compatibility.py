"""Checks that base, adapters and tokenizer fit together, from their small files and before any weights load."""

import copy
import os
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

from recipes.cli.errors import UserError, first_line
from recipes.models.adapters import layer_names, only_on_text
from recipes.models.source import ModelSource, same_weights
from recipes.models.tokenization import load_tokenizer, render_alike

SCORE_HEADS = {"score", "classifier"}  # PEFT adds both to `modules_to_save` of a reward adapter


def check_model(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the model that a step trains: its tokenizer and, where it is an adapter, its base.

    Raises:
        UserError: the adapter or the tokenizer belongs to another base, or a configuration cannot be read.
    """
    check_vocabulary(tokenizer, source.config, source.path)
    if source.base is not None:
        check_adapter(source)
        check_same_tokens(tokenizer, source.path, own_tokenizer(source.without_adapter), source.base)


def check_reward_base(source: ModelSource) -> None:
    """Check that a reward model can be trained on this base.

    Raises:
        UserError: transformers has no sequence classifier for it.
    """
    if not has_classifier(source.config):
        raise UserError(
            f"transformers has no sequence classifier for models of the type {source.config.model_type}, such as "
            f"{source.weights}, to keep a reward model in: train it on another base, and PPO takes it with "
            "--separate_reward_model true."
        )


def check_ppo_models(
    policy: ModelSource, reward: ModelSource | None, tokenizer: PreTrainedTokenizerBase, separate: bool, use_peft: bool
) -> None:
    """Check the policy with its `tokenizer`, and the reward model beside it.

    Raises:
        UserError: something does not fit its base, the reward model has no trained score head, its adapter is on
            another base or reads other tokens or another chat template than the policy writes, or full fine-tuning
            has no critic of the policy's type.
    """
    check_model(policy, tokenizer)
    if not use_peft and not has_classifier(policy.config):
        raise UserError(
            "Full fine-tuning needs a critic of the policy's type, and transformers has no sequence classifier for "
            f"models of the type {policy.config.model_type}, such as {policy.weights}: set use_peft: true (the critic "
            "is an adapter)."
        )
    if reward is None:
        return
    check_score_head(reward)
    if reward.base is None:
        return
    check_adapter(reward)
    if separate:
        return
    if not same_weights(reward, policy):
        raise UserError(
            f"The reward adapter {reward.path} was trained on the base {reward.weights_in_words}, the policy on "
            f"{policy.weights_in_words}. Train it on that, or load it on its own base beside the policy with "
            "--separate_reward_model true (it then scores decoded text)."
        )
    own = own_tokenizer(reward)
    check_same_tokens(own, reward.path, tokenizer, policy.weights)
    if own is not None and not render_alike(own, tokenizer):
        raise UserError(
            f"The reward adapter {reward.path} was trained with another chat template than that of {policy.path}: "
            "train it from the SFT model, or let it read text by its own template with --separate_reward_model true."
        )


def check_score_head(reward: ModelSource) -> None:
    """Check that a reward model was trained as one.

    Raises:
        UserError: it has no trained score head, or more than one label.
    """
    if not reward.has_score_head:
        if reward.base is not None:
            raise UserError(
                f"The reward adapter {reward.path} has no trained score head: train it with recipes/reward.py, "
                'or with modules_to_save=["score"] and task_type="SEQ_CLS".'
            )
        raise UserError(
            f"The reward model {reward.path} has no trained score head: its config.json says "
            f"{reward.config.architectures}."
        )
    if reward.base is None and reward.config.num_labels != 1:
        raise UserError(
            f"The reward model {reward.path} has num_labels={reward.config.num_labels}; PPO needs exactly 1."
        )


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


def check_adapter(source: ModelSource) -> None:
    """Compare the tensors of a local adapter, by its file's header, with those it would have on its base.

    Raises:
        UserError: it was trained on a base of another shape.
    """
    file = os.path.join(source.path, "adapter_model.safetensors")
    model = empty_base(source) if os.path.exists(file) else None
    if model is None:
        return
    wrong = f"The adapter {source.path} does not fit the base {source.base}: it was trained on another"
    with torch.device("meta"):
        try:
            model = get_peft_model(model, source.peft_config)
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


def empty_base(source: ModelSource) -> PreTrainedModel | None:
    """The base of an adapter with shapes and no data, below a scalar head where the adapter is a reward model.

    `None` where transformers has no such classifier.
    """
    auto_class, config = AutoModelForCausalLM, copy.deepcopy(source.config)
    if source.peft_config.task_type == "SEQ_CLS":
        auto_class, config.num_labels = AutoModelForSequenceClassification, 1
        if not has_classifier(config):
            return None
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=source.trust_remote_code)


def refuse_other_adapter(source: ModelSource, model_args: ModelConfig) -> None:
    """Check that `lora_*` arguments, which make new adapters, do not ask for another than the one that goes on.

    Raises:
        UserError: one differs. Names, patterns and `all-linear` are equal where they select the same layers.
    """
    if source.base is None or not model_args.use_peft or not isinstance(source.peft_config, LoraConfig):
        return
    own, given = source.peft_config, getattr(model_args, "given", ())
    for name in ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        value, stored = getattr(model_args, name), getattr(own, name.replace("lora_r", "r"))
        if (name in given or value != getattr(ModelConfig, name)) and value != stored:
            raise another_adapter(source, name, value, stored)
    for field in ("target_modules", "modules_to_save", "target_parameters"):
        value, stored = getattr(model_args, f"lora_{field}"), getattr(own, field)
        if value is not None and not selects_the_same(source, field, value):
            raise another_adapter(source, f"lora_{field}", value, stored)


def another_adapter(source: ModelSource, name: str, given: Any, stored: Any) -> UserError:
    given, stored = (" ".join(sorted(x)) if isinstance(x, list | set) else x for x in (given, stored))
    return UserError(
        f"--{name} {given}: {source.path} is an adapter with {stored}, and goes on as it is. Leave {name} out, "
        "or start from the base for another adapter."
    )


def selects_the_same(source: ModelSource, field: str, value: str | list[str]) -> bool:
    """Whether `value` selects what the adapter of `source` trains by this field of LoraConfig.

    An adapter stores the names that `all-linear` had found, so names are compared first and then the layers of the
    base that they stand for.
    """
    stored = getattr(source.peft_config, field)
    if names(value) - SCORE_HEADS == names(stored) - SCORE_HEADS:
        return True
    asked = source.peft_config
    if field == "target_modules":  # the fields that narrow it down are none of ModelConfig's
        asked.exclude_modules = asked.layers_to_transform = asked.layers_pattern = None
    setattr(asked, field, layer_names(value) if field == "target_modules" else sorted(names(value) - SCORE_HEADS))
    return selected(source, field, asked) == selected(source, field, source.peft_config)


def names(value: str | list[str] | set[str] | None) -> set[str]:
    return {value} if isinstance(value, str) else set(value or ())


def selected(source: ModelSource, field: str, config: LoraConfig) -> set[str] | None:
    """Full names of the parts of the base that `config` selects by a field; `None` where PEFT finds no place."""
    config.init_lora_weights = True
    model = empty_base(source)
    if model is None:
        return None
    with torch.device("meta"):
        try:
            model = get_peft_model(model, only_on_text(config, model))
        except ValueError:
            return None
    if field == "modules_to_save":
        return {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return {*(model.targeted_module_names if field == "target_modules" else model.targeted_parameter_names)}


def own_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's own folder or repository, where it has one."""
    if os.path.isdir(source.path) and not os.path.exists(os.path.join(source.path, "tokenizer_config.json")):
        return None
    try:
        return load_tokenizer(source)
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
