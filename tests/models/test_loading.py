"""The models of PPO in full fine-tuning: what the critic starts from, by size, vocabulary and configuration."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    ModernBertDecoderConfig,
)
from trl import ModelConfig

from recipes.cli.errors import UserError
from recipes.models.adapters import use_role
from recipes.models.heads import critic_from_policy, scores_at
from recipes.models.loading import load_policy, load_ppo_models, load_reward_model, load_reward_trainee
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer
from tests import tiny_models as models


def gemma3(**changes) -> Gemma3Config:
    """A configuration of a text and a vision part, which has no `vocab_size` of its own."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    return Gemma3Config(text_config=text | changes, vision_config=vision, mm_tokens_per_image=4, num_labels=1)


CONFIGS = {"llama": lambda **changes: models.llama_config(num_labels=1, **changes), "gemma3": gemma3}
LARGER = {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 12}


def saved(folder, auto_class, config, words=59) -> str:
    auto_class.from_config(config).save_pretrained(folder)
    models.word_tokenizer(words=words).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("reward", ["same", "larger", "deeper", "other words"])
def test_only_a_reward_model_of_the_policy_s_size_and_vocabulary_becomes_the_critic(tmp_path, capsys, family, reward):
    changes = {"larger": LARGER, "deeper": {"num_hidden_layers": 3}}.get(reward, {})
    base = saved(tmp_path / "base", AutoModelForCausalLM, CONFIGS[family]())
    scorer = CONFIGS[family](**changes)
    words = 58 if reward == "other words" else 59
    scorer = saved(tmp_path / "reward", AutoModelForSequenceClassification, scorer, words)
    loaded = load_ppo_models(
        resolve_model(base), resolve_model(scorer), ModelConfig(use_peft=False, dtype="float32"), False
    )
    assert ("value_model" in loaded) == (reward == "same")
    assert ("The critic starts from the policy" in capsys.readouterr().err) == (reward != "same")
    if reward == "same":
        return
    critic, ids = critic_from_policy(loaded["model"]), torch.randint(5, 60, (2, 6))
    states = torch.arange(2), torch.tensor([5, 3])
    assert scores_at(critic, ids, states).tolist() == [0, 0]
    hidden = [model.base_model(input_ids=ids).last_hidden_state for model in (critic, loaded["model"])]
    torch.testing.assert_close(*hidden)


def test_the_critic_of_a_half_precision_policy_reads_positions_as_the_policy_does():
    """`to` rounds the frequencies of rotary embeddings, which `from_pretrained` leaves in float32."""
    policy = AutoModelForCausalLM.from_config(models.llama_config(), dtype=torch.bfloat16)
    critic = critic_from_policy(policy)
    assert critic.dtype == torch.bfloat16
    assert torch.equal(critic.model.rotary_emb.inv_freq, policy.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("load", "lost"),
    [
        (load_policy, "model.norm.weight"),
        (load_reward_trainee, "model.norm.weight"),
        (load_reward_model, "score.weight"),
    ],
)
def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path, load, lost):
    """transformers only reports them; TRL hides that the head of a reward model is one of them."""
    kind = models.reward_model if load is load_reward_model else models.causal_lm
    kind().save_pretrained(tmp_path)
    models.word_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"has no {lost} for its Llama.*random numbers \(1 weight in all\)"):
        load(resolve_model(str(tmp_path)), ModelConfig(use_peft=True, dtype="float32"))


def test_a_classifier_with_a_head_of_another_kind_is_named(tmp_path):
    """Its missing head is no fault of the base's files."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    config = ModernBertDecoderConfig(**sizes, **tokens, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ModernBertDecoderForSequenceClassification has no linear `score` head"):
        load_reward_trainee(resolve_model(str(tmp_path)), ModelConfig(dtype="float32"))


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"attn_implementation": "flash_attention_2"}, "could not be loaded: FlashAttention2"),
        ({"lora_task_type": "SEQ_CLS"}, "--lora_task_type SEQ_CLS is for reward models"),
    ],
)
def test_an_argument_that_a_policy_cannot_have_is_one_line(tmp_path, args, line):
    base = resolve_model(models.save_base(tmp_path / "base"))
    with pytest.raises(UserError, match=line) as error:
        load_policy(base, ModelConfig(use_peft=True, dtype="float32", **args))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("load", "task"),
    [(load_policy, "CAUSAL_LM"), (load_reward_trainee, "CAUSAL_LM"), (load_reward_trainee, "SEQ_CLS")],
)
def test_full_fine_tuning_from_an_adapter_trains_every_weight(tmp_path, load, task):
    """Merging leaves the base frozen: the reward model trained its head alone, and PPO its critic, without a word."""
    base = models.save_base(tmp_path / "base")
    adapter = models.save_adapter(tmp_path / "adapter", base, task, std=0.1)
    model = load(resolve_model(adapter), ModelConfig(use_peft=False, dtype="float32"))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_starts_from_sft_that_trained_the_lm_head(tmp_path, capsys, tied):
    """As with `lora_modules_to_save: [embed_tokens, lm_head]`, for tokens that a chat template needs."""
    base = models.save_base(tmp_path / "base", tie_word_embeddings=tied)
    parts = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    sft = resolve_model(models.save_adapter(tmp_path / "sft", base, std=0.1, **parts))
    args = ModelConfig(use_peft=True, dtype="float32", lora_modules_to_save=["embed_tokens", "lm_head"])
    reward = load_reward_trainee(sft, args)
    assert "lm_head.weight of" in capsys.readouterr().err
    reward.save_pretrained(tmp_path / "reward")
    policy = load_ppo_models(sft, resolve_model(str(tmp_path / "reward")), args, False)["model"].eval()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad(), use_role(policy, "reward"):
        hidden = policy.get_base_model().base_model(input_ids=ids).last_hidden_state
        score = policy.get_base_model().score.modules_to_save["reward"](hidden)[0, -1]
    reward.config.pad_token_id = 0
    torch.testing.assert_close(reward.eval()(input_ids=ids).logits[0], score)


@pytest.mark.parametrize("separate", [False, True])
def test_a_reward_adapter_that_pads_with_eos_keeps_that(tmp_path, separate):
    base = models.save_base(tmp_path / "base")
    reward = models.save_adapter(tmp_path / "reward", base, "SEQ_CLS", std=0.1)
    models.word_tokenizer(pad_token="<eos>").save_pretrained(reward)
    args = ModelConfig(use_peft=True, dtype="float32")
    loaded = load_ppo_models(resolve_model(base), resolve_model(reward), args, separate)
    assert loaded["reward_processing_class"].pad_token == "<eos>"


def test_a_reward_model_without_a_chat_template_is_named(tmp_path, capsys):
    models.reward_model().save_pretrained(tmp_path)
    for template, lines in ((None, 1), (models.CHAT_TEMPLATE, 0)):
        tokenizer = models.word_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        load_reward_model(resolve_model(str(tmp_path)), ModelConfig(dtype="float32"))
        assert capsys.readouterr().err.count("has no chat template and reads turns") == lines


def test_a_reward_model_that_pads_with_eos_is_read_where_it_was_trained(tmp_path):
    """That is before the EOS; with another padding token its scores would come from a token that never had any."""
    tokenizer, model = models.word_tokenizer(pad_token="<eos>"), models.reward_model()
    model.config.pad_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_reward_model(resolve_model(str(tmp_path)), ModelConfig(dtype="float32"))
    ids = torch.tensor([[3, 6, 7, 1]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded_tokenizer.pad_token == "<eos>"


@pytest.mark.parametrize("load", [load_policy, load_reward_trainee])
@pytest.mark.parametrize("layers", ["all-linear", ["q_proj", "v_proj"], None])
def test_parts_for_images_are_not_trained_on_text(tmp_path, load, layers):
    """They get no gradient, for which DDP waits; names of layers are often the same in both parts."""
    base, use_peft = saved(tmp_path / "base", AutoModelForCausalLM, gemma3()), layers is not None
    args = ModelConfig(use_peft=use_peft, dtype="float32", lora_target_modules=layers)
    model, ids = load(resolve_model(base), args), torch.arange(5, 17)[None]
    model.config.get_text_config().pad_token_id = 0
    output = model(input_ids=ids).logits
    output.sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) >= 2 * 2 * 2 and not [name for name, parameter in trained.items() if parameter.grad is None]
    if use_peft:
        model.save_pretrained(tmp_path / "adapter")
        load_reward_trainee(resolve_model(str(tmp_path / "adapter")), args)  # the layers are what it has


def test_an_adapter_on_layers_that_are_not_there_is_one_line(tmp_path):
    base = resolve_model(models.save_base(tmp_path / "base"))
    with pytest.raises(UserError, match="No adapter could be put on Llama.*--lora_target_modules all-linear"):
        load_policy(base, ModelConfig(use_peft=True, lora_target_modules=["c_attn"], dtype="float32"))


@pytest.mark.parametrize(
    "flag, names",
    [("target_modules", ["q_proj", "c_attn"]), ("modules_to_save", ["c_attn"]), ("target_parameters", ["c_attn"])],
)
def test_a_part_that_the_model_does_not_have_is_named(tmp_path, flag, names):
    """PEFT leaves it out in silence where another name fits."""
    base = resolve_model(models.save_base(tmp_path / "base"))
    with pytest.raises(UserError, match=f"--lora_{flag} c_attn: LlamaForCausalLM has no part of this name"):
        load_policy(base, ModelConfig(use_peft=True, dtype="float32", **{f"lora_{flag}": names}))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("a file", "config.json is a file: a model is a folder, or a name on the Hub"),
        ("no model", "the folder .* holds no config.json, so it is no model"),
        ("no type", "adapter_config.json: the peft_type None is unknown to this PEFT"),
        ("no weights", "The adapter .* has no weights"),
        ("a pickle", "The weights of the adapter .* cannot be read"),
        ("a list", "could not be loaded|cannot be read"),
        ("a newer tokenizer", "No tokenizer could be loaded from .*: data did not match"),
    ],
)
def test_what_is_no_model_is_one_line(tmp_path, kind, message):
    base = Path(models.save_base(tmp_path / "base"))
    adapter = Path(models.save_adapter(tmp_path / "adapter", str(base)))
    name = {"a file": base / "config.json", "no model": tmp_path / "empty"}.get(kind, adapter)
    (tmp_path / "empty").mkdir()
    if kind == "no type":
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    elif kind in ("no weights", "a pickle"):
        (adapter / "adapter_model.safetensors").unlink()
        if kind == "a pickle":
            (adapter / "adapter_model.bin").write_bytes(b"none")
    elif kind == "a newer tokenizer":
        file = adapter / "tokenizer.json"
        file.write_text(file.read_text().replace('"WordLevel"', '"SentenceLevel"'))
    elif kind == "a list":
        (base / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=message) as error:
        source = resolve_model(str(name))
        load_tokenizer(source)
        load_policy(source, ModelConfig(use_peft=True, dtype="float32"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_weights_that_cannot_be_read_are_one_line(tmp_path, which):
    """As those of a clone without Git LFS, or of a copy that was cut off."""
    base = models.save_base(tmp_path / "base")
    models.save_adapter(tmp_path / "adapter", base)
    (weights,) = (tmp_path / which).glob("*.safetensors")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=f"{which}.* (could not be loaded|cannot be read)") as error:
        load_policy(resolve_model(str(tmp_path / "adapter")), ModelConfig(use_peft=True, dtype="float32"))
    assert "\n" not in str(error.value) and "another" not in str(error.value)
