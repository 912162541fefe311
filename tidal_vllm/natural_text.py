"""A long text in plain English that is always at hand."""


def python_documentation() -> str:
    """What `help()` says of the language, about 480,000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())
