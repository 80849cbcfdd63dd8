"""Progress of a training on the screen, instead of Trainer's dictionaries of all metrics."""

import sys

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer

from recipes.cli.screen import log_line


class LogLines(PrinterCallback):
    """A line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (line := log_line(logs, state.global_step, state.max_steps)):
            tqdm.write(line)
            sys.stdout.flush()  # it may be a file, which shall show them at once


class LogLinesAndBar(ProgressCallback):
    """Trainer's bar too, which the lines above it show at once: a bar with a delay would not be cleared then."""

    on_log = LogLines.on_log

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.delay = 0


def show_lines(trainer: Trainer) -> None:
    """Have `trainer` write lines, unless `--log_level debug` asks for everything, or a notebook shows a table."""
    if trainer.args.log_level == "debug":
        return
    for shown, instead in ((ProgressCallback, LogLinesAndBar), (PrinterCallback, LogLines)):
        if trainer.pop_callback(shown) is not None:
            trainer.add_callback(instead)
