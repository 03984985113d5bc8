"""torchtune's metric loggers, or one's own, from a config."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torchtune.training.metric_logging import DiskLogger, MetricLoggerInterface

from moe_builders.errors import InputError
from moe_builders.instantiate import first_line, instantiate

# what torchtune's own need beside it; asked before one is built, as it would leave a traceback
_NEEDED = {"TensorBoardLogger": "tensorboard", "WandBLogger": "wandb", "CometLogger": "comet_ml"}

_REMEDIES = {
    "WandBLogger": "run wandb login, or set WANDB_MODE=offline",
    "CometLogger": "run comet login",
}


def build_loggers(node: Any, *, output_dir: str) -> list[MetricLoggerInterface]:
    """The loggers of a config; without any, a new text file under ``output_dir/logs``.

    Raises:
        InputError: a logger whose package is not installed, or that cannot be built.
    """
    if node is None:
        return [DiskLogger(log_dir=f"{output_dir}/logs")]
    nodes = node if isinstance(node, list) else [node]
    alone = len(nodes) == 1
    by_path = {"metric_logger" if alone else f"metric_logger[{i}]": n for i, n in enumerate(nodes)}
    for path, one in by_path.items():
        _check_package(one, path)
    return [_build(one, path) for path, one in by_path.items()]


def _build(node: Any, path: str) -> MetricLoggerInterface:
    try:
        return instantiate(node, path=path)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path} needs what is not installed: {first_line(error)}") from error
    except OSError as error:
        raise InputError(f"{path} cannot write: {first_line(error)}") from error
    except Exception as error:  # a service's own error, such as wandb's without a login
        name = node["_component_"].rpartition(".")[2]
        if name not in _REMEDIES:
            raise
        raise InputError(
            f"{path}: {name} cannot start ({first_line(error)}): {_REMEDIES[name]}"
        ) from error


def _check_package(node: Any, path: str) -> None:
    name = str(node.get("_component_")).rpartition(".")[2] if isinstance(node, Mapping) else ""
    package = _NEEDED.get(name)
    if package is not None and find_spec(package) is None:
        raise InputError(
            f"{path}: {name} needs the package {package}, which is not installed: "
            f"pip install {package.replace('_', '-')}"
        )
