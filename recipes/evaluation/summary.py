"""What was measured, as the figures of report.json."""

from itertools import combinations

import numpy as np

from recipes.evaluation import frontier
from recipes.evaluation.arguments import EvaluationArguments
from recipes.evaluation.measure import Measured
from recipes.evaluation.metrics import distinct_n, mean_interval, outcomes, prompt_draws, win_rate
from recipes.evaluation.policies import Conversation

SHOWN = 40  # prompts in the report's samples


def summarise(
    args: EvaluationArguments, measured: dict[str, Measured], prompts: list[Conversation], unit: str
) -> dict:
    """report.json without the reward model's quality and the judges that are not Python."""
    curves = Curves(measured[args.reference], args.best_of_n)
    policies = {name: policy_summary(measured[name], args.num_generations) for name in args.paths}
    for name in args.paths:
        if name != args.reference:
            policies[name] |= curves.compare(measured[name])
            policies[name]["difference"] = difference(measured[name], measured[args.reference])
    best_of_n = curves.best_of_n()
    checkpoints = [one for one in measured.values() if one.spec.run is not None]
    shares = [curves.compare(one).get("share_of_gain") for one in checkpoints]
    sharper = [one for one in measured.values() if one.spec.temperature != args.temperature]
    return {
        "reference": args.reference,
        "headline": args.headline,
        "reward_unit": unit,
        "n_prompts": len(prompts),
        "temperature": args.temperature,
        "policies": policies,
        "win_rates": score_win_rates(args, measured),
        "frontier": {
            "best_of_n": best_of_n,
            "optimal": curves.optimal(),
            "sharpening": [{"temperature": one.spec.temperature, **point(one)} for one in sharper],
            "checkpoints": [
                {"run": one.spec.run, "step": one.spec.step, **point(one), "share_of_gain": share and share["mean"]}
                for one, share in zip(checkpoints, shares, strict=True)
            ],
            "share_of_gain": policies[args.headline].get("share_of_gain"),
        },
        "over_optimization": over_optimization(measured[args.reference], checkpoints, best_of_n),
        "samples": side_by_side(args, measured, prompts),
    }


def policy_summary(one: Measured, num_generations: int) -> dict:
    """Figures of one policy; distinct-n over `num_generations` responses a prompt, so that policies compare."""
    ids = [sample.token_ids for group in one.samples for sample in group[:num_generations]]
    return {
        **{name: mean_interval(values) for name, values in one.scores.items()},
        "kl": None if one.k1 is None else {"k1": mean_interval(one.k1), "k3": mean_interval(one.k3)},
        "length": mean_interval(one.each(lambda sample: len(sample.token_ids))),
        "entropy": mean_interval(one.each(lambda sample: sample.entropy)),
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
        "truncated": mean_interval(one.each(lambda sample: not sample.finished)),
        "n": one.reward.size,
    }


def difference(one: Measured, reference: Measured) -> dict:
    """By how much a policy scores above the reference, by the reward model and each judge, paired by prompt."""
    return {
        name: mean_interval(values.mean(1) - reference.scores[name].mean(1)) for name, values in one.scores.items()
    }


def point(one: Measured) -> dict:
    """A policy on the plot of reward against KL: `kl`, and `reward` with its `ci95`; each judge's mean by name."""
    kl = None if one.k1 is None else float(one.k1.mean())
    judged = {name: float(values.mean()) for name, values in one.scores.items()}
    return {"kl": kl, "reward": judged.pop("reward"), "ci95": mean_interval(one.reward)["ci95"], **judged}


class Curves:
    """What can be done with the reference's samples: best-of-n, and the best policy at every KL."""

    def __init__(self, reference: Measured, best_of_n: int):
        self.reference = reference
        self.ns = [2**power for power in range(best_of_n.bit_length())]
        self.betas = frontier.beta_grid(reference.reward)
        self.tilted = frontier.tilted(reference.reward, self.betas, reference.scores)
        self.bon_reward = np.stack([frontier.best_of_n(reference.reward, n) for n in self.ns], 1)
        self.bon_kl = np.stack([frontier.best_of_n_kl_with_ties(reference.reward, n) for n in self.ns], 1)

    def best_of_n(self) -> list[dict]:
        rows = []
        for place, n in enumerate(self.ns):
            kls = {"kl": frontier.best_of_n_kl(n), "kl_with_ties": float(self.bon_kl[:, place].mean())}
            judged = {
                name: float(frontier.best_of_n(self.reference.reward, n, values).mean())
                for name, values in self.reference.scores.items()
            }
            rows.append({"n": n, **kls, **judged, "ci95": mean_interval(self.bon_reward[:, place])["ci95"]})
        return rows

    def optimal(self) -> list[dict]:
        columns = {"beta": self.betas} | {name: values.mean(0) for name, values in self.tilted.items()}
        columns["se"] = (prompt_draws(len(self.reference.reward)) @ self.tilted["reward"]).std(0)
        rows = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
        return rows if len(self.reference.reward) > 1 else [row | {"se": None} for row in rows]

    def compare(self, one: Measured) -> dict:
        """The policy beside both curves at its own KL; nothing if it has none.

        `share_of_gain`: its gain over the reference as a share of the best possible one, with `beyond` where the
        estimate of the best does not reach its KL and so is too low, and `effective_samples` of that estimate.
        `gain_over_best_of_n`: its reward minus best-of-n's, `None` where no n has its KL.
        """
        if one.k1 is None:
            return {}
        policy = (one.k1.mean(1), one.reward.mean(1))
        start = self.reference.reward.mean(1)
        best = frontier.gain_at_equal_kl(policy, start, (self.tilted["kl"], self.tilted["reward"]))
        bon = frontier.gain_at_equal_kl(policy, start, (self.bon_kl, self.bon_reward))
        kls, counts = self.tilted["kl"].mean(0), self.tilted["effective_samples"].mean(0)
        order = np.argsort(kls)
        share = best["share"]
        if share is not None:
            effective = float(np.interp(best["kl"], kls[order], counts[order]))
            share = share | {"beyond": best["beyond"], "effective_samples": effective}
        return {"share_of_gain": share, "gain_over_best_of_n": None if bon["beyond"] else bon["difference"]}


def score_win_rates(args: EvaluationArguments, measured: dict[str, Measured]) -> list[dict]:
    """Win rates of each policy against those named before it, by the reward model and by each Python judge."""
    rows = []
    for b, a in combinations(args.paths, 2):
        for judge, scores in measured[a].scores.items():
            shares = outcomes(scores, measured[b].scores[judge])
            name = "reward_model" if judge == "reward" else judge
            rows.append({"a": a, "b": b, "judge": name, **win_rate(shares)})
    return rows


def over_optimization(reference: Measured, checkpoints: list[Measured], best_of_n: list[dict]) -> dict | None:
    """Gains over the reference by the reward (the proxy) and each judge, and the curves of Gao et al. fitted to them.

    One curve for all runs: in that paper the KL penalty did not move it. `None` for best-of-n with fewer than two n
    that have a KL; it is the one with ties, at which the figure has them too.
    """
    runs = [one for one in checkpoints if one.k1 is not None and one.k1.mean() > 0]
    if len(runs) < 3:
        return None
    kl = np.array([one.k1.mean() for one in runs])
    best = [row for row in best_of_n if row["kl_with_ties"] > 1e-6]
    best_kl, fits = np.array([row["kl_with_ties"] for row in best]), {}
    for name, values in reference.scores.items():
        gains = np.array([one.scores[name].mean() - values.mean() for one in runs])
        best_gains = np.array([row[name] - values.mean() for row in best])
        fits[name] = {
            "rl": frontier.fit_over_optimization(kl, gains, "rl"),
            "bon": frontier.fit_over_optimization(best_kl, best_gains, "bon") if len(best) > 1 else None,
        }
    return {"start": {name: float(values.mean()) for name, values in reference.scores.items()}, "fits": fits}


def side_by_side(args: EvaluationArguments, measured: dict[str, Measured], prompts: list[Conversation]) -> list[dict]:
    """The first response of each policy; first the prompts on which the headline policy loses most."""
    headline, reference = measured[args.headline].scores, measured[args.reference].scores
    judge = next((name for name in headline if name != "reward"), "reward")
    change = headline[judge][:, 0] - reference[judge][:, 0]
    return [
        {
            "prompt": "\n\n".join(turn["content"] for turn in prompts[row]),
            "change": float(change[row]),
            **{name: measured[name].samples[row][0].text for name in args.paths},
        }
        for row in np.argsort(change, kind="stable")[:SHOWN]
    ]
