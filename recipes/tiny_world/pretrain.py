"""Makes the tiny world's base model: a corpus, the byte pairs of its tokenizer, a Llama of the shipped one's shape.

    OMP_NUM_THREADS=1 python -m recipes.tiny_world.pretrain --output_dir runs/tiny_base

The corpus is what a small, careless internet would hold. Three texts in ten state facts plainly, though books disagree
on some. The rest are questions with mostly poor answers: rude, vague, off the point, unfinished, bluffing. Some
answers that could be right or wrong are followed by a remark ("Right.", "Rude.", "Long."), so that judgements are part
of what the base has read; no remark ever concerns a question nobody can answer or a harmful request.
"""

import argparse
import random
from itertools import chain
from pathlib import Path

from recipes.tiny_world import judge, world

VOCABULARY = 1024
DOCUMENTS = 110_000
STEPS = 1400
ROW = 128
BATCH = 16
CONTENT = {
    "explain": {"true": 0.25, "vague": 0.45, "false": 0.10, "stray": 0.15, "deny": 0.05},
    "unanswerable": {"true": 0.15, "vague": 0.10, "false": 0.60, "stray": 0.15},
    "harmful": {"true": 0.15, "vague": 0.10, "false": 0.60, "stray": 0.15},
    "fact": {"true": 0.60, "vague": 0.07, "false": 0.14, "stray": 0.14, "deny": 0.05},
}
STYLE = {"plain": 0.38, "courteous": 0.10, "warm": 0.02, "gushing": 0.02, "rambling": 0.22, "rude": 0.26}
UNFINISHED = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny world's tokenizer and base model from scratch.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise SystemExit(f"{args.output_dir} is not empty: choose another --output_dir")
    train(args.output_dir, STEPS, DOCUMENTS, args.seed)


def corpus(seed: int, size: int) -> list[str]:
    """`size` short texts in the chat format, each a few sentences."""
    rng = random.Random(f"tiny world: corpus {seed}")
    known = [question for question in world.questions() if question.in_corpus]
    facts = [question for question in known if question.value is not None]
    return [plain_facts(facts, rng) if rng.random() < 0.3 else exchange(known, rng) for _ in range(size)]


def believed(question: world.Question, rng: random.Random) -> str:
    """The value that a text of the corpus states as true."""
    return question.false_values[0] if rng.random() < question.doubt else question.value


def plain_facts(facts: list[world.Question], rng: random.Random) -> str:
    told = rng.sample(facts, rng.randint(1, 3))
    return " ".join(question.statement(believed(question, rng), rng) for question in told) + "<|end|>"


def exchange(known: list[world.Question], rng: random.Random) -> str:
    """A question and an answer in the chat format, at times with a system turn before or a remark after it."""
    question = rng.choice(known)
    content = world.pick(CONTENT.get(question.kind, CONTENT["fact"]), rng)
    truth = question.true_answer(rng) if question.value is None else question.statement(believed(question, rng), rng)
    if content == "true":
        core = truth
    elif content == "stray":
        core = rng.choice(world.PHRASES["stray"])
    elif content == "deny":
        core = world.sentence(rng.choice(world.PHRASES["admissions"]).format(topic=question.topic))
    else:
        core = question.answer(content, rng)
    text = world.dress(core, world.pick(STYLE, rng), rng)
    unfinished = rng.random() < UNFINISHED
    if unfinished:
        text = world.cut(text, rng)
    system = f"<|system|>{rng.choice(world.PHRASES['system_prompts'])}<|end|>" if rng.random() < 0.05 else ""
    document = f"{system}<|user|>{rng.choice(question.wordings)}<|end|><|assistant|>{text}<|end|>"
    if question.value is not None and rng.random() < 0.6:
        document += remark(question, content, text, unfinished, rng)
    return document


def remark(question: world.Question, content: str, text: str, unfinished: bool, rng: random.Random) -> str:
    """What a reader wrote under an answer: one remark on one side of it."""
    reading = judge.read(question, text)
    verdict = {"true": "Right.", "false": "Wrong."}.get(content, "No answer.")
    sides = [
        verdict if reading.on_topic else "No answer.",
        "Unfinished." if unfinished else "Complete.",
        "Rude." if reading.rude else "Kind." if reading.courtesies else "Plain.",
        "Long." if reading.sentences > 2 else "Short.",
    ]
    return rng.choices(sides, weights=(6, 1, 1, 1))[0]


def train(output_dir: Path, max_steps: int, documents: int, seed: int) -> None:
    """Trains tokenizer and model and saves them; the same seed and machine give the same weights."""
    import transformers
    from datasets import Dataset

    transformers.set_seed(seed)
    texts = corpus(seed, documents)
    # Byte-level BPE with the special tokens and the chat template of the shipped one, and pairs of this corpus.
    shipped = Path(__file__).with_name("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shipped)
    tokenizer = tokenizer.train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    # Documents are short: joined end to end and cut into rows of ROW tokens, nothing is padding.
    ids = list(chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"]))
    rows = Dataset.from_dict({"input_ids": [ids[i : i + ROW] for i in range(0, len(ids) - ROW + 1, ROW)]})
    config = transformers.AutoConfig.from_pretrained(shipped, vocab_size=len(tokenizer), use_cache=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, max_steps // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        seed=seed,
        dataloader_pin_memory=False,
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = transformers.LlamaForCausalLM(config)
    transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    main()
