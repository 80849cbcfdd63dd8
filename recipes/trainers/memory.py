"""Peak memory of a training step, found by running it on tensors that have shapes and no data.

The model is built from its configuration alone on torch's meta device, gets its adapters by PEFT, and runs the passes
of a step under `FakeTensorMode`, forward and backward, while every storage that lives is counted. So the architecture,
the attention implementation, autocast and activation checkpointing count as they will in the run; nothing is known
of any model by name.
"""

import contextlib
import copy
import functools
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from recipes.cli.errors import UserError, first_line
from recipes.models.adapters import add_score_roles, checkpoint_under_roles, seq_cls_config, use_role
from recipes.models.heads import base_of
from recipes.trainers.fast.frozen_head import LOGITS_PER_BLOCK, FrozenHeadLogProbs
from recipes.trainers.fast.lora_linear import fuse_adapters
from recipes.trainers.fast.packed_weights import FEW_ROWS, linear_layers

GIB = 2**30
# Tiles of TRL's fused LM head (trl/kernels/chunked_logprob.py, trl/trainer/utils.py): tokens and vocabulary
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768
# Tensors of (batch, vocabulary) in float32 alive when a token is drawn: logits, and the buffer of all passes over them
SAMPLING_TENSORS = 2
# Bytes a weight takes in bitsandbytes' formats, with a float32 scale for 64 weights (8-bit: for a row, not counted),
# or an 8-bit one where the scales are quantised too (2305.14314, section 3)
QUANTIZED = {"4bit": 0.5 + 4 / 64, "4bit nested": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
# Bytes of optimizer state a trained parameter takes, per byte of the parameter or (8-bit) per parameter
OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "adafactor": 0, "sgd": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}


@dataclass(frozen=True)
class Setting:
    """What decides a step's memory.

    Args:
        step: `sft`, `reward` or `ppo`.
        config: configuration of the base.
        rows: sequences in one forward and backward: the micro-batch, for rewards all responses of its prompts.
        tokens: longest sequence, of prompt and response together.
        response_tokens: longest response of PPO.
        rollout_rows: responses that PPO samples at once on one device, 0 where it samples elsewhere.
        lora: the adapter that is trained, `None` for full fine-tuning.
        dtype: of the weights as they are loaded. `autocast` computes in bfloat16 all the same.
        quantization: a key of `QUANTIZED`, or `None`.
        accumulates: gradients are held while micro-batches run (gradient accumulation).
        buckets: gradients are copied for their exchange between processes (DDP).
        on_cpu: the LM head's log-probabilities are computed in torch, not in TRL's Triton kernels.
    """

    step: str
    config: PretrainedConfig
    rows: int
    tokens: int
    response_tokens: int = 0
    rollout_rows: int = 0
    lora: LoraConfig | None = None
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    quantization: str | None = None
    trust_remote_code: bool = False
    checkpointing: bool = False
    attn_implementation: str | None = None
    optimizer: str = "adamw_torch_fused"
    accumulates: bool = True
    buckets: bool = False
    on_cpu: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. `held` is there all the time; of `phases` one at a time comes on top."""

    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def worst(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        return sum(self.held.values()) + sum(self.phases[self.worst].values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it made and that are still alive: `now` and `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in given:  # else a view, of a weight perhaps
                self._add(storage)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_):
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size


def storages(values) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor))


def estimate(setting: Setting) -> Estimate:
    """Bytes on one device at the peak of `setting`'s step.

    Raises:
        UserError: the architecture cannot run on tensors without data, or there is no place for the adapter.
    """
    kind = setting.config.model_type
    try:
        model, frozen_models, critic = build(setting)
        held = held_parts(setting, model, frozen_models, critic)
        return Estimate(held, phases(setting, model, measure_deep(setting, model, critic)))
    except (DynamicOutputShapeException, RuntimeError) as error:
        raise UserError(
            f"A {kind} in {str(setting.dtype).removeprefix('torch.')} cannot be run without data, as some models "
            f"that route tokens to experts ({first_line(error)})."
        ) from error
    except ValueError as error:
        raise UserError(f"A model of type {kind} could not be built: {first_line(error)}") from error


# Models


def build(setting: Setting) -> tuple[nn.Module, int, PreTrainedModel | None]:
    """The model that a step trains, without data; how many frozen copies stand beside it; and a separate critic."""
    config = copy.deepcopy(setting.config)
    config.pad_token_id = config.get_text_config().pad_token_id = 0
    kwargs = {"dtype": setting.dtype, "attn_implementation": setting.attn_implementation}
    kwargs |= {"trust_remote_code": setting.trust_remote_code}
    classifier = copy.deepcopy(config)
    classifier.num_labels = 1
    with torch.device("meta"):
        if setting.step == "reward":
            model = AutoModelForSequenceClassification.from_config(classifier, **kwargs)
        else:
            model = AutoModelForCausalLM.from_config(config, **kwargs)
        if setting.lora is None:
            full_ppo = setting.step == "ppo"
            critic = AutoModelForSequenceClassification.from_config(classifier, **kwargs) if full_ppo else None
            return model, 2 if full_ppo else 0, critic  # the frozen ones: reference and reward model
        lora = seq_cls_config(setting.lora) if setting.step == "reward" else setting.lora
        model = get_peft_model(model, lora)
        if setting.step == "ppo":
            model.add_adapter("ref", model.peft_config["default"])
            add_score_roles(model, {"reward": None, "critic": None})
            model.set_requires_grad(["ref", "reward"], False)
            model.set_requires_grad(["default", "critic"], True)
            model.get_base_model().score.modules_to_save["critic"].requires_grad_(True)
            if setting.quantization is None:
                fuse_adapters(model.get_base_model())
    if setting.quantization is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:  # as TRL's trainers do
                parameter.data = parameter.data.to(torch.bfloat16)
    return model, 0, None


def materialize(model: nn.Module) -> None:
    """Move parameters and buffers from the meta device to the CPU, under `FakeTensorMode` and so without data."""
    moved = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:  # tied weights stay tied
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = tensor, new
                tensors[name] = moved[id(tensor)][1]


def size(parameters) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def trained_parameters(model: nn.Module, critic: PreTrainedModel | None) -> list[nn.Parameter]:
    return [p for module in filter(None, (model, critic)) for p in module.parameters() if p.requires_grad]


def quantized_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights that bitsandbytes replaces: of all linear layers of the base but its head."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = {id(module) for module in (base.get_output_embeddings(), getattr(base, "score", None)) if module}
    return [
        module.weight
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in kept and "lora_" not in name and ".score" not in name
    ]


def held_parts(
    setting: Setting, model: nn.Module, frozen_models: int, critic: PreTrainedModel | None
) -> dict[str, int]:
    """Bytes that stay from the first step to the last: weights, adapters, gradients and optimizer states."""
    own = dict(model.named_parameters())
    added = {name for name in own if "lora_" in name or ".modules_to_save." in name} if setting.lora else set()
    base = [parameter for name, parameter in own.items() if name not in added]
    weights = size(base)
    if setting.quantization is not None:
        quantized = quantized_weights(model)
        weights += int(sum(weight.numel() for weight in quantized) * QUANTIZED[setting.quantization]) - size(quantized)
    trained = trained_parameters(model, critic)
    parts = {"base" if setting.lora else "trained model": weights}
    if setting.lora:
        parts["adapters and heads"] = size(own[name] for name in added)
    if critic is not None:
        parts["critic"] = size(critic.parameters())
        parts["reference and reward model"] = frozen_models * weights
    if setting.accumulates:
        parts["gradients"] = size(trained)
    if setting.buckets:
        parts["gradient buckets of DDP"] = size(trained)
    parts["optimizer states"] = optimizer_bytes(setting.optimizer, trained)
    return parts


def optimizer_bytes(name: str, trained: list[nn.Parameter]) -> int:
    """State of an optimizer, by its name in transformers; bitsandbytes may page it out to the host."""
    copies = next((copies for kind, copies in OPTIMIZER_COPIES.items() if kind in name), 2)
    if "8bit" in name:
        return copies * sum(parameter.numel() for parameter in trained)
    return copies * size(trained)


# Passes


def measure_deep(setting: Setting, model: nn.Module, critic: PreTrainedModel | None) -> dict[str, int]:
    """`measure`, extrapolated from two shallow models to the depth of `model` where its layers repeat.

    While gradients are held all along, the peaks grow by the same bytes with every layer.
    """
    config = setting.config.get_text_config()
    depth, types = config.num_hidden_layers, getattr(config, "layer_types", None) or [None]
    period = next(p for p in range(1, depth + 1) if all(a == b for a, b in zip(types, types[p:], strict=False)))
    few = period * math.ceil(2 / period)
    if setting.accumulates and 2 * few < depth:
        small = [build(replace(setting, config=shallow(setting.config, layers))) for layers in (few, 2 * few)]
        counts = [sum(parameter.numel() for parameter in each.parameters()) for each, *_ in small]
        deep_count = sum(parameter.numel() for parameter in model.parameters())
        if deep_count - counts[1] == (counts[1] - counts[0]) * (depth - 2 * few) / few:
            low, high = (measure(setting, each, its_critic) for each, _, its_critic in small)
            return {name: high[name] + (high[name] - low[name]) * (depth - 2 * few) // few for name in low}
    return measure(setting, model, critic)


def shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """`config` with its first `layers` layers."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]
    return config


def measure(setting: Setting, model: nn.Module, critic: PreTrainedModel | None) -> dict[str, int]:
    """Run the passes of a step without data.

    Returns peaks, and what is left: `cache` and `prefill` of the prompts' pass in sampling, `scoring` without
    gradients, `activations` after the forward passes of an update and `update`, its peak.
    """
    found = {}
    with FakeTensorMode() as mode:
        for module in filter(None, (model, critic)):
            materialize(module)
        with mode:
            if setting.step == "ppo":
                if setting.rollout_rows:
                    found |= measure_prefill(setting, model)
                with torch.no_grad(), LiveBytes() as live, role(model, "default"), computing(setting):
                    last_hidden_state(setting, model)
                found["scoring"] = live.peak
            return found | measure_update(setting, model, critic)


def measure_prefill(setting: Setting, model: nn.Module) -> dict[str, int]:
    ids = torch.zeros(setting.rollout_rows, setting.tokens - setting.response_tokens, dtype=torch.long)
    # `PeftModel.generate` calls the base itself, whose forward is not the one that Accelerate puts under autocast.
    autocast = contextlib.nullcontext() if setting.lora else computing(setting)
    with torch.no_grad(), LiveBytes() as live, role(model, "default"), autocast:
        cache = base_of(model).base_model(input_ids=ids, use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.dim()]
    return {"cache": size(tensors), "prefill": live.peak}


def measure_update(setting: Setting, model: nn.Module, critic: PreTrainedModel | None) -> dict[str, int]:
    prepare_training(setting, model, critic)
    if setting.accumulates:
        for parameter in trained_parameters(model, critic):
            parameter.grad = torch.zeros_like(parameter)
    passes = [functools.partial(policy_loss, setting, model)]
    if setting.step == "ppo":
        passes.append(functools.partial(critic_loss, setting, model, critic))
    loss, kept = 0, 0
    with LiveBytes() as live:
        for number, forward in enumerate(passes, 1):
            with computing(setting):
                loss = loss + forward()
            kept = max(kept, live.now)
            if number == len(passes) or not setting.buckets:  # one process needs no backward of all at once
                loss.backward()
                loss = 0
    return {"activations": kept, "update": live.peak}


def phases(setting: Setting, model: nn.Module, measured: dict[str, int]) -> dict[str, dict[str, int]]:
    """Bytes on top of what is held, by phase and part."""
    config = setting.config.get_text_config()
    unpacked = {}
    if setting.quantization is not None:  # bitsandbytes unpacks one layer's weight at a time
        unpacked = {"unpacked weight": max(size([weight]) for weight in quantized_weights(model))}
    found = {}
    if "cache" in measured:
        prompt, cache = setting.tokens - setting.response_tokens, measured["cache"]
        full = cache * setting.tokens // prompt
        sampling = SAMPLING_TENSORS * 4 * setting.rollout_rows * config.vocab_size
        growing = full // config.num_hidden_layers  # a layer's cache is copied to grow
        decoding = {"decoding": max(measured["prefill"] - full, growing + sampling)}
        found["generation"] = {"KV cache": full, "packed weights": packed_bytes(setting, model)} | decoding
    if "scoring" in measured:
        found["scoring"] = {"forward passes": measured["scoring"], "logits": head_bytes(setting)}
    activations = measured["activations"]
    found["update"] = {"activations": activations, "backward": measured["update"] - activations}
    return {name: parts | unpacked for name, parts in found.items()}


def packed_bytes(setting: Setting, model: nn.Module) -> int:
    """The copies that a CPU samples from, see `recipes.trainers.fast.packed_weights`."""
    in_float32 = setting.dtype == torch.float32 and not setting.autocast and setting.quantization is None
    if not (setting.on_cpu and in_float32 and setting.rollout_rows <= FEW_ROWS):
        return 0
    return size([getattr(layer, "base_layer", layer).weight for layer in linear_layers(base_of(model))])


def policy_loss(setting: Setting, model: nn.Module) -> torch.Tensor:
    """A scalar with the graph of the LM head's pass, or of the reward's."""
    if setting.step == "reward":
        return model(input_ids=input_ids(setting), use_cache=False).logits.float().sum()
    with role(model, "default"):
        hidden = last_hidden_state(setting, model)
        head = base_of(model).get_output_embeddings()
        # Off a GPU TRL's head scores every position, which `FrozenHeadLogProbs` spares.
        response_only = setting.step == "ppo" and not (setting.on_cpu and setting.lora is None)
        predicting = hidden[:, -setting.response_tokens :] if response_only else hidden[:, :-1]
        return log_probs_loss(setting, predicting.reshape(-1, hidden.size(-1)), head.weight)


def critic_loss(setting: Setting, model: nn.Module, critic: PreTrainedModel | None) -> torch.Tensor:
    if critic is None:
        with role(model, "critic"):
            hidden, score = last_hidden_state(setting, model), base_of(model).score.modules_to_save["critic"]
    else:
        hidden, score = critic.base_model(input_ids=input_ids(setting), use_cache=False)[0], critic.score
    states = hidden[:, -setting.response_tokens :].reshape(-1, hidden.size(-1))
    return score(states.to(score.weight.dtype)).float().sum()


def log_probs_loss(setting: Setting, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The LM head as it runs: TRL's tiles, or on a CPU with a head that is frozen `FrozenHeadLogProbs`."""
    targets = torch.zeros(len(hidden), dtype=torch.long)
    if not setting.on_cpu:
        return TiledHead.apply(hidden, weight, head_bytes(setting))
    if has_frozen_head(setting):
        return FrozenHeadLogProbs.apply(hidden, weight, targets, 1.0, False)[0].sum()
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, HEAD_VOCABULARY)[0].sum()


class TiledHead(torch.autograd.Function):
    """Allocates what TRL's `ChunkedLogProbFunction` does with Triton: a tile, and gradients in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, tile_bytes):
        ctx.save_for_backward(hidden, weight)
        ctx.tile_bytes = tile_bytes
        torch.empty(tile_bytes, dtype=torch.uint8)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        tile = torch.empty(ctx.tile_bytes, dtype=torch.uint8)
        for_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        del tile
        return for_hidden.to(hidden.dtype), None if for_weight is None else for_weight.to(weight.dtype), None


def has_frozen_head(setting: Setting) -> bool:
    return setting.on_cpu and setting.step == "ppo" and setting.lora is not None


def head_bytes(setting: Setting) -> int:
    """The logits that the head works on at a time: TRL's tile, or a block of `FrozenHeadLogProbs`."""
    if has_frozen_head(setting):
        return 4 * LOGITS_PER_BLOCK
    predicted = setting.rows * (setting.response_tokens or setting.tokens)
    width = 2 if setting.autocast else torch.empty((), dtype=setting.dtype).element_size()
    return min(predicted, HEAD_TOKENS) * HEAD_VOCABULARY * width


def prepare_training(setting: Setting, model: nn.Module, critic: PreTrainedModel | None) -> None:
    for module in filter(None, (model, critic)):
        module.train()
        base = base_of(module)
        if setting.checkpointing:
            if isinstance(module, PeftModel):
                checkpoint_under_roles(module)
            kwargs = {"use_reentrant": False, "preserve_rng_state": False}
            base.activation_checkpointing_enable(kwargs)
            if setting.lora is not None:
                base.enable_input_require_grads()


def role(model: nn.Module, name: str):
    return use_role(model, name) if isinstance(model, PeftModel) else contextlib.nullcontext()


def computing(setting: Setting):
    return torch.autocast("cpu", torch.bfloat16) if setting.autocast else contextlib.nullcontext()


def input_ids(setting: Setting) -> torch.Tensor:
    return torch.zeros(setting.rows, setting.tokens, dtype=torch.long)


def last_hidden_state(setting: Setting, model: nn.Module) -> torch.Tensor:
    return base_of(model).base_model(input_ids=input_ids(setting), use_cache=False).last_hidden_state
