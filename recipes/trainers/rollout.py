"""A rollout from its samples to its advantages, and the layout of its rows in a forward pass."""

from dataclasses import dataclass

import torch

from recipes.models.heads import States

Results = tuple[torch.Tensor | None, ...]


@dataclass
class Rollout:
    """What PPO knows of the B responses of one process; T is the longest response, P the longest prompt, in tokens.

    | field | shape | dtype | set by | |
    |---|---|---|---|---|
    | prompt_ids, completion_ids | B lists | int | sampling | tokens as sampled, without padding |
    | is_chat | | bool | sampling | prompts are messages, not text |
    | scores | (B,) | float32 | scoring | what the policy is trained on, before the KL penalty |
    | ids | (B, P + T) | int64 | scoring | prompt left padded, response right padded |
    | attention_mask | (B, P + T) | int64 | scoring | 1 at real tokens |
    | mask | (B, T) | float32 | scoring | 1 at response tokens that are trained, EOS included |
    | logps, ref_logps | (B, T) | float32 | scoring | log p of each response token by policy and reference, nats |
    | values | (B, T) | float32 | scoring | the critic's value of the state before each response token |
    | kl | (B, T) | float32 | advantages | estimate of KL(policy || reference) at each token, nats |
    | advantages, returns | (B, T) | float32 | advantages | whitened advantages; returns of the critic's scale |
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    is_chat: bool
    scores: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    values: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def is_unfinished(self, stop_ids: list[int]) -> torch.Tensor:
        """(B,) bool: the response does not end with a stop token."""
        return torch.tensor([ids[-1] not in stop_ids for ids in self.completion_ids], device=self.ids.device)


def sequences(batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and attention mask of prompt and response, (B, P + T), and the mask of trained tokens, (B, T) float32."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return ids, attention_mask, batch["completion_mask"].float()


def right_align(ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Move all padding of `ids` (B, L) to the right and cut it at the longest row: (B, longest).

    Such rows need no attention mask in a causal model and no positions of their own: no real token attends to what
    comes after it.
    """
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
