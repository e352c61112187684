"""Options of a benchmark from its command line, as key=value; unknown keys and wrong values are refused."""

import sys


def parse(words: list[str], defaults: dict) -> dict:
    """The options, each with the type of its default; exits with a message if a word is not key=value of these keys."""
    options, others = parse_known(words, defaults)
    if others:
        sys.exit(f"error: cannot read {others[0]!r}; the options are {', '.join(f'{key}=...' for key in defaults)}")
    return options


def parse_known(words: list[str], defaults: dict) -> tuple[dict, list[str]]:
    """Like `parse`, but words with other keys are returned too, for the command that the benchmark runs."""
    options, others = dict(defaults), []
    for word in words:
        key, equals, value = word.partition("=")
        if key not in defaults:
            others.append(word)
            continue
        kind = type(defaults[key])
        try:
            if not equals:
                raise ValueError
            options[key] = kind(value)
        except ValueError:
            sys.exit(f"error: {word!r} has no {kind.__name__} value; write it as {key}={defaults[key]}")
    return options, others
