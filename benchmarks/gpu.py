"""Is PPO right, how fast is it, and does it fit, on the device at hand: one JSON line a question.

    python -m benchmarks.gpu [--output gpu.jsonl]     # on one H100 in less than 8 minutes
    python -m benchmarks.gpu --tiny                   # the same questions to a CPU

The model has Qwen3-0.6B's shape and vocabulary and random weights. Each line has what was `found`, what was `expected`
and whether the first is `ok` (null: nothing to compare with). The exit code is 1 where something is not, or failed.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging
from trl.kernels import ChunkedLogProbFunction

from benchmarks.turns import ROOT, rounded
from benchmarks.workload import ALONE, CHAT_TEMPLATE, LORA, turn, word_tokenizer
from recipes import ppo, reward, sft
from recipes.cli.arguments import parse
from recipes.cli.record import git_revision
from recipes.models.adapters import adapter_parameters, add_score_roles, use_role
from recipes.models.loading import never_pack
from recipes.models.merged import merged_copy
from recipes.trainers.fast.drop_finished import DropFinishedSampler, draw
from recipes.trainers.fast.frozen_head import FrozenHeadLogProbs
from recipes.trainers.memory import GIB, Setting, estimate
from recipes.trainers.ppo_config import FAST_PATHS, PPOConfig
from recipes.trainers.ppo_trainer import PPOTrainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16}
QWEN = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN |= {"num_key_value_heads": 8, "head_dim": 128}
EPOCHS = 2


@dataclass(frozen=True)
class Shape:
    """A model, and a rollout of `rows` responses in micro-batches of `micro` rows; lengths are in tokens."""

    sizes: dict
    vocabulary: int
    prompt: int
    new: int
    rows: int
    micro: int

    def config(self) -> Qwen3Config:
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        return Qwen3Config(**self.sizes, vocab_size=self.vocabulary, tie_word_embeddings=True, **ids)


FULL = Shape(QWEN, vocabulary=151936, prompt=200, new=256, rows=32, micro=8)
TINY = Shape(SMALL, vocabulary=512, prompt=8, new=4, rows=4, micro=2)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable, times: int = 1) -> float:
    """The shortest of some runs."""
    found = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


# Models


def base_model(shape: Shape, dtype: torch.dtype = torch.bfloat16, in_4bit: bool = False) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen3ForCausalLM(shape.config()).to(dtype)
    if not in_4bit:
        return model
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        options = {"dtype": dtype, "device_map": {"": DEVICE}, "quantization_config": quantization}
        return never_pack(Qwen3ForCausalLM.from_pretrained(folder, **options))


def policy_model(shape: Shape, **kwargs) -> PeftModel:
    """A policy as after SFT, its matrices B not 0, with the roles `reward` and `critic`."""
    model = get_peft_model(base_model(shape, **kwargs), LoraConfig(task_type="CAUSAL_LM", **LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    add_score_roles(model, {"reward": None, "critic": None})
    torch.nn.init.normal_(model.get_base_model().score.modules_to_save["reward"].weight, std=0.02)
    return model


def ppo_trainer(shape: Shape, model: PeftModel, folder: str, **kwargs) -> PPOTrainer:
    micro_batches = shape.rows // shape.micro
    options = {
        "per_device_train_batch_size": shape.micro,
        "steps_per_generation": micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "num_iterations": EPOCHS,
        "max_completion_length": shape.new,
        "max_steps": 2 * EPOCHS,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "use_cpu": DEVICE == "cpu",
        "bf16": True,
        "activation_checkpointing": False,
        **ALONE,
    }
    lengths = torch.linspace(shape.prompt // 2, shape.prompt, 2 * shape.rows).int().tolist()
    generator = torch.Generator().manual_seed(0)
    prompts = [turn("user", length, shape.vocabulary, generator) for length in lengths]
    return PPOTrainer(
        args=PPOConfig(folder, **(options | kwargs)),
        processing_class=word_tokenizer(shape.vocabulary, chat_template=CHAT_TEMPLATE),
        model=model,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )


# Right?


def drawing(shape: Shape) -> dict:
    """Tokens of weight 0 that are drawn, and steps back of a running sum, which would allow them."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    weights = torch.rand(64, shape.vocabulary, generator=generator, device=DEVICE) ** 8
    is_zero = torch.rand(weights.shape, generator=generator, device=DEVICE) < 0.5
    weights[is_zero] = 0
    drawn = torch.cat([draw(weights.clone()) for _ in range(1000 if shape is FULL else 2)], 1)
    zeros = is_zero.gather(1, drawn).sum().item()
    backward = (weights.cumsum(1).diff(dim=1) < 0).sum().item()
    return {"ok": zeros == 0, "drawn": drawn.numel(), "of_weight_zero": zeros, "steps_back_of_cumsum": backward}


def head(shape: Shape) -> dict:
    """Log-probabilities and gradients of TRL's fused head, which GPUs use, and of ours, which CPUs use."""
    count, hidden = (4096, 1024) if shape is FULL else (64, 64)
    torch.manual_seed(0)
    weight = (torch.randn(shape.vocabulary, hidden, device=DEVICE) * 0.02).bfloat16()
    targets = torch.randint(shape.vocabulary, (count,), device=DEVICE)
    states = torch.randn(count, hidden, device=DEVICE).bfloat16() * 3
    ways = {
        "ours": lambda x: FrozenHeadLogProbs.apply(x, weight, targets, 1.0, True)[0],
        "trl": lambda x: ChunkedLogProbFunction.apply(x, weight, None, targets, 1.0, 32768)[0],
    }
    found, logps, gradients = {}, {}, {}
    for name, way in ways.items():

        def run(name=name, way=way):
            x = states.clone().requires_grad_()
            logps[name] = way(x)
            logps[name].sum().backward()
            gradients[name] = x.grad.float()

        found[f"ms_{name}"] = 1e3 * seconds(run, times=3)
    difference = (logps["ours"] - logps["trl"]).abs().max().item()
    relative = ((gradients["ours"] - gradients["trl"]).norm() / gradients["trl"].norm()).item()
    return found | {"ok": difference < 0.05 and relative < 0.02, "logps": difference, "gradients": relative}


def copies(shape: Shape) -> dict:
    """Log-probabilities of the merged copy that samples and of the trained policy; and is the base the same?"""
    policy = policy_model(shape).eval()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    ids = torch.randint(5, shape.vocabulary, (4, shape.prompt), device=DEVICE)
    with torch.no_grad():
        expected = policy(input_ids=ids).logits.float().log_softmax(-1)
        found = merged_copy(policy, torch.bfloat16)(input_ids=ids).logits.float().log_softmax(-1)
    chosen = (found - expected).gather(2, ids[:, :, None])
    same = all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    return {"ok": same and abs(kl) < 0.01, "base_is_the_same": same, "logps_std": chosen.std().item(), "kl": kl}


def paths_in_float32(shape: Shape) -> dict:
    """Weights after two updates of a small model in float32, with all fast paths and with none."""
    small = Shape(SMALL, shape.vocabulary, prompt=8, new=8, rows=8, micro=2)
    weights = []
    for paths in ([], list(FAST_PATHS)):
        torch.manual_seed(0)
        options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "bf16": False, "max_steps": 2}
        with tempfile.TemporaryDirectory() as folder:
            model = policy_model(small, dtype=torch.float32)
            trainer = ppo_trainer(small, model, folder, fast_paths=paths, **options)
            start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            trainer._generate_single_turn = lambda ids, *_, **__: (
                [[7 + i] * (1 + i) for i, _ in enumerate(ids)],
                None,
            )
            trainer.train()
        weights.append({name: model.get_parameter(name) - value for name, value in start.items()})
    update = max(value.abs().max().item() for value in weights[0].values())
    difference = max((weights[0][name] - value).abs().max().item() for name, value in weights[1].items())
    return {"ok": difference < 1e-3 * update, "largest_difference": difference, "largest_update": update}


# Fast?


def switching(shape: Shape) -> dict:
    """Milliseconds to switch the role once, and for a micro-batch of checkpointed blocks."""
    model = policy_model(shape)

    def switch():
        with use_role(model, "critic"):
            pass

    once = 1e3 * seconds(switch, times=20)
    all_blocks = once * 2 * model.config.num_hidden_layers
    return {"ok": shape is not FULL or once < 4, "ms": once, "ms_a_micro_batch": all_blocks}


def decoding(shape: Shape) -> dict:
    """Milliseconds a step of decoding all rows: adapters or a merged copy, our loop, transformers' or its batching."""
    new = min(shape.new, 64)
    ids = torch.randint(5, 500, (shape.rows, shape.prompt), device=DEVICE)
    config = GenerationConfig(
        max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None, disable_compile=True
    )
    policy = policy_model(shape).eval()
    copied = merged_copy(policy, torch.bfloat16)
    found = {}
    for name, model in (("lora", policy.get_base_model()), ("merged", copied)):

        @torch.no_grad()
        def run(model=model):
            mask = torch.ones_like(ids)
            model.generate(input_ids=ids, attention_mask=mask, generation_config=config)

        with DropFinishedSampler().installed(model):
            found[name] = 1e3 * seconds(run, times=2) / new
        found[f"{name}_transformers"] = 1e3 * seconds(run, times=2) / new
    # By itself it takes most of the memory that is free, which on a CPU is the machine's.
    limits = {"num_blocks": 8, "page_size": 32, "max_batch_tokens": 64} if DEVICE == "cpu" else {}
    batching = ContinuousBatchingConfig(**limits)
    whole = seconds(lambda: copied.generate_batch(ids.tolist(), config, continuous_batching_config=batching))
    found["merged_continuous_batching"] = 1e3 * whole / new
    return {"ok": shape is not FULL or found["lora"] / found["merged"] > 1.3} | found


def peak_rate() -> float:
    """Products a second of one large bf16 matrix product: what this device does at best."""
    size = 8192 if DEVICE == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, times=10)


class Stopwatch:
    """Seconds of each call of methods of an object, by the methods' names."""

    def __init__(self, target, *names: str):
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            setattr(target, name, self._timed(getattr(target, name), self.seconds[name]))

    @staticmethod
    def _timed(method, found):
        def run(*args, **kwargs):
            synchronize()
            start = time.perf_counter()
            result = method(*args, **kwargs)
            synchronize()
            found.append(time.perf_counter() - start)
            return result

        return run


def training(shape: Shape, dtype=torch.bfloat16, in_4bit=False, checkpointing=False, fast_paths=FAST_PATHS) -> dict:
    """Two rollouts of PPO: numbers of the first, seconds of the second, peak memory of both."""
    config, trained = shape.config(), ("default", "critic")
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = policy_model(shape, dtype=dtype, in_4bit=in_4bit)
    options = {"activation_checkpointing": checkpointing, "fast_paths": list(fast_paths)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = ppo_trainer(shape, model, folder, **options)
        start = {role: [p.detach().clone() for p in adapter_parameters(model, role).values()] for role in trained}
        watch = Stopwatch(trainer, "_generate", "_generate_and_score_completions", "training_step")
        trainer.train()
    sample, rollout = watch.seconds["_generate"][-1], watch.seconds["_generate_and_score_completions"][-1]
    steps = watch.seconds["training_step"]
    times = {"sample": sample, "score": rollout - sample, "train": sum(steps[len(steps) // 2 :]) - rollout}

    # Products a token: 2 for each weight forward, 4 with a backward that leaves the base's weights alone.
    weights = 2 * sum(p.numel() for p in Qwen3ForCausalLM(config).parameters()) if shape is TINY else 2 * 596_049_920
    tokens = {"sample": shape.rows * shape.new}
    tokens |= {"score": shape.rows * (shape.prompt + shape.new), "train": EPOCHS * shape.rows * shape.prompt}
    tokens["train"] += EPOCHS * shape.rows * shape.new
    passes = {"sample": 1, "score": 4, "train": 4}  # score: policy, reference, critic, reward; train: two roles
    rate = peak_rate()
    share = {name: weights * passes[name] * tokens[name] / times[name] / rate for name in times}

    rows = [row for row in trainer.state.log_history if "val/ratio" in row]
    ratio, kl = rows[0]["val/ratio"], rows[0]["objective/kl"]
    ratio_std = (2 * rows[0]["policy/approxkl_avg"]) ** 0.5
    moved = {}
    for role, before in start.items():
        pairs = zip(adapter_parameters(model, role).values(), before, strict=True)
        equal = sum((now == value).sum().item() for now, value in pairs)
        moved[role] = 1 - equal / sum(value.numel() for value in before)
    setting = Setting(
        step="ppo",
        config=config,
        rows=shape.micro,
        tokens=shape.prompt + 3 + shape.new,
        response_tokens=shape.new,
        rollout_rows=shape.rows,
        merged_copy=DEVICE == "cuda" and "merged_copy" in fast_paths,
        lora=LoraConfig(task_type="CAUSAL_LM", **LORA),
        dtype=dtype,
        autocast=True,
        quantization="4bit" if in_4bit else None,
        checkpointing=checkpointing,
        on_cpu=DEVICE == "cpu",
    )
    estimated = estimate(setting).total / GIB
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else None
    right = abs(ratio - 1) < 0.005 and ratio_std < 0.03 and abs(kl) < 0.05 and min(moved.values()) > 0.99
    fits = peak is None or not fast_paths or 0.8 < peak / estimated < 1.2
    return {
        "ok": right and fits,
        "tokens_per_second": {name: tokens[name] / times[name] for name in times},
        "share_of_peak": share,
        "first_ratio": ratio,
        "first_ratio_std": ratio_std,
        "first_kl": kl,
        "share_moved": moved,
        "peak_gib": peak,
        "estimated_gib": estimated,
    }


# The recipes


def tiny_world(shape: Shape) -> dict:
    """The three recipes, a few steps each, on the tiny world."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
        rankings = Path(folder, "rankings.jsonl")
        lines = Path("recipes/tiny_world/data/demonstrations.jsonl").read_text(encoding="utf-8").splitlines()[:64]
        chats = [json.loads(line)["messages"] for line in lines]
        with rankings.open("w", encoding="utf-8") as file:
            for number, (own, other) in enumerate(zip(chats, chats[1:] + chats[:1], strict=True)):
                answers = [{"text": own[-1]["content"], "rank": 1}, {"text": other[-1]["content"], "rank": 2}]
                row = {"id": str(number), "prompt": own[:-1], "responses": answers, "annotator": "benchmark"}
                file.write(json.dumps(row) + "\n")
        from_sft = f"--model_name_or_path {folder}/sft"
        flags = {
            "sft": "",
            "reward": f"{from_sft} --dataset_name {rankings}",
            "ppo": f"{from_sft} --reward_model_name_or_path {folder}/reward",
        }
        common = (
            f"--max_steps {4 if DEVICE == 'cuda' else 2} --save_strategy no --eval_strategy no --disable_tqdm true"
        )
        if DEVICE == "cuda":
            common += " --use_cpu false --bf16 true --activation_checkpointing true"
        for name, module in {"sft": sft, "reward": reward, "ppo": ppo}.items():
            line = (
                f"--config recipes/configs/tiny_world/{name}.yaml {flags[name]} {common} --output_dir {folder}/{name}"
            )
            start = time.perf_counter()
            module.main(*parse(module.ARGUMENTS, line.split()))
            found[name] = {"seconds": time.perf_counter() - start}
            found[name]["is_whole"] = Path(folder, name, "train_config.yaml").exists()
    return {"ok": all(each["is_whole"] for each in found.values())} | found


QUESTIONS: dict[str, tuple[Callable[[Shape], dict], str]] = {
    "draw": (drawing, "of_weight_zero 0; a running sum in parallel may step back, so CUDA draws another way"),
    "head": (head, "gradients equal to 1e-2; ours several times slower than TRL's kernels on CUDA"),
    "merged copy": (copies, "the base bit for bit; kl below 0.01"),
    "fast paths in float32": (paths_in_float32, "the same update to 1e-3"),
    "use_role": (switching, "below 4 ms a switch (9 ms before the layers were kept)"),
    "decoding, ms a step": (decoding, "merged 1.4 to 1.8 times faster than lora; continuous batching faster still"),
}
PPO_RUNS = {
    "bf16, checkpointing": {"checkpointing": True},
    "bf16": {},
    "bf16, no fast paths": {"fast_paths": ()},
    "float32 base": {"dtype": torch.float32},
    "4-bit, checkpointing": {"in_4bit": True, "checkpointing": True},
}
EXPECTED_OF_PPO = (
    "first_ratio 1 ± 0.005, its std below 0.03, first_kl about 0, share_moved above 0.99, peak within 20 % of the "
    "estimate"
)


def ask(question: str, function: Callable, expected: str, shape: Shape, output, **kwargs) -> bool:
    """Print the answer as a line of JSON, an exception too; whether it is as expected."""
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # trainers print what they log
            found = function(shape, **kwargs)
    except Exception as error:  # the other questions can still be answered
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    ok = found.pop("ok")
    line = {"question": question, "ok": ok, "seconds": time.perf_counter() - start, "found": found}
    line = json.dumps(rounded(line | {"expected": expected}))
    for file in filter(None, (sys.stdout, output)):
        print(line, file=file, flush=True)
    return ok is not False


def machine(shape: Shape) -> dict:
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    rate = peak_rate() / 1e12
    return {"ok": None, "device": device, "torch": torch.__version__, "commit": git_revision(), "tflops_bf16": rate}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="A tiny model, for a CPU in less than a minute.")
    parser.add_argument("--output", help="File for the lines, beside standard output.")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    warnings.simplefilter("ignore")
    disable_progress_bars()
    logging.disable_progress_bar()
    shape = TINY if args.tiny else FULL
    with open(args.output, "w", encoding="utf-8") if args.output else contextlib.nullcontext() as output:
        answers = [ask("machine", machine, "", shape, output)]
        for question, (function, expected) in QUESTIONS.items():
            answers.append(ask(question, function, expected, shape, output))
        for name, kwargs in PPO_RUNS.items():
            answers.append(ask(f"ppo: {name}", training, EXPECTED_OF_PPO, shape, output, **kwargs))
        answers.append(ask("recipes", tiny_world, "each folder has its train_config.yaml", shape, output))
    sys.exit(0 if all(answers) else 1)


if __name__ == "__main__":
    main()
