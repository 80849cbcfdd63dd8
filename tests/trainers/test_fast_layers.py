"""Linear layers with LoRA: in one step when they train, from packed and merged weights when they decode."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from recipes.models.adapters import use_role
from recipes.trainers.fast import packed_weights as packing
from recipes.trainers.fast.lora_linear import fuse_adapters, plain_adapter
from recipes.trainers.fast.packed_weights import FEW_ROWS, packed_weights
from tests import tiny_models as models


def policy(**kwargs):
    """A policy with biases in its attention and an adapter that changes what it says."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | kwargs
    torch.manual_seed(0)
    return get_peft_model(models.causal_lm(attention_bias=True), LoraConfig(task_type="CAUSAL_LM", **lora))


def layers(model) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def logits_and_gradients(model, ids):
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.pow(2).mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


IDS = torch.arange(5, 41).view(3, 12)


@pytest.mark.parametrize("trained_input", [False, True])
def test_a_fused_layer_gives_pefts_output_and_gradients(trained_input):
    plain = policy(modules_to_save=["embed_tokens"] if trained_input else None)
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    expected, gradients = logits_and_gradients(plain, IDS)
    logits, found = logits_and_gradients(fused, IDS)
    assert all(plain_adapter(layer) == "default" for layer in layers(fused))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert found.keys() == gradients.keys() and len(found) == 2 * len(layers(fused)) + trained_input
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_fused_layer_follows_the_role():
    plain = policy()
    plain.add_adapter("critic", plain.peft_config["default"])
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    for role in ("critic", None, "default"):
        with use_role(plain, role), use_role(fused, role), torch.no_grad():
            torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=lambda config: next(iter(config))
)
def test_what_is_more_than_plain_lora_stays_pefts(config):
    plain = policy(**config).train()
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    assert all(plain_adapter(layer) is None for layer in layers(fused))
    results = []
    for model in (plain, fused):
        torch.manual_seed(1)  # dropout draws
        results.append(logits_and_gradients(model, IDS))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


def test_other_precisions_several_adapters_and_merged_ones_stay_pefts():
    model = policy()
    model.add_adapter("second", model.peft_config["default"])
    fuse_adapters(model)
    layer = layers(model)[0]
    layer._active_adapter = ["default", "second"]
    assert plain_adapter(layer) is None
    layer._active_adapter = ["default"]
    assert plain_adapter(layer) == "default"
    layer.merge()
    assert plain_adapter(layer) is None
    layer.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16
    layer.base_layer.requires_grad_(True)
    assert plain_adapter(layer) is None


@pytest.fixture
def packed_products(monkeypatch) -> list[int]:
    """Rows of each product from packed weights."""
    rows, real = [], packing.OPERATORS

    def product(x, *args):
        rows.append(x.numel() // x.size(-1))
        return real._linear_pointwise(x, *args)

    counted = SimpleNamespace(_linear_pointwise=product, _reorder_linear_weight=real._reorder_linear_weight)
    monkeypatch.setattr(packing, "OPERATORS", counted)
    return rows


def test_decoding_from_packed_weights_gives_the_policys_logits(packed_products):
    model = policy()
    products = len(layers(model)) + 1  # and the LM head
    before = copy.deepcopy(model.state_dict())
    many = IDS.repeat(FEW_ROWS // IDS.numel() + 1, 1)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with packed_weights(model.get_base_model()):
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-4)
            model(input_ids=many)  # as in the prefill
        assert packed_products == [IDS.numel()] * products
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_packed_weights_are_those_of_the_rollout_and_fused_layers_come_back(packed_products):
    model = policy()
    fuse_adapters(model)
    forwards = [layer.forward for layer in layers(model)]
    for _ in range(2):
        with torch.no_grad():
            for layer in layers(model):
                layer.lora_B["default"].weight += 0.1
            expected = model(input_ids=IDS).logits
            with packed_weights(model.get_base_model()):
                torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-3)
        assert [layer.forward for layer in layers(model)] == forwards
    assert len(packed_products) == 2 * (len(layers(model)) + 1)


def test_what_cannot_be_packed_runs_as_it_is(packed_products):
    model = policy(use_dora=True)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with packed_weights(model.get_base_model()):
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-4)
    assert len(packed_products) == 1, "the LM head only"
    halves = nn.Linear(8, 8, dtype=torch.bfloat16)
    holder = nn.ModuleList([halves])
    with packed_weights(holder), torch.no_grad():
        assert halves(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with packed_weights(holder):
        assert halves(torch.ones(2, 8, dtype=torch.bfloat16)).requires_grad, "gradients go through the layer itself"
    assert len(packed_products) == 1
