"""How near PPO's phases come to the floor: the matrix products a step must do, at the rate this machine does them.

    python benchmarks/floor.py --setting fixed|variable|large_vocabulary [--sides ours] [--device cpu|cuda]

Counted are the products of the formulas in `products`, with each row at its own length: no padding, no recomputation,
no softmax, no optimizer. Their rate is that of one large product, measured in turns with the rollouts. The last line
is one JSON object: `ratio_cpu` and `ratio_wall` are the floor over what the whole rollout took, `phases` the same for
each phase. With the side `trl`, `ratio_at_floor` is TRL 1.12's time over the floor: what no implementation exceeds.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ppo_vs_trl import PHASES, SETTINGS, commands
from turns import Meter, alternate, medians, parser, publish
from workload import LORA, SIZES, Shape

SIDE = {"cpu": 2048, "cuda": 8192}


def products(shape: Shape) -> dict[str, float]:
    """FLOPs of the matrix products of one rollout, by phase; a product of (n, k) and (k, m) has 2nkm.

    A forward of n tokens through L layers has 2n(N + A) for the N weights of the linear layers and the A of their
    adapters, and 2 L H n(n + 1) in causal attention; a response token 2HV in the head. Backward has twice the
    attention, twice the adapters, and once the linear layers, whose weights are frozen; it has no gradient to the
    input of the lowest layer's queries, keys and values. The head's gradient to its hidden state is 2HV.
    """
    sizes = SIZES[shape.size]
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    linear = layers * (4 * hidden**2 + 3 * hidden * inner)
    adapter = layers * LORA["r"] * (4 * 2 * hidden + 3 * (hidden + inner))
    flops = dict.fromkeys(PHASES, 0.0)
    for prompt, response in shape.lengths():
        head = 2 * response * hidden * shape.vocabulary

        def attention(tokens):
            return 2 * layers * hidden * tokens * (tokens + 1)

        def forward(tokens, adapters=True):
            return 2 * tokens * (linear + adapters * adapter) + attention(tokens)  # noqa: B023

        def backward(tokens):
            lowest = 3 * hidden * (hidden + LORA["r"])
            return 2 * tokens * (linear + 2 * adapter - lowest) + 2 * attention(tokens)  # noqa: B023

        states = prompt + response - 1  # nothing is predicted from the last token
        flops["generate"] += forward(states) + head
        policy, critic = forward(states) + backward(states) + 2 * head, forward(states) + backward(states)
        # Reference, reward model and critic; the policy's log-probabilities are known from generation.
        flops["score"] += forward(states, adapters=False) + head + forward(states + 1) + forward(states)
        flops["train"] += shape.epochs * (policy + critic)
    return flops


def matrix_products(device: str) -> None:
    """A side whose turn is about a second of one large matrix product."""
    import torch

    meter = Meter(device)
    size, dtype = SIDE[device], torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    repeats = 200 if device == "cuda" else 4
    meter.loaded("libraries")
    while True:
        meter.start()
        meter.switch("product")
        for _ in range(repeats):
            left @ right
        meter.report["flops"] = 2.0 * repeats * size**3
        meter.finish()


def main():
    arguments = parser(__doc__, alternations=3)
    arguments.add_argument("--setting", choices=SETTINGS, default="fixed")
    arguments.add_argument("--sides", nargs="+", choices=["ours", "trl"], default=["ours"])
    arguments.add_argument("--matrix_products", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.matrix_products:
        matrix_products(args.device)
    shape = SETTINGS[args.setting]
    sides = commands(shape, tuple({"ours": None, **dict.fromkeys(args.sides)}), args.alternations + 1, args.device)
    calibration = [sys.executable, str(Path(__file__)), "--matrix_products", "--device", args.device]
    turns = alternate({"products": calibration, **sides}, args.alternations, args.device)

    flops = products(shape)
    flops["total"] = sum(flops.values())
    rates = {
        clock: turns["products"][0]["flops"] / medians(turns["products"], clock)["total"] for clock in ("cpu", "wall")
    }
    floor = {clock: {phase: count / rates[clock] for phase, count in flops.items()} for clock in rates}

    def share(clock: str, phase: str) -> float:
        return floor[clock][phase] / medians(turns["ours"], clock)[phase]

    result = {
        "setting": f"floor {args.setting}",
        "device": args.device,
        "ratio_cpu": share("cpu", "total"),
        "ratio_wall": share("wall", "total"),
        "peak_memory_ratio": None,
        "phases": {
            phase: {"ratio_cpu": share("cpu", phase), "ratio_wall": share("wall", phase), "gflop": flops[phase] / 1e9}
            for phase in PHASES
        },
        "gflop_per_second": {clock: rate / 1e9 for clock, rate in rates.items()},
    }
    if "trl" in turns:
        peer = {clock: medians(turns["trl"], clock) for clock in rates}
        result["ratio_at_floor"] = {phase: peer["cpu"][phase] / floor["cpu"][phase] for phase in (*PHASES, "total")}
    publish(result, args.output, shape=asdict(shape), turns=turns)


if __name__ == "__main__":
    main()
