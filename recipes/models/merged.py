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
from transformers import PreTrainedModel

OTHER_ROLES = ("critic.", "score.")


def unmergeable(model: PreTrainedModel | PeftModel) -> str | None:
    """What the policy's adapter has that [`policy_parameters`] cannot merge."""
    if not isinstance(model, PeftModel):
        return None
    base, config = model.get_base_model(), model.peft_config["default"]
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        return "LoRA on one of two tied embeddings"  # one matrix would have to hold two
    return next((name for name in ("use_dora", "lora_bias", "target_parameters") if getattr(config, name, None)), None)


@torch.no_grad()
def policy_parameters(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as in the base's checkpoint, and weights with the adapter `default` inside, in tensors of their own.

    `W + B A * scaling` is added in float32 and has the base's precision, a 4-bit base that of its other weights. What
    no adapter changes is the base's own tensor.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(base.named_modules())
    for name, parameter in base.named_parameters():
        if name.startswith(OTHER_ROLES) or any(
            part.startswith(("lora_", "token_adapter")) for part in name.split(".")
        ):
            continue
        parents = [modules[name[:place]] for place, char in enumerate(name) if char == "."]
        owner = next((each for each in reversed(parents) if isinstance(each, LoraLayer | ModulesToSaveWrapper)), None)
        plain = name.replace(".base_layer.", ".")
        if isinstance(owner, ModulesToSaveWrapper):
            trained = ".modules_to_save.default."
            if trained in name:
                yield name.replace(trained, "."), parameter.data
            elif ".original_module." in name and "default" not in owner.modules_to_save:
                yield name.replace(".original_module.", "."), parameter.data
        elif isinstance(owner, LoraLayer) and name.endswith(".base_layer.weight") and has_policy(owner):
            yield plain, merged_weight(owner, base.dtype)
        else:
            yield plain, parameter.data
    for name, module in modules.items():
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None:
            yield f"{name}.weight", module.token_adapter.get_merged_weights(["default"])


def has_policy(layer: LoraLayer) -> bool:
    return "default" in layer.lora_A or "default" in layer.lora_embedding_A


def merged_weight(layer: LoraLayer, dtype: torch.dtype) -> torch.Tensor:
    base_layer = layer.get_base_layer()
    weight = dequantize_module_weight(base_layer)
    dtype = weight.dtype if weight is base_layer.weight else dtype
    return (weight.float() + layer.get_delta_weight("default").float()).to(dtype)


def empty_copy(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model of the same architecture whose parameters have shapes and no data."""
    with init_empty_weights(include_buffers=False):
        empty = type(base)._from_config(copy.deepcopy(base.config), dtype=dtype)
    empty.tie_weights()
    return empty


def merged_copy(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model that generates as the policy does now, in `dtype`; what is the same there is the base's tensor."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    copied = empty_copy(base, dtype)
    weights = {name: weight.to(dtype) for name, weight in policy_parameters(model)}
    buffers = dict(base.named_buffers())  # those that a checkpoint holds, such as the bias of a router
    missing = copied.load_state_dict(buffers | weights, strict=False, assign=True).missing_keys
    copied.tie_weights(missing_keys={*missing})
    return copied.to(base.device).eval().requires_grad_(False)
