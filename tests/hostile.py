"""For tests with hostile bytes: they may be refused, in one line, or give a result."""

from collections.abc import Callable

from hypothesis import HealthCheck, settings

from trainer.errors import UserError


def message_of(call: Callable[[], object]) -> str:
    """Return the message if ``call`` raises a UserError, "" if it returns; any other exception goes on."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def fuzz(max_examples: int) -> settings:
    """Return settings of hypothesis for tests that write their bytes to ``tmp_path``."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
