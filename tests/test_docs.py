"""README and docs: every printed command runs where it stands, every link leads somewhere, every flag exists.

Blocks of `bash` and `python` are run, the README's first, then those of the pages in the order in which
`docs/index.md` names them, all in one folder. A block under `<!-- not run: WHY -->` is left out. Recipes get a few
flags more, which make them short, and run in this process, as everything that is Python does.
"""

import builtins
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from transformers.utils import logging

from tests.conftest import ROOT

INDEX = ROOT / "docs" / "index.md"
WALKTHROUGH = ROOT / "docs" / "walkthrough.ipynb"
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^(?: *<!-- not run: (?P<why>.+?) -->\n)?( *)```(?P<kind>\w*)\n(?P<text>.*?)^\2```", re.M | re.S)
SHORT = {
    "recipes/sft.py": ["--max_steps", "4", "--save_strategy", "no"],
    "recipes/reward.py": ["--max_steps", "2", "--save_strategy", "no"],
    # Two updates at the full learning rate: a policy that still answers like SFT leaves people nothing to compare.
    "recipes/ppo.py": "--max_steps 2 --warmup_steps 0 --save_steps 1 --per_device_train_batch_size 8".split(),
    "scripts/evaluate.py": ["--best_of_n", "4", "--num_prompts", "6", "--max_completion_length", "12"],
}
# Commands that other tests run, or that set up what is there already.
ELSEWHERE = (
    "source ",
    "bash scripts/quickstart.sh",
    "bash scripts/test.sh",
    "bash .ci/lint",
    ".venv/bin/python -m pip ",
    "UPDATE_MATRIX=1 ",
)
# What the reader has: demonstrations and prompts in tables.
OWN = {
    "demonstrations.csv": "prompt,completion\n" + "What does the cow say?,The cow says moo.\n" * 3,
    "prompts.csv": "prompt\n" + "".join(f"What is the opposite of {word}?\n" for word in ("hot", "big", "loud")),
}


def pages() -> list[Path]:
    """The README, then what the index names in its order, of which `docs` holds the most."""
    linked = [(INDEX.parent / link).resolve() for link in LINK.findall(INDEX.read_text(encoding="utf-8"))]
    return [ROOT / "README.md", INDEX, *(path for path in dict.fromkeys(linked) if path.suffix == ".md")]


def commands(text: str) -> list[str]:
    """The commands of a bash block; a here-document belongs to its command."""
    found, lines = [], iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if heredoc := re.search(r"<<'(\w+)'", line):
            line = "\n".join([line, *iter(lambda: next(lines), heredoc[1]), heredoc[1]])
        if line.strip() and not line.lstrip().startswith("#"):
            found.append(line.strip())
    return found


class Reader:
    """Runs commands as somebody does who follows the pages, in the folder this process is in."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.done = monkeypatch, set()

    def run(self, command: str) -> None:
        if command in self.done or command.startswith(ELSEWHERE):
            return
        self.done.add(command)
        words = shlex.split(command.splitlines()[0], comments=True)
        if words[:2] == ["accelerate", "launch"]:
            launch = launch_command_parser().parse_args(words[2:])
            assert Path(launch.config_file).is_file()
            words = ["python", launch.training_script, *launch.training_script_args]
        if words[0] != "python" or ">" in words:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = {**os.environ, "PATH": path}
            subprocess.run(
                ["bash", "-euc", command], check=True, stdin=subprocess.DEVNULL, timeout=60, env=environment
            )
        elif words[1:3] == ["scripts/rank_responses.py", "serve"]:
            self.look_at_the_page(words)
            self.python(["scripts/rank_responses.py", "terminal", *words[3:]])
        else:
            self.python(words[1:])

    def python(self, words: list[str]) -> None:
        module = words[0] == "-m"
        words = words[module:]
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*words, *SHORT.get(words[0], [])])
            patch.setattr(sys, "path", ["", *sys.path])
            patch.setattr(builtins, "input", self.answer())
            try:
                (runpy.run_module if module else runpy.run_path)(words[0], run_name="__main__")
            except SystemExit as end:
                assert not end.code, shlex.join(words)

    @staticmethod
    def answer():
        """A person at the keyboard: chats for a turn, and ranks A first, with reasons."""
        said = iter(["What does the cow say?", "/quit"])

        def reply(question: str = "") -> str:
            if question.startswith("Ranking"):
                return " > ".join(sorted(set(re.findall(r"\b[A-Z]\b", question))))
            if question.startswith("Why"):
                return "It answers the question."
            return "" if question.startswith(("Ratings", "Enter")) else next(said)

        return reply

    @staticmethod
    def look_at_the_page(words: list[str]) -> None:
        """Start the server, open its address, and stop it."""
        server = subprocess.Popen([sys.executable, *words[1:], "--port", "0"], stdout=subprocess.PIPE, text=True)
        try:
            address = next(found[1] for line in server.stdout if (found := re.search(r"(http://\S+)/", line)))
            assert b"<form" in urllib.request.urlopen(address, timeout=20).read()
        finally:
            server.terminate()
            server.wait(20)


@pytest.mark.slow
def test_the_walkthrough_runs_and_holds_its_pictures(monkeypatch):
    cells = json.loads(WALKTHROUGH.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    shown = [name for cell in code for output in cell["outputs"] for name in output.get("data", {})]
    assert shown.count("image/png") == sum("plt.subplots" in "".join(cell["source"]) for cell in code)
    monkeypatch.chdir(WALKTHROUGH.parent)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    verbosity, variables = logging.get_verbosity(), {"__name__": "walkthrough"}
    try:
        with plt.rc_context():
            for cell in code:
                exec(compile("".join(cell["source"]), cell["id"], "exec"), variables)
    finally:
        plt.close("all")
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        shutil.rmtree(variables.get("RUNS", ""), ignore_errors=True)
    assert np.mean(variables["difference"] > 0) > 0.55, "the reward model has learned nothing"
    assert variables["exact"].min() > -1e-4 and variables["exact"].sum() > 0.1, "PPO has not moved the policy"
    assert variables["table"]["kl_coef"][0] == 0 and len(variables["table"]["gold"]) >= 3


@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "scripts", "accelerate_configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in OWN.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    reader = Reader(monkeypatch)
    for page in pages():
        variables: dict = {"__name__": page.stem}
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            text = textwrap.dedent(block["text"])
            if block["why"] or block["kind"] not in ("bash", "python"):
                continue
            place = f"{page.relative_to(ROOT)}: {text.strip()}"
            try:
                if block["kind"] == "python":
                    exec(text, variables)
                else:
                    for command in commands(text):
                        reader.run(command)
            except Exception as error:
                raise AssertionError(place) from error


def test_every_command_stands_in_a_block_that_is_run():
    """A block of another kind (JSON, a formula, a listing) holds none, so that none is left out by a typing error."""
    for page in pages():
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if block["kind"] not in ("bash", "python"):
                found = re.search(r"^\s*(\$ |python |accelerate |bash |pip |hf |vllm ).*", block["text"], re.M)
                assert not found, f"{page.relative_to(ROOT)}: {found[0]}"


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page, and Jupyter those of a notebook."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        return {head.replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.M)}
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_index_names_every_page_and_every_link_leads_somewhere():
    written = {ROOT / "CONTRIBUTING.md", *ROOT.glob("*/**/README.md"), *pages()}
    written = {page for page in written if ".venv" not in page.parts}
    assert set((ROOT / "docs").glob("*.md")) <= set(pages()), "docs/index.md lacks a page"
    for page in sorted({*written, WALKTHROUGH}):
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for link in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.S)):
            target, _, anchor = link.partition("#")
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.relative_to(ROOT)}: {link}"
            assert not anchor or anchor in anchors(path), f"{page.relative_to(ROOT)}: {link}"


# Flags of other programs: pip, uv, pytest, Slurm, vLLM, and the commands of the Hub and of llama.cpp.
FOREIGN = """version nodes partition weight-transfer-config logprobs-mode max-logprobs enable-lora max-lora-rank
lora-modules served-model-name chat-template exclude outfile outtype find-links no-index resolution extra""".split()


def test_every_flag_in_the_pages_exists():
    known = {option.removeprefix("--") for each in launch_command_parser()._actions for option in each.option_strings}
    for name in ("recipes.sft", "recipes.reward", "recipes.ppo", "scripts.sample_responses", "scripts.evaluate"):
        module = importlib.import_module(name)
        groups = getattr(module, "ARGUMENTS", ()) or (module.EvaluationArguments, module.JudgeArguments)
        known |= {field.name for group in groups for field in dataclasses.fields(group)}
    for folder in ("recipes", "scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'"--([a-z][\w-]+)"', path.read_text(encoding="utf-8")))
    for script in ("chat", "merge_adapter", "estimate_memory"):
        module = importlib.import_module(f"scripts.{script}")
        own = [each for each in vars(module).values() if isinstance(each, type) and dataclasses.is_dataclass(each)]
        known |= {field.name for each in own for field in dataclasses.fields(each)}
    for page in pages():
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*\w)(?!\*)", page.read_text(encoding="utf-8")):
            assert flag in known or flag in FOREIGN, f"{page.relative_to(ROOT)}: --{flag}"


def test_the_readme_has_the_numbers_of_the_results():
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("## Gold by stage")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in results.splitlines() if "|" in line]
    header, *found = [row for row in rows if row[0] in ("policy", "base", "SFT", "PPO", "PPO without KL")]
    means = {row[0]: dict(zip(header, row, strict=True)) for row in found}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for title, column in (("gold: true quality", "gold"), ("reward model's score", "reward"), ("KL from SFT", "KL")):
        line = next(line for line in readme.splitlines() if line.startswith(f"| {title}"))
        shown = re.findall(r"-?\d+\.\d+", line)
        wanted = [
            re.search(r"-?\d+\.\d+", means[name][column])[0] for name in ("base", "SFT", "PPO", "PPO without KL")
        ]
        assert shown == wanted, line


def result(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def numbers(page: str, start: str) -> list[float]:
    """Those in the table rows of a page that begin with `start`."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("*", "").replace("`", "")
    rows = [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]
    return [float(number) for number in re.findall(r"[-+]?\d*\.?\d+", " ".join(rows))]


def test_the_pages_have_the_numbers_of_the_measurements():
    """Every number of a file of results stands in the row that was copied from it by hand."""

    def check(wanted: list[float], shown: list[float], place: str, rounded: float = 0.0051):
        missing = [number for number in wanted if not any(abs(number - each) <= rounded for each in shown)]
        assert not missing, f"{place}: {missing} not in {shown}"

    readme = [float(number) for number in re.findall(r"\d\.\d\d", (ROOT / "README.md").read_text(encoding="utf-8"))]
    for setting in ("fixed", "variable", "large_vocabulary"):
        found = result(f"benchmarks/results/ppo_{setting}.json")["result"]
        parts = [found, *found["phases"].values(), *([found["full_critic"]] if "full_critic" in found else [])]
        wanted = [part[name] for part in parts for name in ("ratio_cpu", "peak_memory_ratio") if name in part]
        check(wanted, numbers("docs/performance.md", f"| {setting}:"), f"performance.md, {setting}")
        if setting != "large_vocabulary":
            check([found["ratio_cpu"]], readme, f"README.md, {setting}")
            assert 1 / 6.5 < found["peak_memory_ratio"] < 1 / 3.5, "README.md: four to six times the memory"
    for setting in ("fixed", "variable", "large_vocabulary"):
        for name, found in result(f"benchmarks/results/fast_{setting}.json")["result"]["paths"].items():
            row = "| all off |" if name == "all" else f"| {name} |"
            wanted = [found["ratio_cpu"], found["peak_memory_ratio"]]
            check(wanted, numbers("docs/performance.md", row), f"performance.md, {setting}, {name}")

    rows = re.findall(
        r"\| (.+) GiB \| (.+) GiB \| (.+) % \|", (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    )
    cases = result("benchmarks/results/memory.json")["cases"]
    for (name, case), cells in zip(cases.items(), rows, strict=True):
        shown = [float(cell.split("| ")[-1]) for cell in cells]
        check([case["estimated_gib"], case["measured_gib"]], shown, f"memory.md, {name}")
        check([100 * case["error"]], shown, f"memory.md, {name}", 0.051)

    page = (ROOT / "docs" / "reward_model.md").read_text(encoding="utf-8")
    phases = result("benchmarks/results/reward_vs_trl.json")["result"]["phases"]
    assert all(f"{phases[f'K={count}']['ratio_cpu']:.2f} times" in page for count in (4, 9))

    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    found = result("benchmarks/results/formatting.json")["result"]
    speeds = sorted(round(run["rows_per_cpu_second"], -2) for run in found if run["num_proc"] == 1)
    assert f"{speeds[0]:,} to {speeds[-1]:,}" in page
    assert all(str(run["anonymous_mb"]) in page for run in found)

    accuracies = [each["accuracy"] for each in result("docs/data/labels.json")["rows"]]
    check(accuracies, numbers("docs/tuning.md", "| accuracy on held-out pairs |"), "tuning.md")

    for one in result("benchmarks/results/methods.json")["heldout"]:
        name = f"best of {one['setting']['n']}" if "n" in one["setting"] else one["method"]
        means = [one[key] for key in ("gold", "greedy", "proxy") if key in one]
        wanted = [number for mean in means for number in (mean["mean"], *mean["ci95"])]
        shown = numbers("docs/methods.md", f"| {name} |")
        check([*wanted, *one["gold"]["seeds"], one["kl"]["mean"]], shown, f"methods.md, {name}")
        for cost in ("cpu_seconds", "memory_mib") if one["costs"] else ():
            check([np.mean([run[cost] for run in one["costs"]])], shown, f"methods.md, {name}, {cost}", 0.51)
