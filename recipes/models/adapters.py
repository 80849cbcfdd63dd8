"""One base, several roles: LoRA adapters with scalar heads, and switching between them without losing gradients.

In PPO one frozen base plays four roles, one adapter each: the policy (`default`), the reference (`ref`), the reward
model (`reward`) and the critic (`critic`). A reward model or a critic is the base's last hidden state times a `score`
head of shape (1, hidden), the layout of `*ForSequenceClassification`: what `RewardTrainer` saves loads as is.
"""

import contextlib
import copy
import functools
import inspect
import os
import types
from contextvars import ContextVar

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from recipes.cli.errors import UserError, first_line
from recipes.trainers.fast.frozen_head import FrozenHeadLogProbs, has_frozen_linear_head
from recipes.trainers.fast.packing import States

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


def train_roles(model: PeftModel, roles: tuple[str, ...]) -> None:
    """Gradients for these adapters and their heads, and for nothing else."""
    model.set_requires_grad(list(model.peft_config), False)
    heads = getattr(getattr(model.get_base_model(), "score", None), "modules_to_save", {})
    for role in roles:
        if role in model.peft_config:
            model.set_requires_grad(role, True)
        if role in heads:
            heads[role].requires_grad_(True)


def disable_dropout_rates(model: nn.Module) -> None:
    """Set dropout that layers keep as a number to 0: TRL's `disable_dropout` reaches `nn.Dropout` modules only."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rate: float) -> None:
    """Move `parameters` to groups of their own with learning rate `rate`; what else a group sets stays."""
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": rate})


def checkpoint_under_roles(model: PeftModel) -> None:
    """Make activation checkpointing on `model` recompute under the right role, see [`recompute_under_role`]."""
    base = model.get_base_model()
    enable = base.activation_checkpointing_enable

    def enable_under_roles(activation_checkpointing_kwargs=None, **kwargs):
        own = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if own["use_reentrant"]:
            raise ValueError("PPO's roles need activation_checkpointing_kwargs without use_reentrant: true.")
        enable({**own, "context_fn": recompute_under_role(model)}, **kwargs)

    base.activation_checkpointing_enable = enable_under_roles


def add_score_roles(model: PeftModel, adapters: dict[str, str | None]) -> None:
    """Add roles with a scalar head to a policy, `{role: adapter folder}`, in place.

    A role without a folder starts as a copy of the policy's adapter with a head of zeros, so it values every state
    at 0. Call it after the policy's adapter exists: `all-linear` would otherwise put a LoRA on the head.
    """
    base = model.get_base_model()
    width = base.get_output_embeddings().in_features  # not always hidden_size: OPT-350M projects before its head
    base.score = nn.Linear(width, 1, bias=False, dtype=torch.float32, device=base.device)
    # PEFT keeps this as the wrapper's unused original: trainable, it would break DDP.
    nn.init.zeros_(base.score.weight)
    base.score.requires_grad_(False)
    for role, folder in adapters.items():
        if folder is None:
            model.add_adapter(role, seq_cls_config(model.peft_config["default"]))
            copy_adapter(model, "default", role)
        else:
            result = attach(
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


def add_policy_copy(model: PeftModel, role: str) -> None:
    """Add an adapter that starts as a copy of the policy's."""
    model.add_adapter(role, model.peft_config["default"])
    copy_adapter(model, "default", role)


class AdapterEMA(TrainerCallback):
    """Moves the adapter `ema` towards the policy's after each update: `ema = decay * ema + (1 - decay) * policy`.

    It starts as a copy of the policy, in float32, because half precision would lose its small steps.
    """

    def __init__(self, model: PeftModel, decay: float):
        self.model, self.decay = model, decay
        add_policy_copy(model, "ema")
        for name, parameter in model.named_parameters():
            if ".ema." in name:
                parameter.data = parameter.data.float()

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for name, parameter in self.model.named_parameters():
            if ".ema." in name:
                parameter.lerp_(self.model.get_parameter(name.replace(".ema.", ".default.")).float(), 1 - self.decay)


def is_fresh(model: PeftModel) -> bool:
    """Whether the policy's LoRA still changes nothing: every B matrix is 0, the initialisation of 2106.09685."""
    b_matrices = [parameter for name, parameter in model.named_parameters() if ".lora_B.default." in name]
    return bool(b_matrices) and not any(parameter.any() for parameter in b_matrices)


def add_role_forward(model: PreTrainedModel, temperature: float = 1.0, response_logps: bool = True) -> None:
    """Teach a causal LM with TRL's fused head to answer at chosen states of right-aligned rows only.

    - `model(input_ids=ids, states=(rows, columns), targets=tokens, compute_entropy=bool)` gives log p of each target
      at `temperature` and the entropy (None where it was not asked for), both (N,) float32;
    - `model(input_ids=ids, states=(rows, columns), scalar_head=role)` gives scores, (N,) float32: from the module
      `model.critic` for the role `"critic"` where there is one (full fine-tuning), else from the last hidden state and
      the head the role's adapter carries.

    All go through the model's own forward, so that DDP sees every pass. TRL's fused calls keep their form, and count
    positions from the first real token, as `generate` does: absolute positions would otherwise see left padding.
    """
    causal_lm_forward = model.forward
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    # On a GPU TRL's fused head has kernels of its own.
    frozen_head = response_logps and model.device.type != "cuda" and has_frozen_linear_head(model)

    def logps_and_entropies(ids, states, targets, compute_entropy):
        if frozen_head:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[states]
            weight = model.get_output_embeddings().weight
            return FrozenHeadLogProbs.apply(hidden, weight, targets, temperature, compute_entropy)
        rows, columns = states
        labels = torch.full_like(ids, -100).index_put_((rows, columns + 1), targets)
        outputs = causal_lm_forward(input_ids=ids, labels=labels, fused_lm_head=True)
        return outputs.log_probs[states], None if outputs.entropy is None else outputs.entropy[states]

    # Keep the original signature: `generate` validates its model kwargs against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, states=None, targets=None, compute_entropy=False, scalar_head=None, **kwargs):
        if states is None:
            if takes_positions and kwargs.get("fused_lm_head"):
                kwargs.setdefault("position_ids", token_positions(kwargs["attention_mask"]))
            return causal_lm_forward(*args, **kwargs)
        ids = kwargs["input_ids"]
        if scalar_head is None:
            return logps_and_entropies(ids, states, targets, compute_entropy)
        if scalar_head == "critic" and hasattr(self, "critic"):
            return scalar_scores(self.critic, ids, states)
        hidden = self.base_model(input_ids=ids, use_cache=False).last_hidden_state[states]
        head = self.score.modules_to_save[scalar_head]
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()

    model.forward = types.MethodType(forward, model)


def token_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each token among the real ones, (B, T); padding gets 0."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def scalar_scores(model: PreTrainedModel, input_ids: torch.Tensor, states: States) -> torch.Tensor:
    """Scores of a sequence classifier at chosen states of right-aligned rows: (N,) float32."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[states]
    return model.score(hidden.to(model.score.weight.dtype)).squeeze(-1).float()


def critic_from_policy(policy: PreTrainedModel) -> PreTrainedModel:
    """A full critic with the policy's backbone and a head of zeros, so it values every state at 0."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config).to(policy.dtype)
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    critic.score.weight.data.zero_()
    return critic


def full_critic(model: PreTrainedModel | PeftModel) -> PreTrainedModel | None:
    """The critic that is a model of its own, beside the policy; `None` where it is an adapter."""
    return getattr(model.get_base_model() if isinstance(model, PeftModel) else model, "critic", None)


def save_trained(
    model: PreTrainedModel | PeftModel, save_directory: str, state_dict: dict | None = None, **kwargs
) -> None:
    """`save_pretrained` of what PPO trains: the policy, loadable by plain peft or transformers, and `critic/`.

    Args:
        state_dict: whole weights, where the model holds shares of them (FSDP).
    """
    save = functools.partial(type(model).save_pretrained, model, save_directory, **kwargs)
    critic, prefix, weights = full_critic(model), "critic.", model.state_dict() if state_dict is None else state_dict
    if isinstance(model, PeftModel):
        prefix = "base_model.model.critic."
        adapters = [name for name in ("default", "critic", "ema") if name in model.peft_config]
        save(selected_adapters=adapters, state_dict=weights)
    else:
        save(state_dict={name: value for name, value in weights.items() if not name.startswith(prefix)})
    if critic is not None:
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        type(critic).save_pretrained(critic, os.path.join(save_directory, "critic"), state_dict=own, **kwargs)


def load_critic(model: PreTrainedModel | PeftModel, folder: str) -> None:
    """Put the critic that [`save_trained`] wrote below `folder` back, where it is a model of its own."""
    critic = full_critic(model)
    if critic is not None:
        saved = type(critic).from_pretrained(os.path.join(folder, "critic"), dtype=critic.dtype)
        critic.load_state_dict(saved.state_dict())


def send_only_policy(vllm_generation: VLLMGeneration) -> None:
    """Keep the critic and the heads of other roles out of what TRL sends to vLLM, which has no place for them."""
    named_parameters = vllm_generation._iter_named_params

    def policy_parameters():
        for name, parameter in named_parameters():
            if not name.startswith(("critic.", "score.")):
                yield name, parameter

    vllm_generation._iter_named_params = policy_parameters


def seq_cls_config(config: LoraConfig) -> LoraConfig:
    """`config` for a role with a scalar head: task SEQ_CLS, the head trained and saved with the adapter."""
    config = copy.deepcopy(config)
    config.task_type = "SEQ_CLS"
    config.modules_to_save = sorted({*(config.modules_to_save or []), "score"})
    config.inference_mode = False
    return config


def attach(load, adapter: str, base: str):
    """Run `load`, which puts the weights of `adapter` on `base`, and turn a misfit into one line."""
    try:
        return load()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The adapter {adapter} does not fit the base {base}: it was trained on another ({first_line(error)})."
        ) from error
