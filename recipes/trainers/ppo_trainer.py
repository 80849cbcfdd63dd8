"""PPO for language models on TRL's `GRPOTrainer`: the trainer that TRL carried until 1.12, with LoRA roles.

`GRPOTrainer` owns prompts, chat templates, generation, the clipped policy loss, distributed launch and logging. PPO
adds what needs a value for every token: a critic, per-token rewards with the KL penalty inside, generalised
advantages and the value loss. `docs/ppo.md` walks through the loop and explains every metric.
"""

import contextlib
import copy
import functools
import os
import textwrap
from collections.abc import Callable

import torch
from accelerate.utils import gather_object, send_to_device, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

from recipes.cli.errors import UserError
from recipes.models.adapters import (
    AdapterEMA,
    add_policy_copy,
    add_role_forward,
    add_score_roles,
    checkpoint_under_roles,
    critic_from_policy,
    disable_dropout_rates,
    is_fresh,
    load_critic,
    save_trained,
    scalar_scores,
    send_only_policy,
    set_learning_rate,
    train_roles,
    use_role,
)
from recipes.models.tokenization import turn_end
from recipes.trainers.fast.packed_weights import packed_weights
from recipes.trainers.fast.packing import at_responses, in_pieces, pieces, sequences, sort_by_length
from recipes.trainers.fast.savings import Savings
from recipes.trainers.ppo_config import PPOConfig
from recipes.trainers.ppo_math import (
    AdaptiveKL,
    explained_variance,
    generalized_advantages,
    token_kl,
    token_rewards,
    update_metrics,
    value_losses,
    whiten,
)
from recipes.trainers.ppo_monitor import Health, last_good_state
from recipes.trainers.ptx import PtxBatches


class EpochSampler(RepeatSampler):
    """`RepeatSampler` whose order depends on seed and epoch only, so that a resumed run sees the same prompts."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class PPOTrainer(GRPOTrainer):
    """Proximal policy optimisation (1707.06347) of a language model with a KL penalty (1909.08593, 2203.02155).

    Args:
        args: [`PPOConfig`].
        processing_class: tokenizer of the policy; its padding side does not matter.
        model: the policy. A `PeftModel` may already hold the adapters `reward` and `critic` (see
            [`~recipes.models.adapters.add_score_roles`]); one base then plays all roles.
        ref_model: the reference, default a frozen copy of the policy as it is now (an adapter where it has one).
        reward_model: sequence classifier with one label, beside the policy.
        reward_processing_class: its tokenizer. With the policy's vocabulary it scores the sampled ids, else the
            decoded text.
        value_model: sequence classifier with one label to train as the critic. Default: the adapter `critic`; without
            one, the policy with a head of zeros.
        reward_funcs: functions of TRL's signature `f(prompts, completions, completion_ids, **kwargs) -> list[float]`,
            added to the reward model's score with `args.reward_weights` (the reward model's weight comes first).
        train_dataset, eval_dataset: rows with a `prompt`, as text or messages.
        ptx_dataset: demonstrations trained beside PPO, for `args.ptx_coef` above 0 (see [`PtxBatches`]).
        callbacks, optimizers, peft_config: as in `GRPOTrainer`.

    Raises:
        ValueError: there is nothing to score with.
        UserError: fewer prompts than one rollout, a reward model with several labels, a score or a loss that is not a
            finite number.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Fine-Tuning Language Models from Human Preferences",
        "id": "1909.08593",
        "citation": textwrap.dedent("""\
            @article{ziegler2019finetuning,
                title = {{Fine-Tuning Language Models from Human Preferences}},
                author = {Daniel M. Ziegler and Nisan Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and
                          Dario Amodei and Paul Christiano and Geoffrey Irving},
                year = 2019, eprint = {arXiv:1909.08593},
            }"""),
    }

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
        if peft_config is not None:
            set_seed(args.seed)  # as GRPOTrainer does, before the adapter draws its initial weights
            model = get_peft_model(model, peft_config)
        self._is_peft = isinstance(model, PeftModel)
        base = model.get_base_model() if self._is_peft else model
        prompts = args.generation_batch_size // args.num_generations
        if isinstance(train_dataset, Dataset) and len(train_dataset) < prompts:
            raise UserError(
                f"One rollout is {prompts} prompts and the dataset has {len(train_dataset)}: "
                "lower per_device_train_batch_size or steps_per_generation."
            )

        # Reference
        self._ref_role = None
        if ref_model is None and self._is_peft and not is_fresh(model):
            self._ref_role = "ref"
            if "ref" not in model.peft_config:
                add_policy_copy(model, "ref")
        elif ref_model is None and not self._is_peft:
            ref_model = copy.deepcopy(model)

        # Critic
        has_adapter = self._is_peft and "critic" in model.peft_config
        if value_model is None and self._is_peft and not has_adapter:
            add_score_roles(model, {"critic": None})
        elif not has_adapter:
            base.critic = critic_from_policy(model) if value_model is None else value_model
            base.critic.requires_grad_(True)
        if args.ema_decay is not None:
            if not self._is_peft:
                raise UserError("ema_decay averages the policy's adapter: it needs LoRA (use_peft).")
            callbacks = [*(callbacks or []), AdapterEMA(model, args.ema_decay)]
        if self._is_peft:
            train_roles(model, ("default", "critic"))

        # Scores
        reward_funcs = (
            [*reward_funcs] if isinstance(reward_funcs, list | tuple) else [reward_funcs] * bool(reward_funcs)
        )
        self._reward_module = None
        self._has_reward_model = reward_model is not None or (self._is_peft and "reward" in model.peft_config)
        text_processing_classes = [None] * (len(reward_funcs) + self._has_reward_model)
        if reward_model is not None:
            if reward_model.config.num_labels != 1:
                raise UserError(f"reward_model has num_labels={reward_model.config.num_labels}, PPO needs 1.")
            if (reward_processing_class or processing_class).get_vocab() == processing_class.get_vocab():
                self._reward_module = reward_model.requires_grad_(False)
            else:
                text_processing_classes[0] = reward_processing_class
        if self._has_reward_model:
            reward_funcs.insert(0, reward_model if text_processing_classes[0] else self.reward_model)
        if not reward_funcs:
            raise ValueError("PPO needs a reward: reward_model, a policy with the adapter `reward`, or reward_funcs.")

        # Reference and reward model come from the run's inputs; what a checkpoint needs is what training changes.
        model.save_pretrained = functools.partial(save_trained, model)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=text_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
        )

        if self.use_vllm:
            send_only_policy(self.vllm_generation)
        # The entropy bonus needs gradients that only TRL's head has.
        response_logps = "response_logps" in args.fast_paths and not self._entropy_bonus_enabled
        add_role_forward(base, self.temperature, response_logps)
        if args.disable_dropout:
            disable_dropout_rates(base)
        if self._is_peft:
            checkpoint_under_roles(model)
            if has_adapter or value_model is None:
                # Quantised bases hold adapters in bf16, too coarse for the steps of a scalar head.
                base.score.modules_to_save["critic"].float()
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(ref_model.requires_grad_(False), evaluation_mode=True)
            add_fused_lm_head(self.ref_model, self.temperature, args.cast_lm_head_to_fp32)
            add_role_forward(self.ref_model, self.temperature, response_logps)
        if self._reward_module is not None:
            self._reward_module = self.accelerator.prepare_model(self._reward_module, evaluation_mode=True)
        self.kl_controller = AdaptiveKL(args.kl_coef, args.adaptive_kl_target, args.adaptive_kl_horizon)
        self._update_stopped, self._update_sums, self._ptx = False, 0, None
        if args.ptx_coef > 0:
            if ptx_dataset is None:
                raise UserError("ptx_coef needs demonstrations: set ptx_dataset.")
            batch_size, max_length = args.per_device_train_batch_size, args.ptx_max_length
            self._ptx = PtxBatches(ptx_dataset, self._tokenizer, batch_size, max_length, args.seed)
        is_quantized = getattr(base, "is_quantized", False)
        in_float32 = self.accelerator.mixed_precision == "no" and base.dtype == torch.float32 and not is_quantized
        pad_is_eos = self._tokenizer.pad_token_id in self.eos_token_ids
        self._health = Health(args, pad_is_eos, ratio_tolerance=1e-3 if in_float32 else 0.05)
        self._savings = Savings(args, self.accelerator, base, in_float32, has_tools=bool(self.tools))
        self._sampled_logps = None

    # Rollout: generate, score, and turn scores into advantages

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not sampler.shuffle:
            return sampler
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return EpochSampler(**{name: getattr(sampler, name) for name in names})

    def _prepare_inputs(self, generation_batch):
        generate_every = self.args.steps_per_generation * self.num_iterations
        is_new = self.model.training and (self._step % generate_every == 0 or self._buffered_inputs is None)
        inputs = super()._prepare_inputs(generation_batch)
        # Images are counted by micro-batch.
        if not (is_new and self._savings.length_sorting) or "pixel_values" in inputs:
            return inputs
        batches, window = self._buffered_inputs, self.args.gradient_accumulation_steps
        self._buffered_inputs = [
            batch
            for start in range(0, len(batches), window)
            for batch in sort_by_length(batches[start : start + window])
        ]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_single_turn(self, *args, **kwargs):
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if self._is_peft else base
        live_rows = self._savings.live_rows
        with packed_weights(base) if self._savings.packed_weights else contextlib.nullcontext():
            if live_rows is None:
                return super()._generate_single_turn(*args, **kwargs)
            live_rows.logps = None  # generation elsewhere, as in vLLM, does not call it
            with live_rows.installed(base):
                completion_ids, logps = super()._generate_single_turn(*args, **kwargs)
        if self._savings.sampling_logps and live_rows.logps is not None:
            width = max(map(len, completion_ids))
            if self.pad_to_multiple_of is not None:
                width += -width % self.pad_to_multiple_of
            self._sampled_logps = nn.functional.pad(live_rows.logps, (0, width - live_rows.logps.size(1)))
        return completion_ids, logps

    def _generate(self, prompts: list):
        rollout = super()._generate(prompts)
        self._prompt_ids, self._completion_ids = rollout[:2]
        self._is_chat = is_conversational({"prompt": prompts[0]})
        return rollout

    @torch.no_grad()
    def reward_model(self, prompts, completions, completion_ids, **kwargs) -> list[float]:
        """The reward model's raw score of each sampled sequence, read where `RewardTrainer` trains it."""
        stops = self.eos_token_ids if self._is_chat else []
        after_stop = turn_end(self._tokenizer, stops, **self.chat_template_kwargs) if stops else []
        rows = [
            [*prompt, *completion, *(after_stop if completion[-1] in stops else [])]
            for prompt, completion in zip(self._prompt_ids, self._completion_ids, strict=True)
        ]
        pad_token_id = self._tokenizer.pad_token_id
        longest = max(map(len, rows))
        device = self.accelerator.device
        ids = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows], device=device)
        # transformers' rule for sequence classifiers: the last token that is not the padding token
        last = (torch.arange(longest, device=device) * (ids != pad_token_id)).argmax(1)
        module, model = self._reward_module, self.accelerator.unwrap_model(self.model)

        def score(rows):
            states = torch.arange(len(rows), device=device), last[rows]
            inputs = ids[rows, : last[rows].max() + 1]
            if module is not None:
                return (scalar_scores(self.accelerator.unwrap_model(module), inputs, states),)
            return (model(input_ids=inputs, states=states, scalar_head="reward"),)

        with use_role(model, "reward"), self.accelerator.autocast():
            return self._in_pieces(score, last)[0].tolist()

    def _in_pieces(self, run: Callable[[torch.Tensor], tuple], lengths: torch.Tensor) -> tuple:
        """The results of `run(rows)` for all rows, each time of at most a micro-batch."""
        return in_pieces(run, pieces(lengths, self.args.per_device_train_batch_size, self._savings.piece_overhead))

    def _values(
        self, model: nn.Module, ids, attention_mask, width: int, learn: Callable | None = None
    ) -> torch.Tensor:
        """The critic's value of the state before each of the last `width` tokens, (B, width), 0 at padding.

        `learn(rows, values)` is called on each piece, and its values are then cut from their graph.
        """

        def forward(ids, states, targets):
            return (model(input_ids=ids, states=states, scalar_head="critic"),)

        def run(rows):
            (values,) = at_responses(forward, ids[rows], attention_mask[rows], width)
            if learn is None:
                return (values,)
            learn(rows, values)
            return (values.detach(),)

        with use_role(self.accelerator.unwrap_model(model), "critic"), self.accelerator.autocast():
            return self._in_pieces(run, attention_mask.sum(1))[0]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except ValueError as error:
            if "rewards, but" in str(error):  # TRL's own check of how many a function returned
                raise UserError(str(error)) from error
            raise
        per_process = slice(
            self.accelerator.process_index * len(prompts), (self.accelerator.process_index + 1) * len(prompts)
        )
        scores = rewards.clone()
        if self._has_reward_model:
            scores[:, 0] = (scores[:, 0] - self.args.score_mean) / self.args.score_std
        self._health.scores(scores, self.reward_func_names, self._has_reward_model, self.state.global_step)
        self._scores = (scores * self.reward_weights.to(scores.device)).nansum(1)[per_process]
        return rewards

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        model = self.accelerator.unwrap_model(self.model)
        ids, attention_mask, mask = sequences(rollout)
        width = mask.size(1)

        def logps_of(policy):
            return self._get_per_token_logps_and_entropies(policy, ids, attention_mask, width)[0]

        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps = rollout.get("old_per_token_logps")
            logps = logps_of(self.model) if logps is None else logps
            with use_role(model, self._ref_role):
                ref_logps = logps_of(self.model if self.ref_model is None else self.ref_model)

        scores = self._scores
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * self._is_unfinished()
        if self.args.score_clip is not None:
            scores = scores.clamp(-self.args.score_clip, self.args.score_clip)
        kl = token_kl(logps, ref_logps, mask, self.args.kl_estimator)
        rewards = token_rewards(scores, kl, mask, self.kl_controller.value)
        if self.args.whiten_rewards:
            rewards = whiten(rewards, mask, self._sum_over_processes, shift_mean=False)

        def learn(rows, values):  # as in `_compute_loss`, which then leaves the critic alone
            values, of_rows = values * mask[rows], mask[rows]
            old = values.detach()
            returns = old + generalized_advantages(rewards[rows], old, of_rows, self.args.gamma, self.args.lam)
            losses, _ = value_losses(values, old, returns, self.args.cliprange_value)
            tokens = self._tokens_per_update(rollout, mask, mode)
            self._backward_early(self.args.vf_coef * (losses * of_rows).sum() / tokens)

        if mode == "train" and self._savings.old_values:
            with torch.enable_grad():
                values = mask * self._values(self.model, ids, attention_mask, width, learn)
        else:
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                values = mask * self._values(self.model, ids, attention_mask, width)
        advantages = generalized_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        returns = advantages + values
        rollout |= {
            "old_per_token_logps": logps,
            "old_values": values,
            "returns": returns,
            "advantages": whiten(advantages, mask, self._sum_over_processes),
        }
        self._log_rollout(mode, rollout, mask, kl, scores)
        if mode == "train":
            self._update_stopped = False
            kl_per_response = self._metrics[mode]["objective/kl"][-1]
            self.kl_controller.update(kl_per_response, self.args.generation_batch_size)
        return rollout

    def _is_unfinished(self) -> torch.Tensor:
        """1 for each response of this process without a stop token, else 0: (B,)."""
        stops = set(self.eos_token_ids)
        unfinished = [float(ids[-1] not in stops) for ids in self._completion_ids]
        return torch.tensor(unfinished, device=self.accelerator.device)

    def _log_rollout(self, mode: str, rollout: dict, mask, kl, scores) -> None:
        logps, stops = rollout["old_per_token_logps"], torch.tensor(self.eos_token_ids, device=mask.device)
        non_score = -self.kl_controller.value * kl.sum(1)
        per_response = torch.stack([kl.sum(1), -(logps * mask).sum(1), non_score, scores, non_score + scores], 1)
        names = ("kl", "entropy", "non_score_reward", "scores", "rlhf_reward")
        per_response = dict(zip(names, self.accelerator.gather(per_response).T, strict=True))
        metrics = self._metrics[mode]
        for name, values in per_response.items():
            metrics[f"objective/{name}"].append(values.mean().item())
        metrics["objective/kl_coef"].append(self.kl_controller.value)
        eos = (torch.isin(rollout["completion_ids"], stops) * mask).sum()
        metrics["val/num_eos_tokens"].append(self._sum_over_processes(eos).item())
        metrics["val/explained_variance"].append(
            explained_variance(rollout["old_values"], rollout["returns"], mask, self._sum_over_processes).item()
        )
        if mode == "train":
            generate_every = self.args.steps_per_generation * self.num_iterations
            metrics["episode"] = [(self._step // generate_every + 1) * self.args.generation_batch_size]
            self._health.rollout(
                per_response["kl"],
                per_response["scores"],
                cut_share=metrics["completions/clipped_ratio"][-1],
                explained_variance=metrics["val/explained_variance"][-1],
            )
        # GRPO's view of the rewards, by groups of one: its spread is always 0 and its sum misses PPO's normalisation.
        for name in ("reward", "reward_std", "frac_reward_zero_std"):
            metrics.pop(name, None)
        table = self._logs["extra"]
        table["kl"].extend(gather_object(kl.sum(1).tolist()))
        table["score"].extend(gather_object(scores.tolist()))
        advantages = gather_object((rollout["advantages"].sum(1) / mask.sum(1).clamp(min=1)).tolist())
        for _ in advantages:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(advantages)

    # Update: one forward per role, one backward

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **images,
    ):
        in_training = torch.is_grad_enabled() or compute_entropy
        if not in_training and self._sampled_logps is not None:
            # TRL asks for the policy's log-probabilities of a rollout first.
            logps, self._sampled_logps = self._sampled_logps, None
            return logps, None, None
        if compute_aux_loss or any(value is not None for value in images.values()):
            batch_size = None if in_training else self.args.per_device_train_batch_size
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
                **images,
            )  # fmt: skip
        else:

            def forward(ids, states, targets):
                return model(input_ids=ids, states=states, targets=targets, compute_entropy=compute_entropy)

            def run(rows):
                return at_responses(forward, input_ids[rows], attention_mask[rows], logits_to_keep)

            with self.accelerator.autocast():
                result = (*self._in_pieces(run, attention_mask.sum(1)), None)
        self._latest_logps = result[0].detach()
        return result

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        critic_has_learned = mode == "train" and self._savings.old_values and self._is_first_update()
        loss = super()._compute_loss(model, inputs)
        if self._ptx is not None or not critic_has_learned:  # the last part is backwarded by Trainer
            loss = self._backward_early(loss)
        logps = self._latest_logps
        ids, attention_mask, mask = sequences(inputs)
        if self._ptx is not None and mode == "train":
            batch = self._ptx(self._step, self.accelerator.process_index, self.accelerator.num_processes)
            ptx_loss = model(**{name: value.to(mask.device) for name, value in batch.items()}).loss
            self._metrics[mode]["loss/ptx_avg"].append(self.accelerator.gather(ptx_loss.detach()).mean().item())
            ptx_loss = self.args.ptx_coef * ptx_loss / self.current_gradient_accumulation_steps
            loss = loss + (ptx_loss if critic_has_learned else self._backward_early(ptx_loss))
        width = mask.size(1)
        values = inputs["old_values"] if critic_has_learned else mask * self._values(model, ids, attention_mask, width)
        losses, clipped = value_losses(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        value_loss = (losses * mask).sum() / self._tokens_per_update(inputs, mask, mode)
        loss = loss + self.args.vf_coef * value_loss
        log_ratio = (logps - inputs["old_per_token_logps"]) * mask
        by_token = update_metrics(log_ratio, inputs["advantages"], self.epsilon_low, self.epsilon_high)
        by_token |= {"loss/value_avg": losses.detach(), "val/clipfrac_avg": clipped.float()}
        self._log_update(mode, by_token, mask)
        if not loss.isfinite():
            rows = (~(logps.isfinite() & values.isfinite()).all(1)).nonzero()[:, 0].tolist()
            raise UserError(
                f"Step {self.state.global_step}: the loss is {loss.item()}, by log-probabilities or values of rows "
                f"{rows} of the micro-batch. Lower learning_rate, or look for a role in half precision. "
                f"{last_good_state(self.args.output_dir)}"
            )
        return loss

    def _is_first_update(self) -> bool:
        """Whether this micro-batch belongs to the first optimizer step of its rollout."""
        position = self._step % (self.args.steps_per_generation * self.num_iterations)
        return position < self.args.gradient_accumulation_steps

    def _backward_early(self, loss: torch.Tensor) -> torch.Tensor:
        """Free the activations of one part of the loss before the next part's forward, in a single process.

        With several, all parts go through one backward: DDP reduces gradients once.
        """
        if not self._savings.early_backward or not (loss.requires_grad and loss.isfinite()):
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss)
        return loss.detach()

    def _tokens_per_update(self, inputs: dict, mask: torch.Tensor, mode: str) -> torch.Tensor:
        """What a micro-batch's token losses are divided by, the same for policy and critic (see `loss_type`)."""
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * (self.current_gradient_accumulation_steps if mode == "train" else 1)
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens

    def _log_update(self, mode: str, by_token: dict[str, torch.Tensor], mask: torch.Tensor) -> None:
        """Log the means of (B, T) numbers over the tokens of the whole minibatch, however it is split."""
        self._update_sums += torch.stack([(value * mask).sum() for value in by_token.values()] + [mask.sum()])
        if mode == "train" and not self.accelerator.sync_gradients:
            return
        *totals, count = self._sum_over_processes(self._update_sums).tolist()
        self._update_sums = 0
        for name, total in zip(by_token, totals, strict=True):
            self._metrics[mode][name].append(total / max(count, 1))
        if mode == "train":
            if self._is_first_update():
                self._health.first_minibatch(self._metrics[mode]["val/ratio"][-1])
            if self.args.target_kl is not None:
                self._update_stopped = self._metrics[mode]["policy/approxkl_avg"][-1] > self.args.target_kl

    def training_step(self, model, inputs, num_items_in_batch):
        new_rollout = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if self._update_stopped and not new_rollout:
            # Parameters without a gradient are left alone by the optimizer, its momentum included.
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step < self.args.critic_warmup_steps:
            for name, parameter in self.accelerator.unwrap_model(model).named_parameters():
                if "critic" not in name:
                    parameter.grad = None
        return loss

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.args.critic_learning_rate is not None:
            critic = [p for name, p in (model or self.model).named_parameters() if "critic" in name]
            set_learning_rate(optimizer, critic, self.args.critic_learning_rate)
        return optimizer

    # Resume

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        state = {
            "step": self._step,
            "rollout": self._buffered_inputs,
            "kl_coef": self.kl_controller.value,
            "update_stopped": self._update_stopped,
        }
        torch.save(state, os.path.join(folder, f"ppo_state_{self.accelerator.process_index}.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if not self.is_fsdp_enabled:  # shares come from a file of their own, with the critic's
            load_critic(model, resume_from_checkpoint)
        # Trainer reloads every adapter but the active one as untrainable.
        if self._is_peft:
            train_roles(model, ("default", "critic"))
        path = os.path.join(resume_from_checkpoint, f"ppo_state_{self.accelerator.process_index}.pt")
        if not os.path.exists(path):
            raise UserError(f"{path} is missing: resume with the number of processes the checkpoint was written with.")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._step, self._buffered_inputs = state["step"], send_to_device(state["rollout"], self.accelerator.device)
        self.kl_controller.value, self._update_stopped = state["kl_coef"], state["update_stopped"]
