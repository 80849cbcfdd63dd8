"""What every recipe does around its training: claim the output folder, train, record, finish, fail with one line."""

import atexit
import errno
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from recipes.cli import lock, record, signals
from recipes.cli.arguments import parse
from recipes.cli.card import model_card
from recipes.cli.checkpoints import UNFINISHED, last_good_state, newest_whole, problem, recover, unfinished
from recipes.cli.errors import RunEnded, UserError, counted, first_line
from recipes.cli.files import is_write_error, move_contents, write_text
from recipes.cli.launch import launcher, world_size
from recipes.cli.progress import show_lines
from recipes.cli.screen import result_line, say

LOCK = ".lock"
# Trainer reads arguments there at last
SET_UP = {"create_optimizer", "create_scheduler", "get_train_dataloader", "_determine_best_metric"}
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class RunFolder:
    """The output folder of one run, from the first check to the last file.

    Making one claims the folder: nothing is written over, a second run on it is refused, and
    `--resume_from_checkpoint` becomes the path of a whole checkpoint, or `None`:

    - unset or `false`: a new run in a folder that is new or empty;
    - `true`: the newest whole checkpoint of this folder; a run that had none yet starts again;
    - `auto`: the same, or a new run where there is none, for schedulers that start one line again and again;
    - a path: that checkpoint.

    Where the run was started with other arguments it is refused, and where nothing is left to do it ends.
    """

    def __init__(self, recipe: str, *arguments):
        self.arguments = arguments
        self.training_args = next(group for group in arguments if isinstance(group, TrainingArguments))
        self.path = self.training_args.output_dir
        self.record = record.describe(recipe, arguments)
        self.before: dict[str, Any] | None = None
        self.training_args.resume_from_checkpoint = self._agree(self._claim)

    def _agree(self, look: Callable[[], Any]) -> Any:
        """Call `look` in the first process; return what it returned, or raise what it raised, in every process."""
        outcome: list[Any] = [None]
        if self.training_args.distributed_state.is_main_process:
            try:
                outcome = [look()]
            except (UserError, RunEnded) as error:
                outcome = [error]
            except OSError as error:
                outcome = [UserError(f"--output_dir {self.path}: {error.strerror} ({error.filename}).")]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _claim(self) -> str | None:
        self._choose()  # looks only, so that a refused run has written nothing
        lock.hold(os.path.join(self.path, LOCK), f"--output_dir {self.path}")
        recover(self.path)
        checkpoint, notes = self._choose()
        for note in notes:
            say(note)
        return checkpoint

    def _choose(self) -> tuple[str | None, list[str]]:
        """The checkpoint to go on from, if any, and what to say about the choice."""
        entries = holds_anything(self.path)
        given = self.training_args.resume_from_checkpoint
        wish = str(given).lower()
        anew = wish in ("none", "false", "no", "")
        if anew and entries:
            raise UserError(
                f"The output folder {self.path} is not empty, and nothing is ever written over: "
                "choose another --output_dir, or continue it with --resume_from_checkpoint true."
            )
        if anew or (wish == "auto" and not entries):
            return None, []
        if wish in ("true", "yes", "auto"):
            origin = self.path
            checkpoint, notes = newest_whole(origin)
        else:
            origin, checkpoint, notes = os.path.dirname(os.path.abspath(given)), given, []
            if why := problem(given):
                raise UserError(f"--resume_from_checkpoint {given}: {why}. {last_good_state(origin)}")
            if entries and os.path.realpath(origin) != os.path.realpath(self.path):
                raise UserError(
                    f"The output folder {self.path} is not empty, and {given} is a checkpoint of another run: "
                    "choose another --output_dir."
                )
        self.before = record.read_record(os.path.join(origin, record.RECORD))
        record.refuse_changes(self.before, self.record, origin)
        finished = record.read_record(os.path.join(self.path, record.RESULT))
        if finished is not None:
            state = vars(TrainerState.load_from_json(os.path.join(self.path, TRAINER_STATE_NAME)))
            if not record.wants_more(self.record["arguments"], finished["arguments"], state):
                steps = counted(state["global_step"], "step")
                raise RunEnded(f"{self.path} holds a finished run of {steps}: nothing to do.")
        if self.training_args.save_only_model:
            raise UserError(
                "--save_only_model true leaves out of checkpoints what a run goes on from: set it to false to resume."
            )
        if checkpoint is None and (self.before is None or notes or finished is not None):
            why = "; ".join([f"there is no{' whole' if notes else ''} checkpoint in {self.path}", *notes])
            raise UserError(f"--resume_from_checkpoint {given}: {why}.")
        if self.before is None:
            notes.append(
                f"{origin} has no {record.RECORD}: arguments are not compared with those the run started with."
            )
        way = f"going on from {checkpoint}" if checkpoint else "no checkpoint yet, starting from the beginning"
        return checkpoint, [*notes, f"{self.path}: {way}."]

    def train(self, trainer: Trainer, reports: Mapping[str, Any]) -> None:
        """Write down what the run was started with, compare it where the run goes on, and train."""
        record.add_rows(self.record, reports, {"train": trainer.train_dataset, "eval": trainer.eval_dataset})
        for sentence in record.used_in_words(self.record):
            trainer.accelerator.print(sentence)

        def compare_or_write() -> None:
            record.refuse_changes(self.before, self.record, self.path)
            if not os.path.exists(path := os.path.join(self.path, record.RECORD)):
                record.write_record(path, self.record)

        self._agree(compare_or_write)
        show_lines(trainer)
        if token := self.training_args.hub_token:  # Trainer saves its arguments beside each model, and pushes them
            os.environ["HF_TOKEN"], self.training_args.hub_token = token, None
        adapters = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
        base = next((config.base_model_name_or_path for config in adapters.values()), None)
        trainer.card = lambda: model_card(self.record, trainer.state.log_history, base)
        try:
            with signals.stops_after_a_step():
                trainer.train(resume_from_checkpoint=self.training_args.resume_from_checkpoint)
        except (ValueError, TypeError, ImportError, KeyError) as error:
            if SET_UP.isdisjoint(frame.name for frame in traceback.extract_tb(error.__traceback__)):
                raise
            saved, _ = newest_whole(self.path)
            if saved is None and trainer.accelerator.is_main_process:  # there is nothing to go on from
                os.unlink(os.path.join(self.path, record.RECORD))
            raise UserError(f"An argument cannot be used: {' '.join(str(error).split())}") from error

    def save_model(self, trainer: Trainer, last: Callable[[str], None] | None = None) -> None:
        """Put the trained model into the folder: all its files are written aside first, then moved.

        The first process calls `last` with the folder aside, to write further files into it.
        """
        aside = unfinished(self.path, "result")
        try:
            if trainer.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(aside, _internal_call=True)
            if last is not None and trainer.accelerator.is_main_process:
                os.makedirs(aside, exist_ok=True)
                last(aside)
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                move_contents(aside, self.path, last=record.RESULT)
                recover(self.path)
        except Exception as error:
            if not is_write_error(error):
                raise
            raise UserError(
                f"The trained model cannot be written to {self.path}: {first_line(error)}. "
                "When there is room, --resume_from_checkpoint true goes on from the newest checkpoint."
            ) from error

    def finish(self, trainer: Trainer, reports: Mapping[str, Any]) -> None:
        """Save model, tokenizer, model card, trainer state and the record of the run, and leave the process group.

        `train_config.yaml` comes last: a folder that holds it holds a finished run.
        """

        def write_records(aside: str) -> None:
            trainer.state.save_to_json(os.path.join(aside, TRAINER_STATE_NAME))
            for name, report in reports.items():
                report.save(os.path.join(aside, f"data_report_{name.replace(' ', '_')}.json"))
            settled = record.all_arguments(self.arguments)  # some arguments are settled on the way
            record.write_record(os.path.join(aside, record.RESULT), self.record | {"arguments": settled})
            write_text(os.path.join(aside, "README.md"), trainer.card())

        self.save_model(trainer, write_records)
        if trainer.accelerator.is_main_process:
            start, history = self.record["arguments"]["model_name_or_path"], trainer.state.log_history
            say(result_line(self.record["recipe"], self.path, start, history, launcher()))
        if trainer.args.push_to_hub:
            try:
                trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
            except Exception as error:  # of the Hub, or of the network below it
                why = f"the Hub did not take it: {first_line(error)}"
                raise UserError(
                    f"The run is saved to {self.path}, but {why}; push it later with hf upload."
                ) from error
        if trainer.accelerator.is_main_process:
            lock.release(os.path.join(self.path, LOCK))
        trainer.accelerator.wait_for_everyone()
        trainer.end()


def refuse_stream(script_args: Any) -> None:
    """Refuse `--dataset_streaming true` in a recipe that needs all rows before the first step."""
    if script_args.dataset_streaming:
        raise UserError("--dataset_streaming true: only recipes/sft.py trains on a stream. Set it to false.")


def settle_evaluation(training_args: TrainingArguments, datasets: Mapping[str, Any]) -> None:
    """Turn evaluation off where there is nothing to evaluate on; refuse where it was to find the best checkpoint."""
    if training_args.eval_strategy != "no" and "eval" not in datasets:
        if training_args.load_best_model_at_end:
            raise UserError("--load_best_model_at_end true needs rows to evaluate on: add prompts or set it to false.")
        training_args.eval_strategy, training_args.eval_on_start = IntervalStrategy.NO, False


def check_steps(trainer: Trainer) -> None:
    """Say where an epoch is less than one step, and where a run ends while its learning rate rises; refuse no step."""
    if not hasattr(trainer.train_dataset, "__len__"):
        return
    args, rows = trainer.args, len(trainer.train_dataset)
    batch = args.train_batch_size * args.world_size
    step = batch * args.gradient_accumulation_steps
    size = max(1, min(args.per_device_train_batch_size, rows // args.world_size))
    accumulation = max(1, rows // (size * args.world_size))
    fitting = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation}"
    if args.dataloader_drop_last and rows < batch:
        raise UserError(
            f"There is no step to take: a batch has {counted(batch, 'row')}, the dataset {rows}, and "
            f"--dataloader_drop_last true leaves out a batch that is not full. Set that to false, or {fitting}."
        )
    if rows < step:
        trainer.accelerator.print(
            f"A step takes {counted(step, 'row')} and the dataset has {rows}: an epoch is one step of all of them. "
            f"{fitting} makes a step that they fill."
        )
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(rows / step) * args.num_train_epochs)
    if steps <= args.get_warmup_steps(steps) and args.lr_scheduler_type != "constant":
        trainer.accelerator.print(
            f"The run has {counted(steps, 'step')} and --warmup_steps is {args.warmup_steps:g}: it ends before the "
            f"learning rate has reached {args.learning_rate:g}. Set --warmup_steps 0.1 for a tenth of the steps."
        )


def run(main: Callable, argument_types: tuple[type, ...] = ()) -> None:
    """Run `main` with these dataclasses, read from the command line.

    What the user can mend is one line and exit code 1; a bug keeps its traceback.
    """
    code, text = 0, ""
    signals.die_with_launcher()
    try:
        main(*(parse(argument_types) if argument_types else ()))
    except RunEnded as end:
        code = end.code
        say(end.text)
    except KeyboardInterrupt:
        code = 130
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # mostly the first process fails in the same way, says so, and this one is ended meanwhile
        text = f"error: {error}"
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            text = f"error: {error.filename or 'A file'}: {error.strerror}."
        elif isinstance(error, ImportError) and not str(error.name).startswith("recipes"):  # that an argument asks for
            text = f"error: {' '.join(str(error).split())}"
        elif torch.distributed.is_initialized():
            text = traceback.format_exc().rstrip()
        else:
            raise
    finally:
        lock.release_all()
    end_process(code, text)


def end_process(code: int, failure: str) -> None:
    """End with exit code `code`, or with 1 and the text of a failure.

    A process that fails ends at once, so that the launcher ends the others, which may wait for it. One of several
    that is done waits for no thread: one that never ends would hold all machines.
    """
    if failure:
        code = 1
        tqdm.write(failure, file=sys.stderr)
    elif torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if world_size() > 1:
        if not failure:
            atexit._run_exitfuncs()  # trackers close here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def holds_anything(folder: str) -> bool:
    """Whether a folder holds more than a run leaves that was stopped before its first step."""
    left = (LOCK, UNFINISHED, f"{record.RECORD}.partial")
    others = [path for path in Path(folder).glob("*") if path.name not in left]
    return any(not path.is_dir() or any(path.iterdir()) for path in others)
