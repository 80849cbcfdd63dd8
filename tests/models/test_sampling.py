"""Sampling: real generation from small models, into a file that survives being stopped anywhere."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import yaml
from trl import ModelConfig

from recipes.cli.arguments import parse
from recipes.cli.errors import UserError
from recipes.formatting import RowArguments
from recipes.models import sampling
from recipes.models.sampling import (
    Prompt,
    PromptsArguments,
    SamplingArguments,
    generate,
    load_generator,
    sample,
    sample_to_file,
)
from scripts import sample_responses
from tests import tiny_models as models
from tests.conftest import ROOT, flags, write_jsonl

SAMPLING = SamplingArguments(
    num_generations=3, top_k=0, top_p=1.0, max_completion_length=6, seed=7, generation_batch_size=9
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A random base and an adapter on it that answers differently."""
    folder = tmp_path_factory.mktemp("models")
    base = models.save_base(folder / "base", sharpness=2.0)
    return {"base": base, "adapter": models.save_adapter(folder / "adapter", base, std=0.5)}


@pytest.fixture(scope="module")
def generator(folders):
    return load_generator(ModelConfig(model_name_or_path=folders["base"]))


@pytest.fixture
def prompts() -> list[Prompt]:
    """Ten prompts of one to five words, each length twice."""
    rows = [models.prompts(1, length=1 + number % 5, seed=number)[0] for number in range(10)]
    return [Prompt(f"p{number}", messages, f"prompts.jsonl:{number + 1}") for number, messages in enumerate(rows)]


def write(generator, prompts, output, sampling=SAMPLING, name="base") -> bytes:
    sample_to_file(*generator, prompts, sampling, name, str(output))
    return output.read_bytes()


def read(output) -> list[dict]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_the_head_multiplies_no_view(generator, prompts):
    """The last hidden state of each row is a slice, which torch would multiply with the whole head row by row."""
    model, tokenizer = generator
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0]))
    sample(model, tokenizer, [prompt.messages for prompt in prompts], SAMPLING)
    handle.remove()
    assert len(seen) > 1 and all(hidden.is_contiguous() for hidden in seen)


def test_a_line_holds_what_the_contract_says(generator, prompts, tmp_path):
    write(generator, prompts, tmp_path / "samples.jsonl")
    rows = read(tmp_path / "samples.jsonl")
    assert Counter(row["id"] for row in rows) == Counter(prompt.id for prompt in prompts)
    given = {prompt.id: prompt.messages for prompt in prompts}
    for row in rows:
        assert list(row) == ["id", "prompt", "responses", "model", "sampling"]
        assert row["prompt"] == given[row["id"]] and row["model"] == "base"
        assert row["sampling"]["seed"] == 7 and row["sampling"]["temperature"] == 1.0
        texts = [response["text"] for response in row["responses"]]
        assert len(set(texts)) == len(texts) == 3
        assert not any("<" in text for text in texts)
    ids = [response["id"] for row in rows for response in row["responses"]]
    assert len(set(ids)) == len(ids) == 30
    assert {response["finished"] for row in rows for response in row["responses"]} == {True, False}


def test_finished_means_that_the_model_stopped(generator, prompts):
    groups = sample(*generator, [prompt.messages for prompt in prompts], SAMPLING)
    assert [len(group) for group in groups] == [3] * 10
    end = generator[1].eos_token_id
    for response in (response for group in groups for response in group):
        assert response.finished == (response.token_ids[-1] == end)
        assert end not in response.token_ids[:-1]
        assert response.finished or len(response.token_ids) == 6
        words = [token for token in response.token_ids if token >= len(models.SPECIAL_TOKENS)]
        assert response.text.split() == generator[1].convert_ids_to_tokens(words)


@pytest.mark.parametrize("keep", [0, 1, 4, 9, 10])
def test_a_resumed_file_equals_an_uninterrupted_one(generator, prompts, tmp_path, keep):
    whole = write(generator, prompts, tmp_path / "whole.jsonl")
    lines = whole.splitlines(keepends=True)
    half_a_line = lines[keep][:20] if keep < len(lines) else b""
    (tmp_path / "stopped.jsonl").write_bytes(b"".join(lines[:keep]) + half_a_line)
    assert write(generator, prompts, tmp_path / "stopped.jsonl") == whole


def test_the_seed_decides(generator, prompts, tmp_path):
    first = write(generator, prompts, tmp_path / "a.jsonl")
    assert write(generator, list(reversed(prompts)), tmp_path / "b.jsonl") == first
    write(generator, prompts, tmp_path / "c.jsonl", replace(SAMPLING, seed=8))
    texts = [[[r["text"] for r in row["responses"]] for row in read(tmp_path / f"{name}.jsonl")] for name in "ac"]
    assert sum(a == b for a, b in zip(*texts, strict=True)) <= 2


def test_what_a_sure_model_repeats_is_dropped_and_counted(generator, prompts, tmp_path, capsys):
    write(generator, prompts, tmp_path / "samples.jsonl", replace(SAMPLING, temperature=0.01))
    rows = read(tmp_path / "samples.jsonl")
    kept = [len(row["responses"]) for row in rows]
    assert len(rows) == 10 and min(kept) >= 1 and sum(kept) < 30
    for row in rows:
        texts = [response["text"] for response in row["responses"]]
        assert len(set(texts)) == len(texts)
    assert f"{30 - sum(kept)} still missing" in capsys.readouterr().out


def test_no_batch_is_larger_than_was_asked_for(generator, prompts, tmp_path, monkeypatch):
    """Also where a prompt gets more responses than that."""
    sizes = []

    def counted(model, tokenizer, conversations, *args):
        sizes.append(len(conversations))
        return generate(model, tokenizer, conversations, *args)

    monkeypatch.setattr(sampling, "generate", counted)
    write(generator, prompts, tmp_path / "samples.jsonl", replace(SAMPLING, generation_batch_size=2))
    assert max(sizes) == 2 and all(len(row["responses"]) == 3 for row in read(tmp_path / "samples.jsonl"))


def test_a_file_of_something_else_is_refused_and_kept(generator, prompts, tmp_path):
    output = tmp_path / "samples.jsonl"
    before = write(generator, prompts, output)
    others = [replace(prompt, messages=[{"role": "user", "content": "w1 w2"}]) for prompt in prompts]
    for changed in (
        {"sampling": replace(SAMPLING, temperature=0.5)},
        {"sampling": replace(SAMPLING, seed=8)},
        {"name": "another model"},
        {"prompts": others},
    ):
        with pytest.raises(UserError, match="another --output|other prompts"):
            write(generator, output=output, **({"prompts": prompts} | changed))
        assert output.read_bytes() == before


def foreign(whole: bytes) -> dict[str, bytes]:
    """Files that the samples `whole` were not cut to."""
    first, second = whole.splitlines(keepends=True)[:2]
    prompt = first.partition(b', "responses"')[0] + b"}"
    return {
        "the prompts themselves": prompt + b"\n",
        "a prompt without an end": prompt,
        "a text": b"not samples\n",
        "one line without an end": b"a thesis",
        "rows without an end": b'{"prompt": "w1"}\n{"prompt": "w2"}',
        "something after samples": first + b"my notes",
        "the next line of other prompts": first + b'{"id": "p77", "prompt": [',
        "other samples and a cut line": second + first[:30],
        "more than all": whole + b'{"id": "p1"',
        "a damaged line": first[:-5] + b"\n" + second,
        "not text": bytes(range(256)),
        "nothing but an end": b"\n",
    }


@pytest.mark.parametrize("kind", foreign(b"\n\n"))
def test_a_file_that_it_did_not_begin_is_never_touched(generator, prompts, tmp_path, kind):
    output = tmp_path / "samples.jsonl"
    content = foreign(write(generator, prompts, tmp_path / "whole.jsonl"))[kind]
    output.write_bytes(content)
    before = output.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"samples\.jsonl:\d+: not a line of samples|other prompts"):
        write(generator, prompts, output)
    assert output.read_bytes() == content and output.stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"samples.jsonl", "whole.jsonl"}


def test_a_cut_in_the_middle_of_a_letter_is_mended(generator, tmp_path):
    prompts = [Prompt("p", [{"role": "user", "content": "w1 \u00e9\u00e9"}], "prompts.jsonl:1")]
    whole = write(generator, prompts, tmp_path / "whole.jsonl")
    output = tmp_path / "samples.jsonl"
    output.write_bytes(whole[: whole.index("\u00e9".encode()) + 1])
    assert write(generator, prompts, output) == whole


def test_a_second_sampler_of_one_file_is_refused(generator, prompts, tmp_path):
    output = tmp_path / "samples.jsonl"
    holder = "import sys; from recipes.cli import lock; lock.hold(sys.argv[1], ''); print(1, flush=True); input()"
    command = [sys.executable, "-c", holder, f"{output}.lock"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"1\n"
            with pytest.raises(UserError, match=rf"samples\.jsonl is in use by process {first.pid} on "):
                write(generator, prompts, output)
            assert not output.exists()
        finally:
            first.kill()
    write(generator, prompts, output)
    assert len(read(output)) == 10 and not (tmp_path / "samples.jsonl.lock").exists()


def test_an_output_that_cannot_be_written_is_one_line(generator, prompts, tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        write(generator, prompts, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/samples\.jsonl: (Not a directory|File exists)\. Once"):
        write(generator, prompts, tmp_path / "file" / "samples.jsonl")


def test_a_prompt_that_does_not_fit_is_named(folders, tmp_path):
    rows = [{"prompt": "w1"}, {"prompt": models.prompts(1, length=130)[0]}]
    line = flags(model_name_or_path=folders["base"], output=tmp_path / "samples.jsonl")
    line += flags(dataset_name=write_jsonl(tmp_path / "prompts.jsonl", rows))
    with pytest.raises(UserError, match=r"prompts\.jsonl:2: .*\d+ tokens .* 128 positions"):
        sample_responses.main(*parse(sample_responses.ARGUMENTS, line))
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_generations": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"temperature": 0.0},
        {"max_completion_length": 0},
    ],
)
def test_impossible_arguments(wrong):
    with pytest.raises(UserError, match="--"):
        parse((SamplingArguments,), flags(**wrong))


def test_an_adapter_samples_as_itself(folders, generator, prompts):
    adapter = load_generator(ModelConfig(model_name_or_path=folders["adapter"]))
    conversations = [prompt.messages for prompt in prompts]
    greedy = replace(SAMPLING, num_generations=1, temperature=0.0)
    own, base = sample(*adapter, conversations, greedy), sample(*generator, conversations, greedy)
    assert own != base
    with adapter[0].disable_adapter():
        assert sample(*adapter, conversations, greedy) == base


def test_prompts_that_are_written_otherwise_than_in_training_are_said(folders, tmp_path, capsys):
    """PPO writes them with `chat_template_kwargs`; samples, chats and evaluations were of other prompts."""
    folder = shutil.copytree(folders["adapter"], tmp_path / "ppo" / "checkpoint-2")
    record = {"recipe": "ppo", "arguments": {"chat_template_kwargs": {"enable_thinking": False}}}
    (folder.parent / "run_arguments.yaml").write_text(yaml.safe_dump(record))
    template = (folder / "chat_template.jinja").read_text() + "{% if enable_thinking == false %}<user> {% endif %}"
    for first_line, said in (("", 1), ("{% set enable_thinking = false %}", 0)):
        (folder / "chat_template.jinja").write_text(first_line + template)
        load_generator(ModelConfig(model_name_or_path=str(folder)))
        assert capsys.readouterr().err.count("chat_template_kwargs {'enable_thinking': False}, and here") == said
    (folder.parent / "train_config.yaml").write_text("epochs: 3")  # of another program
    assert load_generator(ModelConfig(model_name_or_path=str(folder)))


def test_a_base_answers_in_four_bits(folders, prompts):
    model, tokenizer = load_generator(ModelConfig(model_name_or_path=folders["base"], load_in_4bit=True))
    (group,) = sample(model, tokenizer, [prompts[0].messages], SAMPLING)
    assert model.is_quantized and len(group) == 3


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_sampling_is_what_the_flags_say_whatever_came_with_the_base(folders, prompts, tmp_path, name):
    """Filters in generation_config.json would make another policy of what chat, ranking and evaluation sample."""
    base = shutil.copytree(folders["base"], tmp_path / "base")
    filters = {"min_p": 0.9, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": [5, 6, 7]}
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | filters | {"num_beams": 2, "top_k": 1}))
    folder = base
    if name == "adapter":
        folder = shutil.copytree(folders["adapter"], tmp_path / "adapter")
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    conversations = [prompt.messages for prompt in prompts]
    filtered, plain = (load_generator(ModelConfig(model_name_or_path=str(each))) for each in (folder, folders[name]))
    assert sample(*filtered, conversations, SAMPLING) == sample(*plain, conversations, SAMPLING)


def test_command_line(folders, tmp_path):
    """From an adapter: a first run, then one with another temperature that is refused."""
    rows = [{"id": f"q{number}", "prompt": f"w{number} w{number + 1}"} for number in range(6)]
    data, output = write_jsonl(tmp_path / "prompts.jsonl", rows), tmp_path / "out" / "samples.jsonl"
    line = flags(model_name_or_path=folders["adapter"], dataset_name=data, output=output)
    line += flags(num_generations=2, max_completion_length=5)
    sample_responses.main(*parse(sample_responses.ARGUMENTS, line))
    samples = read(output)
    assert {row["id"] for row in samples} == {row["id"] for row in rows}
    assert samples[0]["model"] == folders["adapter"]
    assert all(len(row["responses"]) == 2 for row in samples)
    before = output.read_bytes()
    for flag, value, was in (("temperature", "0.7", "1.0"), ("dtype", "bfloat16", "float32")):
        with pytest.raises(UserError, match=f"{flag} was {was}, now {value}.*choose another --output"):
            sample_responses.main(*parse(sample_responses.ARGUMENTS, [*line, f"--{flag}", value]))
    adapter = tmp_path / "adapter"  # trained anew under the same name
    shutil.copytree(folders["adapter"], adapter)
    line[line.index(folders["adapter"])] = str(adapter)
    line[line.index(str(output))] = str(tmp_path / "other.jsonl")
    sample_responses.main(*parse(sample_responses.ARGUMENTS, line))
    line[line.index(str(adapter))] = f"{adapter}/"  # the same model
    sample_responses.main(*parse(sample_responses.ARGUMENTS, line))
    models.save_adapter(adapter, folders["base"], std=0.4)
    with pytest.raises(UserError, match="weights was .*, now .*choose another --output"):
        sample_responses.main(*parse(sample_responses.ARGUMENTS, line))
    assert output.read_bytes() == before


def test_a_dataset_that_is_not_there_is_said_before_the_model_loads(tmp_path):
    line = flags(model_name_or_path="nowhere/at/all", dataset_name="gone.jsonl", output=tmp_path / "samples.jsonl")
    with pytest.raises(UserError, match="gone.jsonl: no such file"):
        sample_responses.main(*parse(sample_responses.ARGUMENTS, line))


def test_no_prompt_of_a_folder_of_files_is_lost(tmp_path):
    """The third file's first line had the id of the second's."""
    for number in range(4):
        write_jsonl(
            tmp_path / f"train-{number}.jsonl",
            [{"id": None, "prompt": f"w{number}"}, {"id": "same", "prompt": f"v{number}"}],
        )
    prompts = sample_responses.read_prompts(PromptsArguments(str(tmp_path)), RowArguments(), models.word_tokenizer())
    assert sorted(prompt.messages[0]["content"] for prompt in prompts) == sorted(
        f"{c}{n}" for c in "wv" for n in range(4)
    )
    assert {prompt.id for prompt in prompts} == {f"{id}{n}" for id in ("p1", "same") for n in ("", "-2", "-3", "-4")}
