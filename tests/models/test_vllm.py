"""vLLM gets the merged policy, and the base that the other roles stand on stays as it is, bit by bit."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from recipes.cli.errors import UserError
from recipes.models.adapters import adapter_parameters, add_copy, add_score_roles
from recipes.models.loading import never_pack
from recipes.models.merged import merged_copy
from recipes.models.vllm import send_only_policy
from tests import tiny_models as models

KINDS = {
    "linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
}


def policy_of(base, **lora):
    torch.manual_seed(0)
    policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **lora))
    with torch.no_grad():
        for parameter in adapter_parameters(policy, "default").values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return policy


def syncs(policy, count: int = 1) -> dict[str, torch.Tensor]:
    generation = VLLMGeneration.__new__(VLLMGeneration)  # making one whole starts vLLM
    generation.model, generation._dist = policy, DistributedBackend(Accelerator(cpu=True))
    send_only_policy(generation)
    for _ in range(count):
        sent = dict(generation._iter_named_params())
    return sent


def base_weights(policy) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in policy.named_parameters()
        if "lora_" not in name and "modules_to_save" not in name and "token_adapter.trainable" not in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_is_sent_the_merged_policy_and_the_base_stays(kind, dtype):
    policy = policy_of(models.causal_lm(tie_word_embeddings=False).to(dtype), **KINDS[kind])
    expected = copy.deepcopy(policy).merge_and_unload()
    add_copy(policy, "default", "ref")
    add_score_roles(policy, {"critic": None})
    before = base_weights(policy)
    sent = syncs(policy, 20)
    assert sent.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert sent[name].dtype == dtype
        # PEFT adds in bf16, and a sum near 0 keeps little of it.
        near = {"rtol": 0.02, "atol": 1e-3} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(sent[name], parameter.data, **near, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in before.items():
        assert torch.equal(policy.get_parameter(name), value), name


def test_a_four_bit_base_is_sent_in_whole_numbers_and_stays(tmp_path):
    models.causal_lm(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    policy = policy_of(never_pack(base), target_modules="all-linear")
    before = base_weights(policy)
    sent = syncs(policy, 20)
    for name, value in before.items():
        assert torch.equal(policy.get_parameter(name), value), name
    layer = policy.get_base_model().model.layers[0].mlp.up_proj
    weight = sent["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.bfloat16 and weight.shape == (128, 64)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(x @ weight.T, layer(x), rtol=0.05, atol=0.05)
        copied = merged_copy(policy, torch.bfloat16)
        assert not getattr(copied, "is_quantized", False) and type(copied.lm_head) is torch.nn.Linear
        ids = torch.arange(2, 26).view(2, 12)
        expected = policy.eval()(input_ids=ids).logits.float()
        assert (copied(input_ids=ids).logits.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_cannot_be_merged_is_refused(lora):
    policy = policy_of(models.causal_lm(attention_bias=True), target_modules=["q_proj"], **lora)
    with pytest.raises(UserError, match="use_vllm cannot take an adapter with"):
        syncs(policy)


def test_full_fine_tuning_is_sent_without_its_critic():
    policy = models.causal_lm()
    expected = dict(copy.deepcopy(policy).named_parameters())
    policy.critic = models.reward_model()
    torch.testing.assert_close({name: p.data for name, p in syncs(policy).items()}, expected)
