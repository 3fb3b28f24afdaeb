"""From the logits of a batch to one token for each of its conversations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_app.engine import Sampling

CANDIDATES = 256  # likeliest tokens that are looked at first; sorting a whole vocabulary takes ten times as long


def choose(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    *,
    read: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """A token for each row by repetition penalty (Keskar et al. 2019), temperature, top-k and nucleus (top-p, Holtzman
    et al. 2020). Temperature 0 takes the best.

    `logits_BV`: float32, changed by the penalty. `read`: the tokens that each conversation holds, which the penalty is
    for. A row's choice depends on its own logits and its own generator (on the CPU) alone.
    """
    _penalise(logits_BV, samplings, read)
    best_B = logits_BV.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        chosen = _draw(logits_BV[drawn], [samplings[row] for row in drawn], [generators[row] for row in drawn])
        best_B[drawn] = chosen
    return best_B.tolist()


def _penalise(logits_BV: Tensor, samplings: Sequence[Sampling], read: Sequence[Sequence[int]]) -> None:
    for row, sampling in enumerate(samplings):
        if sampling.repetition_penalty != 1:
            tokens = torch.tensor(sorted({token for token in read[row] if token >= 0}), device=logits_BV.device)
            logits = logits_BV[row, tokens]
            penalty = sampling.repetition_penalty
            logits_BV[row, tokens] = torch.where(logits > 0, logits / penalty, logits * penalty)


def _draw(logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    device, vocabulary = logits_BV.device, logits_BV.shape[-1]
    temperature_B1 = torch.tensor([[max(s.temperature, 1e-3)] for s in samplings], device=device)
    top_p_B1 = torch.tensor([[s.top_p] for s in samplings], device=device)
    top_k_B1 = torch.tensor([[s.top_k or vocabulary] for s in samplings], device=device)
    uniform_B1 = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(device)
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B1  # cannot overflow
    limits = scaled_BV.logsumexp(dim=-1, keepdim=True), uniform_B1, top_p_B1, top_k_B1
    chosen_B, enough_B = _draw_among(min(CANDIDATES, vocabulary), scaled_BV, *limits)
    short_B = ~enough_B
    if bool(short_B.any()):
        chosen_B[short_B], _ = _draw_among(vocabulary, scaled_BV[short_B], *(limit_B1[short_B] for limit_B1 in limits))
    return chosen_B


def _draw_among(
    count: int, scaled_BV: Tensor, total_B1: Tensor, uniform_B1: Tensor, top_p_B1: Tensor, top_k_B1: Tensor
) -> tuple[Tensor, Tensor]:
    """A token for each row from its `count` likeliest, and whether these were enough to choose it from."""
    likeliest_BC, tokens_BC = scaled_BV.topk(count, dim=-1)
    probability_BC = (likeliest_BC - total_B1).exp() * (torch.arange(count, device=scaled_BV.device) < top_k_B1)
    seen_B1 = probability_BC.sum(dim=-1, keepdim=True)
    all_seen_B1 = (top_k_B1 <= count) | (count == scaled_BV.shape[-1])
    nucleus_B1 = top_p_B1 * torch.where(all_seen_B1, seen_B1, 1.0)
    enough_B1 = all_seen_B1 | ((top_k_B1 >= scaled_BV.shape[-1]) & (seen_B1 >= nucleus_B1))
    likelier_BC = probability_BC.cumsum(dim=-1) - probability_BC
    kept_BC = probability_BC * (likelier_BC < nucleus_B1)
    reached_BC = kept_BC.cumsum(dim=-1)
    index_B1 = (reached_BC <= uniform_B1 * reached_BC[:, -1:]).sum(dim=-1, keepdim=True)
    last_B1 = (kept_BC > 0).sum(dim=-1, keepdim=True) - 1  # where rounding makes the last step of the sum unreachable
    return tokens_BC.gather(-1, index_B1.minimum(last_B1))[:, 0], enough_B1[:, 0]
