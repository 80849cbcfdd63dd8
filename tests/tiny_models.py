"""Small random models for tests: a two-layer Llama with a word-level tokenizer, built in milliseconds."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def word_tokenizer(words: int = 59, prefix: str = "w", pad_token: str = "<pad>") -> PreTrainedTokenizerFast:
    """Tokens `w0 w1 …` split at spaces, after the special ones."""
    vocabulary = {
        token: index for index, token in enumerate((*SPECIAL_TOKENS, *(f"{prefix}{i}" for i in range(words))))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad_token,
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def llama_config(vocabulary: int = 64, **kwargs) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, **(sizes | ids | kwargs))


def causal_lm(seed: int = 0, sharpness: float = 8.0, **kwargs) -> LlamaForCausalLM:
    """Random weights; `sharpness` scales the last norm, so that samples are not uniform."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**({"tie_word_embeddings": True} | kwargs))).eval()
    model.model.norm.weight.data.mul_(sharpness)
    return model


def reward_model(seed: int = 1, **kwargs) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=1, **kwargs)).eval()


def prompts(n: int, length: int = 4, seed: int = 0, words: int = 59) -> list[list[dict]]:
    """`n` conversational prompts of `length` words."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(words, (n, length), generator=generator).tolist()
    return [[{"role": "user", "content": " ".join(f"w{word}" for word in row)}] for row in rows]
