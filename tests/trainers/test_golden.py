"""The same rollouts give the same numbers as TRL 1.12.0's PPOTrainer, and each intended difference is shown.

`benchmarks/golden_trl112.py` wrote what is compared with here: models, prompts, sampled responses, and what TRL made
of them. Here the same models answer with the same responses, and PPOTrainer does the rest, over two rollouts, so that
the second sees what the updates after the first have changed.
"""

import functools
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from recipes.trainers.ppo_math import compute_gae, token_kl, token_rewards, whiten
from recipes.trainers.ppo_trainer import PPOConfig, PPOTrainer
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "trainers" / "golden"
NUMBERS = json.loads((GOLDEN / "trl112.json").read_text(encoding="utf-8"))
CASES = NUMBERS["cases"]
# TRL logs a mean over epochs, minibatches and micro-batches; its tensors have each.
STATISTICS = {
    "policy/approxkl_avg": "approxkl",
    "policy/clipfrac_avg": "pg_clipfrac",
    "loss/policy_avg": "pg_loss",
    "loss/value_avg": "vf_loss",
    "val/clipfrac_avg": "vf_clipfrac",
    "val/ratio": "ratio",
}
OBJECTIVES = ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/scores")
close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)


@functools.cache
def saved() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "trl112.safetensors")


def golden(name: str, rollout: int) -> dict[str, torch.Tensor]:
    prefix = f"{name}/{rollout}/"
    return {key.removeprefix(prefix): value for key, value in saved().items() if key.startswith(prefix)}


def model(role: str, eos: int):
    """A fresh copy of one of the golden models, in evaluation mode, that stops at `eos`."""
    cls = LlamaForCausalLM if role in ("policy", "ref", "lora") else LlamaForSequenceClassification
    labels = {} if cls is LlamaForCausalLM else {"num_labels": 1}
    built = cls(LlamaConfig(**(NUMBERS["model"] | {"eos_token_id": eos}), **labels))
    prefix = "policy." if role == "lora" else f"{role}."
    weights = {key.removeprefix(prefix): value for key, value in saved().items() if key.startswith(prefix)}
    built.load_state_dict(weights)
    if role == "lora":
        built = get_peft_model(built, LoraConfig(task_type="CAUSAL_LM", **NUMBERS["lora"]))
        adapter = {key.removeprefix("lora."): value for key, value in saved().items() if key.startswith("lora.")}
        assert not built.load_state_dict(adapter, strict=False).unexpected_keys
    return built


def tokenizer(pad: int, eos: int) -> PreTrainedTokenizerFast:
    names = [f"<{token}>" for token in range(NUMBERS["model"]["vocab_size"])]
    words = Tokenizer(models.WordLevel({name: token for token, name in enumerate(names)}, unk_token=names[-1]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=names[pad], eos_token=names[eos])


class Replay(PPOTrainer):
    """PPOTrainer that answers with TRL's samples, keeps its rollouts, and may train on advantages of TRL's."""

    def __init__(self, *args, case: str, take: tuple[str, ...] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.case, self.take, self.rollouts, self.losses = case, take, [], []

    def _generate_single_turn(self, *args):
        stops = self.eos_token_ids
        rows = golden(self.case, len(self.rollouts))["responses"].tolist()
        ends = [next((i for i, token in enumerate(row) if token in stops), len(row)) + 1 for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)], None

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        self.rollouts.append({name: value.clone() for name, value in rollout.items() if torch.is_tensor(value)})
        numbers = golden(self.case, len(self.rollouts) - 1)
        return rollout | {name: numbers[name] for name in self.take}

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


@pytest.fixture
def replay(tmp_path, monkeypatch):
    """Train a golden case with PPOTrainer; keyword arguments change its PPOConfig."""
    # Which rows share a minibatch is chance: here both sides keep the order of the rollout.
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)

    def run(name: str, take=(), **changes) -> Replay:
        case = CASES[name]["arguments"]
        micro_batches = case["gradient_accumulation_steps"]
        minibatches = 1 if micro_batches > 1 else case["num_mini_batches"]
        args = {
            "per_device_train_batch_size": case["per_device_train_batch_size"] // minibatches,
            "gradient_accumulation_steps": micro_batches,
            "steps_per_generation": minibatches * micro_batches,
            "num_iterations": case["num_ppo_epochs"],
            "max_completion_length": case["response_length"],
            "total_episodes": case["total_episodes"],
            "epsilon": case.get("cliprange", 0.2),
            "max_grad_norm": 0,
        }
        same = ("temperature", "learning_rate", "adam_epsilon", "kl_coef", "kl_estimator", "gamma", "lam", "vf_coef")
        same = (*same, "cliprange_value", "whiten_rewards", "missing_eos_penalty")
        args |= {key: case[key] for key in same if key in case}
        pad, eos = case["pad"], case["eos"]
        words = tokenizer(pad, eos)
        queries = [row for rollout in (0, 1) for row in golden(name, rollout)["queries"].tolist()]
        prompts = [words.decode([token for token in row if token != pad]) for row in queries]
        trainer = Replay(
            case=name,
            take=take,
            args=PPOConfig(
                str(tmp_path / str(len(list(tmp_path.iterdir())))),
                shuffle_dataset=False,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                **(args | changes),
            ),
            processing_class=words,
            model=model("lora" if case["lora"] else "policy", eos),
            ref_model=model("ref", eos),
            reward_model=model("reward", eos),
            value_model=model("value", eos),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
        )
        trainer.train()
        assert len(trainer.rollouts) == 2
        return trainer

    return run


def logged(trainer: Replay, name: str) -> torch.Tensor:
    """What was logged under `name`, an entry for each optimizer step or each rollout."""
    return torch.tensor([entry[name] for entry in trainer.state.log_history if name in entry])


def assert_same_rollout(ours: dict, theirs: dict) -> None:
    close(ours["old_per_token_logps"], theirs["logprobs"])
    close(ours["old_values"], theirs["values"])
    close(ours["returns"], theirs["returns"])
    close(ours["advantages"], theirs["advantages"])


@pytest.mark.parametrize("name", ["k1", "k3", "minibatches", "accumulated", "lora"])
def test_same_rollout_same_numbers(replay, name):
    """Rewards, advantages, returns, losses and metrics; the second rollout also shows that the updates are equal."""
    trainer = replay(name)
    for rollout in (0, 1):
        assert (golden(name, rollout)["responses"] != CASES[name]["arguments"]["eos"]).all()
        assert_same_rollout(trainer.rollouts[rollout], golden(name, rollout))
    for metric in (*OBJECTIVES, "objective/rlhf_reward"):
        close(logged(trainer, metric), torch.tensor([entry[metric] for entry in CASES[name]["logs"]]))
    tokens = trainer.rollouts[0]["completion_ids"].numel() / CASES[name]["arguments"]["num_mini_batches"]
    for metric, key in STATISTICS.items():
        per_step = torch.cat([golden(name, rollout)[key].mean(2).flatten() for rollout in (0, 1)])
        if "clipfrac" in metric:
            # A count of tokens beyond a limit: one within rounding of it falls on either side, by the processor.
            flips = ((logged(trainer, metric) - per_step).abs() * tokens).round()
            assert flips.max() <= 1 and flips.sum() <= 2, f"{metric}: {flips}"
        else:
            close(logged(trainer, metric), per_step, msg=lambda text, metric=metric: f"{metric}: {text}")
    # The comparison is of a policy that has moved, far enough to be clipped.
    assert (golden(name, 1)["ratio"][-1] - 1).abs().max() > 1e-3
    assert golden(name, 1)["pg_clipfrac"].max() > 0 and golden(name, 1)["vf_clipfrac"].max() > 0


def test_difference_score_position(replay):
    """TRL puts the score one position after EOS, and learns a value for that state, in which nothing is chosen.

    Here the score comes with EOS, the last choice. Everything that goes in is equal, and our own functions on a mask
    one token longer give TRL's returns and advantages: nothing else differs.
    """
    case, theirs = CASES["stops"]["arguments"], golden("stops", 0)
    ours = replay("stops").rollouts[0]
    mask = ours["completion_mask"].float()
    width = mask.size(1)
    ended = mask.sum(1) < width
    assert ended.any() and not ended.all()
    theirs = {name: value[:, :width] if value.dim() == 2 else value for name, value in theirs.items()}
    close(ours["old_per_token_logps"], theirs["logprobs"] * mask)
    close(ours["old_values"], theirs["values"] * mask)
    kl = token_kl(theirs["logprobs"], theirs["ref_logprobs"], mask, "k1")

    def outcome(mask):
        rewards = token_rewards(theirs["scores"], kl, mask, case["kl_coef"])
        values = theirs["values"] * mask
        return rewards, compute_gae(rewards, values, mask, 1.0, 0.95), values

    one_longer = torch.cat([torch.ones(len(mask), 1), mask[:, :-1]], 1)
    rewards, advantages, values = outcome(one_longer)
    close(rewards, theirs["rewards"])
    close(advantages + values, theirs["returns"])
    close(whiten(advantages * mask, mask), theirs["advantages"])
    rewards, advantages, values = outcome(mask)
    close(advantages + values, ours["returns"])
    close(whiten(advantages, mask), ours["advantages"])
    # A response cut at the limit has no state after it, and no difference.
    close(ours["returns"][~ended], theirs["returns"][~ended])
    assert (ours["returns"] - theirs["returns"])[ended].abs().max() > 0.01


def test_difference_token_mean(replay):
    """TRL averages over the tokens of a micro-batch and then over micro-batches, so a token's weight depends on who
    shares its micro-batch; here all tokens of a minibatch weigh the same. `loss_type: bnpo` is TRL's mean.

    TRL's metrics also average approximate KL and ratio over padding.
    """
    theirs = golden("stops", 0)
    steps = CASES["stops"]["arguments"]["gradient_accumulation_steps"]
    tokens = theirs["responses"].ne(0).view(steps, -1).sum(1)
    by_micro_batch = theirs["pg_loss"][0, 0].mean()
    by_token = (theirs["pg_loss"][0, 0] * tokens).sum() / tokens.sum()
    assert (by_micro_batch - by_token).abs() > 0.01
    expected = {"bnpo": by_micro_batch, "dapo": by_token}
    for loss_type, mean in expected.items():
        trainer = replay("stops", take=("advantages",), loss_type=loss_type, vf_coef=0)
        close(torch.tensor(sum(trainer.losses[:steps])), mean)
        if loss_type == "bnpo":
            # Same advantages, same mean: the same update of the policy, seen in the next epoch and the next rollout.
            real = tokens.sum() / theirs["responses"].numel()
            approxkl = theirs["approxkl"].mean(2).flatten() / real
            close(logged(trainer, "policy/approxkl_avg")[:3], approxkl)
            assert approxkl[1] > 1e-4
            mask = trainer.rollouts[1]["completion_mask"]
            close(trainer.rollouts[1]["old_per_token_logps"], golden("stops", 1)["logprobs"][:, : mask.size(1)] * mask)


def test_difference_eos_that_pads(replay):
    """With a tokenizer that pads with EOS, TRL takes EOS for padding: it is not trained, and the score comes early."""
    theirs, ours = golden("pad_is_eos", 0), replay("pad_is_eos").rollouts[0]
    mask = ours["completion_mask"]
    width = mask.size(1)
    eos = CASES["pad_is_eos"]["arguments"]["eos"]
    ended = (theirs["responses"] == eos).any(1)
    assert ended.any() and not ended.all()
    theirs_mask = theirs["responses"][:, :width] != eos
    assert (mask.sum(1) == theirs_mask.sum(1) + ended).all()
    assert (theirs["advantages"][:, :width][(mask == 1) & ~theirs_mask] == 0).all()
    close(ours["old_per_token_logps"] * theirs_mask, theirs["logprobs"][:, :width] * theirs_mask)
    assert ours["advantages"][(mask == 1) & ~theirs_mask].abs().min() > 0


def test_difference_minibatches_under_accumulation(replay):
    """With gradient accumulation TRL's minibatches share one optimizer step, and its metrics average in zeros.

    So its run is our run of one minibatch.
    """
    case = "accumulated_minibatches"
    trainer = replay(case)
    for rollout in (0, 1):
        assert_same_rollout(trainer.rollouts[rollout], golden(case, rollout))
        ratio = golden(case, rollout)["ratio"]  # (epochs, minibatches, micro-batches)
        assert (ratio[:, :, 2:] == 0).all()
        per_step = logged(trainer, "val/ratio").view(2, -1)[rollout]
        close(ratio[:, :, :2].mean((1, 2)), per_step)
        close(torch.tensor(CASES[case]["logs"][rollout]["val/ratio"]), per_step.mean() / 2)


def test_difference_last_batch_of_the_dataset(replay):
    """On the last batch of each pass over the dataset TRL steps after every micro-batch: accumulation is off.

    The policy then moves within the window of the first update.
    """
    trainer = replay("last_batch")
    for rollout, moves in ((0, False), (1, True)):
        assert_same_rollout(trainer.rollouts[rollout], golden("last_batch", rollout))
        assert (golden("last_batch", rollout)["approxkl"][0].max() > 1e-6) == moves
    first_of_each_rollout = logged(trainer, "policy/approxkl_avg").view(2, -1)[:, 0]
    close(first_of_each_rollout, torch.zeros(2), atol=1e-9)


def test_difference_max_grad_norm(replay):
    """TRL ignores `max_grad_norm`; here it clips, and 0 turns it off."""
    for key, value in golden("k1", 1).items():
        assert torch.equal(value, golden("max_grad_norm", 1)[key]), key
    clipped = replay("k1", max_grad_norm=CASES["max_grad_norm"]["arguments"]["max_grad_norm"])
    assert_same_rollout(clipped.rollouts[0], golden("k1", 0))
    moved = clipped.rollouts[1]["old_per_token_logps"] - golden("k1", 1)["logprobs"]
    assert moved.abs().max() > 1e-3
