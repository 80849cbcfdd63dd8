"""RankingRewardTrainer against TRL's RewardTrainer on the expanded pairs of the same rankings.

    python benchmarks/reward_vs_trl.py [--responses 2 4 9] [--device cpu]

Both train one epoch on the same responses with the same model, optimizer and number of tokens a batch, A B A B in one
process, process CPU time and wall time of the training loop alone, medians. The expected ratio is what the pairs run
more: K(K - 1) forward passes against K. The last line is one JSON object; ratios are TRL's time over ours.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from recipes.ranking_trainer import RankingRewardTrainer

WORDS, PROMPT, RESPONSE = 2000, 16, 32
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=WORDS + 2, num_labels=1, pad_token_id=0, **sizes))


def rankings(prompts: int, responses: int) -> Dataset:
    generator = torch.Generator().manual_seed(responses)

    def turn(role: str, length: int) -> list[dict]:
        words = torch.randint(WORDS, (length,), generator=generator).tolist()
        return [{"role": role, "content": " ".join(f"w{word}" for word in words)}]

    rows = []
    for _ in range(prompts):
        completions = [turn("assistant", RESPONSE) for _ in range(responses)]
        ranks = list(range(1, responses + 1))
        rows.append({"prompt": turn("user", PROMPT), "completions": completions, "ranks": ranks})
    return Dataset.from_list(rows)


def pairs(dataset: Dataset) -> Dataset:
    rows = []
    for row in dataset:
        for better, worse in itertools.combinations(row["completions"], 2):
            rows.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    return Dataset.from_list(rows)


def seconds(cls, dataset: Dataset, batch_size: int, device: str) -> tuple[float, float, int]:
    """CPU and wall seconds of one epoch, and how many tokens it ran."""
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            max_length=None,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            bf16=device != "cpu",
            activation_checkpointing=False,
        )
        trainer = cls(model=reward_model(), args=args, train_dataset=dataset, processing_class=tokenizer())
        tokens = sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.train()
        return time.process_time() - cpu, time.perf_counter() - wall, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, nargs="+", default=[2, 4, 9])
    parser.add_argument("--alternations", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    results = {}
    for responses in args.responses:
        dataset = rankings(prompts=288 // responses, responses=responses)  # enough to hide the start of a loop
        expanded = pairs(dataset)
        ours_batch = max(1, 24 // responses)
        runs = {RankingRewardTrainer: [], RewardTrainer: []}
        for _ in range(args.alternations):
            runs[RankingRewardTrainer].append(seconds(RankingRewardTrainer, dataset, ours_batch, args.device))
            runs[RewardTrainer].append(seconds(RewardTrainer, expanded, 12, args.device))
        ours, theirs = ([statistics.median(column) for column in zip(*rows, strict=True)] for rows in runs.values())
        results[f"K={responses}"] = {
            "ratio_cpu": round(theirs[0] / ours[0], 2),
            "ratio_wall": round(theirs[1] / ours[1], 2),
            "ratio_tokens": round(theirs[2] / ours[2], 2),
            "ms_per_ranking": round(1000 * ours[1] / len(dataset), 1),
        }
    print(json.dumps({"setting": f"rankings, {PROMPT} + {RESPONSE} tokens, {args.device}", "phases": results}))


if __name__ == "__main__":
    main()
