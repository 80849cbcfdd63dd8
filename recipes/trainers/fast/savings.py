"""Which of the savings that were asked for a run can have: each must leave its numbers as they are."""

from accelerate import Accelerator
from torch import nn

from recipes.trainers.fast.live_rows import LiveRowSampling
from recipes.trainers.fast.lora_linear import fuse_adapters
from recipes.trainers.fast.packing import FEWEST_PIECES, piece_overhead
from recipes.trainers.ppo_config import PPOConfig


class Savings:
    """`args.fast_paths` where they fit; those inside the model's forward are in [`add_role_forward`].

    Args:
        base: the policy's model without PEFT's wrapper; its LoRA layers are fused here.
        in_float32: whether nothing of the run has another precision.
        has_tools: whether responses hold tokens that the policy did not sample.
    """

    def __init__(self, args: PPOConfig, accelerator: Accelerator, base: nn.Module, in_float32: bool, has_tools: bool):
        on = set(args.fast_paths)
        is_alone = accelerator.distributed_type == "NO"
        has_whole_model = is_alone or accelerator.distributed_type in ("MULTI_CPU", "MULTI_GPU")
        # What a decoding step computes in half precision is not what training would for the same token.
        self.sampling_logps = "sampling_logps" in on and in_float32 and not has_tools
        # DDP reduces gradients once, in one backward.
        self.early_backward = "early_backward" in on and is_alone
        # The critic's pass for the old values can also be its first training pass where all rows share that update.
        one_update = args.gradient_accumulation_steps == args.steps_per_generation and args.loss_type == "dapo"
        self.old_values = "old_values" in on and self.early_backward and one_update
        self.live_rows = None
        self.packed_weights = "packed_weights" in on and has_whole_model
        # A mean within each micro-batch would depend on who shares one.
        self.length_sorting = "length_sorting" in on and args.loss_type == "dapo"
        # A GPU is idle while one more piece is started, and several processes must make as many passes as each other.
        overhead = piece_overhead(base) if accelerator.device.type == "cpu" else FEWEST_PIECES
        self.piece_overhead = (overhead if is_alone else FEWEST_PIECES) if "length_sorting" in on else None
        if "live_rows" in on and has_whole_model:
            self.live_rows = LiveRowSampling(overhead if "length_sorting" in on else FEWEST_PIECES)
        if "fused_adapters" in on and has_whole_model:
            fuse_adapters(base)
