"""The one exception that means "you can fix this": its text is shown to the user alone, without a traceback."""


class UserError(ValueError):
    """A mistake in a recipe, an input file or a command line; the message names the place and the cure."""


class Unfinished(Exception):
    """A stage stopped in order before its end. What it has is kept; the sentence says what is missing, and the cure."""
