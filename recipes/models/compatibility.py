"""Checks that base, adapters and tokenizer fit together, from their small files and before any weights load."""

import copy

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

from recipes.cli.errors import UserError
from recipes.models.adapters import new_adapter_config, only_on_text
from recipes.models.source import ModelSource, load_errors, same_weights
from recipes.models.tokenization import load_tokenizer, render_alike

LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
SELECTIONS = ("lora_target_modules", "lora_modules_to_save", "lora_target_parameters")  # of parts of the model


def check_model(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check a model with its tokenizer, and an adapter with its base and with the base's tokenizer.

    The tokenizer of an adapter may add tokens, but not give one another id.
    """
    check_vocabulary(tokenizer, source.config, source.path)
    if source.base is None:
        return
    check_adapter(source)
    options = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    try:
        with load_errors("No tokenizer could be loaded", source.base):
            of_base = AutoTokenizer.from_pretrained(source.base, **options)
    except UserError:
        return  # a base without a tokenizer
    if not of_base.encode("Hello", add_special_tokens=False):
        return  # the same: for some families transformers makes one of special tokens only
    vocabulary = tokenizer.get_vocab()
    for token, index in of_base.get_vocab().items():
        if vocabulary.get(token) != index:
            raise UserError(
                f"The tokenizer in {source.path} is another than that of {source.base}: the token {token!r} is "
                f"{index} there and {vocabulary.get(token, 'missing')} here. Copy the one that the adapter was "
                "trained with."
            )


def check_reward_base(source: ModelSource) -> None:
    """Check that transformers has a sequence classifier for this base, to keep a reward model in, with one label."""
    check_classifier(source, "train the reward model on another base; PPO takes it with --separate_reward_model true")
    if source.has_score_head:
        check_score_head(source)


def check_ppo_models(
    policy: ModelSource, reward: ModelSource | None, tokenizer: PreTrainedTokenizerBase, separate: bool, use_peft: bool
) -> None:
    """Check the policy with its `tokenizer`, and the reward model beside it.

    A reward adapter on the policy's base has to read the chat template that the policy writes.
    """
    check_model(policy, tokenizer)
    if not use_peft:
        check_classifier(policy, "set use_peft: true, with which the critic is an adapter")
    if reward is None:
        return
    check_score_head(reward)
    reward_tokenizer = load_tokenizer(reward)
    check_model(reward, reward_tokenizer)
    if reward.base is None or separate:
        return
    if not same_weights(reward, policy):
        raise UserError(
            f"The reward adapter {reward.path} was trained on the base {reward.weights}, the policy on "
            f"{policy.weights} (revisions {reward.revision} and {policy.revision}). Train it on that, or load it on "
            "its own base beside the policy with --separate_reward_model true (it then scores decoded text)."
        )
    if not render_alike(reward_tokenizer, tokenizer):
        raise UserError(
            f"The reward adapter {reward.path} was trained with another chat template than that of {policy.path}: "
            "train it from the SFT model, or let it read text by its own template with --separate_reward_model true."
        )


def check_score_head(reward: ModelSource) -> None:
    """Check that a reward model was trained as one, with one label."""
    if not reward.has_score_head:
        kind = "reward model" if reward.base is None else "reward adapter"
        raise UserError(
            f"The {kind} {reward.path} has no trained score head: train it with recipes/reward.py, or with "
            'task_type="SEQ_CLS" and modules_to_save=["score"].'
        )
    if reward.base is None and reward.config.num_labels != 1:
        raise UserError(
            f"The reward model {reward.path} has num_labels={reward.config.num_labels}; PPO needs exactly 1."
        )


def check_classifier(source: ModelSource, remedy: str) -> None:
    """Check that there is a sequence classifier of the type of these weights, for a reward model or a full critic."""
    config = source.config
    is_remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if not is_remote and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"transformers has no sequence classifier for models of the type {config.model_type}, such as "
            f"{source.weights}: {remedy}."
        )


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


def adapter_shapes(source: ModelSource, config: PeftConfig, is_new: bool = False) -> dict[str, list[int]]:
    """Names and shapes of what an adapter of this configuration trains on the base of `source`, made without data.

    Where there is no place for it, PEFT raises a ValueError.
    """
    auto_class, base_config = AutoModelForCausalLM, copy.deepcopy(source.config)
    if config.task_type == "SEQ_CLS":
        auto_class, base_config.num_labels = AutoModelForSequenceClassification, 1
    config.init_lora_weights = True  # others compute with the base's weights
    with torch.device("meta"):
        model = auto_class.from_config(base_config, trust_remote_code=source.trust_remote_code)
        model = get_peft_model(model, only_on_text(config, model) if is_new else config)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def check_adapter(source: ModelSource) -> None:
    """Compare the tensors of an adapter with those it would have on its base."""
    wrong = f"The adapter {source.path} does not fit the base {source.base}: it was trained on another"
    with load_errors(wrong, source.base):
        expected = adapter_shapes(source, source.peft_config)
    shapes = {name: list(tensor.shape) for name, tensor in source.adapter_weights().items()}
    for name in [*expected, *shapes]:
        own, needed = shapes.get(name), expected.get(name)
        if own != needed and (own and needed or "lora_" in name):  # a head that is missing has an error of its own
            raise UserError(f"{wrong} ({name} is {own or 'missing'}, where the base needs {needed or 'nothing'}).")


def refuse_other_adapter(source: ModelSource, model_args: ModelConfig) -> None:
    """Check that `lora_*` arguments, which make new adapters, do not ask for another than the one that goes on."""
    if source.base is None or not model_args.use_peft or not isinstance(source.peft_config, LoraConfig):
        return
    for flag in LORA_FLAGS + SELECTIONS:
        value, is_given = getattr(model_args, flag), flag in getattr(model_args, "given", ())
        if value == getattr(ModelConfig, flag) and not is_given:
            continue
        name = flag if flag in LoraConfig.__dataclass_fields__ else flag.removeprefix("lora_")
        stored = getattr(source.peft_config, name)
        if not (value == stored or flag in SELECTIONS and trains_the_same(source, name, model_args)):
            value, stored = (" ".join(sorted(x)) if isinstance(x, list | set) else x for x in (value, stored))
            raise UserError(
                f"--{flag} {value}: {source.path} is an adapter with {stored}, and goes on as it is. Leave {flag} "
                "out, or start from the base for another adapter."
            )


def trains_the_same(source: ModelSource, name: str, model_args: ModelConfig) -> bool:
    """Whether the adapter of `source` would train the same tensors with this field of `model_args` as its own.

    An adapter stores the names that `all-linear` or a pattern had found, so what they select is compared.
    """
    asked, is_new = source.peft_config, name == "target_modules"
    setattr(asked, name, getattr(new_adapter_config(model_args), name))
    if is_new:  # the fields that narrow it down are none of ModelConfig's
        asked.layers_to_transform = asked.layers_pattern = None
    try:
        return adapter_shapes(source, asked, is_new).keys() == adapter_shapes(source, source.peft_config).keys()
    except ValueError:
        return False
