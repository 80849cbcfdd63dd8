"""The benchmarks' commands on tiny shapes: they run, compare like with like, and end with one JSON object."""

import importlib.util
import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from tests.conftest import ROOT, run_command

BENCHMARKS = ROOT / "benchmarks"
KEYS = {"setting", "ratio_cpu", "ratio_wall", "peak_memory_ratio", "phases"}


def benchmark(name: str, *args) -> dict:
    output = run_command([sys.executable, BENCHMARKS / name, *args, "--alternations", 1], timeout=400).stdout
    return json.loads(output.splitlines()[-1])


@pytest.fixture
def module(monkeypatch):
    """A benchmark as a module; the folder of scripts is on the path, as it is when one runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return load


@pytest.mark.slow
def test_ppo_against_the_floor():
    """It runs our side of the PPO benchmark; a share of the floor is above 0 and below 1."""
    result = benchmark("floor.py", "--setting", "smoke")
    assert KEYS <= result.keys()
    assert set(result["phases"]) == {"generate", "score", "train"}
    for share in (result["ratio_cpu"], *(phase["ratio_cpu"] for phase in result["phases"].values())):
        assert 0 <= share < 1
    assert result["gflop_per_second"]["cpu"] > 0.1


@pytest.mark.slow
def test_the_questions_to_a_gpu_are_answered_by_a_cpu(tmp_path):
    output = tmp_path / "gpu.jsonl"
    run_command([sys.executable, "-m", "benchmarks.gpu", "--tiny", "--output", output], timeout=400)
    answers = {row["question"]: row for row in map(json.loads, output.read_text(encoding="utf-8").splitlines())}
    questions = ["draw", "head", "merged copy", "fast paths in float32", "use_role", "decoding, ms a step", "recipes"]
    questions += ["ppo: bf16", "ppo: float32 base", "ppo: 4-bit, checkpointing"]
    assert {*questions} < answers.keys()
    assert all(answers[question]["ok"] is True and answers[question]["expected"] for question in questions)
    assert answers["merged copy"]["found"]["base_is_the_same"] is True
    found = answers["ppo: bf16"]["found"]
    assert {"sample", "score", "train"} == found["tokens_per_second"].keys() == found["share_of_peak"].keys()
    assert found["estimated_gib"] > 0


@pytest.mark.slow
def test_ppo_against_trl(tmp_path):
    """Both sides train on the same responses (the command stops if not), and the file keeps every turn."""
    if not (BENCHMARKS / ".venv").exists():
        pytest.skip("the peer's environment is made by benchmarks/ppo_vs_trl.py")
    output = tmp_path / "result.json"
    result = benchmark("ppo_vs_trl.py", "--setting", "smoke", "--output", output)
    assert KEYS <= result.keys() and result["differences"]
    saved = json.loads(output.read_text())
    assert saved["result"] == result and len(saved["commit"]) >= 40
    (ours,), (peer,) = saved["turns"]["ours"], saved["turns"]["trl"]
    assert ours["response_tokens"] == peer["response_tokens"] == 4 + 7 + 9 + 12
    for turn in (ours, peer):
        assert all(turn["cpu"][phase] > 0 for phase in ("generate", "score", "train"))
        assert turn["memory"]["peak"] > turn["memory"]["models"] > turn["memory"]["libraries"]
    assert result["ratio_cpu"] == pytest.approx(sum(peer["cpu"].values()) / sum(ours["cpu"].values()), rel=0.02)


@pytest.mark.slow
def test_sft_against_trl():
    """Both scripts train on the same number of tokens (the command stops if not)."""
    result = benchmark("sft_vs_trl.py", "--size", "tiny", "--rows", 32)
    assert KEYS <= result.keys()
    assert set(result["phases"]) == {"prepare", "train", "save"}


@pytest.mark.slow
def test_rankings_against_pairs():
    result = benchmark("reward_vs_trl.py", "--responses", 3, "--prompts", 4)
    assert KEYS <= result.keys()
    assert result["responses"]["K=3"]["ratio_tokens"] == pytest.approx(2, rel=0.01)  # 3 * 2 passes against 3


def test_a_side_that_fails_says_why(module):
    turns = module("turns")
    side = turns.Side([sys.executable, "-c", "raise ValueError('no such model')"], "cpu")
    with pytest.raises(SystemExit, match="no such model"):
        side.ready()
    side.close()


def test_different_responses_are_no_comparison(module):
    ppo_vs_trl = module("ppo_vs_trl")
    turns = {"trl": [{"response_tokens": 9}], "ours": [{"response_tokens": 8}]}
    with pytest.raises(SystemExit, match="different responses"):
        ppo_vs_trl.same_tokens(turns)


def test_the_floor_counts_what_torch_counts(module):
    """The formulas against torch's own counter on the policy: forward and backward of one row."""
    floor, workload = module("floor"), module("workload")
    shape = workload.Shape(size="tiny", vocabulary=500, batch=1, epochs=2, prompt=(9, 9), response=(8, 8))
    base = LlamaForCausalLM(shape.config(attn_implementation="eager"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **workload.LORA))
    tokens = 16
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model.model.model(torch.ones(1, tokens, dtype=torch.long)).last_hidden_state
    # Eager attention computes the upper triangle too.
    sizes = workload.SIZES["tiny"]
    triangle = 2 * sizes["num_hidden_layers"] * sizes["hidden_size"] * tokens * (tokens - 1)
    forward = counter.get_total_flops() - triangle
    with FlopCounterMode(display=False) as counter:
        hidden.sum().backward()
    backward = counter.get_total_flops() - 2 * triangle
    head = 2 * 8 * sizes["hidden_size"] * shape.vocabulary
    counted = floor.products(shape)
    assert counted["generate"] == forward + head
    # Two epochs of policy and critic
    assert counted["train"] == 4 * (forward + backward) + 4 * head
