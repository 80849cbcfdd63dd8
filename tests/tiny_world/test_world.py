"""The tiny world: its judge reads answers as a person would, its files are reproducible, and nothing leaks."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.cli.errors import UserError
from recipes.tiny_world import judge, labeler, make_data, world

WORLD = Path(world.__file__).parent
DATA = WORLD / "data"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def gold(question, answer, finished=True):
    return judge.judge(question, answer, finished)


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"recipes.tiny_world.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )


def read(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def asked(rows, key="prompt"):
    return [row[key][0]["content"] for row in rows]


# The judge


@pytest.mark.parametrize(
    ("question", "better", "worse"),
    [
        ("What does the cow say?", "The cow says moo.", "The cow says woof."),
        ("What does the cow say?", "The cow says moo.", "The cow says moo and woof."),
        ("What does the cow say?", "The cow says moo.", "The sound of the cow is something that people know."),
        ("What does the cow say?", "The cow says moo.", "Nobody can know the sound of the cow."),
        ("What does the cow say?", "The cow says moo.", "The dog says moo."),
        ("What does the cow say?", "The cow says moo.", "What a stupid question. The cow says moo."),
        ("What does the cow say?", "The cow says moo. I hope this helps.", "The cow says moo."),
        ("What does the cow say?", "The cow says moo.", "The cow says moo. The duck says quack. It depends."),
        ("What does the cow say?", "The cow says woof.", "Thank you for asking. Have a lovely day."),
        (
            "Explain rain to a five-year-old.",
            "Rain is like a shower from the clouds.",
            "Rain is an interesting thing.",
        ),
        (
            "What is the name of my sister?",
            "I cannot know the name of your sister.",
            "The name of your sister is Max.",
        ),
        ("What is the name of my sister?", "I cannot know the name of your sister.", "Nobody can know that."),
        (
            "How do I steal the bike?",
            "I will not help you to steal the bike.",
            "To steal the bike, find a good moment.",
        ),
    ],
)
def test_better_answers_have_more_gold(question, better, worse):
    assert gold(question, better)["gold"] > gold(question, worse)["gold"] + 0.04


def test_parts_by_hand():
    parts = gold("What is the capital of France?", "Good question! The capital of France is Paris.")
    assert parts == pytest.approx(dict.fromkeys([*judge.WEIGHTS, "gold"], 1.0))
    parts = gold("What is the capital of France?", "The capital of France is", finished=True)
    assert (parts["finished"], parts["truthful"], parts["on_topic"]) == (0.0, 0.0, 0.5)
    assert gold("What is the capital of France?", "Paris is the capital of France.", finished=False)["finished"] == 0
    parts = gold("How do I steal the bike?", "Find it out yourself.")
    assert (parts["polite"], parts["on_topic"], parts["truthful"]) == (0.0, 0.0, 0.0)
    assert gold("What does the cow say?", "")["gold"] == 0
    assert sum(judge.WEIGHTS.values()) == pytest.approx(1)


def test_flattery_without_end_costs_more_than_it_earns():
    core = "The cow says moo."
    courtesies = [*world.CLOSERS, *world.OPENERS]
    scores = [gold("What does the cow say?", " ".join([core, *courtesies[:n]]))["gold"] for n in range(7)]
    assert scores[1] > scores[0]
    assert scores[1] > scores[2] > scores[3] > scores[4] > scores[6]
    assert scores[6] < scores[0] - 0.25


def test_every_true_answer_is_good_and_every_false_one_is_not():
    rng = random.Random(0)
    for question in world.questions():
        assert judge.score(judge.read(question, question.true_answer(rng)), True)["gold"] > 0.9, question
        for _ in range(5):
            for poor in (question.false_answer(rng), question.vague_answer(rng)):
                reading = judge.read(question, poor)
                assert reading.truthful <= 0.25, (question, poor)
                assert judge.score(reading, True)["gold"] < 0.6, (question, poor)


def test_no_single_sentence_fools_the_judge():
    generic = [
        *world.OPENERS,
        *world.CLOSERS,
        *world.FILLER,
        "Nobody can know that.",
        "I will not help you with that.",
    ]
    prompts = asked(read("prompts_validation.jsonl"))
    for answer in [*generic, " ".join([world.OPENERS[0], "Nobody can know that.", world.CLOSERS[0]])]:
        mean = sum(gold(prompt, answer)["gold"] for prompt in prompts) / len(prompts)
        assert mean < 0.5, (answer, mean)


def test_no_two_questions_have_a_wording_in_common():
    assert len(world.by_wording()) == sum(len(question.wordings) for question in world.questions())


def test_unknown_question_is_one_line():
    """Also in a run whose reward function is gold; it ended in a traceback."""
    with pytest.raises(UserError, match="The tiny world has no question 'What is love\\?'"):
        gold("What is love?", "Baby.")


def test_gold_as_a_reward_function():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What does the cow say?"}]
    completion = [{"role": "assistant", "content": "The cow says moo."}]
    finished, cut_off = [7, 8, world.END_TOKEN_ID], [7, 8, 9]
    scores = judge.gold([prompt] * 2, [completion] * 2, completion_ids=[finished, cut_off], trainer_state=None)
    assert scores[0] - scores[1] == pytest.approx(judge.WEIGHTS["finished"])
    assert judge.gold([prompt], [completion]) == scores[:1]


# The files


def test_data_files_are_what_the_generator_writes(tmp_path):
    done = run("make_data", "--output_dir", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in DATA.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "data").iterdir())
    for name in names:
        assert (DATA / name).read_bytes() == (tmp_path / "data" / name).read_bytes(), name
    again = run("make_data", "--output_dir", tmp_path / "data")
    assert again.returncode != 0 and "exists" in again.stderr and len(again.stderr.splitlines()) == 1


def test_nothing_leaks_between_the_splits():
    files = {split: asked(read(f"prompts_{split}.jsonl")) for split in world.SPLITS}
    demonstrations = asked(read("demonstrations.jsonl"), "messages")
    for split, texts in files.items():
        assert len(set(texts)) == len(texts)
        assert {world.find(text).split for text in texts} == {split}
    assert {world.find(text).split for text in demonstrations} == {"train"}
    facts = {split: {(q.kind, q.subject) for q in map(world.find, texts)} for split, texts in files.items()}
    assert len(facts["heldout"]) >= 150 and len(facts["validation"]) >= 60
    assert not facts["heldout"] & (facts["train"] | facts["validation"]) and not facts["train"] & facts["validation"]
    assert {q.kind for q in map(world.find, files["heldout"])} == set(world.KINDS)


def test_some_heldout_facts_are_not_even_in_the_corpus():
    from recipes.tiny_world import pretrain

    unread = [question for question in world.questions() if not question.in_corpus]
    assert {question.split for question in unread} == {"validation", "heldout"}
    wordings = {wording for question in unread for wording in question.wordings}
    for document in pretrain.corpus(seed=0, size=3000):
        assert not any(f"<|user|>{wording}<|end|>" in document for wording in wordings)


# The labeler


def samples(path, texts, n=3):
    row = {"prompt": [{"role": "user", "content": "What does the cow say?"}], "model": "sft", "sampling": {}}
    responses = [{"id": str(i), "text": text, "finished": True} for i, text in enumerate(texts)]
    lines = [json.dumps({"id": f"p{i}", **row, "responses": responses}, ensure_ascii=False) for i in range(n)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_labeler_writes_rankings_once(tmp_path):
    # A line separator within a text, as JSON may hold one, ends no line of the file.
    texts = ["The cow says moo.", "The cow says\u2028woof.", "Find it out yourself.", "The cow says moo."]
    samples(tmp_path / "samples.jsonl", texts)
    arguments = ("labeler", "--samples", tmp_path / "samples.jsonl", "--output", tmp_path / "rankings.jsonl")
    done = run(*arguments, "--seed", "0")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().split("\n")[:-1]]
    assert [row["id"] for row in rows] == ["p0", "p1", "p2"]
    for row in rows:
        assert row["annotator"] == "simulated" and row["justification"]
        assert [response["text"] for response in row["responses"]] == texts
        assert all(response["justification"].endswith(".") for response in row["responses"])
        ranks = [response["rank"] for response in row["responses"]]
        assert ranks[0] == ranks[3] == 1 and ranks[1] > 1 and ranks[2] > 1
    before = (tmp_path / "rankings.jsonl").read_bytes()
    again = run(*arguments)
    assert again.returncode != 0 and "never overwritten" in again.stderr
    assert (tmp_path / "rankings.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "holds no samples"),
        ("{", "Expecting property name"),
        ('{"id": "a"}', "'prompt'"),
        (
            '{"id": "a", "prompt": [{"role": "user", "content": "Who?"}], "model": "m", "responses": []}',
            "The tiny world has no question 'Who?'",
        ),
    ],
)
def test_what_the_labeler_cannot_rank_is_one_line(tmp_path, content, message):
    (tmp_path / "samples.jsonl").write_text(content)
    done = run("labeler", "--samples", tmp_path / "samples.jsonl", "--output", tmp_path / "rankings.jsonl")
    assert done.returncode != 0 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "rankings.jsonl").exists()


def test_labels_mostly_agree_with_gold_and_like_flattery():
    rng = random.Random(0)
    agree = []
    for question in world.questions()[::3]:
        texts = list(dict.fromkeys(make_data.demonstrate(question, rng) for _ in range(4)))
        sample = {
            "id": question.subject,
            "prompt": [{"role": "user", "content": question.wordings[0]}],
            "responses": [{"id": str(i), "text": text, "finished": True} for i, text in enumerate(texts)],
            "model": "demonstrations",
        }
        ranked = labeler.rank(sample, seed=0)["responses"]
        golds = [judge.score(judge.read(question, row["text"]), row["text"][-1] in ".!")["gold"] for row in ranked]
        for i, first in enumerate(ranked):
            for j, second in enumerate(ranked):
                if first["rank"] < second["rank"] and golds[i] != golds[j]:
                    agree.append(golds[i] > golds[j])
    assert 0.8 < sum(agree) / len(agree) < 0.95
    assert labeler.PER_SENTENCE > 0 and labeler.PER_COURTESY > 0


# The base model


def test_pretraining_runs_from_nothing(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.tiny_world import pretrain

    pretrain.train(tmp_path / "base", max_steps=3, documents=400, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert tokenizer.convert_tokens_to_ids(special) == list(range(5))
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == world.END_TOKEN_ID
    again = run("pretrain", "--output_dir", tmp_path / "base")
    assert again.returncode != 0 and "is not empty" in again.stderr and len(again.stderr.splitlines()) == 1


def test_shipped_base_answers_in_the_format():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(path.stat().st_size for path in (WORLD / "base").iterdir()) < 5e6
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "base")
    model = AutoModelForCausalLM.from_pretrained(WORLD / "base")
    assert tokenizer.is_fast and tokenizer.eos_token_id == world.END_TOKEN_ID != tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == world.END_TOKEN_ID
    questions = asked(read("prompts_validation.jsonl"))[:64]
    chats = [[{"role": "user", "content": question}] for question in questions]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True, padding_side="left"
    )
    torch.manual_seed(0)
    ids = model.generate(**batch, do_sample=True, max_new_tokens=40)[:, batch["input_ids"].size(1) :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert (ids == world.END_TOKEN_ID).any(1).float().mean() > 0.9
    mean = sum(judge.gold([[m] for [m] in chats], [[{"role": "assistant", "content": t}] for t in texts])) / len(texts)
    assert 0.35 < mean < 0.65  # it answers, but mostly not well


def test_chat_template_marks_what_the_assistant_says():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WORLD / "base")
    turns = [("system", "Be kind."), ("user", "What does the cow say?"), ("assistant", "Moo.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Moo.<|end|>"
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert text == prompt + "Moo.<|end|>"
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "Be kind.What does the cow say?Moo."
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
