"""A merged copy of the policy generates as the policy does, in any precision, and the base stays as it is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationMethod

from recipes.models.adapters import adapter_parameters, add_copy, add_score_roles
from recipes.models.loading import never_pack
from recipes.models.merged import merged_copy, unmergeable
from tests import tiny_models as models
from tests.architectures import FAMILIES


def randomise(policy) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(policy, "default").values():
            parameter.add_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_copy_gives_the_policys_logits(name):
    family = FAMILIES[name]
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": 64}
    config = AutoConfig.for_model(family.model_type, tie_word_embeddings=family.tied, **tokens, **family.config)
    policy = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules="all-linear", r=4))
    add_copy(policy, "default", "ref")
    add_score_roles(policy, {"critic": None})
    if unmergeable(policy):
        assert any("expert" in key for key in family.config), "PEFT's LoRA on the tensors of experts is left out"
        return
    randomise(policy)
    policy.eval()
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        expected = policy(input_ids=ids).logits
        copied = merged_copy(policy, torch.float32)
        torch.testing.assert_close(copied(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert type(copied) is type(policy.get_base_model()) and not hasattr(copied, "score")
    halves = {parameter.dtype for parameter in merged_copy(policy, torch.bfloat16).parameters()}
    assert halves == {torch.bfloat16}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_one_of_two_tied_embeddings_is_left_out(target):
    policy = get_peft_model(models.causal_lm(), LoraConfig(target_modules=["q_proj", target], r=4))
    assert "tied" in unmergeable(policy)
    policy = get_peft_model(models.causal_lm(tie_word_embeddings=False), policy.peft_config["default"])
    assert unmergeable(policy) is None


def test_a_base_of_another_kind_of_quantisation_is_left_out():
    """Those of FP8 were sampled from without their scales."""
    policy = get_peft_model(models.causal_lm(), LoraConfig(target_modules=["q_proj"], r=4))
    policy.get_base_model().quantization_method = QuantizationMethod.FP8
    assert unmergeable(policy) == "a base in fp8"


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
    ],
    ids=["modules_to_save", "head", "tokens"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["two matrices", "tied"])
def test_what_an_adapter_trains_besides_is_in_the_copy(lora, tied):
    if tied and lora.get("modules_to_save") == ["embed_tokens", "norm"]:
        lora = lora | {"ensure_weight_tying": True}
    policy = get_peft_model(models.causal_lm(tie_word_embeddings=tied), LoraConfig(task_type="CAUSAL_LM", r=4, **lora))
    randomise(policy)
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        expected = policy.eval()(input_ids=ids).logits
        found = merged_copy(policy, torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_weights_of_the_same_precision_are_shared_and_full_fine_tuning_is_cast():
    policy = models.causal_lm()
    policy.critic = models.reward_model()
    copied = merged_copy(policy, torch.float32)
    assert copied.model.norm.weight.data_ptr() == policy.model.norm.weight.data_ptr()
    assert not hasattr(copied, "critic") and copied.lm_head.weight is copied.model.embed_tokens.weight
    assert {p.dtype for p in merged_copy(policy, torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_layers_that_no_adapter_changes_are_whole_in_the_copy(tmp_path, bits):
    """Packed numbers of 4 bits had another shape, and those of 8 bits were sampled from without their scales."""
    models.causal_lm(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(**{bits: True})
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    policy = get_peft_model(never_pack(base), LoraConfig(target_modules=["q_proj"], r=4)).eval()
    randomise(policy)
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        expected = policy(input_ids=ids).logits.float()
        found = merged_copy(policy, torch.bfloat16)(input_ids=ids).logits.float()
        assert torch.equal(policy(input_ids=ids).logits.float(), expected), "the base is left as it was"
    assert (found - expected).norm() < 0.03 * expected.norm()
