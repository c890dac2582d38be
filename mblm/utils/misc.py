"""Call a function again when it fails."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from mblm.utils.checks import check_integer

P = ParamSpec("P")
T = TypeVar("T")


def retry(
    num_retries: int,
    on_error: Callable[[Exception, int], Any] | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Decorate a function so that it is called again, up to `num_retries` times, when it raises.

    Args:
        num_retries: Calls after the first one.
        on_error: Called after every failure with the exception and the number of retries left.

    Returns:
        A decorator. The decorated function returns what the first successful call returns, or
        None when all have failed.

    Raises:
        TypeError: `num_retries` is no integer.
        ValueError: `num_retries` is negative.
    """
    check_integer("num_retries", num_retries, 0)

    def decorate(function: Callable[P, T]) -> Callable[P, T | None]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
            for retries_left in range(num_retries, -1, -1):
                try:
                    return function(*args, **kwargs)
                except Exception as error:
                    if on_error is not None:
                        on_error(error, retries_left)
            return None

        return call

    return decorate
