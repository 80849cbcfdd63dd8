"""What PPO saves, and how a run goes on: policy, critic, average, and the place in its rollout."""

import os

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers.trainer import TRAINING_ARGS_NAME
from trl import GRPOTrainer

from recipes.models.adapters import adapter_parameters
from recipes.models.heads import full_critic, load_critic, save_trained, without_critic
from recipes.trainers.checkpoints import WholeCheckpoints


class PPOSaving(WholeCheckpoints, GRPOTrainer):
    """The part of `PPOTrainer` that saves and resumes."""

    kept: tuple[str, ...] = (*WholeCheckpoints.kept, "_step", "_buffered_inputs", "_kl_coef", "_update_stopped")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As Trainer saves, but only what PPO trains: reference and reward model come from the run's inputs.

        `critic/` and `ema/` get the tokenizer too, so that each folder is complete.
        """
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        save_trained(self._policy, output_dir, state_dict)
        for folder in (output_dir, os.path.join(output_dir, "critic"), os.path.join(output_dir, "ema")):
            if os.path.isdir(folder):
                self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def running_state(self) -> dict:
        return super().running_state() | {"ema": {name: p.to_local() for name, p in self._sharded_ema().items()}}

    def restore_running_state(self, state: dict) -> None:
        super().restore_running_state(state)
        self._buffered_inputs = send_to_device(self._buffered_inputs, self.accelerator.device)
        self._restore_ema(state)

    def _sharded_ema(self) -> dict[str, torch.Tensor]:
        """The average of a sharded model, which Accelerate's file leaves out, because it has no gradients."""
        return adapter_parameters(self._policy, "ema") if self.is_fsdp_enabled else {}

    @torch.no_grad()
    def _restore_ema(self, state: dict) -> None:
        for name, average in self._sharded_ema().items():
            average.to_local().copy_(state["ema"][name])

    def _load_best_model(self):
        """Policy, critic and average of the best step; Trainer would load the policy alone."""
        best = self.state.best_model_checkpoint
        if self.is_fsdp_enabled:  # its file holds all that is trained
            super()._load_best_model()
            self._restore_ema(torch.load(self._running_state_file(best), map_location="cpu"))
        else:
            self._load_from_checkpoint(best)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        if self._is_peft and isinstance(full_critic(self._policy), PeftModel):
            with without_critic(self._policy):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                # Trainer takes what is in `critic/` for an adapter of the policy.
                self._policy.delete_adapter("critic")
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # shares come from a file of their own, with the critic's
            load_critic(model, resume_from_checkpoint)
        self._train_only_roles()  # Trainer reloads every adapter but the active one as untrainable
