"""Print one task of a suite, for a reader."""

import argparse
import re

from benchmarks.quality.suites import (
    SUITES,
    TURN_END,
    flatten,
    make,
    read_text,
    whole_conversation,
)


def count_words(text: str) -> int:
    """Words and punctuation marks, in place of a model's tokens."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.suites")
    parser.add_argument("--suite", help="one of those that are listed without it")
    parser.add_argument(
        "--length", type=int, default=2048, help="words and punctuation marks"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", help="a file whose text is the haystack of an essay")
    options = parser.parse_args(arguments)
    if options.suite is None:
        for name, suite in SUITES.items():
            print(f"{name:<20}{suite.asks} ({suite.source})")
        return
    try:
        settings = {"text": read_text(options.text)} if options.text else {}
        task = make(
            options.suite, options.length, options.seed, count_words, **settings
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    conversation = whole_conversation(task)
    for message in conversation:
        print(f"[{message['role']}]\n{message['content']}\n")
    print(f"[answer]\n{task.answer.split(TURN_END)[-1]}\n")
    print(
        f"{task.name}: {count_words(flatten(conversation))} words and marks; "
        f"{task.metric} against {len(task.references)} references; "
        f"max_new_tokens {task.max_new_tokens}"
    )


if __name__ == "__main__":
    main()
