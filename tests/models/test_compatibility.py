"""Base, adapters and tokenizer that do not belong together are refused before weights load: no base here has any."""

import json
import re
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from recipes.cli.errors import UserError
from recipes.models.compatibility import check_model, check_reward_base, check_vocabulary
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer
from tests import tiny_models as models
from tests.conftest import run_recipe, write_jsonl

LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Bases without weights, `base` and `wide`, and SFT and reward adapters that were made on them."""
    folder = tmp_path_factory.mktemp("files")
    sizes = {"base": {}, "wide": {"hidden_size": 48, "num_attention_heads": 4}, "deep": {"num_hidden_layers": 3}}
    for base, changes in sizes.items():
        causal, scorer = models.causal_lm(**changes), models.reward_model(**changes)
        for model in (causal, scorer):
            model.config.save_pretrained(folder / base)
            model.name_or_path = str(folder / base)
        models.word_tokenizer().save_pretrained(folder / base)
        causal.config.save_pretrained(folder / base)
        head = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA)
        adapters = {"sft": (causal, LoraConfig(task_type="CAUSAL_LM", **LORA)), "reward": (scorer, head)}
        for name, (model, config) in adapters.items():
            get_peft_model(model, config).save_pretrained(folder / f"{base}_{name}")
            models.word_tokenizer().save_pretrained(folder / f"{base}_{name}")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in models.prompts(64)])
    return {path.name: path for path in folder.iterdir()}


def on_base(files, tmp_path, adapter: str) -> Path:
    """A copy of an adapter that says it was made on `base`."""
    shutil.copytree(files[adapter], tmp_path / adapter)
    config = tmp_path / adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(files["base"])}))
    return tmp_path / adapter


def refusal(step: str, arguments: dict, files, tmp_path) -> str:
    """The one line that a recipe stops with; the output folder must not be touched."""
    arguments = {"dataset_name": files["prompts.jsonl"], "output_dir": tmp_path / "out"} | arguments
    with pytest.raises(UserError) as error:
        run_recipe(step, **arguments)
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".lock"}, (
        "nothing is left in the way of another try"
    )
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("step", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        ("wide_sft", r"lora_A.weight is \[4, 48\], where the base needs \[4, 32\]"),
        ("deep_sft", r"layers\.2\..* is \[\d+, \d+\], where the base needs nothing"),
    ],
)
def test_an_adapter_of_another_base(files, tmp_path, step, adapter, why):
    arguments = {"model_name_or_path": on_base(files, tmp_path, adapter)}
    if step == "ppo":
        arguments["reward_model_name_or_path"] = files["base_reward"]
    line = refusal(step, arguments, files, tmp_path)
    assert f"The adapter {tmp_path / adapter} does not fit the base {files['base']}" in line
    assert re.search(why, line), line


def test_a_reward_adapter_of_another_base(files, tmp_path):
    arguments = {"model_name_or_path": files["base_sft"]}
    arguments["reward_model_name_or_path"] = on_base(files, tmp_path, "wide_reward")
    line = refusal("ppo", arguments, files, tmp_path)
    assert f"The adapter {tmp_path / 'wide_reward'} does not fit the base {files['base']}" in line
    arguments["reward_model_name_or_path"] = files["wide_reward"]
    assert "was trained on the base" in refusal("ppo", arguments, files, tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model(files, tmp_path):
    shutil.copytree(files["base"], tmp_path / "base")
    models.word_tokenizer(words=70).save_pretrained(tmp_path / "base")
    line = refusal("sft", {"model_name_or_path": tmp_path / "base"}, files, tmp_path)
    assert "its token 'w59' has the id 64, and the model's vocabulary has 64 tokens" in line


@pytest.mark.parametrize("adapter", ["base_sft", "base_reward"])
def test_an_adapter_with_the_tokenizer_of_another(files, tmp_path, adapter):
    wrong = on_base(files, tmp_path, adapter)
    models.word_tokenizer(prefix="v").save_pretrained(wrong)
    names = {"base_sft": "model_name_or_path", "base_reward": "reward_model_name_or_path"}
    arguments = {name: files[adapter] for adapter, name in names.items()} | {names[adapter]: wrong}
    line = refusal("ppo", arguments, files, tmp_path)
    assert f"The tokenizer in {wrong} is another than that of {files['base']}: the token 'w" in line


def test_a_reward_adapter_that_reads_another_chat_template(files, tmp_path):
    """As one that was trained from a base without a template, for a policy that SFT has given one."""
    shutil.copytree(files["base_reward"], tmp_path / "reward")
    tokenizer = models.word_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'> '", "'> <unk> '")
    tokenizer.save_pretrained(tmp_path / "reward")
    arguments = {"model_name_or_path": files["base_sft"], "reward_model_name_or_path": tmp_path / "reward"}
    line = refusal("ppo", arguments, files, tmp_path)
    assert "was trained with another chat template than that of" in line and "--separate_reward_model true" in line


def test_a_tokenizer_that_transformers_loads_as_another_kind(tmp_path):
    """It takes qwen2's for byte-level BPE, whatever the file says, and words become nothing."""
    Qwen2Config(vocab_size=64).save_pretrained(tmp_path)
    models.word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gives no tokens for text: transformers loads it as Qwen2Tokenizer"):
        load_tokenizer(resolve_model(str(tmp_path)))


def test_a_reward_model_with_several_labels_is_refused_before_it_loads(tmp_path):
    models.reward_model(num_labels=3).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UserError, match="num_labels=3"):
        check_reward_base(resolve_model(str(tmp_path)))


def test_a_base_without_a_tokenizer_has_none_to_compare_with(tmp_path):
    """transformers makes one of special tokens only, which the adapter's own need not have."""
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    source = resolve_model(models.save_adapter(tmp_path / "adapter", tmp_path / "base"))
    check_model(source, load_tokenizer(source))


def test_what_belongs_together_passes(files):
    for name in ("base", "base_sft", "base_reward", "deep_reward"):
        source = resolve_model(str(files[name]))
        check_model(source, load_tokenizer(source))


def test_an_adapter_that_does_not_lie_in_layers_passes(tmp_path):
    base = models.save_base(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prompt")
    source = resolve_model(str(tmp_path / "prompt"))
    check_model(source, load_tokenizer(source))


def test_a_token_that_nothing_writes_may_lie_beyond_the_vocabulary(files):
    tokenizer = load_tokenizer(resolve_model(str(files["base"])))
    config = AutoModelForCausalLM.from_config(models.llama_config()).config
    tokenizer.add_tokens(["<image>"])
    check_vocabulary(tokenizer, config, "base")
    tokenizer.pad_token = "<image>"
    with pytest.raises(UserError, match="'<image>' has the id 64"):
        check_vocabulary(tokenizer, config, "base")
