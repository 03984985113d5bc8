"""torch.compile for a decoder, layer by layer."""

from torch import nn

from moe_builders.errors import InputError


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile each layer in place; parameter names stay as they are.

    Raises:
        InputError: inductor finds no C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # heavy: only when asked for
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "compile=true needs a C++ compiler and found none: install one (Debian: apt-get "
            "install g++) or set compile=false"
        ) from error
    for layer in layers:
        layer.compile()
