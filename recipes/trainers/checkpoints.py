"""Atomic checkpoints for every trainer here: saving, stopping after a signal, and resuming."""

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from trl import SFTTrainer

from recipes.cli import signals
from recipes.cli.checkpoints import last_good_state, newest_whole, put_in_place, rotate, unfinished
from recipes.cli.errors import RunEnded, UserError, first_line
from recipes.cli.files import is_write_error, sizes, sync_tree, write_text
from recipes.models.loading import not_finite
from recipes.trainers.replaced import replaced


class WholeCheckpoints(Trainer):
    """Mixin, before a trainer of TRL: a checkpoint appears under its name only when it is whole.

    Everything is written below `.unfinished` and on the disk before the folder is renamed; older checkpoints are
    deleted after that. It also holds, for each process, what Trainer keeps in memory alone (`running_state`), so a
    resumed run logs what an uninterrupted one logs.

    A loss, gradient or weight that is not finite ends the run with a UserError before it reaches the disk; so does a
    checkpoint that cannot be written (older ones are untouched). A signal ends it with RunEnded, after a checkpoint.
    """

    # Attributes that a checkpoint holds beside what Trainer saves
    kept: tuple[str, ...] = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")
    card: Callable[[], str] | None = None  # of a recipe; TRL's own card knows neither data nor numbers
    _saving = _stopping = False
    _resumed_state: dict[str, Any] | None = None
    _seconds_before = _began = 0.0
    _passes = _pass = _pass_began = 0  # over a stream: before this process, now, and its first step
    _last_step = 0  # after which it was asked what to log and save

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # Accelerate rounds scores, values and log-probabilities, and gradients before it sums them over processes.
            exact = {"output_dtype": None, "reduce_dtype": torch.float32}
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **exact)

    def running_state(self) -> dict[str, Any]:
        """What this process keeps between steps beside what Trainer saves, in types that `torch.load` takes safely."""
        return {name: getattr(self, name) for name in self.kept} | {
            "seconds": self._seconds_before + time.time() - self._began,
            "pass": (self._pass, self._pass_began),
            "training": self.model.training,  # the last log of a run belongs to the mode that an evaluation left
            "metrics": {mode: dict(metrics) for mode, metrics in self._metrics.items()},
        }

    def restore_running_state(self, state: dict[str, Any]) -> None:
        """Take back what `running_state` gave."""
        for name in self.kept:
            setattr(self, name, state[name])
        self._tr_loss = self._tr_loss.to(self.args.device)
        self._seconds_before, (self._passes, self._pass_began) = state["seconds"], state["pass"]
        self.model.train(state["training"])
        for mode, metrics in state["metrics"].items():
            self._metrics[mode].update(metrics)

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """All rows in an evaluation: `dataloader_drop_last` is about training, and a small one would have none."""
        with replaced(self.args, dataloader_drop_last=self.args.dataloader_drop_last and is_training):
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)

    # Numbers that are not finite

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            self.stop(f"the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16: such a step is skipped, and scaled anew
        if norm is not None and not scaled and not math.isfinite(float(norm)):
            self.stop(f"the norm of the gradients is {float(norm)}")
        return norm

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            self.stop(f"the loss of the evaluation is {logs['eval_loss']}")
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if name := not_finite(self.accelerator.unwrap_model(self.model)):
            self.stop(f"{name} is not finite, and such weights are not saved")
        super().save_model(output_dir, _internal_call)

    def _check_finite(self, name: str, number: torch.Tensor, causes: dict[str, torch.Tensor]) -> None:
        """Stop before a scalar that is not finite reaches the weights; it comes from `causes`, (B, T) each."""
        if not number.isfinite():
            rows = {cause: (~of.isfinite().all(1)).nonzero()[:, 0].tolist() for cause, of in causes.items()}
            found = " and ".join(f"{cause} of rows {bad}" for cause, bad in rows.items() if bad)
            self.stop(f"{name} is {number.item()}, by {found or 'too large numbers'}")

    def stop(self, problem: str) -> NoReturn:
        """End the run: name the step, what was found and its likely cause, and what can be gone on from."""
        name, step = not_finite(self.accelerator.unwrap_model(self.model)), self.state.global_step
        cause = "Lower --learning_rate, or train in float32 or bfloat16."
        if name:
            cause = f"The weights of {name} are not finite any more: lower --learning_rate."
        if name and step == 0:
            cause = f"The weights of {name} are not finite, as the model was loaded: take another one."
        raise UserError(f"After step {step}: {problem}. {cause} {last_good_state(self.args.output_dir)}")

    # Saving

    def create_model_card(self, *args, **kwargs):
        if self.card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_text(os.path.join(self.args.output_dir, "README.md"), self.card())

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return unfinished(folder) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        output_dir = self._get_output_dir(trial)
        folder = unfinished(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._saving = True  # Trainer writes to `folder`, and finds no older checkpoint there to delete
        try:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # of a save that failed
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == folder:
                self.state.best_model_checkpoint = os.path.join(output_dir, os.path.basename(folder))
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
            if not self.args.save_only_model:
                torch.save(self.running_state(), self._running_state_file(folder))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_local_main_process:
                sync_tree(folder)
            # Each machine lists the files: a shared disk may show one of them late what another has just written.
            listings = [sizes(folder)] if self.args.save_on_each_node else gather_object([sizes(folder)])
            if self.args.should_save:
                files = {name: size for listing in listings for name, size in listing.items()}
                checkpoint = put_in_place(folder, output_dir, files, not self.args.save_only_model)
                rotate(output_dir, self.args.save_total_limit, checkpoint, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            if not is_write_error(error):
                raise
            raise UserError(
                f"The checkpoint of step {self.state.global_step} cannot be written below {output_dir}: "
                f"{first_line(error)}. {last_good_state(output_dir)}"
            ) from error
        finally:
            self._saving = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(output_dir, os.path.basename(folder)))

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._saving:  # the upload goes on in the background, so only from where the checkpoint stays
            super()._push_from_checkpoint(checkpoint_folder)

    def _running_state_file(self, folder: str) -> str:
        return os.path.join(folder, f"running_state_{self.accelerator.process_index}.pt")

    # Going on

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._resumed_from, path = checkpoint, self._running_state_file(checkpoint)
            self._resumed_state = torch.load(path, map_location="cpu", weights_only=True)
            if not self._resumed_state.keys() >= {*self.kept}:
                raise UserError(f"{checkpoint} is of an earlier version of the recipes: start the run anew.")

    def _take_up_state(self) -> None:
        """Put back what a checkpoint holds, once Trainer has set its sums to 0."""
        if self._resumed_state is None:
            return
        self.restore_running_state(self._resumed_state)
        self._resumed_state = None
        state, folder = self.state, os.path.dirname(os.path.abspath(self._resumed_from))
        if state.best_global_step and state.best_model_checkpoint is None:  # Trainer forgets it where a run was moved
            best = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
            if os.path.isdir(best):
                state.best_model_checkpoint = best
            else:  # choose anew
                state.best_metric = state.best_global_step = None
        if self.args.should_save:  # what a kill between a save and this left
            output_dir = self._get_output_dir(None)
            rotate(output_dir, self.args.save_total_limit, self._resumed_from, state.best_model_checkpoint)

    def _run_epoch(self, *, epoch, train_dataloader, start_time, **kwargs):
        if self.args.auto_find_batch_size and self._last_step > self.state.global_step:  # it begins again
            raise UserError(
                f"Memory ran out after step {self._last_step}, and --auto_find_batch_size true would train what is "
                f"trained already anew: set --per_device_train_batch_size {self._train_batch_size} or less."
            )
        self._began, self._last_step = start_time, self.state.global_step
        self._take_up_state()
        if self.state.global_step >= self.state.max_steps:  # Trainer asks only after one more step
            self.control.should_training_stop = True
            return
        if not hasattr(self.train_dataset, "__len__"):  # Trainer takes all passes over a stream for one
            self._pass, kwargs["epochs_trained"] = epoch + self._passes, self._passes
            self._pass_began = self.state.global_step if epoch else self._pass_began
            epoch, steps = self._pass, self.state.global_step - self._pass_began
            kwargs["steps_trained_in_current_epoch"] = steps * self.args.gradient_accumulation_steps
        sampler = innermost_sampler(train_dataloader)
        if hasattr(sampler, "set_epoch"):
            # Trainer does not get through to it where a resumed run skips batches that several processes share.
            sampler.set_epoch(epoch)
        elif hasattr(sampler, "generator"):
            # By seed and epoch: a resumed run does not repeat what another generator has drawn before.
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed + epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, start_time=start_time, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Called after each step and, once more, after each epoch; a run that got a signal stops after the step.

        What is due after an epoch's last step waits for the end of the epoch: a run that goes on from its checkpoint
        would not catch up on what is logged and evaluated then.
        """
        control, state = self.control, self.state
        ends_epoch = state.global_step >= state.max_steps or float(state.epoch).is_integer()
        if self._last_step != state.global_step:
            self._last_step = state.global_step
            if self._asked_to_stop():
                control.should_save = self.args.save_strategy != SaveStrategy.NO
                control.should_training_stop = True
            if ends_epoch:
                return
        elif self._stopping and not ends_epoch:  # in the middle of an epoch
            return
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        """Also true, with `--save_strategy best`, where a signal asks for a checkpoint."""
        is_best = super()._determine_best_metric(*args, **kwargs)
        return is_best or self._stopping

    def _asked_to_stop(self) -> bool:
        """Whether any process got a signal; all processes ask together and get the same answer."""
        self._stopping = self._stopping or signals.received() is not None
        if self.accelerator.num_processes > 1:
            if self._stopping:
                self.accelerator.set_trigger()
            self._stopping = self.accelerator.check_trigger()
        return self._stopping

    def _finalize_training(self, trial, num_train_samples, start_time):
        self._take_up_state()
        if self._asked_to_stop():
            number = signals.received() or signals.SIGNALS[0]
            newest, _ = newest_whole(self._get_output_dir(trial))
            rest = f"--resume_from_checkpoint true goes on from {newest}" if newest else "Nothing to resume is saved"
            raise RunEnded(f"Stopped by {number.name} after step {self.state.global_step}. {rest}.", 128 + number)
        self._last_step = 0
        self._initial_global_step = 0  # a resumed run reports loss and speed of all its steps
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


def innermost_sampler(dataloader):
    """The sampler that draws rows, below those that make batches, deal them to processes and skip some; or `None`."""
    sampler = getattr(dataloader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", None)


class WholeSFTTrainer(WholeCheckpoints, SFTTrainer):
    """TRL's `SFTTrainer` whose checkpoints are whole."""
