"""The comparison of methods at its smallest: every method trains, and a second start makes nothing again."""

import json

import pytest
import yaml

from benchmarks import methods
from recipes.tiny_world import evaluate, labeler
from tests.conftest import run_recipe, write_jsonl


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few prompts, two updates, one trial, one seed, and in its folder what all methods start from."""
    data, folder = tmp_path / "data", tmp_path / "runs" / "seed0"
    data.mkdir()
    for split in ("train", "validation", "heldout"):
        lines = (evaluate.DATA / f"prompts_{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"prompts_{split}.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    run_recipe("sft", output_dir=folder / "sft", max_steps=2)
    rows = [json.loads(line) for line in (data / "prompts_train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = ("Nobody knows that.", "It is big, I hope this helps.", "No.")  # the same answers to every prompt
    responses = [{"id": str(number), "text": text, "finished": True} for number, text in enumerate(texts)]
    samples = [row | {"id": str(number), "responses": responses, "model": "sft"} for number, row in enumerate(rows)]
    ranked = [labeler.rank(line, seed=0) for line in samples]
    write_jsonl(folder / "rankings.jsonl", ranked)
    start = {"model_name_or_path": folder / "sft", "dataset_name": folder / "rankings.jsonl"}
    run_recipe("reward", output_dir=folder / "reward", max_steps=2, **start)
    config = yaml.safe_load(methods.CONFIG.read_text(encoding="utf-8"))
    config |= {"max_steps": 2, "warmup_steps": 0, "per_device_train_batch_size": 8, "max_completion_length": 12}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    small = {"CONFIG": tmp_path / "ppo.yaml", "TRIALS": methods.TRIALS[:1], "TEMPERATURES": (0.5,)}
    small |= {"POOL": 2, "pipeline": lambda folder, seed: None}
    for name, value in small.items():
        monkeypatch.setattr(methods, name, value)
    monkeypatch.setattr(evaluate, "DATA", data)
    return tmp_path / "runs"


@pytest.mark.slow
def test_every_method_trains_and_nothing_is_made_twice(small):
    methods.make(small, [0])
    report = json.loads((small / "methods.json").read_text(encoding="utf-8"))
    assert {trial["method"] for trial in report["trials"]} == {*methods.TRAINED, methods.COOL}
    rows = {row["method"]: row for row in report["heldout"]}
    assert {*methods.TRAINED, methods.COOL, methods.BEST, "SFT"} == rows.keys()
    assert rows["SFT"]["kl"]["mean"] == 0 and rows["DPO"]["costs"][0]["samples"] == 0
    for method in methods.TRAINED:
        assert rows[method]["kl"]["mean"] != 0 and rows[method]["costs"][0]["cpu_seconds"] > 0  # it has learned
    assert {rows[method]["costs"][0]["samples"] for method in ("PPO", "GRPO", "RLOO")} == {8}
    assert rows[methods.BEST]["proxy"]["mean"] > rows["SFT"]["proxy"]["mean"]
    assert (small / "methods.png").stat().st_size > 10_000
    made = {path: path.stat().st_mtime_ns for path in small.glob("seed0/methods/*.json")}
    methods.make(small, [0])
    assert {path: path.stat().st_mtime_ns for path in small.glob("seed0/methods/*.json")} == made


def test_a_job_that_fails_is_named_with_its_log(tmp_path):
    def job():
        raise ValueError("no such adapter")

    with pytest.raises(methods.UserError, match=r"one\.log says why"):
        methods.once(tmp_path / "one.json", job)
    assert "no such adapter" in (tmp_path / "one.log").read_text(encoding="utf-8")
    assert methods.once(tmp_path / "one.json", dict) == {}  # the next start tries again
