"""Sampling without idle rows: finished responses leave the batch, and the samples' log-probabilities are kept."""

import contextlib
import functools

import torch
from transformers import DynamicCache, PreTrainedModel, TemperatureLogitsWarper
from transformers.cache_utils import DynamicLayer

from recipes.cli.errors import UserError
from recipes.trainers.replaced import replaced


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` that grows by a quarter at a time; the plain one copies all it holds for every token."""

    buffers: list[torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        length = seen + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < length:
            room = length - seen + max(16, length // 4)
            self.buffers = [
                torch.cat([held, new.new_empty(*new.shape[:-2], room, new.shape[-1])], -2)
                for held, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., seen:length, :] = new
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None


class DropFinishedSampler:
    """A decoding loop for `generate(custom_generate=…)`; everything around the loop stays transformers' own.

    After a call `logps` holds log p of each sampled token, (B, new tokens), float32 and 0 after the end, under the
    whole distribution at the temperature, whatever top-k, top-p or penalties sampled from. It is None where the loop
    left the work to transformers': beams, greedy decoding, caches whose rows cannot be selected.
    """

    # Selecting rows copies the cache, so it waits until this share of the batch has finished.
    IDLE_SHARE = 1 / 8
    logps: torch.Tensor | None = None

    def installed(self, model: PreTrainedModel) -> contextlib.AbstractContextManager:
        """Let `model.generate` sample with this loop."""
        return replaced(model, generate=functools.partial(model.generate, custom_generate=self))

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """Prompts and samples, (B, P + new tokens), padded at the end; arguments as in `GenerationMixin._sample`."""
        self.logps = None
        cache = model_kwargs.get("past_key_values")
        plain = generation_config.do_sample and generation_config.num_beams == 1 and type(cache) is DynamicCache
        if not plain or not all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
            return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        filtered = any(not isinstance(processor, TemperatureLogitsWarper) for processor in logits_processor)
        temperature, pad_token_id = generation_config.temperature or 1.0, generation_config._pad_token_tensor.item()
        rows = torch.arange(len(input_ids), device=input_ids.device)
        live = torch.ones_like(rows, dtype=torch.bool)
        start, stop = input_ids.size(1), generation_config.max_length
        ids = input_ids.new_full((len(rows), stop), pad_token_id)
        ids[:, :start], logps = input_ids, torch.zeros_like(ids, dtype=torch.float32)
        # Every pass over the vocabulary goes here: memory taken anew for each token would cost more than the pass.
        buffer = None
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        with model._optimize_model_for_decode():
            for place in range(start, stop):
                model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
                logits = outputs.logits[:, -1].float()
                buffer = torch.empty_like(logits) if buffer is None else buffer[: len(logits)]
                top = logits.amax(1, keepdim=True)
                weights = torch.sub(logits, top, out=buffer).div_(temperature).exp_()
                total = weights.sum(1, keepdim=True)
                if filtered:
                    kept = logits_processor(input_ids, buffer.copy_(logits))
                    weights = kept.sub_(kept.amax(1, keepdim=True)).exp_()
                tokens = draw(weights)
                token_logps = (logits.gather(1, tokens) - top) / temperature - total.log()
                ids[rows[live], place], logps[rows[live], place] = tokens[live, 0], token_logps[live, 0]
                input_ids = ids[rows, : place + 1]
                live = live & ~stopping_criteria(input_ids, None)
                if not live.any():
                    break
                if (~live).sum() >= self.IDLE_SHARE * len(live):
                    model_kwargs["past_key_values"].batch_select_indices(live.nonzero()[:, 0])
                    model_kwargs = {k: v[live] if by_row(v, live) else v for k, v in model_kwargs.items()}
                    input_ids, rows, live = input_ids[live], rows[live], live[live]
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                outputs = model(**inputs, return_dict=True)
        self.logps = logps[:, start : place + 1]
        if not self.logps.isfinite().all():
            raise UserError(
                "Sampling: the policy's logits are not finite numbers. An update has diverged, or half precision has "
                "overflowed: lower learning_rate, or go back to an earlier checkpoint."
            )
        return ids[:, : place + 1]


def draw(weights: torch.Tensor) -> torch.Tensor:
    """One sample a row, (B, 1), in proportion to `weights` (B, V), which are overwritten; never one of weight 0.

    On a CPU the running sum is inverted, with a single random number above 0 instead of V. On a GPU, which sums in
    parallel, a running sum may fall by a rounding error: there the token of the largest `weight / Exp(1)` is drawn.
    """
    if weights.device.type != "cpu":
        return weights.div_(torch.empty_like(weights).exponential_()).argmax(1, keepdim=True)
    cumulated = weights.cumsum_(1)
    chance = 1 - torch.rand(len(cumulated), 1, device=cumulated.device)
    # Weights that are not numbers end beyond the last token; the caller sees them in the log-probabilities.
    return torch.searchsorted(cumulated, chance * cumulated[:, -1:]).clamp_(max=weights.size(1) - 1)


def by_row(value, live: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == len(live)
