"""The policy's weights with its adapter merged in, as new tensors: the base that other roles share never changes.

PEFT's `merge_adapter` changes the base in place. In bf16 half of its numbers differ after 200 rounds of merging and
unmerging, and a 4-bit base is quantised anew each time.
"""

import copy
from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from recipes.models.heads import base_of

OTHER_ROLES = ("critic.", "score.")


def unmergeable(model: PreTrainedModel | PeftModel) -> str | None:
    """What the policy's adapter has that [`policy_parameters`] cannot merge."""
    if not isinstance(model, PeftModel):
        return None
    base, config = model.get_base_model(), model.peft_config["default"]
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        return "LoRA on one of two tied embeddings"  # one matrix would have to hold two
    method = getattr(base, "quantization_method", QuantizationMethod.BITS_AND_BYTES)
    if method != QuantizationMethod.BITS_AND_BYTES:  # weights beside scales, which only its own layers put together
        return f"a base in {method.value}"
    for layer in base.modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_variant:  # as DoRA, which is more than B A
            return type(layer.lora_variant["default"]).__name__
    return next((name for name in ("lora_bias", "target_parameters") if getattr(config, name, None)), None)


@torch.no_grad()
def policy_parameters(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as in the base's checkpoint, and weights with the adapter `default` inside, in tensors of their own.

    `W + B A * scaling` is added in float32 and has the base's precision, a 4-bit base that of its other weights. What
    no adapter changes is the base's own tensor.
    """
    base, seen = base_of(model), set()
    for name, weight in merged_parameters(base, "", base.dtype):
        if id(weight) not in seen:  # tied weights come once
            yield name, weight.data
        if isinstance(weight, nn.Parameter):  # which lives on, so that no other tensor gets its id
            seen.add(id(weight))


def merged_parameters(module: nn.Module, path: str, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """What `module`, whose name is `path` with a dot, holds for the policy; a wrapper of PEFT is what it wraps."""
    if path in OTHER_ROLES:
        return
    if isinstance(module, ModulesToSaveWrapper):
        copies = module.modules_to_save
        own = copies["default"] if "default" in copies else module.original_module
        yield from merged_parameters(own, path, dtype)
    elif isinstance(module, TrainableTokensWrapper):
        if module.token_adapter.tied_adapter is None:
            yield f"{path}weight", module.token_adapter.get_merged_weights(["default"])
    elif isinstance(module, LoraLayer):
        changed = "default" in module.lora_A or "default" in module.lora_embedding_A
        for name, weight in merged_parameters(module.get_base_layer(), path, dtype):
            if changed and name == f"{path}weight":
                weight = (weight.float() + module.get_delta_weight("default").float()).to(weight.dtype)
            yield name, weight
    else:
        for name, parameter in module.named_parameters(recurse=False):
            weight = dequantize_module_weight(module) if name == "weight" else parameter
            if weight is not parameter:  # on a CPU PEFT puts another there, without the scales of its 8 bits
                module.weight, weight = parameter, weight.to(dtype)
            yield f"{path}{name}", weight
        for name, child in module.named_children():
            yield from merged_parameters(child, f"{path}{name}.", dtype)


def empty_copy(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model of the same architecture whose parameters have shapes and no data."""
    with init_empty_weights(include_buffers=False):
        empty = type(base)._from_config(copy.deepcopy(base.config), dtype=dtype)
    empty.tie_weights()
    return empty


def merged_copy(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model that generates as the policy does now, in `dtype`; what is the same there is the base's tensor."""
    base = base_of(model)
    copied = empty_copy(base, dtype)
    weights = {name: weight.to(dtype) for name, weight in policy_parameters(model)}
    buffers = dict(base.named_buffers())  # those that a checkpoint holds, such as the bias of a router
    missing = copied.load_state_dict(buffers | weights, strict=False, assign=True).missing_keys
    copied.tie_weights(missing_keys={*missing})
    return copied.to(base.device).eval().requires_grad_(False)
