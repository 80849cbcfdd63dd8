"""The fast paths of `recipes.trainers.fast` leave the numbers as they are."""

import itertools

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from recipes.cli.errors import UserError
from recipes.trainers.fast.drop_finished import DropFinishedSampler, draw
from recipes.trainers.fast.frozen_head import FrozenHeadLogProbs, has_frozen_linear_head
from recipes.trainers.fast.length_buckets import UNLIMITED, even_buckets, length_buckets, map_buckets, sort_by_length
from recipes.trainers.ppo_config import FAST_PATHS
from recipes.trainers.rollout import response_states, right_align
from tests import tiny_models as models
from tests.trainers.conftest import make_trainer

PAD = 0


def rows_of(lengths: list[tuple[int, int]]) -> dict:
    """Prompts (left padded) and completions (right padded) of given lengths, every token another number."""
    width, span = max(p for p, _ in lengths), max(c for _, c in lengths)
    numbers = iter(range(1, 10_000))
    batch = {name: [] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")}
    for prompt, completion in lengths:
        batch["prompt_ids"].append([PAD] * (width - prompt) + [next(numbers) for _ in range(prompt)])
        batch["prompt_mask"].append([0] * (width - prompt) + [1] * prompt)
        batch["completion_ids"].append([next(numbers) for _ in range(completion)] + [PAD] * (span - completion))
        batch["completion_mask"].append([1] * completion + [0] * (span - completion))
        batch["advantages"].append([float(x) for x in batch["completion_ids"][-1]])
    return {name: torch.tensor(value) for name, value in batch.items()} | {"num_items_in_batch": torch.tensor(7)}


def test_states_predict_the_response_tokens_of_right_aligned_rows():
    batch = rows_of([(3, 2), (1, 4), (5, 1)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    aligned = right_align(ids, attention)
    assert aligned.shape == (3, 6)
    assert [row[row != PAD].tolist() for row in aligned] == [row[row != PAD].tolist() for row in ids]
    rows, columns = response_states(attention, 4)
    following = aligned[rows, columns + 1]
    assert following.tolist() == batch["completion_ids"][batch["completion_mask"].bool()].tolist()


def test_sorted_micro_batches_hold_the_same_rows_and_no_empty_column():
    batch = rows_of([(3, 2), (1, 9), (5, 1), (2, 2), (8, 7), (1, 1)])
    halves = [
        {name: value[i : i + 3] if value.dim() else value for name, value in batch.items()} for i in range(0, 6, 3)
    ]
    ordered = sort_by_length(halves)
    assert [part["prompt_ids"].shape for part in ordered] == [(4, 5), (2, 8)]
    assert [part["completion_ids"].shape for part in ordered] == [(4, 2), (2, 9)]

    def content(parts):
        return sorted(
            (p[pm.bool()].tolist(), c[cm.bool()].tolist(), a[cm.bool()].tolist())
            for part in parts
            for p, pm, c, cm, a in zip(
                *(part[name] for name in batch if name != "num_items_in_batch"),
                strict=True,
            )
        )

    assert content(ordered) == content(halves)
    assert all(part["num_items_in_batch"] == 7 for part in ordered)


@pytest.mark.parametrize(
    ("overhead", "expected"),
    [
        (UNLIMITED, [[1, 3, 4, 5], [8, 9]]),
        (2.5, [[1], [3, 4, 5], [8, 9]]),
        (0.5, [[1], [3], [4], [5], [8], [9]]),
    ],
)
def test_buckets_come_back_in_order_and_are_cut_where_padding_is_dear(overhead, expected):
    lengths = torch.tensor([5, 1, 4, 9, 3, 8])
    cut = length_buckets(lengths, 27, overhead)
    assert [lengths[rows].tolist() for rows in cut] == expected
    results, nothing = map_buckets(lambda rows: (rows * 10, None), cut)
    assert results.tolist() == [0, 10, 20, 30, 40, 50] and nothing is None


def test_no_other_cut_costs_less():
    torch.manual_seed(0)
    for overhead in (0.0, 3.0, 10.0, 40.0, UNLIMITED):
        lengths = torch.randint(1, 30, (9,))
        ordered = lengths.sort()[0].tolist()

        def cost(sizes, ordered=ordered, overhead=overhead):
            ends = list(itertools.accumulate(sizes))
            return sum(ordered[end - 1] * size + overhead for end, size in zip(ends, sizes, strict=True))

        budget = 2 * ordered[-1]
        found = [len(rows) for rows in length_buckets(lengths, budget, overhead)]
        ways = [sizes for count in range(1, 10) for sizes in ways_to_cut(9, count)]
        allowed = [sizes for sizes in ways if largest(ordered, sizes) <= budget]
        assert cost(found) == min(map(cost, allowed))


def ways_to_cut(rows: int, count: int) -> list[list[int]]:
    """The sizes of `count` buckets, for every way to cut `rows` rows."""
    cuts = itertools.combinations(range(1, rows), count - 1)
    return [[end - start for start, end in itertools.pairwise((0, *cut, rows))] for cut in cuts]


def largest(ordered: list[int], sizes: list[int]) -> int:
    """Tokens of the largest bucket, its padding included."""
    return max(ordered[end - 1] * size for end, size in zip(itertools.accumulate(sizes), sizes, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_micro_batches_are_as_even_in_tokens_as_can_be(count):
    torch.manual_seed(count)
    for lengths in (torch.randint(1, 40, (8,)), torch.full((8,), 5), torch.tensor([1, 1, 1, 1, 1, 1, 1, 99])):
        ordered, found = lengths.sort()[0].tolist(), even_buckets(lengths, count)
        sizes = [len(rows) for rows in found]
        assert torch.cat(found).sort()[0].tolist() == [*range(8)] and len(sizes) == count and min(sizes) > 0
        assert largest(ordered, sizes) == min(largest(ordered, way) for way in ways_to_cut(8, count))


def test_scoring_takes_more_rows_at_a_time_where_they_are_short(world, tmp_path):
    """A batch size of its own, in tokens of its longest row; several processes with shares of a model count rows."""
    trainer = make_trainer(world, tmp_path, local_rollout_forward_batch_size=2)
    fast, lengths, taken = trainer._fast, torch.tensor([10, 1, 1, 1, 1, 1, 1, 1, 1, 1]), []
    fast.overhead = UNLIMITED

    def run(rows):
        taken.append(lengths[rows].tolist())
        return (rows,)

    with torch.no_grad():
        assert fast.map_rows(run, lengths)[0].tolist() == [*range(10)]
        fast.is_sharded = True
        fast.map_rows(run, lengths)
    fast.is_sharded = False
    fast.map_rows(run, lengths)
    assert taken == [[1] * 9, [10], *[[1, 1]] * 4, [1, 10], [1] * 9 + [10]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_frozen_head_equals_autograd(monkeypatch, temperature):
    monkeypatch.setattr("recipes.trainers.fast.frozen_head.ROWS_PER_BLOCK", 3)  # the last block has 1 row
    monkeypatch.setattr("recipes.trainers.fast.frozen_head.LOGITS_PER_BLOCK", 3 * 7)  # and 7 columns, the last has 1
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 8), torch.randint(50, (10,))
    ours = torch.randn(10, 8, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    logps, entropies = FrozenHeadLogProbs.apply(ours, weight, targets, temperature, True)
    table = (plain @ weight.T / temperature).log_softmax(-1)
    expected = table.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(entropies, -(table.exp() * table).sum(1))
    direction = torch.randn(10)
    (logps * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert FrozenHeadLogProbs.apply(ours, weight, targets, temperature, False)[1] is None


def test_only_a_plain_frozen_head_takes_the_short_way():
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    llama = models.causal_lm()
    assert not has_frozen_linear_head(llama)  # it would be trained
    assert has_frozen_linear_head(llama.requires_grad_(False))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=1))
    assert has_frozen_linear_head(gpt2.requires_grad_(False))
    soft_capped = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **tokens, head_dim=16, final_logit_softcapping=0.1))
    soft_capped.lm_head.weight.data.normal_()
    assert not has_frozen_linear_head(soft_capped.requires_grad_(False))
    gpt2.lm_head.bias = torch.nn.Parameter(torch.full((40,), 0.5), requires_grad=False)
    assert not has_frozen_linear_head(gpt2)
    scaled = CohereForCausalLM(CohereConfig(**sizes, **heads, **tokens, logit_scale=4.0))
    scaled.lm_head.weight.data.normal_()
    assert not has_frozen_linear_head(scaled.requires_grad_(False))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_ways_to_draw_are_the_same_distribution(device):
    """The race of exponentials, as on a GPU, run on a CPU: a subclass tells `draw` that it lies elsewhere."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")
        cumsum = cumsum_ = None  # which CUDA refuses under `full_determinism`

    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).repeat(20_000, 1)
    drawn = draw(probabilities.as_subclass(Elsewhere) if device == "cuda" else probabilities)
    counts = drawn.as_subclass(torch.Tensor)[:, 0].bincount(minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    torch.testing.assert_close(counts / 20_000, torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]), atol=0.015, rtol=0)


def test_logits_that_are_no_numbers_stop_the_sampling():
    model = models.causal_lm()
    model.model.norm.weight.data.fill_(float("nan"))
    prompts = torch.randint(12, 40, (2, 6))
    with pytest.raises(UserError, match="logits are not finite numbers"):
        generate(model, DropFinishedSampler(), prompts, torch.ones_like(prompts), top_k=0)


def generate(model, loop, prompts, mask, **kwargs):
    config = GenerationConfig(
        max_new_tokens=12, do_sample=True, pad_token_id=0, eos_token_id=list(range(1, 12)), **kwargs
    )
    with loop.installed(model):
        return model.generate(input_ids=prompts, attention_mask=mask, generation_config=config)


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.5, "top_k": 10}], ids=["whole", "filtered"])
def test_the_sampler_keeps_the_log_probabilities_of_what_they_sample(kwargs):
    torch.manual_seed(0)
    model, loop, temperature = models.causal_lm(sharpness=4.0), DropFinishedSampler(), kwargs.get("temperature", 1.0)
    prompts = torch.randint(12, 40, (16, 6))
    mask = torch.ones_like(prompts)
    mask[::2, :4] = 0
    samples = generate(model, loop, prompts, mask, **({"top_k": 0} | kwargs))
    assert torch.equal(samples[:, :6], prompts)
    assert loop.logps.shape == samples[:, 6:].shape
    ends = torch.isin(samples[:, 6:], torch.arange(1, 12)).int()
    lengths = torch.where(ends.any(1), ends.argmax(1) + 1, ends.size(1))
    assert len(set(lengths.tolist())) > 3, "the case needs rows that end at different times"
    for row, length in enumerate(lengths.tolist()):
        assert (samples[row, 6 + length :] == 0).all() and (loop.logps[row, length:] == 0).all()
        ids = torch.cat([prompts[row][mask[row].bool()], samples[row, 6 : 6 + length]])[None]
        with torch.no_grad():
            table = (model(input_ids=ids).logits[0, -length - 1 : -1] / temperature).log_softmax(-1)
        expected = table.gather(1, ids[0, -length:, None])[:, 0]
        torch.testing.assert_close(loop.logps[row, :length], expected, rtol=1e-4, atol=1e-5)
        if "top_k" in kwargs:
            assert (table > expected[:, None]).sum(1).max() < 10


def test_what_is_not_sampling_is_left_to_transformers():
    model, loop = models.causal_lm(), DropFinishedSampler()
    prompts = torch.randint(12, 40, (2, 6))
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=1)
    plain = model.generate(input_ids=prompts, generation_config=config)
    with loop.installed(model):
        assert torch.equal(model.generate(input_ids=prompts, generation_config=config), plain)
    assert loop.logps is None
    assert "generate" not in vars(model)


@pytest.mark.parametrize("off", [path for path in FAST_PATHS if path != "merged_copy"])  # that samples otherwise
def test_an_update_is_the_same_without_each_fast_path(world, tmp_path, monkeypatch, off):
    """The same responses, of very different lengths, with all fast paths and with all but one."""
    # so small a model is not cut
    monkeypatch.setattr("recipes.trainers.fast.length_buckets.bucket_overhead", lambda model: 1.0)
    weights, metrics = [], []
    for name, fast_paths in (("all", FAST_PATHS), ("fewer", [path for path in FAST_PATHS if path != off])):
        trainer = make_trainer(
            world,
            tmp_path / name,
            fast_paths=list(fast_paths),
            num_iterations=2,
            max_steps=2,
            gradient_accumulation_steps=4,
            optim="sgd",
            learning_rate=0.3,
            max_grad_norm=0.0,
            temperature=0.8,
        )
        draws = iter(torch.rand(10_000, generator=torch.Generator().manual_seed(4)).split(16))

        def responses(prompt_ids, *args, draws=draws, **kwargs):
            lengths = [1 + 7 * (i % 4 == 0) + i % 3 for i in range(len(prompt_ids))]
            words = [(next(draws)[: n - 1] * 40 + 4).long().tolist() for n in lengths]
            return [[*row, 1] if n < 8 else [*row, 5] for row, n in zip(words, lengths, strict=True)], None

        if off in ("response_logps", "length_sorting"):
            monkeypatch.setattr(trainer, "_generate_single_turn", responses)
        elif off == "drop_finished":
            # The loops draw differently: pick the most likely token through the sampling loop of either.
            trainer.generation_config.top_k = 1
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
        metrics.append(trainer.state.log_history[0])
    for name in ("objective/scores", "objective/entropy", "loss/policy_avg", "loss/value_avg", "loss"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-3, abs=1e-5), name
    assert metrics[0]["val/ratio"] == pytest.approx(1, abs=1e-5)
    for name, whole in weights[0].items():
        torch.testing.assert_close(weights[1][name], whole, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
