"""The one error that is the user's to mend: shown as one line, exit code 2 (see ``launch/_main.py``)."""


class UserError(Exception):
    """Something a user got wrong. The message is one line that names the field or file and the value."""
