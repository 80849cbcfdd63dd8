"""Samples responses from a policy: in length-sorted batches, and into a file that a stopped run completes."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.generation import BaseStreamer
from trl import ModelConfig

from recipes.cli import lock
from recipes.cli.errors import UserError, counted
from recipes.cli.files import sync
from recipes.cli.record import arguments_of, digest
from recipes.cli.screen import say
from recipes.data.preview import check_positions, sequences
from recipes.data.rows import RowError
from recipes.models.compatibility import check_model
from recipes.models.loading import load_policy
from recipes.models.source import ModelSource, resolve_model
from recipes.models.tokenization import load_tokenizer

ROUNDS = 5  # how often a prompt is tried again for a response it does not have yet


@dataclass
class SamplingArguments:
    """How responses are sampled. The same arguments, prompts and model give the same responses."""

    num_generations: int = field(default=4, metadata={"help": "Responses per prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits; 0 takes the likeliest token."})
    top_k: int = field(default=50, metadata={"help": "Sample among this many likeliest tokens; 0 takes all."})
    top_p: float = field(default=0.95, metadata={"help": "Sample among the likeliest tokens of this total share."})
    max_completion_length: int = field(default=128, metadata={"help": "Longest response, in tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    generation_batch_size: int = field(default=64, metadata={"help": "Responses sampled at once."})

    def __post_init__(self):
        if self.temperature == 0 and self.num_generations > 1:
            raise UserError("--temperature 0 always gives the same response: set --num_generations 1 or sample.")


@dataclass
class LoadingArguments:
    """The part of TRL's `ModelConfig` that says how a trained model is loaded."""

    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention, as transformers names it."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base in 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base in 4 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Type of 4 bits.", "choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the 4-bit scales too."})

    def model_config(self) -> ModelConfig:
        return ModelConfig(**vars(self))


@dataclass
class PolicyArguments(LoadingArguments):
    """One trained model, and how it is loaded."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Base, adapter folder or full model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})

    def loading(self) -> dict[str, Any]:
        """How the model is loaded, and a digest of the weights of a local one."""
        found = {name: value for name, value in vars(self).items() if name != "model_name_or_path"}
        return found | ({"weights": digest(self.model_name_or_path)} if os.path.isdir(self.model_name_or_path) else {})


@dataclass
class PromptsArguments:
    """The prompts that are answered; `ScriptArguments` of TRL has the same names."""

    dataset_name: str = field(metadata={"help": "Hub name, folder or .jsonl, .json, .csv or .parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split that the prompts are taken from."})


@dataclass(frozen=True)
class Response:
    """`token_ids` end with EOS if the model `finished` by itself; `text` has no special tokens."""

    text: str
    finished: bool
    token_ids: list[int]


@dataclass(frozen=True)
class Prompt:
    """A conversation that a response is wanted for, and where it is from."""

    id: str
    messages: list[dict]
    place: str


def load_generator(
    model_args: ModelConfig, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Policy and tokenizer of a base, a full model or an adapter folder, ready to generate on this machine's device.

    Sampling defaults that came with the model (such as a repetition penalty) are dropped: only the arguments count.
    """
    source = resolve_model(model_args.model_name_or_path, model_args.model_revision, trust_remote_code)
    tokenizer = load_tokenizer(source)
    check_model(source, tokenizer)
    warn_of_other_training(source, tokenizer, model_args)
    model = load_policy(source, replace(model_args, use_peft=source.base is not None)).eval().requires_grad_(False)
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        model = model.to(PartialState().device)
    # The head gets a slice of the hidden states, the last token of each row. torch multiplies such a view row by row,
    # and on a CPU reads the whole head for each: 7 times as long in float32, and far longer in bfloat16.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends))
    return model, tokenizer


def warn_of_other_training(source: ModelSource, tokenizer: PreTrainedTokenizerBase, model_args: ModelConfig) -> None:
    """Say so where a policy was trained on other weights of its base, or with other prompts, than it gets here."""
    trained_with: dict[str, Any] = {}
    with suppress(UserError):  # other programs have files of this name, too
        trained_with = arguments_of(source.path)
    by_flag = model_args.load_in_4bit or model_args.load_in_8bit
    quantized = by_flag or getattr(source.config, "quantization_config", None) is not None
    if (trained_with.get("load_in_4bit") or trained_with.get("load_in_8bit")) and source.base and not quantized:
        say(
            f"Warning: the adapter {source.path} was trained on a quantised base, and on unquantised weights it "
            "answers otherwise: set --load_in_4bit or --load_in_8bit true, as in its training."
        )
    options, question = trained_with.get("chat_template_kwargs") or {}, [{"role": "user", "content": "?"}]
    write = partial(tokenizer.apply_chat_template, question, add_generation_prompt=True, tokenize=False)
    if options and write() != write(**options):
        say(
            f"Warning: {source.path} was trained with chat_template_kwargs {options}, and here prompts are written "
            "without: set them in the first line of its chat_template.jinja, as {% set enable_thinking = false %}."
        )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict]],
    sampling: SamplingArguments,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> list[Response]:
    """One response for each conversation, all in one batch; a `streamer` sees the tokens of a single one at once."""
    ids = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    options: dict[str, Any] = {"max_new_tokens": sampling.max_completion_length, "do_sample": sampling.temperature > 0}
    if options["do_sample"]:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    set_seed(seed)
    output = model.generate(**batch, **options, streamer=streamer)
    ends = set(model.generation_config.eos_token_id)
    responses = []
    for tokens in output[:, batch["input_ids"].size(1) :].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if end is None else tokens[: end + 1]
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        responses.append(Response(text, end is not None, tokens))
    return responses


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict]],
    sampling: SamplingArguments,
    title: str = "Sampling",
) -> list[list[Response]]:
    """`num_generations` independent responses for each conversation, in their order; `title` is shown on the way."""
    rows = [row for row in range(len(conversations)) for _ in range(sampling.num_generations)]
    rows.sort(key=lambda row: prompt_length(conversations[row]), reverse=True)
    responses: list[list[Response]] = [[] for _ in conversations]
    for start in tqdm(range(0, len(rows), sampling.generation_batch_size), desc=title, disable=None):
        batch = rows[start : start + sampling.generation_batch_size]
        prompts, seed = [conversations[row] for row in batch], derived_seed(sampling.seed, start)
        for row, response in zip(batch, generate(model, tokenizer, prompts, sampling, seed), strict=True):
            responses[row].append(response)
    return responses


def prompt_length(messages: list[dict]) -> int:
    """Length in characters, by which prompts are sorted so that a batch has little padding."""
    return sum(len(message["content"]) for message in messages)


def derived_seed(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def sample_to_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    sampling: SamplingArguments,
    model_name: str,
    output: str,
    **loading: Any,
) -> None:
    """Append one JSON line per prompt to `output`; a run that was stopped goes on where it was.

    Batches and seeds depend on nothing but the arguments, so a file made in several runs equals one made in one. The
    longest prompts come first: a batch that does not fit into memory fails at once. How the model was loaded, and what
    its weights are (`loading`), is kept with the sampling arguments.
    """
    plan = sorted(prompts, key=lambda prompt: (-prompt_length(prompt.messages), prompt.id))
    made_from = {"model": os.path.normpath(model_name), "sampling": {**asdict(sampling), **loading}}
    per_batch = max(1, sampling.generation_batch_size // sampling.num_generations)
    dropped = missing = 0
    lock_file = f"{os.path.realpath(output)}.lock"  # the same by whatever link
    try:
        lock.hold(lock_file, output)
        done, complete = read_done(output, plan, made_from)
        if done:
            print(f"{output}: sampled before: {done} of {counted(len(plan), 'prompt')}.")
        with open(output, "a", encoding="utf-8") as file, tqdm(total=len(plan), initial=done, desc="Sampling") as bar:
            file.truncate(complete)  # a last line that was not written to its end
            sync(os.path.dirname(output) or ".")
            for start in range(done - done % per_batch, len(plan), per_batch):
                batch = plan[start : start + per_batch]
                groups, repeats = sample_distinct(model, tokenizer, batch, sampling, start)
                dropped += repeats
                for prompt, group in [*zip(batch, groups, strict=True)][max(0, done - start) :]:
                    missing += sampling.num_generations - len(group)
                    responses = [
                        {"id": f"{prompt.id}-{number}", "text": response.text, "finished": response.finished}
                        for number, response in enumerate(group)
                    ]
                    file.write(line_of(prompt, responses=responses, **made_from) + "\n")
                    bar.update()
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}. Once it can be written, the same line goes on.") from error
    finally:
        lock.release(lock_file)
    repeated = counted(dropped, "repeated response")
    print(f"{output}: {counted(len(plan), 'prompt')}; {repeated} sampled again, {missing} still missing.")


def line_of(prompt: Prompt, **columns) -> str:
    """The line of a prompt in a file of samples; all that the model adds comes after its prompt."""
    return json.dumps({"id": prompt.id, "prompt": prompt.messages, **columns}, ensure_ascii=False)


def sample_distinct(model, tokenizer, batch: list[Prompt], sampling: SamplingArguments, start: int):
    """Up to `num_generations` different responses for each prompt, and how many repeated ones were dropped."""
    groups: list[list[Response]] = [[] for _ in batch]
    dropped = 0
    for attempt in range(ROUNDS):
        rows = [row for row, group in enumerate(groups) for _ in range(sampling.num_generations - len(group))]
        for first in range(0, len(rows), sampling.generation_batch_size):
            some = rows[first : first + sampling.generation_batch_size]
            seed = derived_seed(sampling.seed, start, attempt, *([first] if first else []))
            responses = generate(model, tokenizer, [batch[row].messages for row in some], sampling, seed)
            for row, response in zip(some, responses, strict=True):
                if response.text in (other.text for other in groups[row]):
                    dropped += 1
                else:
                    groups[row].append(response)
    return groups, dropped


def read_done(output: str, plan: list[Prompt], made_from: dict) -> tuple[int, int]:
    """How many prompts of the plan `output` holds, and in how many bytes; only a line cut short may follow them."""
    if not os.path.exists(output):
        return 0, 0
    with open(output, "rb") as file:
        *lines, cut = file.read().split(b"\n")
    for number, line in enumerate([*lines, cut] if cut else lines):
        begin = line_of(plan[number], responses=[])[:-2].encode() if number < len(plan) else b"\n"  # of no line
        if number == len(lines) and (line.startswith(begin) or begin.startswith(line)):
            continue
        try:
            row = json.loads(line) if number < len(lines) and line.startswith(begin) else None
        except ValueError:
            row = None
        if row is None:
            raise UserError(f"{output}:{number + 1}: not a line of samples of these prompts: choose another --output.")
        refuse_changes(output, row, made_from)
    return len(lines), sum(len(line) + 1 for line in lines)


def refuse_changes(output: str, row: dict, made_from: dict) -> None:
    was, now = ({"model": os.path.normpath(each["model"]), **each["sampling"]} for each in (row, made_from))
    changed = [f"{key} was {was.get(key)}, now {now.get(key)}" for key in was | now if was.get(key) != now.get(key)]
    if changed:
        raise UserError(
            f"{output} was sampled otherwise ({'; '.join(changed)}): choose another --output, or the same model and "
            "arguments to complete it."
        )


def check_lengths(model, tokenizer, prompts: Iterable[Prompt], sampling: SamplingArguments) -> None:
    """Check that the template takes every prompt, and that the model has room for it and a response."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        try:
            (sequence,) = sequences({"prompt": prompt.messages}, tokenizer)
            check_positions(len(sequence.ids), limit, sampling.max_completion_length)
        except RowError as error:
            raise UserError(f"{prompt.place}: {error.message}.") from error
