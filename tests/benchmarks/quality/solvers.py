"""Models that know a recipe: each reads the conversation alone and answers it.

They are written against the words of the prompts, and share nothing with the recipes.
"""

import json
import re
from collections import Counter, defaultdict


def needles(messages):
    text, question = split(messages)
    found = defaultdict(list)
    for _, key, value in re.findall(r"special magic (\w+) for (\S+) is: (\S+)\.", text):
        found[key].append(value)
    listed = re.search(r" for (.*) does the text", question)[1]
    keys = [key for key in re.split(r",? and |, ", listed) if key]
    return "; ".join(value for key in keys for value in found[key])


def variable_tracking(messages):
    text, question = split(messages)
    value = re.search(r"the value (\d+)\?", question)[1]
    holds = {}
    for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
        holds[name] = number or holds[other]
    return " ".join(name for name, held in holds.items() if held == value)


def common_words(messages):
    text, question = split(messages)
    number = int(re.search(r"Which (\d+) words", question)[1])
    counts = Counter(re.findall(r"\d+\. (\w+)", text))
    return " ".join(word for word, _ in counts.most_common(number))


def frequent_words(messages):
    text, question = split(messages)
    number = int(re.search(r"Which (\d+) words", question)[1])
    counts = Counter(text.split("\n\n", 1)[1].split())
    del counts["..."]
    return " ".join(word for word, _ in counts.most_common(number))


def graphwalks(messages):
    text, question = split(messages)
    edges = re.findall(r"^(\w+) -> (\w+)$", text, re.MULTILINE)
    if parent := re.search(r"parents of (\w+)\?", question):
        nodes = {a for a, b in edges if b == parent[1]}
    else:
        depth, start = re.search(r"distance (\d+) from (\w+)\?", question).groups()
        distance = {start: 0}
        for far in range(int(depth)):
            near = {node for node, d in distance.items() if d == far}
            for a, b in edges:
                if a in near:
                    distance.setdefault(b, far + 1)
        nodes = {node for node, d in distance.items() if d == int(depth)}
    return f"I walk.\nFinal Answer: [{', '.join(nodes)}]"


def mrcr(messages):
    prefix, number, form, noun = re.match(
        r"Write (\w+) and, .* number (\d+) of the texts that you wrote as a (.+) about "
        r"the (\w+)\. Write nothing else",
        messages[-1]["content"],
    ).groups()
    request = f"Write a {form} about the {noun}."
    contents = [message["content"] for message in messages]
    answers = [b for a, b in zip(contents, contents[1:], strict=False) if a == request]
    return prefix + answers[int(number) - 1]


def path_traversal(messages):
    text, question = split(messages)
    steps = {}
    for a, means, b in re.findall(r"From (\w+) there is a (\w+) to (\w+)\.", text):
        steps[a] = means, b
    at, end = re.search(r"route from (\w+) to (\w+)", question).groups()
    lines = []
    while at != end:
        means, after = steps[at]
        lines.append(f"{at}, {means}, {after}")
        at = after
    return "\n".join(["<answer>", *lines, "</answer>"])


def countdown(messages):
    text = messages[-1]["content"]
    last = re.findall(r"Numbers: \[(.*?)\], target: (\d+)", text)[-1]
    numbers, target = [int(n) for n in last[0].split(", ")], int(last[1])
    lines = []

    def search(left):
        for first in range(len(left) - 1):
            for second in range(first + 1, len(left)):
                low, high = sorted((left[first], left[second]))
                others = left[:first] + left[first + 1 : second] + left[second + 1 :]
                for done in tried(low, high, others):
                    if done is not None:
                        return done
        return None

    def tried(low, high, others):
        whole = low and high % low == 0
        for sign, result in (
            ("+", high + low),
            ("-", high - low),
            ("*", high * low),
            ("/", high // low if whole else None),
        ):
            if result is None:
                lines.append(f"{high} / {low}; not whole")
                continue
            equation = f"{high} {sign} {low} = {result}"
            if result > 2000:
                lines.append(f"{equation}; above 2000")
            elif others:
                lines.append(f"{equation}; left {[result, *others]}")
                steps = search([result, *others])
                yield steps and [equation, *steps]
            elif result == target:
                lines.append(f"{equation}; found")
                yield [equation]
            else:
                lines.append(f"{equation}; not {target}")

    steps = search(numbers)
    return "\n".join(["<answer>", *lines, "Solution:", *steps, "</answer>"])


def json_kv(messages):
    text, question = split(messages)
    key = re.search(r'the key "(.*?)"', question)[1]
    return f"It is {json.loads(text.partition('.')[2])[key]}."


def multi_turn(messages):
    name = re.search(r"the locker of (\w+)\?", messages[-1]["content"])[1]
    told = "\n".join(message["content"] for message in messages)
    return re.search(rf"locker of {name} has the code (\d+)", told)[1]


def split(messages):
    """The last paragraph of the prompt is the question."""
    text, _, question = messages[-1]["content"].rpartition("\n\n")
    return text, question


SOLVERS = {
    **dict.fromkeys(
        ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1")
        + ("niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery"),
        needles,
    ),
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "graphwalks_bfs": graphwalks,
    "graphwalks_parents": graphwalks,
    "mrcr": mrcr,
    "countdown": countdown,
    "path_traversal": path_traversal,
    "json_kv": json_kv,
    "multi_turn": multi_turn,
}
