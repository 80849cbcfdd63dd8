"""Writes benchmarks/results/real_model.json from a finished run, and docs/real_model.md from that file alone."""

import json
import shlex
from pathlib import Path

import yaml

from benchmarks.turns import environment, rounded
from recipes.evaluation.report import render
from recipes.tiny_world.quickstart import ROOT, Quickstart

RESULT = ROOT / "benchmarks" / "results" / "real_model.json"
PAGE = ROOT / "docs" / "real_model.md"
CURVE = {"objective/scores": "reward", "objective/kl": "kl", "completions/mean_length": "length"}


def read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def curve(folder: Path) -> list[dict]:
    """What each rollout of a PPO run logged: score with penalties, KL in nats and length in tokens, before updates."""
    rows = read(folder / "trainer_state.json")["log_history"]
    return [{short: row[name] for name, short in CURVE.items()} for row in rows if "objective/kl" in row]


def gather(state: Quickstart) -> dict:
    """What a run found; parts that it has not reached are `None`."""
    folder = state.folder
    report = read(folder / "evaluation" / "report.json")
    kept = ("policies", "win_rates", "frontier", "over_optimization", "reward_model", "n_prompts")
    runs = [name for name in state.seconds if name.startswith("ppo")]
    records = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*/train_config.yaml")]
    rows = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("data/*.jsonl")}
    return {
        **environment(),
        "commits": sorted({record["git_revision"] for record in records}),
        "rows": rows,
        "minutes": {name: seconds / 60 for name, seconds in state.seconds.items()},
        "commands": {name: shlex.join(words) for name, words in state.commands.items()},
        "evaluation": report and {name: report[name] for name in kept},
        "accuracy": read(folder / "accuracy.json"),
        "tax": read(folder / "tax.json"),
        "samples": read(folder / "samples.json"),
        "curves": {name: curve(folder / name) for name in runs},
    }


def publish(state: Quickstart, *local: str) -> None:
    """Write both files; `local` paths stand in them by their last part, the run's folder as runs/real."""
    result = json.dumps(rounded(gather(state), 4), indent=1, ensure_ascii=False)
    for path in local:
        result = result.replace(path, Path(path).name) if Path(path).is_file() else result
    RESULT.write_text(result.replace(str(state.folder), "runs/real") + "\n", encoding="utf-8")
    write_page()
    print(f"{RESULT}\n{PAGE}")


def write_page() -> None:
    page = render(Path(__file__).with_name("page.md.jinja"), result=read(RESULT))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_page()
