"""Numbers of 8 and 4 bits with a scale per block, as bf16.

Letters: m, n a matrix's rows and columns · g blocks along a dim.
"""

import torch
from torch import Tensor

MXFP4_BLOCK = 32  # values that share a scale
MXFP4_BYTES = MXFP4_BLOCK // 2
# e2m1: one sign, two exponent and one mantissa bit; the upper eight are the lower ones' negatives
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scale_values(scales: Tensor) -> Tensor:
    """Scales as fp32; a byte is an exponent (E8M0): 2^(byte - 127), 255 is NaN."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def dequantize_blocks(
    values: Tensor, scales: Tensor, *, block: tuple[int, int], skipped: tuple[int, int] = (0, 0)
) -> Tensor:
    """Each block of a matrix times its scale, in fp32, rounded to bf16.

    Args:
        values: [..., m, n] of any float type; may be cut out of a larger matrix.
        scales: [..., g, g] of the blocks that the values lie in, float or E8M0 bytes.
        block: rows and columns of a block; the last ones may be smaller.
        skipped: rows and columns of the first block that the values lack.

    Returns:
        [..., m, n] bf16.
    """
    m, n = values.shape[-2:]
    lead = values.shape[:-2].numel()
    columns = (torch.arange(n) + skipped[1]) // block[1]
    wide = scale_values(scales)[..., columns]  # [..., g, n]
    wide = wide.reshape(lead, *wide.shape[-2:])
    flat = values.reshape(lead, m, n)
    result = torch.empty(flat.shape, dtype=torch.bfloat16)
    for number, matrix in enumerate(flat):  # block by block: never all of it in fp32
        for row, scale in enumerate(wide[number]):
            first = max(0, row * block[0] - skipped[0])
            last = min(m, (row + 1) * block[0] - skipped[0])
            result[number, first:last] = matrix[first:last].float() * scale
    return result.reshape(values.shape)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Two values a byte, the low four bits first; each 32 share an E8M0 scale.

    Args:
        blocks: [..., g, 16] bytes.
        scales: [..., g] bytes.

    Returns:
        [..., 32 · g] bf16.
    """
    digits = torch.tensor(_E2M1 + tuple(-value for value in _E2M1))
    byte = torch.arange(256)
    pairs = torch.stack((digits[byte & 15], digits[byte >> 4]), dim=-1)  # [256, 2]
    values = pairs.index_select(0, blocks.flatten().int()).reshape(-1, MXFP4_BLOCK)
    values *= scale_values(scales).reshape(-1, 1)
    return values.to(torch.bfloat16).reshape(*scales.shape[:-1], -1)
