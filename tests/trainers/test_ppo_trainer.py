"""PPOTrainer against models that share nothing, by hand, and against its own invariances."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    XLNetConfig,
)

from recipes.cli.errors import UserError
from recipes.models.adapters import adapter_parameters, add_score_roles
from recipes.models.loading import never_pack
from recipes.trainers.ppo_roles import check_room
from recipes.trainers.ppo_trainer import PPOTrainer
from recipes.trainers.rollout import Rollout
from tests import tiny_models as models
from tests.architectures import bos_tokenizer
from tests.trainers.conftest import LORA, config, history, make_trainer, shared_base_policy


def rollout(trainer, n=4):
    """One scored rollout of n prompts of the train set, outside `train()`."""
    return rollout_of(trainer, trainer.train_dataset["prompt"][:n])


def rollout_of(trainer, prompts):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


def plain_logps(model, ids, mask, width, temperature=1.0):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(2, ids[:, -width:, None]).squeeze(2)


def separate_losses(policy, critic, batch, args):
    """Policy and value loss of PPO with plain forwards of two models that share nothing."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    mask, width = batch["completion_mask"].float(), batch["completion_ids"].size(1)
    ratio = (plain_logps(policy, ids, attention, width, args.temperature) - batch["old_per_token_logps"]).exp()
    clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
    policy_loss = -torch.min(ratio * batch["advantages"], clipped * batch["advantages"])
    hidden = critic.base_model.model.model if isinstance(critic, PeftModel) else critic.model
    head = critic.base_model.model.score if isinstance(critic, PeftModel) else critic.score
    values = head(hidden(input_ids=ids, attention_mask=attention).last_hidden_state).squeeze(-1)[:, -width - 1 : -1]
    old = batch["old_values"]
    near = old + (values - old).clamp(-args.cliprange_value, args.cliprange_value)
    value_loss = 0.5 * torch.max((values - batch["returns"]) ** 2, (near - batch["returns"]) ** 2)
    return ((policy_loss + args.vf_coef * value_loss) * mask).sum() / mask.sum()


def gradients(model, rename=lambda name: name) -> dict[str, torch.Tensor]:
    return {rename(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict, expected: dict):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


def first_update(trainer, checkpointing):
    """A rollout, and the gradients of its first update in the model: the critic's come from the rollout itself."""
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    batch = rollout(trainer)
    trainer._compute_loss(trainer.model, batch).backward()
    return batch


def later_update(trainer, checkpointing):
    """The same of the second update; policy and critic have moved, so that ratio and value clipping take part."""
    batch = rollout(trainer)
    trainer.model.zero_grad()
    trainer._step = 1
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".lora_B.default." in name or ".lora_B.critic." in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer._compute_loss(trainer.model, batch).backward()
    return batch


@pytest.mark.parametrize("update", [first_update, later_update])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_shared_base_equal_those_of_separate_models(world, tmp_path, checkpointing, update):
    trainer = make_trainer(
        world, tmp_path, activation_checkpointing=checkpointing, steps_per_generation=1, gradient_accumulation_steps=1
    )
    batch = update(trainer, checkpointing)
    ours = gradients(trainer.model)

    trainer.model.save_pretrained(str(tmp_path / "moved"))
    policy = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "moved"), is_trainable=True)
    critic = AutoModelForSequenceClassification.from_pretrained(world["base"], num_labels=1)
    critic = PeftModel.from_pretrained(critic, str(tmp_path / "moved" / "critic"), is_trainable=True)
    separate_losses(policy, critic, batch, trainer.args).backward()
    expected = gradients(policy) | gradients(critic, lambda name: name.replace(".default.", ".critic."))
    # 2 layers x 7 linear maps x (A, B) x 2 roles, and the critic's head
    assert len(expected) == 57
    assert_same_gradients(ours, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_full_fine_tuning_equal_those_of_separate_models(world, tmp_path, checkpointing):
    value_model = models.reward_model(seed=7)
    trainer = make_trainer(
        world,
        tmp_path,
        model=models.causal_lm(),
        trainer_kwargs={"reward_model": models.reward_model(), "value_model": value_model},
        activation_checkpointing=checkpointing,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
    )
    batch = first_update(trainer, checkpointing)
    policy, critic = models.causal_lm(), models.reward_model(seed=7)
    separate_losses(policy, critic, batch, trainer.args).backward()
    expected = gradients(policy) | gradients(critic, lambda name: f"critic.{name}")
    assert_same_gradients(gradients(trainer.model), expected)


def test_the_rollout_equals_numbers_from_separate_models(world, tmp_path):
    trainer = make_trainer(
        world, tmp_path, kl_coef=0.3, missing_eos_penalty=1.5, temperature=0.7, gamma=0.99, lam=0.9, score_mean=0.2,
        score_std=2.0, per_device_train_batch_size=16,
    )  # fmt: skip
    batch = rollout(trainer, 64)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    mask, width = batch["completion_mask"].float(), batch["completion_ids"].size(1)
    finished = torch.tensor([1 in row for row in batch["completion_ids"].tolist()])
    assert finished.any() and not finished.all(), "the case needs finished and unfinished responses"

    sft = AutoPeftModelForCausalLM.from_pretrained(world["sft"]).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(world["base"], num_labels=1)
    classifier = PeftModel.from_pretrained(classifier, world["reward"]).eval()
    classifier.config.pad_token_id = 0
    with torch.no_grad():
        logps = plain_logps(sft, ids, attention, width, 0.7)
        # Right padding, as RewardTrainer scores
        rows = [row[keep.bool()] for row, keep in zip(ids, attention, strict=True)]
        raw = [classifier(input_ids=row[None]).logits.item() for row in rows]
        backbone, head = classifier.base_model.model.model, classifier.base_model.model.score
        values = head(backbone(input_ids=ids, attention_mask=attention).last_hidden_state).squeeze(-1)
    values = values[:, -width - 1 : -1] * mask
    torch.testing.assert_close(batch["old_per_token_logps"] * mask, logps * mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch["old_values"], values, rtol=1e-4, atol=1e-5)

    # The policy is the reference here, so the whole reward is the score at the last token.
    scores = (torch.tensor(raw) - 0.2) / 2.0 - 1.5 * ~finished
    advantages = torch.zeros_like(values)
    for row in range(len(values)):
        length = int(mask[row].sum())
        following = carried = 0.0
        for t in reversed(range(length)):
            reward = scores[row] if t == length - 1 else 0.0
            carried = reward + 0.99 * following - values[row, t] + 0.99 * 0.9 * carried
            following = values[row, t]
            advantages[row, t] = carried
    real = advantages[mask.bool()]
    expected = (advantages - real.mean()) / real.std() * mask
    torch.testing.assert_close(batch["advantages"], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(batch["returns"] * mask, (advantages + values) * mask, rtol=1e-4, atol=1e-5)
    assert trainer._metrics["train"]["objective/scores"][-1] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert trainer._metrics["train"]["objective/kl"][-1] == pytest.approx(0.0, abs=1e-4)
    assert trainer._metrics["train"]["val/num_eos_tokens"][-1] == finished.sum()


def test_the_ratio_is_one_before_the_first_update(world, tmp_path):
    trainer = make_trainer(world, tmp_path, max_steps=1, num_iterations=1, steps_per_generation=2)
    trainer.train()
    assert history(trainer, "val/ratio") == [pytest.approx(1.0, abs=1e-6)]
    assert history(trainer, "policy/approxkl_avg") == [pytest.approx(0.0, abs=1e-9)]


def test_only_policy_and_critic_learn(world, tmp_path):
    trainer = make_trainer(world, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert changed == {name for name in before if ".default." in name or ".critic." in name}


def test_the_update_does_not_depend_on_how_it_is_split(world, tmp_path):
    """One update on 16 episodes: as one micro-batch, as four, and with padding that nobody needs."""
    weights = []
    for name, batch_size, pad_to in (("whole", 16, None), ("split", 4, None), ("padded", 16, 32)):
        trainer = make_trainer(
            world,
            tmp_path / name,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=16 // batch_size,
            steps_per_generation=16 // batch_size,
            pad_to_multiple_of=pad_to,
            num_iterations=1,
            max_steps=1,
            max_grad_norm=0.0,
            optim="sgd",  # Adam's first step is the sign of the gradient and would hide its size
            learning_rate=1.0,
        )
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
    start = {n: p for n, p in shared_base_policy(world).named_parameters()}
    for name, whole in weights[0].items():
        step = (whole - start[name]).abs().max()
        assert step > 0
        for other in weights[1:]:
            assert (other[name] - whole).abs().max() < 1e-3 * step + 1e-7, name


@pytest.mark.parametrize("step", [2, 4, 5], ids=["mid-rollout", "between-rollouts", "second-epoch"])
def test_a_resumed_run_ends_on_the_same_numbers(world, tmp_path, step):
    # 16 prompts are one rollout of 4 steps, so that an epoch ends with each rollout.
    kwargs = {"rows": 16, "max_steps": 8, "adaptive_kl_target": 0.01, "adaptive_kl_horizon": 100}
    whole = make_trainer(world, tmp_path / "whole", save_strategy="steps", save_steps=step, **kwargs)
    whole.train()
    resumed = make_trainer(world, tmp_path / "resumed", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    skip = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    rows = [[{k: v for k, v in r.items() if k not in skip} for r in t.state.log_history] for t in (whole, resumed)]
    assert rows[0] == rows[1]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_checkpoint_of_full_fine_tuning_resumes(world, tmp_path):
    def full(folder, **kwargs):
        extra = {"reward_model": models.reward_model()}
        return make_trainer(world, tmp_path / folder, model=models.causal_lm(), trainer_kwargs=extra, **kwargs)

    whole = full("whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = full("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    whole.save_model()
    AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "whole" / "critic"))
    _, info = AutoModelForCausalLM.from_pretrained(str(tmp_path / "whole"), output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_left_padding_changes_nothing_for_absolute_positions(world, tmp_path, peft):
    """GPT-2 knows positions by number; prompts of one word and of nine share a batch here."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}
    policy = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    policy.transformer.wpe.weight.data.mul_(20)
    rows = [models.prompts(1, length=length, seed=length)[0] for length in (1, 9, 5, 3)]
    trainer = make_trainer(
        world,
        tmp_path,
        model=policy,
        trainer_kwargs={
            "reward_funcs": lucky_word,
            "peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False) if peft else None,
        },
    )
    alone = []
    together = rollout_of(trainer, rows)
    for row, ids in enumerate(together["completion_ids"]):
        real = together["prompt_ids"][row][together["prompt_mask"][row].bool()]
        trimmed = torch.cat([real, ids])[None]
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.model, trimmed, torch.ones_like(trimmed), len(ids), batch_size=1
        )[0]
        alone.append(logps[0] * together["completion_mask"][row])
        values = trainer._values(trainer.model, trimmed, torch.ones_like(trimmed), len(ids))
        mask = together["completion_mask"][row]
        torch.testing.assert_close(values[0] * mask, together["old_values"][row] * mask, rtol=1e-4, atol=1e-5)
    mask = together["completion_mask"]
    torch.testing.assert_close(torch.stack(alone), together["old_per_token_logps"] * mask, rtol=1e-4, atol=1e-5)


LUCKY = {f"w{i}" for i in range(8)}


def lucky_word(prompts, completions, **kwargs):
    return [float(bool(LUCKY & set(completion[0]["content"].split()))) for completion in completions]


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_a_bandit_is_solved(world, tmp_path, peft):
    """One token, a few good arms, no KL: the optimum is to pull them always."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = make_trainer(
        world,
        tmp_path,
        model=models.causal_lm(sharpness=20.0),
        trainer_kwargs={"reward_funcs": lucky_word, "peft_config": lora if peft else None},
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=2,
        max_completion_length=1,
        max_steps=100,
        kl_coef=0.0,
        learning_rate=5e-3 if peft else 2e-3,
    )
    trainer.train()
    scores = history(trainer, "objective/scores")
    assert scores[0] < 0.3
    assert scores[-1] > 0.95


def test_a_high_kl_price_keeps_the_policy_at_the_reference(world, tmp_path):
    runs = {}
    for kl_coef in (0.0, 5.0):
        trainer = make_trainer(
            world,
            tmp_path / str(kl_coef),
            trainer_kwargs={"reward_funcs": lucky_word},
            kl_coef=kl_coef,
            reward_weights=[0.0, 1.0],
            per_device_train_batch_size=64,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            learning_rate=2e-3,
            max_steps=30,
        )
        trainer.train()
        runs[kl_coef] = sum(history(trainer, "objective/kl")[-4:]) / 4
    assert runs[0.0] > 0.3
    assert abs(runs[5.0]) < 0.2 * runs[0.0]


def test_responses_that_are_left_out_are_in_no_mean_of_the_kl(world, tmp_path):
    """They would count as 0 nats, in the log and for the adaptive price."""
    kwargs = {"per_device_train_batch_size": 16, "mask_truncated_completions": True, "adaptive_kl_target": 1.0}
    trainer = make_trainer(world, tmp_path, **kwargs)
    for parameter in adapter_parameters(trainer.model, "ref").values():
        parameter.data += 0.05
    rollout(trainer, 64)
    found, finished = trainer._rollout, ~trainer._rollout.is_unfinished(trainer.eos_token_ids)
    assert finished.any() and not finished.all()
    metrics, kl = trainer._metrics["train"], found.kl[finished].sum(1).mean().item()
    assert metrics["objective/kl"][-1] == pytest.approx(kl) and abs(kl) > 0.01
    assert trainer._log_rollout(found) == pytest.approx(kl)
    assert torch.tensor(trainer._logs["extra"]["kl"]).isnan().sum() == (~finished).sum()
    found.mask.zero_()
    assert math.isnan(trainer._log_rollout(found)), "nothing is known of any"


def test_critic_warmup_and_its_own_learning_rate(world, tmp_path):
    options = {"critic_learning_rate": 3e-3, "max_steps": 4, "adaptive_kl_target": 1.0, "adaptive_kl_horizon": 64}
    trainer = make_trainer(world, tmp_path, critic_warmup_steps=4, **options)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {name for name in start if ".critic." in name}
    rates = {group["lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {1e-3, 3e-3}
    assert trainer._kl_coef == trainer.args.kl_coef, "the KL of a policy that stands still is no reason to change it"


def test_target_kl_stops_the_update_not_the_run(world, tmp_path):
    free = make_trainer(world, tmp_path / "free", learning_rate=5e-2, max_steps=8)
    free.train()
    held = make_trainer(world, tmp_path / "held", learning_rate=5e-2, max_steps=8, target_kl=1e-6)
    held.train()
    assert len(history(free, "policy/approxkl_avg")) == 8
    assert {*history(free, "objective/kl_coef")} == {free.args.kl_coef}
    # Each rollout's first minibatch is on policy; the second shows the KL and ends the rollout.
    assert len([kl for kl in history(held, "policy/approxkl_avg") if kl is not None]) == 4
    assert held.state.global_step == 8


def test_evaluation_during_training_changes_nothing_but_the_log(world, tmp_path):
    runs = []
    for name, strategy in (("plain", "no"), ("evaluated", "steps")):
        prompts = Dataset.from_dict({"prompt": models.prompts(8, seed=9)})
        trainer = make_trainer(
            world,
            tmp_path / name,
            trainer_kwargs={"eval_dataset": prompts},
            eval_strategy=strategy,
            eval_steps=4,
            per_device_eval_batch_size=4,
            max_steps=4,
        )
        trainer.train()
        runs.append(trainer)
    for metric in (
        "eval_objective/scores",
        "eval_objective/kl",
        "eval_loss/value_avg",
        "eval_rewards/reward_model/mean",
    ):
        assert len(history(runs[1], metric)) == 1 and not history(runs[0], metric), metric
    for name, parameter in runs[0].model.named_parameters():
        assert torch.equal(parameter, runs[1].model.get_parameter(name)), name


def test_adaptive_kl_raises_the_price(world, tmp_path):
    trainer = make_trainer(
        world, tmp_path, adaptive_kl_target=1e-4, adaptive_kl_horizon=64, learning_rate=5e-2, max_steps=16
    )
    trainer.train()
    prices = history(trainer, "objective/kl_coef")
    assert prices[-1] > prices[0] > 0


def test_a_reward_model_with_another_vocabulary_scores_text(world, tmp_path):
    """Words `v0 v1 …` are unknown to it, `w0 w1 …` sit at other ids: scored by ids it would read other words."""
    shifted = models.word_tokenizer(words=40)
    shifted.pad_token = None  # the model's configuration has it
    classifier = models.reward_model(vocabulary=45)
    trainer = make_trainer(
        world,
        tmp_path,
        model=models.causal_lm(),
        trainer_kwargs={
            "reward_model": classifier,
            "reward_processing_class": shifted,
            "peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        },
    )
    batch = rollout(trainer)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rows = [
        trainer.train_dataset[i]["prompt"] + [{"role": "assistant", "content": text}] for i, text in enumerate(texts)
    ]
    expected = []
    for row in rows:
        ids = shifted.apply_chat_template(row, return_tensors="pt", return_dict=False)
        expected.append(classifier(input_ids=ids).logits.item())
    assert trainer._rollout.scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_response_beyond_the_positions_of_a_reward_model_is_one_line(world, tmp_path):
    """On a GPU it would be a failed assertion of the device, of which nothing can be read."""
    roles = {"reward_model": models.reward_model(max_position_embeddings=8)}
    trainer = make_trainer(world, tmp_path, model=models.causal_lm(), trainer_kwargs=roles)
    with pytest.raises(UserError, match="tokens for the reward model, which has positions for 8: leave out long"):
        rollout(trainer)


def test_a_prompt_beyond_the_positions_of_the_policy_is_one_line(world, tmp_path):
    model = models.causal_lm(max_position_embeddings=8)
    trainer = make_trainer(world, tmp_path, model=model, trainer_kwargs={"reward_model": models.reward_model()})
    with pytest.raises(UserError, match="tokens for the policy, which has positions for 8: leave out long"):
        rollout(trainer)


def test_a_model_may_have_positions_for_everything():
    for unlimited in (XLNetConfig(), BloomConfig()):
        check_room(SimpleNamespace(config=unlimited), "the policy", 10_000)


def test_an_empty_prompt_is_one_line(world, tmp_path):
    trainer = make_trainer(world, tmp_path)
    with pytest.raises(UserError, match="A prompt has no tokens"):
        rollout_of(trainer, ["w1", ""])


def test_a_reward_model_with_another_chat_template_scores_text_in_it(world, tmp_path):
    """Same words, another template: by ids it would read a conversation of a form that it was never trained on."""
    own = models.word_tokenizer()
    own.chat_template = own.chat_template.replace("'> '", "'> w3 '")
    classifier = models.reward_model()
    kwargs = {"reward_model": classifier, "reward_processing_class": own}
    trainer = make_trainer(world, tmp_path, model=models.causal_lm(), trainer_kwargs=kwargs)
    batch = rollout(trainer)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    expected = []
    for row, text in zip(trainer.train_dataset, texts, strict=False):
        turns = row["prompt"] + [{"role": "assistant", "content": text}]
        ids = own.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        expected.append(classifier(input_ids=ids).logits.item())
    assert trainer._rollout.scores.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"dataloader_drop_last": True}, {"steps_per_generation": 2}, {"num_generations_eval": 2}],
    ids=str,
)
def test_each_prompt_of_an_evaluation_counts_the_same(world, tmp_path, options):
    """Ten prompts are a batch of eight and one of two, which counted as much or not at all; or more than a rollout."""

    def first_word(prompts, **kwargs):
        return [float(prompt[0]["content"].split()[0][1:]) for prompt in prompts]

    rows = models.prompts(10, seed=4)
    kwargs = {"reward_funcs": [first_word], "eval_dataset": Dataset.from_dict({"prompt": rows})}
    model = get_peft_model(models.causal_lm(), LoraConfig(task_type="CAUSAL_LM", **LORA))
    options |= {"per_device_eval_batch_size": 8, "per_device_train_batch_size": 2}
    trainer = make_trainer(world, tmp_path, model=model, trainer_kwargs=kwargs, **options)
    metrics = trainer.evaluate()
    expected = sum(first_word(rows)) / 10
    assert metrics["eval_objective/scores"] == pytest.approx(expected)
    loader = trainer.get_eval_dataloader()
    next(iter(loader))
    assert loader.remainder == 10 * trainer.num_generations_eval % 8  # of several processes, what is not repeated


def test_a_float32_head_of_tied_embeddings_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="no cast_lm_head_to_fp32 for LoRA on a base with tied embeddings"):
        make_trainer(world, tmp_path, cast_lm_head_to_fp32=True)


def test_two_rewards_of_one_name_are_refused(world, tmp_path):
    """Their numbers would be averaged in the log and one would hide the other in the table of completions."""

    def length(completions, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(UserError, match="Two rewards are called length"):
        make_trainer(world, tmp_path, trainer_kwargs={"reward_funcs": [length, length]})


def test_the_best_checkpoint_is_the_one_of_the_highest_reward(tmp_path):
    """Trainer's own choice, the lowest loss, would say how well the critic knows the rollout."""
    best = config(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    assert (best.metric_for_best_model, best.greater_is_better) == ("objective/rlhf_reward", True)
    given = config(tmp_path, save_strategy="best", eval_strategy="steps", metric_for_best_model="objective/kl")
    assert given.metric_for_best_model == "objective/kl"
    assert config(tmp_path).metric_for_best_model is None


def test_the_models_of_trls_ppo_trainer_are_taken_as_they_are(world, tmp_path):
    """A LoRA policy with a whole reward and value model, as TRL 1.12's script passes them."""
    value_model = models.reward_model(seed=4)
    start = {name: parameter.detach().clone() for name, parameter in value_model.named_parameters()}
    trainer = make_trainer(
        world,
        tmp_path,
        model=models.causal_lm(),
        trainer_kwargs={
            "ref_model": models.causal_lm(),
            "reward_model": models.reward_model(seed=4),
            "value_model": value_model,
            "peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        },
    )
    trainer.train()
    trainer.save_model()
    assert history(trainer, "objective/kl")[0] == pytest.approx(0.0, abs=1e-4)
    critic = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "critic"))
    moved = [name for name, parameter in critic.named_parameters() if not torch.equal(parameter, start[name])]
    assert "score.weight" in moved and len(moved) == len(start)
    assert (tmp_path / "adapter_model.safetensors").exists()


def lora_model(model, task_type: str, seed: int) -> PeftModel:
    """`model` with an adapter that changes what it says, its head trained where it has one."""
    torch.manual_seed(seed)
    heads = ["score"] if task_type == "SEQ_CLS" else None
    return get_peft_model(model, LoraConfig(task_type=task_type, modules_to_save=heads, **LORA)).eval()


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora policy", "full policy"])
def test_peft_models_are_reference_reward_model_and_critic(world, tmp_path, use_peft):
    """As TRL 1.12 takes them: each speaks with its adapter, and of the critic only the adapter is trained."""
    ema = {"ema_decay": 0.9} if use_peft else {}

    def build(folder, **kwargs):
        return make_trainer(
            world,
            tmp_path / folder,
            model=lora_model(models.causal_lm(), "CAUSAL_LM", 5) if use_peft else models.causal_lm(),
            trainer_kwargs={
                "ref_model": lora_model(models.causal_lm(), "CAUSAL_LM", 6),
                "reward_model": lora_model(models.reward_model(seed=2), "SEQ_CLS", 7),
                "value_model": lora_model(models.reward_model(seed=3), "SEQ_CLS", 8),
            },
            max_steps=2,
            **(ema | kwargs),
        )

    trainer = build("out", save_strategy="steps", save_steps=1)
    batch, width = rollout(trainer), trainer._rollout.mask.size(1)
    ids, mask = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), trainer._rollout.attention_mask
    real = trainer._rollout.mask.bool()
    values = lora_model(models.reward_model(seed=3), "SEQ_CLS", 8)
    with torch.no_grad():
        expected = plain_logps(lora_model(models.causal_lm(), "CAUSAL_LM", 6), ids, mask, width)
        torch.testing.assert_close(trainer._rollout.ref_logps[real], expected[real], rtol=1e-3, atol=1e-4)
        base = values.get_base_model()
        states = base.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -width - 1 : -1]
        torch.testing.assert_close(
            trainer._rollout.values[real], base.score(states)[..., 0][real], rtol=1e-3, atol=1e-4
        )
        judge = lora_model(models.reward_model(seed=2), "SEQ_CLS", 7)
        one = ids[0][mask[0].bool()]
        assert trainer._rollout.scores[0].item() == pytest.approx(judge(input_ids=one[None]).logits.item(), abs=1e-4)

    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    critic = {name for name in moved if "critic." in name}
    assert critic and all("lora_" in name or "modules_to_save" in name for name in critic)
    assert moved - critic and (not use_peft or all(".default." in name or ".ema." in name for name in moved - critic))
    saved = PeftModel.from_pretrained(models.reward_model(seed=3), tmp_path / "out" / "critic")
    own = trainer._base.critic.state_dict()
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, own[name], msg=name)
    if use_peft:
        kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert kept and not [name for name in kept if "critic" in name or "score" in name]

    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_moving_average_leaves_a_critic_of_its_own_alone(world, tmp_path):
    """PEFT puts a new adapter into every layer of its kind, the critic's too where it is there already."""
    trainer = make_trainer(
        world,
        tmp_path,
        trainer_kwargs={"value_model": models.reward_model(seed=4), "reward_model": models.reward_model()},
        model=lora_model(models.causal_lm(), "CAUSAL_LM", 5),
        ema_decay=0.9,
        max_steps=1,
    )
    trainer.train()
    trainer.save_model()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert saved.state_dict().keys() == models.reward_model().state_dict().keys()


def test_a_policy_loaded_beside_other_adapters_is_the_one_that_speaks(world, tmp_path):
    """PEFT leaves the first adapter active, whose samples would be trained on."""
    model = get_peft_model(models.causal_lm(), LoraConfig(task_type="CAUSAL_LM", **LORA), adapter_name="first")
    model.add_adapter("default", LoraConfig(task_type="CAUSAL_LM", **LORA))
    trainer = make_trainer(world, tmp_path, model=model, trainer_kwargs={"reward_model": models.reward_model()})
    rollout(trainer)
    assert trainer._rollout.kl.abs().max() < 1e-4


def test_a_reference_has_no_dropout(world, tmp_path):
    """A model that was just built or trained is in training mode, and the reference is a copy of it."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}
    policy = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)).train()
    trainer = make_trainer(world, tmp_path, model=policy, trainer_kwargs={"reward_model": models.reward_model()})
    rollout(trainer)
    assert trainer._rollout.kl.abs().max() < 1e-4


@pytest.mark.parametrize("same", ["model and ref_model", "value_model and reward_model"])
def test_one_object_in_two_roles_is_refused(world, tmp_path, same):
    model, classifier = models.causal_lm(), models.reward_model()
    roles = {"reward_model": classifier, "value_model": models.reward_model()}
    roles |= {"ref_model": model} if same.startswith("model") else {"value_model": classifier}
    with pytest.raises(UserError, match="must not be the same object"):
        make_trainer(world, tmp_path, model=model, trainer_kwargs=roles)


@pytest.mark.parametrize(
    "roles, message",
    [
        ({"value_model": models.reward_model()}, "value_model and the policy's adapter `critic` are two critics"),
        ({"reward_model": models.reward_model()}, "reward_model and the policy's adapter `reward` both score"),
        ({"reward_funcs": models.reward_model()}, "reward_funcs takes Python functions: pass a reward model"),
        ({"model": "gpt2"}, "model is the name gpt2, and PPOTrainer takes a loaded model"),
    ],
)
def test_models_that_do_not_fit_their_keyword_are_refused(world, tmp_path, roles, message):
    with pytest.raises(UserError, match=message):
        make_trainer(world, tmp_path, model=roles.pop("model", None), trainer_kwargs=roles)


def test_a_second_trainer_does_not_take_the_reference_of_the_first(world, tmp_path):
    model = shared_base_policy(world)
    make_trainer(world, tmp_path, model=model)
    with pytest.raises(UserError, match="model has an adapter `ref`, as of another PPOTrainer: delete it"):
        make_trainer(world, tmp_path, model=model)


def test_a_policy_under_another_name_is_refused(world, tmp_path):
    model = get_peft_model(models.causal_lm(), LoraConfig(task_type="CAUSAL_LM", **LORA), adapter_name="sft")
    with pytest.raises(UserError, match="The policy is the adapter `default`, and there is only sft"):
        make_trainer(world, tmp_path, model=model, trainer_kwargs={"reward_model": models.reward_model()})


def test_the_other_keywords_of_trls_ppo_trainer(world, tmp_path):
    model, seen = models.causal_lm(), []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    prompts = Dataset.from_dict({"prompt": models.prompts(4, seed=9)})
    roles = {"reward_model": models.reward_model(), "value_model": models.reward_model(seed=4)}
    options = {"callbacks": [Count()], "optimizers": (optimizer, None), "eval_dataset": {"a": prompts, "b": prompts}}
    trainer = make_trainer(
        world,
        tmp_path,
        model=model,
        trainer_kwargs=roles | options,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    assert seen == [1, 2] and trainer.optimizer.optimizer is optimizer
    assert len(history(trainer, "eval_objective/kl")) == 2
    moved = roles["value_model"].state_dict(), models.reward_model(seed=4).state_dict()
    assert not torch.equal(*(weights["score.weight"] for weights in moved))  # though the optimizer is of the policy's
    lora = LoraConfig(task_type="CAUSAL_LM", **LORA)
    with pytest.raises(UserError, match="model is a PeftModel already: leave peft_config out"):
        make_trainer(world, tmp_path, trainer_kwargs={"peft_config": lora})


FILTERS = {
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "eta_cutoff": 0.5,
    "suppress_tokens": list(range(5, 30)),
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[9]],
    "forced_eos_token_id": 1,
    "exponential_decay_length_penalty": (1, 2.0),
    "num_beams": 2,
    "temperature": 0.1,
    "top_k": 1,
    "max_new_tokens": 2,
}


@pytest.mark.parametrize("fast_paths", [["drop_finished"], []], ids=["our loop", "transformers' loop"])
def test_sampling_defaults_of_the_base_do_not_filter_rollouts(world, tmp_path, fast_paths):
    """generation_config.json of many bases has some; log-probabilities know nothing of them."""
    rollouts = []
    for defaults in ({}, FILTERS):
        model = shared_base_policy(world)
        of_base = model.get_base_model().generation_config
        of_base.update(**defaults)
        trainer = make_trainer(world, tmp_path, model=model, fast_paths=fast_paths)
        torch.manual_seed(0)
        rollouts.append(rollout(trainer, 16)["completion_ids"])
        assert model.get_base_model().generation_config is of_base, "it is saved with the model"
    assert torch.equal(*rollouts)


@pytest.mark.parametrize("asked", [{"num_beams": 2}, {"do_sample": False}, {"suppress_tokens": [*range(5, 60)]}])
def test_what_generation_kwargs_ask_for_is_done_by_transformers(world, tmp_path, asked):
    trainer = make_trainer(world, tmp_path, generation_kwargs=asked, max_steps=1)
    batch = rollout(trainer)
    inputs = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    again = trainer.model.eval().generate(**inputs, generation_config=trainer.generation_config)
    if "suppress_tokens" in asked:
        assert not torch.isin(batch["completion_ids"], torch.arange(5, 60)).any()
    elif "do_sample" in asked:
        ids = again[:, inputs["input_ids"].size(1) :][batch["completion_mask"].bool()]
        assert torch.equal(ids, batch["completion_ids"][batch["completion_mask"].bool()])
    trainer.train()
    assert history(trainer, "val/ratio")[0] == pytest.approx(1)


def test_a_bad_score_stops_with_the_row(world, tmp_path):
    def broken(prompts, completions, **kwargs):
        return [math.inf if i == 2 else 0.0 for i in range(len(prompts))]

    trainer = make_trainer(world, tmp_path, trainer_kwargs={"reward_funcs": broken})
    with pytest.raises(UserError, match=r"After step 0: .*'broken' returned inf for completion 2; .* There is no"):
        trainer.train()


def test_a_reward_model_that_gives_nan_stops_even_beside_a_function(world, tmp_path):
    model = shared_base_policy(world)
    model.get_base_model().score.modules_to_save["reward"].weight.data.fill_(math.nan)
    trainer = make_trainer(world, tmp_path, model=model, trainer_kwargs={"reward_funcs": lucky_word})
    with pytest.raises(
        UserError,
        match=r"After step 0: the sum of scores is nan, by the reward model of rows \[0, 1, .*, 15\]",
    ):
        trainer.train()


def test_a_reward_function_of_the_wrong_length_is_one_line(world, tmp_path):
    def short(prompts, completions, **kwargs):
        return [0.0] * 3

    trainer = make_trainer(world, tmp_path, trainer_kwargs={"reward_funcs": short})
    with pytest.raises(UserError, match=r"'short' returned 3 rewards; expected a list of 16 numbers"):
        trainer.train()


def test_a_function_may_pass_over_a_response(world, tmp_path):
    def some(prompts, completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(prompts))]

    make_trainer(world, tmp_path, trainer_kwargs={"reward_funcs": some}, max_steps=1).train()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kl_coef": -0.1}, "kl_coef must be at least 0"),
        ({"beta": 0.1}, "set kl_coef instead of beta"),
        ({"kl_estimator": "k2"}, "kl_estimator must be k1 or k3"),
        ({"loss_type": "grpo"}, "loss_type must be dapo or bnpo"),
        ({"lam": 1.5}, "lam must be between 0 and 1"),
        ({"ema_decay": 1.0}, "ema_decay must be above 0 and below 1"),
        ({"score_std": 0.0}, "score_std must be above 0"),
        ({"score_std": -1.0}, "score_std must be above 0, got -1"),
        ({"score_std": math.nan}, "score_std must be above 0, got nan"),
        ({"score_mean": math.inf}, "score_mean must be finite"),
        ({"reward_weights": [1.0, math.nan]}, "reward_weights must be finite"),
        ({"num_generations": 0}, "num_generations must be above 0"),
        ({"score_clip": -1.0}, "score_clip must be above 0"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be at least 0"),
        ({"fp16": True, "target_kl": 0.1}, "loss scaling of fp16"),
        (
            {"adaptive_kl_target": 6.0, "adaptive_kl_horizon": 3},
            "one rollout could take kl_coef below 0 by so short",
        ),
        ({"epsilon_high": -0.1}, "epsilon_high must be at least 0"),
        ({"max_completion_length": None}, "max_completion_length must be above 0, got None"),
        ({"kl_coef": 0.0, "adaptive_kl_target": 6.0}, "adaptive_kl_target multiplies kl_coef, which would stay 0"),
        ({"num_iterations": 1, "steps_per_generation": 2, "target_kl": 0.1}, "target_kl stops the later updates"),
        ({"mask_truncated_completions": True, "missing_eos_penalty": 1.0}, "missing_eos_penalty is for responses"),
        ({"total_episodes": 0}, "total_episodes must be above 0"),
        ({"kl_coef": math.nan}, "kl_coef must be at least 0, got nan"),
        ({"generation_kwargs": {"num_beamz": 2}}, "knows no generation argument num_beamz"),
        ({"generation_kwargs": '{"num_return_sequences": 2}'}, "takes no num_return_sequences: set num_generations"),
        ({"generation_kwargs": {"temperature": 2.0}}, "takes no temperature: set the argument temperature"),
        ({"generation_kwargs": {"prompt_lookup_num_tokens": 2}}, "ask for assisted_generation"),
        (
            {"generation_kwargs": {"num_beams": 2}, "use_transformers_continuous_batching": True},
            "ask for beam_sample",
        ),
        ({"steps_per_generation": 3}, "must be a multiple of gradient_accumulation_steps"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_config_defaults_and_total_episodes(tmp_path):
    args = config(tmp_path, total_episodes=100)
    assert args.num_generations == 1 and args.beta == 0.0 and args.disable_dropout
    assert args.generation_batch_size == 16
    assert args.max_steps == math.ceil(100 / 16) * 2 * 2


def test_fewer_prompts_than_a_rollout_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="One rollout is 16 prompts and the dataset has 8"):
        make_trainer(world, tmp_path, rows=8)


def test_scores_are_clipped(world, tmp_path):
    def large(prompts, completions, **kwargs):
        return [100.0 if i % 2 else -100.0 for i in range(len(prompts))]

    trainer = make_trainer(world, tmp_path, trainer_kwargs={"reward_funcs": large}, score_clip=3.0)
    rollout(trainer, 16)
    assert sorted(set(trainer._logs["extra"]["score"])) == [-3.0, 3.0]


def test_whitened_rewards_have_unit_spread_in_the_returns(world, tmp_path):
    """With lambda 1 and a critic of zeros the returns are the sums of rewards still to come."""
    runs = []
    for whiten_rewards in (False, True):
        model = shared_base_policy(world)
        model.get_base_model().score.modules_to_save["critic"].weight.data.zero_()
        trainer = make_trainer(world, tmp_path, model=model, lam=1.0, whiten_rewards=whiten_rewards)
        torch.manual_seed(0)
        batch = rollout(trainer, 16)
        mask = batch["completion_mask"]
        later = torch.cat([batch["returns"][:, 1:], torch.zeros(16, 1)], 1) * mask
        runs.append(((batch["returns"] - later)[mask.bool()], mask.sum()))
    (plain, _), (whitened, _) = runs
    assert whitened.std().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(whitened.mean(), plain.mean(), rtol=1e-3, atol=1e-4)


def test_plain_text_prompts_are_answered_and_scored_as_they_are(world, tmp_path):
    texts = [" ".join(f"w{(i + j) % 59}" for j in range(3)) for i in range(16)]
    trainer = PPOTrainer(
        args=config(tmp_path, max_steps=2),
        processing_class=AutoTokenizer.from_pretrained(world["base"]),
        model=shared_base_policy(world),
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )
    batch = rollout_of(trainer, texts)
    decoded = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=False)
    assert decoded[:4] == texts[:4]  # no chat template
    classifier = AutoModelForSequenceClassification.from_pretrained(world["base"], num_labels=1)
    classifier = PeftModel.from_pretrained(classifier, world["reward"]).eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[0]
    ids = ids[: 3 + batch["completion_mask"][0].sum()]
    classifier.config.pad_token_id = 0
    with torch.no_grad():
        assert trainer._rollout.scores[0].item() == pytest.approx(
            classifier(input_ids=ids[None]).logits.item(), abs=1e-5
        )
    trainer.train()
    assert len(history(trainer, "loss/value_avg")) == 2


def test_plain_text_is_scored_by_another_vocabulary_as_reward_trainer_reads_it(world, tmp_path):
    """With BOS, and EOS after a response that has ended: that is where its score was trained."""
    tokenizer, classifier = bos_tokenizer(), models.reward_model(vocabulary=258)
    texts = [f"w{i} w{i + 1}" for i in range(16)]
    trainer = PPOTrainer(
        args=config(tmp_path),
        processing_class=AutoTokenizer.from_pretrained(world["base"]),
        model=models.causal_lm(sharpness=1.0),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        reward_model=classifier,
        reward_processing_class=tokenizer,
    )
    trainer._rollout = Rollout([[5, 6], [6, 7]], [[7, 1], [8, 9]], is_chat=False)
    scores = trainer.score_responses(texts[:2], [" w2", " w3 w4"], trainer._rollout.completion_ids)
    rows = [tokenizer(text)["input_ids"] for text in ("w0 w1 w2</s>", "w1 w2 w3 w4")]
    alone = [classifier(input_ids=torch.tensor([ids])).logits.item() for ids in rows]
    assert scores == pytest.approx(alone, abs=1e-5)


def test_chat_is_scored_by_another_vocabulary_without_the_space_before_an_answer(world, tmp_path):
    tokenizer, classifier = bos_tokenizer(), models.reward_model(vocabulary=258)
    tokenizer.chat_template = models.word_tokenizer().chat_template
    kwargs = {"reward_model": classifier, "reward_processing_class": tokenizer}
    trainer = make_trainer(world, tmp_path, model=models.causal_lm(), trainer_kwargs=kwargs)
    trainer._rollout = Rollout([[5, 6]] * 2, [[7, 1]] * 2, is_chat=True)
    answers = [[{"role": "assistant", "content": text}] for text in ("w2", " w2")]
    clean, spaced = trainer.score_responses(models.prompts(1) * 2, answers, trainer._rollout.completion_ids)
    assert clean == spaced and answers[1][0]["content"] == " w2"
    parsed = [[{"role": "assistant", "reasoning_content": "w2"}]] * 2  # TRL's, of an answer cut while it thinks
    assert len(trainer.score_responses(models.prompts(1) * 2, parsed, trainer._rollout.completion_ids)) == 2


def test_a_four_bit_base_plays_all_roles(world, tmp_path):
    """bitsandbytes on a CPU: the base stays in 4 bits and untouched, adapters and head learn."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = never_pack(AutoModelForCausalLM.from_pretrained(world["base"], quantization_config=quantization))
    model = PeftModel.from_pretrained(base, world["sft"], is_trainable=True)
    add_score_roles(model, {"reward": world["reward"], "critic": world["reward"]})
    trainer = make_trainer(world, tmp_path, model=model, learning_rate=5e-6, critic_learning_rate=9e-5)
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {name for name in start if ".default." in name or ".critic." in name}
    assert history(trainer, "val/ratio")[0] == pytest.approx(1.0, abs=1e-3)
    assert trainer.model.get_base_model().score.modules_to_save["critic"].weight.dtype == torch.float32
