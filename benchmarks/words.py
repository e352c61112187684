"""Words of a benchmark, `key=value`: each that nobody would read is refused."""

import sys


def read(words: list[str], defaults: dict) -> dict:
    """The options that words give, each of the type of its default; an error's exit otherwise."""
    options, others = take(words, defaults)
    if others:
        sys.exit(f"error: cannot read {others[0]!r}; the words are {', '.join(f'{key}=...' for key in defaults)}")
    return options


def take(words: list[str], defaults: dict) -> tuple[dict, list[str]]:
    """As `read`, and beside it the words of other keys, which go to the command that a benchmark runs."""
    options, others = dict(defaults), []
    for word in words:
        key, equals, value = word.partition("=")
        if key not in defaults:
            others.append(word)
            continue
        try:
            if not equals:
                raise ValueError
            options[key] = type(defaults[key])(value)
        except ValueError:
            sys.exit(
                f"error: {word!r} gives no {type(defaults[key]).__name__}; say {key}=..., as {key}={defaults[key]}"
            )
    return options, others
