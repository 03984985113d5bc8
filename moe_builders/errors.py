"""The one exception for a user's mistake: recipes print it as a sentence, without a traceback."""

from pathlib import Path

_LFS = b"version https://git-lfs"


class InputError(ValueError):
    """A value from outside (config, file, argument) is wrong.

    The message is one sentence that names the value, the limit and the remedy.
    """


def lfs_pointer(path: Path) -> str:
    """The sentence for a file that git-lfs has not fetched yet; "" for any other."""
    with path.open("rb") as file:
        if not file.read(len(_LFS)).startswith(_LFS):
            return ""
    return f"{path} is git-lfs's pointer to the file, not the file: run git lfs pull in its folder"
