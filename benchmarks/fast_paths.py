"""What each fast path of PPO brings alone: a rollout with all but this one against a rollout with all.

    python benchmarks/fast_paths.py --setting fixed|variable|large_vocabulary [--output FILE]

The sides take turns as in ppo_vs_trl.py. The last line is one JSON object: for each path, and for `all` of them, the
CPU time without it over the time with it (above 1: it saves time) and the peak memory with it over the memory without
it (below 1: it saves memory).
"""

from dataclasses import asdict

from ppo_vs_trl import PHASES, SETTINGS, commands, same_tokens
from turns import alternate, compare, parser, publish

from recipes.trainers.ppo_config import FAST_PATHS


def main():
    arguments = parser(__doc__, alternations=2)
    arguments.add_argument("--setting", choices=SETTINGS, default="fixed")
    arguments.add_argument("--paths", nargs="+", choices=[*FAST_PATHS, "all"], default=[*FAST_PATHS, "all"])
    args = arguments.parse_args()
    shape = SETTINGS[args.setting]
    sides = {path: f"without_{path}" for path in args.paths}
    turns = alternate(
        commands(shape, ("ours", *sides.values()), args.alternations + 1, args.device), args.alternations, args.device
    )
    same_tokens(turns)
    result = {"setting": args.setting, "device": args.device, "paths": {}}
    for path, side in sides.items():
        found = compare(turns[side], turns["ours"], PHASES)
        result["paths"][path] = {name: found[name] for name in ("ratio_cpu", "ratio_wall", "peak_memory_ratio")}
    publish(result, args.output, shape=asdict(shape), turns=turns)


if __name__ == "__main__":
    main()
