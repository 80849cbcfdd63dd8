"""Adapters as roles: several adapters on one frozen base, switched and copied without losing gradients.

In PPO one base plays four roles, one adapter each: the policy (`default`), the reference (`ref`), the reward model
(`reward`) and the critic (`critic`). An adapter is everything that PEFT trains under one name, `modules_to_save` and
single token embeddings included. The name is one part of each parameter's name, wherever it stands.
"""

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel, TrainerCallback
from trl import ModelConfig, get_peft_config

from recipes.cli.errors import UserError
from recipes.models.heads import ScoreHead, base_of, without_critic

# Fields of an adapter that change the base, or that look at more than the input of their layer.
NOT_FOR_ROLES = (
    *("bias", "layer_replication", "kasa_config"),
    *("alora_invocation_tokens", "arrow_config", "monteclora_config", "use_bdlora"),
)
# They take a part out of the base's weights, or (MiCA) train a part of the adapter only.
INITS_NOT_FOR_ROLES = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def check_adapter_kind(model: PeftModel) -> None:
    """Refuse adapters that cannot share their base with other roles: not LoRA or DoRA, or changing the base."""
    if "default" not in model.peft_config:
        raise UserError(f"The policy is the adapter `default`, and there is only {', '.join(model.peft_config)}.")
    for config in model.peft_config.values():
        if config.peft_type != PeftType.LORA:
            raise UserError(f"PPO's roles are LoRA adapters, and this adapter is {config.peft_type.value}.")
        unfit = [name for name in NOT_FOR_ROLES if getattr(config, name, None) not in (None, "none")]
        if str(config.init_lora_weights).lower().startswith(INITS_NOT_FOR_ROLES):
            unfit.append(f"init_lora_weights={config.init_lora_weights}")
        if unfit:
            raise UserError(
                f"{unfit[0]} changes the base, which reference, reward model and critic share, or how it runs: the "
                "policy needs plain LoRA or DoRA (PEFT's path_initial_model_for_weight_conversion makes it of some)."
            )


def model_with_adapter(model: PreTrainedModel | PeftModel, keyword: str) -> PreTrainedModel:
    """The model below a `PeftModel`, whose own layers carry the adapter; `keyword` is what it was passed as."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:  # which lies outside of layers
        raise UserError(f"{keyword} has an adapter of the kind {model.peft_type.value}, which PPO cannot run.")
    return base_of(model)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter by their names without the adapter's, the same for two adapters of one shape.

    A model that is a module of this name, as the critic of full fine-tuning, counts as an adapter.
    """
    parts = [(name.split("."), parameter) for name, parameter in model.named_parameters()]
    return {".".join(part for part in name if part != adapter): p for name, p in parts if adapter in name}


def train_only(model: PeftModel, adapters: Iterable[str]) -> None:
    """Turn gradients on for these adapters, their heads included, and off for everything else."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # packed 4-bit weights have no gradients to turn off
            parameter.requires_grad_(not {*adapters}.isdisjoint(name.split(".")))


@torch.no_grad()
def add_copy(model: PeftModel, source: str, target: str, config: LoraConfig | None = None) -> None:
    """Add the adapter `target` with the weights of `source`, in their precision."""
    config = copy.deepcopy(model.peft_config[source] if config is None else config)
    config.init_lora_weights = True  # it is copied over, so no other initialisation needs to run
    model.add_adapter(target, config)
    copies = adapter_parameters(model, target)
    for name, parameter in adapter_parameters(model, source).items():
        copies[name].data = parameter.detach().clone()


# Parts that text does not reach


def other_parts(model: PreTrainedModel) -> set[str]:
    """Names of the weights of a composite model, such as Gemma 3, that are for images and sound.

    Text gives them no gradient, for which DDP would wait.
    """
    if model.config.get_text_config() is model.config:
        return set()
    of_text = [model.get_decoder(), model.get_output_embeddings(), getattr(model, "score", None)]
    own = {parameter for part in filter(None, of_text) for parameter in part.parameters()}
    return {name for name, parameter in model.named_parameters() if parameter not in own}


def train_text(model: PreTrainedModel) -> PreTrainedModel:
    """Turn gradients on for all weights that text reaches, also where an adapter was merged, which froze them."""
    other = other_parts(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name not in other)
    return model


def only_on_text(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """`config` of a new adapter with layers for images and sound left out, in place."""
    layers = {name.rpartition(".")[0] for name in other_parts(model)}
    config.exclude_modules = sorted(layers) or None
    return config


# Switching


def role_layers(model: PeftModel) -> list[tuple[nn.Module, frozenset[str]]]:
    """Every layer that knows adapters, with the names of those it has; found once, as walking a model takes long."""
    adapters = tuple(model.peft_config)
    cached = vars(model).get("_role_layers")
    if cached is None or cached[0] != adapters:
        with without_critic(model):  # a critic with an adapter of its own keeps it on
            layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        cached = adapters, [(layer, frozenset(layer._get_available_adapters())) for layer in layers]
        object.__setattr__(model, "_role_layers", cached)
    return cached[1]


def active_role(model: PeftModel) -> str | None:
    """The adapter that is on; `None` for the bare base."""
    for layer, _ in role_layers(model):
        if not layer._disable_adapters:
            return next(iter(layer.active_adapters), None)
    return None


@contextlib.contextmanager
def use_role(model: nn.Module, role: str | None) -> Iterator[None]:
    """Make the adapter `role` active (`None`: the bare base) without touching `requires_grad`.

    PEFT's `set_adapter` and `disable_adapter`, and so TRL's `use_adapter`, turn gradients off on the other adapters: a
    step that trains two adapters with one backward then loses half of them without an error. A layer that `role` does
    not train gives what the base gives. A model without adapters is left as it is.
    """
    if not isinstance(model, PeftModel) or active_role(model) == role:
        yield
        return
    layers = role_layers(model)
    before = [(layer._active_adapter, layer._disable_adapters) for layer, _ in layers]
    for layer, adapters in layers:
        layer._disable_adapters = role not in adapters
        if role in adapters:
            layer._active_adapter = [role]
    try:
        yield
    finally:
        for (layer, _), (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def checkpoint_under_roles(model: PreTrainedModel | PeftModel) -> None:
    """Make activation checkpointing on `model` recompute each block under the role that its forward ran with.

    Without it the recomputation in backward runs under whatever adapter is active then, and the gradients of the
    other roles are wrong without an error.
    """
    base = base_of(model)
    enable = base.activation_checkpointing_enable

    def recompute_under_role():  # called in the forward, while the role is active
        return contextlib.nullcontext(), use_role(model, active_role(model))

    def enable_under_roles(activation_checkpointing_kwargs=None, **kwargs):
        own = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if isinstance(model, PeftModel):
            if own["use_reentrant"]:
                raise UserError("PPO's roles need activation_checkpointing_kwargs without use_reentrant: true.")
            own["context_fn"] = recompute_under_role
        # transformers adds one more hook to the embeddings each time, and TRL turns this on anew for every rollout.
        base.disable_input_require_grads()
        enable(own, **kwargs)

    base.activation_checkpointing_enable = enable_under_roles


def check_shards(plugin: FullyShardedDataParallelPlugin, has_adapters: bool) -> None:
    """Refuse ways to shard a model (FSDP) under which roles would be wrong without an error."""
    if plugin.fsdp_version != 2:  # flattened weights are no adapter's any more
        raise UserError("PPO shards with fsdp_version: 2 only: launch with accelerate_configs/fsdp2.yaml.")
    if has_adapters and plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing recomputes blocks under the adapter of another role: set it to false, and "
            "the training argument activation_checkpointing to true."
        )
    if has_adapters and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT:
        raise UserError(
            "fsdp_state_dict_type SHARDED_STATE_DICT, Accelerate's default, keeps one adapter in a checkpoint and the "
            "critic is another: set it to FULL_STATE_DICT."
        )
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "fsdp_cpu_ram_efficient_loading loads weights in the first process only, and roles are made in each: set "
            "it to false, as accelerate_configs/fsdp2.yaml does (true is Accelerate's default)."
        )


# Roles of PPO


def add_score_roles(model: PeftModel, adapters: dict[str, str | None]) -> None:
    """Add roles with a scalar head to a policy, `{role: adapter folder}`, in place.

    A role without a folder starts as a copy of the policy's adapter with a head of zeros, so it values every state
    at 0. Call it after the policy's adapter exists: `all-linear` would otherwise put a LoRA on the head.
    """
    base = model.get_base_model()
    lm_head = base.get_output_embeddings()
    # Not always hidden_size: OPT-350M projects before its head. A head that PEFT wraps may know its weights only.
    width = getattr(lm_head, "in_features", None) or lm_head.weight.size(-1)
    base.score = ScoreHead(width, 1, bias=False, device=base.device, dtype=torch.float32)
    # PEFT keeps this as the wrapper's unused original: trainable, it would break DDP.
    nn.init.zeros_(base.score.weight).requires_grad_(False)
    for role, folder in adapters.items():
        if folder is None:
            add_copy(model, "default", role, seq_cls_config(model.peft_config["default"]))
            if isinstance(lm_head, ModulesToSaveWrapper):  # no score comes from it: DDP would wait for its gradients
                lm_head.delete_adapter(role, ["default"])
        else:
            result = model.load_adapter(folder, role)
            if lost := [*result.unexpected_keys, *result.missing_keys]:
                raise UserError(f"The adapter {folder} does not fit the policy's base: {lost[0]} has no counterpart.")
        base.score.modules_to_save[role].float()


def new_adapter_config(model_args: ModelConfig) -> LoraConfig | None:
    """TRL's `get_peft_config`, on all linear layers where none are given: PEFT's own default knows few families.

    A single name is the end of a path, as in a list of several: PEFT would take it for a pattern of whole paths.
    """
    if model_args.lora_target_modules is None and model_args.lora_target_parameters is None:
        model_args = replace(model_args, lora_target_modules="all-linear")
    config = get_peft_config(model_args)
    if config is not None and isinstance(config.target_modules, str):
        if re.fullmatch(r"[\w.]+", config.target_modules):
            config.target_modules = {config.target_modules}
    return config


def seq_cls_config(config: LoraConfig) -> LoraConfig:
    """`config` for a role with a scalar head: task SEQ_CLS, the head trained and saved with the adapter."""
    config = copy.deepcopy(config)
    config.task_type = "SEQ_CLS"
    config.modules_to_save = sorted({*(config.modules_to_save or []), "score"})
    config.inference_mode = False
    return config


@contextlib.contextmanager
def float32_adapters(model: nn.Module) -> Iterator[None]:
    """Keep trained adapters as they are, which is in float32, while a TRL trainer is built around them.

    TRL casts those of a quantised base to bf16, and the optimizer's state follows. A step at 1e-5 is then
    smaller than the distance between two numbers, and most weights never move.
    """
    trained = model.named_parameters() if isinstance(model, PeftModel) else ()
    before = {name: p.data for name, p in trained if p.requires_grad}
    yield
    for name, weights in before.items():
        model.get_parameter(name).data = weights


class AdapterEMA(TrainerCallback):
    """Moves the adapter `ema` towards the policy's after each update: `ema = decay * ema + (1 - decay) * policy`.

    It starts as a copy of the policy, in float32, because half precision would lose its small steps.
    """

    def __init__(self, model: PeftModel, decay: float):
        self.model, self.decay = model, decay
        add_copy(model, "default", "ema")
        for average in adapter_parameters(model, "ema").values():
            average.data = average.data.float()

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        policy = adapter_parameters(self.model, "default")  # looked up each time: FSDP puts shares in their place
        for name, average in adapter_parameters(self.model, "ema").items():
            average.lerp_(policy[name].float(), 1 - self.decay)
