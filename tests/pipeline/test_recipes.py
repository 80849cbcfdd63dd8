"""The three recipes on a tiny random base, by their `main` and by their real commands: train, save, reload, resume."""

import json
import re
import sqlite3
from itertools import permutations
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import ScriptArguments

from recipes.cli import launch as launch_checks
from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from recipes.formatting import FormattingArguments, load_formatted
from recipes.trainers.checkpoints import WholeSFTTrainer
from scripts import sample_responses
from tests import tiny_models as models
from tests.conftest import ROOT, flags, recipe_line, run_command, run_recipe, write_jsonl
from tests.pipeline.conftest import history, ppo_arguments, ranking, reward_arguments, sft_arguments, with_extras

ADAPTER = "adapter_model.safetensors"
REWARD = """
import models  # the user's own, beside this file

def correct(prompts, completions, **kwargs):
    return [models.score(completion[0]["content"]) for completion in completions]
"""


def launch(step: str, config_file: str = "cpu", **arguments):
    """Run a recipe by the `accelerate launch` line of its docstring, from the folder of the project."""
    return launch_from(ROOT, step, config_file, **arguments)


def launch_from(folder: Path, step: str, config_file: str = "cpu", env: dict | None = None, **arguments):
    line = ["accelerate", "launch", "--config_file", ROOT / "accelerate_configs" / f"{config_file}.yaml"]
    line += [ROOT / "recipes" / f"{step}.py", *recipe_line(step, **arguments)]
    return run_command(line, timeout=400, cwd=folder, env={"PYTHONPATH": str(ROOT)} | (env or {}))


@pytest.fixture(scope="session")
def commands(data, tmp_path_factory) -> Path:
    """The same as `runs` by the launch lines, two of them with trackers, and PPO from a folder of the user's own."""
    folder = tmp_path_factory.mktemp("commands")
    trackers = {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    shown = launch("sft", **sft_arguments(data, folder / "sft")).stdout
    (folder / "sft.txt").write_text(shown, encoding="utf-8")
    reward = reward_arguments(data, folder / "sft", folder / "reward", report_to="trackio")
    launch_from(ROOT, "reward", env=trackers, **reward)
    user = folder / "user"
    user.mkdir()
    (user / "models.py").write_text("def score(text):\n    return float(len(text))\n", encoding="utf-8")
    (user / "my_rewards.py").write_text(REWARD, encoding="utf-8")
    extras = with_extras(data) | {"reward_funcs": "my_rewards.correct", "reward_weights": [1, 0], "report_to": "wandb"}
    launch_from(user, "ppo", env=trackers, **ppo_arguments(data, folder, folder / "ppo", **extras))
    return folder


def test_every_metric_of_ppo_is_explained(runs):
    page = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8").split("## Metrics")[1].split("\n## ")[0]
    state = json.loads((runs / "ppo" / "trainer_state.json").read_text(encoding="utf-8"))
    logged = {name for row in state["log_history"] for name in row} - {"step"}
    assert {"objective/scores_max", "advantages/std", "values/mean", "grad_norm/critic"} <= logged
    assert not any(name.startswith(("time/", "memory/")) for name in logged), "equal runs leave equal states"
    explained = set(re.findall(r"`([\w/<>]+)`", page))
    named = {re.sub(r"^rewards/[^/]+/", "rewards/<name>/", name.removeprefix("eval_")) for name in logged}
    trackers = {"time/sample", "time/score", "time/update", "time/tokens_per_second", "memory/peak_gib"}
    assert (named | trackers) - explained - {"loss", "runtime", "samples_per_second", "steps_per_second"} == set()


@pytest.mark.parametrize(("step", "page"), [("sft", "sft.md"), ("reward", "reward_model.md")])
def test_every_metric_of_the_other_steps_is_explained(runs, step, page):
    """On their pages, or, where it is logged by all steps, on that of PPO."""
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in (page, "ppo.md"))
    explained = set(re.findall(r"`([\w/]+)`", text))
    state = json.loads((runs / step / "trainer_state.json").read_text(encoding="utf-8"))
    logged = {name for row in state["log_history"] for name in row} - {"step"}
    assert ("mean_token_accuracy" if step == "sft" else "eval_margin") in logged
    assert {name for name in logged if not {name, name.removeprefix("eval_")} & explained} == set()


def test_completions_are_text_and_in_one_table_only(runs):
    tables = [pd.read_parquet(path) for path in sorted((runs / "ppo" / "completions").glob("*.parquet"))]
    rows = pd.concat(tables)
    assert len(tables) < 8, "a rollout of several updates is one table"
    assert rows["prompt"].map(type).eq(str).all() and rows["completion"].map(type).eq(str).all()
    assert not rows.drop(columns="step").duplicated().any()


@pytest.mark.slow
def test_a_launched_recipe_shows_lines_and_no_warnings(commands):
    lines = re.split(r"[\r\n]+", (commands / "sft.txt").read_text(encoding="utf-8"))
    lines = [line for line in lines if line.strip() and not line.startswith("[INFO] Running in WANDB offline")]
    lines = [line for line in lines if not re.search(r"it/s\]|s/it\]|\?it/s", line)]
    assert lines[0].startswith("SFT into ") and "Running: 1 process" in lines[0]
    assert "48 rows in, 48 out" in lines[1]
    assert all(line.startswith(("step ", "Training on ")) for line in lines[2:-1]), lines
    assert lines[-1].startswith("Saved to ") and "loss" in lines[-1] and "Next: python scripts/" in lines[-1]


def test_each_step_saves_what_plain_libraries_load(data, runs):
    for step in ("sft", "reward", "ppo"):
        for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "trainer_state.json"):
            assert (runs / step / name).exists(), f"{step}/{name}"
        assert AutoTokenizer.from_pretrained(runs / step).chat_template == models.CHAT_TEMPLATE
        record = yaml.safe_load((runs / step / "train_config.yaml").read_text(encoding="utf-8"))
        assert record["recipe"] == step
        assert record["arguments"]["output_dir"] == str(runs / step)
        assert record["packages"]["trl"].startswith("1.16")
        assert record["datasets"]["train"]["rows"] > 0
        files = [path for path in (runs / step).rglob("*") if path.is_file()]
        assert not [path for path in files if b"hf_secret" in path.read_bytes()]
    policy = AutoPeftModelForCausalLM.from_pretrained(str(runs / "ppo"))
    assert policy.peft_config["default"].base_model_name_or_path == data["base"]
    assert not [key for key in load_file(runs / "ppo" / "adapter_model.safetensors") if "score" in key]


@pytest.mark.parametrize("step", ["sft", "reward", "ppo"])
def test_the_card_says_what_it_is_and_its_code_runs(data, runs, step, capsys):
    card = ModelCard.load(runs / step / "README.md")
    assert card.data.library_name == "peft" and step in card.data.tags and card.data.base_model is None
    assert "None" not in card.text and f"`{data['base']}`" in card.text
    rows = {"sft": "demonstrations", "reward": "rankings", "ppo": "prompts"}[step]
    assert f"rows of `{data[rows]}`" in card.text
    numbers = {"sft": "loss", "reward": "eval_accuracy eval_longer_wins", "ppo": "objective/kl objective/scores"}
    assert all(f"| `{name}` |" in card.text for name in numbers[step].split())
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(code, {})
    assert step != "reward" or float(capsys.readouterr().out)


def test_sft_learned_the_demonstrations_and_ppo_moved_on_from_it(runs):
    losses = history(runs / "sft", "loss")
    assert losses[-1] < losses[0]
    before, after = (load_file(runs / step / "adapter_model.safetensors") for step in ("sft", "ppo"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    # 8 updates over two rollouts of 16 episodes, with two minibatches and two epochs each
    for name, rows in {"objective/kl": 2, "objective/scores": 2, "val/ratio": 8, "loss/value_avg": 8}.items():
        assert len(history(runs / "ppo", name)) == rows, name


@pytest.fixture(scope="module")
def score(data, runs):
    """`score(prompt, text)` by the saved reward model, loaded with plain peft."""
    base = AutoModelForSequenceClassification.from_pretrained(data["base"], num_labels=1)
    model = PeftModel.from_pretrained(base, str(runs / "reward")).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs / "reward")
    model.config.pad_token_id = tokenizer.pad_token_id

    @torch.no_grad()
    def score(prompt: list[dict], text: str) -> float:
        turns = [*prompt, {"role": "assistant", "content": text}]
        return model(tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)).logits.item()

    return score


def split_rankings(data, runs):
    """The rankings that the reward model was trained and evaluated on."""
    record = yaml.safe_load((runs / "reward" / "train_config.yaml").read_text(encoding="utf-8"))["arguments"]
    format_args = FormattingArguments(test_split_size=record["test_split_size"])
    script_args = ScriptArguments(dataset_name=data["rankings"])
    return load_formatted("ranking", script_args, format_args, evaluate=True, seed=record["seed"])


def test_the_saved_reward_adapter_gives_the_scores_ppo_saw(data, runs, score):
    """The mean over the rows that were trained is the stored mean."""
    trained = split_rankings(data, runs)["train"]
    scores = [score(row["prompt"], text[0]["content"]) for row in trained for text in row["completions"]]
    statistics = json.loads((runs / "reward" / "reward_statistics.json").read_text(encoding="utf-8"))
    assert statistics["n"] == len(scores)
    assert statistics["mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    record = yaml.safe_load((runs / "ppo" / "train_config.yaml").read_text(encoding="utf-8"))
    assert record["arguments"]["score_mean"] == pytest.approx(statistics["mean"])
    assert record["arguments"]["score_std"] == pytest.approx(statistics["std"])


def test_the_reward_model_reports_accuracy_beside_longer_wins(data, runs, score):
    """On the prompts that were held out; all responses are of one length."""
    right = []
    for row in split_rankings(data, runs)["eval"]:
        scores = [score(row["prompt"], completion[0]["content"]) for completion in row["completions"]]
        pairs = permutations(zip(row["ranks"], scores, strict=True), 2)
        right += [better > worse for (rank, better), (worse_rank, worse) in pairs if rank < worse_rank]
    results = json.loads((runs / "reward" / "eval_results.json").read_text(encoding="utf-8"))
    assert len(right) > 10 and results["eval_accuracy"] == pytest.approx(sum(right) / len(right))
    assert results["eval_longer_wins"] == 0.5


def test_ptx_and_the_moving_average_of_the_policy(runs):
    assert len(history(runs / "ppo", "loss/ptx_avg")) == 8
    record = yaml.safe_load((runs / "ppo" / "train_config.yaml").read_text(encoding="utf-8"))
    assert record["datasets"]["ptx"]["rows"] == 48
    average, policy, sft = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (runs / "ppo" / "ema", runs / "ppo", runs / "sft")
    )
    key = max(policy, key=lambda name: (policy[name] - sft[name]).abs().max())
    assert 0 < (average[key] - sft[key]).abs().max() < (policy[key] - sft[key]).abs().max()


def test_ppo_resumed_from_a_checkpoint_ends_on_the_same_numbers(data, runs, tmp_path):
    """Cut after the third of four steps of a rollout."""
    again = {"resume_from_checkpoint": runs / "ppo" / "checkpoint-3"} | with_extras(data)
    run_recipe("ppo", **ppo_arguments(data, runs, tmp_path / "resumed", **again))
    assert_same_run(runs / "ppo", tmp_path / "resumed", roles=(".", "critic", "ema"))


def test_a_hub_that_fails_after_the_training_is_one_line(data, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("503 Server Error")

    monkeypatch.setattr(launch_checks, "check_hub", lambda token: None)
    monkeypatch.setattr(WholeSFTTrainer, "init_hf_repo", lambda *args: None)
    monkeypatch.setattr(WholeSFTTrainer, "push_to_hub", fail)
    with pytest.raises(UserError, match="The run is saved to .*, but the Hub did not take it: 503 Server Error; push"):
        run_recipe("sft", **sft_arguments(data, tmp_path / "run", max_steps=1, push_to_hub=True, hub_strategy="end"))
    assert (tmp_path / "run" / "train_config.yaml").exists()


@pytest.mark.parametrize(
    "own", [{"train_sampling_strategy": "group_by_length"}, {"dataset_streaming": True, "max_steps": 14}], ids=list
)
def test_rows_of_a_second_epoch_come_in_the_order_of_an_uninterrupted_run(data, tmp_path, own):
    """Some came twice and some not at all: they were drawn anew, and a stream began from its first row."""
    own = own | {"logging_steps": 1, "save_strategy": "steps", "save_steps": 8, "save_total_limit": 2}
    run_recipe("sft", **sft_arguments(data, tmp_path / "whole", **own))
    again = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-8"}
    run_recipe("sft", **sft_arguments(data, tmp_path / "resumed", **own, **again))
    assert history(tmp_path / "whole", "loss") == history(tmp_path / "resumed", "loss")


def assert_same_run(one: Path, other: Path, roles: tuple[str, ...]) -> None:
    """The same adapters and PPO metrics, to the last bit."""
    for role in roles:
        whole, resumed = (load_file(folder / role / ADAPTER) for folder in (one, other))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), role
    for name in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm"):
        assert history(one, name) == history(other, name), name


def test_the_loop_goes_round(data, runs, tmp_path):
    """Sample from the PPO policy, rank, train the reward model on from the old one, PPO again."""
    words = flags(model_name_or_path=runs / "ppo", dataset_name=data["prompts"], output=tmp_path / "samples.jsonl")
    words += flags(num_generations=3, max_completion_length=8)
    sample_responses.main(*parse(sample_responses.ARGUMENTS, words))
    samples = map(json.loads, (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    rankings = [ranking(row["id"], row["prompt"], [each["text"] for each in row["responses"]]) for row in samples]
    own = data | {"rankings": write_jsonl(tmp_path / "rankings.jsonl", rankings)}
    run_recipe("reward", **reward_arguments(own, runs / "reward", tmp_path / "reward"))
    again = {"model_name_or_path": runs / "ppo", "reward_model_name_or_path": tmp_path / "reward"}
    run_recipe("ppo", **ppo_arguments(data, runs, tmp_path / "ppo", **again, max_steps=4))
    heads = [load_file(folder / ADAPTER) for folder in (runs / "reward", tmp_path / "reward")]
    key = "base_model.model.score.weight"
    moved = (heads[1][key] - heads[0][key]).norm() / heads[0][key].norm()
    assert 0 < moved < 0.9, "the new reward model goes on from the old head"
    # The reference is the policy it started from, so the first rollout has no KL to it.
    assert history(tmp_path / "ppo", "objective/kl")[0] == pytest.approx(0.0, abs=1e-3)


def test_full_fine_tuning(data, tmp_path):
    run_recipe("sft", **sft_arguments(data, tmp_path / "sft", use_peft=False, learning_rate=1e-3))
    run_recipe("reward", **reward_arguments(data, tmp_path / "sft", tmp_path / "reward", use_peft=False))
    own = {"use_peft": False, "max_steps": 4, "learning_rate": 1e-4}
    run_recipe("ppo", **ppo_arguments(data, tmp_path, tmp_path / "ppo", **own))
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (tmp_path / "ppo" / name).exists()
    assert history(tmp_path / "ppo", "objective/kl")[0] == pytest.approx(0.0, abs=1e-3)


def test_a_second_run_into_the_same_folder_is_refused(data, runs):
    before = {path: path.stat().st_mtime_ns for path in (runs / "sft").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"The output folder {runs / 'sft'} is not empty"):
        run_recipe("sft", **sft_arguments(data, runs / "sft"))
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "sft").rglob("*") if path.is_file()}


# By the real commands


@pytest.mark.slow
def test_the_commands_train_what_main_does(commands, runs):
    """Also from another folder, with a user's modules that are called as ours are."""
    for step in ("sft", "reward"):
        ours, theirs = load_file(runs / step / ADAPTER), load_file(commands / step / ADAPTER)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), step
    assert_same_run(runs / "ppo", commands / "ppo", roles=(".", "critic", "ema"))
    assert all(value > 0 for value in history(commands / "ppo", "rewards/correct/mean"))


@pytest.mark.slow
def test_trackers_got_the_runs(commands, runs):
    assert list((runs / "sft").rglob("events.out.tfevents.*"))
    databases = list((commands / "trackio").rglob("*.db"))
    assert any(
        "eval_accuracy" in str(row) or "eval/accuracy" in str(row)
        for database in databases
        for row in sqlite3.connect(database).execute("select * from metrics").fetchall()
    )
    (wandb_log,) = commands.rglob("run-*.wandb")
    assert b"objective/kl" in wandb_log.read_bytes()


@pytest.mark.slow
def test_trackers_got_a_table_of_prompts_responses_scores_and_kl(commands):
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in commands.rglob("media/table/**/*.table.json")]
    rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    first = [row for row in rows if row["step"] == min(row["step"] for row in rows)]
    assert len(first) == 16
    assert all(isinstance(row["completion"], str) for row in first), "text to read, not messages"
    assert all(row["prompt"].strip() and "'role'" not in row["prompt"] for row in first)
    scores = [row["score"] for row in first]
    assert sum(scores) / len(scores) == pytest.approx(history(commands / "ppo", "objective/scores")[0], abs=1e-4)
    kls = [row["kl"] for row in first]
    assert sum(kls) / len(kls) == pytest.approx(history(commands / "ppo", "objective/kl")[0], abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_what_one_does_at_the_same_global_batch(data, tmp_path):
    options = {"lr_scheduler_type": "constant", "save_strategy": "no", "gradient_accumulation_steps": 1}
    run_recipe("sft", **sft_arguments(data, tmp_path / "one", **options))
    two = sft_arguments(data, tmp_path / "two", **options) | {"per_device_train_batch_size": 4}
    assert "2 processes on cpu" in launch("sft", "multi_cpu", **two).stdout
    assert history(tmp_path / "two", "loss") == pytest.approx(history(tmp_path / "one", "loss"), rel=1e-3)
    one, both = (load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(both[key], one[key], rtol=2e-2, atol=2e-4)


@pytest.mark.slow
def test_ppo_on_two_processes_resumes_in_the_middle_of_a_rollout(data, runs, tmp_path):
    options = {"per_device_train_batch_size": 4, "save_steps": 3, "ema_decay": 0.9}
    launch("ppo", "multi_cpu", **ppo_arguments(data, runs, tmp_path / "whole", **options))
    assert history(tmp_path / "whole", "episode")[-1] == 32
    assert history(tmp_path / "whole", "val/ratio")[0] == pytest.approx(1.0, abs=1e-3)
    options |= {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3"}
    launch("ppo", "multi_cpu", **ppo_arguments(data, runs, tmp_path / "resumed", **options))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", roles=(".", "critic", "ema"))
