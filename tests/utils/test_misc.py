"""retry: how often it calls, what it reports and returns."""

import pytest

from mblm.utils.misc import retry


@pytest.mark.parametrize(
    "num_retries, num_failures, num_calls, result",
    [(0, 0, 1, "done"), (0, 1, 1, None), (2, 1, 2, "done"), (2, 2, 3, "done"), (2, 9, 3, None)],
)
def test_calls_until_it_succeeds_or_the_retries_are_used_up(
    num_retries, num_failures, num_calls, result
):
    calls, errors = [], []

    @retry(num_retries, on_error=lambda error, left: errors.append((str(error), left)))
    def work(*args, **kwargs):
        """Works."""
        calls.append((args, kwargs))
        if len(calls) <= num_failures:
            raise RuntimeError(f"call {len(calls)}")
        return "done"

    assert work.__doc__ == "Works."
    assert work(1, key=2) == result
    assert calls == [((1,), {"key": 2})] * num_calls
    assert errors == [
        (f"call {i + 1}", num_retries - i) for i in range(min(num_failures, num_calls))
    ]


def test_an_interrupt_is_not_retried():
    @retry(3)
    def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()


def test_what_is_no_number_of_retries_is_refused():
    with pytest.raises(TypeError, match="num_retries: expected an integer, got '3'"):
        retry("3")
    with pytest.raises(ValueError, match="num_retries: expected a number >= 0, got -1"):
        retry(-1)
