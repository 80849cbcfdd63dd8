"""What PPO tells the trackers beside its losses: spreads, gradient norms, times, memory, histograms, completions."""

import contextlib
import resource
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

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
        sums = torch.stack([mask.sum(), (numbers * mask).sum(), (numbers.square() * mask).sum()])
        count, total, squares = accelerator.reduce(sums, reduction="sum").tolist()
        mean = total / count
        found |= {f"{name}/mean": mean, f"{name}/std": max(squares / count - mean**2, 0.0) ** 0.5}
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
    """Measures phases, and adds what differs between two equal runs to what the trackers get, not to the run's state.

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
