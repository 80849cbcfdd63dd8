"""PPO for language models on TRL's `GRPOTrainer`: the trainer that TRL carried until 1.12, with LoRA roles.

`GRPOTrainer` owns prompts, chat templates, generation, distributed launch, checkpoints and logging. PPO adds what
needs a value for every token. A rollout has four steps, in this order in the file:

1. sample      `_generate`: the policy answers prompts
2. score       `_calculate_rewards`, `_score`: rewards, log-probabilities of policy and reference, values
3. advantages  `_estimate_advantages`: the KL penalty enters the reward here, then GAE and whitening
4. update      `_compute_loss`: clipped policy loss and value loss of one micro-batch

`docs/ppo.md` explains every metric, and `recipes/trainers/ppo_math.py` has the formulas.
"""

import math
from collections.abc import Callable

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.data_utils import is_conversational

from recipes.cli.checkpoints import last_good_state
from recipes.cli.errors import UserError, first_line, refusals_in_one_line
from recipes.models.adapters import AdapterEMA, adapter_parameters, float32_adapters, model_with_adapter, use_role
from recipes.models.heads import add_score_forward, base_of
from recipes.models.loading import not_finite
from recipes.models.tokenization import render_alike, turn_end
from recipes.trainers import ppo_math
from recipes.trainers.ppo_config import PPOConfig
from recipes.trainers.ppo_roles import PPORoles, check_room
from recipes.trainers.ppo_saving import PPOSaving
from recipes.trainers.ppo_tracking import PPOLogging
from recipes.trainers.ptx import PtxBatches
from recipes.trainers.replaced import replaced
from recipes.trainers.reward_functions import checked
from recipes.trainers.rollout import Rollout, sequences


class PPOTrainer(PPORoles, PPOLogging, PPOSaving):
    """Proximal policy optimisation (1707.06347) of a language model with a KL penalty (1909.08593, 2203.02155).

    Args that `GRPOTrainer` has not, or takes otherwise:
        model: the policy. A `PeftModel` may already hold the adapters `reward` and `critic` (see
            [`~recipes.models.adapters.add_score_roles`]); one base then plays all roles.
        ref_model: the reference, default a frozen copy of the policy as it is now (an adapter where it has one).
        reward_model: sequence classifier with one label, beside the policy.
        reward_processing_class: its tokenizer. With the policy's vocabulary and chat template it scores the sampled
            ids, else the decoded text.
        value_model: sequence classifier with one label to train as the critic. Default: the adapter `critic`; without
            one, the policy with a head of zeros.
        reward_funcs: functions of TRL's signature, added to the reward model's score with `args.reward_weights` (the
            reward model's weight comes first).
        ptx_dataset: demonstrations trained beside PPO, for `args.ptx_coef` above 0 (see [`PtxBatches`]).

    Hooks into TRL 1.16, which `tests/trainers/test_trl_contract.py` compares with the installed TRL. For a new rollout
    `_prepare_inputs` calls `_generate_and_score_completions`, and that calls `_generate` (which calls
    `_tokenize_prompts`), `_get_per_token_logps_and_entropies` (the policy's, unless the rollout is one update) and
    `_calculate_rewards`, in this order. `_compute_loss`, `training_step` and `create_optimizer` (in [`PPORoles`]) are
    the update. `log` and `_get_eval_sampler` (in [`PPOLogging`]) make completions readable and each count once.
    `_save`, `_load_from_checkpoint` and `_load_best_model` (in [`PPOSaving`]) make a run go on where it was.

    A UserError says what does not fit: too few prompts, a reward model with several labels, an adapter that cannot
    share its base, a score or a loss that is not finite.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {"title": "Fine-Tuning Language Models from Human Preferences", "id": "1909.08593"}

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
        if isinstance(model, str):
            raise UserError(f"model is the name {model}, and PPOTrainer takes a loaded model.")
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise UserError("model is a PeftModel already: leave peft_config out, or merge its adapter first.")
            set_seed(args.seed)  # as GRPOTrainer does, before the adapter draws its initial weights
            model = get_peft_model(model, peft_config)
        if isinstance(train_dataset, Dataset):
            args.check_prompts(len(train_dataset))
        has_tied_base = isinstance(model, PeftModel) and model.config.get_text_config().tie_word_embeddings
        if args.cast_lm_head_to_fp32 and has_tied_base:
            raise UserError("TRL has no cast_lm_head_to_fp32 for LoRA on a base with tied embeddings: leave it out.")
        if args.ptx_coef > 0 and ptx_dataset is None:
            raise UserError("ptx_coef needs demonstrations: set ptx_dataset.")

        self._policy, self._base, self._is_peft = model, base_of(model), isinstance(model, PeftModel)
        ref_model = self._add_reference(ref_model)
        if args.ema_decay is not None:
            if not self._is_peft:
                raise UserError("ema_decay averages the policy's adapter: it needs LoRA (use_peft).")
            callbacks = [*(callbacks or []), AdapterEMA(model, args.ema_decay)]
        # Last: no adapter of the policy may come into its layers.
        self._add_critic(value_model, args.trust_remote_code)
        self._train_only_roles()
        if optimizers[0] is not None:
            self._add_to_given(optimizers[0])
        columns = getattr(train_dataset, "column_names", None)
        with float32_adapters(model), refusals_in_one_line():
            functions = self._rewards(reward_model, reward_processing_class, processing_class, reward_funcs, columns)
            super().__init__(
                model=model,
                reward_funcs=functions,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self._prepare_models(ref_model)
        self._kl_coef, self._update_stopped, self._ptx = args.kl_coef, False, None
        if args.ptx_coef > 0:
            sizes = args.per_device_train_batch_size, args.ptx_max_length
            self._ptx = PtxBatches(ptx_dataset, self._tokenizer, *sizes, args.seed, **self.chat_template_kwargs)
        self._start_logging(ratio_tolerance=1e-3 if self._in_float32 else 0.05)

    def _rewards(self, model, tokenizer, policy_tokenizer, reward_funcs, columns) -> list[Callable]:
        """What TRL calls for rewards: the reward model first, where there is one, then the functions."""

        def reward_model(**kwargs):  # its name in metrics and errors
            return self.score_responses(**kwargs)

        if model is not None:
            if self._is_peft and "reward" in self._policy.peft_config:
                raise UserError("reward_model and the policy's adapter `reward` both score: pass one of them.")
            if model.config.num_labels != 1:
                raise UserError(f"reward_model has num_labels={model.config.num_labels}, PPO needs 1.")
            model = model_with_adapter(model, "reward_model").requires_grad_(False).eval()
            add_score_forward(model)
        self._reward_model, self._reward_tokenizer = model, tokenizer or policy_tokenizer
        own = None if model is None else model.config.get_text_config().pad_token_id
        pads = own, self._reward_tokenizer.pad_token_id, self._reward_tokenizer.eos_token_id
        self._reward_pad_token_id = next(pad for pad in pads if pad is not None and pad >= 0)
        self._other_vocabulary = self._reward_tokenizer.get_vocab() != policy_tokenizer.get_vocab()
        self._other_template = not render_alike(self._reward_tokenizer, policy_tokenizer)
        self._has_reward_model = model is not None or (self._is_peft and "reward" in self._policy.peft_config)
        given = [*reward_funcs] if isinstance(reward_funcs, list | tuple) else [reward_funcs] * bool(reward_funcs)
        if any(isinstance(function, str | nn.Module) for function in given):
            raise UserError("reward_funcs takes Python functions: pass a reward model, loaded, as reward_model.")
        functions = [reward_model] * self._has_reward_model + [checked(function, columns) for function in given]
        names = [function.__name__ for function in functions]
        if same := {name for name in names if names.count(name) > 1}:
            raise UserError(f"Two rewards are called {same.pop()}: the log would mix their numbers. Rename one.")
        return functions

    # Step 1: sample

    def _prepare_inputs(self, generation_batch):
        """One micro-batch; at the start of a rollout TRL makes it anew and deals it to micro-batches."""
        before = self._buffered_inputs
        with self._phase("score"):
            inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:
            self._buffered_inputs = self._fast.sort_by_length(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _generate(self, prompts: list):
        """TRL's sampling of B prompts, whose ids the steps after it need."""
        training = self.model.training
        # Without the filters of the base's generation_config.json, which would make another policy of it.
        unfiltered = replaced(self._base, generation_config=GenerationConfig())
        try:
            with unfiltered, self._fast.sampling(), self._phase("sample"):
                samples = super()._generate(prompts)
        except (UserError, RuntimeError) as error:
            if not_finite(self._policy):
                self.stop(f"nothing can be sampled ({first_line(error)})")
            if isinstance(error, UserError):
                raise self._with_step(error) from error
            raise
        finally:
            self.model.train(training)  # continuous batching leaves it in training mode
        self._rollout = Rollout(samples[0], samples[1], is_conversational({"prompt": prompts[0]}))
        return samples

    def _with_step(self, error: UserError) -> UserError:
        """The error of a rollout, with the step and what can be gone on from."""
        return UserError(f"After step {self.state.global_step}: {error} {last_good_state(self.args.output_dir)}")

    def _tokenize_prompts(self, prompts: list):
        """TRL's token ids of B prompts, each with room for a response, and what else it makes of them."""
        prompt_ids, *rest = super()._tokenize_prompts(prompts)
        if not all(prompt_ids):
            raise UserError("A prompt has no tokens, and nothing predicts the first token of its response: drop it.")
        check_room(self._base, "the policy", max(map(len, prompt_ids)) + self.max_completion_length)
        return prompt_ids, *rest

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
            target = self.args.adaptive_kl_target
            # While the critic warms up the policy stands still: its KL says nothing about the coefficient.
            moves = self.state.global_step >= self.args.critic_warmup_steps and not math.isnan(kl)
            if target is not None and moves:
                episodes, horizon = self.args.generation_batch_size, self.args.adaptive_kl_horizon
                self._kl_coef = ppo_math.adapted_kl_coef(self._kl_coef, kl, target, episodes, horizon)
        return batch | {
            "old_per_token_logps": rollout.logps,
            "old_values": rollout.values,
            "returns": rollout.returns,
            "advantages": rollout.advantages,
        }

    # Step 2: score

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """Called by TRL for the policy's log-probabilities of a new rollout: (B, T), and two values PPO does not use.

        Sampling has computed them already where its numbers are those of training.
        """
        logps = self._fast.take_sampled_logps(logits_to_keep)
        if logps is None:
            logps, _ = self._at_responses(model, input_ids, attention_mask, logits_to_keep)
        return logps, None, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """Raw rewards of all processes, (B * processes, functions); `rollout.scores` gets their weighted sum, (B,)."""
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except UserError as error:
            raise self._with_step(error) from error
        scores = rewards.clone()
        if self._has_reward_model:
            self._check_finite("the sum of scores", rewards[:, 0].sum(), {"the reward model": rewards[:, :1]})
            scores[:, 0] = (scores[:, 0] - (self.args.score_mean or 0)) / (self.args.score_std or 1)
        weights, first = self.reward_weights.to(scores.device), self.accelerator.process_index * len(prompts)
        unscored = (scores.isnan() | (weights == 0)).all(1)  # a function may pass over a response
        if unscored.any():
            row, weighed = int(unscored.nonzero()[0]), zip(self.reward_func_names, weights, strict=True)
            names = ", ".join(name for name, weight in weighed if weight)
            raise UserError(f"After step {self.state.global_step}: row {row} of the rollout has no reward of {names}.")
        self._rollout.scores = (scores * weights).nansum(1)[first : first + len(prompts)]
        return rewards

    def score_responses(self, prompts, completions, completion_ids, **kwargs) -> list[float]:
        """The reward model's raw score of each response, read where `RewardTrainer` trains it."""
        rollout, tokenizer = self._rollout, self._reward_tokenizer
        if not (self._other_vocabulary or rollout.is_chat and self._other_template):
            return self.score_sampled_ids(rollout)
        if rollout.is_chat:  # without the space that the policy's template may have before an answer
            answers = [[{**answer, "content": (answer.get("content") or "").strip()}] for (answer,) in completions]
            texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            rows = tokenizer.apply_chat_template(texts, return_dict=False, **self.chat_template_kwargs)
        else:  # as RewardTrainer reads text: with BOS, and EOS after a finished one
            ends = ["" if ids[-1] not in self.eos_token_ids else tokenizer.eos_token for ids in completion_ids]
            rows = tokenizer([*map("".join, zip(prompts, completions, ends, strict=True))])["input_ids"]
        return self._score_rows(rows)

    def score_sampled_ids(self, rollout: Rollout) -> list[float]:
        """Scores of the sampled ids, with what the chat template writes after a stop token put back: B numbers."""
        stops = self.eos_token_ids if rollout.is_chat else []
        after_stop = turn_end(self._tokenizer, stops, **self.chat_template_kwargs) if stops else []
        rows = []
        for prompt, completion in zip(rollout.prompt_ids, rollout.completion_ids, strict=True):
            rows.append([*prompt, *completion, *(after_stop if completion[-1] in stops else [])])
        return self._score_rows(rows)

    def _score(self, rollout: Rollout) -> None:
        """Log-probabilities of policy and reference, values, and the final score of each response."""
        args, rows = self.args, (rollout.ids, rollout.attention_mask, rollout.mask.size(1))
        if rollout.logps is None:
            rollout.logps = self._get_per_token_logps_and_entropies(self.model, *rows)[0]
        with use_role(self._policy, "ref"):
            rollout.ref_logps, _ = self._at_responses(self.ref_model or self.model, *rows)
        rollout.values = self._values(self.model, *rows) * rollout.mask
        logps = {"the policy": rollout.logps, "the reference": rollout.ref_logps}
        causes = {f"log-probabilities of {role}": numbers for role, numbers in logps.items()}
        self._check_finite("the KL", (rollout.logps - rollout.ref_logps).sum(), causes)
        self._check_finite("the sum of values", rollout.values.sum(), {"values": rollout.values})
        if args.missing_eos_penalty is not None:
            rollout.scores = rollout.scores - args.missing_eos_penalty * rollout.is_unfinished(self.eos_token_ids)
        if args.score_clip is not None:
            rollout.scores = rollout.scores.clamp(-args.score_clip, args.score_clip)

    # Step 3: advantages

    def _estimate_advantages(self, rollout: Rollout) -> None:
        """Token rewards with the KL penalty inside, generalised advantages, returns; advantages are whitened."""
        args, mask = self.args, rollout.mask
        rollout.kl = ppo_math.token_kl(rollout.logps, rollout.ref_logps, mask, args.kl_estimator)
        rewards = ppo_math.token_rewards(rollout.scores, rollout.kl, mask, self._kl_coef)
        if args.whiten_rewards:
            rewards = ppo_math.whiten(rewards, mask, self._sum_over_processes, shift_mean=False)
        advantages = ppo_math.compute_gae(rewards, rollout.values, mask, args.gamma, args.lam)
        rollout.returns = advantages + rollout.values
        rollout.advantages = ppo_math.whiten(advantages, mask, self._sum_over_processes)

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # Step 4: update

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """PPO's loss of one micro-batch, a scalar; over a minibatch they sum up to the mean loss of a token.

        `policy loss - entropy_coef * entropy + ptx_coef * demonstrations' loss + vf_coef * value loss`. The parts with
        forwards of their own are backwarded one after the other where that saves memory.
        """
        args, (ids, attention_mask, mask) = self.args, sequences(inputs)
        tokens, width = self._tokens_per_update(inputs, mask), mask.size(1)

        logps, entropies = self._at_responses(model, ids, attention_mask, width, compute_entropy=True)
        log_ratio = (logps - inputs["old_per_token_logps"]) * mask
        advantages = inputs["advantages"]
        losses, metrics = ppo_math.policy_losses(log_ratio, advantages, self.epsilon_low, self.epsilon_high)
        losses = losses * inputs.get("importance_sampling_ratio", 1)  # of vLLM's sampler, by TRL
        if args.entropy_coef:
            losses = losses - args.entropy_coef * entropies
        loss = (losses * mask).sum() / tokens
        loss = self._fast.backward_early(loss)

        if self._ptx is not None and self.model.training:
            loss = loss + self._fast.backward_early(self._ptx_loss(model))

        values, old_values = self._values(model, ids, attention_mask, width) * mask, inputs["old_values"]
        errors, clipped = ppo_math.value_losses(values, old_values, inputs["returns"], args.cliprange_value)
        loss = loss + args.vf_coef * (errors * mask).sum() / tokens
        self._check_finite("the loss", loss, {"log-probabilities": logps, "values": values})

        metrics |= {"policy/entropy_avg": entropies, "loss/value_avg": errors, "val/clipfrac_avg": clipped}
        means = self._log_update(metrics, mask)
        if means and self.model.training and args.target_kl is not None:
            self._update_stopped = means["policy/approxkl_avg"] > args.target_kl
        return loss

    def _tokens_per_update(self, inputs: dict, mask: torch.Tensor) -> torch.Tensor:
        """What the token losses of a micro-batch are divided by: the mean tokens of a minibatch of this rollout.

        So each token of a rollout counts the same, whichever minibatch it is in. `loss_type` bnpo averages within each
        micro-batch instead, and then over micro-batches.
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
        if self._update_stopped and self._step % self.args.micro_batches_per_rollout:  # not the first of a rollout
            # Parameters without a gradient are left alone by the optimizer, its momentum included.
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        with self._phase("update"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step < self.args.critic_warmup_steps:
            critic = {*adapter_parameters(self._policy, "critic").values()}
            for parameter in self._policy.parameters():
                if parameter not in critic:
                    parameter.grad = None
        self._log_gradient_norms()
        return loss
