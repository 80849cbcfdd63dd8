"""A linear layer and its LoRA in one step, which never holds the adapter's output beside the layer's.

PEFT adds `B(A(x)) * scaling` by three passes over the layer's output, and autograd keeps what each needs. Here the
products add to the output in place, and the gradient (2106.09685, section 4.1) is written out.
"""

import functools
import types

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F


class LoraLinearFunction(torch.autograd.Function):
    """`(x (..., K), weight (N, K), bias (N,) or None, a (r, K), b (N, r), scaling) -> (..., N)`; weight is frozen."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        rows = x.reshape(-1, x.size(-1))
        low = torch.mm(rows, a.t()).mul_(scaling)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scaling, ctx.shape = scaling, x.shape
        return F.linear(rows, weight, bias).addmm_(low, b.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, a, b, low = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.size(-1))
        to_low = torch.mm(gradient, b).mul_(ctx.scaling)
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        to_x = torch.mm(gradient, weight).addmm_(to_low, a).view(ctx.shape) if wants_x else None
        to_a = torch.mm(to_low.t(), rows) if wants_a else None
        to_b = torch.mm(gradient.t(), low) if wants_b else None
        return to_x, None, None, to_a, to_b, None


def plain_adapter(layer: LoraLinear) -> str | None:
    """The adapter that `layer` adds now, if all it does is `W x + b + B(A(x)) * scaling` with a frozen W."""
    base = layer.base_layer
    if type(layer) is not LoraLinear or type(base) is not nn.Linear or layer.fan_in_fan_out or layer.merged:
        return None
    if layer.disable_adapters or base.weight.requires_grad or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    dropout = layer.lora_dropout[name]
    is_off = isinstance(dropout, nn.Identity) or dropout.p == 0 or not dropout.training
    return name if is_off else None


def fuse_adapters(model: nn.Module) -> None:
    """Let the LoRA layers of `model` run as [`LoraLinearFunction`] where they are plain; else PEFT's forward runs."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.forward = types.MethodType(_forward, module)


@functools.wraps(LoraLinear.forward)
def _forward(self, x, *args, **kwargs):
    name = None if args or kwargs or torch.is_autocast_enabled(x.device.type) else plain_adapter(self)
    if name is None:
        return LoraLinear.forward(self, x, *args, **kwargs)
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    if not x.dtype == base.weight.dtype == a.dtype == b.dtype:
        return LoraLinear.forward(self, x)
    return LoraLinearFunction.apply(x, base.weight, base.bias, a, b, self.scaling[name])
