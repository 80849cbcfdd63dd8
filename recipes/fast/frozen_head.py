"""Log-probabilities under an LM head that is not trained, without a (N, vocabulary) tensor and without recomputation.

LoRA leaves the head frozen, so the gradient of log p with respect to the hidden state, `W[y] - E_p[W]`, needs nothing
from the backward pass: it is computed chunk by chunk in the forward, while the logits are at hand.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

LOGITS_PER_CHUNK = 2**23


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
        scaled = hidden / temperature
        for rows in torch.arange(count, device=hidden.device).split(max(1, LOGITS_PER_CHUNK // len(weight))):
            logits = F.linear(scaled[rows], weight).float()
            chosen = logits.gather(1, targets[rows, None])
            highest = logits.amax(1, keepdim=True)
            exp = logits.sub_(highest).exp_()
            total = exp.sum(1, keepdim=True)
            log_total = total.log() + highest
            logps[rows] = (chosen - log_total).squeeze(1)
            if not (wants_gradient or compute_entropy):
                continue
            mean = torch.mm(exp.to(weight.dtype), weight) / total  # E_p[W], (n, H)
            if compute_entropy:
                # log_total - E_p[logit], and E_p[logit] = hidden . E_p[W]
                entropies[rows] = log_total.squeeze(1) - (scaled[rows].float() * mean.float()).sum(1)
            if wants_gradient:
                gradient[rows] = ((weight[targets[rows]] - mean) / temperature).to(hidden.dtype)
        if wants_gradient:
            ctx.save_for_backward(gradient)
        if compute_entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, logps_gradient, _):
        (gradient,) = ctx.saved_tensors
        return gradient * logps_gradient[:, None].to(gradient.dtype), None, None, None, None


@torch.no_grad()
def has_frozen_linear_head(model: PreTrainedModel) -> bool:
    """Whether the logits are `hidden @ W.T` with a W that is not trained: no bias, scale, soft cap or adapter.

    Tried out on two tokens, so that no list of architectures has to be kept, and on hidden states large enough for a
    soft cap to bend their logits.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or type(weight) is not nn.Parameter or weight.requires_grad or not weight.numel():
        return False
    if head.bias is not None:
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
