"""Samples K responses per prompt from a base, an adapter or a full model, to be ranked.

    python scripts/sample_responses.py --model_name_or_path runs/sft --dataset_name prompts.jsonl \\
        --num_generations 4 --temperature 1.0 --seed 0 --output samples.jsonl

Repeated responses to a prompt are sampled again. Run the same line again to complete a run that was stopped.
`--config FILE.yaml` holds any of the flags.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

from dataclasses import dataclass, field

from recipes.cli.errors import UserError
from recipes.cli.launch import world_size
from recipes.cli.run import run
from recipes.data.report import Report
from recipes.formatting import Formatter, RowArguments, load_rows
from recipes.models.sampling import (
    PolicyArguments,
    Prompt,
    PromptsArguments,
    SamplingArguments,
    load_generator,
    sample_to_file,
)


@dataclass
class OutputArguments:
    output: str = field(metadata={"help": "JSON Lines file that the samples are appended to."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


ARGUMENTS = (PromptsArguments, SamplingArguments, PolicyArguments, RowArguments, OutputArguments)


def read_prompts(data_args: PromptsArguments, format_args: RowArguments, tokenizer, **room) -> list[Prompt]:
    """The prompts of a dataset that fit into the model's `room`; a row's own `id` is kept if it is unique."""
    rows = load_rows(data_args.dataset_name, data_args.dataset_train_split, data_args.dataset_config)
    report = Report(rows.source, "prompt")
    formatter = Formatter("prompt", tokenizer=tokenizer, **format_args.options(), **room)
    ids = {(row.file, row.line): row.data.get("id") for row in rows if isinstance(row.data, dict)}
    prompts: dict[str, Prompt] = {}
    for row, output in formatter(rows, report):
        own = ids.get((row.file, row.line))
        name = wish = f"p{row.line}" if own in (None, "") else str(own)
        number = 1
        while name in prompts:  # a repeated id, or the same line of another file of a folder
            number += 1
            name = f"{wish}-{number}"
        prompts[name] = Prompt(name, output["prompt"], f"{row.file}:{row.line}")
    print(report)
    return list(prompts.values())


def main(
    data_args: PromptsArguments,
    sampling: SamplingArguments,
    policy: PolicyArguments,
    format_args: RowArguments,
    output_args: OutputArguments,
):
    if world_size() > 1:
        raise UserError("Sampling runs in one process: start it with python instead of accelerate launch.")
    load_rows(data_args.dataset_name, data_args.dataset_train_split, data_args.dataset_config)  # a typo is said first
    model, tokenizer = load_generator(policy.model_config(), output_args.trust_remote_code)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = {"positions": positions, "completion_length": sampling.max_completion_length}
    prompts = read_prompts(data_args, format_args, tokenizer, **room)
    sample_to_file(
        model, tokenizer, prompts, sampling, policy.model_name_or_path, output_args.output, **policy.loading()
    )


if __name__ == "__main__":
    run(main, ARGUMENTS)
