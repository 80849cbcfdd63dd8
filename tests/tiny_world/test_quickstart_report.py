"""The quickstart's own commands, shortened to a few steps, then its evaluation and its report."""

import importlib
import json
import re
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from recipes.models.sampling import Prompt
from recipes.tiny_world import evaluate, judge, labeler, quickstart
from recipes.tiny_world.report import NAMES, table, write_report

POLICIES = ("base", "sft", "ppo", "ppo_no_kl")
SHORT = {
    "sft": ["--max_steps", "3"],
    "reward": ["--max_steps", "3", "--per_device_train_batch_size", "4"],
    "ppo": ["--max_steps", "4", "--per_device_train_batch_size", "8"],
    "ppo_no_kl": ["--max_steps", "4", "--per_device_train_batch_size", "8"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A quickstart folder; every stage ran its printed command, in this process, with fewer steps and prompts."""
    folder, data = tmp_path_factory.mktemp("quickstart"), tmp_path_factory.mktemp("data")
    for split in ("train", "validation", "heldout"):
        lines = (evaluate.DATA / f"prompts_{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"prompts_{split}.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(quickstart.ROOT)
        patch.setattr(evaluate, "DATA", data)
        for stage in (stage for group in quickstart.PIPELINE for stage in group):
            command = stage.command(str(folder), seed=3)
            command = command[5:] if command[0] == "accelerate" else command[1:]
            patch.setattr(sys, "argv", command + SHORT.get(stage.name, []))
            if stage.name == "sample":
                sys.argv += ["--dataset_name", str(data / "prompts_train.jsonl")]
            if command[0] == "-m":
                sys.argv.pop(0)
                importlib.import_module(command[1]).main()
            else:
                recipe = runpy.run_path(command[0], run_name="recipe")
                recipe["main"](*parse(recipe["ARGUMENTS"]))
            assert (folder / stage.output).exists()
    return folder


@pytest.fixture(scope="module")
def report(finished) -> dict:
    write_report(finished, 3, {"sft": 1.26, "ppo": 2.0, "ppo_no_kl": 3.0, "total": 4.26})
    return json.loads((finished / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_report_keeps_its_contract(report):
    assert set(report) == {"seed", "seconds", "policies", "sft_low_temperature", "reward_model", "samples"}
    assert report["seed"] == 3 and report["seconds"] == {"sft": 1.3, "ppo": 2.0, "ppo_no_kl": 3.0, "total": 4.3}
    assert tuple(report["policies"]) == POLICIES
    parts = set(judge.WEIGHTS)
    for values in report["policies"].values():
        assert set(values) == parts | {"gold", "proxy_reward", "kl", "length", "gold_greedy", "n"}
        assert values["n"] == 24 * 4 and 0 < values["length"] <= 40
        assert values["gold"] == pytest.approx(sum(weight * values[part] for part, weight in judge.WEIGHTS.items()))
    assert report["policies"]["sft"]["kl"] == 0 != report["policies"]["base"]["kl"]  # an estimate may be below 0
    assert set(report["sft_low_temperature"]) == {"temperature", "gold", "kl"}
    assert report["sft_low_temperature"]["temperature"] in evaluate.TEMPERATURES
    keys = {"accuracy", "accuracy_on_gold_order", "longer_wins_baseline", "n_pairs"}
    assert set(report["reward_model"]) == keys
    for sample in report["samples"]:
        assert set(sample) == {"prompt", *POLICIES} and all(isinstance(text, str) for text in sample.values())


def part(finished, name: str) -> list:
    """What the evaluation kept for the held-out prompts, of each response."""
    return json.loads((finished / "measured" / "heldout" / "parts" / f"{name}.json").read_text())["values"]


def by_prompt(values: list) -> list[list]:
    """Four responses to each prompt."""
    return [values[start : start + 4] for start in range(0, len(values), 4)]


def questions(count: int) -> list[str]:
    lines = (evaluate.DATA / "prompts_heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["prompt"][-1]["content"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*POLICIES, "sft sharpened"])
def test_log_probs_are_those_of_the_saved_adapter_alone(finished, report, tiny_base, name):
    name, _, sharpened = name.partition(" ")
    temperature = report["sft_low_temperature"]["temperature"] if sharpened else 1.0
    known = f"{name}@T{temperature:g}" if sharpened else name
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def load(policy: str):
        model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
        return model if policy == "base" else PeftModel.from_pretrained(model, finished / policy).eval()

    models = {policy: load(policy) for policy in {name, "sft"}}

    def alone(policy: str, question: str, ids: list[int], temperature: float) -> list[float]:
        chat = [{"role": "user", "content": question}]
        start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            steps = (models[policy](torch.tensor([start + ids])).logits[0] / temperature).log_softmax(-1)[
                len(start) - 1 : -1
            ]
        return steps[range(len(steps)), ids].tolist()

    samples, reference = part(finished, f"samples-{known}"), part(finished, f"reference-{known}")
    for row, question in enumerate(questions(5)):
        sample, ids = samples[4 * row], samples[4 * row]["token_ids"]
        assert sum(sample["logps"]) == pytest.approx(sum(alone(name, question, ids, temperature)), abs=1e-3)
        assert sum(reference[4 * row]) == pytest.approx(sum(alone("sft", question, ids, 1.0)), abs=1e-3)


@pytest.mark.slow
def test_the_figures_are_those_of_the_samples(finished, report):
    for name, values in report["policies"].items():
        gold = [
            judge.judge(question, sample["text"], sample["finished"])["gold"]
            for question, sample in zip(questions(24), part(finished, f"samples-{name}@T0"), strict=True)
        ]
        assert values["gold_greedy"] == pytest.approx(sum(gold) / 24)
        assert part(finished, f"reference-{name}@T0") is None  # a greedy policy has no finite KL
    right = longer = pairs = 0
    samples, rewards = (by_prompt(part(finished, f"{kind}-sft")) for kind in ("samples", "rewards"))
    rows = zip(questions(24), samples, rewards, strict=True)
    for number, (question, group, rewards) in enumerate(rows):
        responses = [{"id": str(i), **sample} for i, sample in enumerate(group)]
        line = {"id": f"heldout-{number}", "prompt": [{"role": "user", "content": question}], "model": "sft"}
        ranks = [row["rank"] for row in labeler.rank(line | {"responses": responses}, 3)["responses"]]
        for i, j in ((i, j) for i in range(4) for j in range(4) if ranks[i] < ranks[j]):
            lengths = [len(group[k]["token_ids"]) for k in (i, j)]
            pairs += 1
            right += 1 if rewards[i] > rewards[j] else 0.5 * (rewards[i] == rewards[j])
            longer += 1 if lengths[0] > lengths[1] else 0.5 * (lengths[0] == lengths[1])
    model = report["reward_model"]
    assert model["n_pairs"] == pairs > 24
    assert (model["accuracy"], model["longer_wins_baseline"]) == pytest.approx((right / pairs, longer / pairs))


def test_reward_model_accuracy_of_known_scores():
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [Prompt(str(number), messages, "here") for number in range(3)]
    texts = ["Paris.", "The capital of France is Paris.", "You are stupid.", "The capital of France is Rome, I think."]
    responses = pd.DataFrame(
        {"prompt": [0] * 4 + [1] * 4 + [2] * 4, "text": [*texts, *texts[::-1], *texts[:1] * 4], "truncated": False}
    )
    gold = {text: judge.judge(messages[0]["content"], text, True)["gold"] for text in texts}
    responses = responses.assign(length=responses["text"].map(len), gold=responses["text"].map(gold))

    def accuracy(score) -> dict:
        return evaluate.reward_model_accuracy(responses.assign(reward=responses["text"].map(score)), prompts, seed=0)

    by_gold = accuracy(gold.get)
    assert by_gold["accuracy_on_gold_order"] == 1 and by_gold["accuracy"] > 0.8
    assert by_gold["n_pairs"] <= 12  # equal texts tie, and a tie is no pair
    by_length = accuracy(len)
    assert by_length["accuracy"] == by_length["longer_wins_baseline"] == by_gold["longer_wins_baseline"]
    assert accuracy(lambda text: -gold[text])["accuracy_on_gold_order"] == 0


def test_the_parts_of_gold_are_judges():
    prompt, answer = (
        [{"role": "user", "content": "What does the cow say?"}],
        "What a stupid question. The cow says moo.",
    )
    completion, ids = [{"role": "assistant", "content": answer}], [5, 6, 1]
    parts = judge.judge(prompt[0]["content"], answer, True)
    assert 0 == parts["polite"] < parts["gold"] < parts["truthful"] == 1
    for name in judge.REWARD_FUNCTIONS:
        function = getattr(judge, name)
        assert function.__name__ == name  # what TRL logs it as
        assert function([prompt], [completion], [ids]) == [parts[name]]
    assert judge.finished([prompt], [completion], [ids[:-1]]) == [0]


class Tags(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.slow
def test_the_page_stands_alone_and_escapes_what_models_say(finished, report, tmp_path):
    for run in ("ppo", "ppo_no_kl"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "trainer_state.json").write_bytes((finished / run / "trainer_state.json").read_bytes())
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    samples = [report["samples"][0] | {"ppo": attack}]
    (tmp_path / "evaluation.json").write_text(json.dumps(report | {"samples": samples}))
    write_report(tmp_path, 3, {"total": 1.0})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.tags.count("svg") == 2
    assert not {"script", "img", "link", "iframe", "object"} & set(tags.tags)
    assert attack in "".join(tags.text)
    references = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in references)
    assert not re.search(r"url\((?!#)|@import", page)
    assert all(name in page for name in NAMES.values())


@pytest.mark.slow
def test_table(report):
    lines = table(report).splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == list(NAMES.values())
    assert (
        f"{report['policies']['ppo']['gold']:.2f}" in lines[3] and f"{report['policies']['ppo']['kl']:.2f}" in lines[3]
    )


@pytest.mark.slow
def test_a_finished_quickstart_only_reports_again(finished, capsys):
    names = {stage.name: stage.command(str(finished), 3) for group in quickstart.PIPELINE for stage in group}
    state = {"seed": 3, "seconds": dict.fromkeys(names, 1.0), "commands": names}
    (finished / "quickstart.json").write_text(json.dumps(state))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert quickstart.main(["--output_dir", str(finished), "--seed", "3"]) == 0
    output = capsys.readouterr().out
    seconds = json.loads((finished / "report.json").read_text(encoding="utf-8"))["seconds"]
    assert seconds["total"] == len(names) - 1  # the two PPO runs share their time
    assert output.count("finished before") == len(names) and "$ " not in output
    assert output.splitlines()[-1] == quickstart.REAL_MODEL
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before

    assert quickstart.main(["--output_dir", str(finished), "--seed", "4"]) == 1
    assert "seed 3" in capsys.readouterr().err
    state["commands"]["ppo"] = [*state["commands"]["ppo"], "--kl_coef", "9"]
    (finished / "quickstart.json").write_text(json.dumps(state))
    assert quickstart.main(["--output_dir", str(finished), "--seed", "3"]) == 1
    assert "ppo" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert quickstart.main(["--output_dir", str(tmp_path)]) == 1
    assert "is not empty and holds no quickstart" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_result_that_was_removed_is_not_made_again_beside_what_was_made_from_it(tmp_path):
    """PPO was trained anew, by an edited YAML, and the report showed the old evaluation."""
    stages = [quickstart.Stage(name, name, "touch {folder}/{output}", name) for name in ("ppo", "evaluation")]
    for stage in stages:
        quickstart.Quickstart(tmp_path, 0).run(stage)
    (tmp_path / "evaluation").unlink()  # nothing was made from it
    quickstart.Quickstart(tmp_path, 0).run(stages[1])
    assert (tmp_path / "evaluation").exists()
    (tmp_path / "ppo").unlink()
    with pytest.raises(UserError, match="ppo has been removed after it was made"):
        quickstart.Quickstart(tmp_path, 0).run(stages[0])


@pytest.mark.parametrize("order", [1, -1])
def test_a_stopped_run_is_waited_for_while_it_saves(tmp_path, order):
    """Its launcher ends at once; the next quickstart found the folder in use. In either order: a job that failed was
    noticed only when those before it had ended.
    """
    saves = "time.sleep(1), open('saved', 'w'), sys.exit()"
    child = (
        f"import signal, sys, time; signal.signal(15, lambda *_: ({saves})); print('up', flush=True); time.sleep(60)"
    )
    launcher = (
        f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    log = tmp_path / "log"

    def fail():
        while not (log.exists() and log.read_text()):
            time.sleep(0.05)
        raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        job = partial(quickstart.execute, [sys.executable, "-c", launcher], log, "run")
        quickstart.run_parallel([fail, job][::order], 2)
    assert (tmp_path / "saved").exists()


def test_ctrl_c_ends_the_running_commands(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.tiny_world.quickstart", "--output_dir", str(folder)],
        cwd=quickstart.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell lets what it starts in the background ignore Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def commands() -> list[psutil.Process]:
        found = []
        for other in psutil.process_iter(["cmdline"]):
            words = other.info["cmdline"] or []
            if f"{folder}/sft" in words and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
        return found

    try:
        deadline = time.monotonic() + 60
        while not commands() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert commands()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        psutil.wait_procs(commands(), timeout=20)
        assert process.returncode == 130 and "Run the same command to go on" in output
        assert not commands()
    finally:
        process.kill()
        for other in commands():
            other.kill()
