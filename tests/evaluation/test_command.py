"""scripts/evaluate.py on small random models: a full base, a LoRA policy, a full reward model, every judge."""

import base64
import json
import math
import re
import runpy
import shutil
import sys
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig
from urllib3 import HTTPResponse

from recipes.cli.errors import UserError
from recipes.evaluation import policies
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.llm_judge import RETRIES, LLMJudge, question
from recipes.evaluation.measure import Evaluation, judge_scores
from recipes.evaluation.policies import token_log_probs
from recipes.evaluation.report import verdict
from recipes.evaluation.rewards import RewardModel
from recipes.models.sampling import Prompt, load_generator
from scripts import evaluate
from tests import tiny_models as models
from tests.conftest import ROOT, flags, run_command

PROMPTS = 12
ATTACK = "<script>alert(1)</script>"


def length_judge(prompts, completions, completion_ids, **kwargs):
    """A judge of TRL's signature: fewer words are better."""
    assert len(prompts) == len(completions) == len(completion_ids)
    return [-len(completion[-1]["content"].split()) for completion in completions]


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint whose judge prefers more words, and sometimes fails, babbles or looks away."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.requests.append((self.path, dict(self.headers), request))
        if len(server.requests) in server.failures:
            return self.send_error(503)
        if refusal := server.refuse(request):
            return self.send_error(400, explain=refusal)
        text = request["messages"][-1]["content"]
        a, b = (re.search(rf"<<<RESPONSE {x}>>>\n(.*?)\n<<<END", text, re.S)[1].split() for x in "AB")
        fair = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "TIE"
        verdict = {"fair": fair, "first": "A", "silent": "?"}[server.judge]
        body = json.dumps({"choices": [{"message": {"content": f"I think so. [[{verdict}]]"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.requests, server.failures, server.judge, server.refuse = [], set(), "fair", lambda request: ""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SimpleNamespace(server=server, url=f"http://127.0.0.1:{server.server_address[1]}/v1")
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models and data; `ppo` is a run with three checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    models.causal_lm(sharpness=2.0).save_pretrained(folder / "base")
    models.word_tokenizer().save_pretrained(folder / "base")
    for name, std in (("ppo/checkpoint-2", 0.1), ("ppo/checkpoint-4", 0.15), ("ppo/checkpoint-6", 0.2), ("ppo", 0.2)):
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder / "base"),
            LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        torch.manual_seed(0)
        for parameter, weight in adapted.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(weight, std=std)
        adapted.save_pretrained(folder / name)
    models.reward_model().save_pretrained(folder / "reward")
    models.word_tokenizer().save_pretrained(folder / "reward")
    (folder / "reward" / "reward_statistics.json").write_text('{"mean": 0.5, "std": 2.0, "n": 9, "source": "x"}')
    rows = [{"prompt": messages} for messages in models.prompts(PROMPTS, length=3)]
    rows[0]["prompt"] = [{"role": "user", "content": f"w1 {ATTACK} $x_1$"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rankings = [
        {
            "prompt": f"w{number} w3",
            "responses": [{"text": f"w{number} w{rank} " * rank, "rank": rank} for rank in (1, 2, 3)],
            "annotator": f"labeler {number % 2}",
        }
        for number in range(6)
    ]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rankings))
    return folder


def command(folders, output, *more):
    return [
        "python", "scripts/evaluate.py", "--policies", f"base={folders}/base", f"ppo={folders}/ppo",
        "--reward_model_name_or_path", f"{folders}/reward", "--dataset_name", f"{folders}/prompts.jsonl",
        "--output_dir", output, "--max_completion_length", "6", "--best_of_n", "8", "--num_generations", "3",
        "--curve_generations", "3", "--temperatures", "0.5", "--checkpoints", f"ppo={folders}/ppo",
        "--generation_batch_size", "32", *more,
    ]  # fmt: skip


class Page(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def is_estimate(value) -> bool:
    low, high = value["ci95"]
    return low - 1e-9 <= value["mean"] <= high + 1e-9


def judged(**intervals) -> dict:
    """A report in which `ppo` differs from `sft` by these intervals, by judge."""
    difference = {name: {"mean": (low + high) / 2, "ci95": [low, high]} for name, (low, high) in intervals.items()}
    judges = [name for name in intervals if name != "reward"]
    policies = {"sft": difference, "ppo": {"difference": difference}}
    return {"headline": "ppo", "reference": "sft", "judges": judges, "n_prompts": 100, "policies": policies}


def test_the_first_sentence_says_which_is_better_and_whether_that_could_be_chance():
    assert verdict(judged(reward=(-0.15, 0.05))) == (
        "By the reward model, ppo scores 0.05 below sft; the difference could be chance "
        "(95 % interval -0.15 to +0.05)."
    )
    clear = verdict(judged(reward=(0.5, 0.7), gold=(0.1, 0.2)))
    assert clear.startswith("By gold, ppo scores 0.15 above sft (95 %") and "chance" not in clear
    assert "over-optimisation" not in clear
    assert verdict(judged(reward=(-1e-17, -1e-17))) == (
        "By the reward model, ppo scores the same as sft (95 % interval +0.00 to +0.00)."
    )
    assert "over-optimisation" in verdict(judged(reward=(0.5, 0.7), gold=(-0.2, -0.1)))
    assert verdict(judged(reward=(0, 0)) | {"headline": "sft"}) == "Only sft was measured."


@pytest.mark.slow
def test_everything_at_once_then_again_from_what_is_there(folders, endpoint, tmp_path, monkeypatch, capfd):
    output, task = tmp_path / "evaluation", tmp_path / "task.jsonl"
    extra = [
        "--judges", "tests.evaluation.test_command.length_judge", "--preference_datasets", folders / "rankings.jsonl",
        "--llm_judge_model", "judge-1", "--llm_judge_base_url", endpoint.url, "--report_to", "wandb",
    ]  # fmt: skip
    environment = {"OPENAI_API_KEY": "sk-very-secret", "PYTHONPATH": ".", "WANDB_SILENT": "true"}
    run_command(command(folders, output, *extra, "--ranking_task", task), timeout=400, env=environment)

    report = json.loads((output / "report.json").read_text())
    assert list(report["policies"]) == ["base", "ppo"] and report["reference"] == "base"
    for name, values in report["policies"].items():
        for figure in ("reward", "length_judge", "length", "entropy", "truncated"):
            assert is_estimate(values[figure]), figure
        assert is_estimate(values["kl"]["k1"]) and is_estimate(values["kl"]["k3"])
        assert 0 < values["distinct_2"] <= 1 and 1 <= values["length"]["mean"] <= 6
        assert values["n"] == PROMPTS * (8 if name == "base" else 3)
    assert report["policies"]["base"]["kl"]["k1"]["mean"] == 0 and report["policies"]["ppo"]["kl"]["k3"]["mean"] > 0
    shown = set(report["policies"]["ppo"])
    assert {"share_of_gain", "gain_over_best_of_n"} <= shown and "share_of_gain" not in report["policies"]["base"]
    front = report["frontier"]
    assert [row["n"] for row in front["best_of_n"]] == [1, 2, 4, 8]
    assert [row["kl"] for row in front["best_of_n"]] == pytest.approx(
        [math.log(n) - (n - 1) / n for n in (1, 2, 4, 8)]
    )
    rewards = [row["reward"] for row in front["best_of_n"]]
    assert rewards == sorted(rewards) and rewards[0] == pytest.approx(report["policies"]["base"]["reward"]["mean"])
    assert all({"beta", "kl", "reward", "se", "effective_samples"} <= set(row) for row in front["optimal"])
    assert [row["step"] for row in front["checkpoints"]] == [2, 4, 6]
    low, high = report["policies"]["ppo"]["kl"]["k1"]["ci95"]
    assert 0 < front["checkpoints"][2]["kl"] < high + (high - low)  # of the same weights
    assert [row["temperature"] for row in front["sharpening"]] == [0.5]
    assert front["share_of_gain"] == report["policies"]["ppo"]["share_of_gain"]

    assert set(report["over_optimization"]["fits"]) == {"reward", "length_judge"}

    rates = {row["judge"]: row for row in report["win_rates"]}
    assert set(rates) == {"reward_model", "length_judge", "judge-1"}
    for row in rates.values():
        assert row["win"] + row["tie"] + row["loss"] == pytest.approx(1)
        assert row["ci95"][0] <= row["win"] + row["tie"] / 2 <= row["ci95"][1]
    assert rates["judge-1"]["consistent"] == 1 and rates["judge-1"]["unreadable"] == 0
    quality = report["reward_model"]
    assert quality["n_pairs"] == 18 and quality["longer_wins_baseline"] == 0 and is_estimate(quality["accuracy"])
    assert set(quality["labelers"]) == {"labeler 0", "labeler 1"}
    changes = [row["change"] for row in report["samples"]]
    assert changes == sorted(changes) and len(changes) == PROMPTS

    page = Page((output / "report.html").read_text())
    change = report["policies"]["ppo"]["difference"]
    assert is_estimate(change["reward"]) and change["length_judge"]["mean"] == pytest.approx(
        report["policies"]["ppo"]["length_judge"]["mean"] - report["policies"]["base"]["length_judge"]["mean"]
    )
    assert verdict(report) in "".join(page.text) and "#000000" not in (output / "report.html").read_text()
    assert not {"script", "img", "link", "iframe"} & set(page.tags) and page.tags.count("svg") == 3
    assert ATTACK in "".join(page.text)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href"))
    for name in ("reward_kl", "over_optimization", "reward_model"):
        assert (output / f"{name}.png").read_bytes().startswith(base64.b64decode("iVBORw0KGgo="))
    assert len(task.read_text().splitlines()) <= PROMPTS
    (logged,) = output.glob("wandb/offline-run-*/run-*.wandb")
    assert logged.stat().st_size > 1000 and list(logged.parent.glob("files/media/table/eval/*.json"))
    for path in output.rglob("*"):
        assert path.is_dir() or b"sk-very-secret" not in path.read_bytes(), path

    asked, before = len(endpoint.server.requests), (output / "report.json").read_text()
    assert asked == 2 * sum(row["n"] for row in [rates["judge-1"]]) - 2 * count_equal(report, output)
    main(command(folders, output, *extra[:6]), monkeypatch)
    assert len(endpoint.server.requests) == asked and "samples-" not in capfd.readouterr().out  # nothing is made twice
    assert (output / "report.json").read_text() == before
    with pytest.raises(UserError, match="was made with another seed"):
        main(command(folders, output, "--seed", "1"), monkeypatch)


def main(arguments, monkeypatch) -> None:
    """The same command in this process."""
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments[1:]])
    runpy.run_path(str(ROOT / arguments[1]), run_name="command")["main"]()


def count_equal(report, output) -> int:
    """Prompts to which both policies gave the same first response: no judge is asked about them."""
    parts = [json.loads((output / "parts" / f"samples-{name}.json").read_text()) for name in report["policies"]]
    a, b = (pd.DataFrame(part["values"]).groupby("prompt")["text"].first() for part in parts)
    return (a == b).sum()


@pytest.mark.parametrize(("temperature", "at_once"), [(1.0, 2**28), (0.5, 64 * 20)])
def test_log_probs_are_those_of_each_response_alone(folders, monkeypatch, temperature, at_once):
    """Also where not even three rows' logits may be there at once."""
    monkeypatch.setattr(policies, "LOGITS_AT_ONCE", at_once)
    model, tokenizer = load_generator(ModelConfig(model_name_or_path=str(folders / "ppo")))
    model.get_base_model().register_forward_hook(lambda *args: sizes.append(args[-1].logits.numel()))
    sizes: list[int] = []
    pairs = [(models.prompts(1, length, seed=length)[0], [7, 8, 9, 1][: length % 4 + 1]) for length in range(1, 8)]
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), folders / "ppo").eval()
    for (prompt, ids), (logps, entropy) in zip(
        pairs, token_log_probs(model, tokenizer, pairs, temperature, batch_size=3), strict=True
    ):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = alone(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1] / temperature
        expected = logits.log_softmax(-1)
        assert logps == pytest.approx(expected[range(len(ids)), ids].tolist(), abs=1e-4)
        assert entropy == pytest.approx(-(expected.exp() * expected).sum(-1).mean().item(), abs=1e-4)
    assert max(sizes) <= at_once


def test_log_probs_of_a_model_that_always_gives_all_logits(folders, monkeypatch):
    """The code of a model may know no `logits_to_keep`, as that of xLSTM or of some on the Hub."""
    model, tokenizer = load_generator(ModelConfig(model_name_or_path=str(folders / "base")))
    pairs = [(models.prompts(1, length, seed=length)[0], [7, 8, 9, 1][: length % 4 + 1]) for length in range(1, 6)]
    expected = token_log_probs(model, tokenizer, pairs, 1.0, batch_size=3)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask: forward(input_ids, attention_mask))
    for (logps, entropy), found in zip(expected, token_log_probs(model, tokenizer, pairs, 1.0, 3), strict=True):
        assert found[0] == pytest.approx(logps, abs=1e-4) and found[1] == pytest.approx(entropy, abs=1e-4)


def brief(completions, **kwargs):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("policy", "judge", "message"),
    [
        ("none", "reward", "there is no folder .*none"),
        ("reward", "reward", "is a reward model"),
        ("short", "reward", "p3.* than the 2 positions"),
        ("base", "short_reward", "p3.* than the 2 positions"),
        ("base", "base", "base has no trained score head"),
    ],
)
def test_what_cannot_be_measured_is_named_before_anything_is_sampled(folders, tmp_path, policy, judge, message):
    for name, own in (("short", "base"), ("short_reward", "reward")):
        shutil.copytree(folders / own, folders / name, dirs_exist_ok=True)
        config = json.loads((folders / name / "config.json").read_text())
        (folders / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2}))
    args = EvaluationArguments(
        policies=[f"base={folders}/base", f"ppo={folders}/{policy}"], reward_model_name_or_path=f"{folders}/{judge}",
        max_completion_length=1, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    prompts = [Prompt("p3", CASES[0], "prompts.jsonl:p3")]
    reward = RewardModel(args, ModelConfig())
    evaluation = Evaluation(args, ModelConfig(), prompts, reward)
    with pytest.raises(UserError, match=message):
        evaluation.measure()
    assert not any(evaluation.parts.folder.iterdir())


def test_policies_are_sampled_independently(folders, tmp_path):
    """With the same random numbers the n-th responses of like policies were the same, and tied or won together."""
    args = EvaluationArguments(
        policies=[f"{name}={folders}/base" for name in "abc"], reward_model_name_or_path=f"{folders}/reward",
        max_completion_length=6, output_dir=str(tmp_path), best_of_n=2, num_generations=2, temperatures=[],
    )  # fmt: skip
    prompts = [Prompt("p", messages, "p") for messages in models.prompts(8, length=3)]
    found = Evaluation(args, ModelConfig(dtype="float32"), prompts, RewardModel(args, ModelConfig())).measure()
    texts = [tuple(one.responses["text"]) for one in found.values()]
    assert len(set(texts)) == 3


def test_a_tracker_that_cannot_work_is_refused_first(folders, tmp_path, monkeypatch):
    """It was found out once everything had been measured."""
    own = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--report_to wandb: there is no W&B key"):
        main(command(folders, tmp_path / "out", "--report_to", "wandb"), monkeypatch)
    assert not (tmp_path / "out").exists()


def scalar_judge(**kwargs):
    return 1.0


def nan_judge(completions, **kwargs):
    return [math.nan for _ in completions]


def none_judge(completions, **kwargs):
    return [None for _ in completions]


def responses(*texts: str) -> pd.DataFrame:
    """One to each prompt."""
    return pd.DataFrame({"prompt": range(len(texts)), "text": texts, "token_ids": [[1]] * len(texts)})


@pytest.mark.parametrize("judge", ["scalar_judge", "nan_judge", "none_judge"])
def test_a_judge_that_gives_no_numbers_is_one_line(judge):
    with pytest.raises(UserError, match=rf"--judges {__name__}.{judge}.* numbers?"):
        judge_scores(f"{__name__}.{judge}", CASES[:2], responses("w1", "w1"))


async def waiting_judge(completions, **kwargs):
    return [len(completion[0]["content"]) for completion in completions]


def test_a_judge_may_be_asynchronous_and_return_integers():
    """TRL's reward functions may."""
    assert judge_scores(f"{__name__}.waiting_judge", CASES[:2], responses("w1", "w1 w2")).tolist() == [2.0, 5.0]


CASES = [[{"role": "user", "content": f"q{number}"}] for number in range(4)]
LONG, SHORT = ["a a a"] * 3 + ["a"], ["b"] * 2 + ["b b b", "a"]  # wins, wins, ties, is the same


def test_an_llm_judges_both_orders(endpoint, tmp_path):
    judge = LLMJudge("m", endpoint.url, tmp_path / "verdicts.jsonl")
    shares, behaviour = judge.compare(CASES, LONG, SHORT, "judging")
    assert shares.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert behaviour == {"consistent": 1.0, "first_preferred": 0.5, "unreadable": 0}
    assert len(endpoint.server.requests) == 6 and endpoint.server.requests[0][0] == "/v1/chat/completions"
    LLMJudge("m", endpoint.url, tmp_path / "verdicts.jsonl").compare(CASES, LONG, SHORT, "judging")
    assert len(endpoint.server.requests) == 6  # remembered


def test_verdicts_are_remembered_for_each_model(endpoint, tmp_path):
    """A second judge got the first one's verdicts under its own name, without being asked."""
    memory = tmp_path / "verdicts.jsonl"
    LLMJudge("m", endpoint.url, memory).compare(CASES, LONG, SHORT, "judging")
    endpoint.server.judge = "first"
    shares, _ = LLMJudge("other", endpoint.url, memory).compare(CASES, LONG, SHORT, "judging")
    assert len(endpoint.server.requests) == 12 and shares[:, 1].tolist() == [1, 1, 1, 1]


def test_a_verdict_that_was_cut_is_asked_for_again(endpoint, tmp_path):
    """The next one was appended to its rest, and the file could not be read from then on."""
    memory = tmp_path / "verdicts.jsonl"
    LLMJudge("m", endpoint.url, memory).compare(CASES, LONG, SHORT, "judging")
    memory.write_bytes(memory.read_bytes()[:-5])
    for _ in range(2):
        shares, _ = LLMJudge("m", endpoint.url, memory).compare(CASES, LONG, SHORT, "judging")
        assert shares[0].tolist() == [1, 0, 0] and len(endpoint.server.requests) == 7


def test_a_judge_that_likes_what_comes_first_is_seen_and_decides_nothing(endpoint, tmp_path):
    endpoint.server.judge = "first"
    judge = LLMJudge("m", endpoint.url, tmp_path / "verdicts.jsonl")
    shares, behaviour = judge.compare(CASES, LONG, SHORT, "judging")
    assert shares[:, 1].tolist() == [1, 1, 1, 1]
    assert behaviour == {"consistent": 0.0, "first_preferred": 1.0, "unreadable": 0}


def test_an_unreadable_verdict_counts_for_nobody(endpoint, tmp_path):
    endpoint.server.judge = "silent"
    shares, behaviour = LLMJudge("m", endpoint.url, tmp_path / "v.jsonl").compare(CASES, LONG, SHORT, "judging")
    assert np.isnan(shares[:3]).all() and behaviour["unreadable"] == 6 and behaviour["consistent"] is None


def test_an_overloaded_endpoint_is_asked_again_and_a_wrong_one_is_named(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    endpoint.server.failures = {1, 3}
    shares, _ = LLMJudge("m", endpoint.url, tmp_path / "v.jsonl").compare(CASES, LONG, SHORT, "judging")
    assert shares[0].tolist() == [1, 0, 0] and len(endpoint.server.requests) == 8
    with pytest.raises(UserError, match="The judge m at http://127.0.0.1:1/v1/chat/completions does not answer"):
        LLMJudge("m", "http://127.0.0.1:1/v1", tmp_path / "w.jsonl").compare(CASES, LONG, SHORT, "judging")


def test_a_judge_waits_no_longer_than_a_minute_and_never_shows_its_key(endpoint, tmp_path, monkeypatch):
    """An endpoint may ask for a wait until tomorrow, and a key from a file may end in a line break."""
    told = [HTTPResponse(headers={"Retry-After": wait}) for wait in ("7", "86400", "1.5")]
    assert [RETRIES.get_retry_after(response) for response in told] == [7, 60, 0]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")
    LLMJudge("m", endpoint.url, tmp_path / "verdicts.jsonl").compare(CASES, LONG, SHORT, "judging")
    assert endpoint.server.requests[0][1]["Authorization"] == "Bearer sk-secret"


def test_what_an_endpoint_refuses(endpoint, tmp_path, monkeypatch):
    """Models that reason take no temperature, and a filter refuses some prompts: both ended the evaluation without
    the reason, and the answers that were on their way then were paid for twice."""
    endpoint.server.refuse = lambda request: "unsupported temperature" if "temperature" in request else ""
    shares, _ = LLMJudge("m", endpoint.url, tmp_path / "a.jsonl").compare(CASES, LONG, SHORT, "judging")
    assert shares[:2].tolist() == [[1, 0, 0], [1, 0, 0]]
    endpoint.server.refuse = lambda request: "content_filter" if "user: q1" in str(request) else ""
    shares, found = LLMJudge("m", endpoint.url, tmp_path / "b.jsonl").compare(CASES, LONG, SHORT, "judging")
    assert shares[0].tolist() == [1, 0, 0] and np.isnan(shares[1]).all() and found["unreadable"] == 2

    def refuse(request) -> str:
        first = question(CASES[0], LONG[0], SHORT[0]) == request["messages"]
        return "no such model for sk-secret" if first else time.sleep(0.2) or ""

    for code, refusal in ((200, '{"error": "no credits"}'), (401, "no such key")):
        response = SimpleNamespace(status_code=code, ok=code == 200, reason="why", text=refusal, json=dict)
        judge = LLMJudge("m", endpoint.url, tmp_path / "d.jsonl")
        judge.session = SimpleNamespace(post=lambda *_, response=response, **__: response)
        with pytest.raises(UserError, match=rf"does not answer: {code} why: .*no (credits|such key)"):
            judge.answer([])
    endpoint.server.refuse = refuse
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    before = len(endpoint.server.requests)
    with pytest.raises(UserError, match="does not answer: 400 .*no such model for") as error:
        LLMJudge("m", endpoint.url, tmp_path / "c.jsonl").compare(CASES, LONG, SHORT, "judging")
    assert "sk-secret" not in str(error.value)
    answered = len(endpoint.server.requests) - before - 1
    assert len(LLMJudge("m", endpoint.url, tmp_path / "c.jsonl").verdicts) == answered > 1


@pytest.mark.parametrize("name", ["llm_judge_model", "rankings", "ranking_task"])
def test_one_policy_cannot_be_compared(tmp_path, monkeypatch, name):
    """It was measured, and the judge was left out without a word."""
    given = {"policies": "sft=x", "reward_model_name_or_path": "y", "dataset_name": "z", "output_dir": tmp_path}
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags(**given, **{name: tmp_path / "new"})])
    with pytest.raises(UserError, match=f"--{name} compares policies, and --policies names one"):
        evaluate.main()


def test_a_ranking_task_that_exists_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match="--ranking_task .* exists: choose another file"):
        evaluate.JudgeArguments(ranking_task=str(tmp_path))
