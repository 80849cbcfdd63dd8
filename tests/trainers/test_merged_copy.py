"""PPO that samples from a merged copy, as on a GPU; here on a CPU."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from recipes.models.adapters import adapter_parameters, add_score_roles
from recipes.models.loading import never_pack
from recipes.trainers.fast import merged_copy
from recipes.trainers.fast.fast_paths import FastPaths
from tests import tiny_models as models
from tests.trainers.conftest import config, history, make_trainer, shared_base_policy


def half_precision_policy(world, tmp_path, kind: str) -> PeftModel:
    options = {"dtype": torch.bfloat16}
    if kind == "4-bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = never_pack(AutoModelForCausalLM.from_pretrained(world["base"], **options))
    model = PeftModel.from_pretrained(base, world["sft"], is_trainable=True)
    add_score_roles(model, {"reward": world["reward"], "critic": world["reward"]})
    return model


def train_and_count_copies(trainer, monkeypatch) -> tuple[int, int]:
    """How many copies were made, and the most that lived in an update; nothing waits for the garbage collector."""
    copies, alive = [], [0]
    make, update = merged_copy.merged_copy, trainer._compute_loss

    def recorded(*args):
        copied = make(*args)
        copies.append(weakref.ref(copied))
        return copied

    def loss(*args):
        alive.append(sum(copied() is not None for copied in copies))
        return update(*args)

    monkeypatch.setattr(merged_copy, "merged_copy", recorded)
    monkeypatch.setattr(trainer, "_compute_loss", loss)
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()
    return len(copies), max(alive)


@pytest.mark.parametrize("kind", ["bf16", "4-bit"])
def test_the_base_stays_bit_by_bit_and_the_copy_goes_before_the_update(world, tmp_path, monkeypatch, kind):
    model = half_precision_policy(world, tmp_path, kind)
    trainer = make_trainer(world, tmp_path, model=model, bf16=True, num_iterations=1, steps_per_generation=2)
    trainer._fast.on.add("merged_copy")
    trained = [*adapter_parameters(model, "default"), *adapter_parameters(model, "critic")]
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert train_and_count_copies(trainer, monkeypatch) == (4, 0)
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name
    assert trained and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    # Log-probabilities are the training model's, not those of sampling.
    assert history(trainer, "val/ratio") == pytest.approx([1] * 4, abs=1e-5)
    assert {"generate", "generate_batch"}.isdisjoint(vars(model.get_base_model()))


@pytest.mark.parametrize("fast_paths", [["merged_copy"], []], ids=["copy", "base"])
def test_continuous_batching_casts_nothing_for_good(world, tmp_path, monkeypatch, fast_paths):
    """TRL casts the whole model to bf16 for it, adapters and heads included."""
    options = {"use_transformers_continuous_batching": True, "max_steps": 2, "num_iterations": 1}
    options["transformers_continuous_batching_config"] = {"num_blocks": 8, "page_size": 32, "max_batch_tokens": 64}
    trainer = make_trainer(world, tmp_path, bf16=True, fast_paths=fast_paths, **options)
    before = {name: (p.dtype, p.detach().clone()) for name, p in trainer.model.named_parameters()}
    made, alive = train_and_count_copies(trainer, monkeypatch)
    assert (made > 0, alive) == (bool(fast_paths), 0)
    for name, parameter in trainer.model.named_parameters():
        dtype, value = before[name]
        assert parameter.dtype == dtype, name
        assert parameter.requires_grad or torch.equal(parameter, value), name
    assert history(trainer, "val/ratio")[0] == pytest.approx(1, abs=1e-4)
    assert all(0 < length <= 8 for length in history(trainer, "completions/mean_length"))


def on_a_gpu(world, tmp_path, policy, mixed_precision="bf16", **kwargs) -> FastPaths:
    accelerator = SimpleNamespace(device=torch.device("cuda"), distributed_type="NO", mixed_precision=mixed_precision)
    return FastPaths(config(tmp_path, **kwargs), accelerator, policy, in_float32=mixed_precision == "no")


def test_what_runs_on_a_gpu(world, tmp_path):
    """Never packed weights, nor a copy's log-probabilities; full fine-tuning copies only to another precision."""
    lora, full = shared_base_policy(world), models.causal_lm()
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float32)):
        fast = on_a_gpu(world, tmp_path, lora, precision)
        assert "merged_copy" in fast.on and fast.compute_dtype == dtype
        assert fast.on.isdisjoint({"packed_weights", "sampling_logps", "response_logps"})
        assert fast.frozen_head(fast.base) is None, "the model still lies on the CPU, and the accelerator knows better"
        assert ("merged_copy" in on_a_gpu(world, tmp_path, full, precision).on) == (precision != "no")
    lora.peft_config["default"].lora_bias = True
    assert "merged_copy" not in on_a_gpu(world, tmp_path, lora).on
    assert "merged_copy" not in on_a_gpu(world, tmp_path, full, fast_paths=[]).on


def test_a_copy_that_does_not_fit_is_not_made(world, monkeypatch):
    policy = shared_base_policy(world)
    base = policy.get_base_model()
    needed = 2 * sum(p.numel() for p in models.causal_lm().parameters())
    monkeypatch.setattr(type(base), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(merged_copy, "merged_copy", lambda *args: pytest.fail("it was made"))
    monkeypatch.setattr(type(base), "generate", lambda self, *args: "the policy's own")
    monkeypatch.setattr(merged_copy, "free_bytes", lambda device: 2 * needed - 1)
    with merged_copy.sampling_from_copy(policy, torch.bfloat16):
        assert base.generate() == "the policy's own"
    assert merged_copy.fits_beside(needed, 2 * needed)
