"""Sampling from a merged copy of the policy in the precision that training computes in.

Sampling on a GPU is limited by the number of small kernels: about 2,900 a token of a 0.6B model with adapters, 1,700
without. And a float32 base would sample in float32, as `generate` runs outside of autocast. The copy is made anew for
each rollout, and freed before the update; the log-probabilities of its samples are the training model's.
"""

import contextlib

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging

from recipes.models.heads import base_of
from recipes.models.merged import empty_copy, merged_copy
from recipes.trainers.replaced import replaced

logger = logging.get_logger(__name__)


def fits_beside(copy_bytes: int, free_bytes: int) -> bool:
    """Whether a copy may be made: as much again stays free, for the cache of what is sampled."""
    return 2 * copy_bytes <= free_bytes


def free_bytes(device: torch.device) -> int:
    """What torch can still give on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextlib.contextmanager
def sampling_from_copy(policy: PreTrainedModel | PeftModel, dtype: torch.dtype):
    """Let the policy generate from a copy; where that does not fit, from the policy itself."""
    base = base_of(policy)
    on_gpu = base.device.type == "cuda"
    # What it shares with the base is counted too.
    if on_gpu and not fits_beside(empty_copy(base, dtype).num_parameters() * dtype.itemsize, free_bytes(base.device)):
        logger.warning_once("A merged copy of the policy does not fit beside it: sampling is slower without.")
        yield
        return
    copied = merged_copy(policy, dtype)
    copied.generation_config = base.generation_config
    with replaced(base, generate=copied.generate, generate_batch=copied.generate_batch):
        yield
