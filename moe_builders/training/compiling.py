"""torch.compile for a decoder, layer by layer, and what it needs."""

from torch import nn

from moe_builders.errors import InputError


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile each layer in place; parameter names stay as they are.

    Raises:
        InputError: inductor finds no C++ compiler.
    """
    require_cpp_compiler("compile=true", "set compile=false")
    for layer in layers:
        layer.compile()


def require_cpp_compiler(who: str, otherwise: str) -> None:
    """Stop before torch.compile does, whose own message has many lines.

    Args:
        who: needs the compiler, as the message says.
        otherwise: what else to do than to install one.

    Raises:
        InputError: inductor finds no C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # heavy: only when asked for
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            f"{who} needs a C++ compiler and found none: install one (Debian: apt-get install "
            f"g++) or {otherwise}"
        ) from error
