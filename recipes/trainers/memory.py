"""Peak memory of a training step, found by running it on tensors that have shapes and no data (`FakeTensorMode`).

The model is built from its configuration alone, gets its adapters by PEFT, and runs the passes of a step, forward and
backward, while every storage that lives is counted. So architecture, attention, autocast and activation checkpointing
count as they will in the run; nothing is known of any model by name.
"""

import contextlib
import copy
import weakref
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from trl.kernels import ChunkedLogProbFunction

from recipes.cli.errors import UserError, first_line
from recipes.models import adapters
from recipes.models.heads import base_of, use_float32_head
from recipes.models.merged import unmergeable
from recipes.trainers.fast.frozen_head import LOGITS_PER_BLOCK
from recipes.trainers.fast.lora_linear import fuse_adapters
from recipes.trainers.fast.packed_weights import FEW_ROWS, linear_layers

GIB = 2**30
# Tiles of TRL's fused LM head (trl/kernels/chunked_logprob.py, trl/trainer/utils.py): tokens and vocabulary
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768
# Tensors of (batch, vocabulary) in float32 alive when a token is drawn: logits, and the buffer of all passes over them
SAMPLING_TENSORS = 2
# Bytes of a weight and its scale in bitsandbytes (2305.14314, section 3): float32 for 64 weights, or 8 bits (nested)
QUANTIZED = {"4bit": 0.5 + 4 / 64, "4bit nested": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
# Bytes of optimizer state a trained parameter takes, per byte of the parameter or (8-bit) per parameter
OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "adafactor": 0, "sgd": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}


@dataclass(frozen=True)
class Setting:
    """What decides a step's memory; the lengths are in tokens."""

    step: str  # sft, reward or ppo
    config: PretrainedConfig
    rows: int  # sequences in one forward and backward: the micro-batch, for rewards all responses of its prompts
    tokens: int  # longest sequence, of prompt and response together
    response_tokens: int = 0  # longest response of PPO
    rollout_rows: int = 0  # responses that PPO samples at once on one device, 0 where it samples elsewhere
    scoring_rows: int = 0  # responses that PPO scores at once, 0 for `rows`
    merged_copy: bool = False  # PPO samples from a merged copy of the policy
    lora: LoraConfig | None = None  # the adapter that is trained, None for full fine-tuning
    dtype: torch.dtype = torch.float32  # of the weights as they are loaded
    autocast: bool = False  # computes in bfloat16 all the same
    quantization: str | None = None  # a key of QUANTIZED
    trust_remote_code: bool = False
    checkpointing: bool = False
    attn_implementation: str | None = None
    optimizer: str = "adamw_torch_fused"
    accumulates: bool = True  # gradients are held while micro-batches run
    buckets: bool = False  # gradients are copied for their exchange between processes (DDP)
    on_cpu: bool = False  # the LM head's log-probabilities are computed in torch, not in TRL's Triton kernels

    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.dtype

    def computing(self):
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def has_frozen_head(self) -> bool:
        """Whether the fast path `response_logps` is on."""
        return self.on_cpu and self.step == "ppo" and self.lora is not None


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. `held` is there all the time; of `phases` one at a time comes on top."""

    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def worst(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        return sum(self.held.values()) + sum(self.phases[self.worst].values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it made and that are still alive: `now` and `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        made = {storage._cdata: storage for storage in storages(out) if storage._cdata not in given}  # else a view
        for storage in made.values():
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def storages(values) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def estimate(setting: Setting) -> Estimate:
    """Bytes on one device at the peak of `setting`'s step; what cannot run on tensors without data is a UserError."""
    try:
        model, critic = build(setting)
        if unmergeable(model):  # PPO then samples from the policy itself
            setting = replace(setting, merged_copy=False)
        sampler = model
        if setting.merged_copy:
            sampler, _ = build(replace(setting, step="sft", lora=None, dtype=setting.compute_dtype()))
        held, phases = held_parts(setting, model, critic), {}
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in {model, critic, sampler} - {None}:
                for part in module.modules():  # `module.to_empty` would meet a shared part twice, and fail
                    part.to_empty(device="cpu", recurse=False)
            if setting.rollout_rows:
                phases["generation"] = generation_parts(setting, model, sampler)
            if setting.step == "ppo":
                phases["scoring"] = scoring_parts(setting, model)
            phases["update"] = update_parts(setting, model, critic)
        return Estimate(held, phases)
    except (DynamicOutputShapeException, RuntimeError, ValueError) as error:
        kind = f"{setting.config.model_type} in {str(setting.dtype).removeprefix('torch.')}"
        problem = "be built" if isinstance(error, ValueError) else "be run without data"
        raise UserError(f"A {kind} cannot {problem}: {first_line(error)}") from error


# What is held


def build(setting: Setting) -> tuple[nn.Module, PreTrainedModel | None]:
    """The model that a step trains and a critic of its own, without data."""
    config = copy.deepcopy(setting.config)
    config.pad_token_id = config.get_text_config().pad_token_id = 0
    kwargs = {"dtype": setting.dtype, "attn_implementation": setting.attn_implementation}
    kwargs |= {"trust_remote_code": setting.trust_remote_code}

    def classifier() -> PreTrainedModel:
        one_label = copy.deepcopy(config)
        one_label.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(one_label, **kwargs)
        use_float32_head(model)
        return model

    is_ppo, is_reward = setting.step == "ppo", setting.step == "reward"
    with torch.device("meta"):
        model = classifier() if is_reward else AutoModelForCausalLM.from_config(config, **kwargs)
        if setting.lora is None:
            return model, classifier() if is_ppo else None
        model = get_peft_model(model, adapters.seq_cls_config(setting.lora) if is_reward else setting.lora)
        if is_ppo:
            adapters.add_copy(model, "default", "ref")
            adapters.add_score_roles(model, {"reward": None, "critic": None})
            adapters.train_only(model, ("default", "critic"))
            if setting.quantization is None:
                fuse_adapters(base_of(model))
        return model, None


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trained_parameters(*models: nn.Module | None) -> list[nn.Parameter]:
    return [p for model in filter(None, models) for p in model.parameters() if p.requires_grad]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the base's linear layers, its LM head included."""
    return [getattr(layer, "base_layer", layer).weight for layer in linear_layers(base_of(model))]


def quantized_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights that bitsandbytes replaces: all matrices but the head."""
    head = base_of(model).get_output_embeddings()
    return [weight for weight in matrices(model) if head is None or weight is not head.weight]


def held_parts(setting: Setting, model: nn.Module, critic: PreTrainedModel | None) -> dict[str, int]:
    """Bytes that stay from the first step to the last: weights, adapters, gradients and optimizer states."""
    own = dict(model.named_parameters())
    added = {name for name in own if "lora_" in name or ".modules_to_save." in name} if setting.lora else set()
    weights = size(parameter for name, parameter in own.items() if name not in added)
    if setting.quantization is not None:
        quantized = quantized_weights(model)
        weights += int(sum(weight.numel() for weight in quantized) * QUANTIZED[setting.quantization]) - size(quantized)
    trained = trained_parameters(model, critic)
    parts = {"base" if setting.lora else "trained model": weights}
    if setting.lora:
        parts["adapters and heads"] = size(own[name] for name in added)
    if critic is not None:
        parts["critic"] = size(critic.parameters())
        parts["reference and reward model"] = 2 * weights
    if setting.accumulates:
        parts["gradients"] = size(trained)
    if setting.buckets:
        parts["gradient buckets of DDP"] = size(trained)
    parts["optimizer states"] = optimizer_bytes(setting.optimizer, trained)
    if setting.quantization is not None:  # bitsandbytes unpacks one layer's weight at a time
        parts["unpacked weight"] = max(size([weight]) for weight in quantized)
    return parts


def optimizer_bytes(name: str, trained: list[nn.Parameter]) -> int:
    """State of an optimizer, by its name in transformers; bitsandbytes may page it out to the host."""
    copies = next((copies for kind, copies in OPTIMIZER_COPIES.items() if kind in name), 2)
    return copies * (sum(parameter.numel() for parameter in trained) if "8bit" in name else size(trained))


def sampled_weights(setting: Setting, model: nn.Module) -> dict[str, int]:
    """What is sampled from beside the policy: on a GPU a merged copy, on a CPU packed matrices."""
    dtype = setting.compute_dtype()
    if setting.merged_copy and dtype == setting.dtype:  # what no adapter changes is shared
        name, layers = "merged copy", model.modules()
        weights = [layer.get_base_layer().weight for layer in layers if isinstance(layer, LoraLayer)]
    elif setting.merged_copy:
        name, named = "merged copy", base_of(model).named_parameters()
        weights = [weight for each, weight in named if "lora_" not in each and "score" not in each]
    elif setting.on_cpu and dtype == torch.float32 and not setting.quantization and setting.rollout_rows <= FEW_ROWS:
        name, weights = "packed weights", matrices(model)
    else:
        return {}
    return {name: sum(weight.numel() for weight in weights) * dtype.itemsize} if weights else {}


# What comes on top, one phase at a time


def run_base(model: nn.Module, rows: int, tokens: int, use_cache: bool = False):
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    return base_of(model).base_model(input_ids=ids, use_cache=use_cache)


def generation_parts(setting: Setting, model: nn.Module, sampler: nn.Module) -> dict[str, int]:
    """The cache of a rollout at full length, what is sampled from, and the prompts' pass or a step of decoding."""
    config, prompt_tokens = setting.config.get_text_config(), setting.tokens - setting.response_tokens
    # `PeftModel.generate` calls the base itself, whose forward is not the one that Accelerate puts under autocast.
    is_plain = setting.merged_copy or setting.lora is not None
    autocast = contextlib.nullcontext() if is_plain else setting.computing()
    with torch.no_grad(), LiveBytes() as live, adapters.use_role(sampler, "default"), autocast:
        cache = run_base(sampler, setting.rollout_rows, prompt_tokens, use_cache=True).past_key_values
    values = [value for layer in cache.layers for value in vars(layer).values()]
    of_prompts = size(value for value in values if isinstance(value, torch.Tensor) and value.dim())
    full = of_prompts * setting.tokens // prompt_tokens
    growing = full // config.num_hidden_layers  # a layer's cache is copied to grow
    drawing = SAMPLING_TENSORS * 4 * setting.rollout_rows * config.vocab_size
    decoding = max(live.peak - full, growing + drawing)
    return {"KV cache": full} | sampled_weights(setting, model) | {"decoding": decoding}


def scoring_parts(setting: Setting, model: nn.Module) -> dict[str, int]:
    rows = setting.scoring_rows or setting.rows
    with torch.no_grad(), LiveBytes() as live, adapters.use_role(model, "default"), setting.computing():
        run_base(model, rows, setting.tokens)
    return {"forward passes": live.peak, "logits": head_bytes(setting, rows)}


def update_parts(setting: Setting, model: nn.Module, critic: PreTrainedModel | None) -> dict[str, int]:
    """What the forward passes keep for the backward, and what that takes on top."""
    for module in filter(None, (model, critic)):
        module.train()
        if setting.checkpointing:
            if isinstance(module, PeftModel):
                adapters.checkpoint_under_roles(module)
                base_of(module).enable_input_require_grads()
            base_of(module).activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if setting.accumulates:
        for parameter in trained_parameters(model, critic):
            parameter.grad = torch.zeros_like(parameter)
    passes = [(model, "default")] + ([(critic or model, "critic")] if setting.step == "ppo" else [])
    losses, kept = [], 0
    with LiveBytes() as live:
        for module, role in passes:
            with setting.computing():
                losses.append(pass_loss(setting, module, role))
            kept = max(kept, live.now)
            if not setting.buckets:  # one process needs no backward of all at once
                losses.pop().backward()
        if losses:
            torch.stack(losses).sum().backward()
    backward = live.peak - kept
    if setting.step != "reward":
        # Gradients of states and of a trained head are float32: beside a tile, then beside what they are rounded to.
        head = base_of(model).get_output_embeddings().weight
        states = setting.rows * (setting.response_tokens or setting.tokens) * head.size(1)
        gradients = states + head.numel() * head.requires_grad
        rounded = 0 if setting.dtype == torch.float32 else gradients * setting.dtype.itemsize
        backward = max(backward, 4 * gradients + max(head_bytes(setting, setting.rows), rounded))
    return {"activations": kept, "backward": backward}


def pass_loss(setting: Setting, model: nn.Module, role: str) -> torch.Tensor:
    """A scalar with the graph of one role's pass; its logits are `head_bytes`, save those of TRL's head on a CPU."""
    base = base_of(model)
    with adapters.use_role(model, role):
        hidden = run_base(model, setting.rows, setting.tokens).last_hidden_state
        if role == "critic" or setting.step == "reward":
            return base.score(hidden[:, -setting.response_tokens :]).sum()
    weight = base.get_output_embeddings().weight
    if setting.on_cpu and not setting.has_frozen_head():
        states = hidden[:, :-1].reshape(-1, hidden.size(-1))
        targets = torch.zeros(len(states), dtype=torch.long)
        return ChunkedLogProbFunction.apply(states, weight, None, targets, 1.0, HEAD_VOCABULARY)[0].sum()
    return hidden.sum() + weight.sum()


def head_bytes(setting: Setting, rows: int) -> int:
    """The logits that the head works on at a time: TRL's tile, or a block of `FrozenHeadLogProbs`."""
    if setting.has_frozen_head():
        return 4 * LOGITS_PER_BLOCK
    predicted = rows * (setting.response_tokens or setting.tokens)
    return min(predicted, HEAD_TOKENS) * HEAD_VOCABULARY * setting.compute_dtype().itemsize
