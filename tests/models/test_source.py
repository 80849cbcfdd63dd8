"""What a model path turns out to be, and that it is found out once."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import IA3Config
from trl import ModelConfig

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from recipes.models import source
from recipes.models.adapters import new_adapter_config
from recipes.models.compatibility import refuse_other_adapter
from recipes.models.loading import load_policy, load_reward_trainee
from recipes.models.source import ModelSource, resolve_model, same_weights
from recipes.models.tokenization import load_tokenizer
from tests import tiny_models as models
from tests.conftest import flags, run_recipe, write_jsonl


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A base, a full reward model, and the adapters `sft` and `reward` on the base."""
    folder = tmp_path_factory.mktemp("models")
    base = models.save_base(folder / "base")
    models.reward_model().save_pretrained(folder / "full_reward")
    models.save_adapter(folder / "sft", base, r=3)
    models.save_adapter(folder / "reward", base, "SEQ_CLS", r=4)
    return folder


def test_a_base_an_adapter_and_a_reward_model_are_told_apart(folders):
    base, sft, reward, full = (resolve_model(str(folders / name)) for name in ("base", "sft", "reward", "full_reward"))
    assert (base.base, full.base) == (None, None)
    assert sft.base == reward.base == sft.weights == base.weights == str(folders / "base")
    assert [each.has_score_head for each in (base, sft, reward, full)] == [False, False, True, True]
    assert (sft.peft_config.r, reward.peft_config.r) == (3, 4)
    assert sft.config.model_type == "llama" and sft.config.architectures == ["LlamaForCausalLM"]


def test_the_same_weights(folders, tiny_base):
    base, sft, reward = (resolve_model(str(folders / name)) for name in ("base", "sft", "reward"))
    assert same_weights(sft, reward) and same_weights(base, resolve_model(f"{folders / 'base'}/"))
    assert not same_weights(sft, resolve_model(tiny_base))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (None, "there is no folder .*adapter, and the Hub did not give such a model"),
        ("{", "adapter_config.json cannot be read"),
        ("[]", "adapter_config.json cannot be read"),
        ({}, "names no base model"),
        (
            {"base_model_name_or_path": "runs/none/at/all"},
            "on the base runs/none/at/all, .*run from where that path is valid, .*: there is no folder runs/none/",
        ),
    ],
)
def test_what_is_no_model_is_one_line(tmp_path, config, problem):
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        assert resolve_model(str(tmp_path / "adapter")).config
    assert "\n" not in str(error.value)


def test_a_misspelt_folder_is_not_a_matter_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    missing = ModelSource("runs/stf")
    loads = [lambda: missing.config, lambda: load_tokenizer(missing), lambda: load_policy(missing, ModelConfig())]
    for load in (lambda: resolve_model("runs/stf").config, *loads):
        with pytest.raises(UserError, match=r"here is no folder runs/stf in .*\(did you mean runs/sft\?\)") as error:
            load()
        assert "connect" not in str(error.value) and "\n" not in str(error.value)


def test_a_new_adapter_is_on_all_linear_layers(folders):
    """Also of a family that PEFT's own table does not know; there TRL's default ends in a ValueError."""
    assert new_adapter_config(ModelConfig(use_peft=True)).target_modules == "all-linear"
    assert new_adapter_config(ModelConfig()) is None
    base = resolve_model(str(folders / "base"))
    model = load_policy(base, ModelConfig(use_peft=True))
    assert len(model.targeted_module_names) == 7 * model.config.num_hidden_layers
    for value in (["q_proj"], "q_proj", r".*\.q_proj"):  # a single name is no pattern of whole paths
        model = load_policy(base, ModelConfig(use_peft=True, lora_target_modules=value))
        assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"q_proj"}


def test_one_launch_of_ppo_resolves_each_model_once(folders, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in models.prompts(8)])
    found, find = [], source.adapter_config
    monkeypatch.setattr(source, "adapter_config", lambda name: found.append(name) or find(name))
    run_recipe(
        "ppo",
        model_name_or_path=folders / "sft",
        reward_model_name_or_path=folders / "reward",
        dataset_name=tmp_path / "prompts.jsonl",
        output_dir=tmp_path / "out",
        per_device_train_batch_size=8,
        max_completion_length=4,
        max_steps=1,
        save_strategy="no",
    )
    assert found == [str(folders / "sft"), str(folders / "reward")]


@pytest.mark.parametrize("load", [load_policy, load_reward_trainee])
def test_an_adapter_that_goes_on_is_not_another_one(folders, load):
    sft = resolve_model(str(folders / "sft"))
    with pytest.raises(UserError, match=r"--lora_r 8: .*sft is an adapter with 3, .* Leave lora_r out"):
        load(sft, ModelConfig(use_peft=True, lora_r=8))
    for default in ({"lora_r": 16}, {"lora_dropout": 0.05}):  # ModelConfig's, given
        (args,) = parse((ModelConfig,), flags(model_name_or_path=folders / "sft", use_peft="true", **default))
        with pytest.raises(UserError, match="is an adapter with"):
            load(sft, args)
    other_kind = SimpleNamespace(base="base", peft_config=IA3Config())
    refuse_other_adapter(other_kind, ModelConfig(use_peft=True))  # which has no rank
    for same in (ModelConfig(use_peft=True), ModelConfig(use_peft=True, lora_r=3)):
        assert load(sft, same).peft_config["default"].r == 3


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def narrow(folders) -> Path:
    """An adapter on one kind of layer, which also trains the embeddings."""
    parts = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    return Path(models.save_adapter(folders / "narrow", str(folders / "base"), **parts))


@pytest.mark.parametrize(
    ("adapter", "same", "others"),
    [
        ("sft", ["all-linear", ALL, r".*_proj"], [ALL[1:], "q_proj", [*ALL, "embed_tokens"], ["nowhere"]]),
        ("reward", ["all-linear", ALL], [["q_proj", "v_proj"]]),
        ("narrow", ["q_proj", ["q_proj"], r"model\..*\.q_proj"], ["all-linear", ["q_proj", "v_proj"]]),
    ],
)
def test_the_layers_of_an_adapter_that_goes_on_are_those_that_were_asked_for(folders, narrow, adapter, same, others):
    """Compared by the layers that names, a pattern or `all-linear` stand for: an adapter stores what was found."""
    source = resolve_model(str(folders / adapter))
    for value in same:
        refuse_other_adapter(source, ModelConfig(use_peft=True, lora_target_modules=value))
    for value in others:
        with pytest.raises(UserError, match=f"--lora_target_modules .*{adapter} is an adapter with .*q_proj"):
            refuse_other_adapter(source, ModelConfig(use_peft=True, lora_target_modules=value))


def test_what_else_an_adapter_that_goes_on_trains_is_what_was_asked_for(folders, narrow):
    sft, reward, narrow = (resolve_model(str(folders / name)) for name in ("sft", "reward", "narrow"))
    for adapter, modules in (
        (sft, ["score"]),  # TRL's habit; the reward recipe trains the head anyway
        (reward, ["score"]),
        (narrow, ["embed_tokens"]),
        (narrow, ["model.embed_tokens"]),
    ):
        refuse_other_adapter(adapter, ModelConfig(use_peft=True, lora_modules_to_save=modules))
    for adapter, modules in ((sft, ["embed_tokens"]), (reward, ["norm", "score"]), (narrow, ["norm"])):
        with pytest.raises(UserError, match="--lora_modules_to_save .* is an adapter with"):
            refuse_other_adapter(adapter, ModelConfig(use_peft=True, lora_modules_to_save=modules))
    with pytest.raises(UserError, match="--lora_target_parameters q_proj.weight: .*sft is an adapter with None"):
        refuse_other_adapter(sft, ModelConfig(use_peft=True, lora_target_parameters=["q_proj.weight"]))


@pytest.mark.parametrize("load", [load_policy, load_reward_trainee])
def test_an_adapter_goes_on_with_the_yaml_that_it_was_made_with(folders, load):
    args = ModelConfig(use_peft=True, lora_r=3, lora_target_modules="all-linear", dtype="float32")
    assert load(resolve_model(str(folders / "sft")), args).peft_config["default"].r == 3


def test_the_revision_of_a_base_stays_with_its_adapter(folders, tmp_path):
    """Else the next step would train the same adapter on the newest weights of the base, without a word."""
    base = replace(resolve_model(str(folders / "base")), revision="step3")  # as if it were on the Hub
    for number, load in enumerate((load_policy, load_reward_trainee)):
        load(base, ModelConfig(use_peft=True, lora_r=2)).save_pretrained(tmp_path / str(number))
        again = resolve_model(str(tmp_path / str(number)))
        assert again.revision == again.peft_config.revision == "step3"
        with pytest.raises(UserError, match="--model_revision step4: .* is an adapter on the revision step3 of"):
            resolve_model(str(tmp_path / str(number)), "step4")
    for name in ("base", "sft"):
        with pytest.raises(UserError, match="--model_revision step4: .*base is a folder, which has no revisions"):
            resolve_model(str(folders / name), "step4")
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}  # does not say
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert resolve_model(str(tmp_path), "step4").revision == "step4"
    assert not same_weights(ModelSource("a", "org/base", "step3"), ModelSource("b", "org/base", "main"))


@pytest.mark.parametrize("name", ["reward", "full_reward"])
def test_a_reward_model_is_no_policy(folders, name):
    with pytest.raises(UserError, match=f"{name} is a reward model, which gives scores"):
        load_policy(resolve_model(str(folders / name)), ModelConfig(use_peft=True))
