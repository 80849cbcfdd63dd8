"""`PPOConfig`: the arguments of `PPOTrainer`, checked before any model loads."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

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

# Fields of GRPOConfig and TrainingArguments that PPO has no use for, by the reason that a refusal of them gives.
WITHOUT_USE = {
    "PPO has its KL in the reward: set kl_coef instead of beta": "beta use_bias_correction_kl",
    "GRPO compares responses of one prompt; PPO has a critic, sums scores by reward_weights and whitens advantages": (
        "scale_rewards multi_objective_aggregation"
    ),
    "PPO's loss is the clipped one of each token": (
        "importance_sampling_level delta sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos "
        "vespo_k_neg vespo_lambda_neg off_policy_mask_threshold top_entropy_quantile router_aux_loss_coef "
        "label_smoothing_factor"
    ),
    "only a constant entropy_coef is there": (
        "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
    ),
    "the reference stays the policy as it was at the start": (
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
    ),
    "PPOTrainer takes loaded models; the recipe takes ModelConfig's arguments": "model_init_kwargs",
    "PPO does not run by DeepSpeed": "ds3_gather_for_generation",
    "PPO here answers text prompts, without tools and images": "max_tool_calling_iterations log_multimodal",
    "with noise in the embeddings, training and sampling would use different policies": "neftune_noise_alpha",
    "prompts are drawn by seed, or in order with shuffle_dataset: false": "data_seed train_sampling_strategy",
}
REFUSED = {name: reason for reason, names in WITHOUT_USE.items() for name in names.split()}

# What numbers may be, where they are set.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 0": (
        lambda number: 0 <= number < math.inf,
        "kl_coef vf_coef ptx_coef epsilon epsilon_high cliprange_value missing_eos_penalty critic_learning_rate "
        "critic_warmup_steps",
    ),
    "above 0": (
        lambda number: 0 < number < math.inf,
        "score_std score_clip adaptive_kl_target adaptive_kl_horizon target_kl temperature ptx_max_length "
        "total_episodes num_iterations num_generations local_rollout_forward_batch_size",
    ),
    "between 0 and 1": (lambda number: 0 <= number <= 1, "gamma lam"),
    "above 0 and below 1": (lambda number: 0 < number < 1, "ema_decay"),  # at 1 the average would never move
    "finite": (math.isfinite, "score_mean reward_weights"),
}
CHOICES = {"kl_estimator": ("k1", "k3"), "loss_type": ("dapo", "bnpo"), "fast_paths": FAST_PATHS}

# Keys of generation_kwargs that a rollout cannot have, and what to set instead.
REFUSED_IN_GENERATION = {
    "temperature": "set the argument temperature, which training divides logits by too",
    "num_return_sequences": "set num_generations",
    "eos_token_id": "responses end with the stop tokens of the tokenizer and of the base's generation config",
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
        default="dapo", metadata={"help": "Mean of token losses by batch (`dapo`) or micro-batch (`bnpo`, TRL 1.12)."}
    )
    scale_rewards: str = field(default="none", metadata={"help": "Only none: PPO whitens advantages instead."})
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout off in every role."})

    # Reward
    kl_coef: float = field(default=0.05, metadata={"help": "What one nat of KL to the reference costs (beta)."})
    kl_estimator: str = field(default="k1", metadata={"help": "`k1` (unbiased) or `k3` (never negative)."})
    adaptive_kl_target: float | None = field(
        default=None, metadata={"help": "KL per response, in nats, that kl_coef is adjusted to. None: it is fixed."}
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
        default=None, metadata={"help": "Training on a rollout stops once policy/approxkl_avg exceeds it."}
    )
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the demonstrations' mean token loss (PPO-ptx)."})
    ptx_max_length: int = field(default=1024, metadata={"help": "Tokens of a demonstration; the rest is cut."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of an average of the policy's adapter, in ema/ (InstructGPT: 0.992)."}
    )
    total_episodes: int | None = field(default=None, metadata={"help": "Sets max_steps: episodes over all rollouts."})

    # Speed
    local_rollout_forward_batch_size: int | None = field(
        default=None, metadata={"help": "Responses a device scores at a time. Default: per_device_train_batch_size."}
    )
    fast_paths: list[str] = field(
        default_factory=lambda: list(FAST_PATHS),
        metadata={"help": f"What makes PPO fast, with the same numbers: {', '.join(FAST_PATHS)}."},
    )

    def __post_init__(self):
        self._check_values()
        # Policy and critic are two forwards before one backward, which DDP's search for unused parameters and its
        # buffer broadcast both break.
        self.ddp_find_unused_parameters = self.ddp_find_unused_parameters or False
        self.ddp_broadcast_buffers = self.ddp_broadcast_buffers or False
        if self.num_generations == 1:
            self.num_generations = _OneResponse(1)
        # Trainer's default, the loss, is near 0 for the policy and says how wrong the critic is.
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "objective/rlhf_reward"
        super().__post_init__()
        self.num_generations = int(self.num_generations)
        if self.local_rollout_forward_batch_size is None:
            self.local_rollout_forward_batch_size = self.per_device_train_batch_size
        self._check_generation_kwargs()
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}): a minibatch may not span rollouts."
            )
        one_update = self.micro_batches_per_rollout == self.gradient_accumulation_steps
        short = self.adaptive_kl_target and 5 * self.adaptive_kl_horizon <= self.generation_batch_size
        masked = self.mask_truncated_completions and self.missing_eos_penalty
        conflicts = {
            "adaptive_kl_target multiplies kl_coef, which would stay 0": not self.kl_coef and self.adaptive_kl_target,
            "one rollout could take kl_coef below 0 by so short an adaptive_kl_horizon": short,
            "target_kl stops the later updates on a rollout, which has only one": one_update and self.target_kl,
            "missing_eos_penalty is for responses that mask_truncated_completions leaves out": masked,
        }
        for text in (text for text, applies in conflicts.items() if applies):
            raise ValueError(f"{text}: change one of them.")
        if self.total_episodes is not None:
            rollouts = math.ceil(self.total_episodes / self.generation_batch_size)
            self.max_steps = rollouts * self.micro_batches_per_rollout // self.gradient_accumulation_steps

    def _check_values(self) -> None:
        for name, reason in REFUSED.items():
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} ({value}) is not used by PPO: {reason}.")
        for wanted, (fits, names) in RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                numbers = value if isinstance(value, list) else [value]
                if not all(number is None or fits(number) for number in numbers):
                    raise ValueError(f"{name} must be {wanted}, got {value}.")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if not {*known}.issuperset(value if isinstance(value, list) else [value]):
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value}.")
        if not (self.max_completion_length or 0) > 0:
            raise ValueError(f"max_completion_length must be above 0, got {self.max_completion_length}.")
        if self.reward_weights and not any(self.reward_weights):
            raise ValueError("reward_weights are all 0: there would be nothing to learn from.")
        if self.fp16 and self.target_kl is not None:
            raise ValueError("target_kl leaves out minibatches, which the loss scaling of fp16 cannot: use bf16.")

    def _check_generation_kwargs(self) -> None:
        """Refuse generation arguments that would be ignored or break a rollout; vLLM checks its own."""
        asked = self.generation_kwargs or {}
        for name, instead in REFUSED_IN_GENERATION.items():
            if name in asked:
                raise ValueError(f"generation_kwargs takes no {name}: {instead}.")
        if self.use_vllm:
            return
        if unknown := asked.keys() - vars(GenerationConfig()).keys():
            raise ValueError(f"generation_kwargs: transformers knows no generation argument {sorted(unknown)[0]}.")
        modes = {GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH}
        if not self.use_transformers_continuous_batching:
            modes |= {GenerationMode.BEAM_SAMPLE, GenerationMode.BEAM_SEARCH}
        mode = GenerationConfig(**({"do_sample": True} | asked)).get_generation_mode()
        if mode not in modes:
            raise ValueError(f"generation_kwargs {asked} ask for {mode.value}, which rollouts cannot be sampled by.")

    @property
    def micro_batches_per_rollout(self) -> int:
        """Micro-batches that a process trains on from one rollout to the next, over all epochs."""
        return self.steps_per_generation * self.num_iterations

    def check_prompts(self, prompts: int) -> None:
        """Refuse a dataset of so many prompts where they are fewer than one rollout takes, with values that fit."""
        group = self.num_generations
        rollout = self.generation_batch_size // group
        if prompts >= rollout:
            return
        responses = prompts * group // self.world_size
        steps = self.steps_per_generation if responses >= self.steps_per_generation * group else 1
        batch_size = max(responses // steps // group * group, 1)
        flags = f"--per_device_train_batch_size {batch_size} --steps_per_generation {steps}"
        if steps % self.gradient_accumulation_steps:
            flags += " --gradient_accumulation_steps 1"
        raise UserError(
            f"One rollout is {counted(rollout, 'prompt')} and the dataset has {prompts} to train on: "
            f"get more prompts, or set {flags}."
        )

    def check_warmup(self, prompts: int) -> None:
        """Refuse a warm-up of the critic as long as the run on so many prompts, which would train no policy."""
        steps = self.max_steps
        if steps <= 0:  # as Trainer counts them
            rollouts = prompts // (self.generation_batch_size // self.num_generations)
            updates = rollouts * self.micro_batches_per_rollout // self.gradient_accumulation_steps
            steps = math.ceil(updates * self.num_train_epochs)
        if 0 < steps <= self.critic_warmup_steps:
            raise UserError(
                f"--critic_warmup_steps {self.critic_warmup_steps}: the run has {counted(steps, 'step')}, and none "
                "would train the policy."
            )
