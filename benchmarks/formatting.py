"""Speed and memory of dataset formatting on synthetic rows.

    python benchmarks/formatting.py --rows 100000 1000000 --num_proc 1 2

Each measurement has a process of its own. "anonymous" is the memory that the process and its helpers hold: it may not
grow with the rows. The peak of "all" also counts pages of files (the formatted rows are memory-mapped), which the
system takes back when it needs them.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import psutil

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


class PeakMemory(threading.Thread):
    """Largest memory of this process and its children, sampled 20 times a second, in MiB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stopped, self.anonymous, self.all = threading.Event(), 0.0, 0.0

    def run(self) -> None:
        while not self.stopped.wait(0.05):
            anonymous = everything = 0
            for process in (psutil.Process(), *psutil.Process().children()):
                try:
                    memory = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                anonymous += memory.rss - memory.shared
                everything += memory.rss
            self.anonymous, self.all = max(self.anonymous, anonymous / 2**20), max(self.all, everything / 2**20)


def measure(path: str, task: str, num_proc: int, results) -> None:
    import datasets.arrow_writer  # noqa: F401

    from recipes.formatting import format_dataset, load_rows

    peak = PeakMemory()
    peak.start()
    start, cpu = time.perf_counter(), psutil.Process().cpu_times()
    dataset, _ = format_dataset(load_rows(path), task, streaming=not num_proc, num_proc=num_proc)
    rows = len(dataset) if num_proc else sum(1 for _ in dataset)
    seconds, end = time.perf_counter() - start, psutil.Process().cpu_times()
    peak.stopped.set()
    used = sum(
        getattr(end, name) - getattr(cpu, name) for name in ("user", "system", "children_user", "children_system")
    )
    speed = {"rows_per_second": round(rows / seconds), "rows_per_cpu_second": round(rows / used)}
    results.put({"rows": rows, **speed, "anonymous_mb": round(peak.anonymous), "all_mb": round(peak.all)})


def run(path: Path, task: str, num_proc: int) -> dict:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(str(path), task, num_proc, results))
    process.start()
    result = results.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1], help="processes; 0 streams")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            task, row = CASES[case]
            path, written = Path(folder) / f"{case}.jsonl", 0
            for rows in sorted(args.rows):
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row(i)) + "\n" for i in range(written, rows))
                written = rows
                for num_proc in args.num_proc:
                    found = run(path, task, num_proc)
                    size = round(path.stat().st_size / 2**20)
                    print(json.dumps({"case": case, "file_mb": size, "num_proc": num_proc, **found}), flush=True)


if __name__ == "__main__":
    main()
