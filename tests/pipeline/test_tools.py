"""Merging adapters and talking with policies, on small random models."""

import errno
import io
import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from recipes.cli.run import holds_anything
from recipes.models.sampling import load_generator
from scripts import chat, merge_adapter
from tests import tiny_models as models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = models.save_base(folder / "base")
    models.save_adapter(folder / "policy", base, std=0.5)
    models.save_adapter(folder / "reward", base, "SEQ_CLS", std=0.5)
    (folder / "reward" / "reward_statistics.json").write_text('{"mean": 0.5, "std": 2.0}')
    return folder


def merge(source, target, **kwargs):
    merge_adapter.merge(merge_adapter.MergeArguments(str(source), str(target), **kwargs))


IDS = torch.tensor([[3, 10, 11, 12, 1]])


@torch.no_grad()
def test_a_merged_policy_gives_the_adapter_s_logits_without_peft(folders, tmp_path):
    merge(folders / "policy", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    plain = base(IDS).logits
    expected = PeftModel.from_pretrained(base, folders / "policy")(IDS).logits
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(logits, plain, atol=1e-1)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == models.CHAT_TEMPLATE
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])  # TRL trains a head without a task type, too
@torch.no_grad()
def test_a_merged_reward_model_keeps_head_and_statistics(folders, tmp_path, task_type):
    shutil.copytree(folders / "reward", tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "adapter_config.json").read_text()) | {"task_type": task_type}
    (tmp_path / "reward" / "adapter_config.json").write_text(json.dumps(config))
    merge(tmp_path / "reward", tmp_path / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(folders / "base", num_labels=1)
    adapted = PeftModel.from_pretrained(base, folders / "reward")
    adapted.config.pad_token_id = 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 1
    assert torch.allclose(merged(IDS).logits, adapted(IDS).logits, atol=1e-4)
    assert merged(IDS).logits.abs().item() > 1e-3
    assert (tmp_path / "merged" / "reward_statistics.json").read_text() == '{"mean": 0.5, "std": 2.0}'


def test_the_result_has_the_base_s_precision_unless_told(folders, tmp_path):
    shutil.copytree(folders / "policy", tmp_path / "policy")
    AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    config = tmp_path / "policy" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folders / "base"), str(tmp_path / "base")))
    for wish, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        merge(tmp_path / "policy", tmp_path / wish, dtype=wish)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / wish).dtype == dtype


def test_what_would_lose_something_is_refused(folders, tmp_path, capsys):
    with pytest.raises(UserError, match="not an adapter"):
        merge(folders / "base", tmp_path / "merged")
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        merge(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(UserError, match="nothing is ever written over"):
        merge(folders / "policy", folders / "base")
    shutil.copytree(folders / "policy", tmp_path / "qlora")
    record = {"recipe": "sft", "arguments": {"load_in_4bit": True}}
    (tmp_path / "qlora" / "train_config.yaml").write_text(yaml.safe_dump(record))
    shutil.copytree(tmp_path / "qlora", tmp_path / "ema")  # a run whose own folder has this name
    for part in (".", "checkpoint-3", "ema", "checkpoint-3/ema", "../ema"):  # the record is in the folder of the run
        shutil.copytree(folders / "policy", tmp_path / "qlora" / part, dirs_exist_ok=True)
        with pytest.raises(UserError, match="trained on a quantised base.*--allow_quantized_merge true"):
            merge(tmp_path / "qlora" / part, tmp_path / "merged")
        load_generator(ModelConfig(str(tmp_path / "qlora" / part)))
        assert "was trained on a quantised base, and on unquantised weights" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    merge(tmp_path / "qlora", tmp_path / "merged", allow_quantized_merge=True)
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_merge_that_was_killed_can_be_done_again_and_a_full_disk_leaves_nothing(folders, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(models.word_tokenizer().__class__, "save_pretrained", full)
        with pytest.raises(UserError, match="cannot be written to .*merged: .*No space left"):
            merge(folders / "policy", tmp_path / "merged")
    assert not holds_anything(tmp_path / "merged")
    torn = tmp_path / "merged" / ".unfinished" / "merged"
    torn.mkdir(parents=True)
    (torn / "half.safetensors").write_text("x")
    merge(folders / "policy", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists() and not list(tmp_path.glob("merged/**/half.safetensors"))
    (tmp_path / "broken").mkdir()
    shutil.copytree(folders / "policy", tmp_path / "broken", dirs_exist_ok=True)
    (tmp_path / "broken" / "train_config.yaml").write_text("arguments")
    with pytest.raises(UserError, match="train_config.yaml cannot be read"):
        merge(tmp_path / "broken", tmp_path / "other")


def test_a_quantised_base_is_refused(folders, tmp_path):
    shutil.copytree(folders / "policy", tmp_path / "policy")
    shutil.copytree(folders / "base", tmp_path / "base")
    for path, old, new in (
        (tmp_path / "policy" / "adapter_config.json", str(folders / "base"), str(tmp_path / "base")),
        (tmp_path / "base" / "config.json", "{", '{"quantization_config": {"quant_method": "bitsandbytes"},'),
    ):
        path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match="is quantised.*--allow_quantized_merge true"):
        merge(tmp_path / "policy", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_chat_compares_two_policies_and_forgets_on_reset(folders, monkeypatch, capsys):
    base, policy = str(folders / "base"), str(folders / "policy")
    flags = ["--model_name_or_path", base, "--compare", policy, "--max_completion_length", "5", "--temperature", "0"]
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\nw3\n/reset\nw1 w2\n\n/quit\nw9\n"))
    chat.main(*parse(chat.ARGUMENTS, flags))
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith((base, policy))]
    assert len(answers) == 6
    assert answers[0:2] == answers[4:6]
    assert answers[0].removeprefix(base) != answers[1].removeprefix(policy)
    with pytest.raises(UserError, match="unrecognized arguments: --num_generations 4"):
        parse(chat.ARGUMENTS, [*flags, "--num_generations", "4"])


def test_chat_goes_on_after_a_message_that_cannot_be_answered(folders, monkeypatch, capsys):
    long = " ".join(["w1"] * 5000)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{long}\nw1 w2\n"))
    flags = ["--model_name_or_path", str(folders / "base"), "--max_completion_length", "5", "--temperature", "0"]
    chat.main(*parse(chat.ARGUMENTS, flags))
    out, err = capsys.readouterr()
    assert "positions of the model" in err and "/reset starts a new conversation" in err
    assert len([line for line in out.splitlines() if line.startswith(str(folders / "base"))]) == 1


def test_model_text_cannot_drive_the_terminal(capsys):
    streamer = chat.SafeStreamer(models.word_tokenizer())
    streamer.on_finalized_text("a\x1b[2Jb\x07\r\nc", stream_end=True)
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\nc\n"
    text = "Bonjour\u00a0! \u6771\u3000\u4eac \u0645\u06cc\u200c\u062f"  # spaces and joiners, which were left out
    streamer.on_finalized_text(text)
    assert capsys.readouterr().out == text
