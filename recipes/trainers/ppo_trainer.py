"""PPO for language models on TRL's `GRPOTrainer`: the trainer that TRL carried until 1.12, with LoRA roles.

`GRPOTrainer` owns prompts, chat templates, generation, distributed launch, checkpoints and logging. PPO adds what
needs a value for every token. A rollout has four steps, in this order in the file:

1. sample      `_generate`: the policy answers prompts
2. score       `_calculate_rewards`, `_score`: rewards, log-probabilities of policy and reference, values
3. advantages  `_estimate_advantages`: the KL penalty enters the reward here, then GAE and whitening
4. update      `_compute_loss`: clipped policy loss and value loss of one micro-batch

`docs/ppo.md` explains every metric, and `recipes/trainers/ppo_math.py` has the formulas.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import prepare_fsdp
from trl.trainer.utils import add_fused_lm_head

from recipes.cli.errors import UserError, first_line, refusals_in_one_line
from recipes.models.adapters import (
    AdapterEMA,
    adapter_parameters,
    add_copy,
    add_score_roles,
    check_adapter_kind,
    check_shards,
    checkpoint_under_roles,
    float32_adapters,
    keep_one_embedding_hook,
    model_with_adapter,
    train_only,
    train_text,
    use_role,
)
from recipes.models.dropout import disable_dropout_rates
from recipes.models.heads import (
    add_score_forward,
    add_state_forward,
    base_of,
    critic_from_policy,
    full_critic,
    use_float32_head,
)
from recipes.models.loading import not_finite
from recipes.models.tokenization import render_alike, turn_end
from recipes.models.vllm import send_only_policy
from recipes.trainers.checkpoints import EpochSampler
from recipes.trainers.fast.fast_paths import FastPaths
from recipes.trainers.ppo_config import PPOConfig
from recipes.trainers.ppo_math import (
    PAPER,
    AdaptiveKL,
    compute_gae,
    policy_losses,
    token_kl,
    token_rewards,
    value_losses,
    whiten,
)
from recipes.trainers.ppo_saving import PPOSaving
from recipes.trainers.ppo_tracking import PPOLogging
from recipes.trainers.ptx import PtxBatches
from recipes.trainers.reward_functions import checked
from recipes.trainers.rollout import Results, Rollout, at_responses, sequences


class PPOTrainer(PPOLogging, PPOSaving, GRPOTrainer):
    """Proximal policy optimisation (1707.06347) of a language model with a KL penalty (1909.08593, 2203.02155).

    Args:
        args: [`PPOConfig`].
        processing_class: tokenizer of the policy; its padding side does not matter.
        model: the policy. A `PeftModel` may already hold the adapters `reward` and `critic` (see
            [`~recipes.models.adapters.add_score_roles`]); one base then plays all roles.
        ref_model: the reference, default a frozen copy of the policy as it is now (an adapter where it has one).
        reward_model: sequence classifier with one label, beside the policy.
        reward_processing_class: its tokenizer. With the policy's vocabulary and chat template it scores the sampled
            ids, else the decoded text.
        value_model: sequence classifier with one label to train as the critic. Default: the adapter `critic`; without
            one, the policy with a head of zeros.
        reward_funcs: functions of TRL's signature `f(prompts, completions, completion_ids, **kwargs) -> list[float]`,
            added to the reward model's score with `args.reward_weights` (the reward model's weight comes first).
        train_dataset, eval_dataset: rows with a `prompt`, as text or messages.
        ptx_dataset: demonstrations trained beside PPO, for `args.ptx_coef` above 0 (see [`PtxBatches`]).
        callbacks, optimizers, peft_config: as in `GRPOTrainer`.

    Hooks into TRL 1.16, which `tests/trainers/test_trl_contract.py` compares with the installed TRL. For a new rollout
    `_prepare_inputs` calls `_generate_and_score_completions`, and that calls `_generate`,
    `_get_per_token_logps_and_entropies` (the policy's, unless the rollout is one update) and `_calculate_rewards`,
    in this order. `_compute_loss`, `training_step` and `create_optimizer` are the update. `log` (in
    [`PPOLogging`]) makes completions readable. `_get_train_sampler`, and `_save`, `_load_from_checkpoint` and
    `_load_best_model` (in [`PPOSaving`]) make a run go on where it was.

    Raises:
        ValueError: there is nothing to score with.
        UserError: fewer prompts than one rollout, a reward model with several labels, an adapter that cannot share its
            base, a score or a loss that is not a finite number.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = PAPER

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        reward_model: PreTrainedModel | None = None,
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        value_model: PreTrainedModel | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        reward_funcs: Callable | list[Callable] | None = None,
        ptx_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if ref_model is model or (value_model is reward_model and value_model is not None):
            raise UserError("ref_model and model, value_model and reward_model must not be the same object: copy one.")
        if peft_config is not None and isinstance(model, PeftModel):
            raise UserError("model is a PeftModel already: leave peft_config out, or merge its adapter first.")
        if peft_config is not None:
            set_seed(args.seed)  # as GRPOTrainer does, before the adapter draws its initial weights
            model = get_peft_model(model, peft_config)
        if isinstance(train_dataset, Dataset):
            args.check_prompts(len(train_dataset))
        if args.cast_lm_head_to_fp32 and isinstance(model, PeftModel):
            if model.config.get_text_config().tie_word_embeddings:
                raise UserError("TRL has no cast_lm_head_to_fp32 for LoRA on a base with tied embeddings.")
        if args.ptx_coef > 0 and ptx_dataset is None:
            raise UserError("ptx_coef needs demonstrations: set ptx_dataset.")

        self._policy, self._is_peft = model, isinstance(model, PeftModel)
        self._base = base_of(model)
        ref_model = self._add_reference(ref_model)
        if args.ema_decay is not None:
            callbacks = [*(callbacks or []), self._add_ema(args.ema_decay)]
        # Last: no adapter of the policy may come into its layers.
        self._add_critic(value_model, args.trust_remote_code)
        self._train_only_roles()
        reward_tokenizer = reward_processing_class or processing_class
        columns = [] if args.remove_unused_columns else getattr(train_dataset, "column_names", None)
        reward_funcs = self._add_rewards(reward_model, reward_tokenizer, processing_class, reward_funcs, columns)

        with float32_adapters(model), refusals_in_one_line():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )

        if self.use_vllm:
            send_only_policy(self.vllm_generation)
        self._prepare_models(ref_model)
        self.kl_controller = AdaptiveKL(args.kl_coef, args.adaptive_kl_target, args.adaptive_kl_horizon)
        self._update_stopped, self._ptx = False, None
        if args.ptx_coef > 0:
            batch_size, max_length = args.per_device_train_batch_size, args.ptx_max_length
            options = self.chat_template_kwargs
            self._ptx = PtxBatches(ptx_dataset, self._tokenizer, batch_size, max_length, args.seed, **options)
        self._start_logging(ratio_tolerance=1e-3 if self._in_float32 else 0.05)

    # Construction

    def _add_reference(self, ref_model: PreTrainedModel | None) -> PreTrainedModel | None:
        """Give the policy the adapter `ref`, or return the model that is the reference."""
        self._ref_role = None
        if self._is_peft:
            check_adapter_kind(self._policy)
            if ref_model is None:
                self._ref_role = "ref"
                if "ref" not in self._policy.peft_config:
                    add_copy(self._policy, "default", "ref")
        elif ref_model is None:
            ref_model = copy.deepcopy(self._policy)
        return None if ref_model is None else model_with_adapter(ref_model, "ref_model").requires_grad_(False)

    def _add_critic(self, value_model: PreTrainedModel | None, trust_remote_code: bool) -> None:
        if self._is_peft and "critic" in self._policy.peft_config:
            if value_model is not None:
                raise UserError("value_model and the policy's adapter `critic` are two critics: pass one of them.")
            return
        if self._is_peft and value_model is None:
            add_score_roles(self._policy, {"critic": None})
            return
        if value_model is None:
            value_model = critic_from_policy(self._policy, trust_remote_code)
        if not isinstance(value_model, PeftModel):
            train_text(value_model)
        use_float32_head(model_with_adapter(value_model, "value_model"))
        self._base.critic = value_model

    def _train_only_roles(self) -> None:
        """Turn gradients on for policy and critic only; of a critic that is a `PeftModel`, for its adapter."""
        critic = full_critic(self._policy)
        if self._is_peft:
            train_only(self._policy, ("default", "critic"))
        if isinstance(critic, PeftModel):
            train_only(critic, critic.active_adapters)

    def _add_ema(self, decay: float) -> TrainerCallback:
        if not self._is_peft:
            raise UserError("ema_decay averages the policy's adapter: it needs LoRA (use_peft).")
        return AdapterEMA(self._policy, decay)

    def _add_rewards(self, reward_model, reward_tokenizer, policy_tokenizer, reward_funcs, columns) -> list[Callable]:
        """What TRL calls for rewards: the reward model first, where there is one, then the functions."""
        functions = [*reward_funcs] if isinstance(reward_funcs, list | tuple) else [reward_funcs] * bool(reward_funcs)
        functions = [checked(function, columns) for function in functions]

        def reward_model_function(**kwargs):
            return self.score_responses(**kwargs)

        reward_model_function.__name__ = "reward_model"  # its name in metrics and errors
        self._reward_model, self._reward_tokenizer = reward_model, reward_tokenizer
        self._other_vocabulary = reward_tokenizer.get_vocab() != policy_tokenizer.get_vocab()
        self._other_template = not render_alike(reward_tokenizer, policy_tokenizer)
        self._has_reward_model = reward_model is not None or (self._is_peft and "reward" in self._policy.peft_config)
        if reward_model is not None:
            if reward_model.config.num_labels != 1:
                raise UserError(f"reward_model has num_labels={reward_model.config.num_labels}, PPO needs 1.")
            self._reward_model = model_with_adapter(reward_model, "reward_model").requires_grad_(False).eval()
            add_score_forward(self._reward_model)
        if self._has_reward_model:
            functions.insert(0, reward_model_function)
        names = [function.__name__ for function in functions]
        if same := {name for name in names if names.count(name) > 1}:
            raise UserError(f"Two rewards are called {same.pop()}: the log would mix their numbers. Rename one.")
        if not functions:
            raise ValueError("PPO needs a reward: reward_model, a policy with the adapter `reward`, or reward_funcs.")
        return functions

    def _prepare_models(self, ref_model: PreTrainedModel | None) -> None:
        """Give every model the forward that PPO calls, and place frozen ones beside the policy."""
        args, base = self.args, self._base
        if self.is_fsdp_enabled:
            check_shards(self.accelerator.state.fsdp_plugin, self._is_peft)
        quantized = getattr(base, "is_quantized", False)
        self._in_float32 = self.accelerator.mixed_precision == "no" and base.dtype == torch.float32 and not quantized
        self._fast = FastPaths(args, self.accelerator, self._policy, self._in_float32)
        add_state_forward(base, self.temperature, self._fast.frozen_head(base))
        if args.disable_dropout:
            disable_dropout_rates(base)
        keep_one_embedding_hook(base)
        if self._is_peft:
            checkpoint_under_roles(self._policy)
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

    # Step 1: sample

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not sampler.shuffle:
            return sampler
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return EpochSampler(**{name: getattr(sampler, name) for name in names})

    def _prepare_inputs(self, generation_batch):
        """One micro-batch; at the start of a rollout TRL makes it anew and deals it to micro-batches."""
        before = self._buffered_inputs
        with self._phase("score"):
            inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = self._fast.sort_by_length(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate(self, prompts: list):
        """TRL's sampling of B prompts, whose ids the steps after it need."""
        try:
            with self._only_own_sampling(), self._fast.sampling(), self._phase("sample"):
                samples = super()._generate(prompts)
        except (UserError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not not_finite(self._policy):
                raise
            self.stop(f"nothing can be sampled ({first_line(error)})")
        self._begin_table()
        self._rollout = Rollout(samples[0], samples[1], is_conversational({"prompt": prompts[0]}))
        return samples

    @contextlib.contextmanager
    def _only_own_sampling(self) -> Iterator[None]:
        """Around generation: hide the base's generation_config.json, whose filters would make another policy of it.

        Continuous batching in TRL leaves the model in training mode; an evaluation stays one.
        """
        of_base, self._base.generation_config = self._base.generation_config, GenerationConfig()
        training = self.model.training
        try:
            yield
        finally:
            self._base.generation_config = of_base
            self.model.train(training)

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        """A rollout of B prompts, steps 1 to 3: the tensors of TRL's micro-batches and those of PPO's update."""
        batch = super()._generate_and_score_completions(inputs)  # calls `_generate` and `_calculate_rewards`
        rollout = self._rollout
        rollout.ids, rollout.attention_mask, rollout.mask = sequences(batch)
        rollout.logps = batch.get("old_per_token_logps")
        self._score(rollout)
        self._estimate_advantages(rollout)
        kl = self._log_rollout(rollout)
        if self.model.training:
            self._update_stopped = False
            self.kl_controller.update(kl, self.args.generation_batch_size)
        return batch | rollout.training_tensors()

    # Step 2: score

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """Called by TRL for the policy's log-probabilities of a new rollout: (B, T), and two values PPO does not use.

        Sampling has computed them already where its numbers are those of training.
        """
        logps = self._fast.take_sampled_logps(logits_to_keep)
        if logps is None:
            logps, _ = self._logps(model, input_ids, attention_mask, logits_to_keep)
        return logps, None, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """Raw rewards of all processes, (B * processes, functions); `rollout.scores` gets their weighted sum, (B,)."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        scores = rewards.clone()
        if self._has_reward_model:
            scores[:, 0] = (scores[:, 0] - (self.args.score_mean or 0)) / (self.args.score_std or 1)
        self._monitor.scores(scores, self.reward_func_names, self._has_reward_model, self.state.global_step)
        first = self.accelerator.process_index * len(prompts)
        total = (scores * self.reward_weights.to(scores.device)).nansum(1)
        self._rollout.scores = total[first : first + len(prompts)]
        return rewards

    @torch.no_grad()
    def score_responses(self, prompts, completions, completion_ids, **kwargs) -> list[float]:
        """The reward model's raw score of each response, read where `RewardTrainer` trains it.

        With the policy's vocabulary and chat template it reads the sampled ids, else the text.
        """
        if not (self._other_vocabulary or self._rollout.is_chat and self._other_template):
            return self.score_sampled_ids(self._rollout)
        tokenizer = self._reward_tokenizer
        whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if self._rollout.is_chat:
            rows = tokenizer.apply_chat_template(whole, return_dict=False, **self.chat_template_kwargs)
        else:
            rows = tokenizer(whole, add_special_tokens=False)["input_ids"]
        return self._score_rows(rows)

    def score_sampled_ids(self, rollout: Rollout) -> list[float]:
        """Scores of the sampled ids, with what the chat template writes after a stop token put back: B numbers."""
        stops = self.eos_token_ids if rollout.is_chat else []
        after_stop = turn_end(self._tokenizer, stops, **self.chat_template_kwargs) if stops else []
        return self._score_rows(
            [
                [*prompt, *completion, *(after_stop if completion[-1] in stops else [])]
                for prompt, completion in zip(rollout.prompt_ids, rollout.completion_ids, strict=True)
            ]
        )

    def _score_rows(self, rows: list[list[int]]) -> list[float]:
        """Scores of whole sequences of token ids, in their order, at most a micro-batch at a time."""
        pad_token_id, device = self._reward_tokenizer.pad_token_id, self.accelerator.device
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows], device=device)
        # transformers' rule for sequence classifiers: the last token that is not the padding token
        last = (torch.arange(longest, device=device) * (ids != pad_token_id)).argmax(1)

        def score(rows: torch.Tensor) -> Results:
            states = torch.arange(len(rows), device=device), last[rows]
            inputs = ids[rows, : last[rows].max() + 1]
            if self._reward_model is not None:
                return (self._reward_model(input_ids=inputs, states=states),)
            return (self.model(input_ids=inputs, states=states, scalar_head="reward"),)

        with use_role(self._policy, "reward"), self.accelerator.autocast():
            (scores,) = self._fast.map_rows(score, last)
        return scores.tolist()

    def _score(self, rollout: Rollout) -> None:
        """Log-probabilities of policy and reference, values, and the final score of each response."""
        rows = rollout.ids, rollout.attention_mask, rollout.mask.size(1)
        if rollout.logps is None:
            rollout.logps = self._get_per_token_logps_and_entropies(self.model, *rows)[0]
        with use_role(self._policy, self._ref_role or "default"):
            rollout.ref_logps, _ = self._logps(self.ref_model or self.model, *rows)
        rollout.values = self._values(self.model, *rows) * rollout.mask
        policy, reference = "log-probabilities of the policy", "log-probabilities of the reference"
        total = (rollout.logps - rollout.ref_logps).sum()
        self._check_finite("the KL", total, {policy: rollout.logps, reference: rollout.ref_logps})
        self._check_finite("the sum of values", rollout.values.sum(), {"values": rollout.values})
        if self.args.missing_eos_penalty is not None:
            rollout.scores = rollout.scores - self.args.missing_eos_penalty * rollout.is_unfinished(self.eos_token_ids)
        if self.args.score_clip is not None:
            rollout.scores = rollout.scores.clamp(-self.args.score_clip, self.args.score_clip)

    def _logps(self, model, ids, attention_mask, width: int, compute_entropy: bool = False) -> Results:
        """Log p of the last `width` tokens of each row, and entropies or None: (B, width) nats each, 0 at padding."""

        def forward(ids, states, targets):
            return model(input_ids=ids, states=states, targets=targets, compute_entropy=compute_entropy)

        return self._map_responses(forward, ids, attention_mask, width)

    def _values(self, model: nn.Module, ids, attention_mask, width: int) -> torch.Tensor:
        """The critic's value of the state before each of the last `width` tokens, (B, width), 0 at padding."""

        def forward(ids, states, targets):
            return (model(input_ids=ids, states=states, scalar_head="critic"),)

        with use_role(self._policy, "critic"):
            return self._map_responses(forward, ids, attention_mask, width)[0]

    def _map_responses(self, forward: Callable, ids, attention_mask, width: int) -> Results:
        """The results of `forward` for all rows, at most a micro-batch at a time, each laid out as (B, width)."""

        def run(rows: torch.Tensor) -> Results:
            return at_responses(forward, ids[rows], attention_mask[rows], width)

        with self.accelerator.autocast():
            return self._fast.map_rows(run, attention_mask.sum(1))

    # Step 3: advantages

    def _estimate_advantages(self, rollout: Rollout) -> None:
        """Token rewards with the KL penalty inside, generalised advantages, returns; advantages are whitened."""
        args, mask = self.args, rollout.mask
        rollout.kl = token_kl(rollout.logps, rollout.ref_logps, mask, args.kl_estimator)
        rewards = token_rewards(rollout.scores, rollout.kl, mask, self.kl_controller.value)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, self._sum_over_processes, shift_mean=False)
        advantages = compute_gae(rewards, rollout.values, mask, args.gamma, args.lam)
        rollout.returns = advantages + rollout.values
        rollout.advantages = whiten(advantages, mask, self._sum_over_processes)

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # Step 4: update

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """PPO's loss of one micro-batch, a scalar whose sum over the minibatch is a mean over its tokens.

        `policy loss - entropy_coef * entropy + ptx_coef * demonstrations' loss + vf_coef * value loss`. The parts with
        forwards of their own are backwarded one after the other where that saves memory.
        """
        args, (ids, attention_mask, mask) = self.args, sequences(inputs)
        tokens, width = self._tokens_per_update(inputs, mask), mask.size(1)

        logps, entropies = self._logps(model, ids, attention_mask, width, compute_entropy=True)
        log_ratio = (logps - inputs["old_per_token_logps"]) * mask
        losses, metrics = policy_losses(log_ratio, inputs["advantages"], self.epsilon_low, self.epsilon_high)
        losses = losses * inputs.get("importance_sampling_ratio", 1)  # of vLLM's sampler, by TRL
        if args.entropy_coef:
            losses = losses - args.entropy_coef * entropies
        loss = (losses * mask).sum() / tokens
        self._check_finite("the loss", loss, {"log-probabilities": logps})
        loss = self._fast.backward_early(loss)

        if self._ptx is not None and self.model.training:
            loss = loss + self._fast.backward_early(self._ptx_loss(model))

        values = self._values(model, ids, attention_mask, width) * mask
        critic_losses, clipped = value_losses(values, inputs["old_values"], inputs["returns"], args.cliprange_value)
        loss = loss + args.vf_coef * (critic_losses * mask).sum() / tokens
        self._check_finite("the loss", loss, {"values": values})

        metrics |= {"policy/entropy_avg": entropies, "loss/value_avg": critic_losses, "val/clipfrac_avg": clipped}
        means = self._log_update({name: value.detach().float() for name, value in metrics.items()}, mask)
        if means and self.model.training and args.target_kl is not None:
            self._update_stopped = means["policy/approxkl_avg"] > args.target_kl
        return loss

    def _tokens_per_update(self, inputs: dict, mask: torch.Tensor) -> torch.Tensor:
        """What the token losses of a micro-batch are divided by, so that their sum over a minibatch is its mean.

        `loss_type` bnpo averages within each micro-batch instead, and then over micro-batches.
        """
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * accumulated
        # `num_items_in_batch` counts the whole rollout, of all processes.
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return tokens * accumulated / self.args.steps_per_generation if self.model.training else tokens

    def _ptx_loss(self, model: nn.Module) -> torch.Tensor:
        """`ptx_coef` times the mean token loss of this micro-step's demonstrations (PPO-ptx)."""
        batch = self._ptx(self._step, self.accelerator.process_index, self.accelerator.num_processes)
        inputs = {name: value.to(self.accelerator.device) for name, value in batch.items()}
        # TRL's fused head never holds the logits of all tokens, but divides them by PPO's temperature.
        fused = {"fused_lm_head": True} if self.temperature == 1 else {}
        with self.accelerator.autocast():
            loss = model(**inputs, **fused).loss
        self._metrics["train"]["loss/ptx_avg"].append(self.accelerator.gather(loss.detach()).mean().item())
        return self.args.ptx_coef * loss / self.current_gradient_accumulation_steps

    def training_step(self, model, inputs, num_items_in_batch):
        new_rollout = self._step % self.args.micro_batches_per_rollout == 0
        if self._update_stopped and not new_rollout:
            # Parameters without a gradient are left alone by the optimizer, its momentum included.
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        with self._phase("update"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step < self.args.critic_warmup_steps:
            critic = self._critic_parameters(self._policy)
            for parameter in self._policy.parameters():
                if id(parameter) not in critic:
                    parameter.grad = None
        self._log_gradient_norms()
        return loss

    def create_optimizer(self, model=None):
        """TRL's optimizer, with groups of their own for the critic where it has its own learning rate."""
        optimizer = super().create_optimizer(model)
        rate = self.args.critic_learning_rate
        if rate is not None:
            critic = self._critic_parameters(model or self.model)
            for group in list(optimizer.param_groups):
                moved = [parameter for parameter in group["params"] if id(parameter) in critic]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer

    @staticmethod
    def _critic_parameters(model: nn.Module) -> set[int]:
        return {id(parameter) for parameter in adapter_parameters(model, "critic").values()}
