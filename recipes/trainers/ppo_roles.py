"""The roles of PPO: which model or adapter plays each of them, and what it computes."""

import copy

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, pad

from recipes.cli.errors import UserError
from recipes.models import adapters
from recipes.models.dropout import disable_dropout_rates
from recipes.models.heads import add_state_forward, critic_from_policy, full_critic, use_float32_head
from recipes.models.vllm import send_only_policy
from recipes.trainers.fast.fast_paths import FastPaths
from recipes.trainers.rollout import Results, response_states, right_align


def check_room(model: PreTrainedModel, name: str, tokens: int) -> None:
    """Refuse sequences of more tokens than `model` has positions for; on a GPU they would be a failed assertion."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and 0 < positions < tokens:  # -1 stands for no limit
        raise UserError(
            f"A prompt and its response have {tokens} tokens for {name}, which has positions for {positions}: leave "
            "out long prompts, or lower max_completion_length."
        )


class PPORoles(GRPOTrainer):
    """The part of `PPOTrainer` that gives each role its model or adapter, and calls it.

    Adapters are added before `GRPOTrainer` sees the model, and forwards are changed after it.
    """

    def _add_reference(self, ref_model: PreTrainedModel | None) -> PreTrainedModel | None:
        """Give the policy the adapter `ref`, or return the model that is the reference."""
        if self._is_peft:
            adapters.check_adapter_kind(self._policy)
            self._policy.set_adapter("default")  # another may be active where several were loaded by hand
        if ref_model is None and self._is_peft:
            if "ref" in self._policy.peft_config:
                raise UserError("model has an adapter `ref`, as of another PPOTrainer: delete it or pass ref_model.")
            adapters.add_copy(self._policy, "default", "ref")
            return None
        ref_model = copy.deepcopy(self._policy) if ref_model is None else ref_model
        return adapters.model_with_adapter(ref_model, "ref_model").requires_grad_(False).eval()

    def _add_critic(self, value_model: PreTrainedModel | None, trust_remote_code: bool) -> None:
        """Give the policy the adapter `critic`, or put the model that is the critic into its base."""
        if self._is_peft and "critic" in self._policy.peft_config:
            if value_model is not None:
                raise UserError("value_model and the policy's adapter `critic` are two critics: pass one of them.")
        elif self._is_peft and value_model is None:
            adapters.add_score_roles(self._policy, {"critic": None})
        else:
            if value_model is None:
                value_model = critic_from_policy(self._policy, trust_remote_code)
            if not isinstance(value_model, PeftModel):
                adapters.train_text(value_model)
            use_float32_head(adapters.model_with_adapter(value_model, "value_model"))
            self._base.critic = value_model

    def _train_only_roles(self) -> None:
        """Turn gradients on for policy and critic only; of a critic that is a `PeftModel`, for its adapter."""
        critic = full_critic(self._policy)
        if self._is_peft:
            adapters.train_only(self._policy, ("default", "critic"))
        if isinstance(critic, PeftModel):
            adapters.train_only(critic, critic.active_adapters)

    def _add_to_given(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a given optimizer train what PPO has made after it: a new adapter and the critic."""
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        own = [p for role in ("default", "critic") for p in adapters.adapter_parameters(self._policy, role).values()]
        optimizer.param_groups[-1]["params"] += [p for p in own if p.requires_grad and p not in held]

    def _prepare_models(self, ref_model: PreTrainedModel | None) -> None:
        """Give every model the forward that PPO calls, and place frozen ones beside the policy."""
        args, base = self.args, self._base
        if self.is_fsdp_enabled:
            adapters.check_shards(self.accelerator.state.fsdp_plugin, self._is_peft)
        if self.use_vllm:
            send_only_policy(self.vllm_generation)
        quantized = getattr(base, "is_quantized", False)
        self._in_float32 = self.accelerator.mixed_precision == "no" and base.dtype == torch.float32 and not quantized
        self._fast = FastPaths(args, self.accelerator, self._policy, self._in_float32)
        add_state_forward(base, self.temperature, self._fast.frozen_head(base))
        if args.disable_dropout:
            disable_dropout_rates(base)
        adapters.checkpoint_under_roles(self._policy)
        if ref_model is not None:
            add_fused_lm_head(ref_model, self.temperature, args.cast_lm_head_to_fp32)
            add_state_forward(ref_model, self.temperature, self._fast.frozen_head(ref_model))
            self.ref_model = self._prepare_frozen(ref_model)
        if self._reward_model is not None:
            self._reward_model = self._prepare_frozen(self._reward_model)

    def _prepare_frozen(self, model: PreTrainedModel) -> nn.Module:
        """`model` on this process's device, or sharded where the policy is, as TRL prepares its reference."""
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)

    # What a role computes

    def _values(self, model: nn.Module, ids, attention_mask, width: int) -> torch.Tensor:
        """The critic's value of the state before each of the last `width` tokens, (B, width), 0 at padding."""
        with adapters.use_role(self._policy, "critic"):
            return self._at_responses(model, ids, attention_mask, width, scalar_head="critic")[0]

    def _at_responses(self, model: nn.Module, ids, attention_mask, width: int, **options) -> Results:
        """What `model` gives for the last `width` tokens of all rows, (B, width) each, 0 at padding.

        Log p in nats, and entropies or None, or the scores of a `scalar_head`: `options` are those of
        [`~recipes.models.heads.add_state_forward`].
        """

        def run(rows: torch.Tensor) -> Results:
            mask = attention_mask[rows]
            real = mask[:, -width:].bool()
            states, targets = response_states(mask, width), ids[rows, -width:][real]
            found = model(input_ids=right_align(ids[rows], mask), states=states, targets=targets, **options)
            found = found if isinstance(found, tuple) else (found,)
            return tuple(None if x is None else x.new_zeros(real.shape).masked_scatter(real, x) for x in found)

        with self.accelerator.autocast():
            return self._fast.map_rows(run, attention_mask.sum(1))

    def _score_rows(self, rows: list[list[int]]) -> list[float]:
        """Scores of whole sequences of token ids, in their order, at most a micro-batch at a time."""
        if self._reward_model is not None:  # the prompts were measured in the policy's tokens
            check_room(self._reward_model, "the reward model", max(map(len, rows)))
        pad_token_id, device = self._reward_pad_token_id, self.accelerator.device
        ids = pad([torch.tensor(row) for row in rows], pad_token_id).to(device)
        # transformers' rule for sequence classifiers: the last token that is not the padding token
        last = (torch.arange(ids.size(1), device=device) * (ids != pad_token_id)).argmax(1)

        def score(rows: torch.Tensor) -> Results:
            states = torch.arange(len(rows), device=device), last[rows]
            inputs = ids[rows, : last[rows].max() + 1]
            if self._reward_model is not None:
                return (self._reward_model(input_ids=inputs, states=states),)
            return (self.model(input_ids=inputs, states=states, scalar_head="reward"),)

        with adapters.use_role(self._policy, "reward"), self.accelerator.autocast():
            (scores,) = self._fast.map_rows(score, last)
        return scores.tolist()

    def create_optimizer(self, model=None):
        """TRL's optimizer, with groups of their own for the critic where it has its own learning rate."""
        optimizer = super().create_optimizer(model)
        rate = self.args.critic_learning_rate
        if rate is not None:
            critic = {*adapters.adapter_parameters(model or self.model, "critic").values()}
            for group in list(optimizer.param_groups):
                moved = [parameter for parameter in group["params"] if parameter in critic]
                group["params"] = [parameter for parameter in group["params"] if parameter not in critic]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer
