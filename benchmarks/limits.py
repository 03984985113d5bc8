"""What the hardware allows for a MoE layer: FLOPs and bytes of the fewest kernels, arithmetic.

Letters: t tokens · k experts_per_token · a = t·k assignments · e experts · d dim · h hidden_dim.

Eight kernels: up product with the gather and the activation in it, down product, combine; backward
the gradient of the hidden rows (with the activation's), of down, of the rows, of gate and up, and
again a combine. Each takes at least its FLOPs over the fastest product's rate, and at least its
bytes over a copy's.
"""

from layer_ways import Size


def kernel_set(
    size: Size, tokens: int, *, item: int, backward: bool
) -> list[tuple[str, float, float]]:
    """(name, FLOPs, bytes) of each kernel.

    Args:
        size: of the layer.
        tokens: t.
        item: bytes of a number.
        backward: the backward's too.
    """
    d, h = size.dim, size.hidden
    a, w = tokens * size.k, size.experts * size.dim * size.hidden
    x, hidden, z, out = a * d, a * h, 2 * a * h, tokens * d  # rows [a, d], [a, h], [a, 2h]; [t, d]
    one = 2.0 * a * d * h
    found = [
        ("up", 2 * one, 2 * w + x + z + hidden),
        ("down", one, w + hidden + x),
        ("combine", 0.0, x + out),
    ]
    if backward:
        found += [
            ("hidden rows' gradient", one, w + x + z + z + hidden),
            ("down's gradient", one, w + x + hidden),
            ("rows' gradient", 2 * one, 2 * w + z + x),
            ("up's gradient", 2 * one, 2 * w + x + z),
            ("combine, backward", 0.0, x + out),
        ]
    return [(name, flops, float(item * numbers)) for name, flops, numbers in found]


def limit_seconds(
    size: Size, tokens: int, *, item: int, backward: bool, rates: dict[str, float]
) -> float:
    """Σ over the kernels of the longer of computing and moving.

    Args:
        size, tokens, item, backward: of ``kernel_set``.
        rates: of ``measuring.peak_rates``.
    """
    return sum(
        max(flops / rates["flops_per_second"], size_ / rates["bytes_per_second"])
        for _, flops, size_ in kernel_set(size, tokens, item=item, backward=backward)
    )
