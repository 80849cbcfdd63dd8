"""The estimate of a run's memory: against models' published sizes, a measured run, and its own command."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen3Config

from recipes.cli.errors import UserError
from recipes.trainers import memory
from recipes.trainers.memory import Setting, estimate
from scripts import estimate_memory
from tests import tiny_models as models
from tests.conftest import ROOT, run_command

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
PYTHIA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 8}
QWEN_SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN_LARGE = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
# The config.json of the bases that recipes/configs has recipes for
SHAPES = {
    "smollm2_135m": lambda: LlamaConfig(**SMOLLM2, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "qwen3_0.6b": lambda: Qwen3Config(**QWEN_SMALL, **QWEN, tie_word_embeddings=True),
    "llama_3.2_1b": lambda: LlamaConfig(**LLAMA, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "pythia_1b_tldr": lambda: GPTNeoXConfig(**PYTHIA, vocab_size=50304, tie_word_embeddings=False),
    "qwen3_8b": lambda: Qwen3Config(**QWEN_LARGE, **QWEN, tie_word_embeddings=False),
}
PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "qwen3_0.6b": 596_049_920,
    "llama_3.2_1b": 1_235_814_400,
    "pythia_1b_tldr": 1_011_781_632,
    "qwen3_8b": 8_190_735_360,
}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
PPO = Setting("ppo", models.llama_config(), rows=4, tokens=48, response_tokens=16, rollout_rows=8, lora=LORA)


@pytest.mark.parametrize("base", PARAMETERS)
def test_weights_are_those_of_the_published_models(base):
    setting = Setting("sft", SHAPES[base](), rows=1, tokens=8, dtype=torch.bfloat16)
    held = memory.held_parts(setting, *memory.build(setting))
    assert held["trained model"] == held["gradients"] == 2 * PARAMETERS[base]
    assert held["optimizer states"] == 4 * PARAMETERS[base]


@pytest.mark.slow
def test_measured_runs_take_what_was_estimated(tmp_path):
    """In a process of their own: what tests before them left behind would hide what they take."""
    names = ["reward-lora", "ppo-lora-checkpointing"]
    output = tmp_path / "memory.json"
    run_command(["python", "-m", "benchmarks.memory", "--cases", *names, "--output", output], timeout=400)
    cases = json.loads(output.read_text(encoding="utf-8"))["cases"]
    for name in names:
        assert cases[name]["estimated_gib"] == pytest.approx(cases[name]["measured_gib"], rel=0.1), name


def test_what_saves_memory_is_seen_to():
    plain = estimate(PPO)
    assert estimate(replace(PPO, rows=8)).total > plain.total
    assert estimate(replace(PPO, tokens=96)).total > plain.total
    assert estimate(replace(PPO, lora=None)).total > plain.total
    assert (
        estimate(replace(PPO, checkpointing=True)).phases["update"]["activations"]
        < (plain.phases["update"]["activations"])
    )
    more = estimate(replace(PPO, rollout_rows=64)).phases["generation"]["KV cache"]
    assert more == 8 * plain.phases["generation"]["KV cache"]


def test_what_is_held_depends_on_precision_and_optimizer():
    model, _ = memory.build(PPO)
    kinds = [None, "8bit", "4bit", "4bit nested"]
    sizes = [memory.held_parts(replace(PPO, quantization=kind), model, None)["base"] for kind in kinds]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    trained = memory.trained_parameters(model, None)
    assert memory.optimizer_bytes("adamw_torch_fused", trained) == 4 * memory.optimizer_bytes("adamw_8bit", trained)


def test_adapters_of_ppo_are_counted_by_role():
    """Four adapters and two heads of the classifier beside the zeros that PEFT keeps, of which two adapters train."""
    model, _ = memory.build(PPO)
    one = sum(p.numel() for name, p in model.named_parameters() if ".default." in name)
    heads = PPO.config.hidden_size
    held = memory.held_parts(PPO, model, None)
    assert held["adapters and heads"] == 4 * (4 * one + 2 * heads)
    assert held["gradients"] == 4 * (2 * one + heads)


@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_what_is_trained_on_a_half_precision_base_is_float32(quantization):
    half = replace(PPO, dtype=torch.bfloat16, autocast=True, quantization=quantization)
    for step in ("sft", "reward", "ppo"):
        trained = memory.trained_parameters(*memory.build(replace(half, step=step)))
        assert {parameter.dtype for parameter in trained} == {torch.float32}, step
    _, critic = memory.build(replace(half, lora=None, quantization=None))
    assert critic.score.weight.dtype == torch.float32


def test_the_merged_copy_has_its_price():
    """Of a bf16 base the matrices with adapters, of a float32 base everything at half its size."""
    base = sum(p.numel() for p in models.causal_lm(tie_word_embeddings=False).parameters())
    half = replace(PPO, autocast=True, merged_copy=True)
    found = estimate(half).phases["generation"]
    assert found["merged copy"] == 2 * base and "packed weights" not in found
    assert estimate(replace(half, dtype=torch.bfloat16)).phases["generation"]["merged copy"] == 2 * (
        base - 2 * 64 * 32 - 5 * 32
    )
    assert found["KV cache"] == estimate(replace(half, merged_copy=False)).phases["generation"]["KV cache"] // 2
    full = replace(half, lora=None, dtype=torch.bfloat16)
    assert "merged copy" not in estimate(full).phases["generation"]


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"trainable_token_indices": [1, 2]}], ids=str)
def test_other_adapters_are_counted_and_dora_is_sampled_without_a_copy(kind):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **kind)
    tied = models.llama_config(tie_word_embeddings=True)
    found = estimate(replace(PPO, config=tied, lora=lora, merged_copy=True))
    assert ("merged copy" in found.phases["generation"]) is ("use_dora" not in kind)


def test_scoring_has_rows_of_its_own():
    more = estimate(replace(PPO, scoring_rows=4 * PPO.rows))
    assert sum(more.phases["scoring"].values()) > sum(estimate(PPO).phases["scoring"].values())
    assert more.phases["update"] == estimate(PPO).phases["update"]


def test_experts_are_counted_where_they_run_without_data_and_else_refused_in_one_line():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
    setting = Setting("sft", config, rows=1, tokens=16, dtype=torch.bfloat16)
    assert estimate(setting).held["trained model"] > 2 * 2 * 4 * 3 * 32 * 64
    with pytest.raises(UserError, match="mixtral in float32 cannot be run without data"):
        estimate(replace(setting, dtype=torch.float32))


def test_an_adapter_without_a_place_is_said():
    with pytest.raises(UserError, match="llama in float32 cannot be built: Target modules .*nowhere"):
        estimate(replace(PPO, lora=LoraConfig(target_modules=["nowhere"], task_type="CAUSAL_LM")))


# The command


def command(monkeypatch, capsys, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["estimate_memory.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        estimate_memory.run(estimate_memory.main)
    captured = capsys.readouterr()
    return end.value.code, captured.out + captured.err


def test_the_command_says_whether_it_fits(monkeypatch, capsys, tmp_path):
    models.llama_config().save_pretrained(tmp_path)
    line = ["ppo", "--model_name_or_path", tmp_path, "--use_peft", "true", "--lora_target_modules", "all-linear"]
    line += ["--max_completion_length", 64, "--prompt_tokens", 64, "--per_device_train_batch_size", 4]
    code, output = command(monkeypatch, capsys, *line, "--gpu_memory_gb", 8)
    assert (
        code == 0 and output.strip().splitlines()[-1].startswith("fits: ") and output.rstrip().endswith(" of 8.0 GiB")
    )
    assert "merged copy" in output
    code, output = command(monkeypatch, capsys, *line, "--gpu_memory_gb", 0.0001)
    assert "merged copy" not in output  # PPO makes it only where it fits
    assert code == 1 and output.strip().splitlines()[-1].startswith("does not fit: ")


@pytest.mark.slow
@pytest.mark.parametrize("base", SHAPES)
def test_the_page_of_a_config_has_the_estimates(base, monkeypatch, capsys, tmp_path):
    """Each for the number of processes in its launch line, and rankings of four where the data has them."""
    SHAPES[base]().save_pretrained(tmp_path / "base")
    page = (ROOT / "recipes" / "configs" / base / "README.md").read_text(encoding="utf-8")
    processes = re.search(r"--num_processes (\d+)", page)
    largest = {}
    for step in estimate_memory.STEPS:
        config = (ROOT / "recipes" / "configs" / base / f"{step}.yaml").read_text(encoding="utf-8")
        (tmp_path / f"{step}.yaml").write_text(
            re.sub(r"^model_name_or_path: \S+", f"model_name_or_path: {tmp_path / 'base'}", config, flags=re.M)
        )
        line = [f"--config={tmp_path}/{step}.yaml", "--gpu_memory_gb", 80]
        line += ["--num_processes", processes[1] if processes else 1]
        line += ["--responses_per_prompt", 4 if "UltraFeedback" in config else 2]
        code, output = command(monkeypatch, capsys, *line)
        needed = re.search(r"fits: ([\d.]+) of", output)[1]
        assert f"| {step} | {needed} GiB |" in page, f"{base}/README.md, {step}: {needed} GiB"
        largest[float(needed)] = f"{step}, {needed} GiB |"
    (row,) = (
        line for line in (ROOT / "recipes" / "configs" / "README.md").read_text().splitlines() if f"[{base}]" in line
    )
    assert row.endswith(largest[max(largest)])


def test_the_base_and_its_adapter_come_from_the_config_beside_or_the_folder(monkeypatch, capsys, tmp_path):
    models.llama_config().save_pretrained(tmp_path / "base")
    (tmp_path / "sft.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'base'}\nuse_peft: true\nlora_r: 3\nlora_target_modules: all-linear\n"
    )
    (tmp_path / "ppo.yaml").write_text("use_peft: true\n")
    model_args = estimate_memory.ModelConfig(use_peft=True)
    found = estimate_memory.add_base(model_args, "ppo", str(tmp_path / "ppo.yaml"))
    assert (found.model_name_or_path, found.lora_r) == (str(tmp_path / "base"), 3)
    LoraConfig(r=5, base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "sft")
    line = ["sft", "--model_name_or_path", tmp_path / "sft", "--use_peft", "true", "--gpu_memory_gb", 8]
    assert "LoRA of rank 5" in command(monkeypatch, capsys, *line)[1]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["sft"], "--model_name_or_path is required"),
        (["dpo"], "begin with sft, reward, ppo"),
        (["sft", "--model_name_or_path", "/nowhere/at-all"], "there is no folder /nowhere/at-all"),
        (["sft", "--gpu_memory", "8"], "unrecognized arguments: --gpu_memory 8"),
    ],
)
def test_mistakes_are_one_line(words, problem, monkeypatch, capsys):
    code, output = command(monkeypatch, capsys, *words)
    assert code == 1 and problem in output and output.count("\n") == 1
