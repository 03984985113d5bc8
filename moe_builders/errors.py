"""The one exception for a user's mistake: recipes print it as a sentence, without a traceback."""


class InputError(ValueError):
    """A value from outside (config, file, argument) is wrong.

    The message is one sentence that names the value, the limit and the remedy.
    """
