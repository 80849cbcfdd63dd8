"""Every family goes through SFT, reward model and PPO by the same arguments but `model_name_or_path`.

The table in docs/models.md is what this file found: `UPDATE_MATRIX=1 bash scripts/test.sh tests/test_architectures.py`
writes it, and an ordinary run fails where it is stale.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from recipes import ppo, reward, sft
from recipes.errors import UserError
from recipes.tokenization import load_tokenizer, turn_end
from tests.architectures import FAMILIES
from tests.conftest import ROOT

STEPS = {"sft": sft, "reward": reward, "ppo": ppo}
MODES = {"LoRA": {}, "full": {"use_peft": "false", "learning_rate": 1e-3}}
COMMON = {"max_steps": 2, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": "true"}
ARGUMENTS = {
    "sft": {"per_device_train_batch_size": 4},
    "reward": {"per_device_train_batch_size": 4, "eval_strategy": "no", "test_split_size": 0},
    "ppo": {"per_device_train_batch_size": 8, "max_completion_length": 8, "num_iterations": 2},
}
RESULTS: dict[str, dict[str, str]] = {}
PASSES = "✓"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Prompts of one to seven words, so that batches are padded, with demonstrations and rankings."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        return " ".join(f"w{word}" for word in torch.randint(59, (words,), generator=generator).tolist())

    rows = {"sft": [], "reward": [], "ppo": []}
    for number in range(8):
        prompt = [{"role": "user", "content": text(1 + number % 7)}]
        texts = [text(1 + (number + k) % 4) for k in range(3)]
        rows["sft"].append({"messages": [*prompt, {"role": "assistant", "content": texts[0]}]})
        responses = [{"text": answer, "rank": rank} for rank, answer in enumerate(texts, start=1)]
        rows["reward"].append({"id": str(number), "prompt": prompt, "responses": responses, "annotator": "a"})
        rows["ppo"].append({"prompt": prompt})
    for step, lines in rows.items():
        (folder / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {step: str(folder / f"{step}.jsonl") for step in rows}


@pytest.fixture
def train(data, monkeypatch):
    """`train(step, output_dir, **arguments)` runs the step's own `main()` and returns its trainer."""

    def train(step: str, output_dir: Path, **arguments):
        recipe, trainers = STEPS[step], []
        save = recipe.finish
        line = [step, "--config", str(ROOT / "recipes" / "configs" / "tiny_world" / f"{step}.yaml")]
        arguments = COMMON | ARGUMENTS[step] | {"dataset_name": data[step], "output_dir": output_dir} | arguments
        line += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", line)
            patch.setattr(recipe, "finish", lambda trainer, *rest: (trainers.append(trainer), save(trainer, *rest)))
            recipe.main()
        return trainers[0]

    return train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a saved adapter or model."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def history(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def load_plain(auto_class, folder: Path, base: str, **kwargs):
    """A step's output by transformers and peft alone."""
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(auto_class.from_pretrained(base, **kwargs), folder).eval()
    return auto_class.from_pretrained(folder, **kwargs).eval()


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that training changed."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def check_sft(trainer, folder: Path, base: str, mode: str) -> None:
    plain, tokenizer = load_plain(AutoModelForCausalLM, folder, base), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False, return_tensors="pt")
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
        torch.testing.assert_close(logits, trainer.model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        swapped = plain(input_ids=torch.cat([ids[:, 5:-1], ids[:, :5], ids[:, -1:]], 1)).logits[:, -1]
    assert (swapped - logits[:, -1]).abs().max() > 1e-2, "context and order have to matter for the checks to work"
    if mode == "LoRA":
        still = [name for name, value in weights(folder).items() if "lora_B" in name and not value.any()]
        assert not still, "every adapted module learns"


def check_reward(trainer, folder: Path, base: str) -> None:
    plain = load_plain(AutoModelForSequenceClassification, folder, base, num_labels=1)
    tokenizer = load_tokenizer(str(folder))
    plain.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    texts = [("w1", "w4 w5 w6"), ("w7 w8 w9", "w4 w5 w2")]
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in texts]
    rows = tokenizer.apply_chat_template(turns, return_dict=False)
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        alone = torch.cat([plain(input_ids=torch.tensor([row])).logits for row in rows])
        scores = trainer.model.eval()(**batch).logits
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)
    assert (alone[0] - alone[1]).abs() > 1e-4
    statistics = json.loads((folder / "reward_statistics.json").read_text())
    assert statistics["n"] == 24 and statistics["std"] > 0


@torch.no_grad()
def check_ppo(trainer, folder: Path, base: str, policy: Path, reward_path: Path | None) -> None:
    """The numbers of PPO's short cuts against plain models that see one unpadded row at a time."""
    assert history(trainer, "val/ratio")[0] == pytest.approx(1.0, abs=1e-4)
    assert history(trainer, "policy/approxkl_avg")[0] == pytest.approx(0.0, abs=1e-7)
    assert history(trainer, "objective/kl")[0] == pytest.approx(0.0, abs=1e-3)
    before, after = weights(policy), weights(folder)
    changed = moved(before, after)
    assert changed == set(before) if (folder / "adapter_config.json").exists() else len(changed) > 0.7 * len(before)

    prompts, completions = trainer._prompt_ids, trainer._completion_ids
    assert len({len(row) for row in prompts}) > 1, "prompts have to be padded for the checks to work"
    pad = trainer._tokenizer.pad_token_id
    span, width = max(map(len, prompts)), max(map(len, completions))
    pairs = list(zip(prompts, completions, strict=True))
    ids = torch.tensor([[pad] * (span - len(p)) + p + c + [pad] * (width - len(c)) for p, c in pairs])
    mask = torch.tensor([[0] * (span - len(p)) + [1] * len(p + c) + [0] * (width - len(c)) for p, c in pairs])

    logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]
    plain = load_plain(AutoModelForCausalLM, folder, base)
    for row, (p, c) in enumerate(pairs):
        table = plain(input_ids=torch.tensor([p + c])).logits[0, len(p) - 1 : -1].float().log_softmax(-1)
        expected = table.gather(1, torch.tensor(c)[:, None])[:, 0]
        torch.testing.assert_close(logps[row, : len(c)], expected, rtol=1e-4, atol=1e-4)

    values = trainer._values(trainer.model, ids, mask, width)
    critic = load_plain(AutoModelForSequenceClassification, folder / "critic", base, num_labels=1)
    critic.config.get_text_config().pad_token_id = None  # read the state of the last token, whatever it is
    for row, (p, c) in enumerate(pairs):
        for length in {0, len(c) - 1}:
            value = critic(input_ids=torch.tensor([p + c[:length]])).logits[0, 0]
            torch.testing.assert_close(values[row, length], value, rtol=1e-4, atol=1e-4)
    assert values.std() > 0

    if reward_path is not None:
        changed = moved(weights(reward_path), weights(folder / "critic"))
        assert any("score" in name for name in changed) and len(changed) > 0.7 * len(weights(reward_path))
        scorer = load_plain(AutoModelForSequenceClassification, reward_path, base, num_labels=1)
        scorer.config.get_text_config().pad_token_id = pad
        stops = trainer.eos_token_ids
        end = turn_end(trainer._tokenizer, stops)
        rows = [p + c + (end if c[-1] in stops else []) for p, c in pairs]
        expected = torch.cat([scorer(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
        scores = torch.tensor(trainer.reward_model(None, None, None))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, mode, train, tmp_path):
    family = FAMILIES[name]
    base = family.save(tmp_path / "base")
    result = RESULTS.setdefault(name, {})
    arguments = MODES[mode]
    try:
        trainer = train("sft", tmp_path / "sft", model_name_or_path=base, **arguments)
        check_sft(trainer, tmp_path / "sft", base, mode)
        trainer = train("reward", tmp_path / "reward", model_name_or_path=tmp_path / "sft", **arguments)
        check_reward(trainer, tmp_path / "reward", base)
        pair = {"model_name_or_path": tmp_path / "sft", "reward_model_name_or_path": tmp_path / "reward"}
        trainer = train("ppo", tmp_path / "ppo", **pair, **arguments)
        check_ppo(trainer, tmp_path / "ppo", base, tmp_path / "sft", tmp_path / "reward")
        result[mode] = PASSES
    except UserError as error:
        result[mode] = str(error).replace(str(tmp_path), "")
        raise
