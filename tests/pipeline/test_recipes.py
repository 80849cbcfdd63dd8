"""The three recipes through their real commands, on a tiny random base: train, save, reload, resume, two processes."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests import tiny_models as models
from tests.conftest import run_command

WORDS = 59


def launch(recipe: str, config_file: str = "cpu", **arguments) -> list[str]:
    """The `accelerate launch` line of a recipe with the tiny world's YAML and flags that override it."""
    line = ["accelerate", "launch", "--config_file", f"accelerate_configs/{config_file}.yaml", f"recipes/{recipe}.py"]
    line += ["--config", f"recipes/configs/tiny_world/{recipe}.yaml"]
    return line + [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def run(line: list[str], **kwargs):
    return run_command(line, timeout=400, **kwargs)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """A random base and small data files: demonstrations that answer with even words, rankings that like `w2`."""
    folder = tmp_path_factory.mktemp("data")
    models.causal_lm().save_pretrained(folder / "base")
    models.word_tokenizer().save_pretrained(folder / "base")
    prompts = models.prompts(48)
    generator = torch.Generator().manual_seed(1)

    def answer() -> str:
        words = 2 * torch.randint(WORDS // 2, (5,), generator=generator)
        return " ".join(f"w{word}" for word in words.tolist())

    demonstrations = [{"messages": prompt + [{"role": "assistant", "content": answer()}]} for prompt in prompts]
    rankings = []
    for number, prompt in enumerate(prompts):
        texts = sorted((answer() for _ in range(3)), key=lambda text: -text.split().count("w2"))
        responses = [{"text": text, "rank": rank} for rank, text in enumerate(texts, start=1)]
        rankings.append({"id": str(number), "prompt": prompt, "responses": responses, "annotator": "a"})
    return {
        "base": str(folder / "base"),
        "demonstrations": write_jsonl(folder / "demonstrations.jsonl", demonstrations),
        "rankings": write_jsonl(folder / "rankings.jsonl", rankings),
        "prompts": write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts]),
    }


def sft_arguments(data, output_dir, **kwargs) -> list[str]:
    return launch(
        "sft",
        model_name_or_path=data["base"],
        dataset_name=data["demonstrations"],
        output_dir=output_dir,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        **kwargs,
    )


def ppo_arguments(data, runs, output_dir, **kwargs) -> list[str]:
    defaults = {
        "model_name_or_path": runs / "sft",
        "reward_model_name_or_path": runs / "reward",
        "dataset_name": data["prompts"],
        "output_dir": output_dir,
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "max_completion_length": 8,
        "max_steps": 8,
        "warmup_steps": 0,
        "save_total_limit": 5,
        "logging_steps": 1,
    }
    return launch("ppo", **(defaults | kwargs))


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory) -> Path:
    """SFT, reward model and PPO, each by its launch line, each with another tracker."""
    folder = tmp_path_factory.mktemp("runs")
    trackers = {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    run(sft_arguments(data, folder / "sft", report_to="tensorboard"), env=trackers)
    reward = {"model_name_or_path": folder / "sft", "dataset_name": data["rankings"], "output_dir": folder / "reward"}
    run(launch("reward", **reward, test_split_size=0.2, report_to="trackio"), env=trackers)
    run(ppo_arguments(data, folder, folder / "ppo", **with_extras(data), report_to="wandb"), env=trackers)
    return folder


def with_extras(data) -> dict:
    """PPO with all that a checkpoint has to carry."""
    demonstrations = {"ptx_dataset_name": data["demonstrations"], "ptx_coef": 0.1}
    return demonstrations | {"ema_decay": 0.9, "adaptive_kl_target": 0.5, "log_completions": True, "save_steps": 3}


def history(folder: Path, name: str) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [row[name] for row in state["log_history"] if name in row]


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
        assert "hub_token" not in record["arguments"]
    policy = AutoPeftModelForCausalLM.from_pretrained(str(runs / "ppo"))
    assert policy.peft_config["default"].base_model_name_or_path == data["base"]
    assert not [key for key in load_file(runs / "ppo" / "adapter_model.safetensors") if "score" in key]


def test_sft_learned_the_demonstrations_and_ppo_moved_on_from_it(runs):
    losses = history(runs / "sft", "loss")
    assert losses[-1] < losses[0]
    before, after = (load_file(runs / step / "adapter_model.safetensors") for step in ("sft", "ppo"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    # 8 updates over two rollouts of 16 episodes, with two minibatches and two epochs each
    for name, rows in {"objective/kl": 2, "objective/scores": 2, "val/ratio": 8, "loss/value_avg": 8}.items():
        assert len(history(runs / "ppo", name)) == rows, name


def test_the_saved_reward_adapter_gives_the_scores_ppo_saw(data, runs):
    """Loaded with plain peft, the head included: the mean over the stored reference set is the stored mean."""
    base = AutoModelForSequenceClassification.from_pretrained(data["base"], num_labels=1)
    model = PeftModel.from_pretrained(base, str(runs / "reward")).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs / "reward")
    model.config.pad_token_id = tokenizer.pad_token_id
    scores = []
    for line in Path(data["rankings"]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for response in row["responses"]:
            turns = row["prompt"] + [{"role": "assistant", "content": response["text"]}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
            scores.append(model(input_ids=ids).logits.item())
    statistics = json.loads((runs / "reward" / "reward_statistics.json").read_text(encoding="utf-8"))
    assert statistics["n"] == len(scores)
    assert statistics["mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    record = yaml.safe_load((runs / "ppo" / "train_config.yaml").read_text(encoding="utf-8"))
    assert record["arguments"]["score_mean"] == pytest.approx(statistics["mean"])
    assert record["arguments"]["score_std"] == pytest.approx(statistics["std"])


def test_the_reward_model_reports_accuracy_beside_longer_wins(runs):
    results = json.loads((runs / "reward" / "eval_results.json").read_text(encoding="utf-8"))
    assert 0 <= results["eval_accuracy"] <= 1 and 0 <= results["eval_longer_wins"] <= 1


def test_trackers_got_the_runs(runs):
    assert list((runs / "sft").rglob("events.out.tfevents.*"))
    databases = list((runs / "trackio").rglob("*.db"))
    assert any(
        "eval_accuracy" in str(row) or "eval/accuracy" in str(row)
        for database in databases
        for row in sqlite3.connect(database).execute("select * from metrics").fetchall()
    )
    (wandb_log,) = runs.rglob("run-*.wandb")
    assert b"objective/kl" in wandb_log.read_bytes()


def test_trackers_got_a_table_of_prompts_responses_scores_and_kl(runs):
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in runs.rglob("media/table/**/*.table.json")]
    rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    first = [row for row in rows if row["step"] == min(row["step"] for row in rows)]
    assert len(first) == 16
    assert all(row["prompt"][0]["role"] == "user" and row["completion"][0]["role"] == "assistant" for row in first)
    scores = [row["score"] for row in first]
    assert sum(scores) / len(scores) == pytest.approx(history(runs / "ppo", "objective/scores")[0], abs=1e-4)
    assert sum(row["kl"] for row in first) / 16 == pytest.approx(history(runs / "ppo", "objective/kl")[0], abs=1e-4)


def test_ptx_and_the_mean_of_the_policy_run_by_command(runs):
    assert len(history(runs / "ppo", "loss/ptx_avg")) == 8
    record = yaml.safe_load((runs / "ppo" / "train_config.yaml").read_text(encoding="utf-8"))
    assert record["datasets"]["ptx"]["rows"] == 48
    mean, policy, sft = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (runs / "ppo" / "ema", runs / "ppo", runs / "sft")
    )
    key = max(policy, key=lambda name: (policy[name] - sft[name]).abs().max())
    assert 0 < (mean[key] - sft[key]).abs().max() < (policy[key] - sft[key]).abs().max()


def test_ppo_resumed_from_a_checkpoint_ends_on_the_same_numbers(data, runs, tmp_path):
    """Cut after the third of four steps of a rollout, by command."""
    checkpoint = runs / "ppo" / "checkpoint-3"
    run(ppo_arguments(data, runs, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **with_extras(data)))
    for adapter in (".", "critic", "ema"):
        files = (folder / adapter / "adapter_model.safetensors" for folder in (runs / "ppo", tmp_path / "resumed"))
        whole, resumed = map(load_file, files)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), adapter
    for name in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm"):
        assert history(runs / "ppo", name) == history(tmp_path / "resumed", name), name


def test_two_processes_train_what_one_does_at_the_same_global_batch(data, tmp_path):
    options = {"lr_scheduler_type": "constant", "save_strategy": "no", "gradient_accumulation_steps": 1}
    run(sft_arguments(data, tmp_path / "one", **options))
    two = sft_arguments(data, tmp_path / "two", config_file="multi_cpu", **options)
    two[two.index("--per_device_train_batch_size") + 1] = "4"
    result = run(two)
    assert "2 processes on cpu" in result.stdout
    assert history(tmp_path / "two", "loss") == pytest.approx(history(tmp_path / "one", "loss"), rel=1e-3)
    one, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(both[key], one[key], rtol=2e-2, atol=2e-4)


def test_ppo_on_two_processes_resumes_in_the_middle_of_a_rollout(data, runs, tmp_path):
    options = {"config_file": "multi_cpu", "per_device_train_batch_size": 4, "save_steps": 3} | {"ema_decay": 0.9}
    run(ppo_arguments(data, runs, tmp_path / "whole", **options))
    assert history(tmp_path / "whole", "episode")[-1] == 32
    assert history(tmp_path / "whole", "val/ratio")[0] == pytest.approx(1.0, abs=1e-3)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    run(ppo_arguments(data, runs, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options))
    for name in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm"):
        assert history(tmp_path / "whole", name) == history(tmp_path / "resumed", name), name
    for adapter in (".", "critic", "ema"):
        files = (tmp_path / folder / adapter / "adapter_model.safetensors" for folder in ("whole", "resumed"))
        whole, resumed = map(load_file, files)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), adapter


def test_the_loop_goes_round(data, runs, tmp_path):
    """Sample from the PPO policy, rank, train the reward model on from the old one, PPO again."""
    samples = ["scripts/sample_responses.py", "--model_name_or_path", str(runs / "ppo"), "--num_generations", "3"]
    samples += ["--dataset_name", data["prompts"], "--max_completion_length", "8"]
    run([sys.executable, *samples, "--output", str(tmp_path / "samples.jsonl")])
    rankings = []
    for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        texts = sorted((r["text"] for r in sample["responses"]), key=lambda text: -text.split().count("w2"))
        responses = [{"text": text, "rank": rank} for rank, text in enumerate(texts, start=1)]
        rankings.append({"id": sample["id"], "prompt": sample["prompt"], "responses": responses, "annotator": "a"})
    reward = {"model_name_or_path": runs / "reward", "dataset_name": write_jsonl(tmp_path / "r.jsonl", rankings)}
    run(launch("reward", **reward, output_dir=tmp_path / "reward", test_split_size=0.2))
    again = {"model_name_or_path": runs / "ppo", "reward_model_name_or_path": tmp_path / "reward"}
    run(ppo_arguments(data, runs, tmp_path / "ppo", **again, max_steps=4))
    heads = [load_file(folder / "adapter_model.safetensors") for folder in (runs / "reward", tmp_path / "reward")]
    key = "base_model.model.score.weight"
    moved = (heads[1][key] - heads[0][key]).norm() / heads[0][key].norm()
    assert 0 < moved < 0.9, "the new reward model goes on from the old head"
    # The reference is the policy it started from, so the first rollout has no KL to it.
    assert history(tmp_path / "ppo", "objective/kl")[0] == pytest.approx(0.0, abs=1e-3)


def test_full_fine_tuning_through_the_commands(data, tmp_path):
    run(sft_arguments(data, tmp_path / "sft", use_peft="false", learning_rate=1e-3))
    reward = {"model_name_or_path": tmp_path / "sft", "dataset_name": data["rankings"], "use_peft": "false"}
    run(launch("reward", **reward, output_dir=tmp_path / "reward", test_split_size=0.2))
    arguments = ppo_arguments(data, tmp_path, tmp_path / "ppo", use_peft="false", max_steps=4, learning_rate=1e-4)
    run(arguments)
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (tmp_path / "ppo" / name).exists()
    assert history(tmp_path / "ppo", "objective/kl")[0] == pytest.approx(0.0, abs=1e-3)


def test_a_second_run_into_the_same_folder_is_refused(data, runs):
    before = {path: path.stat().st_mtime_ns for path in (runs / "sft").rglob("*") if path.is_file()}
    result = run(sft_arguments(data, runs / "sft"), ok=False)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert f"The output folder {runs / 'sft'} is not empty" in line
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "sft").rglob("*") if path.is_file()}
