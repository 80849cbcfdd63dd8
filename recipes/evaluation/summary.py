"""What was measured, as the figures of report.json."""

from itertools import combinations

import numpy as np
import pandas as pd

from recipes.evaluation import frontier
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.measure import Measured
from recipes.evaluation.metrics import distinct_n, mean_interval, outcomes, over_prompts, win_rate
from recipes.evaluation.policies import Conversation

SHOWN = 40  # prompts in the report's samples


def summarise(
    args: EvaluationArguments, measured: dict[str, Measured], prompts: list[Conversation], unit: str
) -> dict:
    """report.json, to which the reward model's quality and the judges that are not Python are still to come."""
    reference = measured[args.reference]
    curves = Curves(reference, args.best_of_n)
    policies = {name: policy_summary(measured[name], args.num_generations) for name in args.paths}
    for name in args.paths:
        if name != args.reference:
            policies[name] |= curves.compare(measured[name])
            policies[name]["difference"] = {
                judge: mean_interval(scores.mean(1) - reference.scores[judge].mean(1))
                for judge, scores in measured[name].scores.items()
            }
    best_of_n = curves.best_of_n()
    checkpoints = [curves.point(one) for one in measured.values() if one.spec.run is not None]
    sharper = [one for one in measured.values() if one.spec.temperature != args.temperature]
    return {
        "reference": args.reference,
        "headline": args.headline,
        "judges": [*args.judges_by_name],
        "reward_unit": unit,
        "n_prompts": len(prompts),
        "temperature": args.temperature,
        "policies": policies,
        "win_rates": score_win_rates(args, measured),
        "reward_model": None,
        "frontier": {
            "best_of_n": best_of_n,
            "optimal": curves.optimal(),
            "sharpening": [curves.point(one) for one in sharper],
            "checkpoints": checkpoints,
            "share_of_gain": policies[args.headline].get("share_of_gain"),
        },
        "over_optimization": over_optimization(reference, checkpoints, best_of_n),
        "samples": side_by_side(args, measured, prompts),
    }


def policy_summary(one: Measured, num_generations: int) -> dict:
    """Figures of one policy; distinct-n over `num_generations` responses a prompt, so that policies compare."""
    ids = one.responses.groupby("prompt").head(num_generations)["token_ids"]
    return {
        **{name: mean_interval(values) for name, values in one.scores.items()},
        "kl": None if one.k1 is None else {name: mean_interval(one.array(name)) for name in ("k1", "k3")},
        **{name: mean_interval(one.array(name)) for name in ("length", "entropy", "truncated")},
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
        "n": len(one.responses),
    }


class Curves:
    """What can be done with the reference's samples: best-of-n, and the best policy at every KL."""

    def __init__(self, reference: Measured, best_of_n: int):
        self.rewards, scores = reference.scores["reward"], reference.scores
        self.ns = [2**power for power in range(best_of_n.bit_length())]
        self.betas = frontier.beta_grid(self.rewards)
        self.tilted = frontier.tilted(self.rewards, self.betas, scores)
        kl = [frontier.best_of_n_kl_with_ties(self.rewards, n) for n in self.ns]
        best = {name: [frontier.best_of_n(self.rewards, n, scores[name]) for n in self.ns] for name in scores}
        self.best = {name: np.stack(values, 1) for name, values in {"kl_with_ties": kl, **best}.items()}

    def best_of_n(self) -> list[dict]:
        means = {name: values.mean(0) for name, values in self.best.items()}
        bounds = [mean_interval(rewards)["ci95"] for rewards in self.best["reward"].T]
        kl = [frontier.best_of_n_kl(n) for n in self.ns]
        return pd.DataFrame({"n": self.ns, "kl": kl, **means, "ci95": bounds}).to_dict("records")

    def optimal(self) -> list[dict]:
        means = {name: values.mean(0) for name, values in self.tilted.items()}
        draws = over_prompts(self.tilted["reward"])[1:]
        se = draws.std(0) if len(draws) else None  # of one prompt
        return pd.DataFrame({"beta": self.betas, **means, "se": se}).to_dict("records")

    def compare(self, one: Measured) -> dict:
        """The policy beside both curves at its own KL, as docs/evaluation.md says; nothing if it has none."""
        if one.k1 is None:
            return {}
        policy, start = (one.k1.mean(1), one.scores["reward"].mean(1)), self.rewards.mean(1)
        best = frontier.gain_at_equal_kl(policy, start, (self.tilted["kl"], self.tilted["reward"]))
        bon = frontier.gain_at_equal_kl(policy, start, (self.best["kl_with_ties"], self.best["reward"]))
        share = best["share"]
        if share is not None:
            kls, counts = self.tilted["kl"].mean(0), self.tilted["effective_samples"].mean(0)
            order = np.argsort(kls)
            effective = float(np.interp(best["kl"], kls[order], counts[order]))
            share = share | {"beyond": best["beyond"], "effective_samples": effective}
        return {"share_of_gain": share, "gain_over_best_of_n": None if bon["beyond"] else bon["difference"]}

    def point(self, one: Measured) -> dict:
        """A policy on the plot of reward against KL: `kl`, and `reward` with its `ci95`; each judge's mean by name."""
        share = self.compare(one).get("share_of_gain")
        return {
            **{name: getattr(one.spec, name) for name in ("run", "step", "temperature")},
            "kl": None if one.k1 is None else float(one.k1.mean()),
            **{name: float(values.mean()) for name, values in one.scores.items()},
            "ci95": mean_interval(one.scores["reward"])["ci95"],
            "share_of_gain": share and share["mean"],
        }


def score_win_rates(args: EvaluationArguments, measured: dict[str, Measured]) -> list[dict]:
    """Win rates of each policy against those named before it, by the reward model and by each Python judge."""
    rows = []
    for b, a in combinations(args.paths, 2):
        for judge, scores in measured[a].scores.items():
            name = "reward_model" if judge == "reward" else judge
            shares = outcomes(scores, measured[b].scores[judge])
            rows.append({"a": a, "b": b, "judge": name, **win_rate(shares)})
    return rows


def over_optimization(reference: Measured, checkpoints: list[dict], best_of_n: list[dict]) -> dict | None:
    """Gains over the reference by the reward (the proxy) and each judge, and the curves of Gao et al. fitted to them.

    One curve for all runs: in that paper the KL penalty did not move it. `None` for best-of-n with fewer than two n
    that have a KL; it is the one with ties, at which the figure has them too.
    """
    start = {name: float(values.mean()) for name, values in reference.scores.items()}
    runs = pd.DataFrame([row for row in checkpoints if row["kl"] is not None and row["kl"] > 0])
    best = pd.DataFrame([row for row in best_of_n if row["kl_with_ties"] > 1e-6])
    if len(runs) < 3:
        return None
    fits = {}
    for name in start:
        fits[name] = {"rl": frontier.fit_over_optimization(runs["kl"], runs[name] - start[name], "rl"), "bon": None}
        if len(best) > 1:
            gain = best[name] - start[name]
            fits[name]["bon"] = frontier.fit_over_optimization(best["kl_with_ties"], gain, "bon")
    return {"start": start, "fits": fits}


def side_by_side(args: EvaluationArguments, measured: dict[str, Measured], prompts: list[Conversation]) -> list[dict]:
    """The first response of each policy; first the prompts on which the headline policy loses most."""
    headline, reference = measured[args.headline].scores, measured[args.reference].scores
    judge = next(iter(args.judges_by_name), "reward")
    table = pd.DataFrame(
        {
            "prompt": ["\n\n".join(turn["content"] for turn in prompt) for prompt in prompts],
            "change": headline[judge][:, 0] - reference[judge][:, 0],
            **{name: measured[name].first_texts for name in args.paths},
        }
    )
    return table.sort_values("change", kind="stable")[:SHOWN].to_dict("records")
