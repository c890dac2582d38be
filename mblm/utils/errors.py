"""Say what went wrong in one line."""

PYDANTIC_LINK = "errors.pydantic.dev"


def describe(error: BaseException) -> str:
    """An error as one line: for files their name and the reason, without links to pages."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = (str(error) or type(error).__name__).splitlines()
    return " ".join(" ".join(line for line in lines if PYDANTIC_LINK not in line).split())
