"""The reward recipe on several processes: it saves first, and every process scores its share."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from tests.conftest import ROOT, recipe_line, run_command, run_recipe
from tests.pipeline.conftest import history, reward_arguments


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi_cpu", "fsdp2"])
def test_the_reward_recipe_ends_with_the_statistics_of_one_process(data, tmp_path, kind):
    """In shares as a GPU computes them, in bf16."""
    options = {"max_steps": 2, "lr_scheduler_type": "constant", "save_strategy": "no", "eval_strategy": "epoch"}
    common = options | {"gradient_accumulation_steps": 1, "max_length": 24, "bf16": kind == "fsdp2"}
    base = data["base"]
    run_recipe("reward", **reward_arguments(data, base, tmp_path / "one", per_device_train_batch_size=8, **common))
    line = ["accelerate", "launch", "--config_file", ROOT / "accelerate_configs" / f"{kind}.yaml"]
    script = [ROOT / "recipes" / "reward.py"]
    if kind == "fsdp2":
        common |= {"accelerator_config": json.dumps({"use_configured_state": True})}
        script = ["-m", "tests.pipeline.fsdp_recipe"]
    two = reward_arguments(data, base, tmp_path / "two", per_device_train_batch_size=4, **common)
    run_command([*line, *script, *recipe_line("reward", **two)], timeout=300)

    one, both = (json.loads((tmp_path / name / "reward_statistics.json").read_text()) for name in ("one", "two"))
    assert both["n"] == one["n"] > 0
    close = {"abs": 0.02} if kind == "fsdp2" else {"abs": 1e-3}
    assert both["mean"] == pytest.approx(one["mean"], **close) and both["std"] == pytest.approx(one["std"], **close)
    assert history(tmp_path / "two", "eval_pairs") == history(tmp_path / "one", "eval_pairs"), "each pair counts once"
    if kind == "fsdp2":
        scores = torch.tensor(json.loads((tmp_path / "two" / "scores.json").read_text()))
        assert (scores != scores.bfloat16().float()).float().mean() > 0.9, "scores are float32"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, str(tmp_path / "two")).eval()
    model.config.pad_token_id = 0
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert (tmp_path / "two" / "train_config.yaml").exists()
