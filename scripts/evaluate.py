"""Shows whether alignment worked, and what it cost: reward, KL, win rates, the reward-KL frontier, the reward model.

    python scripts/evaluate.py --policies base=BASE sft=runs/sft ppo=runs/ppo \\
        --reward_model_name_or_path runs/reward --dataset_name prompts.jsonl --checkpoints ppo=runs/ppo \\
        --preference_datasets rankings.jsonl --output_dir runs/evaluation

Writes report.html (one file), report.json and PNGs. Run the same line again to go on where a run was stopped, or a
longer one to add policies or judges to it. `--config FILE.yaml` holds any of the flags; docs/evaluation.md has more.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError, counted
from recipes.cli.launch import check_wandb, world_size
from recipes.cli.record import git_revision
from recipes.cli.run import run
from recipes.data.report import Report
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.llm_judge import LLMJudge
from recipes.evaluation.measure import Evaluation
from recipes.evaluation.metrics import win_rate
from recipes.evaluation.people import people_outcomes, read_people, write_ranking_task
from recipes.evaluation.report import log_to_wandb, table, write_report
from recipes.evaluation.reward_quality import reward_model_quality
from recipes.evaluation.rewards import RewardModel, read_pairs
from recipes.evaluation.summary import summarise
from recipes.formatting import Formatter, RowArguments, has_test_split, load_rows
from recipes.models.sampling import LoadingArguments, Prompt, PromptsArguments
from recipes.models.tokenization import load_tokenizer


@dataclass
class EvaluationPrompts(PromptsArguments):
    dataset_test_split: str = field(default="test", metadata={"help": "Split that is taken where the dataset has it."})


@dataclass
class JudgeArguments:
    """Judges beside the reward model and --judges, the reward model's own test, and where to log."""

    preference_datasets: list[str] = field(
        default_factory=list, metadata={"help": "Held-out pairs or rankings that measure the reward model."}
    )
    llm_judge_model: str | None = field(default=None, metadata={"help": "LLM that compares with the reference."})
    llm_judge_base_url: str = field(
        default="https://api.openai.com/v1", metadata={"help": "OpenAI-compatible endpoint; key in OPENAI_API_KEY."}
    )
    ranking_task: str | None = field(
        default=None, metadata={"help": "Write a blind task for scripts/rank_responses.py to this new file."}
    )
    rankings: str | None = field(default=None, metadata={"help": "Rankings that people made of that task."})
    report_to: str = field(default="none", metadata={"help": "Where to log.", "choices": ["none", "wandb"]})

    def __post_init__(self):
        if self.ranking_task is not None and Path(self.ranking_task).exists():
            raise UserError(f"--ranking_task {self.ranking_task} exists: choose another file.")


ARGUMENTS = (EvaluationPrompts, EvaluationArguments, LoadingArguments, RowArguments, JudgeArguments)


def read_prompts(data_args: EvaluationPrompts, format_args: RowArguments, limit: int | None) -> list[Prompt]:
    """The prompts of the dataset's test split, or of its train split where it has no other."""
    source, config, split = data_args.dataset_name, data_args.dataset_config, data_args.dataset_test_split
    rows = load_rows(source, split if has_test_split(source, split, config) else data_args.dataset_train_split, config)
    report = Report(rows.source, "prompt")
    # A repeated prompt is no further one: intervals, which draw prompts, would be too narrow.
    formatted = Formatter("prompt", **format_args.options() | {"dedup": "drop"})(rows, report)
    prompts = [Prompt(f"p{row.line}", output["prompt"], f"{row.file}:{row.line}") for row, output in formatted]
    print(report)
    return prompts[:limit]


def other_win_rates(evaluation: Evaluation, texts: dict, judge_args: JudgeArguments, rankings: dict | None) -> list:
    """By an LLM against the reference, and by people, who must have ranked some of `texts`: the first response of each
    policy to each prompt.
    """
    args, prompts = evaluation.args, evaluation.conversations
    found: list[dict] = []

    def add(a: str, b: str, judge: str, shares: np.ndarray, **more) -> None:
        known = shares[np.isfinite(shares[:, 0])]
        if known.size:
            found.append({"a": a, "b": b, "judge": judge, **win_rate(known), **more})
        else:
            print(f"{judge}: no verdict on {a} against {b}, so no win rate.")

    if judge_args.llm_judge_model is not None:
        memory = evaluation.parts.folder / "llm_verdicts.jsonl"
        judge = LLMJudge(judge_args.llm_judge_model, judge_args.llm_judge_base_url, memory)
        for name in (name for name in texts if name != args.reference):
            shares, behaviour = judge.compare(prompts, texts[name], texts[args.reference], f"{judge.model} on {name}")
            add(name, args.reference, judge.model, shares, **behaviour)
    if rankings is not None:
        for b, a in combinations(texts, 2):
            add(a, b, "people", people_outcomes(rankings, prompts, texts[a], texts[b]))
        if not any(row["judge"] == "people" for row in found):
            raise UserError(
                f"--rankings {judge_args.rankings} ranks no first responses of two policies to these prompts: give "
                "the export of what --ranking_task wrote in this --output_dir."
            )
    return found


def main():
    data_args, args, loading, format_args, judge_args = parse(ARGUMENTS)
    if world_size() > 1:
        raise UserError("Evaluation runs in one process: start it with python instead of accelerate launch.")
    for name in ("llm_judge_model", "rankings", "ranking_task"):
        if getattr(judge_args, name) is not None and len(args.paths) < 2:
            raise UserError(f"--{name} compares policies, and --policies names one: name two or more.")
    if judge_args.report_to == "wandb":
        check_wandb()
    model_args = loading.model_config()
    reward = RewardModel(args, model_args)
    prompts = read_prompts(data_args, format_args, args.num_prompts)
    fits = {"tokenizer": load_tokenizer(reward.source), "positions": reward.source.positions}
    pairs = read_pairs(judge_args.preference_datasets, format_args, data_args.dataset_test_split, **fits)
    rankings = None if judge_args.rankings is None else read_people(judge_args.rankings)
    evaluation = Evaluation(args, model_args, prompts, reward)
    measured = evaluation.measure()

    report = summarise(args, measured, evaluation.conversations, reward.unit)
    texts = {name: measured[name].first_texts for name in args.paths}
    report["win_rates"] += other_win_rates(evaluation, texts, judge_args, rankings)
    report["git_revision"] = git_revision()
    if not pairs.empty:
        report["reward_model"] = reward_model_quality(reward.pairs(pairs)) | {"trained_on": reward.trained_on(pairs)}
    write_report(report, args.output_dir)
    if judge_args.report_to == "wandb":
        log_to_wandb(report, args.output_dir)
    print(f"\n{table(report)}\n")
    print(f"Plots and samples: {args.output_dir}/report.html    Numbers: {args.output_dir}/report.json")
    if judge_args.ranking_task is not None:
        task = Path(judge_args.ranking_task)
        written = write_ranking_task(task, evaluation.conversations, texts)
        print(f"{task}: {counted(written, 'prompt')} to rank with scripts/rank_responses.py serve --samples")


if __name__ == "__main__":
    run(main)
