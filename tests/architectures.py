"""Tiny random models of many families, built from their configurations, and the tokenizers they come with.

The sizes are as small as each family allows. Weights are drawn wider than usual, so that a wrong position, scale or
mask shows in the log-probabilities.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tiny_models import word_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
MULTI_HEAD = SIZES | {"num_key_value_heads": 4}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GPT2_SIZES = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}


def byte_tokenizer(*special_tokens: str, **kwargs) -> PreTrainedTokenizerBase:
    """Bytes, and special tokens."""
    tokens = (*sorted(pre_tokenizers.ByteLevel.alphabet()), *special_tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    """One special token that is BOS, EOS and unknown, no padding token, no chat template."""
    end = "<|endoftext|>"
    return byte_tokenizer(end, bos_token=end, eos_token=end, unk_token=end)


def chatml_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen's kind: ChatML, whose turns end with a newline after EOS."""
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_tokenizer(*tokens, eos_token=tokens[2], pad_token=tokens[0], chat_template=CHATML)


def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Llama 2's kind: BOS before every text, the padding token is EOS, no chat template."""
    end, bos = "</s>", "<s>"
    tokenizer = byte_tokenizer(bos, end, bos_token=bos, eos_token=end, pad_token=end)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def padless_tokenizer() -> PreTrainedTokenizerBase:
    """A chat template, and no padding token."""
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


TOKENIZERS = {
    "chat": (word_tokenizer, "chat template, padding token"),
    "padless": (padless_tokenizer, "chat template, no padding token"),
    "ChatML": (chatml_tokenizer, "ChatML, padding token"),
    "BOS": (bos_tokenizer, "BOS, padding = EOS, no chat template"),
    "GPT-2": (gpt2_tokenizer, "BOS = EOS, no padding token, no chat template"),
}


@dataclass(frozen=True)
class Family:
    """A family: its `model_type` in transformers, the configuration that makes it tiny, and its kind of tokenizer.

    `spare_tokens` is how much larger the model's vocabulary is than the tokenizer's; `classifier` is whether
    transformers has a sequence classifier of this family.
    """

    model_type: str
    config: dict = field(default_factory=lambda: SIZES)
    tokenizer: str = "chat"
    tied: bool = False
    spare_tokens: int = 0
    classifier: bool = True

    def save(self, folder: Path, seed: int = 0) -> str:
        """Write the base, weights and tokenizer, to `folder` and return its name."""
        tokenizer = TOKENIZERS[self.tokenizer][0]()
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=len(tokenizer) + self.spare_tokens,
            tie_word_embeddings=self.tied,
            **tokens,
            **self.config,
        )
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)


FALCON = {name: SIZES[name] for name in SIZES if name != "head_dim"} | {"ffn_hidden_size": 48}
WINDOW = {"sliding_window": 8}
OPT_350M = {
    "hidden_size": 32,
    "word_embed_proj_dim": 24,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "init_std": 0.2,
    "do_layer_norm_before": False,
}
DEEPSEEK = MULTI_HEAD | {
    "head_dim": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **EXPERTS,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES = {
    "Llama 3": Family("llama", tokenizer="padless"),
    "Qwen 2": Family("qwen2", tokenizer="ChatML", tied=True, spare_tokens=24),
    "Qwen 3": Family("qwen3", tokenizer="ChatML", tied=True, spare_tokens=24),
    "Qwen 3 MoE": Family("qwen3_moe", SIZES | EXPERTS | {"num_experts": 4}, tokenizer="ChatML"),
    "Qwen 3 Next": Family(
        "qwen3_next",
        SIZES | EXPERTS | LINEAR_ATTENTION | {"num_experts": 4, "shared_expert_intermediate_size": 16},
        tokenizer="ChatML",
    ),
    "Gemma 2": Family("gemma2", SIZES | WINDOW | {"query_pre_attn_scalar": 8}, tied=True),
    "Gemma 3": Family(
        "gemma3_text",
        SIZES | WINDOW | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
        tied=True,
    ),
    "Mistral": Family("mistral", SIZES | WINDOW, tokenizer="BOS"),
    "Mixtral": Family("mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}, tokenizer="BOS"),
    "Phi 2": Family("phi", MULTI_HEAD | {"partial_rotary_factor": 0.5}, tokenizer="GPT-2", spare_tokens=15),
    "Phi 3": Family("phi3", SIZES | {"original_max_position_embeddings": 256}, tokenizer="padless", spare_tokens=8),
    "SmolLM 3": Family("smollm3", SIZES | {"no_rope_layers": [1, 0]}, tokenizer="ChatML", tied=True),
    "GPT-2": Family("gpt2", GPT2_SIZES, tokenizer="GPT-2", tied=True),
    "GPT-J": Family("gptj", GPT2_SIZES | {"rotary_dim": 4}, tokenizer="GPT-2"),
    "GPT-NeoX, Pythia": Family("gpt_neox", SIZES | {"rotary_pct": 0.25}, tokenizer="GPT-2", spare_tokens=7),
    "GPT-OSS": Family("gpt_oss", SIZES | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "OPT": Family("opt", OPT_350M, tokenizer="BOS", tied=True),
    "Bloom": Family(
        "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}, tokenizer="BOS", tied=True
    ),
    "Falcon": Family("falcon", FALCON, tokenizer="GPT-2", tied=True),
    "Falcon (ALiBi)": Family("falcon", FALCON | {"alibi": True}, tokenizer="GPT-2"),
    "OLMo 2": Family("olmo2", tokenizer="GPT-2"),
    "Granite": Family("granite", SIZES | {"logits_scaling": 4.0}, tied=True, classifier=False),
    "Cohere 2": Family(
        "cohere2", SIZES | WINDOW | {"logit_scale": 0.25}, tokenizer="BOS", tied=True, classifier=False
    ),
    "StarCoder 2": Family("starcoder2", SIZES | WINDOW, tokenizer="GPT-2", tied=True),
    "StableLM": Family("stablelm", SIZES | {"use_parallel_residual": True}, tokenizer="GPT-2"),
    "GLM 4": Family("glm4", SIZES | {"partial_rotary_factor": 0.5}, tokenizer="padless", spare_tokens=5),
    "DeepSeek V3": Family("deepseek_v3", DEEPSEEK, tokenizer="BOS"),
    "MPT": Family(
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "initializer_range": 0.2},
        tokenizer="GPT-2",
        tied=True,
    ),
}
