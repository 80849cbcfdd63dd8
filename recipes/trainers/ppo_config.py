"""`PPOConfig`: the arguments of `PPOTrainer`, checked before any model loads."""

import math
from dataclasses import MISSING, dataclass, field, fields

from transformers import GenerationConfig
from transformers.generation import GenerationMode
from trl import GRPOConfig

from recipes.cli.errors import UserError, counted

FAST_PATHS = (
    "response_logps",
    "length_sorting",
    "sampling_logps",
    "drop_finished",
    "packed_weights",
    "merged_copy",
    "fused_adapters",
    "early_backward",
)

# Fields of GRPOConfig and TrainingArguments that PPO has no use for, and why: any value but the default is refused.
_GROUPS = "GRPO compares responses of one prompt; PPO has a critic and whitens advantages"
_OTHER_LOSS = "it belongs to another loss than PPO's clipped one"
_TEXT_ONLY = "PPO here answers text prompts, without tools and images"
_LOADED_BEFORE = "PPOTrainer takes models that are loaded already; the recipe takes ModelConfig's arguments"
_REFERENCE = "PPO's reference stays the policy as it was at the start"
_ENTROPY = "only a constant entropy_coef is there"
REFUSED = {
    "beta": "PPO has its KL in the reward: set kl_coef instead of beta",
    "scale_rewards": _GROUPS,
    "multi_objective_aggregation": "scores are summed with reward_weights, then advantages are whitened",
    "importance_sampling_level": "PPO's ratio is that of each token",
    "delta": _OTHER_LOSS,
    "sapo_temperature_neg": _OTHER_LOSS,
    "sapo_temperature_pos": _OTHER_LOSS,
    "vespo_k_pos": _OTHER_LOSS,
    "vespo_lambda_pos": _OTHER_LOSS,
    "vespo_k_neg": _OTHER_LOSS,
    "vespo_lambda_neg": _OTHER_LOSS,
    "off_policy_mask_threshold": _OTHER_LOSS,
    "use_bias_correction_kl": "it belongs to beta, and PPO has its KL in the reward",
    "top_entropy_quantile": "PPO trains every token of a response",
    "use_adaptive_entropy": _ENTROPY,
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "router_aux_loss_coef": "PPO has no load-balancing loss for experts",
    "model_init_kwargs": _LOADED_BEFORE,
    "ds3_gather_for_generation": "PPO does not run by DeepSpeed",
    "max_tool_calling_iterations": _TEXT_ONLY,
    "log_multimodal": _TEXT_ONLY,
    "label_smoothing_factor": "PPO's loss has no labels to smooth",
    "neftune_noise_alpha": "with noise in the embeddings, training and sampling would use different policies",
    "data_seed": "the order of prompts is drawn by seed",
    "train_sampling_strategy": "prompts are shuffled anew each epoch, or keep their order with shuffle_dataset: false",
}
NOT_NEGATIVE = (
    *("kl_coef", "vf_coef", "ptx_coef", "epsilon", "cliprange_value", "missing_eos_penalty"),
    *("critic_learning_rate", "critic_warmup_steps"),
)
POSITIVE = (
    *("score_std", "score_clip", "adaptive_kl_target", "adaptive_kl_horizon", "target_kl", "temperature"),
    *("ptx_max_length", "total_episodes", "num_iterations", "num_generations"),
    "local_rollout_forward_batch_size",
)

# Keys of generation_kwargs that a rollout cannot have, and what to set instead.
REFUSED_IN_GENERATION = {
    "temperature": "set the argument temperature, which training divides logits by too",
    "num_return_sequences": "set num_generations",
    "eos_token_id": "responses end with the stop tokens of the tokenizer and of the base's generation config",
    "pad_token_id": "it is the tokenizer's",
    "stop_strings": "responses end with stop tokens, not with text",
    "return_dict_in_generate": "a rollout is token ids alone",
}


class _OneResponse(int):
    """1, as the number of responses a prompt, for GRPOConfig, which wants at least 2 to compare within a group."""

    def __lt__(self, other):
        return False


@dataclass
class PPOConfig(GRPOConfig):
    """Arguments of [`PPOTrainer`]: TRL's `GRPOConfig` with PPO's own fields.

    One rollout is `per_device_train_batch_size * steps_per_generation * processes` episodes. It is trained on
    `num_iterations` times, in minibatches of `per_device_train_batch_size * gradient_accumulation_steps * processes`.
    """

    # GRPOConfig's fields with PPO's defaults
    num_generations: int | None = field(default=1, metadata={"help": "Responses sampled for each prompt."})
    num_generations_eval: int | None = field(default=1, metadata={"help": "The same, in evaluation."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over each rollout (num_ppo_epochs)."})
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "How token losses are averaged: `dapo` over all tokens of the batch, which does not depend on how "
            "it is split; `bnpo` within each micro-batch, as TRL 1.12's PPOTrainer did."
        },
    )
    scale_rewards: str = field(default="none", metadata={"help": "Only none: PPO whitens advantages instead."})
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout off in every role."})

    # Reward
    kl_coef: float = field(default=0.05, metadata={"help": "What one nat of KL to the reference costs (beta)."})
    kl_estimator: str = field(
        default="k1", metadata={"help": "KL per token: `k1` (unbiased) or `k3` (less variance, never negative)."}
    )
    adaptive_kl_target: float | None = field(
        default=None,
        metadata={"help": "KL per response, in nats, that kl_coef is adjusted to. None: kl_coef is fixed."},
    )
    adaptive_kl_horizon: int = field(default=10_000, metadata={"help": "Episodes in which kl_coef adapts."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a response without a stop token."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Scores are clipped to ± this value."})
    score_mean: float | None = field(default=None, metadata={"help": "Subtracted from the reward model's score."})
    score_std: float | None = field(default=None, metadata={"help": "The reward model's score is divided by it."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to variance 1."})

    # Advantages and critic
    gamma: float = field(default=1.0, metadata={"help": "Discount of one token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Range the value may move in per rollout."})
    critic_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    critic_warmup_steps: int = field(default=0, metadata={"help": "First steps that train only the critic."})

    # Update
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Stop training on a rollout once policy/approxkl_avg of a minibatch exceeds it."},
    )
    ptx_coef: float = field(
        default=0.0, metadata={"help": "Weight of the demonstrations' loss, its mean over tokens (PPO-ptx)."}
    )
    ptx_max_length: int = field(default=1024, metadata={"help": "Tokens of a demonstration; the rest is cut."})
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Exponential moving average (EMA) of the policy's adapter, saved in ema/; InstructGPT: 0.992."
        },
    )
    total_episodes: int | None = field(default=None, metadata={"help": "Sets max_steps: episodes over all rollouts."})

    # Speed
    local_rollout_forward_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Responses that a device scores at a time, without gradients; more of them where they are short. "
            "Default: per_device_train_batch_size. Four times as many take about as much memory."
        },
    )
    fast_paths: list[str] = field(
        default_factory=lambda: list(FAST_PATHS),
        metadata={
            "help": f"What makes PPO fast without changing its numbers: {', '.join(FAST_PATHS)}; fewer to compare."
        },
    )

    def __post_init__(self):
        if self.scale_rewards is False:  # another way to write none
            self.scale_rewards = "none"
        for each in fields(self):
            value, default = getattr(self, each.name), each.default
            if each.name in REFUSED and default is not MISSING and value != default:
                raise ValueError(f"{each.name} ({value}) is not used by PPO: {REFUSED[each.name]}.")
        for names, at_least in ((NOT_NEGATIVE, "at least"), (POSITIVE, "above")):
            for name in names:
                value = getattr(self, name)
                if value is not None and not (0 < value < math.inf or value == 0 and at_least == "at least"):
                    raise ValueError(f"{name} must be {at_least} 0, got {value}.")
        for name, numbers in (("score_mean", [self.score_mean]), ("reward_weights", self.reward_weights or [])):
            if not all(number is None or math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}.")
        if self.reward_weights and not any(self.reward_weights):
            raise ValueError("reward_weights are all 0: there would be nothing to learn from.")
        if self.kl_estimator not in ("k1", "k3"):
            raise ValueError(f"kl_estimator must be k1 or k3, got {self.kl_estimator}.")
        if self.loss_type not in ("dapo", "bnpo"):
            raise ValueError(f"loss_type must be dapo or bnpo for PPO, got {self.loss_type}.")
        if self.fp16 and self.target_kl is not None:
            raise ValueError("target_kl leaves out minibatches, which the loss scaling of fp16 cannot: use bf16.")
        if unknown := set(self.fast_paths) - set(FAST_PATHS):
            raise ValueError(f"fast_paths takes {', '.join(FAST_PATHS)}, not {', '.join(sorted(unknown))}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {self.ema_decay}.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        # Policy and critic are two forwards before one backward, which DDP's search for unused parameters and its
        # buffer broadcast both break.
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False
        if self.num_generations == 1:
            self.num_generations = _OneResponse(1)
        # Trainer's default, the loss, is near 0 for the policy and says how wrong the critic is.
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "objective/rlhf_reward"
        super().__post_init__()
        if self.local_rollout_forward_batch_size is None:
            self.local_rollout_forward_batch_size = self.per_device_train_batch_size
        self.num_generations = int(self.num_generations)
        self._check_generation_kwargs()
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}): a minibatch may not span rollouts."
            )
        if self.total_episodes is not None:
            rollouts = math.ceil(self.total_episodes / self.generation_batch_size)
            minibatches = self.steps_per_generation // self.gradient_accumulation_steps
            self.max_steps = rollouts * self.num_iterations * minibatches

    def _check_generation_kwargs(self) -> None:
        """Refuse generation arguments that would be ignored or break a rollout; vLLM checks its own."""
        asked = self.generation_kwargs or {}
        for name in asked:
            if name in REFUSED_IN_GENERATION:
                raise ValueError(f"generation_kwargs takes no {name}: {REFUSED_IN_GENERATION[name]}.")
        if self.use_vllm:
            return
        if unknown := asked.keys() - vars(GenerationConfig()).keys():
            raise ValueError(f"generation_kwargs: transformers knows no generation argument {sorted(unknown)[0]}.")
        mode = GenerationConfig(**({"do_sample": True} | asked)).get_generation_mode()
        sampling = (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
        beams = (GenerationMode.BEAM_SAMPLE, GenerationMode.BEAM_SEARCH)
        if mode not in (*sampling, *beams) or (mode in beams and self.use_transformers_continuous_batching):
            raise ValueError(f"generation_kwargs {asked} ask for {mode.value}, which rollouts cannot be sampled by.")

    @property
    def micro_batches_per_rollout(self) -> int:
        """Micro-batches that a process trains on from one rollout to the next, over all epochs."""
        return self.steps_per_generation * self.num_iterations

    def check_prompts(self, prompts: int) -> None:
        """Check that a dataset of so many prompts is enough for one rollout.

        Raises:
            UserError: it is not; names values that fit.
        """
        rollout = self.generation_batch_size // self.num_generations
        if prompts < rollout:
            responses = prompts * self.num_generations // self.world_size
            steps = self.steps_per_generation if responses >= self.steps_per_generation else 1
            sizes = range(responses // steps, 0, -1)
            fitting = (size for size in sizes if size * steps * self.world_size % self.num_generations == 0)
            flags = f"--per_device_train_batch_size {next(fitting, 1)} --steps_per_generation {steps}"
            if steps % self.gradient_accumulation_steps:
                flags += " --gradient_accumulation_steps 1"
            raise UserError(
                f"One rollout is {counted(rollout, 'prompt')} and the dataset has {prompts} to train on: "
                f"get more prompts, or set {flags}."
            )
