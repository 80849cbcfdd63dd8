"""Warnings about a PPO run while it runs, each with its likely cause: one line a problem, logged once."""

import torch
from accelerate.logging import get_logger

from recipes.trainers.ppo_config import PPOConfig

logger = get_logger(__name__)

# Trained policies stay below 10 nats a response in the literature; at 50 to 85 they won under 20 % (2403.17031).
RUNAWAY_KL = 50.0
POOR_CRITIC_ROLLOUTS = 10


class PPOMonitor:
    """Watches the numbers of each rollout and its first minibatch.

    `pad_is_eos` is whether the tokenizer pads with a stop token, and `ratio_tolerance` how far the ratio may be from 1
    before the first update, by the precision of the run.
    """

    def __init__(self, args: PPOConfig, pad_is_eos: bool, ratio_tolerance: float):
        self.args, self.pad_is_eos, self.ratio_tolerance = args, pad_is_eos, ratio_tolerance
        self.warned: set[str] = set()
        self.poor_critic = 0

    def rollout(self, kl: torch.Tensor, scores: torch.Tensor, cut_share: float, explained_variance: float) -> None:
        """Check `kl` and `scores` of a rollout on all processes, (B,), NaN where the KL is not known."""
        args, mean, kl = self.args, kl.nanmean().item(), kl[~kl.isnan()]
        error = kl.std(correction=0).item() / len(kl) ** 0.5 if len(kl) else 0.0
        if mean < -0.1 - 3 * error:
            self.warn_once("negative KL", f"objective/kl is {mean:.2f} nats a response. {self.sampler_cause()}")
        if mean > (RUNAWAY_KL if args.adaptive_kl_target is None else 5 * args.adaptive_kl_target):
            text = "the policy is where the reward model is unreliable. Raise kl_coef or lower learning_rate."
            self.warn_once("runaway KL", f"objective/kl is {mean:.0f} nats a response: {text}")
        if cut_share >= 0.5:
            text = f"A share of {cut_share:.2f} of the responses was cut at max_completion_length"
            text += f" ({args.max_completion_length}), so fragments are scored. "
            text += "The tokenizer pads with EOS: was EOS trained in SFT? " if self.pad_is_eos else ""
            self.warn_once("cut", text + "Raise the limit, or teach stopping with missing_eos_penalty.")
        if len(scores) > 1 and scores.max() == scores.min():
            text = "there is nothing to learn from. Look at the reward's head and functions, and at score_clip."
            self.warn_once("equal scores", f"Every response of the rollout scored {scores[0].item():.4g}: {text}")
        self.poor_critic = self.poor_critic + 1 if explained_variance < 0 else 0
        if self.poor_critic == POOR_CRITIC_ROLLOUTS:
            text = "the critic adds noise. Raise critic_learning_rate or critic_warmup_steps."
            count = f"in {POOR_CRITIC_ROLLOUTS} rollouts running"
            self.warn_once("poor critic", f"val/explained_variance was below 0 {count}: {text}")

    def first_minibatch(self, ratio: float) -> None:
        """Check the mean ratio before any update of the rollout, which is 1 where both passes are the same policy."""
        if abs(ratio - 1) > self.ratio_tolerance:
            self.warn_once(
                "ratio",
                f"val/ratio is {ratio:.4f} before the first update on a rollout, not 1: rollout and training compute "
                "other numbers. Look for dropout, another precision in one of them, or adapters set from outside.",
            )

    def sampler_cause(self) -> str:
        args, neutral = self.args, {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
        filters = {name: getattr(args, name) for name in neutral if getattr(args, name) != neutral[name]}
        if filters := filters | (args.generation_kwargs or {}):
            asked = ", ".join(f"{name}={value}" for name, value in filters.items())
            return f"Responses are not sampled from the policy itself but filtered by {asked}: remove that."
        return (
            "Sampler and log-probabilities disagree: is the generation config's temperature the one of training? "
            "By vLLM, see sampling/sampling_logp_difference."
        )

    def warn_once(self, problem: str, text: str) -> None:
        if problem not in self.warned:
            self.warned.add(problem)
            logger.warning(text)
