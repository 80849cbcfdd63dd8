"""What a run shows: one bar, one line a log step with the numbers that matter, its result and what comes next."""

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

# The first six of these that a log has are shown; the trackers get all.
NUMBERS = (
    *("objective/scores", "objective/kl", "objective/entropy", "completions/mean_length", "val/explained_variance"),
    *("policy/clipfrac_avg", "loss", "accuracy", "longer_wins", "margin", "mean_token_accuracy", "entropy"),
    *("grad_norm", "learning_rate"),
)
# The result of a recipe, by the names of its metrics.
RESULTS = {
    "sft": {"loss": "loss", "eval_loss": "evaluation loss"},
    "reward": {"loss": "loss", "eval_accuracy": "accuracy", "eval_longer_wins": "longer wins"},
    "ppo": {"objective/scores": "score", "objective/kl": "KL", "completions/mean_length": "tokens"},
}


def say(text: str) -> None:
    """Print a line to stderr in the first process of a launch, also where a progress bar stands."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def log_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """The numbers that matter of one log, or "" where there are none."""
    if "train_runtime" in logs:  # Trainer's totals at the end of a run
        return ""
    prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
    shown = [name for name in NUMBERS if logs.get(prefix + name) is not None][:6]
    numbers = [f"{name.split('/')[-1]} {logs[prefix + name]:.3g}" for name in shown]
    return "  ".join([f"step {step}/{steps}", *(["evaluation"] if prefix else []), *numbers]) if shown else ""


def first_and_last(log_history: list[dict[str, Any]], metrics: Iterable[str]) -> list[tuple[str, float, float | None]]:
    """Name, first and last value of each metric that a run logged: means of up to three logs; one log has no last."""
    found = []
    for name in metrics:
        values = [row[name] for row in log_history if row.get(name) is not None]
        few = min(3, len(values) // 2)
        if values:
            found.append((name, fmean(values[: few or 1]), fmean(values[-few:]) if few else None))
    return found


def headline(log_history: list[dict[str, Any]], metrics: Mapping[str, str]) -> str:
    """First and last values of a run's metrics, under the names that `metrics` gives them."""
    parts = [
        f"{metrics[name]} {first:.2f}" + ("" if last is None else f" -> {last:.2f}")
        for name, first, last in first_and_last(log_history, metrics)
    ]
    return ", ".join(parts)


def result_line(recipe: str, path: str, start: str, log_history: list[dict[str, Any]], launcher: str) -> str:
    """Where the result is, how the run went, and the command that goes on from it."""
    found = headline(log_history, RESULTS[recipe])
    found += " (means of the first and last logs)" if " -> " in found else ""
    return f"Saved to {path}{f': {found}' if found else ''}. Next: {next_command(recipe, path, start, launcher)}"


def next_command(recipe: str, path: str, start: str, launcher: str) -> str:
    beside = os.path.dirname(os.path.normpath(path))
    if recipe == "sft":
        words = ["--model_name_or_path", path, "--dataset_name", "PROMPTS"]
        return shlex.join(
            ["python", "scripts/sample_responses.py", *words, "--output", os.path.join(beside, "samples.jsonl")]
        )
    if recipe == "ppo":
        return shlex.join(["python", "scripts/chat.py", "--model_name_or_path", path, "--compare", start])
    given = [part for word in sys.argv for part in word.split("=", 1)]
    config = next((word for word in given if os.path.basename(word) == "reward.yaml"), None)
    words = ["recipes/ppo.py"]
    if config is not None:
        words += ["--config", os.path.join(os.path.dirname(config), "ppo.yaml")]
    if config is None or "--dataset_name" in given:  # who brought rankings of their own has prompts of their own
        words += ["--dataset_name", "PROMPTS"]
    words += ["--model_name_or_path", start, "--reward_model_name_or_path", path]
    return f"{launcher} {shlex.join([*words, '--output_dir', os.path.join(beside, 'ppo')])}"


def aligned(rows: list[list[str]]) -> str:
    """Lines of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
