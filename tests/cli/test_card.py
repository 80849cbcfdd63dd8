"""What a model card says of where a model is from, without what is secret or means nothing to others."""

import sys
from dataclasses import dataclass

from huggingface_hub import ModelCard

from recipes.cli.arguments import parse
from recipes.cli.card import command_line, model_card

RECORD = {
    "recipe": "ppo",
    "arguments": {
        "hub_model_id": "me/policy",
        "output_dir": "runs/ppo",
        "model_name_or_path": "runs/sft",
        "reward_model_name_or_path": "runs/reward",
        "kl_coef": 0.05,
    },
    "datasets": {"train": {"source": "org/prompts", "rows": 3}, "ptx": {"source": "a.jsonl", "rows": 2}},
    "packages": {"trl": "1.16.0"},
    "git_revision": "abc",
}


def test_a_card_names_base_data_numbers_and_code_of_an_adapter(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a_notebook"])
    history = [{"objective/kl": 0.0, "objective/scores": -1.0}, {"loss": 1.0}, {"objective/kl": 2.5}]
    card = ModelCard(model_card(RECORD, history, "org/base"))
    assert (card.data.base_model, card.data.datasets, card.data.library_name) == ("org/base", ["org/prompts"], "peft")
    assert "# policy" in card.text and "starting from `runs/sft`" in card.text and "`runs/reward`" in card.text
    assert "| `objective/kl` | 0 | 2.5 |" in card.text and "`objective/scores` | -1 | -1 |" in card.text
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/policy")' in card.text
    assert "2 rows of `a.jsonl`" in card.text and "```bash" not in card.text


def test_a_card_of_a_full_model_loads_without_peft():
    card = model_card(RECORD | {"recipe": "reward"}, [], None)
    assert "from transformers import AutoModelForSequenceClassification" in card and "A full model" in card


@dataclass
class Arguments:
    hub_token: str = ""
    eos_token: str = ""
    seed: int = 0


def test_the_command_is_written_without_secrets(monkeypatch):
    words = ["recipes/sft.py", "--hub_token", "hf_1", "--eos_token", "</s>", "--hub-token=hf_2", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", words)
    (args,) = parse((Arguments,))
    assert args == Arguments("hf_2", "</s>", 1)
    assert sys.argv == ["recipes/sft.py", "--eos_token", "</s>", "--seed", "1"], "which W&B takes from there"
    assert command_line("sft") == "python recipes/sft.py --eos_token '</s>' --seed 1"
    assert command_line("ppo") is None
