"""Linear layers as the decoder multiplies by them: joined, and in the order that the machine reads best."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# With up to so many rows a bfloat16 matrix on a CPU is bound by reading it, so that 8 bits win; above it, arithmetic
# is what counts, and bfloat16 has the instructions for it.
FEW_ROWS = 4
PART = 1024  # outputs that are rounded to 8 bits at a time

Matrix = Callable[[Tensor], Tensor]  # (N, in) → (N, out)


def join(*linears: nn.Linear, eight_bit: bool = False, keep: bool = False) -> Matrix:
    """One multiplication in place of several linear layers that read the same input; their outputs side by side.

    The layers give up their weights to it, in float32 for views of the same memory, in bfloat16 on a CPU for nothing;
    with `keep`, for weights that others share, they keep them. Quantised layers run as they are.
    """
    if any(type(linear) is not nn.Linear for linear in linears):
        return lambda hidden_ND: torch.cat([linear(hidden_ND) for linear in linears], dim=-1)
    weight_OI = _side_by_side([linear.weight.data for linear in linears])
    bias_O = None if linears[0].bias is None else _side_by_side([linear.bias.data for linear in linears])
    on_cpu = weight_OI.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and weight_OI.dtype == torch.bfloat16:
        left, multiply = weight_OI.new_empty(0, weight_OI.shape[1]), _packed(weight_OI, bias_O, eight_bit=eight_bit)
    elif on_cpu and weight_OI.dtype == torch.float32:
        weight_IO = weight_OI.t().contiguous()
        left, multiply = weight_IO.t(), _transposed(weight_IO, bias_O)
    else:
        left, multiply = weight_OI, lambda hidden_ND: F.linear(hidden_ND, weight_OI, bias_O)
    if not keep:
        sizes = [len(linear.weight) if len(left) else 0 for linear in linears]
        for linear, part_OI in zip(linears, left.split(sizes), strict=True):
            linear.weight.data = part_OI
    return multiply


def beside(matrix: Matrix, *linears: Any) -> Matrix:
    """The same with what the adapters of these layers add to their outputs: one small multiplication in, one out."""
    added = [getattr(linear, "low_rank", None) for linear in linears]
    if not any(added):
        return matrix
    down_RI = torch.cat([low_rank.down_RI for low_rank in added if low_rank])
    # A layer without an adapter adds nothing to its outputs.
    ups = [
        low_rank.up_OR if low_rank else down_RI.new_empty(linear.out_features, 0)
        for linear, low_rank in zip(linears, added, strict=True)
    ]
    down_IR, up_RO = down_RI.t().contiguous(), torch.block_diag(*ups).t().contiguous()
    return lambda hidden_ND: torch.addmm(matrix(hidden_ND), hidden_ND @ down_IR, up_RO)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _transposed(weight_IO: Tensor, bias_O: Tensor | None) -> Matrix:
    """torch.mm takes 0.4 to 0.7 times as long as the linear function (1 to 8 rows, float32, AVX-512)."""
    if bias_O is None:
        return lambda hidden_ND: torch.mm(hidden_ND, weight_IO)
    return lambda hidden_ND: torch.addmm(bias_O, hidden_ND, weight_IO)


def _packed(weight_OI: Tensor, bias_O: Tensor | None, *, eight_bit: bool) -> Matrix:
    """In the order that the CPU's bfloat16 instructions want, found once instead of at every call: half the time.

    `eight_bit`: few rows are multiplied by 8-bit copies instead, with one scale for each output.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    if not eight_bit:
        return lambda hidden_ND: torch.ops.mkldnn._linear_pointwise(hidden_ND, packed, bias_O, "none", [], "")
    eight_OI, scale_O = _rounded(weight_OI)

    def multiply(hidden_ND: Tensor) -> Tensor:
        if len(hidden_ND) > FEW_ROWS:
            return torch.ops.mkldnn._linear_pointwise(hidden_ND, packed, bias_O, "none", [], "")
        product_NO = torch._weight_int8pack_mm(hidden_ND, eight_OI, scale_O)
        return product_NO if bias_O is None else product_NO + bias_O

    return multiply


def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit numbers and what to multiply each output by, computed in parts: a whole head in float32 would be the most
    memory that loading takes."""
    eight_OI = torch.empty_like(weight_OI, dtype=torch.int8)
    scale_O = weight_OI.new_empty(len(weight_OI))
    for some_OI, eight, scale in zip(*(whole.split(PART) for whole in (weight_OI, eight_OI, scale_O)), strict=True):
        scale.copy_((some_OI.float().abs().amax(dim=1) / 127).clamp(min=1e-12))
        eight.copy_((some_OI.float() / scale.float()[:, None]).round_().clamp_(-127, 127))
    return eight_OI, scale_O
