"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

import torch
import torch.nn.functional as F


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise in fp32, round once to the input's dtype, then scale, as Llama does.

    Args:
        x: [..., H], fp32 or bf16.
        weight: [H], any floating dtype.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of `x`.
    """
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm_reference`, through torch's fused operation on a GPU (which scales before it rounds)."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_reference(x, weight, eps)
