"""Decoding from packed weights: the layout that the processor's kernels want, with the adapter merged.

A decoding step multiplies a few rows with every matrix, and a plain product then spends about as long on bringing the
matrix into its kernels' layout as on multiplying. A rollout has one set of weights for all its steps, so they are
packed once. The packed copies live as long as the rollout is sampled; the weights themselves are not touched.
"""

import contextlib
import functools

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from recipes.trainers.fast.lora_linear import plain_adapter
from recipes.trainers.replaced import replaced

# With more rows, as in the prefill, plain products are as fast.
FEW_ROWS = 128
# What torch's own compiler packs with (`torch._inductor.mkldnn_lowerings`); absent from builds without oneDNN.
OPERATORS = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None


@contextlib.contextmanager
def packed_weights(model: nn.Module):
    """Let the linear layers of `model` multiply few rows from packed float32 copies, made when first needed.

    Layers elsewhere than on a CPU, of another precision or with more than a plain LoRA run as they are. Inside, the
    weights and the active adapter may not change.
    """
    with contextlib.ExitStack() as stack:
        for layer in linear_layers(model) if OPERATORS is not None else ():
            packed = functools.partial(_forward, layer, layer.forward, {})
            stack.enter_context(replaced(layer, forward=packed))
        yield


def linear_layers(module: nn.Module):
    """The linear layers of `module`; one with LoRA counts as one."""
    if isinstance(module, LoraLinear) or type(module) is nn.Linear:
        yield module
    else:
        for child in module.children():
            yield from linear_layers(child)


def merged_weight(layer: nn.Linear | LoraLinear) -> torch.Tensor | None:
    """What `layer` multiplies with, its adapter included; `None` if it does more than that."""
    if type(layer) is nn.Linear:
        return layer.weight
    name = plain_adapter(layer)
    return None if name is None else layer.base_layer.weight + layer.get_delta_weight(name)


def _forward(layer, plain, packed: dict, x, *args, **kwargs):
    rows = x.numel() // x.size(-1)
    if rows > FEW_ROWS or args or kwargs or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return plain(x, *args, **kwargs)
    if not packed:
        weight = merged_weight(layer)
        fits = weight is not None and weight.device.type == "cpu" and weight.dtype == torch.float32
        packed["weight"] = OPERATORS._reorder_linear_weight(weight, rows) if fits else None
    if packed["weight"] is None or x.dtype != torch.float32:
        return plain(x)
    bias = (layer.base_layer if isinstance(layer, LoraLinear) else layer).bias
    return OPERATORS._linear_pointwise(x, packed["weight"], bias, "none", [], "")
