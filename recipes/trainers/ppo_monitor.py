"""Warnings about a PPO run while it runs, each with its likely cause: one line a problem, logged once."""

import torch
from accelerate.logging import get_logger

from recipes.cli.checkpoints import last_good_state
from recipes.cli.errors import UserError
from recipes.trainers.ppo_config import PPOConfig

logger = get_logger(__name__)

# Trained policies stay below 10 nats a response in the literature; at 50 to 85 they won under 20 % (2403.17031).
RUNAWAY_KL = 50.0
POOR_CRITIC_ROLLOUTS = 10


class PPOMonitor:
    """Watches the numbers of each rollout and its first minibatch.

    Args:
        args: to name the cause of a problem.
        pad_is_eos: whether the tokenizer pads with a stop token.
        ratio_tolerance: how far the ratio may be from 1 before the first update, by the precision of the run.
    """

    def __init__(self, args: PPOConfig, pad_is_eos: bool, ratio_tolerance: float):
        self.args, self.pad_is_eos, self.ratio_tolerance = args, pad_is_eos, ratio_tolerance
        self.warned: set[str] = set()
        self.poor_critic = 0

    def scores(self, scores: torch.Tensor, names: list[str], has_reward_model: bool, step: int) -> None:
        """Stop the run unless every response has a finite score.

        `scores` (B, functions) has a column for each of `names`, the reward model's first. A function may pass over a
        response with None, which is NaN here; the reward model may not. One of weight 0 is only logged.
        """
        passed = scores.isnan() & (torch.arange(scores.size(1), device=scores.device) >= has_reward_model)
        wrong = ~(scores.isfinite() | passed)
        logged = [weight == 0 for weight in self.args.reward_weights or [1] * len(names)]
        unscored = wrong.any(1) | (passed | torch.tensor(logged, device=scores.device)).all(1)
        if unscored.any():
            at_fault = [name for name, bad in zip(names, wrong.any(0).tolist(), strict=True) if bad] or names
            raise UserError(
                f"Step {step}: {', '.join(at_fault)} gave no finite score to {int(unscored.sum())} of {len(scores)} "
                f"responses, the first in row {int(unscored.nonzero()[0])} of the rollout. "
                f"{last_good_state(self.args.output_dir)}"
            )

    def rollout(self, kl: torch.Tensor, scores: torch.Tensor, cut_share: float, explained_variance: float) -> None:
        """Check a rollout: `kl` and `scores` of its responses on all processes, (B,)."""
        mean, error = kl.mean().item(), kl.std().item() / len(kl) ** 0.5 if len(kl) > 1 else 0.0
        if mean < -0.1 - 3 * error:
            self.warn_once("negative KL", f"objective/kl is {mean:.2f} nats a response. {self.sampler_cause()}")
        limit = RUNAWAY_KL if self.args.adaptive_kl_target is None else 5 * self.args.adaptive_kl_target
        if mean > limit:
            self.warn_once(
                "runaway KL",
                f"objective/kl is {mean:.0f} nats a response: the policy is far from the reference, where the reward "
                "model is unreliable. Raise kl_coef or lower learning_rate.",
            )
        if cut_share >= 0.5:
            cause = "The tokenizer pads with EOS: was EOS trained in SFT? " if self.pad_is_eos else ""
            which = "Every response" if cut_share == 1 else f"A share of {cut_share:.2f} of the responses"
            self.warn_once(
                "cut",
                f"{which} was cut at max_completion_length ({self.args.max_completion_length}), so fragments "
                f"are scored. {cause}Raise the limit, or teach stopping with missing_eos_penalty.",
            )
        if len(scores) > 1 and scores.max() == scores.min():
            self.warn_once(
                "equal scores",
                f"Every response of the rollout scored {scores[0].item():.4g}: there is nothing to learn from. "
                "Look at the reward's head and functions, and at score_clip.",
            )
        self.poor_critic = self.poor_critic + 1 if explained_variance < 0 else 0
        if self.poor_critic == POOR_CRITIC_ROLLOUTS:
            self.warn_once(
                "poor critic",
                f"val/explained_variance was below 0 in {POOR_CRITIC_ROLLOUTS} rollouts running: the critic adds "
                "noise. Raise critic_learning_rate or critic_warmup_steps.",
            )

    def first_minibatch(self, ratio: float) -> None:
        """Check the mean ratio before any update of the rollout, which is 1 where both passes are the same policy."""
        if abs(ratio - 1) > self.ratio_tolerance:
            self.warn_once(
                "ratio",
                f"val/ratio is {ratio:.4f} before the first update on a rollout, not 1: rollout and training compute "
                "other numbers. Look for dropout, another precision in one of them, or adapters set from outside.",
            )

    def sampler_cause(self) -> str:
        neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        sampling = {name: getattr(self.args, name) or value for name, value in neutral.items()}
        filters = [f"{name}={value}" for name, value in sampling.items() if value != neutral[name]]
        filters += [f"{name}={value}" for name, value in (self.args.generation_kwargs or {}).items()]
        if filters:
            return (
                f"Responses are not sampled from the policy itself but filtered by {', '.join(filters)}: remove that."
            )
        if self.args.use_vllm:
            return "vLLM computes other log-probabilities than training: see sampling/sampling_logp_difference."
        return "Sampler and log-probabilities disagree: is the generation config's temperature the one of training?"

    def warn_once(self, problem: str, text: str) -> None:
        if problem not in self.warned:
            self.warned.add(problem)
            logger.warning(text)
