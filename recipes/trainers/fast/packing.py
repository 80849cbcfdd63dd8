"""Rows without padding waste: right-aligned, sorted by length, and cut at the longest of their micro-batch.

A rollout is `prompt_ids` (B, P), left padded, and `completion_ids` (B, T), right padded. Right-aligned rows need no
attention mask in a causal model and no positions of their own: padding follows what any real token sees.
"""

import itertools
from collections.abc import Callable

import torch
from torch import nn

States = tuple[torch.Tensor, torch.Tensor]
Results = tuple[torch.Tensor | None, ...]

FEWEST_PIECES = 1e12  # an overhead that no padding outweighs


def sequences(rollout: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and attention mask of prompt and response, (B, P + T), and the mask of trained tokens, (B, T) float32."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    mask = rollout["completion_mask"].float()
    return ids, attention_mask, mask * rollout["tool_mask"] if "tool_mask" in rollout else mask


def right_align(ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Move all padding of `ids` (B, L) to the right and cut it at the longest row: (B, longest)."""
    order = torch.argsort((attention_mask == 0).int(), dim=1, stable=True)
    return ids.gather(1, order)[:, : int(attention_mask.sum(1).max())]


def response_states(attention_mask: torch.Tensor, width: int) -> States:
    """Rows and columns, (N,) each, of the states that predict the real tokens among the last `width`, right-aligned.

    They come row by row, the order in which `tensor[mask]` reads a (B, width) tensor.
    """
    response = attention_mask[:, -width:].bool()
    # Token number n of a row stands in column n - 1, and the state in the column before predicts it.
    columns = attention_mask.cumsum(1)[:, -width:][response] - 2
    return response.nonzero()[:, 0], columns


def at_responses(
    forward: Callable[[torch.Tensor, States, torch.Tensor], Results],
    ids: torch.Tensor,
    attention_mask: torch.Tensor,
    width: int,
) -> Results:
    """Run `forward(ids, states, targets)`, whose results are (N,), and lay each out as (B, width), 0 at padding."""
    mask = attention_mask[:, -width:].bool()
    flat = forward(right_align(ids, attention_mask), response_states(attention_mask, width), ids[:, -width:][mask])
    return tuple(None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in flat)


def piece_overhead(model: nn.Module) -> float:
    """What one more piece costs in a pass over `model` on a CPU, as a number of tokens.

    Layers are started again, and products of few rows are slow: about 250, 60 and 40 tokens with Llamas 32, 256 and
    512 wide, forward alone or with backward.
    """
    return 30 + 7000 / model.get_input_embeddings().weight.size(-1)


def pieces(lengths: torch.Tensor, most: int, overhead: float | None) -> list[torch.Tensor]:
    """Row numbers in pieces of up to `most` rows of similar length, cut where padding costs least.

    A piece costs its rows times its longest row, and `overhead`, all in tokens. With `FEWEST_PIECES` there are
    ceil(rows / most), however long the rows are; with None the rows also stay in their order.
    """
    if overhead is None:
        return [*torch.arange(len(lengths), device=lengths.device).split(most)]
    ordered, order = lengths.sort(stable=True)
    ordered = ordered.tolist()
    best = [(0.0, 0)]  # the cost of the first rows, and where their last piece begins
    for end in range(1, len(ordered) + 1):
        starts = range(max(0, end - most), end)
        best.append(min((best[i][0] + ordered[end - 1] * (end - i) + overhead, i) for i in starts))
    cuts = [len(ordered)]
    while cuts[-1] > 0:
        cuts.append(best[cuts[-1]][1])
    return [order[start:end] for end, start in reversed([*itertools.pairwise(cuts)])]


def in_pieces(run: Callable[[torch.Tensor], Results], rows: list[torch.Tensor]) -> Results:
    """The results of `run` on each of the pieces, (rows of the piece, …) each, put together in the rows' order."""
    back = torch.cat(rows).argsort()
    columns = zip(*map(run, rows), strict=True)
    return tuple(None if column[0] is None else torch.cat(column)[back] for column in columns)


def sort_by_length(batches: list[dict]) -> list[dict]:
    """Deal the rows of several micro-batches to as many of similar length, each without columns of padding only.

    The micro-batches belong to one optimizer step whose loss is a mean over all its tokens, so the update is the same.
    """
    merged = {
        name: torch.cat([batch[name] for batch in batches]) if is_rows(value) else value
        for name, value in batches[0].items()
    }
    lengths = merged["prompt_mask"].sum(1) + merged["completion_mask"].sum(1)
    return [
        trim({name: value[rows] if is_rows(value) else value for name, value in merged.items()})
        for rows in lengths.argsort(stable=True).chunk(len(batches))
    ]


def is_rows(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def trim(batch: dict) -> dict:
    """Cut the columns in which no row of `batch` has a real token."""
    prompt = int(batch["prompt_mask"].sum(1).max())
    width, kept = batch["completion_mask"].size(1), max(1, int(batch["completion_mask"].sum(1).max()))

    def cut(name, value):
        if name in ("prompt_ids", "prompt_mask"):
            return value[:, value.size(1) - prompt :]
        by_token = is_rows(value) and value.dim() == 2 and value.size(1) == width
        return value[:, :kept] if by_token else value

    return {name: cut(name, value) for name, value in batch.items()}
