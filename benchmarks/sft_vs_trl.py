"""recipes/sft.py against TRL's own `sft` script: same model, data, lengths and epochs.

    python benchmarks/sft_vs_trl.py [--rows 96] [--device cpu|cuda] [--output FILE]

Each side runs its script's `main`, from the data file to the saved adapter, in a process of its own and takes turns;
a small run warms both up. Imports are not timed. The peer is the script of the TRL this project uses. Both train with
the same `SFTTrainer`, so what differs is small: a larger model and more turns than elsewhere keep the machine's noise
below it. The last line is one JSON object; ratios of time are TRL's over ours (above 1: we are faster).
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from turns import Meter, alternate, compare, parser, publish
from workload import CHAT_TEMPLATE, EOS, SIZES, Shape, turn, word, word_tokenizer

PHASES = ("prepare", "train", "save")
DIFFERENCES = [
    "prepare: ours also detects the schema, checks every row and reports on the data",
    "save: ours also writes the data report, the trainer's state, the model card and the record of the run",
]


def write_inputs(folder: Path, shape: Shape, rows: int, turns: int) -> None:
    """A base, a small data set to warm up with, and a copy of the data for each turn, so that no cache knows it."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(shape.config()).save_pretrained(folder / "base")
    tokenizer = word_tokenizer(shape.vocabulary, chat_template=CHAT_TEMPLATE + word(EOS))
    tokenizer.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for question, answer in torch.randint(8, 64, (rows, 2), generator=generator).tolist():
        prompt = turn("user", question, shape.vocabulary, generator)
        completion = turn("assistant", answer, shape.vocabulary, generator)
        lines.append(json.dumps({"prompt": prompt, "completion": completion}))
    for number in range(turns):
        data = folder / f"data{number}"
        data.mkdir()
        kept = lines[: 2 * shape.micro_batch] if number == 0 else lines
        (data / "train.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


def run_side(side: str, folder: Path, batch: int, turns: int, device: str) -> None:
    meter = Meter(device)
    from trl import SFTTrainer
    from trl.scripts import sft as trl_script

    from recipes import sft as recipe
    from recipes.cli.arguments import parse

    train = SFTTrainer.train

    def timed_train(self, *args, **kwargs):
        result = meter.timed(train, "train", "save")(self, *args, **kwargs)
        meter.report["tokens"] = self._total_train_tokens
        return result

    SFTTrainer.train = timed_train
    meter.loaded("libraries")
    for number in range(turns):
        words = ["--model_name_or_path", folder / "base", "--dataset_name", folder / f"data{number}"]
        words += ["--output_dir", folder / f"{side}{number}", "--per_device_train_batch_size", batch]
        words += ["--use_peft", "true", "--lora_r", 16, "--lora_target_modules", "all-linear", "--lora_dropout", 0]
        words += ["--num_train_epochs", 1, "--learning_rate", 1e-4, "--report_to", "none", "--save_strategy", "no"]
        words += ["--use_cpu", device == "cpu", "--bf16", device != "cpu", "--activation_checkpointing", "false"]
        words += ["--dataloader_pin_memory", "false", "--disable_tqdm", "true", "--max_length", 256, "--seed", 0]
        words = [str(part) for part in words]
        meter.start()
        meter.switch("prepare")
        if side == "ours":
            recipe.main(*parse(recipe.ARGUMENTS, words))
        else:
            trl_script.main(*trl_script.make_parser().parse_args_and_config(args=words))
        meter.finish()


def main():
    arguments = parser(__doc__, alternations=5)
    arguments.add_argument("--size", choices=SIZES, default="42M")
    arguments.add_argument("--rows", type=int, default=96)
    arguments.add_argument("--side", choices=["trl", "ours"], help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    shape, turns = Shape(size=args.size, vocabulary=8000, micro_batch=16), args.alternations + 1
    if args.side:
        run_side(args.side, args.folder, shape.micro_batch, turns, args.device)
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_inputs(folder, shape, args.rows, turns)
        shared = ["--folder", str(folder), "--device", args.device, "--alternations", str(args.alternations)]
        command = [sys.executable, str(Path(__file__)), *shared, "--side"]
        found = alternate({side: [*command, side] for side in ("trl", "ours")}, args.alternations, args.device)
    tokens = {side: [turn["tokens"] for turn in found[side]] for side in found}
    if tokens["trl"] != tokens["ours"]:
        raise SystemExit(f"error: the sides trained on different numbers of tokens: {tokens}.")
    setting = f"sft, {args.size} Llama, {args.rows} rows, {tokens['ours'][0]:.0f} tokens"
    result = {"setting": setting, "device": args.device} | compare(found["trl"], found["ours"], PHASES)
    publish(result | {"differences": DIFFERENCES}, args.output, turns=found)


if __name__ == "__main__":
    main()
