"""Trained weights and heads are float32 in all three steps, whatever the precision of the base."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig, RewardConfig, SFTConfig, SFTTrainer

from recipes.models.adapters import adapter_parameters, add_score_roles, float32_adapters
from recipes.models.loading import load_policy, load_reward_trainee, never_pack
from recipes.models.source import resolve_model
from recipes.trainers.ranking_trainer import RankingRewardTrainer
from tests import tiny_models as models
from tests.trainers.conftest import make_trainer

QUANTIZED = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=["lm_head"],
)
# The rates of recipes/configs; a step of bf16 near a LoRA's first weights is 1.2e-4.
RATES = {"ppo": 3e-5, "sft": 1e-4, "reward": 2e-5}
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
}


def share_moved(before: dict, after: dict) -> float:
    """Share of the entries that are not what they were, over tensors that have moved at all in any entry."""
    moved = torch.cat([(after[name].detach() != value).flatten() for name, value in before.items()])
    return moved.float().mean().item()


def copies(parameters: dict) -> dict:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """As `world`, with layers as wide as a block of 4-bit weights, and LoRA's own start."""
    folder = tmp_path_factory.mktemp("wide")
    paths = {name: str(folder / name) for name in ("base", "sft", "reward")}
    models.causal_lm(hidden_size=64, intermediate_size=128).save_pretrained(paths["base"])
    models.word_tokenizer().save_pretrained(paths["base"])
    torch.manual_seed(3)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    base = AutoModelForCausalLM.from_pretrained(paths["base"])
    policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
    reward = AutoModelForSequenceClassification.from_pretrained(paths["base"], num_labels=1)
    reward = get_peft_model(reward, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **lora))
    for model in (policy, reward):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    policy.save_pretrained(paths["sft"])
    reward.save_pretrained(paths["reward"])
    return paths


@pytest.mark.parametrize("precision", ["4-bit", "bf16"])
def test_ppo_moves_every_weight_at_the_rates_of_the_configs(wide, tmp_path, precision):
    options = {"quantization_config": QUANTIZED} if precision == "4-bit" else {"dtype": torch.bfloat16}
    base = never_pack(AutoModelForCausalLM.from_pretrained(wide["base"], **options))
    model = PeftModel.from_pretrained(base, wide["sft"], is_trainable=True)
    add_score_roles(model, {"reward": wide["reward"], "critic": wide["reward"]})
    trainer = make_trainer(wide, tmp_path, model=model, learning_rate=RATES["ppo"], max_steps=6, bf16=True)
    roles = {role: adapter_parameters(model, role) for role in ("default", "critic")}
    assert {p.dtype for role in roles.values() for p in role.values()} == {torch.float32}
    before = {role: copies(parameters) for role, parameters in roles.items()}
    trainer.train()
    assert {role: share_moved(before[role], roles[role]) > 0.99 for role in roles} == {"default": True, "critic": True}
    assert {p.dtype for role in roles.values() for p in role.values()} == {torch.float32}


def test_modules_that_are_trained_beside_lora_keep_the_precision_of_the_base(wide, tmp_path):
    """TRL casts them to bf16 with the adapters of a 4-bit base, whatever `dtype` says, and they would hardly move."""
    given = {"lora_modules_to_save": ["embed_tokens", "lm_head"], "lora_target_modules": ["q_proj", "v_proj"]}
    args = ModelConfig(use_peft=True, dtype="float32", load_in_4bit=True, **given)
    model = load_policy(resolve_model(wide["base"]), args)
    trainer = make_trainer(wide, tmp_path, model=model, trainer_kwargs={"reward_model": models.reward_model()})
    assert {p.dtype for p in adapter_parameters(model, "default").values()} == {torch.float32}
    trainer.train()


def arguments(wide, precision: str) -> ModelConfig:
    return ModelConfig(
        model_name_or_path=wide["sft"], use_peft=True, dtype="bfloat16", load_in_4bit=precision == "4-bit"
    )


@pytest.mark.parametrize("precision", ["4-bit", "bf16"])
def test_sft_moves_every_weight(wide, tmp_path, precision):
    model = load_policy(resolve_model(wide["sft"]), arguments(wide, precision))
    rows = Dataset.from_dict(
        {"prompt": models.prompts(16), "completion": [[{"role": "assistant", "content": "w7 w8"}]] * 16}
    )
    with float32_adapters(model):
        trainer = SFTTrainer(
            model,
            SFTConfig(str(tmp_path), learning_rate=RATES["sft"], **COMMON | {"bf16": True}),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(wide["base"]),
        )
    weights = adapter_parameters(model, "default")
    before = copies(weights)
    trainer.train()
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert share_moved(before, weights) > 0.99


@pytest.mark.parametrize("precision", ["4-bit", "bf16"])
def test_the_reward_model_and_its_head_move(wide, tmp_path, precision):
    model = load_reward_trainee(resolve_model(wide["sft"]), arguments(wide, precision))
    answers = [[[{"role": "assistant", "content": f"w{i} w{j}"}] for j in range(3)] for i in range(16)]
    rows = Dataset.from_dict({"prompt": models.prompts(16), "completions": answers, "ranks": [[1.0, 2.0, 3.0]] * 16})
    with float32_adapters(model):
        trainer = RankingRewardTrainer(
            model=model,
            args=RewardConfig(str(tmp_path), learning_rate=RATES["reward"], **COMMON | {"bf16": True}),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(wide["base"]),
        )
    weights = adapter_parameters(model, "default")
    before = copies(weights)
    trainer.train()
    assert {p.dtype for p in weights.values()} == {torch.float32}
    head = {name: value for name, value in before.items() if "score" in name}
    assert len(head) == 1 and share_moved(head, weights) == 1.0
    assert share_moved(before, weights) > 0.99


def test_scores_and_values_are_not_rounded_to_bf16(world, tmp_path):
    """Near 2 a bf16 number comes every 1/64, so close pairs would tie."""
    base = AutoModelForCausalLM.from_pretrained(world["base"], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, world["sft"], is_trainable=True)
    add_score_roles(model, {"reward": world["reward"], "critic": world["reward"]})
    trainer = make_trainer(world, tmp_path, model=model, bf16=True)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = trainer.train_dataset.select(range(16))
    batch = trainer._generate_and_score_completions([{"prompt": row["prompt"]} for row in rows])
    for numbers in (trainer._rollout.scores, batch["old_values"][batch["completion_mask"].bool()]):
        assert numbers.dtype == torch.float32
        assert (numbers != numbers.bfloat16().float()).float().mean() > 0.9


def test_a_reward_model_trained_in_bf16_keeps_its_head_on_the_way_through_disk(wide, tmp_path):
    model = load_reward_trainee(
        resolve_model(wide["base"]), ModelConfig(model_name_or_path=wide["base"], dtype="bfloat16")
    )
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape))
    model.save_pretrained(tmp_path)
    again = load_reward_trainee(resolve_model(str(tmp_path)), ModelConfig(dtype="bfloat16"))
    assert again.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(again.score.weight, model.score.weight)
