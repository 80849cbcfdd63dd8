"""Scalar heads and log-probabilities of a causal LM at chosen states, all through the model's own forward.

A reward model or a critic is the base's last hidden state times a `score` head of shape (1, hidden), the layout of
`*ForSequenceClassification`: what `RewardTrainer` saves loads as is.
"""

import contextlib
import copy
import functools
import os
import types
from collections.abc import Callable, Iterator

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel

# Index pairs: rows and columns, (N,) each, of hidden states in a batch whose padding comes last.
States = tuple[torch.Tensor, torch.Tensor]


class ScoreHead(nn.Linear):
    """The scalar head of a reward model or critic: float32 weights, and computed in float32 also under autocast.

    In bf16 scores near 2 come in steps of 1/64, and at usual rates most of a trained head would never move.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) of any precision → (..., 1) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def base_of(model: nn.Module) -> nn.Module:
    """The model that holds the layers of a `PeftModel`, adapters included; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def use_float32_head(model: PreTrainedModel) -> None:
    """Make a classifier's linear `score` head, and adapters' copies of it, [`ScoreHead`]s in place."""
    for module in model.score.modules():
        if type(module) is nn.Linear:
            module.__class__ = ScoreHead  # of the same attributes, with another forward
            module.float()


def add_state_forward(model: PreTrainedModel, temperature: float = 1.0, frozen_head: Callable | None = None) -> None:
    """Give a causal LM with TRL's fused head a forward that computes chosen states of right-aligned rows only.

    - `model(input_ids=ids, states=(rows, columns), targets=tokens, compute_entropy=bool)` gives log p of each target
      at `temperature`, and the entropy (None where it was not asked for), both (N,) float32. A `frozen_head` computes
      them instead of TRL's: `(hidden (N, H), weight (V, H), targets, temperature, compute_entropy)`;
    - `model(input_ids=ids, states=(rows, columns), scalar_head=role)` gives scores, (N,) float32: from the module
      `model.critic` for the role `"critic"` where there is one (full fine-tuning), else from the last hidden state and
      the head that the role's adapter carries.

    Other calls keep their form.
    """
    causal_lm_forward = model.forward
    lm_head = model.get_output_embeddings()
    if not hasattr(lm_head, "bias"):  # PEFT's wrapper of an LM head that is tied to trained token embeddings
        lm_head.bias = lm_head.original_module.bias

    def at_states(input_ids, states, targets=None, compute_entropy=False, scalar_head=None, **of_peft):
        if scalar_head == "critic" and hasattr(model, "critic"):
            return scores_at(model.critic, input_ids, states)
        if scalar_head is not None:
            return scores_at(model, input_ids, states, model.score.modules_to_save[scalar_head])
        if frozen_head is not None:
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[states]
            return frozen_head(hidden, model.get_output_embeddings().weight, targets, temperature, compute_entropy)
        rows, columns = states
        labels = torch.full_like(input_ids, -100).index_put_((rows, columns + 1), targets)
        outputs = causal_lm_forward(input_ids=input_ids, labels=labels, fused_lm_head=True)
        return outputs.log_probs[states], outputs.entropy[states] if compute_entropy else None

    replace_forward(model, at_states)


def add_score_forward(model: PreTrainedModel) -> None:
    """Give a sequence classifier a forward that scores chosen states of right-aligned rows.

    `model(input_ids=ids, states=(rows, columns))` gives (N,) float32.
    """
    use_float32_head(model)
    replace_forward(model, functools.partial(scores_at, model))


def replace_forward(model: PreTrainedModel, at_states: Callable) -> None:
    """Send calls with `states` to `at_states`, by `forward`, where DDP and FSDP see them."""
    plain = model.forward

    # Keep the original signature: `generate` validates its model kwargs against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        return (at_states if "states" in kwargs else plain)(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def scores_at(
    model: PreTrainedModel, input_ids: torch.Tensor, states: States, head: nn.Module | None = None
) -> torch.Tensor:
    """Scores at chosen states of right-aligned rows by a [`ScoreHead`], by default the model's own: (N,) float32."""
    model = base_of(model)
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[states]
    return (model.score if head is None else head)(hidden).squeeze(-1)


def critic_from_policy(policy: PreTrainedModel, trust_remote_code: bool = False) -> PreTrainedModel:
    """A full critic with the policy's backbone and a head of zeros, so it values every state at 0."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    # Not `to`, which would round the frequencies of rotary embeddings too.
    options = {"dtype": policy.dtype, "trust_remote_code": trust_remote_code}
    critic = AutoModelForSequenceClassification.from_config(config, **options)
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    critic.score.weight.data.zero_()
    return critic


def full_critic(model: PreTrainedModel | PeftModel) -> PreTrainedModel | None:
    """The critic that is a model of its own; `None` where it is an adapter."""
    return getattr(base_of(model), "critic", None)


@contextlib.contextmanager
def without_critic(model: PreTrainedModel | PeftModel) -> Iterator[PreTrainedModel | PeftModel | None]:
    """Take a critic that is a model of its own out of the policy, where PEFT would find its layers; yield it."""
    critic = base_of(model)._modules.pop("critic", None)
    try:
        yield critic
    finally:
        if critic is not None:
            base_of(model).critic = critic


def save_trained(model: PreTrainedModel | PeftModel, folder: str, state_dict: dict | None = None) -> None:
    """`save_pretrained` of what PPO trains: the policy, loadable by plain peft or transformers, `critic/` and `ema/`.

    `state_dict` has the whole weights, where the model is sharded (FSDP).
    """
    weights = model.state_dict() if state_dict is None else state_dict
    prefix, adapters = "critic.", {}
    if isinstance(model, PeftModel):
        prefix = "base_model.model.critic."
        adapters = {"selected_adapters": [name for name in ("default", "critic", "ema") if name in model.peft_config]}
    policy = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    with without_critic(model) as critic:
        model.save_pretrained(folder, state_dict=policy, **adapters)
    if critic is not None:
        critic.save_pretrained(os.path.join(folder, "critic"), state_dict=own)


def load_critic(model: PreTrainedModel | PeftModel, folder: str) -> None:
    """Put the critic that [`save_trained`] wrote below `folder` back, where it is a model of its own."""
    critic = full_critic(model)
    if isinstance(critic, PeftModel):
        set_peft_model_state_dict(critic, load_peft_weights(os.path.join(folder, "critic"), device="cpu"))
    elif critic is not None:
        # In float32 nothing is rounded on the way: the head is float32 whatever the backbone is.
        saved = type(critic).from_pretrained(os.path.join(folder, "critic"), dtype=torch.float32)
        critic.load_state_dict(saved.state_dict())
