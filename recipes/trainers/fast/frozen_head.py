"""Log-probabilities under an LM head that is not trained, without a (N, vocabulary) tensor and without recomputation.

LoRA leaves the head frozen, so the gradient of log p with respect to the hidden state, `W[y] - E_p[W]`, needs nothing
from the backward pass: it is computed block by block in the forward, while the logits are at hand. The blocks go along
the vocabulary, with a running maximum as in online softmax (1805.02867): products of many rows and columns are the
fast ones, and a block of whole rows of a large vocabulary has few.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

# Few enough to stay in the processor's caches for the passes of a softmax, enough for fast products.
LOGITS_PER_BLOCK = 2**20
ROWS_PER_BLOCK = 1024


class FrozenHeadLogProbs(torch.autograd.Function):
    """`(hidden (N, H), weight (V, H), targets (N,), temperature, compute_entropy) -> (log p (N,), entropy (N,))`.

    Both are float32, in nats; the entropy carries no gradient and is None where it was not asked for.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, compute_entropy):
        count = len(targets)
        logps = torch.empty(count, device=hidden.device)
        entropies = torch.empty(count, device=hidden.device) if compute_entropy else None
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for rows in torch.arange(count, device=hidden.device).split(ROWS_PER_BLOCK):
            scaled, wanted = hidden[rows] / temperature, targets[rows]
            chosen, log_total, mean = softmax_parts(scaled, weight, wanted, wants_gradient or compute_entropy)
            logps[rows] = chosen - log_total
            if compute_entropy:
                # log_total - E_p[logit], and E_p[logit] = hidden . E_p[W]
                entropies[rows] = log_total - (scaled.float() * mean).sum(1)
            if wants_gradient:
                gradient[rows] = ((weight[wanted] - mean) / temperature).to(hidden.dtype)
        if wants_gradient:
            ctx.save_for_backward(gradient)
        if compute_entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, logps_gradient, _):
        (gradient,) = ctx.saved_tensors
        return gradient * logps_gradient[:, None].to(gradient.dtype), None, None, None, None


def softmax_parts(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, with_mean: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The target's logit (N,), the logarithm of the sum of exp(logit) (N,), and E_p[W] (N, H): float32."""
    count = len(targets)
    width = max(1, LOGITS_PER_BLOCK // max(1, count))
    chosen, highest, total = hidden.new_full((3, count, 1), -torch.inf, dtype=torch.float32)
    total.zero_()
    mean = torch.zeros_like(hidden, dtype=torch.float32) if with_mean else None
    for start, block in zip(range(0, len(weight), width), weight.split(width), strict=True):
        logits = F.linear(hidden, block).float()
        column = (targets - start)[:, None]
        is_here = (column >= 0) & (column < len(block))
        chosen = torch.where(is_here, logits.gather(1, column.clamp(0, len(block) - 1)), chosen)
        before, highest = highest, torch.maximum(highest, logits.amax(1, keepdim=True))
        shrink = (before - highest).exp_()
        exp = logits.sub_(highest).exp_()
        total = total * shrink + exp.sum(1, keepdim=True)
        if with_mean:
            mean.mul_(shrink).add_(torch.mm(exp.to(weight.dtype), block))
    return chosen[:, 0], (total.log() + highest)[:, 0], mean / total if with_mean else None


@torch.no_grad()
def has_frozen_linear_head(model: PreTrainedModel) -> bool:
    """Whether the logits are `hidden @ W.T` with a W that is not trained: no bias, scale, soft cap or adapter.

    Tested on two tokens, so that no list of architectures is needed, with hidden states so large that a soft cap
    changes their logits.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or type(weight) is not nn.Parameter or weight.requires_grad or not weight.numel():
        return False
    if head.bias is not None:  # a small one would not show beside such states
        return False
    ids = torch.tensor([[0, 1]], device=weight.device)
    was_training = model.training
    model.eval()  # dropout would draw twice
    hidden = 100 * model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    handle = head.register_forward_pre_hook(lambda _, args: (100 * args[0],))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    return hidden.dtype == weight.dtype and torch.allclose(
        logits.float(), F.linear(hidden, weight).float(), rtol=1e-2, atol=1e-3
    )
