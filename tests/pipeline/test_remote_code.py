"""A base that brings its own Python code: every step and tool loads it with --trust_remote_code, and none without."""

import io
import json
from pathlib import Path

import pytest

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from scripts import chat, estimate_memory, evaluate, inspect_dataset, merge_adapter, sample_responses
from tests import tiny_models as models
from tests.conftest import flags, recipe_line, run_recipe
from tests.pipeline.conftest import ppo_arguments, reward_arguments, sft_arguments

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """
import torch
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnForSequenceClassification(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        states = self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        places = torch.arange(input_ids.size(1), device=input_ids.device)
        last = (places * (input_ids != self.config.pad_token_id)).argmax(1)
        return SequenceClassifierOutputWithPast(logits=self.score(states[torch.arange(len(states)), last]))
"""


@pytest.fixture(scope="module")
def remote(data, tmp_path_factory) -> dict[str, str]:
    """`data` with a base whose classes transformers does not have."""
    folder = tmp_path_factory.mktemp("remote")
    base = Path(models.save_base(folder / "base"))
    (base / "configuration_own.py").write_text(CONFIGURATION)
    (base / "modeling_own.py").write_text(MODELING)
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    classes["AutoModelForSequenceClassification"] = "modeling_own.OwnForSequenceClassification"
    config |= {"model_type": "own_llama", "auto_map": classes, "architectures": ["OwnForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    return data | {"base": str(base)}


TRUST = {"trust_remote_code": "true"}


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", ["true", "false"])
def test_the_three_steps_take_code_of_the_base(remote, tmp_path, use_peft):
    """PPO with the reward model as critic, resumed from a checkpoint, and with a critic made from the policy."""
    options = TRUST | {"use_peft": use_peft, "max_steps": 2}
    run_recipe("sft", **sft_arguments(remote, tmp_path / "sft", **options))
    run_recipe("reward", **reward_arguments(remote, tmp_path / "sft", tmp_path / "reward", **options))
    run_recipe("ppo", **ppo_arguments(remote, tmp_path, tmp_path / "ppo", **options, save_steps=1))
    resumed = options | {"resume_from_checkpoint": tmp_path / "ppo" / "checkpoint-1"}
    run_recipe("ppo", **ppo_arguments(remote, tmp_path, tmp_path / "resumed", **resumed, save_steps=1))
    only_functions = options | {
        "reward_funcs": "tests.pipeline.test_remote_code.brief",
        "model_name_or_path": remote["base"],
    }
    arguments = ppo_arguments(remote, tmp_path, tmp_path / "functions", **only_functions)
    del arguments["reward_model_name_or_path"]
    run_recipe("ppo", **arguments)
    with pytest.raises(UserError, match="comes with Python code.*--trust_remote_code true"):
        run_recipe(
            "ppo",
            **ppo_arguments(remote, tmp_path, tmp_path / "untrusted", **options | {"trust_remote_code": "false"}),
        )


def brief(prompts, completions, **kwargs):
    return [-float(len(completion[0]["content"])) for completion in completions]


def test_the_tools_take_code_of_the_base(remote, tmp_path, monkeypatch, capsys):
    adapter, prompts = models.save_adapter(tmp_path / "adapter", remote["base"], trust=True), remote["prompts"]
    reward = models.save_adapter(tmp_path / "reward", remote["base"], "SEQ_CLS", trust=True)
    short = flags(**TRUST, max_completion_length=4)
    line = flags(model_name_or_path=adapter, dataset_name=prompts, output=tmp_path / "samples.jsonl")
    sample_responses.main(*parse(sample_responses.ARGUMENTS, [*line, *short]))
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n"))
    chat.main(*parse(chat.ARGUMENTS, flags(model_name_or_path=adapter, compare=remote["base"]) + short))
    merge_adapter.merge(merge_adapter.MergeArguments(adapter, str(tmp_path / "merged"), trust_remote_code=True))
    assert inspect_dataset.main([prompts, "--task", "prompt", *flags(tokenizer=remote["base"], **TRUST)]) == 0
    line = flags(policies=[f"base={remote['base']}", f"sft={adapter}"], reward_model_name_or_path=reward)
    line += flags(dataset_name=prompts, output_dir=tmp_path / "evaluation", num_prompts=4, num_generations=2)
    monkeypatch.setattr("sys.argv", ["evaluate.py", *line, *short])
    evaluate.main()
    line = recipe_line("ppo", model_name_or_path=remote["base"], use_peft="false", **TRUST)
    monkeypatch.setattr("sys.argv", ["estimate_memory.py", *line])
    with pytest.raises(SystemExit) as end:
        estimate_memory.main()
    assert end.value.code == 0 and "fits" in capsys.readouterr().out
