"""What vLLM is sent of a model that plays several roles: the policy's weights, merged outside of the base.

TRL merges the adapter into the base for each sync and takes it out again. In bf16 that changes half of the base's
numbers within 200 syncs, and a 4-bit base is quantised anew each time; reference, reward model and critic stand on it.
"""

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration

from recipes.cli.errors import UserError

OTHER_ROLES = ("critic.", "score.")


def send_only_policy(vllm_generation: VLLMGeneration) -> None:
    """Let TRL send vLLM the policy only, and leave the base as it is.

    Raises:
        UserError: an adapter that cannot be merged into new tensors, or one whose base is in shares.
    """
    named_parameters = vllm_generation._iter_named_params
    model = vllm_generation.model
    if isinstance(model, PeftModel):
        if vllm_generation._dist.is_fsdp:
            raise UserError("use_vllm with an adapter needs the whole base on each GPU: launch multi_gpu.yaml.")
        check_mergeable(model)
        vllm_generation._iter_named_params = lambda: merged_parameters(model)
        return

    def policy_parameters():
        for name, parameter in named_parameters():
            if not name.startswith(OTHER_ROLES):
                yield name, parameter

    vllm_generation._iter_named_params = policy_parameters


def check_mergeable(model: PeftModel) -> None:
    config = model.peft_config["default"]
    for name in ("use_dora", "lora_bias", "target_parameters"):
        if getattr(config, name, None):
            raise UserError(f"use_vllm cannot take an adapter with {name}: sample with use_vllm: false.")


@torch.no_grad()
def merged_parameters(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as in the base's checkpoint, and weights with the adapter `default` inside, in tensors of their own.

    `W + B A * scaling` is added in float32 and has the base's precision, a 4-bit base that of its other weights.
    """
    base = model.get_base_model()
    modules = dict(base.named_modules())
    for name, parameter in base.named_parameters():
        if name.startswith(OTHER_ROLES) or any(
            part.startswith(("lora_", "token_adapter")) for part in name.split(".")
        ):
            continue
        owner = next((modules[path] for path in prefixes(name) if is_wrapper(modules[path])), None)
        plain = name.replace(".base_layer.", ".")
        if isinstance(owner, ModulesToSaveWrapper):
            trained = ".modules_to_save.default."
            if trained in name:
                yield name.replace(trained, "."), parameter.data
            elif ".original_module." in name and "default" not in owner.modules_to_save:
                yield name.replace(".original_module.", "."), parameter.data
        elif isinstance(owner, LoraLayer) and name.endswith(".base_layer.weight") and "default" in names_of(owner):
            yield plain, merged_weight(owner, base.dtype)
        else:
            yield plain, parameter.data
    for name, module in modules.items():
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None:
            yield f"{name}.weight", module.token_adapter.get_merged_weights(["default"])


def merged_weight(layer: LoraLayer, dtype: torch.dtype) -> torch.Tensor:
    base_layer = layer.get_base_layer()
    weight = dequantize_module_weight(base_layer)
    dtype = weight.dtype if weight is base_layer.weight else dtype
    return (weight.float() + layer.get_delta_weight("default").float()).to(dtype)


def prefixes(name: str) -> Iterator[str]:
    """The modules that a parameter lies in, from the innermost outwards."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer | ModulesToSaveWrapper)


def names_of(layer: LoraLayer) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}
