"""What can go wrong through no fault of the code: reported in one sentence, never as a traceback.

    raise UserError(f"{path}: no such audio file")          # `system.command.run` prints it, exit code 2

    with as_user_error(f"{path}: cannot be read as JSON"):  # whatever goes wrong inside becomes a UserError
        value = json.loads(text)
"""
import contextlib

MAX_REASON = 150    # characters of another library's message that are passed on


class UserError(ValueError):
    """A mistake that the caller can put right: one sentence that names the culprit and the way out."""


@contextlib.contextmanager
def as_user_error(sentence: str):
    """Turns any exception inside into a UserError: this sentence, then the exception in parentheses.

    For calls of other libraries, whose errors are of all kinds. A UserError passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:MAX_REASON]
        raise UserError(f"{sentence} ({type(error).__name__}: {reason})") from None


@contextlib.contextmanager
def naming(culprit):
    """Puts the name of a file before what a UserError inside says of what was read from it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{culprit}: {error}") from None
