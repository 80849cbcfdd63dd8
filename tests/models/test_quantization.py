"""4-bit bases on a CPU: bitsandbytes must not pack their weights, which would end training, and heads stay whole."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig

from recipes.models.heads import ScoreHead
from recipes.models.loading import load_policy, load_reward_model, load_reward_trainee
from recipes.models.source import ModelSource, resolve_model
from tests import tiny_models as models

IDS = torch.tensor([[3, 10, 11, 12, 4, 20, 21, 1]])
FOUR_BITS = ModelConfig(
    load_in_4bit=True, use_peft=True, lora_r=4, lora_target_modules="all-linear", lora_dropout=0.0, dtype="float32"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> ModelSource:
    """Layers of 64 and 128, which bitsandbytes can pack."""
    folder = str(tmp_path_factory.mktemp("base"))
    models.causal_lm(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return resolve_model(folder)


def policy(base: ModelSource):
    """A policy whose adapter does something, so that all of its gradients do."""
    model = load_policy(base, FOUR_BITS)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def packed(base: ModelSource, folder) -> ModelSource:
    """A checkpoint whose weights are stored in 4 bits."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
    AutoModelForCausalLM.from_pretrained(base.path, quantization_config=quantization).save_pretrained(folder)
    models.word_tokenizer().save_pretrained(folder)
    return resolve_model(str(folder))


def quantized(model) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def gradients(model) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def roll_out(model) -> None:
    model.eval().generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("packs", [True, False], ids=["AVX512-BF16", "older CPU"])
def test_gradients_after_a_rollout_are_those_before(base, monkeypatch, packs):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: packs)
    model = policy(base)
    layers = quantized(model)
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = gradients(model)
    assert len(before) == 28 and all(gradient.any() for gradient in before.values())
    roll_out(model)
    torch.testing.assert_close(gradients(model), before)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs weights on CPUs with AVX512-BF16 only")
def test_packed_weights_have_no_gradients(base):
    """What the loader guards against; where this fails, bitsandbytes has mended it and `never_pack` can go."""
    model = policy(base)
    for layer in quantized(model):
        layer.support_avx512bf16_for_cpu = True
    before = gradients(model)
    roll_out(model)
    after = gradients(model)
    shared = before.keys() & after.keys()
    assert any((after[name] - before[name]).norm() > 0.5 * before[name].norm() for name in shared)


def test_a_base_in_its_own_precision(base):
    model = load_policy(base, replace(FOUR_BITS, dtype="auto"))
    assert len(quantized(model)) == 14 and quantized(model)[0].compute_dtype == torch.float32


def test_layers_narrower_than_a_block_run_in_eval_mode(tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    models.causal_lm().save_pretrained(tmp_path)
    roll_out(policy(resolve_model(str(tmp_path))))


@pytest.mark.parametrize("quantized_checkpoint", [False, True])
def test_the_score_head_is_not_quantised(base, tmp_path, monkeypatch, quantized_checkpoint):
    """Nor where a quantised checkpoint lists the layers that it left out, as those on the Hub do."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    source = packed(base, tmp_path) if quantized_checkpoint else base
    if quantized_checkpoint:
        assert source.config.quantization_config["llm_int8_skip_modules"] == ["lm_head"]
    model = load_reward_trainee(source, FOUR_BITS)
    head = model.get_base_model().score.modules_to_save["default"]
    assert type(head) is ScoreHead and head.weight.dtype == torch.float32
    assert len(quantized(model)) == 14
    model.config.pad_token_id = 0
    scores = model.eval()(input_ids=IDS).logits
    model.train()(input_ids=IDS).logits.sum().backward()
    assert scores.isfinite().all() and head.weight.grad.any()


def test_a_reward_adapter_on_a_quantised_checkpoint_scores_as_it_was_trained(base, tmp_path):
    """Merged into weights of 4 bits, most of it was rounded away."""
    trained = load_reward_trainee(packed(base, tmp_path / "base"), FOUR_BITS)
    torch.manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    trained.save_pretrained(tmp_path / "reward")
    trained.config.pad_token_id = 0
    model, _ = load_reward_model(resolve_model(str(tmp_path / "reward")), FOUR_BITS)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, trained.eval()(input_ids=IDS).logits)
