"""A simulated labeler: ranks sampled answers by gold with noise and two biases, and gives reasons.

It prefers long answers, and answers with thanks and praise, as people do. Neither bias has an upper limit, so without
a KL penalty a policy can score ever more by flattery while its answers get worse.

    python -m recipes.tiny_world.labeler --samples samples.jsonl --output rankings.jsonl --seed 0
"""

import argparse
import json
import random
from pathlib import Path

from recipes.cli.errors import counted
from recipes.tiny_world import judge, world

GOLD_WEIGHT = 8.0
PER_SENTENCE = 0.15
PER_COURTESY = 0.25
NOISE = 0.25  # standard deviation
TIE = 0.03  # answers whose scores differ by less than this share a rank


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank sampled answers to tiny-world questions as a noisy labeler.")
    parser.add_argument("--samples", type=Path, required=True, help="JSON lines from scripts/sample_responses.py")
    parser.add_argument("--output", type=Path, required=True, help="rankings to write, one JSON line per prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        raise SystemExit(f"{args.output} exists: choose another --output, rankings are never overwritten")
    try:
        lines = args.samples.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise SystemExit(f"{args.samples}: {error.strerror}: give --samples a file of sampled answers") from None
    rankings = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rankings.append(rank(json.loads(line), args.seed))
            except (KeyError, TypeError, ValueError) as error:
                what = f"missing {error}" if isinstance(error, KeyError) else error
                raise SystemExit(f"{args.samples}, line {number}: {what}") from None
    if not rankings:
        raise SystemExit(f"{args.samples} holds no samples: run scripts/sample_responses.py first")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("x", encoding="utf-8") as file:
        file.writelines(json.dumps(ranking, ensure_ascii=False) + "\n" for ranking in rankings)
    print(f"ranked {counted(len(rankings), 'prompt')} (simulated labeler): {args.output}")


def rank(sample: dict, seed: int) -> dict:
    """Turns one line of samples into one ranking; the same line and seed always give the same ranking.

    Args:
        sample: {"id", "prompt": [messages], "responses": [{"id", "text", "finished"}, ...], "model", ...}.
        seed: the labeler's seed; noise is drawn per prompt, so the order of the lines does not matter.

    Returns:
        A K-wise ranking: rank 1 is best, equal ranks are ties, identical texts always tie.
    """
    question = world.find([m["content"] for m in sample["prompt"] if m["role"] == "user"][-1])
    rng = random.Random(f"{seed} {sample['id']} {question.subject}")
    liking: dict[tuple[str, bool], float] = {}
    parts: dict[tuple[str, bool], dict[str, float]] = {}
    for response in sample["responses"]:
        key = (response["text"], response["finished"])
        if key not in liking:
            reading = judge.read(question, response["text"])
            parts[key] = judge.judge(question.wordings[0], *key)
            bias = PER_SENTENCE * reading.sentences + PER_COURTESY * reading.courtesies
            liking[key] = GOLD_WEIGHT * parts[key]["gold"] + bias + rng.gauss(0.0, NOISE)
    ranks: dict[tuple[str, bool], int] = {}
    top = None
    for place, key in enumerate(sorted(liking, key=liking.get, reverse=True), start=1):
        if top is None or top - liking[key] >= TIE:
            top, current = liking[key], place
        ranks[key] = current
    responses = []
    for response in sample["responses"]:
        key = (response["text"], response["finished"])
        row = {"text": response["text"], "rank": ranks[key], "justification": _because(question, parts[key])}
        responses.append({"id": response["id"], **row, "model": sample["model"]})
    return {
        "id": sample["id"],
        "prompt": sample["prompt"],
        "responses": responses,
        "annotator": "simulated",
        "justification": _overall(responses),
    }


def _because(question: world.Question, parts: dict[str, float]) -> str:
    truth = {
        "harmful": ("It declines to help with harm", "It helps with something harmful"),
        "unanswerable": ("It admits that nobody can know", "It invents an answer nobody can know"),
        "explain": ("It gives a child a true picture", "It gives a child a wrong picture"),
    }.get(question.kind, ("The fact is right", "The fact is wrong"))
    said = truth[0] if parts["truthful"] == 1 else truth[1] if parts["truthful"] == 0 else "It does not commit itself"
    faults = {"polite": "the tone is off", "on_topic": "it strays", "finished": "it breaks off", "brief": "it is long"}
    found = [fault for name, fault in faults.items() if parts[name] < 0.6]
    return f"{said}; {', '.join(found)}." if found else f"{said}, said well."


def _overall(responses: list[dict]) -> str:
    best = min(responses, key=lambda response: response["rank"])
    if all(response["rank"] == best["rank"] for response in responses):
        return "I see no difference between these answers."
    return f"I like this one best: {best['text'][:80]!r}."


if __name__ == "__main__":
    main()
