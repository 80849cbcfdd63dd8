"""The estimators of evaluation against cases whose answer is known."""

import fcntl
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from recipes.evaluation import frontier, metrics, reward_quality
from recipes.evaluation.arguments import EvaluationArguments, checkpoints
from recipes.evaluation.measure import Evaluation, Measured, same_for_same
from recipes.evaluation.parts import Parts, identity
from recipes.evaluation.people import people_outcomes, read_people, write_ranking_task
from recipes.evaluation.policies import PolicySpec
from recipes.evaluation.report import about_reward_model, table, verdict, write_report
from recipes.evaluation.rewards import read_pairs
from recipes.evaluation.summary import Curves, over_optimization, summarise
from recipes.formatting import FormattingArguments, RowArguments
from recipes.labelling.tasks import read_tasks
from recipes.models.sampling import LoadingArguments
from scripts.evaluate import ARGUMENTS as ARGUMENTS_OF_COMMAND
from scripts.evaluate import EvaluationPrompts, JudgeArguments, other_win_rates, read_prompts
from tests.tiny_models import word_tokenizer

RNG = np.random.default_rng


def test_an_interval_covers_the_mean_of_clustered_values():
    """Prompts differ more than responses to one prompt: an interval over single responses would be far too narrow."""
    hits = narrow = 0
    for seed in range(200):
        rng = RNG(seed)
        values = rng.normal(0, 1, (60, 1)) + rng.normal(0, 0.3, (60, 8))
        found = metrics.mean_interval(values)
        low, high = found["ci95"]
        assert found["mean"] == pytest.approx(values.mean())
        hits += low <= 0 <= high
        half = 1.96 * values.std() / values.size**0.5
        narrow += abs(found["mean"]) <= half
    assert 0.90 <= hits / 200 <= 0.99
    assert narrow / 200 < 0.75


def test_intervals_of_ratios_keep_groups_together():
    groups = [group for group in range(50) for _ in range(1 + group % 4)]
    right = [float(RNG(group).random() < 0.5) for group in groups]  # all pairs of a group alike
    found = metrics.ratio_interval(right, [1.0] * len(right), groups)
    assert found["mean"] == pytest.approx(np.mean(right))
    alone = metrics.ratio_interval(right, [1.0] * len(right), range(len(right)))
    width, narrower = (interval["ci95"][1] - interval["ci95"][0] for interval in (found, alone))
    assert width > 1.3 * narrower


def test_one_prompt_has_no_interval():
    """Every draw of one prompt is that prompt: an interval of width 0 would say that nothing could be chance."""
    assert metrics.mean_interval(np.array([[1.0, 3.0]])) == {"mean": 2.0, "ci95": None}
    assert metrics.win_rate(np.array([[1.0, 0.0, 0.0]]))["ci95"] is None
    assert metrics.ratio_interval([1.0, 0.0], [1.0, 1.0], ["g", "g"]) == {"mean": 0.5, "ci95": None}
    assert metrics.mean_interval(np.ones((2, 1)))["ci95"] == [1.0, 1.0], "two prompts that are alike are two"


def test_kl_of_a_two_token_policy():
    """pi = (.8, .2) against (.5, .5), one token: both estimators average to the exact KL."""
    pi, ref = np.array([0.8, 0.2]), np.array([0.5, 0.5])
    exact = float(np.sum(pi * np.log(pi / ref)))
    k1, k3 = ([which([np.log(pi[y])], [np.log(ref[y])]) for y in (0, 1)] for which in (metrics.kl_k1, metrics.kl_k3))
    assert pi @ k1 == pytest.approx(exact) and pi @ k3 == pytest.approx(exact)
    assert min(k1) < 0 <= min(k3)
    assert metrics.kl_k1([-1.0, -2.0], [-1.5, -1.0]) == pytest.approx(-0.5)
    tokens = [metrics.kl_k3([a], [b]) for a, b in ((-1.0, -1.5), (-2.0, -1.0))]
    assert metrics.kl_k3([-1.0, -2.0], [-1.5, -1.0]) == pytest.approx(sum(tokens))


def test_distinct_n():
    assert metrics.distinct_n([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert metrics.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # (1, 2) three times and (2, 1)
    assert metrics.distinct_n([[1]], 2) is None


def test_identical_policies_win_half_within_the_interval():
    inside = 0
    for seed in range(100):
        rng = RNG(seed)
        prompt = rng.normal(0, 1, (80, 1))
        a, b = (prompt + rng.normal(0, 1, (80, 4)) for _ in range(2))
        found = metrics.win_rate(metrics.outcomes(a, b))
        inside += found["ci95"][0] <= 0.5 <= found["ci95"][1]
        assert found["win"] + found["tie"] + found["loss"] == pytest.approx(1)
    assert 0.90 <= inside / 100 <= 0.99
    same = metrics.win_rate(metrics.outcomes(a, a))
    assert same["win_rate"] == 0.5 and same["tie"] == pytest.approx(0.25) and same["ci95"] == pytest.approx([0.5, 0.5])


def test_the_same_response_of_two_policies_is_a_tie():
    """Scored in another batch, it differed by 1e-6, and won or lost."""
    scores = [1.0, 0.5, 1.0, 2.0, 1.000001, 3.0, 0.999999, 1.0]
    responses = pd.DataFrame({"prompt": [0, 0, 1, 1] * 2, "text": [*"xyxzxwxx"], "token_ids": [[1]] * 8})
    responses["reward"] = scores
    same_for_same(responses, ["reward"])
    a, b = responses["reward"].to_numpy().reshape(2, 2, 2)
    assert a.tolist() == [[1.0, 0.5], [1.0, 2.0]] and b.tolist() == [[1.0, 3.0], [1.0, 1.0]]
    assert metrics.outcomes(a, b)[:, 1].tolist() == [0.25, 0.5]


def test_win_rate_of_a_known_difference():
    shares = metrics.outcomes(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]]))
    assert shares.tolist() == [[0.75, 0.25, 0.0]]
    rng = RNG(0)
    found = metrics.win_rate(metrics.outcomes(rng.normal(1, 1, (400, 4)), rng.normal(0, 1, (400, 4))))
    truth = 0.5 * (1 + math.erf(0.5))  # P(N(1, 2) > 0)
    assert found["ci95"][0] < truth < found["ci95"][1]


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_best_of_n_is_unbiased(n):
    """Uniform rewards: the best of n has the mean n / (n + 1), also where n is the number of samples."""
    rewards = RNG(1).random((20_000, 32))
    found = frontier.best_of_n(rewards, n)
    assert found.mean() == pytest.approx(n / (n + 1), abs=4 * found.std() / len(found) ** 0.5)
    exact = np.mean([max(rewards[0, [i, j]]) for i in range(32) for j in range(32) if i != j])
    assert frontier.best_of_n(rewards[:1], 2)[0] == pytest.approx(exact)


def test_what_best_of_n_picks_is_judged_by_another():
    rewards, gold = np.array([[1.0, 3.0, 3.0, 2.0]]), np.array([[9.0, 0.0, 1.0, 5.0]])
    assert frontier.best_of_n(rewards, 4, gold)[0] == pytest.approx(0.5)  # the two best tie
    assert frontier.best_of_n(rewards, 1, gold)[0] == pytest.approx(15 / 4)
    pairs = [(i, j) for i in range(4) for j in range(4) if i < j]
    best = [np.mean(gold[0][[k for k in pair if rewards[0][k] == max(rewards[0][list(pair)])]]) for pair in pairs]
    assert frontier.best_of_n(rewards, 2, gold)[0] == pytest.approx(np.mean(best))


def test_kl_of_best_of_n():
    assert frontier.best_of_n_kl(1) == 0 and frontier.best_of_n_kl(4) == pytest.approx(math.log(4) - 3 / 4)
    for n in (2, 8, 64):  # a policy over 5000 rewards, none twice: the formula is its limit
        uniform = np.arange(5000.0)[None]
        assert frontier.best_of_n_kl_with_ties(uniform, n)[0] == pytest.approx(frontier.best_of_n_kl(n), abs=2e-3)
    coin = np.array([[0.0, 1.0]])  # best of n gives the better of two tokens unless all n are the worse
    better = 1 - 0.5**3
    exact = better * math.log(better / 0.5) + (1 - better) * math.log((1 - better) / 0.5)
    assert frontier.best_of_n_kl_with_ties(coin, 3)[0] == pytest.approx(exact)
    assert exact < frontier.best_of_n_kl(3)
    assert frontier.best_of_n_kl_with_ties(np.ones((1, 9)), 4)[0] == pytest.approx(0)


def test_the_frontier_of_a_two_token_policy():
    """p(better) = .3: the tilted policy has odds .3 e^(1/beta) / .7. Estimated from 32 samples a prompt."""
    p, betas = 0.3, np.array([4.0, 1.0, 0.5])
    rewards = (RNG(2).random((3000, 32)) < p).astype(float)
    q = p * np.exp(1 / betas) / (p * np.exp(1 / betas) + 1 - p)
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    found = frontier.tilted(rewards, betas, {"reward": rewards, "double": 2 * rewards})
    for name, exact in (("reward", q), ("double", 2 * q), ("kl", kl)):
        se = found[name].std(0) / len(rewards) ** 0.5
        assert np.all(np.abs(found[name].mean(0) - exact) < 4 * se + 2e-3), name
    plain = frontier._tilted(rewards, betas, {})  # the jackknife takes most of the bias away
    assert abs(found["kl"].mean(0)[2] - kl[2]) < abs(plain["kl"].mean(0)[2] - kl[2]) / 2
    assert np.all(np.diff(found["effective_samples"].mean(0)) < 0)
    assert found["effective_samples"].max() <= 32


def test_share_of_the_possible_gain():
    """A policy on the frontier has all of it, one that mixes it with the reference half of the gain has half."""
    p, beta = 0.3, 1.0
    rng = RNG(3)
    rewards = (rng.random((2000, 64)) < p).astype(float)
    betas = frontier.beta_grid(rewards)
    curve = frontier.tilted(rewards, betas, {"reward": rewards})
    q = p * math.exp(1 / beta) / (p * math.exp(1 / beta) + 1 - p)

    def policy(chance):
        better = rng.random((2000, 16)) < chance
        kl = np.where(better, math.log(chance / p), math.log((1 - chance) / (1 - p)))
        return kl.mean(1), better.mean(1)

    best = frontier.gain_at_equal_kl(policy(q), rewards.mean(1), (curve["kl"], curve["reward"]))
    low, high = best["share"]["ci95"]
    assert low < 1 < high and high - low < 0.2 and not best["beyond"]
    assert abs(best["difference"]["mean"]) < 0.02
    kl, reward = policy(q)
    half = frontier.gain_at_equal_kl((kl, (reward + p) / 2), rewards.mean(1), (curve["kl"], curve["reward"]))
    assert half["share"]["mean"] == pytest.approx(0.5, abs=0.07)
    q = p + 0.005  # nearer to the reference than the first point of the curve
    kl = np.full(2000, q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)))
    near = frontier.gain_at_equal_kl((kl, rewards.mean(1) + q - p), rewards.mean(1), (curve["kl"], curve["reward"]))
    assert kl[0] < curve["kl"].mean(0).min() / 10 and near["share"]["mean"] == pytest.approx(1, abs=0.03)
    far = frontier.gain_at_equal_kl((kl + 50, reward), rewards.mean(1), (curve["kl"], curve["reward"]))
    assert far["beyond"]


def test_there_is_no_share_of_a_gain_that_may_be_none():
    """A policy that is the reference has a KL of rounding errors, and the largest gain at it is as small: noise of the
    samples divided by it was a share of thousands, over the half of the draws in which it could be divided."""
    rng = RNG(0)
    rewards = rng.normal(0, 1, (200, 16))
    curve = frontier.tilted(rewards, frontier.beta_grid(rewards), {"reward": rewards})
    kl, reward = rng.normal(0, 1e-6, 200), rng.normal(0, 1, (200, 4)).mean(1)
    found = frontier.gain_at_equal_kl((kl, reward), rewards.mean(1), (curve["kl"], curve["reward"]))
    assert found["share"] is None and is_estimate(found["difference"])
    found = frontier.gain_at_equal_kl((kl + 0.05, reward), rewards.mean(1), (curve["kl"], curve["reward"]))
    assert is_estimate(found["share"])


def is_estimate(value) -> bool:
    low, high = value["ci95"]
    return low <= value["mean"] <= high


@pytest.mark.parametrize("form", ["bon", "rl"])
def test_over_optimization_fits_recover_their_coefficients(form):
    kl = np.linspace(0.2, 40, 12)
    d = np.sqrt(kl)
    gain = d * (0.7 - 0.11 * (d if form == "bon" else np.log(d)))
    fit = frontier.fit_over_optimization(kl, gain, form)
    assert (fit["alpha"], fit["beta"]) == pytest.approx((0.7, 0.11)) and fit["residual"] < 1e-9
    assert frontier.over_optimization_curve(kl, fit) == pytest.approx(gain)
    noisy = frontier.fit_over_optimization(kl, gain + RNG(0).normal(0, 0.02, 12), form)
    assert (noisy["alpha"], noisy["beta"]) == pytest.approx((0.7, 0.11), abs=0.03)


def pair(margin, longer_by=0, group="g", chosen="better", rejected="worse", **more) -> dict:
    texts = {"chosen": chosen, "rejected": rejected, "source": "", "annotator": None}
    return {"group": group, "margin": margin, "length_difference": longer_by, **texts, **more}


def quality(pairs: list[dict]) -> dict:
    return reward_quality.reward_model_quality(pd.DataFrame(pairs))


def test_reward_model_accuracy_and_its_baseline():
    found = quality([pair(1.0, 4), pair(-1.0, -4), pair(2.0, -4, "h"), pair(0.0, 0, "h")])
    assert found["accuracy"]["mean"] == 2.5 / 4 and found["n_pairs"] == 4
    assert found["longer_wins_baseline"] == 1.5 / 4
    assert "by_source" not in found and "labelers" not in found
    rows = found["by_length_difference"]
    assert [(row["from"], row["to"]) for row in rows] == [(-4, -4), (0, 0), (4, 4)]
    assert [row["accuracy"]["mean"] for row in rows] == [0.5, 0.5, 1.0]
    sources = [pair(1.0, source="a"), pair(-1.0, source="b"), pair(1.0, source="b")]
    assert quality(sources)["by_source"]["b"]["accuracy"]["mean"] == 0.5


def test_a_reward_model_that_is_no_better_than_length_or_knows_the_pairs_is_warned_of():
    found = quality([pair(1.0, 4), pair(-1.0, -4), pair(2.0, 4, "h"), pair(0.5, -2, "i")])
    (right,) = about_reward_model(found | {"trained_on": []})
    assert right.startswith("The reward model orders 0.75 [") and right.endswith("longer response is right on 0.50.")
    worse = quality([pair(-1.0, 4), pair(1.0, 4, "h")] * 2) | {"trained_on": ["a:1", "a:2", "a:3", "a:4"]}
    _, length, known = about_reward_model(worse)
    assert length.startswith("Warning: that is no better than preferring the longer response")
    assert "was trained on the prompts of 4 of 4 pairs (a:1, a:2, a:3, …)" in known


def test_calibration_of_a_model_that_is_as_right_as_it_says():
    rng = RNG(4)
    truth = rng.normal(0, 1.5, 20_000)
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-truth)), truth, -truth)
    honest = reward_quality.calibration(pd.DataFrame({"margin": margins}))
    boaster = reward_quality.calibration(pd.DataFrame({"margin": 4 * margins}))
    assert honest["error"] < 0.02 < 0.1 < boaster["error"]
    assert sum(row["n_pairs"] for row in honest["curve"]) == 20_000


def test_labelers_agree_with_each_other():
    def labelled(annotator, first_is_better, group):
        chosen, rejected = ("x", "y") if first_is_better else ("y", "x")
        return pair(1.0, group=group, chosen=chosen, rejected=rejected, annotator=annotator)

    pairs = [labelled("ann", True, "g"), labelled("bob", True, "g"), labelled("ann", True, "h")]
    pairs += [labelled("bob", False, "h"), *[labelled("ann", True, "alone")] * 2]
    found = quality(pairs)
    assert found["labelers_with_each_other"]["mean"] == 0.5 and found["labelers_with_each_other"]["n_pairs"] == 2
    assert found["labelers"]["bob"]["n_pairs"] == 2
    assert reward_quality.labeler_agreement(pd.DataFrame(pairs[-1:])) is None


def conversation(text):
    return [{"role": "user", "content": text}]


def test_people_judge_blind(tmp_path):
    prompts = [conversation(f"question {number}") for number in range(3)]
    texts = {"sft": ["s0", "s1", "same"], "ppo": ["p0", "p1", "same"]}
    task = tmp_path / "people" / "task.jsonl"
    assert write_ranking_task(task, prompts, texts) == 2
    assert "ppo" not in task.read_text() and "sft" not in task.read_text()
    tasks, left_out = read_tasks(task)  # as the ranking app reads it
    assert [len(one.responses) for one in tasks] == [2, 2] and not any(left_out.values())
    rows = [(0, {"p0": 1, "s0": 2}), (0, {"p0": 1, "s0": 1}), (1, {"p1": 2, "s1": 1})]
    lines = [
        {"prompt": prompts[number], "responses": [{"text": text, "rank": rank} for text, rank in ranks.items()]}
        for number, ranks in rows
    ]
    rankings = tmp_path / "rankings.jsonl"
    rankings.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    shares = people_outcomes(read_people(str(rankings)), prompts, texts["ppo"], texts["sft"])
    assert shares.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], "the same text is a tie"
    two_ties = [texts["ppo"] + ["same"], texts["sft"] + ["same"]]
    half = people_outcomes(dict([read_people(str(rankings)).popitem()]), prompts + prompts[2:], *two_ties)
    assert half[1:3].tolist() == [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]] and np.isnan(half[[0, 3]]).all(), "half of both"
    alike = people_outcomes(read_people(str(rankings)), prompts, texts["ppo"], texts["ppo"])
    assert alike.tolist() == [[0.0, 1.0, 0.0]] * 3, "also where every text is, as of one policy that was given twice"
    rankings.write_text('{"prompt": "p"}\n')
    with pytest.raises(UserError, match="rankings.jsonl:1: not a ranking"):
        read_people(str(rankings))


def test_rankings_of_other_responses_are_refused_and_no_verdict_is_said(tmp_path, capsys):
    """The win rates were left out, without a word."""
    prompts = [conversation(f"question {number}") for number in range(2)]
    texts = {"base": ["b0", "b1"], "sft": ["s0", "s1"], "ppo": ["p0", "p1"]}
    evaluation = SimpleNamespace(args=SimpleNamespace(paths=texts, reference="sft"), conversations=prompts)
    arguments = JudgeArguments(rankings="rankings.jsonl")
    rankings = {json.dumps(prompts[0]): [{"p0": 1.0, "s0": 2.0}]}
    (row,) = other_win_rates(evaluation, texts, arguments, rankings)
    assert (row["a"], row["b"], row["win"], row["n"], row["ci95"]) == ("ppo", "sft", 1.0, 1, None)
    assert capsys.readouterr().out.count("people: no verdict on") == 2
    with pytest.raises(UserError, match=r"--rankings rankings.jsonl ranks no first responses of two policies"):
        other_win_rates(evaluation, texts, arguments, {json.dumps(prompts[0]): [{"p0": 1.0, "other": 2.0}]})


def test_a_prompt_that_is_repeated_counts_once(tmp_path):
    """Four times the same prompts made the intervals half as wide as they are."""
    rows = [{"prompt": f"question {number % 3}"} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = read_prompts(EvaluationPrompts(str(tmp_path / "prompts.jsonl")), FormattingArguments(), None)
    assert [prompt.messages for prompt in prompts] == [conversation(f"question {number}") for number in range(3)]


def test_the_reward_model_is_measured_on_the_test_split_and_on_what_it_has_room_for(tmp_path):
    """The train split was taken, which the model knows; and a pair that is too long was a traceback at the end."""
    for split in ("train", "test", "validation"):
        pairs = [(split, "w1", "w2"), ("w1 " * 50, "w1", "w2")]
        rows = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in pairs]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for split in ("test", "validation"):
        found = read_pairs([str(tmp_path)], RowArguments(), split)
        assert found["prompt"][0] == conversation(split) and len(found) == 2
    with pytest.raises(UserError, match=r"test.jsonl:2.* tokens are more than the 40 positions of the model"):
        read_pairs([str(tmp_path)], RowArguments(), tokenizer=word_tokenizer(), positions=40)


def test_an_evaluation_does_not_go_on_with_a_model_loaded_otherwise(tmp_path):
    """Samples in float32 were taken for those in 4 bits or bfloat16."""
    args = EvaluationArguments(**ARGUMENTS, output_dir=str(tmp_path / "out"))
    reward_model = SimpleNamespace(made_from={})

    def samples(**loading):
        evaluation = Evaluation(args, LoadingArguments(**loading).model_config(), [], reward_model)
        return evaluation.parts.get("samples-ppo", evaluation.made_from(evaluation.plan[2]), lambda: [loading])

    assert samples() == samples() == [{}]
    for loading in ({"dtype": "bfloat16"}, {"load_in_4bit": True}):
        with pytest.raises(UserError, match=f"samples-ppo.json was made with another {next(iter(loading))}"):
            samples(**loading)


def test_parts_are_reused_and_never_mixed(tmp_path):
    assert identity("runs/sft/") == identity("./runs/sft") == identity("runs/sft"), "as the shell completes it"
    parts = Parts(str(tmp_path / "out"))
    assert parts.get("x", {"seed": 1}, lambda: [1]) == [1]
    assert Parts(str(tmp_path / "out")).get("x", {"seed": 1}, lambda: pytest.fail("made again")) == [1]
    with pytest.raises(UserError, match="x.json was made with another seed"):
        parts.get("x", {"seed": 2}, lambda: [2])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("all of it")
    for taken in ("thesis", "thesis/chapter.txt"):
        with pytest.raises(UserError, match="holds no evaluation"):
            Parts(str(tmp_path / taken))
    (tmp_path / "busy" / "parts").mkdir(parents=True)
    with (tmp_path / "busy" / ".lock").open("w") as other:  # two at once sampled, and paid for, everything twice
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="busy is in use by another run"):
            Parts(str(tmp_path / "busy"))


def test_checkpoints_are_spread_and_end_with_the_last(tmp_path):
    for step in (10, 20, 30, 40, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-50.old").mkdir()
    assert [step for step, _ in checkpoints(str(tmp_path), 9)] == [10, 20, 30, 40, 100]
    assert [step for step, _ in checkpoints(str(tmp_path), 2)] == [20, 100]
    assert [step for step, _ in checkpoints(str(tmp_path), 1)] == [100]
    with pytest.raises(UserError, match="no checkpoint-N folder"):
        checkpoints(str(tmp_path / "none"), 3)


ARGUMENTS = {"policies": ["base=a", "sft=b", "ppo=c", "other=d"], "reward_model_name_or_path": "r"}


def test_what_is_planned():
    args = EvaluationArguments(**ARGUMENTS, temperatures=[0.5], best_of_n=16)
    assert (args.reference, args.headline) == ("sft", "ppo")
    plan = {one.name: (one.path, one.num_generations, one.temperature) for one in args.plan()}
    assert plan["sft"] == ("b", 16, 1.0) and plan["ppo"] == ("c", 4, 1.0)
    assert plan["sft@T0.5"] == ("b", 2, 0.5) and len(plan) == 5
    other = EvaluationArguments(policies=["x=1", "y=2"], reward_model_name_or_path="r")
    assert (other.reference, other.headline) == ("x", "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": ["sft"]}, "--policies sft: write it as NAME=PATH"),
        ({"policies": ["a=1", "a=2"]}, "--policies a=2: write it as NAME=PATH, each NAME once"),
        ({"policies": []}, "--policies NAME=PATH"),
        ({"policies": ["sft=a", "prompt=b"]}, "a column prompt already"),
        ({"reference": "gpt"}, "--reference gpt is not among --policies"),
        ({"temperatures": [0.0]}, "must be above 0"),
        ({"judges": [f"{__name__}.reward"]}, "the report has a figure reward already"),
        ({"judges": [f"{__name__}.brief", "tests.evaluation.test_command.brief"]}, "a figure brief already"),
        ({"judges": [f"{__name__}.missing"]}, "--judges .*missing: write it as module.function"),
        ({"judges": [f"{__name__}.conversation"]}, "--judges .*conversation: .*Its signature has to be"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, message):
    """Before anything is sampled. A judge called reward took the place of the reward model's scores, and of two judges
    of one name the second took that of the first."""
    with pytest.raises(UserError, match=message):
        EvaluationArguments(**ARGUMENTS | change)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--best_of_n", "1"], "--best_of_n 1: expected 2 or more"),
        (["--num_prompts", "0"], "--num_prompts 0: expected 1 or more"),
        (["--top_k", "50"], "unrecognized arguments: --top_k 50"),
    ],
)
def test_bad_flags_are_one_clear_line(flags, message):
    with pytest.raises(UserError, match=message):
        parse(ARGUMENTS_OF_COMMAND, flags)


def reward(completions, **kwargs):
    return [0.0 for _ in completions]


brief = reward


def measured(spec: PolicySpec, rewards, kl=None) -> Measured:
    """A policy with these rewards, (prompts, responses), of which each response has the same KL."""
    rewards = np.array(rewards, dtype=float)
    responses = {"prompt": np.repeat(np.arange(len(rewards)), rewards.shape[1]), "text": "w1"}
    responses |= {"token_ids": [[7, 1]] * rewards.size, "length": 2, "truncated": False, "entropy": 1.0}
    responses |= {"k1": kl, "k3": kl, "reward": rewards.ravel(), "brief": rewards.ravel()}
    return Measured(spec, pd.DataFrame(responses), ["reward", "brief"])


def test_the_curve_of_best_of_n_goes_through_its_points():
    """It was fitted at log n - (n - 1) / n, an upper bound of the KL, and drawn beside points at the KL with ties."""
    args = EvaluationArguments(**ARGUMENTS, best_of_n=64)
    rewards = RNG(0).integers(0, 3, (200, 64))
    reference = measured(args.plan()[1], rewards, 0.0)
    curves = Curves(reference, 64)
    best = curves.best_of_n()
    runs = [measured(PolicySpec(f"ppo@step{step}", "c", 2, 1.0, "ppo", step), rewards, step) for step in (1, 2, 3)]
    found = over_optimization(reference, [curves.point(one) for one in runs], best)
    kl, reward = (np.array([row[key] for row in best[1:]]) for key in ("kl_with_ties", "reward"))
    assert best[-1]["kl_with_ties"] < best[-1]["kl"] / 2
    curve = found["start"]["reward"] + frontier.over_optimization_curve(kl, found["fits"]["reward"]["bon"])
    assert curve == pytest.approx(reward, abs=0.06)


@pytest.mark.parametrize(
    "prompts, equal, kl", [(1, False, 0.5), (1, True, None), (3, True, 0.5), (3, False, None), (2, False, 0.0)]
)
def test_a_report_of_hardly_anything(tmp_path, prompts, equal, kl):
    """One prompt, one response, rewards that are all equal, no finite KL, best of two and no more, few checkpoints."""
    args = EvaluationArguments(
        policies=["sft=a", "ppo=b"], reward_model_name_or_path="r", num_generations=1, best_of_n=2, temperatures=[0.5],
        judges=[f"{__name__}.brief"],
    )  # fmt: skip
    reference, policy, sharper = args.plan()
    start = np.ones((prompts, 2)) if equal else np.arange(2.0 * prompts).reshape(prompts, 2)
    found = {"sft": measured(reference, start, 0.0), "ppo": measured(policy, start[:, :1] + (not equal), kl)}
    found[sharper.name] = measured(sharper, start, kl)
    for step in (2, 4, 6):
        name = f"ppo@step{step}"
        found[name] = measured(PolicySpec(name, "c", 2, 1.0, "ppo", step), start, kl and kl * step)
    report = summarise(args, found, [conversation(f"q{number}") for number in range(prompts)], "raw scores")
    pairs = [pair(1.0, group="only one")] if prompts == 1 else [pair(1.0), pair(-1.0, 3, "h")]
    report["reward_model"] = quality(pairs) | {"trained_on": []}
    (tmp_path / "over_optimization.png").touch()  # of an earlier report, which W&B would get with this one
    write_report(report, str(tmp_path))
    assert (tmp_path / "over_optimization.png").exists() == bool(report["over_optimization"])
    report = json.loads((tmp_path / "report.json").read_text())
    text = verdict(report)
    assert (tmp_path / "report.html").read_text().count("<svg") == 2 + (report["over_optimization"] is not None)
    assert (report["policies"]["ppo"]["reward"]["ci95"] is None) == (prompts == 1)
    assert ("on the only prompt, which says nothing about others" in text) == (prompts == 1)
    assert ("ppo scores the same as sft" in text) == equal and "could be chance" not in text
    assert bool(report["over_optimization"]) == bool(kl)
    assert (f"with only {prompts} prompts the 95 % intervals are too narrow" in table(report)) == (prompts > 1)
