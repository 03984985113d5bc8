"""``key=value`` and ``~key`` of a command line, set in a loaded YAML file."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from moe_builders.errors import InputError
from moe_builders.instantiate import first_line

# keys that hold a component: KEY=package.Name names it, also where the file has none
COMPONENTS = (
    "model", "router", "tokenizer", "dataset", "dataset_val", "optimizer", "lr_scheduler",
    "metric_logger",
)  # fmt: skip


def apply_overrides(loaded: DictConfig, overrides: Sequence[str]) -> None:
    """Set each in turn, in place; see ``config.parse_command_line``.

    Raises:
        InputError: what is no override (what was probably meant is shown), or cannot be set.
    """
    for number, override in enumerate(overrides):
        key, equals, value = override.partition("=")
        removal = override.startswith("~")
        if not (removal or equals) or not key.strip("~") or key.startswith("-"):
            meant = _meant(overrides, number) or "key=value, or ~key"
            raise InputError(f"{override!r} is not an override: write {meant}")
        try:
            if removal:
                _remove(loaded, key[1:])
            else:
                _set(loaded, key, value)
        except InputError:
            raise
        except Exception as error:  # yaml's, and lists' when a key asks for what they do not have
            raise InputError(
                f"{override!r} cannot be set: {one_line(error)} (values are read as YAML"
                f"{_quotes(key, value)})"
            ) from error


def one_line(error: Exception) -> str:
    """What an error of OmegaConf or YAML says, without the text around the place."""
    return first_line(getattr(error, "msg", None) or getattr(error, "problem", None) or error)


def _quotes(key: str, value: str) -> str:
    if value.startswith(("{", "[")):
        return (
            f": put the whole of it into quotes, so that the shell keeps it together, '{key}=...'"
        )
    return "" if '"' in value else f""": a text needs quotes of its own, '{key}="{value}"'"""


def _meant(words: Sequence[str], at: int) -> str | None:
    """The override that blanks around ``=``, or dashes before the key, have made into several."""
    before = words[at - 1] if at else ""
    word, after = words[at], [*words[at + 1 : at + 3], "", ""]
    name = word.lstrip("-")
    if word.startswith("-") and name:
        value = "" if "=" in name or not after[0] else f"={after[0]}"
        return name + value if "=" in name + value else None
    if "=" not in word and before.endswith("=") and before != "=":
        return before + word
    if after[0] == "=" and after[1]:
        return f"{word}={after[1]} (without blanks)"
    return word + after[0] if after[0].startswith("=") and after[0] != "=" else None


def _set(loaded: DictConfig, key: str, value: str) -> None:
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # pyright: ignore
    if isinstance(parsed, str):
        old = OmegaConf.select(loaded, key) if "${" not in parsed else parsed
        if isinstance(old, DictConfig):
            key += "._component_" if "_component_" in old else ""
        elif old is None and key in COMPONENTS:
            parsed = {"_component_": parsed}
    OmegaConf.update(loaded, key, parsed, merge=False)


def _remove(loaded: DictConfig, key: str) -> None:
    parent, _, last = key.rpartition(".")
    if not parent:
        OmegaConf.update(loaded, key, None)
        return
    node = OmegaConf.select(loaded, parent)
    if not isinstance(node, DictConfig) or last not in node:
        raise InputError(f"~{key}: the config has no {key} to take out")
    del node[last]
