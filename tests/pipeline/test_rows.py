"""What the recipes say about their rows: what trained, what was left out, and what is too little for a step."""

import json
import re

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.cli.errors import UserError
from tests import tiny_models as models
from tests.conftest import run_recipe, write_jsonl
from tests.pipeline.conftest import ppo_arguments, ranking, reward_arguments, sft_arguments


def words(number: int) -> str:
    return " ".join(["w1"] * number)


def demonstrations(path, *lengths: int) -> str:
    return write_jsonl(path, [{"prompt": words(length), "completion": "w2 w3"} for length in lengths])


def records(folder) -> tuple[dict, dict]:
    """The data report and train_config.yaml of a run."""
    report = json.loads((folder / "data_report_train.json").read_text(encoding="utf-8"))
    return report, yaml.safe_load((folder / "train_config.yaml").read_text(encoding="utf-8"))


def test_sft_reports_what_trained(data, tmp_path):
    rows = demonstrations(tmp_path / "rows.jsonl", *[3] * 20, *[30] * 15, *[10] * 5)
    own = {"dataset_name": rows, "max_length": 15, "num_train_epochs": 1, "save_strategy": "no"}
    trainer = run_recipe("sft", **sft_arguments(data, tmp_path / "sft", **own))
    report, config = records(tmp_path / "sft")
    assert (report["rows_in"], report["rows_out"], len(report["skipped"])) == (40, 25, 15)
    assert report["flags_by_reason"]["cut at max_length=15 tokens"] == 5
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    assert report["used"] == config["used"] == {"train": {"rows": 25, "tokens": tokens}}
    assert config["setup"]["training_rows"] == 25 and report["tokens"] == tokens
    card = (tmp_path / "sft" / "README.md").read_text(encoding="utf-8")
    assert f"Training on 25 rows, {tokens} tokens." in card


def test_the_reward_model_reports_what_trained(data, runs, tmp_path):
    """Two of three responses to a prompt may be too long, and the held-out rows take no part in the statistics."""
    rows = []
    for number, prompt in enumerate(models.prompts(20)):
        texts = [f"w{number} w2", f"w{number + 20} w4", words(60) if number < 10 else "w6"]
        rows.append(ranking(str(number), prompt, texts))
    own = {"rankings": write_jsonl(tmp_path / "rankings.jsonl", rows)}
    more = {"max_length": 40, "save_strategy": "no"}
    trainer = run_recipe("reward", **reward_arguments(data | own, runs / "sft", tmp_path / "reward", **more))
    report, config = records(tmp_path / "reward")
    assert report["skipped_by_reason"] == {"a response is longer than max_length=40 tokens": 10}
    assert report["used"] == config["used"]
    counts = report["used"]["train"]
    assert counts["rows"] == len(trainer.train_dataset) < 20
    assert counts["responses"] == sum(map(len, trainer.train_dataset["response_ids"]))
    assert counts["responses"] + report["used"]["eval"]["responses"] == 50
    statistics = json.loads((tmp_path / "reward" / "reward_statistics.json").read_text(encoding="utf-8"))
    assert statistics["n"] == counts["responses"]


@pytest.mark.parametrize("prompts", [1, 2, 6])
def test_a_few_rankings_train_a_reward_model_that_says_what_it_learned(data, runs, tmp_path, capsys, prompts):
    rows = [ranking(str(i), prompt, ["w2 w2", "w2", "w4", "w6"]) for i, prompt in enumerate(models.prompts(prompts))]
    own = {"rankings": write_jsonl(tmp_path / "rankings.jsonl", rows)}
    more = {"test_split_size": 0.1, "load_best_model_at_end": False}
    run_recipe("reward", **reward_arguments(data | own, runs / "sft", tmp_path / "reward", **more))
    shown = capsys.readouterr()
    said = shown.out + shown.err
    assert bool(re.search(r"orders \d+ of \d+ held-out pairs? as the labeler did", said)) == (prompts > 1)
    assert ("only one prompt" in said) == (prompts == 1)
    assert said.count("  rank ") == 4
    assert (tmp_path / "reward" / "eval_results.json").exists() == (prompts > 1)


def test_the_last_evaluation_is_not_done_twice(data, runs, tmp_path, monkeypatch):
    from recipes.trainers.ranking_trainer import RankingRewardTrainer

    calls = []
    evaluate = RankingRewardTrainer.evaluate
    monkeypatch.setattr(RankingRewardTrainer, "evaluate", lambda *args, **kw: calls.append(1) or evaluate(*args, **kw))
    own = {"num_train_epochs": 1, "eval_strategy": "epoch"}
    trainer = run_recipe("reward", **reward_arguments(data, runs / "sft", tmp_path / "reward", **own))
    assert len(calls) == 1
    results = json.loads((tmp_path / "reward" / "eval_results.json").read_text(encoding="utf-8"))
    assert results["eval_accuracy"] == trainer.evaluate()["eval_accuracy"]


def test_a_trained_reward_model_is_saved_before_it_is_evaluated(data, runs, tmp_path, monkeypatch):
    from recipes.trainers.ranking_trainer import RankingRewardTrainer

    def fails(self):
        raise MemoryError("no room for the evaluation")

    monkeypatch.setattr(RankingRewardTrainer, "final_evaluation", fails)
    own = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "test_split_size": 0}
    with pytest.raises(MemoryError):
        run_recipe("reward", **reward_arguments(data, runs / "sft", tmp_path / "reward", **own))
    assert (tmp_path / "reward" / "adapter_model.safetensors").exists()


def test_majority_is_made_of_the_held_out_rankings_too(data, runs, tmp_path):
    rows = []
    for number, prompt in enumerate(models.prompts(20)):
        for annotator in "abc":
            rows.append(ranking(str(number), prompt, ["w2 w3", "w4", "w6"]) | {"annotator": annotator})
    own = {"rankings": write_jsonl(tmp_path / "rankings.jsonl", rows)}
    more = {"aggregation": "majority", "save_strategy": "no"}
    run_recipe("reward", **reward_arguments(data | own, runs / "sft", tmp_path / "reward", **more))
    used = records(tmp_path / "reward")[1]["used"]
    assert used["train"]["rows"] + used["eval"]["rows"] == 20


def test_prompts_have_to_fit_the_reward_model_too(data, runs, tmp_path):
    """Absolute positions beyond its last one end in an index error in the first rollout."""
    models.reward_model(max_position_embeddings=32).save_pretrained(tmp_path / "judge")
    models.word_tokenizer().save_pretrained(tmp_path / "judge")
    own = {"reward_model_name_or_path": tmp_path / "judge", "max_completion_length": 30}
    with pytest.raises(UserError, match="--max_completion_length 30 are more than the 32 positions of the model"):
        run_recipe("ppo", **ppo_arguments(data, runs, tmp_path / "ppo", **own))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [{"role": "system", "content": "w3"}, {"role": "user", "content": "w1"}]}, "does not take"),
        ({"prompt": words(120)}, "123 tokens and --max_completion_length 8 are more than the 128 positions"),
    ],
    ids=["template", "length"],
)
def test_ppo_tries_every_prompt_before_the_first_step(data, runs, tmp_path, monkeypatch, row, message):
    def refuse(*_args, **_kwargs):
        pytest.fail("models were loaded before the prompts were tried")

    monkeypatch.setattr("recipes.ppo.load_ppo_models", refuse)
    rows = [{"prompt": prompt} for prompt in models.prompts(20)]
    path = write_jsonl(tmp_path / "prompts.jsonl", [*rows[:11], row, *rows[11:]])
    template = (runs / "sft" / "chat_template.jinja").read_text(encoding="utf-8")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turns') }}{% endif %}"
    monkeypatch.setattr("recipes.ppo.load_tokenizer", lambda _: with_template(refusal + template))
    with pytest.raises(UserError, match=rf"prompts\.jsonl:12: .*{message}"):
        run_recipe("ppo", **ppo_arguments(data | {"prompts": path}, runs, tmp_path / "ppo"))


def with_template(template: str):
    tokenizer = models.word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ({"per_device_train_batch_size": 100}, "--per_device_train_batch_size 24 --steps_per_generation 2,?"),
        ({"steps_per_generation": 64}, "--per_device_train_batch_size 48 --steps_per_generation 1"),
    ],
)
def test_too_few_prompts_for_a_rollout_are_said_with_what_fits(data, runs, tmp_path, monkeypatch, arguments, flags):
    monkeypatch.setattr("recipes.ppo.load_ppo_models", lambda *_: pytest.fail("models were loaded first"))
    with pytest.raises(UserError, match=rf"the dataset has 48 to train on: .*{flags}"):
        run_recipe("ppo", **ppo_arguments(data, runs, tmp_path / "ppo", **arguments))


@pytest.mark.parametrize("step", ["reward", "ppo"])
def test_a_stream_is_refused_in_one_line_where_it_cannot_train(data, runs, tmp_path, step):
    arguments = {"reward": reward_arguments(data, runs / "sft", tmp_path), "ppo": ppo_arguments(data, runs, tmp_path)}
    with pytest.raises(UserError, match="--dataset_streaming true: only recipes/sft.py"):
        run_recipe(step, **arguments[step], dataset_streaming=True)


def test_three_rows_train_and_say_that_they_fill_no_step(data, tmp_path, capsys):
    rows = demonstrations(tmp_path / "rows.jsonl", 3, 4, 5)
    own = {"dataset_name": rows, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = run_recipe("sft", **sft_arguments(data, tmp_path / "sft", **own))
    said = capsys.readouterr().out
    assert "A step takes 16 rows and the dataset has 3" in said and "--per_device_train_batch_size 3" in said
    assert "The run has 2 steps and --warmup_steps is 5" in said
    assert trainer.state.global_step == 2


def test_an_epoch_without_a_step_is_refused(data, tmp_path):
    own = {"dataset_name": demonstrations(tmp_path / "rows.jsonl", 3, 4, 5), "dataloader_drop_last": True}
    with pytest.raises(UserError, match="a batch has 8 rows, the dataset 3.*--per_device_train_batch_size 3"):
        run_recipe("sft", **sft_arguments(data, tmp_path / "sft", **own))


def test_rows_that_assistant_only_loss_leaves_out_are_counted_aloud(tiny_base, tmp_path, capsys):
    rows = [{"prompt": "Name a pet.", "completion": text} for text in ("A cat.", "A <|end|> dog.", "A cow.")]
    own = {"model_name_or_path": tiny_base, "dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows)}
    own |= {"assistant_only_loss": True, "num_train_epochs": 1, "save_strategy": "no"}
    trainer = run_recipe("sft", **sft_arguments({"base": "", "demonstrations": ""}, tmp_path / "sft", **own))
    assert len(trainer.train_dataset) == 2
    said = (
        "skipped 1: special token '<|end|>' in the assistant turn, which --assistant_only_loss true takes for the end"
    )
    assert said in capsys.readouterr().err


def test_ptx_takes_the_users_rules_and_its_own_split(data, runs, tmp_path):
    folder = tmp_path / "ptx"
    folder.mkdir()
    rows = [{"prompt": f"w{number}", "completion": "w2"} for number in range(8)]
    write_jsonl(folder / "test.jsonl", [*rows, rows[0], {"prompt": 5}])
    write_jsonl(folder / "train.jsonl", rows[:1])
    own = {"ptx_dataset_name": folder, "ptx_coef": 0.1, "ptx_dataset_split": "test", "max_steps": 1}
    own |= {"on_error": "skip", "dedup": "drop", "save_strategy": "no"}
    run_recipe("ppo", **ppo_arguments(data, runs, tmp_path / "ppo", **own))
    report = json.loads((tmp_path / "ppo" / "data_report_ptx.json").read_text(encoding="utf-8"))
    assert (report["rows_in"], report["rows_out"]) == (10, 8)


def template_folder(path, *new: str) -> str:
    """A tokenizer with another template, in which the tokens `new` stand."""
    tokenizer = models.word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", *new]})
    tokenizer.chat_template = "".join(f"{token} " for token in new) + models.CHAT_TEMPLATE.replace("' <eos> '", "' '")
    tokenizer.chat_template += "{% if not add_generation_prompt %}<eos>{% endif %}"
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_template_folder_that_adds_tokens_is_refused_for_an_adapter(data, tmp_path):
    own = {"chat_template_path": template_folder(tmp_path / "template", "<|im_start|>")}
    with pytest.raises(UserError, match=r"adds 1 token that .* does not have \(<\|im_start\|>\)"):
        run_recipe("sft", **sft_arguments(data, tmp_path / "run", **own))


def test_a_template_folder_without_new_tokens_leaves_the_base_as_it_is(data, tmp_path):
    folder = template_folder(tmp_path / "template")
    own = {"chat_template_path": folder, "num_train_epochs": 1, "save_strategy": "no"}
    trainer = run_recipe("sft", **sft_arguments(data, tmp_path / "run", **own))
    first = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert first.count("<eos>") == 1 and first.endswith("<eos>")
    assert not [name for name in load_file(tmp_path / "run" / "adapter_model.safetensors") if "embed" in name]
    assert records(tmp_path / "run")[1]["arguments"]["chat_template_path"] == folder
    AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "run"))


def test_full_fine_tuning_trains_the_tokens_that_a_template_adds(data, tmp_path):
    own = {"chat_template_path": template_folder(tmp_path / "template", "<|im_start|>"), "use_peft": False}
    own |= {"num_train_epochs": 1, "save_strategy": "no", "learning_rate": 1e-2}
    run_recipe("sft", **sft_arguments(data, tmp_path / "run", **own))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    token = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.apply_chat_template(models.prompts(1)[0])["input_ids"][0] == token
    assert model.get_input_embeddings().weight.size(0) > token
