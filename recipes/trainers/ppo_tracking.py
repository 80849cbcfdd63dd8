"""What PPO tells the trackers beside its losses: means, gradient norms, times, memory, histograms, completions."""

import contextlib
import itertools
import resource
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from trl import GRPOTrainer

from recipes.trainers.ppo_math import masked_moments
from recipes.trainers.ppo_monitor import PPOMonitor
from recipes.trainers.replaced import replaced
from recipes.trainers.rollout import Rollout

GIB = 2**30


def describe(rollout: Rollout, scores: torch.Tensor, prompts: torch.Tensor, reduce: Callable) -> dict[str, float]:
    """Mean and standard deviation of what a rollout is trained on; `reduce` sums over processes.

    `scores` and `prompts` are the final scores and prompt lengths of the responses of all processes, (B * processes,).
    """
    found = {
        "objective/scores_min": scores.min(),
        "objective/scores_max": scores.max(),
        "objective/scores_std": scores.std(correction=0),
        "prompts/mean_length": prompts.mean(),
        "prompts/max_length": prompts.max(),
    }
    # Advantages before whitening, which makes their mean 0 and deviation 1: they are what the critic missed.
    advantages = rollout.returns - rollout.values
    by_token = {"advantages": advantages, "returns": rollout.returns, "values": rollout.values}
    variances = {}
    for name, numbers in by_token.items():
        mean, variances[name] = masked_moments(numbers, rollout.mask, reduce)
        found |= {f"{name}/mean": mean, f"{name}/std": variances[name].sqrt()}
    # 1 is a perfect critic, 0 one that predicts the mean.
    found["val/explained_variance"] = 1 - variances["advantages"] / variances["returns"].clamp(min=1e-8)
    return {name: number.item() for name, number in found.items()}


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
    if len(message_list) == 1:
        return str(message_list[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in message_list)


def log_histograms(callbacks: list[TrainerCallback], histograms: dict[str, torch.Tensor], step: int) -> None:
    for callback, (name, numbers) in itertools.product(callbacks, histograms.items()):
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_histogram(name, numbers, step)
        if isinstance(callback, WandbCallback):
            import wandb

            wandb.log({name: wandb.Histogram(numbers.numpy())}, commit=False)  # WandbCallback commits the step


class PPOLogging(GRPOTrainer):
    """The part of `PPOTrainer` that logs; nothing here changes what is trained."""

    def _start_logging(self, ratio_tolerance: float) -> None:
        self._update_sums = 0
        # Since the last log: seconds by phase, and scores and lengths of the responses of all processes by rollout
        self._seconds, self._inner_seconds, self._sampled = defaultdict(float), 0.0, []
        pad_is_eos = self._tokenizer.pad_token_id in self.eos_token_ids
        self._monitor = PPOMonitor(self.args, pad_is_eos, ratio_tolerance)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Count the seconds within for `time/<name>`, in training, without those of phases in it."""
        training = self.model.training  # continuous batching leaves another mode
        started, outer, self._inner_seconds = time.perf_counter(), self._inner_seconds, 0.0
        yield
        spent = time.perf_counter() - started
        if training:
            self._seconds[name] += spent - self._inner_seconds
        self._inner_seconds = outer + spent

    def _get_eval_sampler(self, eval_dataset):
        """TRL's, which repeats each prompt; Accelerate has to know, to tell the rows that only fill the last batch."""
        eval_dataset.total_dataset_length = len(eval_dataset) * self.num_generations_eval
        return super()._get_eval_sampler(eval_dataset)

    def _log_rollout(self, rollout: Rollout) -> float:
        """Log what a rollout looks like, over the responses of all processes. Returns the KL, nats a response."""
        mode = "train" if self.model.training else "eval"
        metrics, mask, kl_coef = self._metrics[mode], rollout.mask, self._kl_coef
        # Of a response that `mask_truncated_completions` leaves out nothing is known: it is NaN here and in no mean.
        left_out = mask.sum(1) == 0
        kl, entropy = (x.sum(1).masked_fill(left_out, torch.nan) for x in (rollout.kl, -rollout.logps * mask))
        own = {  # (B,) each
            "objective/kl": kl,
            "objective/entropy": entropy,
            "objective/non_score_reward": -kl_coef * kl,
            "objective/scores": rollout.scores,
            "objective/rlhf_reward": -kl_coef * kl + rollout.scores,
            "prompts": kl.new_tensor([*map(len, rollout.prompt_ids)]),
            "lengths": kl.new_tensor([*map(len, rollout.completion_ids)]),
            "unfinished": rollout.is_unfinished(self.eos_token_ids),
        }
        # In an evaluation, prompts that fill the last batch up count once.
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        everywhere = dict(zip(own, gather(torch.stack([*own.values()], 1)).T, strict=True))
        for name, values in everywhere.items():
            if name.startswith("objective/"):
                # The last batch of an evaluation is smaller: each response counts the same, not each batch.
                metrics[name].extend(values.tolist() if mode == "eval" else [values.nanmean().item()])
        scores = everywhere["objective/scores"]
        found = describe(rollout, scores, everywhere["prompts"], self._sum_over_processes)
        ended = len(scores) - everywhere["unfinished"].sum().item()  # each by one stop token
        found |= {"objective/kl_coef": kl_coef, "val/num_eos_tokens": ended}
        for name, number in found.items():
            metrics[name].append(number)
        if mode == "train":
            self._sampled.append((scores.cpu(), everywhere["lengths"].cpu()))
            unfinished = everywhere["unfinished"].mean().item()
            self._monitor.rollout(everywhere["objective/kl"], scores, unfinished, found["val/explained_variance"])
            rollouts = self._step // self.args.micro_batches_per_rollout + 1
            metrics["episode"] = [rollouts * self.args.generation_batch_size]
        # GRPO's view of the rewards, by groups of one: its std is always 0 and its sum misses PPO's normalisation.
        for name in ("reward", "reward_std", "frac_reward_zero_std"):
            metrics.pop(name, None)
        advantages = gather_object((rollout.advantages.sum(1) / mask.sum(1).clamp(min=1)).tolist())
        table = self._logs["advantages"]  # ends with GRPO's
        self._logs["advantages"] = deque([*table][: -len(advantages)] + advantages, table.maxlen)
        self._logs["extra"]["kl"].extend(gather_object(kl.tolist()))
        self._logs["extra"]["score"].extend(gather_object(rollout.scores.tolist()))
        return everywhere["objective/kl"].nanmean().item()

    def _log_update(self, by_token: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, float]:
        """Log the means of (B, T) numbers over the tokens of a whole minibatch, however it is split.

        Returns them, or nothing while micro-batches are still to come.
        """
        mode = "train" if self.model.training else "eval"
        sums = [(value.detach().float() * mask).sum() for value in by_token.values()]
        self._update_sums += torch.stack([*sums, mask.sum()])
        if mode == "train" and not self.accelerator.sync_gradients:
            return {}
        *totals, count = self._sum_over_processes(self._update_sums).tolist()
        self._update_sums = 0
        means = {name: total / max(count, 1) for name, total in zip(by_token, totals, strict=True)}
        for name, mean in means.items():
            self._metrics[mode][name].append(mean)
        is_first = self._step % self.args.micro_batches_per_rollout < self.args.gradient_accumulation_steps
        if mode == "train" and count and is_first:
            self._monitor.first_minibatch(means["val/ratio"])
        return means

    def _log_gradient_norms(self) -> None:
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler  # of fp16, whose scale the gradients still have
            scale = 1.0 if scaler is None else scaler.get_scale()
            for name, norm in gradient_norms(self._policy).items():
                self._metrics["train"][name].append(norm / scale)

    def _measured(self) -> dict[str, float]:
        """Times and memory since the last log; trackers also get histograms.

        `time/sample`, `time/score` and `time/update` are seconds a rollout, `time/tokens_per_second` counts response
        tokens of all processes, `memory/peak_gib` is of this process: of the GPU, without one of the main memory.
        """
        scores, lengths = map(torch.cat, zip(*self._sampled, strict=True))
        found = {f"time/{name}": spent / len(self._sampled) for name, spent in self._seconds.items()}
        found["time/tokens_per_second"] = lengths.sum().item() / sum(self._seconds.values())
        if self.args.device.type == "cuda":
            found["memory/peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        else:
            found["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # from KiB
        if self.state.is_world_process_zero:
            histograms = {"train/objective/scores_histogram": scores, "train/completions/length_histogram": lengths}
            log_histograms(self.callback_handler.callbacks, histograms, self.state.global_step)
        self._seconds.clear()
        self._sampled.clear()
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL logs, with completions as text, and each of them in one table only."""
        # Not of an evaluation, nor in the last log; and not in `trainer_state.json`, as they differ between equal runs
        measured = self._measured() if self._sampled and "loss" in logs else {}
        logs |= measured
        for column in ("prompt", "completion"):
            self._logs[column] = deque(map(readable, self._logs[column]), self._logs[column].maxlen)
        with replaced(self, log_completions=self.log_completions and bool(self._logs["prompt"])):
            super().log(logs, start_time)
        for name in measured:
            del self.state.log_history[-1][name]
        for rows in self._logs.values():
            rows.clear()
