"""A model's path, base, adapter and head, read once from its configuration files for all that load a part of it.

PEFT is imported where an adapter's own parts are asked for: that takes seconds, and a tokenizer needs none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from recipes.cli.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


@dataclass(frozen=True)
class ModelSource:
    """A base or a full model, or an adapter and the base it was trained on; made by [`resolve_model`].

    What cannot be read is a `UserError`.
    """

    path: str  # folder or Hub name, as it was given
    base: str | None = None  # folder or Hub name of an adapter's base
    revision: str = "main"  # of the weights on the Hub, an adapter's base
    trust_remote_code: bool = False
    adapter: dict[str, Any] = field(default_factory=dict, repr=False)  # an adapter's adapter_config.json

    @property
    def weights(self) -> str:
        """Folder or Hub name of the model that the weights of all layers come from."""
        return self.base or self.path

    @cached_property
    def stop_ids(self) -> list[int]:
        """Token ids at which the generation configuration of the weights stops."""
        with suppress(OSError, ValueError):
            ids = GenerationConfig.from_pretrained(self.weights, revision=self.revision).eos_token_id
            return ids if isinstance(ids, list) else [ids]
        return []

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration of the weights; copy it before changing it."""
        trusted, what = self.trust_remote_code, f"The configuration of {self.weights} could not be loaded"
        if self.base is not None:
            what = (
                f"{self.path} is an adapter on the base {self.base}, which could not be loaded (run from where that "
                "path is valid, or correct base_model_name_or_path in its adapter_config.json)"
            )
        with load_errors(what, self.weights):
            return AutoConfig.from_pretrained(self.weights, revision=self.revision, trust_remote_code=trusted)

    @property
    def positions(self) -> int | None:
        """Tokens that one sequence may have, where the model has a limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def peft_config(self) -> PeftConfig:
        """The configuration of an adapter, a new object each time; it names the revision of the base too."""
        from peft import PeftConfig, PeftType

        kind = self.adapter.get("peft_type")
        if kind not in list(PeftType):
            raise UserError(f"{self.path}/adapter_config.json: the peft_type {kind} is unknown to this PEFT.")
        with load_errors(f"{self.path}/adapter_config.json cannot be read", self.path):
            return PeftConfig.from_peft_type(**self.adapter | {"revision": self.revision})

    def adapter_weights(self) -> dict[str, torch.Tensor]:
        """The tensors in an adapter's file, on the CPU."""
        from peft.utils import load_peft_weights

        if os.path.isdir(self.path) and not any(name.startswith("adapter_model.") for name in os.listdir(self.path)):
            raise UserError(f"The adapter {self.path} has no weights (adapter_model.safetensors).")
        with load_errors(f"The weights of the adapter {self.path} cannot be read", self.path):
            return load_peft_weights(self.path, device="cpu")

    @cached_property
    def has_score_head(self) -> bool:
        """Whether a trained `score` head comes with an adapter or a full model, as in a reward model."""
        if self.base is None:
            return any(name.endswith("ForSequenceClassification") for name in self.config.architectures or [])
        return any(".score." in f".{name}" for name in self.adapter_weights())


def resolve_model(name: str | None, revision: str = "main", trust_remote_code: bool = False) -> ModelSource:
    """Find out what a `model_name_or_path` is, without loading weights.

    A `revision` that a folder cannot have, or that an adapter's base had not in its training, is refused.
    """
    if not name:
        raise UserError("Command line: --model_name_or_path is required.")
    if os.path.isfile(name):
        raise UserError(f"{name} is a file: a model is a folder, or a name on the Hub.")
    adapter = adapter_config(name)
    base, trained_on = adapter.get("base_model_name_or_path"), adapter.get("revision") or revision
    if revision not in ("main", trained_on):
        raise UserError(
            f"--model_revision {revision}: {name} is an adapter on the revision {trained_on} of {base}: leave it out."
        )
    if revision != "main" and os.path.isdir(base or name):
        raise UserError(
            f"--model_revision {revision}: {base or name} is a folder, which has no revisions: leave it out."
        )
    return ModelSource(name, base, trained_on, trust_remote_code, adapter)


def find_file(name: str, filename: str) -> str | None:
    """A file of a model, in its folder or in the copy of its Hub repository."""
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    with load_errors(f"The model {name} could not be loaded", name):
        return cached_file(name, filename, **{f"_raise_exceptions_for_{what}": False for what in quiet})


def adapter_config(name: str) -> dict[str, Any]:
    """What the adapter_config.json of a folder or Hub name says; empty where there is none."""
    path = find_file(name, "adapter_config.json")
    if path is None:
        return {}
    with load_errors(f"{path} cannot be read", name), open(path, encoding="utf-8") as file:
        adapter = json.load(file)
        base = adapter.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{name}/adapter_config.json names no base model (base_model_name_or_path).")
    return adapter


@contextmanager
def load_errors(what: str, name: str) -> Iterator[None]:
    """Makes one line of whatever a library says of the files of the model `name`, which a mistyped folder is not."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of its own kinds; tokenizers has only this one
        reason = first_line(error) or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code. Read that; --trust_remote_code true then runs it."
        elif os.path.isdir(name) and not {"config.json", "adapter_config.json"} & {*os.listdir(name)}:
            reason = f"the folder {name} holds no config.json, so it is no model."
        elif not os.path.isdir(name) and re.search("connect|offline|local folder|Repo id", str(error)):
            where = "" if os.path.isabs(name) else f" in {os.getcwd()}"
            reason = f"there is no folder {name}{where}{did_you_mean(name)}, and the Hub did not give such a model."
        raise UserError(f"{what}: {reason}") from error


def same_weights(a: ModelSource, b: ModelSource) -> bool:
    """Whether two sources have the same weights below their adapters: one folder, or one Hub name and revision."""
    if os.path.isdir(a.weights) and os.path.isdir(b.weights):
        return os.path.samefile(a.weights, b.weights)
    return (a.weights, a.revision) == (b.weights, b.revision)
