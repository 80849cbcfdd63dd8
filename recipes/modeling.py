"""Base model, tokenizer, chat template, LoRA roles and scalar heads: everything the three steps load.

In PPO one frozen base plays four roles, one LoRA adapter each: the policy (`default`), the reference (`ref`), the
reward model (`reward`) and the critic (`critic`). A reward model or a critic is the base's last hidden state times a
`score` head of shape (1, hidden), the layout of `*ForSequenceClassification`, so what `RewardTrainer` saves loads as is.
"""

import contextlib
import copy
import functools
import json
import os
import types
from contextvars import ContextVar

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from recipes.errors import UserError


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
        UserError: an adapter's local base folder is gone.
    """
    if not find_adapter_config_file(model_name_or_path):
        return None
    base = PeftConfig.from_pretrained(model_name_or_path).base_model_name_or_path
    if not base:
        raise UserError(f"{model_name_or_path}/adapter_config.json names no base model (base_model_name_or_path).")
    looks_local = base.startswith((".", "/", "~")) or base.count("/") != 1
    if looks_local and not os.path.isdir(base) and os.sep in base:
        raise UserError(
            f"{model_name_or_path} is an adapter on the base {base}, and there is no such folder here: "
            f"run from where that path is valid, or correct base_model_name_or_path in its adapter_config.json."
        )
    return base


def same_base(a: str, b: str) -> bool:
    """Whether two base names mean the same weights: equal Hub ids, or the same local folder."""
    return a == b or (os.path.isdir(a) and os.path.isdir(b) and os.path.samefile(a, b))


def load_tokenizer(
    model_name_or_path: str, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Tokenizer with a chat template and, where the vocabulary allows, a padding token that is not EOS.

    With pad = EOS the end of a response and padding look alike, and a model never learns to stop.
    """
    name = model_name_or_path
    base = adapter_base(name)
    if base is not None and not os.path.exists(os.path.join(name, "tokenizer_config.json")):
        name = base
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"No tokenizer could be loaded from {name}: {first_line(error)}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer of {name} has no EOS token: set eos_token in its tokenizer_config.json.")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        vocabulary = tokenizer.get_vocab()
        candidates = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>", tokenizer.unk_token)
        spare = (token for token in candidates if token in vocabulary and token != tokenizer.eos_token)
        tokenizer.pad_token = next(spare, tokenizer.eos_token)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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
    if base is None:
        return get_peft_model(model, get_peft_config(model_args)) if model_args.use_peft else model
    model = _attach(lambda: PeftModel.from_pretrained(model, name, is_trainable=model_args.use_peft), name, base)
    return model if model_args.use_peft else model.merge_and_unload()


def _attach(load, adapter: str, base: str):
    """Run `load`, which puts the weights of `adapter` on `base`, and turn a misfit into one line."""
    try:
        return load()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The adapter {adapter} does not fit the base {base}; it was trained on another model ({first_line(error)})."
        ) from error


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
    with quiet_new_head():
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
    model = get_peft_model(model, seq_cls_config(PeftConfig.from_pretrained(name)))
    result = _attach(lambda: set_peft_model_state_dict(model, load_peft_weights(name, device="cpu")), name, base)
    if result.unexpected_keys:
        raise UserError(
            f"The adapter {name} holds {result.unexpected_keys[0]}, which a reward model has no place for."
        )
    return model if model_args.use_peft else model.merge_and_unload()


@contextlib.contextmanager
def quiet_new_head():
    """Silence transformers' warning that `score` is newly initialised: here it is meant to be."""
    import logging

    def about_head(record):
        return "score.weight" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(about_head)
    try:
        yield
    finally:
        logger.removeFilter(about_head)


def seq_cls_config(config: LoraConfig) -> LoraConfig:
    """`config` for a role with a scalar head: task SEQ_CLS, the head trained and saved with the adapter."""
    config = copy.deepcopy(config)
    config.task_type = "SEQ_CLS"
    config.modules_to_save = sorted({*(config.modules_to_save or []), "score"})
    config.inference_mode = False
    return config


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
    with quiet_new_head():
        model = _from_pretrained(
            AutoModelForSequenceClassification, base or reward_path, own_args, trust_remote_code, num_labels=1
        )
    if base is not None:
        model = _attach(lambda: PeftModel.from_pretrained(model, reward_path), reward_path, base).merge_and_unload()
    tokenizer = load_tokenizer(reward_path, trust_remote_code=trust_remote_code)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval(), tokenizer


# One base, several roles

_ACTIVE_ROLE: ContextVar[str | None] = ContextVar("active_role", default="default")


@contextlib.contextmanager
def use_role(model: nn.Module, role: str | None):
    """Make the adapter `role` active (`None`: the bare base) without touching `requires_grad`.

    PEFT's `set_adapter` and `disable_adapter`, and so TRL's `use_adapter`, turn gradients off on the other adapters:
    a step that trains two adapters with one backward then loses half of them without an error.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    token = _ACTIVE_ROLE.set(role)
    for layer in layers:
        layer._disable_adapters = role is None
        if role is not None:
            layer._active_adapter = [role]
    try:
        yield
    finally:
        _ACTIVE_ROLE.reset(token)
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def recompute_under_role(model: nn.Module):
    """A `context_fn` for `torch.utils.checkpoint`: recompute each block under the adapter its forward ran with.

    Without it the recomputation in backward runs under whatever adapter is active then, and the gradients of the
    other roles are wrong without an error. `context_fn` is called in the forward, while the role is active.
    """

    def context_fn():
        return contextlib.nullcontext(), use_role(model, _ACTIVE_ROLE.get())

    return context_fn


def add_score_roles(model: PeftModel, adapters: dict[str, str | None]) -> None:
    """Add roles with a scalar head to a policy, `{role: adapter folder}`, in place.

    A role without a folder starts as a copy of the policy's adapter with a head of zeros, so it values every state
    at 0. Call it after the policy's adapter exists: `all-linear` would otherwise put a LoRA on the head.
    """
    base = model.get_base_model()
    text_config = base.config.get_text_config()
    base.score = nn.Linear(text_config.hidden_size, 1, bias=False, dtype=torch.float32, device=base.device)
    # PEFT keeps this as the wrapper's unused original: trainable, it would break DDP.
    nn.init.zeros_(base.score.weight)
    base.score.requires_grad_(False)
    for role, folder in adapters.items():
        if folder is None:
            model.add_adapter(role, seq_cls_config(model.peft_config["default"]))
            copy_adapter(model, "default", role)
        else:
            result = _attach(
                functools.partial(model.load_adapter, folder, role),
                folder,
                model.peft_config["default"].base_model_name_or_path,
            )
            if result.unexpected_keys or result.missing_keys:
                key = (result.unexpected_keys or result.missing_keys)[0]
                raise UserError(f"The adapter {folder} does not fit the policy's base: {key} has no counterpart.")
        if role not in base.score.modules_to_save:
            raise UserError(f"The adapter {folder} has no trained score head.")


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Copy the weights of one adapter to another of the same shape."""
    for name, parameter in model.named_parameters():
        if f".{source}." in name:
            model.get_parameter(name.replace(f".{source}.", f".{target}.")).data.copy_(parameter.data)


def is_fresh(model: PeftModel) -> bool:
    """Whether the policy's LoRA still changes nothing: every B matrix is 0, the initialisation of 2106.09685."""
    b_matrices = [parameter for name, parameter in model.named_parameters() if ".lora_B.default." in name]
    return bool(b_matrices) and not any(parameter.any() for parameter in b_matrices)


def add_scalar_forward(model: PreTrainedModel) -> None:
    """Teach a causal LM `model(input_ids, attention_mask, scalar_head=role)`, which returns scores of shape (B, T).

    The scores are float32. They come from the module `model.critic` for the role `"critic"` where there is one (full
    fine-tuning), else from the last hidden state and the head the role's adapter carries. Both go through the
    model's own forward, so that DDP sees every pass.
    """
    causal_lm_forward = model.forward

    # Keep the original signature: `generate` validates its model kwargs against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, scalar_head=None, **kwargs):
        if scalar_head is None:
            return causal_lm_forward(*args, **kwargs)
        if scalar_head == "critic" and hasattr(self, "critic"):
            return scalar_scores(self.critic, *args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        head = self.score.modules_to_save[scalar_head]
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()

    model.forward = types.MethodType(forward, model)


def scalar_scores(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Scores of a sequence classifier at every position: (B, T) ids and mask → (B, T) float32."""
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return model.score(hidden.to(model.score.weight.dtype)).squeeze(-1).float()


def critic_from_policy(policy: PreTrainedModel) -> PreTrainedModel:
    """A full critic with the policy's backbone and a head of zeros, so it values every state at 0."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config).to(policy.dtype)
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    critic.score.weight.data.zero_()
    return critic


def read_reward_statistics(reward_path: str) -> dict | None:
    """Mean and standard deviation of the reference scores that `recipes/reward.py` stored, or `None`."""
    path = os.path.join(reward_path, "reward_statistics.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
