"""The estimates of recipes/trainers/memory.py against the peaks of real runs.

    python benchmarks/memory.py [--cases NAME …] [--output benchmarks/results/memory.json]

Each case trains a Llama of 5M to 42M parameters for two steps with the trainer of its recipe on a CPU. Measured is the
largest resident memory of the process (VmHWM of Linux) over what was resident before the model was built. On a CPU the
LM head and the allocator differ from a GPU's; what is the same is what the model, the adapters, autocast, activation
checkpointing and the trainers hold.
"""

import argparse
import ctypes
import gc
import json
import tempfile
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from trl import ModelConfig, RewardConfig, SFTConfig, SFTTrainer, get_peft_config

from recipes.models.adapters import add_score_roles, seq_cls_config
from recipes.trainers.memory import GIB, Setting, estimate
from recipes.trainers.ppo_trainer import PPOConfig, PPOTrainer
from recipes.trainers.ranking_trainer import RankingRewardTrainer

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
SIZES = {
    "5M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "42M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
}


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
        sizes = SIZES[self.size] | {"tie_word_embeddings": True, "max_position_embeddings": 2048}
        return LlamaConfig(vocab_size=self.vocabulary, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)

    def peft_config(self):
        arguments = ModelConfig(use_peft=self.peft, lora_r=16, lora_target_modules="all-linear", lora_dropout=0.0)
        return get_peft_config(arguments)

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
    "ppo-lora-vocabulary": Case("ppo", size="5M", vocabulary=128_000, rows=2, response=32),
    "ppo-full": Case("ppo", size="5M", response=64, peft=False),
}
WARM_UP = Case("sft", size="5M", vocabulary=2000, rows=2, prompt=8, response=8)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    names = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    words = Tokenizer(models.WordLevel(names, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


def turn(role: str, words: int, seed: int) -> list[dict]:
    ids = torch.randint(2, 2000, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"role": role, "content": " ".join(f"w{i}" for i in ids)}]


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
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    count = 2 * case.rows * steps
    prompts = [turn("user", case.prompt, seed) for seed in range(count)]
    answers = [turn("assistant", case.response, -1 - seed) for seed in range(count)]
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


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, what is resident now, or VmHWM, the most since `forget_peak`."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def forget_peak() -> None:
    libc = ctypes.CDLL("libc.so.6")
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: else glibc keeps tensors that were freed
        libc.mallopt(parameter, 65536)
    gc.collect()
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def measure(case: Case) -> int:
    """Bytes that two steps of `case` take at their peak, model and optimizer included."""
    torch.manual_seed(0)
    words = tokenizer(case.vocabulary)  # a large vocabulary takes more than a small model
    with tempfile.TemporaryDirectory() as folder:
        forget_peak()
        before = resident("VmRSS")
        trainer = trainer_of(case, words, folder)
        forget_peak()  # a model whose head is tied is built with two of them
        trainer.train()
        return resident("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--output", help="JSON file for the results.")
    args = parser.parse_args()
    for step in ("sft", "reward", "ppo"):
        measure(replace(WARM_UP, step=step))  # imports, threads, caches
    results = {}
    for name in args.cases:
        expected, measured = estimate(CASES[name].setting()).total, measure(CASES[name])
        error = expected / measured - 1
        results[name] = {
            "estimated_gib": round(expected / GIB, 3),
            "measured_gib": round(measured / GIB, 3),
            "error": round(error, 3),
        }
        print(
            f"{name:26} estimated {expected / GIB:6.3f}  measured {measured / GIB:6.3f} GiB  {error:+.1%}", flush=True
        )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"setting": "Llama on a CPU, two steps, VmHWM", "cases": results}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
