"""Small random models for tests: a two-layer Llama with a word-level tokenizer, built in milliseconds."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

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
    return LlamaConfig(vocab_size=vocabulary, **({"max_position_embeddings": 128} | sizes | ids | kwargs))


def causal_lm(seed: int = 0, sharpness: float = 8.0, **kwargs) -> LlamaForCausalLM:
    """Random weights; `sharpness` scales the last norm, so that samples are not uniform."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**({"tie_word_embeddings": True} | kwargs))).eval()
    model.model.norm.weight.data.mul_(sharpness)
    return model


def reward_model(seed: int = 1, **kwargs) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(**({"num_labels": 1} | kwargs))).eval()


def save_base(folder: Path, **kwargs) -> str:
    """Write a base with its tokenizer, and return the folder's name."""
    causal_lm(**kwargs).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: str | Path, task_type: str = "CAUSAL_LM", std=0.0, trust=False, **lora) -> str:
    """Write a LoRA adapter on a saved base with its tokenizer, and return the folder's name.

    `std` of its B matrices and its score head; with 0 the matrices are 0 and the head is the random one of the base.
    """
    if task_type == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, trust_remote_code=trust)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=trust)
    heads = ["score"] if task_type == "SEQ_CLS" else None
    options = {"r": 4, "target_modules": "all-linear", "modules_to_save": heads} | lora
    model = get_peft_model(model, LoraConfig(task_type=task_type, **options))
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if std and ("lora_B" in name or "score.modules_to_save" in name):
            torch.nn.init.normal_(weight, std=std)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(n: int, length: int = 4, seed: int = 0, words: int = 59) -> list[list[dict]]:
    """`n` conversational prompts of `length` words."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(words, (n, length), generator=generator).tolist()
    return [[{"role": "user", "content": " ".join(f"w{word}" for word in row)}] for row in rows]
