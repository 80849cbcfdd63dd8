"""The fast paths that a run can have: each is called from `PPOTrainer` in one line and leaves its numbers as they are.

To learn the algorithm, skip this module: each docstring says what a method replaces.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from recipes.models.heads import base_of
from recipes.models.merged import unmergeable
from recipes.trainers.fast import length_buckets
from recipes.trainers.fast.drop_finished import DropFinishedSampler
from recipes.trainers.fast.frozen_head import FrozenHeadLogProbs, has_frozen_linear_head
from recipes.trainers.fast.lora_linear import fuse_adapters
from recipes.trainers.fast.merged_copy import sampling_from_copy
from recipes.trainers.fast.packed_weights import packed_weights
from recipes.trainers.ppo_config import PPOConfig
from recipes.trainers.replaced import replaced
from recipes.trainers.rollout import Results


class FastPaths:
    """`args.fast_paths` where they fit the model and the machine; LoRA layers of the policy are fused here."""

    def __init__(
        self, args: PPOConfig, accelerator: Accelerator, policy: PreTrainedModel | PeftModel, in_float32: bool
    ):
        self.args, self.accelerator, self.policy, self.base = args, accelerator, policy, base_of(policy)
        on_cpu, is_alone = accelerator.device.type == "cpu", accelerator.distributed_type == "NO"
        # Processes that share a model must make as many passes as each other.
        self.is_sharded = accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU")
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.compute_dtype = halves.get(accelerator.mixed_precision, self.base.dtype)
        copy_differs = isinstance(policy, PeftModel) or self.compute_dtype != self.base.dtype
        # On a CPU `packed_weights` are such a copy already.
        copy_helps = not args.use_vllm and (not on_cpu or args.use_transformers_continuous_batching)
        fits = {
            # A GPU has TRL's kernels for the head, and only they have gradients of the entropy.
            "response_logps": on_cpu and not args.entropy_coef,
            "drop_finished": not self.is_sharded and not args.generation_kwargs,  # beams are transformers' own work
            "packed_weights": not self.is_sharded and on_cpu,
            "fused_adapters": not self.is_sharded,
            "merged_copy": not self.is_sharded and copy_differs and copy_helps and not unmergeable(policy),
            "early_backward": is_alone,  # DDP reduces gradients once, in one backward
        }
        self.on = {path for path in args.fast_paths if fits.get(path, True)}
        # What a merged copy, or a decoding step in half precision, computes is not what training would.
        if not in_float32 or "merged_copy" in self.on:
            self.on -= {"sampling_logps"}
        # A GPU is idle while one more bucket starts, and DDP wants one forward for one backward.
        self.overhead = length_buckets.bucket_overhead(self.base) if on_cpu and is_alone else length_buckets.UNLIMITED
        self.sampler = DropFinishedSampler() if "drop_finished" in self.on else None
        if "fused_adapters" in self.on:
            fuse_adapters(self.base)

    def frozen_head(self, model: PreTrainedModel) -> Callable | None:
        """What computes log-probabilities under a frozen LM head; `None` leaves them to TRL's fused head."""
        fits = "response_logps" in self.on and has_frozen_linear_head(model)
        return FrozenHeadLogProbs.apply if fits else None

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Around TRL's generation: from a merged copy or packed weights, and rows that have ended leave the batch."""
        with contextlib.ExitStack() as stack:
            if self.args.use_transformers_continuous_batching:
                # TRL would cast the whole model in place, trained weights included.
                stack.enter_context(replaced(self.policy, to=lambda *args, **kwargs: self.policy))
            if "merged_copy" in self.on:
                stack.enter_context(sampling_from_copy(self.policy, self.compute_dtype))
            if "packed_weights" in self.on:
                stack.enter_context(packed_weights(self.base))
            if self.sampler is not None:
                self.sampler.logps = None  # generation elsewhere, as in vLLM, does not call it
                stack.enter_context(self.sampler.installed(self.base))
            yield

    def take_sampled_logps(self, width: int) -> torch.Tensor | None:
        """Log-probabilities that sampling has computed, (B, width), once; `None` where they are not training's."""
        if self.sampler is None or self.sampler.logps is None or "sampling_logps" not in self.on:
            return None
        logps, self.sampler.logps = self.sampler.logps, None
        return nn.functional.pad(logps, (0, width - logps.size(1)))

    def sort_by_length(self, micro_batches: list[dict]) -> list[dict]:
        """The micro-batches of a rollout; the rows of each optimizer step are dealt to its micro-batches by length."""
        # A mean within each micro-batch would depend on who shares one.
        if "length_sorting" not in self.on or self.args.loss_type != "dapo":
            return micro_batches
        window = self.args.gradient_accumulation_steps
        steps = [micro_batches[start : start + window] for start in range(0, len(micro_batches), window)]
        return [batch for step in steps for batch in length_buckets.sort_by_length(step)]

    def map_rows(self, run: Callable[[torch.Tensor], Results], lengths: torch.Tensor) -> Results:
        """The results of `run(rows)` for all rows, similar lengths together.

        Without gradients at most as many tokens at a time as `local_rollout_forward_batch_size` rows of the longest
        have; with gradients the rows are a micro-batch already.
        """
        with_gradients, most = torch.is_grad_enabled(), self.args.local_rollout_forward_batch_size
        if "length_sorting" in self.on and not self.is_sharded:
            budget = math.inf if with_gradients else most * int(lengths.max())
            buckets = length_buckets.length_buckets(lengths, budget, self.overhead)
        else:
            order = lengths.argsort(stable=True) if "length_sorting" in self.on else torch.arange(len(lengths))
            buckets = order.to(lengths.device).split(len(lengths) if with_gradients else most)
        return length_buckets.map_buckets(run, buckets)

    def backward_early(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss`, or, in a single process, its backward now: it frees the activations before the next forward."""
        if "early_backward" not in self.on or not loss.requires_grad:
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss)
        return loss.detach()
