"""Every family goes through SFT, reward model and PPO by the same arguments but `model_name_or_path`.

The table in docs/models.md is what this file found:
`UPDATE_MATRIX=1 bash scripts/test.sh tests/models/test_architectures.py` writes it, and an ordinary run fails where it
is stale.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig, get_quantization_config

from recipes.cli.errors import UserError
from recipes.models.loading import never_pack
from recipes.models.source import resolve_model
from recipes.models.tokenization import load_tokenizer, turn_end
from tests.architectures import FAMILIES, TOKENIZERS
from tests.conftest import ROOT, run_recipe, write_jsonl
from tests.tiny_models import save_adapter

MODES = {"LoRA": {}, "full": {"use_peft": "false"}, "4-bit": {"load_in_4bit": "true"}}
IN_4_BIT = ("Llama 3", "Qwen 3", "Gemma 2", "Mistral", "GPT-NeoX, Pythia")
CASES = [(name, mode) for name in FAMILIES for mode in MODES if mode != "4-bit" or name in IN_4_BIT]
COMMON = {"max_steps": 2, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": "true"}
ARGUMENTS = {
    "sft": {"per_device_train_batch_size": 4},
    "reward": {"per_device_train_batch_size": 4, "eval_strategy": "no", "test_split_size": 0},
    "ppo": {"per_device_train_batch_size": 8, "max_completion_length": 8, "num_iterations": 2},
}
NO_REWARD_MODEL = "transformers has no sequence classifier for models of the type {}"
NO_FULL_CRITIC = f"{NO_REWARD_MODEL}.* set use_peft: true"
TABLE = ROOT / "docs" / "models.md"
MARKERS = "<!-- matrix: begin -->", "<!-- matrix: end -->"
FOUND: dict[str, dict[str, str]] = {}


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
    return {step: write_jsonl(folder / f"{step}.jsonl", lines) for step, lines in rows.items()}


@pytest.fixture
def train(data):
    """`train(step, output_dir, **arguments)` runs the step's own `main` and returns its trainer."""

    def train(step: str, output_dir: Path, **arguments):
        own = {"dataset_name": data[step], "output_dir": output_dir}
        return run_recipe(step, **COMMON | ARGUMENTS[step] | own | arguments)

    return train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a saved adapter or model."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def history(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def load_plain(auto_class, folder: Path, base: str, mode: str, **kwargs):
    """A step's output by transformers and peft alone."""
    if mode == "full":
        return auto_class.from_pretrained(folder, **kwargs).eval()
    if mode == "4-bit":
        kwargs["quantization_config"] = get_quantization_config(ModelConfig(load_in_4bit=True))
    model = PeftModel.from_pretrained(never_pack(auto_class.from_pretrained(base, **kwargs)), folder)
    return (model.float() if mode == "LoRA" else model).eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, mode: str) -> None:
    """Equal up to rounding; a 4-bit base computes in half precision, by shapes that batches change."""
    tolerance = {"rtol": 0.05, "atol": 0.1} if mode == "4-bit" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual.float(), expected.float(), **tolerance)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that training changed."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@torch.no_grad()
def check_sft(trainer, folder: Path, base: str, mode: str) -> None:
    plain, tokenizer = load_plain(AutoModelForCausalLM, folder, base, mode), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False, return_tensors="pt")
    logits = plain(input_ids=ids).logits
    assert_close(trainer.model.eval()(input_ids=ids).logits, logits, mode)
    swapped = plain(input_ids=torch.cat([ids[:, 5:-1], ids[:, :5], ids[:, -1:]], 1)).logits[:, -1]
    assert (swapped - logits[:, -1]).abs().max() > 1e-2, "context and order have to matter for the checks to work"
    rows, bos = trainer.train_dataset["input_ids"], tokenizer.bos_token_id
    assert all(tokenizer.eos_token_id in row[-2:] for row in rows), "the model has to learn to stop"
    if bos not in (None, tokenizer.eos_token_id):
        assert all(row.count(bos) == 1 for row in rows)
    if mode == "full":
        assert len(moved(weights(Path(base)), weights(folder))) > 0.7 * len(weights(folder))
    else:
        still = [name for name, value in weights(folder).items() if "lora_B" in name and not value.any()]
        assert not still, "every adapted module learns"


@torch.no_grad()
def check_reward(trainer, folder: Path, base: str, mode: str) -> None:
    plain = load_plain(AutoModelForSequenceClassification, folder, base, mode, num_labels=1)
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    plain.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    texts = [("w1", "w4 w5 w6"), ("w7 w8 w9", "w4 w5 w2")]
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in texts]
    rows = tokenizer.apply_chat_template(turns, return_dict=False)
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    alone = torch.cat([plain(input_ids=torch.tensor([row])).logits for row in rows])
    assert_close(trainer.model.eval()(**batch).logits, alone, mode)
    assert (alone[0] - alone[1]).abs() > 1e-4
    statistics = json.loads((folder / "reward_statistics.json").read_text())
    assert statistics["n"] == 24 and statistics["std"] > 0


@torch.no_grad()
def check_ppo(trainer, folder: Path, base: str, mode: str, policy: Path, reward_path: Path | None) -> None:
    """The numbers of PPO's short cuts against plain models that see one unpadded row at a time."""
    exact = mode != "4-bit"
    assert history(trainer, "val/ratio")[0] == pytest.approx(1.0, abs=1e-4 if exact else 0.02)
    assert history(trainer, "policy/approxkl_avg")[0] == pytest.approx(0.0, abs=1e-7 if exact else 1e-3)
    assert history(trainer, "objective/kl")[0] == pytest.approx(0.0, abs=1e-3 if exact else 0.02)
    before, after = weights(policy), weights(folder)
    changed = moved(before, after)
    assert changed == set(before) if mode != "full" else len(changed) > 0.7 * len(before)

    prompts, completions = trainer._rollout.prompt_ids, trainer._rollout.completion_ids
    assert len({len(row) for row in prompts}) > 1, "prompts have to be padded for the checks to work"
    pad = trainer._tokenizer.pad_token_id
    span, width = max(map(len, prompts)), max(map(len, completions))
    pairs = list(zip(prompts, completions, strict=True))
    ids = torch.tensor([[pad] * (span - len(p)) + p + c + [pad] * (width - len(c)) for p, c in pairs])
    mask = torch.tensor([[0] * (span - len(p)) + [1] * len(p + c) + [0] * (width - len(c)) for p, c in pairs])

    logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]
    plain = load_plain(AutoModelForCausalLM, folder, base, mode)
    for row, (p, c) in enumerate(pairs):
        table = plain(input_ids=torch.tensor([p + c])).logits[0, len(p) - 1 : -1].float().log_softmax(-1)
        assert_close(logps[row, : len(c)], table.gather(1, torch.tensor(c)[:, None])[:, 0], mode)

    values = trainer._values(trainer.model, ids, mask, width)
    assert values.std() > 0
    if reward_path is None:
        return
    critic = load_plain(AutoModelForSequenceClassification, folder / "critic", base, mode, num_labels=1)
    critic.config.get_text_config().pad_token_id = None  # read the state of the last token, whatever it is
    for row, (p, c) in enumerate(pairs):
        for length in {0, len(c) - 1}:
            value = critic(input_ids=torch.tensor([p + c[:length]])).logits[0, 0]
            assert_close(values[row, length], value, mode)

    changed = moved(weights(reward_path), weights(folder / "critic"))
    assert any("score" in name for name in changed) and len(changed) > 0.7 * len(weights(reward_path))
    scorer = load_plain(AutoModelForSequenceClassification, reward_path, base, mode, num_labels=1)
    scorer.config.get_text_config().pad_token_id = pad
    stops = trainer.eos_token_ids
    end = turn_end(trainer._tokenizer, stops)
    rows = [p + c + (end if c[-1] in stops else []) for p, c in pairs]
    expected = torch.cat([scorer(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    assert_close(torch.tensor(trainer.score_sampled_ids(trainer._rollout)), expected, mode)


@pytest.fixture(scope="module")
def other_reward(data, tmp_path_factory) -> Path:
    """A reward adapter on a base of its own, for policies that cannot have one."""
    folder = tmp_path_factory.mktemp("other")
    base = FAMILIES["Llama 3"].save(folder / "base")
    save_adapter(folder / "reward", base, "SEQ_CLS")
    return folder / "reward"


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{name}-{mode}" for name, mode in CASES])
def test_family(name, mode, train, other_reward, tmp_path):
    family = FAMILIES[name]
    base = family.save(tmp_path / "base")
    sft_path, reward_path, arguments = tmp_path / "sft", tmp_path / "reward", MODES[mode]
    check_sft(train("sft", sft_path, model_name_or_path=base, **arguments), sft_path, base, mode)
    pair = {"model_name_or_path": sft_path, "reward_model_name_or_path": reward_path}
    if family.classifier:
        trainer = train("reward", reward_path, model_name_or_path=sft_path, **arguments)
        check_reward(trainer, reward_path, base, mode)
        trainer = train("ppo", tmp_path / "ppo", **pair, **arguments)
        check_ppo(trainer, tmp_path / "ppo", base, mode, sft_path, reward_path)
        FOUND.setdefault(name, {})[mode] = "✓"
        return
    with pytest.raises(UserError, match=NO_REWARD_MODEL.format(family.model_type)):
        train("reward", reward_path, model_name_or_path=sft_path, **arguments)
    beside = arguments | {"model_name_or_path": sft_path, "reward_model_name_or_path": other_reward}
    beside["separate_reward_model"] = "true"
    if mode == "full":
        with pytest.raises(UserError, match=NO_FULL_CRITIC.format(family.model_type)):
            train("ppo", tmp_path / "ppo", **beside)
        FOUND.setdefault(name, {})[mode] = "SFT only ¹ ²"
        return
    trainer = train("ppo", tmp_path / "ppo", **beside)
    check_ppo(trainer, tmp_path / "ppo", base, mode, sft_path, None)
    FOUND.setdefault(name, {})[mode] = "SFT, PPO ¹"


def matrix() -> str:
    """The table of what was found."""
    lines = [
        "| family | `model_type` | tokenizer of the test | head, attention | LoRA | full | 4-bit |",
        "|---" * 7 + "|",
    ]
    for name, family in FAMILIES.items():
        traits = ["tied" if family.tied else "untied"]
        traits += [f"{family.spare_tokens} spare tokens"] if family.spare_tokens else []
        traits += ["sliding window"] if "sliding_window" in family.config else []
        cells = [name, f"`{family.model_type}`", TOKENIZERS[family.tokenizer][1], ", ".join(traits)]
        cells += [FOUND[name].get(mode, "") for mode in MODES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_was_found():
    if sum(map(len, FOUND.values())) < len(CASES):
        pytest.skip("only a part of the matrix ran, or passed")
    text = TABLE.read_text(encoding="utf-8")
    before, rest = text.split(MARKERS[0])
    table, after = rest.split(MARKERS[1])
    if os.environ.get("UPDATE_MATRIX"):
        TABLE.write_text(f"{before}{MARKERS[0]}\n{matrix()}\n{MARKERS[1]}{after}", encoding="utf-8")
    else:
        assert table.strip() == matrix(), "stale: run this file with UPDATE_MATRIX=1"
