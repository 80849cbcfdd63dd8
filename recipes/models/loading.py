"""The models that the three steps load: base, policy, reward model, and the models of PPO."""

import copy
import json
import os

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning

from recipes.cli.errors import UserError, first_line
from recipes.models.adapters import add_score_roles, attach, seq_cls_config
from recipes.models.tokenization import adapter_base, load_tokenizer


def same_base(a: str, b: str) -> bool:
    """Whether two base names mean the same weights: equal Hub ids, or the same local folder."""
    return a == b or (os.path.isdir(a) and os.path.isdir(b) and os.path.samefile(a, b))


def _from_pretrained(auto_class, name: str, model_args: ModelConfig, trust_remote_code: bool, **kwargs):
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        # Every process holds the whole quantised base on its own device.
        kwargs |= {"quantization_config": quantization_config, "device_map": {"": PartialState().device}}
    try:
        return auto_class.from_pretrained(
            name,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"The model {name} could not be loaded: {first_line(error)}") from error


def load_policy(model_args: ModelConfig, trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """Causal LM to train, from a base, a full checkpoint or an adapter folder.

    | `model_name_or_path` | `use_peft: true`             | `use_peft: false`                      |
    |----------------------|------------------------------|----------------------------------------|
    | base, full model     | the model with a new adapter | the model                              |
    | adapter              | its base with that adapter   | its base with the adapter merged in    |

    An adapter keeps its own rank and target modules; `lora_*` arguments apply to new adapters only.
    """
    name = model_args.model_name_or_path
    base = adapter_base(name)
    if not model_args.use_peft and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise UserError("load_in_4bit and load_in_8bit freeze the base: set use_peft: true to train an adapter on it.")
    model = _from_pretrained(AutoModelForCausalLM, base or name, model_args, trust_remote_code)
    hide_router_logits(model)
    if base is None:
        return get_peft_model(model, get_peft_config(model_args)) if model_args.use_peft else model
    model = attach(lambda: PeftModel.from_pretrained(model, name, is_trainable=model_args.use_peft), name, base)
    return model if model_args.use_peft else model.merge_and_unload()


def hide_router_logits(model: nn.Module) -> None:
    """Undo what the load-balancing loss of SFT sets in the configuration of a mixture of experts to generate again.

    `generate` passes one new token a row with the mask of all, a pair that the load-balancing loss does not take.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def score_head_names(reward_path: str) -> list[str]:
    """Names of the trained score-head tensors in an adapter folder."""
    return [name for name in load_peft_weights(reward_path, device="cpu") if ".score." in f".{name}"]


def load_reward_trainee(model_args: ModelConfig, trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """Sequence classifier with one label, to train as a reward model.

    From an SFT adapter it starts with the SFT weights and a fresh head (InstructGPT, 2203.02155, appendix C); from a
    reward adapter it continues with that adapter's head. A fresh head is drawn from N(0, 1/(hidden + 1))
    (2009.01325, details in 2403.17031).
    """
    name = model_args.model_name_or_path
    base = adapter_base(name)
    with suppress_seqcls_warning():
        model = _from_pretrained(
            AutoModelForSequenceClassification, base or name, model_args, trust_remote_code, num_labels=1
        )
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear `score` head, which the reward model and PPO need.")
    if base is not None or not _has_trained_head(name):
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    if base is None:
        if not model_args.use_peft:
            return model
        return get_peft_model(model, seq_cls_config(get_peft_config(model_args)))
    weights = load_peft_weights(name, device="cpu")
    weights.setdefault("base_model.model.score.weight", model.score.weight.detach().clone())
    model = get_peft_model(model, seq_cls_config(PeftConfig.from_pretrained(name)))
    result = attach(lambda: set_peft_model_state_dict(model, weights), name, base)
    if result.unexpected_keys:
        raise UserError(
            f"The adapter {name} holds {result.unexpected_keys[0]}, which a reward model has no place for."
        )
    return model if model_args.use_peft else model.merge_and_unload()


def keep_head_in_float32(model: nn.Module) -> None:
    """Undo for the score head what TRL does to adapters of a quantised base: bf16 is too coarse for its steps.

    Without autocast the head would not even take the hidden states, which need not be bf16.
    """
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        head = model.get_base_model().score.modules_to_save["default"].float()
        head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))


def _has_trained_head(name: str) -> bool:
    architectures = AutoConfig.from_pretrained(name).architectures or []
    return any(architecture.endswith("ForSequenceClassification") for architecture in architectures)


def check_reward_adapter(reward_path: str, policy_base: str) -> bool:
    """Whether `reward_path` is an adapter that fits beside the policy's adapter on `policy_base`.

    Returns `False` for a full reward model, which is loaded beside the policy.

    Raises:
        UserError: the adapter has no trained score head, or another base.
    """
    base = adapter_base(reward_path)
    if base is None:
        return False
    if not score_head_names(reward_path):
        raise UserError(
            f"The reward adapter {reward_path} has no trained score head: train it with recipes/reward.py, "
            'or with modules_to_save=["score"] and task_type="SEQ_CLS".'
        )
    if not same_base(base, policy_base):
        raise UserError(
            f"The reward adapter {reward_path} was trained on the base {base}, the policy on {policy_base}. "
            f"Train it on {policy_base}, or load it on its own base beside the policy with "
            "--separate_reward_model true (it then scores decoded text)."
        )
    return True


def load_reward_model(
    reward_path: str, model_args: ModelConfig, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained reward model on its own base with its tokenizer, frozen, an adapter merged into the weights.

    Raises:
        UserError: it has no trained score head, or more than one label.
    """
    base = adapter_base(reward_path)
    own_args = copy.copy(model_args)
    own_args.model_revision = "main"
    own_args.load_in_4bit = own_args.load_in_8bit = False
    config = AutoConfig.from_pretrained(base or reward_path, trust_remote_code=trust_remote_code)
    if base is None and not _has_trained_head(reward_path):
        raise UserError(
            f"The reward model {reward_path} has no trained score head: its config.json says {config.architectures}."
        )
    if base is None and config.num_labels != 1:
        raise UserError(f"The reward model {reward_path} has num_labels={config.num_labels}; PPO needs exactly 1.")
    if base is not None and not score_head_names(reward_path):
        raise UserError(
            f"The reward adapter {reward_path} has no trained score head: train it with recipes/reward.py."
        )
    with suppress_seqcls_warning():
        model = _from_pretrained(
            AutoModelForSequenceClassification, base or reward_path, own_args, trust_remote_code, num_labels=1
        )
    if base is not None:
        model = attach(lambda: PeftModel.from_pretrained(model, reward_path), reward_path, base).merge_and_unload()
    tokenizer = load_tokenizer(reward_path, trust_remote_code=trust_remote_code)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval(), tokenizer


def load_ppo_models(
    model_args: ModelConfig, reward_path: str | None, separate_reward_model: bool, trust_remote_code: bool = False
) -> dict:
    """The policy and what scores it, as keywords of `PPOTrainer`.

    With LoRA and a reward adapter on the same base, one model with the adapters `default`, `reward` and `critic`.
    Otherwise the reward model is loaded beside the policy. In full fine-tuning the critic starts from it where it has
    the policy's architecture and vocabulary.
    """
    policy_path = model_args.model_name_or_path
    policy_base = adapter_base(policy_path) or policy_path
    on_policy_base = (
        reward_path is not None and not separate_reward_model and check_reward_adapter(reward_path, policy_base)
    )
    model = load_policy(model_args, trust_remote_code)
    if reward_path is None:
        return {"model": model}
    if on_policy_base and model_args.use_peft:
        add_score_roles(model, {"reward": reward_path, "critic": reward_path})
        return {"model": model}
    reward_model, tokenizer = load_reward_model(reward_path, model_args, trust_remote_code)
    models = {"model": model, "reward_model": reward_model, "reward_processing_class": tokenizer}
    if not model_args.use_peft and reward_model.config.get_text_config().vocab_size == model.config.vocab_size:
        if reward_model.config.model_type == model.config.model_type:
            models["value_model"] = copy.deepcopy(reward_model)
    return models


@torch.no_grad()
def score_conversations(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], batch_size: int
) -> list[float]:
    """Scores of whole conversations (message lists) by a reward model, in their order."""
    ids = tokenizer.apply_chat_template(conversations, return_dict=False)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # batches of equal length waste no padding
    scores = [0.0] * len(ids)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, padding_side="right", return_tensors="pt")
        for row, score in zip(rows, model(**batch.to(model.device)).logits.squeeze(-1).tolist(), strict=True):
            scores[row] = score
    return scores


def save_reward_statistics(folder: str, scores: list[float], source: str) -> dict:
    """Store mean and standard deviation of reference scores with a reward model, for PPO's normalisation."""
    values = torch.tensor(scores, dtype=torch.float64)
    statistics = {"mean": values.mean().item(), "std": values.std().item(), "n": len(scores), "source": source}
    with open(os.path.join(folder, "reward_statistics.json"), "w", encoding="utf-8") as file:
        json.dump(statistics, file, indent=2)
    return statistics


def read_reward_statistics(reward_path: str) -> dict | None:
    """What `save_reward_statistics` stored, `{"mean", "std", "n", "source"}`, or `None`."""
    path = os.path.join(reward_path, "reward_statistics.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
