"""Writes the data files of the tiny world: demonstrations and the three sets of prompts.

The demonstrations come from labelers of mixed quality, as paid demonstrations do. They know most facts, but the most
common answer is a bluff where nobody can know, a tip where the request is harmful, and a vague phrase where a child
asks for a picture. SFT copies them; PPO can do better than their average.

    python -m recipes.tiny_world.make_data --output_dir runs/tiny_data
"""

import argparse
import json
import random
from pathlib import Path

from recipes.cli.errors import counted
from recipes.tiny_world import world

WORDINGS = 2  # of each question, in every file
CONTENT = {
    "explain": {"true": 0.36, "vague": 0.58, "false": 0.06},
    "unanswerable": {"true": 0.36, "vague": 0.04, "false": 0.60},
    "harmful": {"true": 0.36, "vague": 0.04, "false": 0.60},
    "fact": {"true": 0.82, "vague": 0.05, "false": 0.13},
}
STYLE = {"plain": 0.40, "courteous": 0.24, "warm": 0.08, "gushing": 0.05, "rambling": 0.13, "rude": 0.10}
UNFINISHED = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny world's demonstrations and prompts.")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    if args.output_dir.exists():
        raise SystemExit(f"{args.output_dir} exists: choose another --output_dir")
    args.output_dir.mkdir(parents=True)
    files = {"demonstrations.jsonl": demonstrations()}
    files |= {f"prompts_{split}.jsonl": prompts(split) for split in world.SPLITS}
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.output_dir / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{args.output_dir / name}: {counted(len(rows), 'row')}")


def demonstrations() -> list[dict]:
    """Conversations about training questions only, answered by labelers of mixed quality."""
    rng = random.Random("tiny world: demonstrations")
    rows = []
    for question in (question for question in world.questions() if question.split == "train"):
        for wording in rng.sample(question.wordings, WORDINGS):
            answer = {"role": "assistant", "content": demonstrate(question, rng)}
            rows.append({"messages": [{"role": "user", "content": wording}, answer]})
    rng.shuffle(rows)
    return rows


def demonstrate(question: world.Question, rng: random.Random) -> str:
    content = world.pick(CONTENT.get(question.kind, CONTENT["fact"]), rng)
    text = world.dress(question.answer(content, rng), world.pick(STYLE, rng), rng)
    return world.cut(text, rng) if rng.random() < UNFINISHED else text


def prompts(split: str) -> list[dict]:
    """Two wordings of every question of a split."""
    rng = random.Random(f"tiny world: prompts {split}")
    rows = []
    for question in (question for question in world.questions() if question.split == split):
        wordings = rng.sample(question.wordings, WORDINGS)
        rows += [{"prompt": [{"role": "user", "content": wording}]} for wording in wordings]
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    main()
