"""Speed and memory of dataset formatting on synthetic rows.

    python benchmarks/formatting.py --rows 1000000

Writes JSON Lines files of a tenth of the rows and of all of them, formats each in a process of its own, and prints
rows per second and peak memory: what the second file takes beyond the first is what grows with the rows.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

WORDS = "the a model learns to answer short questions about rivers birds trains and weather in plain words".split()


def text(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(length)) + f" {seed}"


def messages(i: int) -> dict:
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": role, "content": text(i + turn, 20)} for turn, role in enumerate(roles)]}


def preference(i: int) -> dict:
    return {"prompt": text(i, 20), "chosen": text(i + 1, 30), "rejected": text(i + 2, 30)}


def ranking(i: int) -> dict:
    responses = [{"text": text(i + k, 30), "rank": k + 1} for k in range(4)]
    return {"prompt": text(i, 20), "responses": responses}


CASES = {"messages": ("sft", messages), "preference": ("preference", preference), "ranking": ("ranking", ranking)}


def measure(path: str, task: str, streaming: bool, results) -> None:
    import datasets.arrow_writer  # noqa: F401

    from recipes.formatting import format_dataset, load_rows

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter(), time.process_time()
    dataset, report = format_dataset(load_rows(path), task, streaming=streaming)
    rows = sum(1 for _ in dataset) if streaming else len(dataset)
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put({"rows": rows, "seconds": seconds, "cpu": cpu, "peak": peak / 1024, "grown": (peak - before) / 1024})


def run(path: Path, task: str, streaming: bool) -> dict:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(str(path), task, streaming, results))
    process.start()
    result = results.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    print(f"{'case':12}{'rows':>10}{'MB':>7}{'mode':>8}{'rows/s':>9}{'rows/CPU s':>12}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            task, row = CASES[case]
            for count in (args.rows // 10, args.rows):
                path = Path(folder) / f"{case}.jsonl"
                with path.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row(i)) + "\n" for i in range(count))
                for mode in ("file", "stream"):
                    found = run(path, task, mode == "stream")
                    speed = f"{found['rows'] / found['seconds']:9.0f}{found['rows'] / found['cpu']:12.0f}"
                    size = path.stat().st_size / 2**20
                    print(f"{case:12}{found['rows']:10}{size:7.0f}{mode:>8}{speed}{found['peak']:9.0f}", flush=True)


if __name__ == "__main__":
    main()
