"""What PPO can do beside its loop: demonstrations (PPO-ptx), an average of the policy (EMA), warnings that say why."""

import logging
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from recipes.cli.errors import UserError
from recipes.models.adapters import active_role, adapter_parameters, use_role
from recipes.models.heads import base_of
from recipes.trainers.ppo_monitor import POOR_CRITIC_ROLLOUTS, PPOMonitor
from recipes.trainers.ptx import IGNORED, PtxBatches
from tests import tiny_models as models
from tests.trainers.conftest import config, history, make_trainer

DEMONSTRATIONS = {
    "prompt": models.prompts(6, seed=5),
    "completion": [[{"role": "assistant", "content": " ".join(["w7"] * (i + 1))}] for i in range(6)],
}


def ptx_batches(rows: dict, batch_size: int = 2, max_length: int = 32) -> PtxBatches:
    return PtxBatches(Dataset.from_dict(rows), models.word_tokenizer(), batch_size, max_length, seed=0)


def trained_text(batches: PtxBatches, step: int) -> list[str]:
    batch = batches(step, 0, 1)
    return [
        batches.tokenizer.decode(row[labels != IGNORED])
        for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def test_ptx_trains_the_answer_and_nothing_else():
    batch = ptx_batches(DEMONSTRATIONS, batch_size=6)(0, 0, 1)
    assert batch["attention_mask"].sum(1).tolist() == [(row != 0).sum().item() for row in batch["input_ids"]]
    texts = trained_text(ptx_batches(DEMONSTRATIONS, batch_size=6), 0)
    assert sorted(texts) == [" ".join(["w7"] * (i + 1)) + " <eos>" for i in range(6)]


THINKING = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{{ message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> w50 w51 ' }}{% endif %}"
)


def test_ptx_and_sft_train_the_same_tokens_where_the_generation_prompt_is_no_prefix(tmp_path):
    """As templates with <think>: what opens an answer in generation is missing from finished answers."""
    tokenizer = models.word_tokenizer()
    tokenizer.chat_template = THINKING
    rows = Dataset.from_dict(DEMONSTRATIONS)
    batches = PtxBatches(rows, tokenizer, 6, 32, seed=0)
    assert sorted(trained_text(batches, 0)) == [" ".join(["w7"] * (i + 1)) + " <eos>" for i in range(6)]
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=32)
    trainer = SFTTrainer(models.causal_lm(), args, train_dataset=rows, processing_class=tokenizer)
    for ours, theirs in zip(batches.rows, trainer.train_dataset, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        assert [label != IGNORED for label in ours["labels"]] == [label != IGNORED for label in theirs["labels"]]


SWITCH = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% if message['role'] == 'assistant' and not thinking %}{{ 'w50 w51 ' }}{% endif %}"
    "{{ message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' if thinking else '<assistant> w50 w51 ' }}{% endif %}"
)


def test_ptx_takes_the_arguments_of_the_chat_template(world, tmp_path):
    """As `enable_thinking: true`: demonstrations and rollouts answer prompts of one form."""
    tokenizer, rows = models.word_tokenizer(), Dataset.from_dict(DEMONSTRATIONS)
    tokenizer.chat_template = SWITCH
    for thinking in (False, True):
        batches = PtxBatches(rows, tokenizer, 6, 32, seed=0, thinking=thinking)
        texts = tokenizer.batch_decode(list(batches.rows["input_ids"]))
        assert all(("w50 w51" in text) != thinking for text in texts)
        assert sorted(trained_text(batches, 0)) == [" ".join(["w7"] * (i + 1)) + " <eos>" for i in range(6)]
    kwargs = {"ptx_coef": 1.0, "chat_template_kwargs": {"thinking": True}}
    trainer = make_trainer(world, tmp_path, trainer_kwargs={"ptx_dataset": rows}, **kwargs)
    assert trainer._ptx.template_arguments == {"thinking": True}


def test_ptx_text_is_trained_whole():
    assert trained_text(ptx_batches({"text": ["w1 w2 w3"]}, batch_size=1), 0) == ["w1 w2 w3 <eos>"]


def test_ptx_processes_share_an_epoch_and_each_has_another_order():
    batches = ptx_batches({"text": [f"w{i}" for i in range(8)]})
    seen = [[row[0].item() for row in batches(step, index, 2)["input_ids"]] for step in range(4) for index in range(2)]
    first, second = sum(seen[:4], []), sum(seen[4:], [])
    assert sorted(first) == sorted(second) == sorted({*first}) and first != second
    again = ptx_batches({"text": [f"w{i}" for i in range(8)]})
    assert [row[0].item() for row in again(3, 1, 2)["input_ids"]] == seen[-1]  # a resumed run needs no state


def test_a_demonstration_without_room_for_its_answer_is_refused():
    with pytest.raises(UserError, match="Row 1 of the ptx dataset has nothing to train within 4 tokens"):
        ptx_batches(DEMONSTRATIONS, max_length=4)


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_ptx_teaches_the_demonstrations_beside_ppo(world, tmp_path, coefficient):
    trainer = make_trainer(
        world,
        tmp_path,
        trainer_kwargs={"ptx_dataset": Dataset.from_dict(DEMONSTRATIONS)} if coefficient else {},
        ptx_coef=coefficient,
        ptx_max_length=32,
        learning_rate=1e-2,
        max_steps=24,
    )
    batch = ptx_batches(DEMONSTRATIONS, batch_size=6)(0, 0, 1)

    def loss():
        with torch.no_grad():
            return trainer.model(**batch).loss.item()

    before = loss()
    trainer.train()
    if coefficient:
        logged = history(trainer, "loss/ptx_avg")
        assert logged[0] == pytest.approx(before, rel=0.3)
        assert logged[-1] < 0.5 * logged[0] and loss() < 0.5 * before
    else:
        assert loss() > 0.5 * before and not history(trainer, "loss/ptx_avg")


def test_ptx_without_demonstrations_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="ptx_coef needs demonstrations"):
        make_trainer(world, tmp_path, ptx_coef=1.0)


def test_the_mean_of_the_policy_is_kept_saved_and_resumed(world, tmp_path):
    decay, states = 0.7, []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            states.append({n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n})

    whole = make_trainer(
        world,
        tmp_path / "whole",
        trainer_kwargs={"callbacks": [Record()]},
        ema_decay=decay,
        save_strategy="steps",
        save_steps=3,
        max_steps=6,
    )
    mean = {n: p.detach().clone() for n, p in whole.model.named_parameters() if ".default." in n}
    whole.train()
    for state in states:
        mean = {name: decay * value + (1 - decay) * state[name] for name, value in mean.items()}
    for name, value in mean.items():
        torch.testing.assert_close(whole.model.get_parameter(name.replace(".default.", ".ema.")), value)
        assert not torch.equal(value, states[-1][name])
    whole.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "whole" / "ema"))
    for name, value in mean.items():
        torch.testing.assert_close(loaded.get_parameter(name), value)

    resumed = make_trainer(world, tmp_path / "resumed", ema_decay=decay, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_the_mean_of_a_full_model_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="ema_decay averages the policy's adapter: it needs LoRA"):
        make_trainer(
            world,
            tmp_path,
            model=models.causal_lm(),
            trainer_kwargs={"reward_model": models.reward_model()},
            ema_decay=0.9,
        )


HEALTHY = {"kl": torch.tensor([0.1, 0.4, 0.2]), "scores": torch.tensor([0.0, 1.0, 2.0]), "cut_share": 0.1}
HEALTHY["explained_variance"] = 0.3


@pytest.mark.parametrize(
    ("kwargs", "numbers", "expected"),
    [
        ({"top_k": 5}, {"kl": torch.tensor([-2.0, -3.0, -2.5])}, r"is -2.50 nats .* but filtered by top_k=5"),
        ({"generation_kwargs": {"min_new_tokens": 4}}, {"kl": torch.full((3,), -1.0)}, "filtered by min_new_tokens=4"),
        ({}, {"kl": torch.full((3,), -1.0)}, "generation config's temperature"),
        ({}, {"kl": torch.tensor([60.0, 70.0, 80.0])}, r"is 70 nats .* Raise kl_coef"),
        ({"adaptive_kl_target": 2.0}, {"kl": torch.tensor([10.0, 11.0, 12.0])}, r"is 11 nats"),
        ({}, {"cut_share": 1.0}, r"A share of 1.00 .* was cut at max_completion_length \(8\).* pads with EOS"),
        ({}, {"cut_share": 0.5}, r"A share of 0.50 of the responses was cut at max_completion_length"),
        ({}, {"scores": torch.full((3,), 0.5)}, "scored 0.5: there is nothing to learn"),
    ],
)
def test_a_rollout_that_looks_wrong_is_said_once_and_why(tmp_path, caplog, kwargs, numbers, expected):
    health = PPOMonitor(config(tmp_path, **kwargs), pad_is_eos=True, ratio_tolerance=1e-3)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        health.rollout(**HEALTHY)
        assert not caplog.records
        health.rollout(**(HEALTHY | numbers))
        health.rollout(**(HEALTHY | numbers))
    assert len(caplog.records) == 1
    (message,) = caplog.messages
    assert re.search(expected, message), message


@pytest.mark.parametrize("weights", [None, [1.0, 0.0]])
def test_a_response_that_only_a_logged_function_judges_has_no_score(world, tmp_path, weights):
    """It would count as 0, as if a function of some weight had said so."""

    def mine(completions, **kwargs):
        return [None if i == 3 else 1.0 for i in range(len(completions))]

    kwargs = {"reward_funcs": [mine, constant], "value_model": models.reward_model()}
    trainer = make_trainer(
        world, tmp_path, models.causal_lm(), trainer_kwargs=kwargs, reward_weights=weights, max_steps=1
    )
    if weights is None:
        trainer.train()
    else:
        with pytest.raises(UserError, match=r"After step 0: row 3 of the rollout has no reward of mine\."):
            trainer.train()
    with pytest.raises(ValueError, match="reward_weights are all 0"):
        config(tmp_path, reward_weights=[0.0])


def test_noise_around_no_kl_is_not_called_negative(tmp_path, caplog):
    health = PPOMonitor(config(tmp_path), pad_is_eos=False, ratio_tolerance=1e-3)
    caplog.clear()
    health.rollout(**(HEALTHY | {"kl": torch.tensor([-1.5, 1.0, -0.8])}))
    assert not caplog.records


def test_a_poor_critic_is_said_after_ten_rollouts_running(tmp_path, caplog):
    health = PPOMonitor(config(tmp_path), pad_is_eos=False, ratio_tolerance=1e-3)
    caplog.clear()
    poor = HEALTHY | {"explained_variance": -0.2}
    for numbers in [poor] * (POOR_CRITIC_ROLLOUTS - 1) + [HEALTHY] + [poor] * (POOR_CRITIC_ROLLOUTS - 1):
        health.rollout(**numbers)
    assert not caplog.records
    health.rollout(**poor)
    assert "explained_variance was below 0 in 10 rollouts" in caplog.messages[0]


def constant(prompts, completions, **kwargs):
    return [1.0] * len(prompts)


def test_a_real_run_says_what_is_wrong_with_it(world, tmp_path, caplog):
    """Filtered sampling, one score for all, a limit that cuts all, and a policy that is not the rollout's."""
    trainer = make_trainer(
        world,
        tmp_path,
        model=models.causal_lm(sharpness=2.0),
        trainer_kwargs={"reward_funcs": constant, "ref_model": models.causal_lm(sharpness=4.0)},
        top_k=2,
        max_completion_length=1,
        max_steps=2,
        fast_paths=[],
    )
    generate = trainer._generate_and_score_completions

    def other_policy(inputs):
        batch = generate(inputs)
        with torch.no_grad():
            trainer.model.model.norm.weight.mul_(1.5)
        return batch

    trainer._generate_and_score_completions = other_policy
    trainer.train()
    text = " ".join(caplog.messages)
    assert "scored 1: there is nothing to learn" in text
    assert "cut at max_completion_length (1)" in text
    assert "before the first update on a rollout, not 1" in text


def test_a_healthy_run_says_nothing(world, tmp_path, caplog):
    make_trainer(world, tmp_path, max_steps=4, max_completion_length=110).train()
    assert not [record for record in caplog.records if record.name == "recipes.trainers.ppo_monitor"]


def test_a_loss_that_is_nan_stops_with_rows_and_the_last_checkpoint(world, tmp_path):
    trainer = make_trainer(world, tmp_path, save_strategy="steps", save_steps=2, max_steps=8)
    losses = trainer._compute_loss

    def poisoned(model, inputs):
        if trainer.state.global_step == 3:
            inputs["returns"][1, 0] = math.nan
            with torch.no_grad():
                trainer.model.get_base_model().score.modules_to_save["critic"].weight.fill_(math.nan)
        return losses(model, inputs)

    trainer._compute_loss = poisoned
    with pytest.raises(UserError, match=r"After step 3: the loss is nan, .* rows \[0, 1, 2, 3\]\. .*checkpoint-2"):
        trainer.train()


@pytest.mark.parametrize("role", ["ref", "critic"])
def test_a_role_that_gives_nan_stops_before_the_first_update(world, tmp_path, role):
    trainer = make_trainer(world, tmp_path)
    for parameter in adapter_parameters(trainer.model, role).values():
        parameter.data.fill_(math.nan)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".default." in name}
    cause = "the KL is nan, by log-probabilities of the reference" if role == "ref" else "the sum of values is nan"
    with pytest.raises(UserError, match=rf"After step 0: {cause}.*There is no checkpoint to go on from"):
        trainer.train()
    assert all(torch.equal(trainer.model.get_parameter(name), value) for name, value in weights.items())


def test_logits_that_are_not_finite_stop_with_the_step(world, tmp_path):
    """Of weights that are, as where half precision overflows."""
    trainer = make_trainer(world, tmp_path, fast_paths=["drop_finished"])
    head = base_of(trainer.model).lm_head
    head.register_forward_hook(lambda _, args, logits: logits.masked_fill(logits == logits.max(), math.inf))
    with pytest.raises(UserError, match="After step 0: Sampling: the policy's logits are .* There is no checkpoint"):
        trainer.train()


@pytest.mark.parametrize("fast_paths", [["drop_finished"], []], ids=["our loop", "transformers' loop"])
def test_a_policy_that_is_not_finite_stops_before_it_is_sampled(world, tmp_path, fast_paths):
    trainer = make_trainer(world, tmp_path, fast_paths=fast_paths)
    for parameter in adapter_parameters(trainer.model, "default").values():
        parameter.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"After step 0: nothing can be sampled .*\.default\.weight are not"):
        trainer.train()


@pytest.mark.parametrize("full", [False, True])
def test_checkpointing_leaves_one_hook_on_the_embeddings(world, tmp_path, full):
    own = {"model": models.causal_lm(), "trainer_kwargs": {"reward_model": models.reward_model()}} if full else {}
    trainer = make_trainer(world, tmp_path, activation_checkpointing=True, max_steps=12, **own)
    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            counts.append(len(base_of(model).get_input_embeddings()._forward_hooks))

    trainer.add_callback(Count())
    trainer.train()
    assert len(set(counts)) == 1, "three rollouts, as many hooks"
    block = base_of(trainer.model).model.layers[0]
    assert block._gradient_checkpointing_func.keywords["use_reentrant"] is False, "torch's own default is true"


def test_a_switch_of_roles_does_not_walk_the_model(world, tmp_path, monkeypatch):
    """Checkpointing switches once a block in every backward."""
    trainer = make_trainer(world, tmp_path, activation_checkpointing=True, max_steps=1)
    trainer.train()
    model, walks = trainer.model, []
    modules = type(model).modules
    monkeypatch.setattr(type(model), "modules", lambda self: walks.append(self) or modules(self))
    for role in ("critic", "default", "reward", "ref"):
        with use_role(model, role):
            assert active_role(model) == role
    assert not walks
