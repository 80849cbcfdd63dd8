"""Every kind of weight that an adapter trains follows its role: switching, copying, averaging, saving, gradients."""

import copy

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from recipes.cli.errors import UserError
from recipes.models.adapters import (
    adapter_parameters,
    add_copy,
    add_score_roles,
    check_adapter_kind,
    check_shards,
    use_role,
)
from recipes.models.merged import unmergeable
from tests import tiny_models as models
from tests.trainers.conftest import history, make_trainer

KINDS = {
    "linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "embedding": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": {"embed_tokens": [3, 7, 9]}},
    "bias": {"target_modules": "all-linear", "lora_bias": True},
}
TIED = {"embedding", "modules_to_save", "tokens"}  # also with an LM head that shares the embedding's weights
IDS = torch.arange(5, 41).view(3, 12)


def adapter(base, kind: str, task: str, seed: int):
    """`base` with an adapter of this kind whose every weight differs from its start."""
    options = copy.deepcopy(KINDS[kind])
    if task == "SEQ_CLS":
        options["modules_to_save"] = [*options.get("modules_to_save", []), "score"]
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(task_type=task, r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(params=[(kind, tied) for kind in KINDS for tied in {False, kind in TIED}], ids=str)
def paths(request, tmp_path):
    """A base, and an SFT and a reward adapter of the kind, on disk."""
    kind, tied = request.param
    paths = {name: str(tmp_path / name) for name in ("base", "sft", "reward")}
    models.causal_lm(tie_word_embeddings=tied).save_pretrained(paths["base"])
    models.word_tokenizer().save_pretrained(paths["base"])
    adapter(AutoModelForCausalLM.from_pretrained(paths["base"]), kind, "CAUSAL_LM", 3).save_pretrained(paths["sft"])
    classifier = AutoModelForSequenceClassification.from_pretrained(paths["base"], num_labels=1)
    adapter(classifier, kind, "SEQ_CLS", 4).save_pretrained(paths["reward"])
    return paths


def policy_of(paths) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(paths["base"])
    model = PeftModel.from_pretrained(base, paths["sft"], is_trainable=True)
    add_score_roles(model, {"reward": paths["reward"], "critic": paths["reward"]})
    return model


def test_roles_see_all_that_their_adapter_trains(paths, tmp_path):
    """PPO with an adapter of each kind: each role gives what its adapter alone gives, before and after updates."""
    trainer = make_trainer(
        paths,
        tmp_path / "ppo",
        model=policy_of(paths),
        learning_rate=1e-2,
        max_steps=6,
        ema_decay=0.5,
        save_strategy="steps",
        save_steps=6,
    )
    model = trainer.model.eval()

    @torch.no_grad()
    def logits(role):
        with use_role(model, role):
            return model(input_ids=IDS).logits

    @torch.no_grad()
    def scores(role):
        with use_role(model, role):
            return model(input_ids=IDS, states=(torch.arange(3), torch.full((3,), 11)), scalar_head=role)

    alone = AutoPeftModelForCausalLM.from_pretrained(paths["sft"]).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(paths["base"], num_labels=1)
    classifier = PeftModel.from_pretrained(classifier, paths["reward"]).eval()
    classifier.config.pad_token_id = 0
    with torch.no_grad():
        first, judged = alone(input_ids=IDS).logits, classifier(input_ids=IDS).logits[:, 0]
        with alone.disable_adapter():
            assert torch.equal(logits(None), alone(input_ids=IDS).logits)
    torch.testing.assert_close(logits("default"), first, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits("ref"), logits("default")) and torch.equal(logits("ema"), logits("default"))
    torch.testing.assert_close(scores("reward"), judged, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores("critic"), scores("reward"))
    reference, rewards = logits("ref"), scores("reward")
    start = {name: p.detach().clone() for name, p in adapter_parameters(model, "default").items()}
    critic = {name: p.detach().clone() for name, p in adapter_parameters(model, "critic").items()}

    trainer.train()
    model.eval()
    assert history(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-5)
    assert torch.equal(logits("ref"), reference), "the reference is the first policy"
    assert torch.equal(scores("reward"), rewards)
    assert not torch.equal(logits("default"), reference) and not torch.equal(scores("critic"), rewards)
    moved = {name: not torch.equal(p, start[name]) for name, p in adapter_parameters(model, "default").items()}
    assert all(moved.values()), [name for name, has in moved.items() if not has]
    moved = {name: not torch.equal(p, critic[name]) for name, p in adapter_parameters(model, "critic").items()}
    assert all(moved.values()), [name for name, has in moved.items() if not has]
    for name, average in adapter_parameters(model, "ema").items():
        now = adapter_parameters(model, "default")[name]
        assert not torch.equal(average, now) and not torch.equal(average, start[name]), name

    trainer.save_model()
    for folder, role in (("", "default"), ("ema", "ema")):
        saved = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "ppo" / folder)).eval()
        with torch.no_grad():
            torch.testing.assert_close(saved(input_ids=IDS).logits, logits(role), rtol=1e-5, atol=1e-5)
    classifier = AutoModelForSequenceClassification.from_pretrained(paths["base"], num_labels=1)
    saved = PeftModel.from_pretrained(classifier, str(tmp_path / "ppo" / "critic")).eval()
    saved.config.pad_token_id = 0
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=IDS).logits[:, 0], scores("critic"), rtol=1e-5, atol=1e-5)


def test_a_resumed_run_has_the_same_weights_of_each_kind(paths, tmp_path):
    whole = make_trainer(paths, tmp_path / "whole", model=policy_of(paths), save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_trainer(paths, tmp_path / "resumed", model=policy_of(paths))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_critic_without_a_reward_adapter_has_no_lm_head_to_train(world, tmp_path):
    """It gets no gradient, for which DDP waits."""
    base = models.causal_lm(tie_word_embeddings=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    rewards = {"reward_funcs": [lambda completions, **kwargs: [float(len(each)) for each in completions]]}
    trainer = make_trainer(world, tmp_path, model=model, trainer_kwargs=rewards, max_steps=1)
    seen = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: seen.setdefault(name))
    trainer.train()
    trainer.save_model()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == seen.keys()


def test_convolutions_follow_the_role():
    base = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    add_copy(model, "default", "ref")
    x = torch.randn(4, 2, 6)
    before = model(x)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.add_(1.0)
    assert not torch.equal(model(x), before)
    with use_role(model, "ref"):
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"fsdp_version": 1}, "fsdp_version: 2 only"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing recomputes blocks"),
        ({"cpu_ram_efficient_loading": True}, "loads weights in the first process only"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "keeps one adapter in a checkpoint"),
    ],
)
def test_shards_that_would_mix_up_roles_are_refused(monkeypatch, wrong, line):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
    right = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": False}
    right |= {"state_dict_type": "FULL_STATE_DICT"}
    check_shards(FullyShardedDataParallelPlugin(**right), has_adapters=True)
    with pytest.raises(UserError, match=line):
        check_shards(FullyShardedDataParallelPlugin(**right | wrong), has_adapters=True)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(world, tmp_path, init):
    base = AutoModelForCausalLM.from_pretrained(world["base"])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    with pytest.raises(UserError, match=f"init_lora_weights={init} changes the base"):
        make_trainer(world, tmp_path, model=model, trainer_kwargs={"reward_model": models.reward_model()})


@pytest.mark.parametrize("changes", [{"bias": "lora_only"}, {"layer_replication": [[0, 2], [1, 2]]}], ids=str)
def test_an_adapter_that_trains_or_repeats_parts_of_the_base_is_refused(world, tmp_path, changes):
    base = AutoModelForCausalLM.from_pretrained(world["base"])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **changes))
    with pytest.raises(UserError, match=f"{next(iter(changes))} changes the base"):
        make_trainer(world, tmp_path, model=model, trainer_kwargs={"reward_model": models.reward_model()})


@pytest.mark.parametrize("kind", [{"alora_invocation_tokens": [5]}, {"init_lora_weights": "mica"}], ids=str)
def test_a_variant_of_lora_that_looks_at_more_than_its_layer_is_refused(kind):
    """PPO's forwards know nothing of the tokens that switch it on, or of parts that are not to be trained."""
    model = get_peft_model(models.causal_lm(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **kind))
    assert unmergeable(model)
    with pytest.raises(UserError, match=f"{next(iter(kind))}.* needs plain LoRA or DoRA"):
        check_adapter_kind(model)
