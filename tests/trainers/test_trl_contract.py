"""What PPOTrainer relies on in TRL: the methods it overrides, their parameters, and the order in which TRL calls them.

An upgrade of TRL that changes one of them fails here by name. CONTRIBUTING.md says how TRL is upgraded.
"""

import inspect
from dataclasses import MISSING, fields

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RewardTrainer, SFTTrainer

from recipes.trainers.checkpoints import WholeCheckpoints
from recipes.trainers.ppo_config import REFUSED, PPOConfig
from recipes.trainers.ppo_roles import PPORoles
from recipes.trainers.ppo_saving import PPOSaving
from recipes.trainers.ppo_tracking import PPOLogging
from recipes.trainers.ppo_trainer import PPOTrainer
from tests.trainers.conftest import config, make_trainer

# Parameters of GRPOTrainer's methods, as in TRL 1.16, without `self`.
OVERRIDDEN = {
    "_prepare_inputs": ["generation_batch"],
    "_generate": ["prompts"],
    "_tokenize_prompts": ["prompts"],
    "_generate_and_score_completions": ["inputs"],
    "_get_per_token_logps_and_entropies": [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "...",
    ],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["model", "inputs"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "create_optimizer": ["model"],
    "_get_eval_sampler": ["eval_dataset"],
    "log": ["logs", "start_time"],
    "_save": ["output_dir", "state_dict"],
    "_load_best_model": [],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
}


# The same for what `WholeCheckpoints` overrides in each trainer.
CHECKPOINTS = {
    "_get_output_dir": ["trial"],
    "create_model_card": ["model_name", "dataset_name", "tags"],
    "training_step": ["..."],
    "_get_grad_norm": ["model", "grad_norm"],
    "log": ["logs", "start_time"],
    "_get_dataloader": ["dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
    "save_model": ["output_dir", "_internal_call"],
    "_save_checkpoint": ["model", "trial"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_run_epoch": ["model", "epoch", "train_dataloader", "..."],
    "_maybe_log_save_evaluate": ["..."],
    "_determine_best_metric": ["..."],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
}


def parameters(name: str, trainer: type = GRPOTrainer) -> list[str]:
    return list(inspect.signature(getattr(trainer, name)).parameters)[1:]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trls_methods_have_the_parameters_that_ppo_passes_on(name):
    expected = OVERRIDDEN[name]
    found = parameters(name)
    if expected[-1:] == ["..."]:
        expected, found = expected[:-1], found[: len(expected) - 1]
    assert found == expected, f"TRL's GRPOTrainer.{name} has changed"


@pytest.mark.parametrize("trainer", [SFTTrainer, RewardTrainer, GRPOTrainer])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_trainers_have_the_methods_that_make_checkpoints_whole(name, trainer):
    expected = CHECKPOINTS[name]
    found = parameters(name, trainer)
    if expected[-1:] == ["..."]:
        expected, found = expected[:-1], found[: len(expected) - 1]
    assert found == expected, f"{trainer.__name__}.{name} has changed"


def test_every_override_of_a_checkpoint_is_listed():
    own = {name for name, value in vars(WholeCheckpoints).items() if inspect.isfunction(value)}
    assert {name for name in own if hasattr(GRPOTrainer, name)} - {"__init__"} == CHECKPOINTS.keys()


def test_every_override_is_listed():
    members = {**vars(PPORoles), **vars(PPOLogging), **vars(PPOSaving), **vars(PPOTrainer)}
    own = {name for name, value in members.items() if inspect.isfunction(value)}
    assert {name for name in own if hasattr(GRPOTrainer, name)} - {"__init__"} == OVERRIDDEN.keys()
    assert all(f"`{name}`" in PPOTrainer.__doc__ for name in OVERRIDDEN), "the docstring lists every hook"


def test_trl_calls_the_hooks_in_the_order_of_a_rollout(world, tmp_path, monkeypatch):
    calls = []

    def recorded(name):
        method = getattr(PPOTrainer, name)

        def call(self, *args, **kwargs):
            calls.append(name)
            return method(self, *args, **kwargs)

        return call

    for name in ("_prepare_inputs", "_generate_and_score_completions", "_generate", "_calculate_rewards"):
        monkeypatch.setattr(PPOTrainer, name, recorded(name))
    for name in ("_get_per_token_logps_and_entropies", "_compute_loss"):
        monkeypatch.setattr(PPOTrainer, name, recorded(name))
    trainer = make_trainer(world, tmp_path, gradient_accumulation_steps=1, steps_per_generation=2, max_steps=4)
    trainer.train()
    rollout = ["_prepare_inputs", "_generate_and_score_completions", "_generate"]
    rollout += ["_get_per_token_logps_and_entropies", "_calculate_rewards", "_compute_loss"]
    # 2 epochs of 2 minibatches: TRL asks for a rollout once, and then only for the next micro-batch
    assert calls == rollout + ["_prepare_inputs", "_compute_loss"] * 3


def test_the_rollout_has_the_tensors_that_the_update_reads(world, tmp_path):
    trainer = make_trainer(world, tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(
        [{"prompt": row["prompt"]} for row in trainer.train_dataset.select(range(16))]
    )
    width = batch["completion_ids"].shape
    for name in ("completion_mask", "advantages", "returns", "old_values", "old_per_token_logps"):
        assert batch[name].shape == width, name
    assert {"prompt_ids", "prompt_mask", "num_items_in_batch"} <= batch.keys()


# Fields of GRPOConfig that do in PPO what their help says, or whose default PPO sets anew.
USED = """
    trust_remote_code disable_dropout cast_lm_head_to_fp32 num_generations num_generations_eval max_completion_length
    shuffle_dataset pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
    generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl
    vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
    num_iterations epsilon epsilon_high reward_weights loss_type mask_truncated_completions entropy_coef
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_cap log_completions num_completions_to_print
    log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching use_transformers_paged
    transformers_continuous_batching_config
""".split()
GRPO_FIELDS = {each.name: each for each in fields(GRPOConfig)}


def test_every_field_of_grpo_config_is_used_or_refused():
    own = GRPO_FIELDS.keys() - {each.name for each in fields(TrainingArguments)}
    assert own == {*USED} | {name for name in REFUSED if name in own}
    assert not {*USED} & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_without_use_in_ppo_is_refused_by_name(name, tmp_path):
    default = GRPO_FIELDS[name].default
    assert default is not MISSING
    other = {bool: not default, float: 0.123, int: 3}.get(type(default), "sequence")
    with pytest.raises(ValueError, match=rf"^{name} \(.*\) is not used by PPO: "):
        config(tmp_path, **{name: other})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_importance_sampling_clip_min": 4.0}, "must be less than"),
        ({"generation_batch_size": 16, "steps_per_generation": 4}, "can not be both configured"),
        ({"fp16": True, "target_kl": 0.1}, "use bf16"),
        ({"num_generations": 3}, "must be divisible by num_generations"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),
    ],
)
def test_the_checks_of_grpo_config_run(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_one_response_a_prompt_is_enough(tmp_path):
    args = config(tmp_path)
    assert args.num_generations == 1 and type(args.num_generations) is int
    assert PPOConfig.__dataclass_fields__["num_generations"].default == 1
