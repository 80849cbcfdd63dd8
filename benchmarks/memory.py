"""The estimates of recipes/trainers/memory.py against the peaks of real runs.

    python -m benchmarks.memory [--cases NAME …] [--output benchmarks/results/memory.json]

Each case trains a Llama of 5M to 42M parameters for two steps with the trainer of its recipe on a CPU. Measured is the
largest resident memory of the process (VmHWM of Linux) over what was resident before the model was built. On a CPU the
LM head and the allocator differ from a GPU's; what is the same is what the model, the adapters, autocast, activation
checkpointing and the trainers hold.
"""

import argparse
import ctypes
import json
import tempfile
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from trl import RewardConfig, SFTConfig, SFTTrainer

from benchmarks.turns import forget_peak, resident, rounded
from benchmarks.workload import ALONE, CHAT_TEMPLATE, LORA, Shape, turn, word_tokenizer
from recipes.models.adapters import add_score_roles, seq_cls_config
from recipes.trainers.memory import GIB, Setting, estimate
from recipes.trainers.ppo_trainer import PPOConfig, PPOTrainer
from recipes.trainers.ranking_trainer import RankingRewardTrainer


@dataclass(frozen=True)
class Case:
    """One run: `rows` sequences of `prompt + response` tokens a micro-batch."""

    step: str
    size: str = "42M"
    vocabulary: int = 32000
    rows: int = 8
    prompt: int = 64
    response: int = 192
    rollout: int = 1  # micro-batches a rollout
    peft: bool = True
    bf16: bool = False
    checkpointing: bool = False
    accumulation: int = 1

    def config(self) -> LlamaConfig:
        return Shape(size=self.size, vocabulary=self.vocabulary).config()

    def peft_config(self) -> LoraConfig | None:
        return LoraConfig(task_type="CAUSAL_LM", **LORA) if self.peft else None

    def setting(self) -> Setting:
        return Setting(
            step=self.step,
            config=self.config(),
            rows=self.rows,
            tokens=self.prompt + self.response,
            response_tokens=self.response if self.step == "ppo" else 0,
            rollout_rows=self.rows * self.rollout if self.step == "ppo" else 0,
            lora=self.peft_config(),
            dtype=torch.bfloat16 if self.bf16 and self.peft else torch.float32,
            autocast=self.bf16,
            checkpointing=self.checkpointing,
            accumulates=self.accumulation > 1,
            on_cpu=True,
        )


CASES = {
    "sft-lora": Case("sft"),
    "sft-lora-accumulated": Case("sft", rows=2, accumulation=4),
    "sft-full": Case("sft", peft=False),
    "sft-lora-checkpointing": Case("sft", checkpointing=True),
    "sft-lora-bf16": Case("sft", rows=4, bf16=True),
    "reward-lora": Case("reward", rows=8),
    "reward-full-checkpointing": Case("reward", peft=False, checkpointing=True),
    "ppo-lora": Case("ppo", rollout=2),
    "ppo-lora-long": Case("ppo", rows=2, prompt=256, response=512, rollout=4),
    "ppo-lora-checkpointing": Case("ppo", rows=4, response=64, checkpointing=True),
    "ppo-lora-vocabulary": Case("ppo", size="small", vocabulary=128_000, rows=2, response=32),
    "ppo-full": Case("ppo", size="small", response=64, peft=False),
}
WARM_UP = Case("sft", size="small", vocabulary=2000, rows=2, prompt=8, response=8)


def trainer_of(case: Case, words: PreTrainedTokenizerFast, folder: str):
    """The recipe's trainer on data of exactly the case's lengths."""
    steps = case.rollout if case.step == "ppo" else case.accumulation
    common = {
        "output_dir": folder,
        "max_steps": 2,
        "per_device_train_batch_size": case.rows // 2 if case.step == "reward" else case.rows,
        "gradient_accumulation_steps": 1 if case.step == "ppo" else steps,
        "use_cpu": True,
        "bf16": case.bf16,
        "gradient_checkpointing": case.checkpointing,
        "logging_steps": 1,
        **ALONE,
    }
    count = 2 * case.rows * steps
    generator = torch.Generator().manual_seed(0)
    prompts = [turn("user", case.prompt, case.vocabulary, generator) for _ in range(count)]
    answers = [turn("assistant", case.response, case.vocabulary, generator) for _ in range(count)]
    config, setting = case.config(), case.setting()
    if case.step == "reward":
        ranked = zip(prompts[::2], answers[::2], answers[1::2], strict=True)
        rows = [{"prompt": p, "completions": [a, b], "ranks": [1.0, 2.0]} for p, a, b in ranked]
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=setting.dtype)
        if case.peft:
            model = get_peft_model(model, seq_cls_config(case.peft_config()))
        return RankingRewardTrainer(
            model=model,
            args=RewardConfig(max_length=None, **common),
            train_dataset=Dataset.from_list(rows),
            processing_class=words,
        )
    model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
    if case.peft:
        model = get_peft_model(model, case.peft_config())
    if case.step == "sft":
        rows = [{"messages": prompt + answer} for prompt, answer in zip(prompts, answers, strict=True)]
        args = SFTConfig(max_length=case.prompt + case.response, **common)
        return SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=words)
    models = {}
    if case.peft:
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.01)  # a trained adapter, which PPO keeps a copy of
        add_score_roles(model, {"reward": None, "critic": None})
    else:
        config.num_labels = 1
        for name in ("reward_model", "value_model"):
            models[name] = AutoModelForSequenceClassification.from_config(config, dtype=setting.dtype)
    args = PPOConfig(
        max_completion_length=case.response,
        steps_per_generation=case.rollout,
        num_iterations=1,
        **common,
    )
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = PPOTrainer(args=args, processing_class=words, model=model, train_dataset=dataset, **models)
    trainer.generation_config.min_new_tokens = case.response  # as an argument it would be another decoding loop
    return trainer


def measure(case: Case) -> int:
    """Bytes that two steps of `case` take at their peak, model and optimizer included."""
    torch.manual_seed(0)
    # Before what is measured: a large vocabulary takes more than a small model.
    words = word_tokenizer(case.vocabulary, chat_template=CHAT_TEMPLATE)
    with tempfile.TemporaryDirectory() as folder:
        before = forget_peak()
        trainer = trainer_of(case, words, folder)
        forget_peak()  # a model whose head is tied is built with two of them
        trainer.train()
        return resident("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--output", help="JSON file for the results.")
    args = parser.parse_args()
    for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: else glibc keeps tensors that were freed
        ctypes.CDLL("libc.so.6").mallopt(setting, 65536)
    for step in ("sft", "reward", "ppo"):
        measure(replace(WARM_UP, step=step))  # imports, threads, caches
    results = {}
    for name in args.cases:
        expected, measured = estimate(CASES[name].setting()).total, measure(CASES[name])
        error = expected / measured - 1
        results[name] = {"estimated_gib": expected / GIB, "measured_gib": measured / GIB, "error": error}
        print(
            f"{name:26} estimated {expected / GIB:6.3f}  measured {measured / GIB:6.3f} GiB  {error:+.1%}", flush=True
        )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"setting": "Llama on a CPU, two steps, VmHWM", "cases": rounded(results)}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
