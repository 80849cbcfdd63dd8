"""Sampling from a merged copy of the policy in the precision that training computes in.

Sampling on a GPU is limited by the number of small kernels: about 2,900 a token of a 0.6B model with adapters, 1,700
without. And a float32 base would sample in float32, as `generate` runs outside of autocast. The copy is made anew for
each rollout, from new tensors, and freed before the update; its samples' log-probabilities are computed by
the training model.
"""

import contextlib

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from recipes.models.heads import base_of
from recipes.models.merged import empty_copy, merged_copy

logger = logging.get_logger(__name__)


def fits_beside(copy_bytes: int, free_bytes: int) -> bool:
    """Whether a copy may be made: as much again stays free, for the cache of what is sampled."""
    return 2 * copy_bytes <= free_bytes


def copy_bytes(base: PreTrainedModel, dtype: torch.dtype) -> int:
    """What a copy takes at most; weights that it shares with the base are counted too."""
    return empty_copy(base, dtype).num_parameters() * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """What torch can still give on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextlib.contextmanager
def sampling_from_copy(policy: PreTrainedModel | PeftModel, dtype: torch.dtype):
    """Let the policy generate from a copy; where that does not fit, from the policy itself."""
    base = base_of(policy)
    if base.device.type == "cuda" and not fits_beside(copy_bytes(base, dtype), free_bytes(base.device)):
        logger.warning_once("A merged copy of the policy does not fit beside it: sampling is slower without.")
        yield
        return
    copied = merged_copy(policy, dtype)
    copied.generation_config = base.generation_config
    base.generate, base.generate_batch = copied.generate, copied.generate_batch
    try:
        yield
    finally:
        for name in ("generate", "generate_batch"):
            vars(base).pop(name, None)


@contextlib.contextmanager
def uncast(policy: nn.Module):
    """Keep TRL from casting the whole model in place for continuous batching, trained weights included."""
    policy.to = lambda *args, **kwargs: policy
    try:
        yield
    finally:
        del policy.to
