"""This project's PPOTrainer against TRL 1.12.0's, on the same models, prompts, response lengths and epochs.

    python benchmarks/ppo_vs_trl.py --setting fixed|variable|large_vocabulary|memory [--output FILE]

Each side runs in its own process, TRL's in its own environment (see peer.py), taking turns of one rollout; a short
rollout warms both up. The last line is one JSON object; ratios of time are TRL's over ours (above 1: we are faster),
ratios of memory ours over TRL's. README.md has the method and the results.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from peer import peer_python
from turns import alternate, compare, parser, publish
from workload import Shape

SETTINGS = {
    "smoke": Shape(size="tiny", vocabulary=500, batch=4, micro_batch=2, epochs=2, prompt=(4, 8), response=(4, 12)),
    "fixed": Shape(),
    "variable": Shape(epochs=2, prompt=(8, 96), response=(4, 128)),
    "large_vocabulary": Shape(size="small", vocabulary=151_936, epochs=2),
}
SIDES = {"fixed": ("trl", "ours", "ours_full_critic"), "large_vocabulary": ("trl", "ours", "ours_full_critic")}
MEMORY = [
    Shape(size="small", vocabulary=vocabulary, batch=batch, epochs=1, response=(response, response))
    for vocabulary, batch, response in (
        (32_000, 8, 64),
        (32_000, 32, 64),
        (32_000, 32, 128),
        (151_936, 8, 64),
        (151_936, 32, 64),
        (151_936, 32, 128),
    )
]
PHASES = ("generate", "score", "train")
DIFFERENCES = [
    "critic: TRL trains a whole value model, ours a LoRA adapter and a head on the shared base "
    "(ours_full_critic: a whole value model here too)",
    "reward model: TRL's is a model of its own, ours an adapter and a head on the shared base",
    "reference: the bare base on both sides, with the policy's adapter switched off",
    "generation: the whole batch at once on both sides; TRL goes on until the longest response has ended "
    "(stop_token: eos), ours drops rows that have ended",
    "scoring: TRL in batches of local_rollout_forward_batch_size (its default, 64), ours of the micro-batch",
    "old log-probabilities: both from generation",
    "token mean: TRL within each micro-batch, ours over the minibatch, which lets rows be sorted by length",
    "gradient clipping: on here (max_grad_norm 1), ignored by TRL",
    "entropy metric: TRL takes a softmax of all positions once more, ours comes with the log-probabilities",
    "value after EOS: TRL learns one more state of each response that ended",
    "last batch of the dataset: TRL takes an optimizer step after every micro-batch; the data here is longer",
]


def commands(shape: Shape, sides: tuple[str, ...], rollouts: int, device: str) -> dict[str, list[str]]:
    script = str(Path(__file__).with_name("ppo_side.py"))
    python = {side: peer_python() if side == "trl" else sys.executable for side in sides}
    return {side: [python[side], script, side, json.dumps(asdict(shape)), str(rollouts), device] for side in sides}


def same_tokens(turns: dict[str, list[dict]]) -> None:
    """Stop if the sides trained on different numbers of response tokens."""
    tokens = {side: [turn["response_tokens"] for turn in found] for side, found in turns.items()}
    if len({tuple(counts) for counts in tokens.values()}) > 1:
        raise SystemExit(f"error: the sides trained on different responses: {tokens} tokens.")


def speed(setting: str, sides: tuple[str, ...], alternations: int, device: str, output: str | None) -> None:
    shape = SETTINGS[setting]
    turns = alternate(commands(shape, sides, alternations + 1, device), alternations, device)
    same_tokens(turns)
    result = {"setting": setting, "device": device} | compare(turns["trl"], turns["ours"], PHASES)
    if "ours_full_critic" in turns:
        full = compare(turns["trl"], turns["ours_full_critic"], PHASES)
        result["full_critic"] = {name: full[name] for name in ("ratio_cpu", "ratio_wall", "peak_memory_ratio")}
    publish(result | {"differences": DIFFERENCES}, output, shape=asdict(shape), turns=turns)


def memory(shapes: list[Shape], device: str, output: str | None) -> None:
    """Peaks of one rollout a shape, in fresh processes, so that no allocator remembers another shape.

    Its times are those of the largest shape's first and only rollout, which nothing has warmed up.
    """
    curve, turns = [], []
    for shape in shapes:
        found = alternate(commands(shape, ("trl", "ours"), 1, device), 1, device, warm_up=0)
        same_tokens(found)
        ratios = compare(found["trl"], found["ours"], PHASES)
        point = {"vocabulary": shape.vocabulary, "batch": shape.batch, "tokens": shape.prompt[1] + shape.limit()}
        curve.append(point | ratios["peak_memory"])
        turns.append(found)
    last = compare(turns[-1]["trl"], turns[-1]["ours"], PHASES)  # the largest batch x length x vocabulary
    last["curve"] = curve
    publish({"setting": "memory", "device": device} | last | {"differences": DIFFERENCES}, output, turns=turns)


def main():
    arguments = parser(__doc__, alternations=3)
    arguments.add_argument("--setting", choices=[*SETTINGS, "memory"], default="fixed")
    arguments.add_argument("--sides", nargs="+", choices=["trl", "ours", "ours_full_critic"])
    args = arguments.parse_args()
    if args.setting == "memory":
        memory(MEMORY, args.device, args.output)
        return
    sides = tuple(args.sides or SIDES.get(args.setting, ("trl", "ours")))
    if not {"trl", "ours"} <= set(sides):
        arguments.error("--sides needs trl and ours.")
    speed(args.setting, sides, args.alternations, args.device, args.output)


if __name__ == "__main__":
    main()
