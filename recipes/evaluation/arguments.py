"""What is evaluated and how: the arguments of scripts/evaluate.py, and the samples they ask for."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from recipes.cli.arguments import import_function
from recipes.cli.checkpoints import all_checkpoints
from recipes.cli.errors import UserError
from recipes.evaluation.policies import PolicySpec
from recipes.models.sampling import SamplingArguments

# Names that stand beside a judge's: of figures in report.json, of other judges, and of columns of responses.
TAKEN = set(
    "reward reward_model people n kl kl_with_ties ci95 length entropy truncated distinct_1 distinct_2 difference "
    "share_of_gain gain_over_best_of_n beta se effective_samples temperature run step "
    "prompt text token_ids logps ref_logps k1 k3".split()
)


@dataclass
class EvaluationArguments(SamplingArguments):
    """Policies, what scores them, and how they are sampled: from the whole distribution, as KL needs it."""

    policies: list[str] = field(default_factory=list, metadata={"help": "Policies as NAME=PATH, e.g. sft=runs/sft."})
    reward_model_name_or_path: str | None = field(default=None, metadata={"help": "Reward adapter or full model."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Folder of the report and its parts."})
    reference: str | None = field(
        default=None, metadata={"help": "The policy that KL is measured from; default: sft, else the first."}
    )
    normalize_scores: bool = field(
        default=True, metadata={"help": "Standardise scores as PPO does, where recipes/reward.py stored how."}
    )
    judges: list[str] = field(
        default_factory=list,
        metadata={"help": "Python judges module.function, of the signature of TRL's reward functions."},
    )
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "PPO runs as NAME=FOLDER, whose checkpoints become a curve."}
    )
    curve_generations: int = field(
        default=2, metadata={"help": "Responses per prompt at each point of a curve: checkpoints and temperatures."}
    )
    num_checkpoints: int = field(default=6, metadata={"help": "Checkpoints of each run, spread evenly."})
    temperatures: list[float] = field(
        default_factory=lambda: [0.8, 0.6, 0.4, 0.2],
        metadata={"help": "The reference is also sampled at these: what sharpening gains without RL."},
    )
    best_of_n: int = field(
        default=64, metadata={"help": "Samples of the reference per prompt, for best-of-n and the frontier."}
    )
    num_prompts: int | None = field(default=None, metadata={"help": "The first so many prompts; default: all."})
    eval_batch_size: int = field(default=32, metadata={"help": "Responses per forward pass that measures."})
    top_k: int = field(default=0, init=False)  # no flags: KL is not finite where a filter cuts the distribution
    top_p: float = field(default=1.0, init=False)
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the models."})

    def __post_init__(self):
        super().__post_init__()
        if not self.policies or self.reward_model_name_or_path is None:
            raise UserError("Command line: --policies NAME=PATH … and --reward_model_name_or_path are required.")
        if min([self.temperature, *self.temperatures]) <= 0:
            raise UserError("--temperature and --temperatures must be above 0: a greedy policy has no finite KL.")
        self.paths = named_paths("--policies", self.policies)
        self.runs = named_paths("--checkpoints", self.checkpoints)
        names = list(self.paths)
        for name in {"prompt", "change"}.intersection(names):
            raise UserError(f"--policies {name}=…: the samples have a column {name} already: name it otherwise.")
        self.reference = self.reference or ("sft" if "sft" in names else names[0])
        if self.reference not in names:
            raise UserError(f"--reference {self.reference} is not among --policies {', '.join(names)}.")
        others = [name for name in names if name != self.reference] or names
        self.headline = "ppo" if "ppo" in others else others[-1]  # the policy that the page is about
        self.judges_by_name: dict[str, str] = {}
        for path in self.judges:
            name = path.rpartition(".")[2]
            if name in TAKEN or name in self.judges_by_name:
                raise UserError(f"--judges {path}: the report has a figure {name} already: rename the function.")
            judge = import_function(path, "--judges")
            try:
                inspect.signature(judge).bind(prompts=[], completions=[], completion_ids=[])
            except TypeError as error:
                advice = "Its signature has to be f(prompts, completions, **kwargs)."
                raise UserError(f"--judges {path}: {error}. {advice}") from error
            self.judges_by_name[name] = path

    def plan(self) -> list[PolicySpec]:
        """Everything that is sampled: the policies, the sharpened reference, the checkpoints."""
        specs = []
        for name, path in self.paths.items():
            count = max(self.best_of_n, self.num_generations) if name == self.reference else self.num_generations
            specs.append(PolicySpec(name, path, count, self.temperature))
        reference = specs[list(self.paths).index(self.reference)]
        sharper = [temperature for temperature in self.temperatures if temperature != self.temperature]
        specs += [reference.at(temperature, self.curve_generations) for temperature in sharper]
        for run, folder in self.runs.items():
            for step, path in checkpoints(folder, self.num_checkpoints):
                name = f"{run}@step{step}"
                specs.append(PolicySpec(name, path, self.curve_generations, self.temperature, run, step))
        return specs


def checkpoints(run: str, count: int) -> list[tuple[int, str]]:
    """`(step, folder)` of up to `count` checkpoints of a training run, spread evenly, the last one included.

    Raises:
        UserError: there is none.
    """
    found = all_checkpoints(run)
    if not found:
        raise UserError(f"--checkpoints {run}: there is no checkpoint-N folder in it: train with --save_steps.")
    count = min(count, len(found))
    chosen = [found[round((number + 1) * len(found) / count) - 1] for number in range(count)]
    return [(int(path.rpartition("-")[2]), path) for path in chosen]


def named_paths(flag: str, items: Iterable[str]) -> dict[str, str]:
    """`name=path` items as a dictionary in their order.

    Raises:
        UserError: an item has another form, or a name is given twice.
    """
    paths: dict[str, str] = {}
    for item in items:
        found = re.fullmatch(r"([\w.-]+)=(.+)", item)
        if found is None or found[1] in paths:
            form = "write it as NAME=PATH, each NAME once, of letters, digits, dots, _ and -"
            raise UserError(f"{flag} {item}: {form}.")
        paths[found[1]] = found[2]
    return paths
