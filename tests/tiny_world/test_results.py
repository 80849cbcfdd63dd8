"""docs/results.md: the jobs in their order, and the page made from a real evaluation of small adapters."""

import json
import runpy
import shutil
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks import tiny_world as results
from benchmarks.tiny_world import write_page
from recipes.cli.errors import UserError
from recipes.tiny_world.evaluate import POLICIES
from recipes.tiny_world.quickstart import ROOT, Quickstart, Stage


def adapter(folder, base, task_type: str, std: float) -> None:
    """A LoRA on the tiny world's base that answers in its own way."""
    kinds = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
    model = kinds[task_type].from_pretrained(base, **({"num_labels": 1} if task_type == "SEQ_CLS" else {}))
    head = {"modules_to_save": ["score"]} if task_type == "SEQ_CLS" else {}
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type=task_type, **head))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base):
    """A run with everything that the page reads; its evaluation ran its own command on fewer prompts."""
    folder = tmp_path_factory.mktemp("seed0")
    adapter(folder / "reward", tiny_base, "SEQ_CLS", 0.05)
    for name, std in (("sft", 0.02), ("ppo", 0.15), ("ppo_no_kl", 0.3)):
        adapter(folder / name, tiny_base, "CAUSAL_LM", std)
        (folder / name / "train_config.yaml").write_text("arguments: {}\ngit_revision: abc123\n")
    for run in results.RUNS.values():
        for step in (10, 20):
            adapter(folder / run / f"checkpoint-{step}", tiny_base, "CAUSAL_LM", step / 100)
    greedy = {name: {"gold_greedy": 0.5} for name in POLICIES}
    own = {"seed": 7, "policies": greedy, "reward_model": {"accuracy_on_gold_order": 0.7}}
    (folder / "report.json").write_text(json.dumps(own))
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    responses = [{"text": "Paris.", "rank": 1}, {"text": "The capital of France is Rome.", "rank": 2}]
    ranking = {"prompt": prompt, "responses": responses, "annotator": "simulated"}
    (folder / "heldout_rankings.jsonl").write_text(json.dumps(ranking) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        command = results.evaluation(7).command(str(folder), 7)
        patch.setattr(sys, "argv", [*command[1:], "--num_prompts", "8", "--best_of_n", "4"])
        runpy.run_path(command[1], run_name="command")["main"]()
    return folder


@pytest.mark.slow
def test_the_page_says_what_the_evaluations_found(finished, tmp_path):
    other = tmp_path / "seed1"
    shutil.copytree(finished, other)
    own = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps(own | {"seed": 8}))
    output = tmp_path / "docs" / "results.md"
    write_page([finished, other], "the command", output)
    text = output.read_text()
    report = json.loads((finished / "evaluation" / "report.json").read_text())
    for name in ("results_reward_kl.png", "results_over_optimization.png"):
        assert f"](images/{name})" in text and (output.parent / "images" / name).stat().st_size > 10_000
    assert all(part in text for part in ("Made by `the command`", "`abc123`", report["git_revision"], "seeds 7, 8"))
    gold = report["policies"]["ppo"]["gold"]
    cell = f"{gold['mean']:.2f} [{gold['ci95'][0]:.2f}, {gold['ci95'][1]:.2f}]"
    (line,) = [line for line in text.splitlines() if line.startswith("| PPO |")]
    assert line.count(cell) == 2 and f"**{gold['mean']:.2f}** ({gold['mean']:.2f} to {gold['mean']:.2f})" in line
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(tables) > 30
    for lines in (block.splitlines() for block in text.split("\n\n") if block.startswith("| ")):
        assert len({line.count("|") for line in lines}) == 1, lines[0]
    reach = max(point["kl"] for point in report["frontier"]["optimal"])
    for kl_coef in results.RUNS:
        last = [row for row in report["frontier"]["checkpoints"] if row["run"] == f"kl_{kl_coef}"][-1]
        share = ("≤ " if last["kl"] > reach else "") + f"**{last['share_of_gain']:.2f}**"
        assert any(line.startswith(f"| {kl_coef} | {last['step']} |") and f"| {share} " in line for line in tables)
    assert report["policies"]["ppo"]["gold"]["mean"] != report["policies"]["sft"]["gold"]["mean"]


def plan(monkeypatch, folders, fail: str | None = None) -> list[Quickstart]:
    """Stages that take a moment, and write when they began and when they ended, in place of the real ones."""
    program = folders[0].parent / "sleep.py"
    program.write_text(
        f"import sys, time; a = time.time(); time.sleep(0.5)\n"
        f"if sys.argv[1].endswith('/{fail}'): sys.exit('no reward')\n"
        "open(sys.argv[1], 'w').write(f'{a} {time.time()}')"
    )

    def stage(name):
        return Stage(name, name, f"python {program} {{folder}}/{{output}}", name)

    jobs = [[stage("rankings")], [stage("kl_0")], [stage("kl_1")]]
    monkeypatch.setattr(results, "evaluated", lambda seed: jobs)
    monkeypatch.setattr(results, "evaluation", lambda seed: stage("evaluation"))
    return [Quickstart(folder, seed) for seed, folder in enumerate(folders)]


def test_an_evaluation_waits_for_what_it_reads_and_two_commands_run_at_a_time(monkeypatch, tmp_path):
    runs = plan(monkeypatch, [tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    started = time.time()
    results.run_all(runs)
    times = {}
    for run in runs:
        for name in ("rankings", "kl_0", "kl_1", "evaluation"):
            times[run.seed, name] = [float(value) for value in (run.folder / name).read_text().split()]
        needed = max(times[run.seed, name][1] for name in ("rankings", "kl_0", "kl_1"))
        assert times[run.seed, "evaluation"][0] >= needed
    for begin, _ in times.values():
        assert sum(a <= begin < b for a, b in times.values()) <= results.WORKERS
    assert started < min(begin for begin, _ in times.values())
    before = (tmp_path / "a" / "kl_0").read_text()
    results.run_all(plan(monkeypatch, [tmp_path / "a", tmp_path / "b", tmp_path / "c"]))
    assert (tmp_path / "a" / "kl_0").read_text() == before  # nothing runs twice


def test_a_failed_command_stops_the_job_and_is_named(monkeypatch, tmp_path):
    runs = plan(monkeypatch, [tmp_path / "a"], fail="kl_1")
    with pytest.raises(UserError, match="kl_1 failed; the end of .*kl_1.log:\nno reward"):
        results.run_all(runs)
    assert not (tmp_path / "a" / "evaluation").exists()
