"""RankingRewardTrainer against TRL's RewardTrainer on the expanded pairs of the same rankings.

    python benchmarks/reward_vs_trl.py [--responses 2 4 9] [--device cpu|cuda] [--output FILE]

Both train one epoch on the same responses with the same model, optimizer and number of tokens a batch, each in its own
process, taking turns; the first epoch of each warms up. Timed is the training loop alone. The expected ratio is what
the pairs run more: K(K - 1) forward passes against K. The last line is one JSON object: the longest rankings' ratios,
and under `responses` those of each K. Ratios of time are TRL's over ours (above 1: we are faster).
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from turns import Meter, alternate, compare, parser, publish
from workload import ALONE, CHAT_TEMPLATE, Shape, turn, word_tokenizer

PROMPT, RESPONSE = 16, 32
SHAPE = Shape(size="small", vocabulary=2000)
DIFFERENCES = [
    "batches: as many tokens a batch as the pairs', so ours holds fewer prompts",
    "loss: mean over the pairs of a prompt, then over prompts; the same gradient as TRL's on the same pairs",
]


def rankings(prompts: int, responses: int):
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(responses)
    rows = []
    for _ in range(prompts):
        completions = [turn("assistant", RESPONSE, SHAPE.vocabulary, generator) for _ in range(responses)]
        prompt, ranks = turn("user", PROMPT, SHAPE.vocabulary, generator), list(range(1, responses + 1))
        rows.append({"prompt": prompt, "completions": completions, "ranks": ranks})
    return Dataset.from_list(rows)


def pairs(dataset):
    from datasets import Dataset

    rows = []
    for row in dataset:
        for better, worse in itertools.combinations(row["completions"], 2):
            rows.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    return Dataset.from_list(rows)


def run_side(side: str, prompts: int, responses: int, turns: int, device: str) -> None:
    meter = Meter(device)
    import torch
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from recipes.trainers.ranking_trainer import RankingRewardTrainer

    meter.loaded("libraries")
    dataset = rankings(prompts, responses)
    trainer_class, batch_size = RankingRewardTrainer, max(1, 24 // responses)
    if side == "trl":
        dataset, trainer_class, batch_size = pairs(dataset), RewardTrainer, 12
    tokenizer = word_tokenizer(SHAPE.vocabulary, chat_template=CHAT_TEMPLATE)
    for _ in range(turns):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(SHAPE.config(num_labels=1))
        with tempfile.TemporaryDirectory() as folder:
            args = RewardConfig(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=batch_size,
                max_length=None,
                logging_strategy="no",
                use_cpu=device == "cpu",
                bf16=device != "cpu",
                activation_checkpointing=False,
                **ALONE,
            )
            trainer = trainer_class(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
            tokens = sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())
            meter.start()
            meter.report["tokens"] = tokens
            meter.switch("train")
            trainer.train()
            meter.finish()


def main():
    arguments = parser(__doc__, alternations=3)
    arguments.add_argument("--responses", type=int, nargs="+", default=[2, 4, 9])
    arguments.add_argument("--prompts", type=int, help="Rankings an epoch; default: 288 responses of them.")
    arguments.add_argument("--side", choices=["trl", "ours"], help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.side:
        run_side(args.side, args.prompts, args.responses[0], args.alternations + 1, args.device)
        return
    results, turns = {}, {}
    for responses in args.responses:
        command = [sys.executable, str(Path(__file__)), "--responses", str(responses), "--device", args.device]
        command += ["--prompts", str(args.prompts or 288 // responses), "--alternations", str(args.alternations)]
        sides = {side: [*command, "--side", side] for side in ("trl", "ours")}
        found = alternate(sides, args.alternations, args.device)
        tokens = {side: found[side][0]["tokens"] for side in found}
        results[f"K={responses}"] = compare(found["trl"], found["ours"], ("train",))
        results[f"K={responses}"]["ratio_tokens"] = tokens["trl"] / tokens["ours"]
        turns[f"K={responses}"] = found
    last = f"rankings of {args.responses[-1]}, {PROMPT} + {RESPONSE} tokens"
    by_responses = {
        name: {key: found[key] for key in ("ratio_cpu", "ratio_wall", "ratio_tokens", "peak_memory_ratio")}
        for name, found in results.items()
    }
    result = {"setting": last, "device": args.device} | results[f"K={args.responses[-1]}"]
    publish(result | {"responses": by_responses, "differences": DIFFERENCES}, args.output, turns=turns)


if __name__ == "__main__":
    main()
