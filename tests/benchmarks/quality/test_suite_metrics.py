"""The metrics on outputs that are partly right, and on none."""

import pytest

from benchmarks.quality.suites import METRICS, TURN_END

NODES = ("aa", "bb", "cc")
LINES = ("one", "two", "three", "four")


@pytest.mark.parametrize(
    ("metric", "output", "references", "expected"),
    [
        ("strings_found", "It is ABC, of course.", ("abc",), 1),
        ("strings_found", "abc xyz", ("abc", "def", "xyz", "uvw"), 0.5),
        ("set_f1", "Final Answer: [bb, aa, cc]", NODES, 1),
        ("set_f1", "aa, I think.\nFinal Answer: [aa, bb, dd]\n", NODES, 2 / 3),
        ("set_f1", "Final Answer: [aa, bb, cc, aa]", NODES, 1),
        ("set_f1", "Final Answer: []", NODES, 0),
        ("set_f1", "Final Answer: [aa, bb, cc]\nOr so.", NODES, 0),
        ("set_f1", "aa, bb, cc", NODES, 0),
        ("prefixed_ratio", "Qxabcd", ("Qx", "abcd"), 1),
        ("prefixed_ratio", "Qxabce", ("Qx", "abcd"), 0.75),
        ("prefixed_ratio", "abcd", ("Qx", "abcd"), 0),
        ("prefixed_ratio", " Qxabcd", ("Qx", "abcd"), 0),
        ("leading_lines", "So:\n<answer>\n one\n\ntwo\n", LINES, 0.5),
        ("leading_lines", "<answer>one\nno\nthree\nfour</answer>", LINES, 0.25),
        ("leading_lines", "<answer>one\ntwo\nthree\nfour</answer>", LINES, 1),
        ("leading_lines", "<answer>one\ntwo\nthree\nfour\nmore", LINES, 0.8),
        ("leading_lines", "one\ntwo\nthree\nfour", LINES, 0),
        ("substring_exact_match", "The value: AB-12!", ("a ab12",), 1),
        ("substring_exact_match", "ab1", ("ab12",), 0),
        ("each_turn", TURN_END.join(("is 1", "2", "4")), ("1", "2", "3"), 2 / 3),
        ("each_turn", "1 2 3", ("1", "2", "3"), 1 / 3),
        ("token_f1", "The red house", ("a blue house", "red houses, red"), 0.5),
        ("token_f1", "", ("x",), 0),
        ("token_f1_of_first_line", "\nred\nQuestion: why", ("red",), 1),
        ("rouge_l", "a b c d", ("x", "b d e f"), 0.5),
        ("rouge_l_of_first_line", "b d\nb d", ("b d",), 1),
        ("named_class", "Type: Date\nCity", ("Date", "City", "Date"), 1),
        ("named_class", "City or Date", ("Date", "City", "Date"), 0.5),
        ("named_class", "Due Date", ("Due Date", "Date", "Due Date"), 1),
        ("named_class", "Date", ("Due Date", "Date", "Due Date"), 0),
        ("named_number", "Paragraph 3, not 4", ("Paragraph 3",), 0.5),
        ("named_number", "none", ("3",), 0),
        ("code_similarity", "```\n# so\nx = 12\ny", ("x = 12",), 1),
        ("code_similarity", "# no code", ("x = 1",), 0),
    ],
)
def test_score(metric, output, references, expected):
    assert METRICS[metric](output, references) == pytest.approx(expected)
