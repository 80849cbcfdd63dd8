"""What vLLM is sent of a model that plays several roles."""

from trl.generation.vllm_generation import VLLMGeneration


def send_only_policy(vllm_generation: VLLMGeneration) -> None:
    """Keep the critic and the heads of other roles out of what TRL sends to vLLM, which has no place for them."""
    named_parameters = vllm_generation._iter_named_params

    def policy_parameters():
        for name, parameter in named_parameters():
            if not name.startswith(("critic.", "score.")):
                yield name, parameter

    vllm_generation._iter_named_params = policy_parameters
