"""The models that the three steps load: base, policy, reward model, and the models of PPO."""

import contextlib
import copy
import json
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning

from recipes.cli.errors import UserError, counted, refusals_in_one_line
from recipes.cli.files import write_text
from recipes.cli.screen import say
from recipes.models.adapters import add_score_roles, new_adapter_config, only_on_text, seq_cls_config, train_text
from recipes.models.compatibility import check_score_head, refuse_other_adapter
from recipes.models.heads import use_float32_head
from recipes.models.source import ModelSource, find_file, load_errors
from recipes.models.tokenization import load_tokenizer

TRAINED_PROMPTS = "trained_prompts.txt"
STATISTICS = "reward_statistics.json"  # of a reward model's scores, in its folder


def _from_pretrained(
    auto_class, source: ModelSource, model_args: ModelConfig, **kwargs
) -> tuple[PreTrainedModel, set[str]]:
    """The model with the weights of `source`, and the names of those that are not there and so are random."""
    with load_errors(f"The model {source.weights} could not be loaded", source.weights):
        dtype = (source.config.dtype or torch.float32) if model_args.dtype == "auto" else model_args.dtype
        quantization_config = get_quantization_config(replace(model_args, dtype=dtype))
        if quantization_config is not None:
            # Every process holds the whole quantised base on its own device.
            kwargs |= {"quantization_config": quantization_config, "device_map": {"": PartialState().device}}
        model, found = auto_class.from_pretrained(
            source.weights,
            revision=source.revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    return never_pack(model), {name for name, _ in model.named_parameters()} & {*found["missing_keys"]}


def refuse_random_weights(model: PreTrainedModel, names: set[str], source: ModelSource) -> None:
    """Refuse a model with weights that its files should hold and do not, of which transformers only warns."""
    if names:
        raise UserError(
            f"{source.weights} has no {min(names)} for its {type(model).__name__}, which would start from random "
            f"numbers ({counted(len(names), 'weight')} in all): its files are not whole, or not of the kind in its "
            "config.json."
        )


def _load_classifier(source: ModelSource, model_args: ModelConfig) -> PreTrainedModel:
    """The weights of `source` below a scalar head, which is float32 and never quantised."""
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(source.config), None)
    if model_class is not None:
        # The first keeps the head from being quantised, the second from being rounded to a base's bf16 on loading.
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            setattr(model_class, name, {*(getattr(model_class, name) or ()), "score"})
    has_head = source.base is None and source.has_score_head
    with contextlib.nullcontext() if has_head else suppress_seqcls_warning():
        model, missing = _from_pretrained(AutoModelForSequenceClassification, source, model_args, num_labels=1)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear `score` head, which the reward model and PPO need.")
    refuse_random_weights(model, missing if has_head else missing - {"score.weight"}, source)
    use_float32_head(model)
    return model


def never_pack(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from packing 4-bit weights on CPUs with AVX512-BF16; the same model.

    It packs a layer in its first forward in eval mode, and every later forward takes a kernel without a backward: a
    rollout would end the training, with a UserWarning. Layers narrower than a block of 64 cannot be packed at all.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def not_finite(model: nn.Module) -> str | None:
    """The name of the first weight that holds NaN or infinity, `None` where all are finite."""
    for name, weights in model.named_parameters():
        own = weights.to_local() if hasattr(weights, "to_local") else weights  # of shares, this process's
        if own.is_floating_point() and not own.isfinite().all():
            return name
    return None


def check_policy(source: ModelSource) -> None:
    """Refuse a reward model where a policy is wanted."""
    if source.has_score_head:
        raise UserError(f"{source.path} is a reward model, which gives scores: a policy starts from a base or SFT.")


def load_policy(source: ModelSource, model_args: ModelConfig) -> PreTrainedModel | PeftModel:
    """Causal LM to train, from a base, a full checkpoint or an adapter.

    | `source`         | `use_peft: true`             | `use_peft: false`                      |
    |------------------|------------------------------|----------------------------------------|
    | base, full model | the model with a new adapter | the model                              |
    | adapter          | its base with that adapter   | its base with the adapter merged in    |
    """
    if model_args.lora_task_type != ModelConfig.lora_task_type:
        raise UserError(f"--lora_task_type {model_args.lora_task_type} is for reward models: leave it out.")
    refuse_other_adapter(source, model_args)
    check_policy(source)
    model, missing = _from_pretrained(AutoModelForCausalLM, source, model_args)
    refuse_random_weights(model, missing, source)
    disable_router_logits(model)
    if source.base is not None:
        trained = model_args.use_peft
        model = PeftModel.from_pretrained(model, source.path, config=source.peft_config, is_trainable=trained)
    elif model_args.use_peft:
        model = new_adapter(model, new_adapter_config(model_args), source)
    return trainable(model, model_args)


def trainable(model: PreTrainedModel | PeftModel, model_args: ModelConfig) -> PreTrainedModel | PeftModel:
    """The adapter to train, or all weights that text reaches, an adapter merged in."""
    if model_args.use_peft:
        return model
    return train_text(model.merge_and_unload() if isinstance(model, PeftModel) else model)


def new_adapter(model: PreTrainedModel, config: PeftConfig, source: ModelSource) -> PeftModel:
    """`model`, of the weights of `source`, with a fresh adapter, which keeps their revision.

    PEFT would leave out a name that is nowhere in the model where another one fits.
    """
    family = type(model).__name__
    parts = [f".{name}" for name, _ in (*model.named_modules(), *model.named_parameters())]
    for flag in ("target_modules", "target_parameters", "modules_to_save"):
        names = getattr(config, flag) or ()
        for name in () if isinstance(names, str) else sorted(names):
            if not any(part.endswith(f".{name}") for part in parts):
                raise UserError(
                    f"No adapter could be put on {family}: --lora_{flag} {name}: {family} has no part of this name. "
                    "Name layers of it, or take all with --lora_target_modules all-linear."
                )
    with refusals_in_one_line():
        return get_peft_model(model, only_on_text(config, model), revision=source.revision)


def disable_router_logits(model: nn.Module) -> None:
    """Undo what SFT sets in the configuration of a mixture of experts: its load-balancing loss cannot generate."""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def load_reward_trainee(source: ModelSource, model_args: ModelConfig) -> PreTrainedModel | PeftModel:
    """Sequence classifier with one label, to train as a reward model.

    From an SFT adapter it starts with the SFT weights, but for an LM head (InstructGPT, 2203.02155, appendix C); from
    a reward adapter also with its head. A fresh head is drawn from N(0, 1/(hidden + 1)) (2009.01325, details in
    2403.17031).
    """
    refuse_other_adapter(source, model_args)
    model = _load_classifier(source, model_args)
    if not source.has_score_head:
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    if source.base is not None:
        model = continued_adapter(model, source)
    elif model_args.use_peft:
        model = new_adapter(model, seq_cls_config(new_adapter_config(model_args)), source)
    return trainable(model, model_args)


def continued_adapter(model: PreTrainedModel, source: ModelSource) -> PeftModel:
    """The classifier `model` with the adapter of `source`; from an SFT adapter it takes all but an LM head."""
    config, weights = seq_cls_config(source.peft_config), source.adapter_weights()
    weights.setdefault("base_model.model.score.weight", model.score.weight.detach().clone())
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    absent = {name for name in config.modules_to_save if name.rpartition(".")[2] not in layers}
    config.modules_to_save = [name for name in config.modules_to_save if name not in absent]
    for name in [name for name in weights if any(f".{part}." in f".{name}" for part in absent)]:
        say(f"{name} of {source.path} is left out: the score head takes its place.")
        del weights[name]
    model = get_peft_model(model, config)
    lost = set_peft_model_state_dict(model, weights).unexpected_keys
    if lost:
        raise UserError(f"The adapter {source.path} holds {lost[0]}, which a reward model has no place for.")
    return model


def report_half_precision(model: nn.Module) -> None:
    """Say so where trained weights are not float32: steps of training are often smaller than the gaps between them."""
    trained = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad} - {"float32"}
    if trained:
        say(
            f"Trained weights are {', '.join(sorted(trained))}: steps smaller than about 1/256 of a weight are lost. "
            "With --dtype float32, and bf16: true for speed, none is."
        )


def load_reward_model(
    source: ModelSource, model_args: ModelConfig
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A trained reward model and its tokenizer, frozen, an adapter merged into its base unless that is quantised."""
    check_score_head(source)
    tokenizer = load_tokenizer(source)
    if tokenizer.init_kwargs.get("chat_template") is None:
        say(
            f"Warning: the reward model {source.path} has no chat template and reads turns that begin with User: and "
            "Assistant:. If it was trained on others, set chat_template in its tokenizer_config.json."
        )
    model = _load_classifier(source, replace(model_args, load_in_4bit=False, load_in_8bit=False))
    trained_with = model.config.get_text_config().pad_token_id
    if source.base is not None:
        model = PeftModel.from_pretrained(model, source.path, config=source.peft_config)
        if not getattr(model, "is_quantized", False):  # a checkpoint in few bits would round the adapter away
            model = model.merge_and_unload()
    elif trained_with in range(len(tokenizer)):
        tokenizer.pad_token_id = trained_with  # EOS in many: their scores are read at the token before it
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval(), tokenizer


def load_ppo_models(
    policy: ModelSource, reward: ModelSource | None, model_args: ModelConfig, separate_reward_model: bool
) -> dict:
    """The policy and what scores it, as keywords of `PPOTrainer`, for sources that `check_ppo_models` has passed.

    With LoRA and a reward adapter on the same base, one model with the adapters `default`, `reward` and `critic`.
    Otherwise the reward model is loaded beside the policy. In full fine-tuning the critic starts from it where it has
    the policy's architecture, size and vocabulary, else from the policy.
    """
    if not model_args.use_peft and (model_args.load_in_4bit or model_args.load_in_8bit):  # Trainer says it too late
        raise UserError("load_in_4bit and load_in_8bit freeze the base: set use_peft: true to train an adapter on it.")
    models = {"model": load_policy(policy, model_args)}
    if reward is None:
        return models
    if model_args.use_peft and reward.base is not None and not separate_reward_model:
        add_score_roles(models["model"], {"reward": reward.path, "critic": reward.path})
        return models | {"reward_processing_class": load_tokenizer(reward)}
    reward_model, tokenizer = load_reward_model(reward, model_args)
    models |= {"reward_model": reward_model, "reward_processing_class": tokenizer}
    if model_args.use_peft:
        return models
    if tokenizer.get_vocab() == load_tokenizer(policy).get_vocab() and same_shapes(reward_model, models["model"]):
        models["value_model"] = copy.deepcopy(reward_model)
    else:
        say(
            f"The critic starts from the policy with a head of zeros: the reward model {reward.path} has another "
            "size or vocabulary."
        )
    return models


def same_shapes(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models have the same weights below their heads, by names and shapes."""
    shapes = [{name: p.shape for name, p in model.base_model.named_parameters()} for model in (one, other)]
    return type(one.base_model) is type(other.base_model) and shapes[0] == shapes[1]


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


def save_reward_statistics(folder: str, scores: list[float], source: str) -> dict | None:
    """Store mean and standard deviation of reference scores with a reward model, for PPO's normalisation.

    Scores whose standard deviation is 0 or unknown, as that of one conversation, are not stored, and a line says so.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    std = values.std().item() if len(scores) > 1 else math.nan
    if not 0 < std < math.inf:
        say(
            f"No {STATISTICS} is stored: the scores of {counted(len(scores), 'conversation')} of {source} have the "
            f"standard deviation {std}, and PPO cannot divide by it. It takes them as they are, or by --score_mean "
            "and --score_std."
        )
        return None
    statistics = {"mean": values.mean().item(), "std": std, "n": len(scores), "source": source}
    write_text(os.path.join(folder, STATISTICS), json.dumps(statistics, indent=2))
    return statistics


def read_reward_statistics(name: str) -> dict | None:
    """`{"mean", "std", "n", "source"}`, if `save_reward_statistics` stored it in this folder or Hub repository."""
    path = find_file(name, STATISTICS)
    if path is None:
        return None
    what = f"{path} has no mean and no std above 0 to standardise scores with (--normalize_scores false uses none)"
    with load_errors(what, name):
        statistics = json.loads(Path(path).read_text(encoding="utf-8"))
        if not (math.isfinite(statistics["mean"]) and 0 < statistics["std"] < math.inf):
            raise ValueError(statistics)
    return statistics


def load_score_statistics(training_args: TrainingArguments, reward: ModelSource, normalize: bool) -> None:
    """Settle PPO's `score_mean` and `score_std`: as given, else as stored with the reward model, else 0 and 1."""
    given = {"mean": training_args.score_mean, "std": training_args.score_std}
    found, origin = {"mean": 0.0, "std": 1.0}, f"{reward.path} has no reward_statistics.json"
    if not normalize:
        origin = "--normalize_scores false"
    elif None in given.values() and (stored := read_reward_statistics(reward.path)):
        found, origin = stored, f"of {reward.path}"
    mean, std = (found[name] if value is None else value for name, value in given.items())
    shown = [origin if value is None else "given" for value in given.values()]
    say(f"Scores: minus {mean:.4g} ({shown[0]}), divided by {std:.4g} ({shown[1]}).")
    training_args.score_mean, training_args.score_std = mean, std


def save_trained_prompts(folder: str, group_ids: Iterable[str]) -> None:
    """Store with a reward model which prompts it was trained on, as `recipes.data.tasks.group_id` of each."""
    write_text(os.path.join(folder, TRAINED_PROMPTS), "".join(f"{group}\n" for group in sorted(set(group_ids))))


def read_trained_prompts(name: str) -> set[str]:
    """What `save_trained_prompts` stored in this folder or Hub repository; empty where nothing is known."""
    path = find_file(name, TRAINED_PROMPTS)
    return {*Path(path).read_text(encoding="utf-8").split()} if path else set()
