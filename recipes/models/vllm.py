"""What vLLM is sent of a model that plays several roles: the policy's weights, merged outside of the base."""

from peft import PeftModel
from trl.generation.vllm_generation import VLLMGeneration

from recipes.cli.errors import UserError
from recipes.models.merged import OTHER_ROLES, policy_parameters, unmergeable


def send_only_policy(vllm_generation: VLLMGeneration) -> None:
    """Let TRL send vLLM the policy only, and leave the base as it is, where TRL merges into it for each sync."""
    model = vllm_generation.model
    if isinstance(model, PeftModel):
        if vllm_generation._dist.is_fsdp:
            raise UserError("use_vllm with an adapter needs the whole base on each GPU: launch multi_gpu.yaml.")
        if name := unmergeable(model):
            raise UserError(f"use_vllm cannot take an adapter with {name}: sample with use_vllm: false.")
        vllm_generation._iter_named_params = lambda: policy_parameters(model)
        return
    named_parameters = vllm_generation._iter_named_params  # gathers what is sharded
    vllm_generation._iter_named_params = lambda: (
        (name, weight) for name, weight in named_parameters() if not name.startswith(OTHER_ROLES)
    )
