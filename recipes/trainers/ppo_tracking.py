"""What PPO tells the trackers beside its losses: spreads, gradient norms, times, memory, histograms, completions."""

import contextlib
import resource
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from trl import GRPOTrainer

from recipes.trainers.ppo_math import explained_variance, masked_moments
from recipes.trainers.ppo_monitor import PPOMonitor
from recipes.trainers.rollout import Rollout

KIB, GIB = 2**10, 2**30


def describe(rollout: Rollout, scores: torch.Tensor, accelerator: Accelerator) -> dict[str, float]:
    """Mean and spread of what a rollout is trained on, over the tokens and responses of all processes.

    Args:
        scores: final scores of the responses of all processes, (B * processes,).
    """
    prompts = accelerator.gather(rollout.attention_mask.sum(1) - rollout.mask.sum(1)).float()
    found = {
        "objective/scores_min": scores.min().item(),
        "objective/scores_max": scores.max().item(),
        "objective/scores_std": scores.std(correction=0).item(),
        "prompts/mean_length": prompts.mean().item(),
        "prompts/max_length": prompts.max().item(),
    }
    mask = rollout.mask
    by_token = {"advantages": rollout.returns - rollout.values, "returns": rollout.returns, "values": rollout.values}
    for name, numbers in by_token.items():  # advantages before whitening, which makes their mean 0 and spread 1
        mean, variance = masked_moments(numbers, mask, partial(accelerator.reduce, reduction="sum"))
        found |= {f"{name}/mean": mean.item(), f"{name}/std": variance.sqrt().item()}
    return found


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norms of the gradients of policy and critic, before they are clipped together."""
    gradients: dict[str, list[torch.Tensor]] = {"policy": [], "critic": []}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients["critic" if "critic" in name.split(".") else "policy"].append(parameter.grad)
    norms = {}
    for role, parts in gradients.items():
        norm = torch.nn.utils.get_total_norm(parts)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shares
        norms[f"grad_norm/{role}"] = norm.item()
    return norms


def readable(message_list: list[dict] | str) -> str:
    """A conversation as text; a single message without its role."""
    if isinstance(message_list, str):
        return message_list
    texts = [str(message["content"]) for message in message_list]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(message_list, texts, strict=True))


class PPOTracking(TrainerCallback):
    """Gives the trackers times and memory, which differ between equal runs and so stay out of `trainer_state.json`.

    `time/sample`, `time/score` and `time/update` are seconds a rollout, `time/tokens_per_second` counts response
    tokens of all processes, `memory/peak_gib` is of this process: of the GPU, without one of the main memory.
    """

    def __init__(self, callbacks: list[TrainerCallback]):
        self.callbacks, self.inside = callbacks, 0.0
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.scores: list[torch.Tensor] = []
        self.lengths: list[torch.Tensor] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds within for `name`, without those of phases in it."""
        started, outside, self.inside = time.perf_counter(), self.inside, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] += spent - self.inside
            self.inside = outside + spent

    def rollout(self, scores: torch.Tensor, lengths: torch.Tensor) -> None:
        """Take note of the responses of all processes, (B,) each."""
        self.scores.append(scores.cpu())
        self.lengths.append(lengths.cpu())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.scores or any(name.startswith(("eval_", "train_runtime")) for name in logs):
            return
        logs |= {f"time/{name}": spent / len(self.scores) for name, spent in self.seconds.items()}
        logs["time/tokens_per_second"] = sum(map(torch.sum, self.lengths)).item() / sum(self.seconds.values())
        if args.device.type == "cuda":
            logs["memory/peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        else:
            logs["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / GIB
        if state.is_world_process_zero:
            self.log_histogram("train/objective/scores_histogram", torch.cat(self.scores), state.global_step)
            self.log_histogram("train/completions/length_histogram", torch.cat(self.lengths), state.global_step)
        self.reset()

    def log_histogram(self, name: str, numbers: torch.Tensor, step: int) -> None:
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_histogram(name, numbers, step)
        if any(isinstance(callback, WandbCallback) for callback in self.callbacks):
            import wandb

            wandb.log({name: wandb.Histogram(numbers.numpy())}, commit=False)  # WandbCallback commits the step


class PPOLogging(GRPOTrainer):
    """The part of `PPOTrainer` that logs; nothing here changes what is trained."""

    def _start_logging(self, ratio_tolerance: float) -> None:
        self._update_sums, self._table_logged = 0, True
        self._tracking = PPOTracking(self.callback_handler.callbacks)
        self.callback_handler.callbacks.insert(0, self._tracking)  # what it adds to a log comes before the trackers
        pad_is_eos = self._tokenizer.pad_token_id in self.eos_token_ids
        self._monitor = PPOMonitor(self.args, pad_is_eos, ratio_tolerance)

    def _log_rollout(self, rollout: Rollout) -> float:
        """Log what a rollout looks like, over the responses of all processes. Returns the KL, nats a response."""
        mode = "train" if self.model.training else "eval"
        mask, metrics, table = rollout.mask, self._metrics[mode], self._logs["extra"]
        kl, entropy = rollout.kl.sum(1), -(rollout.logps * mask).sum(1)
        non_score = -self.kl_controller.value * kl
        per_response = torch.stack([kl, entropy, non_score, rollout.scores, non_score + rollout.scores], 1)
        names = ("kl", "entropy", "non_score_reward", "scores", "rlhf_reward")
        gather = self.accelerator.gather
        if mode == "eval" and self.num_generations_eval == 1:
            gather = self.accelerator.gather_for_metrics  # prompts that fill the last batch up count once
        per_response = dict(zip(names, gather(per_response).T, strict=True))
        for name, values in per_response.items():
            # The last batch of an evaluation is smaller: each response counts the same, not each batch.
            metrics[f"objective/{name}"].extend(values.tolist() if mode == "eval" else [values.mean().item()])
        metrics["objective/kl_coef"].append(self.kl_controller.value)
        stops = torch.tensor(self.eos_token_ids, device=mask.device)
        eos = (torch.isin(rollout.ids[:, -mask.size(1) :], stops) * mask).sum()
        metrics["val/num_eos_tokens"].append(self._sum_over_processes(eos).item())
        explained = explained_variance(rollout.values, rollout.returns, mask, self._sum_over_processes).item()
        metrics["val/explained_variance"].append(explained)
        for name, value in describe(rollout, per_response["scores"], self.accelerator).items():
            metrics[name].append(value)
        if mode == "train":
            self._tracking.rollout(per_response["scores"], self.accelerator.gather(mask.sum(1)))
            unfinished = self.accelerator.gather(rollout.is_unfinished(self.eos_token_ids).float()).mean().item()
            self._monitor.rollout(per_response["kl"], per_response["scores"], unfinished, explained)
            rollouts = self._step // self.args.micro_batches_per_rollout + 1
            metrics["episode"] = [rollouts * self.args.generation_batch_size]
        # GRPO's view of the rewards, by groups of one: its spread is always 0 and its sum misses PPO's normalisation.
        for name in ("reward", "reward_std", "frac_reward_zero_std"):
            metrics.pop(name, None)
        table["kl"].extend(gather_object(kl.tolist()))
        table["score"].extend(gather_object(rollout.scores.tolist()))
        advantages = gather_object((rollout.advantages.sum(1) / mask.sum(1).clamp(min=1)).tolist())
        for _ in range(min(len(advantages), len(self._logs["advantages"]))):  # an evaluation may have more rows
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(advantages)
        return per_response["kl"].mean().item()

    def _log_update(self, by_token: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, float]:
        """Log the means of (B, T) numbers over the tokens of a whole minibatch, however it is split.

        Returns them, or nothing while micro-batches are still to come.
        """
        mode = "train" if self.model.training else "eval"
        self._update_sums += torch.stack([(value * mask).sum() for value in by_token.values()] + [mask.sum()])
        if mode == "train" and not self.accelerator.sync_gradients:
            return {}
        *totals, count = self._sum_over_processes(self._update_sums).tolist()
        self._update_sums = 0
        means = {name: total / max(count, 1) for name, total in zip(by_token, totals, strict=True)}
        for name, mean in means.items():
            self._metrics[mode][name].append(mean)
        if (
            mode == "train"
            and count
            and self._step % self.args.micro_batches_per_rollout < self.args.gradient_accumulation_steps
        ):
            self._monitor.first_minibatch(means["val/ratio"])
        return means

    def _log_gradient_norms(self) -> None:
        if self.accelerator.sync_gradients:
            for name, norm in gradient_norms(self._policy).items():
                self._metrics["train"][name].append(norm)

    def _phase(self, name: str):
        """Counts seconds for `time/<name>`, in training."""
        return self._tracking.phase(name) if self.model.training else contextlib.nullcontext()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL logs, with completions as text, and each of them in one table only."""
        wanted, self.log_completions = self.log_completions, self.log_completions and not self._table_logged
        for column in ("prompt", "completion"):
            self._logs[column] = deque(map(readable, self._logs[column]), self._logs[column].maxlen)
        super().log(logs, start_time)
        self.log_completions, self._table_logged = wanted, True

    def _begin_table(self) -> None:
        """Forget the completions that a table has shown."""
        if self._table_logged:
            for rows in (*self._logs.values(), *self._logs["rewards"].values(), *self._logs["extra"].values()):
                if isinstance(rows, deque):
                    rows.clear()
        self._table_logged = False
