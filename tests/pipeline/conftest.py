"""A tiny random base with small data files, and the three steps run on them once."""

import json
from pathlib import Path

import pytest
import torch

from tests import tiny_models as models
from tests.conftest import run_recipe, write_jsonl

WORDS = 59


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """A random base and small data files: demonstrations that answer with even words, rankings that like `w2`."""
    folder = tmp_path_factory.mktemp("data")
    prompts = models.prompts(48)
    generator = torch.Generator().manual_seed(1)

    def answer() -> str:
        words = 2 * torch.randint(WORDS // 2, (5,), generator=generator)
        return " ".join(f"w{word}" for word in words.tolist())

    demonstrations = [{"messages": prompt + [{"role": "assistant", "content": answer()}]} for prompt in prompts]
    rankings = [ranking(str(number), prompt, [answer() for _ in range(3)]) for number, prompt in enumerate(prompts)]
    return {
        "base": models.save_base(folder / "base"),
        "demonstrations": write_jsonl(folder / "demonstrations.jsonl", demonstrations),
        "rankings": write_jsonl(folder / "rankings.jsonl", rankings),
        "prompts": write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts]),
    }


def ranking(name: str, prompt: list[dict], texts: list[str]) -> dict:
    """What a labeler who likes `w2` says about the answers `texts`."""
    ordered = sorted(texts, key=lambda text: -text.split().count("w2"))
    responses = [{"text": text, "rank": rank} for rank, text in enumerate(ordered, start=1)]
    return {"id": name, "prompt": prompt, "responses": responses, "annotator": "a"}


def sft_arguments(data: dict[str, str], output_dir: Path, **changes) -> dict:
    defaults = {"model_name_or_path": data["base"], "dataset_name": data["demonstrations"]}
    defaults |= {"per_device_train_batch_size": 8} | ({} if "max_steps" in changes else {"num_train_epochs": 2})
    return defaults | {"output_dir": output_dir} | changes


def reward_arguments(data: dict[str, str], start: Path, output_dir: Path, **changes) -> dict:
    defaults = {"model_name_or_path": start, "dataset_name": data["rankings"], "test_split_size": 0.2}
    return defaults | {"output_dir": output_dir} | changes


def ppo_arguments(data: dict[str, str], runs: Path, output_dir: Path, **changes) -> dict:
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
    return defaults | changes


def with_extras(data: dict[str, str]) -> dict:
    """PPO with all that a checkpoint has to carry."""
    demonstrations = {"ptx_dataset_name": data["demonstrations"], "ptx_coef": 0.1}
    return demonstrations | {"ema_decay": 0.9, "adaptive_kl_target": 0.5, "log_completions": True, "save_steps": 3}


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory) -> Path:
    """SFT, reward model and PPO, each by its `main`."""
    folder = tmp_path_factory.mktemp("runs")
    secret = {"hub_token": "hf_secret"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "")
        run_recipe("sft", **sft_arguments(data, folder / "sft", report_to="tensorboard", **secret))
        run_recipe("reward", **reward_arguments(data, folder / "sft", folder / "reward", **secret))
        run_recipe("ppo", **ppo_arguments(data, folder, folder / "ppo", **with_extras(data), **secret))
    return folder


def history(folder: Path, name: str) -> list[float]:
    """The values of a metric in a run's trainer state."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [row[name] for row in state["log_history"] if name in row]
