"""`vllm serve --attention-backend tidal`, from start to Ctrl-C, as a client sees it.

One server for all tests, the last of which stop it and read its whole log.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import openai
import pytest

from tests.support.clients import NUM_PLAIN, NUM_STREAMS, Clients
from tests.support.server import Server, command, wait_until, warnings
from tidal_vllm.planted import PlantedPrompt, make_prompt

# The last tests stop the server of all others.
pytestmark = pytest.mark.random_order(disabled=True)

MAX_LEN = 2048
BUDGET = 256
TIDAL = {"token_budget": BUDGET, "select_layers": [2]}


@pytest.fixture(scope="module")
def server(served, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    words = command(served.folder, TIDAL, "--max-model-len", str(MAX_LEN))
    words += ["--served-model-name", "planted"]
    no_compiler = {
        "CXX": "/nonexistent/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
    }
    server = Server(log, words, VLLM_SERVER_DEV_MODE="1", **no_compiler)
    try:
        server.wait_for_start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def ask(served):
    """`ask(num_tokens, seed=0)`: a planted question of that many tokens."""

    def make(num_tokens: int, seed: int = 0, chain_len: int = 8) -> PlantedPrompt:
        return make_prompt(served.spec, num_tokens, 0.5, seed, chain_len)

    return make


def complete(server: Server, prompt, **kwargs):
    arguments = {"max_tokens": 16, "temperature": 0.0} | kwargs
    return server.client.completions.create(model="planted", prompt=prompt, **arguments)


def chat(server: Server, text: str, **kwargs):
    return server.client.chat.completions.create(
        model="planted",
        messages=[{"role": "user", "content": text}],
        max_tokens=16,
        temperature=0.0,
        **kwargs,
    )


def assert_serves(server: Server, prompt: PlantedPrompt) -> None:
    assert complete(server, prompt.text).choices[0].text == " " + prompt.answer_text


def test_completion_of_text(server, ask):
    prompt = ask(1000)
    reply = complete(server, prompt.text)
    assert reply.choices[0].text == " " + prompt.answer_text
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == 1000
    assert reply.usage.completion_tokens == len(prompt.answer_token_ids)


def test_completion_of_tokens(server, ask):
    prompt = ask(1000)
    reply = complete(
        server, prompt.prompt_token_ids, extra_body={"return_token_ids": True}
    )
    assert reply.choices[0].token_ids == prompt.answer_token_ids


def test_decodes_sparsely(server, ask):
    """Each decoded token reads its context in full, in SPARSE layers the budget."""
    before = server.counters()
    prompt = ask(1200, seed=1)
    assert_serves(server, prompt)
    after = server.counters()
    grown = {key: after[key] - before[key] for key in after}
    steps = len(prompt.answer_token_ids) - 1  # the first one comes from the prefill
    assert grown["sparse_steps"] == grown["decode_tokens"] == steps
    assert grown["dense_steps"] == 0
    assert grown["context_tokens"] == sum(range(1201, 1201 + steps))
    assert 0 < grown["sparse_context_tokens"] <= BUDGET * steps


def test_decodes_short_prompts_densely(server, ask):
    before = server.counters()
    assert_serves(server, ask(100))
    after = server.counters()
    assert after["sparse_steps"] == before["sparse_steps"]
    assert after["dense_steps"] > before["dense_steps"]


def test_chat(server, ask):
    prompt = ask(1000, seed=2)
    (choice,) = chat(server, prompt.text).choices
    assert choice.message.content.strip() == prompt.answer_text
    assert choice.finish_reason == "stop"


def test_streamed_completion(server, ask):
    prompt = ask(1000, seed=2)
    chunks = list(complete(server, prompt.text, stream=True))
    words = [chunk.choices[0].text for chunk in chunks]
    assert [word.strip() for word in words if word] == prompt.answer_text.split()
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"


def test_streamed_chat(server, ask):
    prompt = ask(1000, seed=2)
    chunks = chat(server, prompt.text, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == prompt.answer_text


def test_logprobs(server, ask):
    prompt = ask(1000)
    logprobs = complete(server, prompt.text, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == [*prompt.answer_text.split(), "<eos>"]
    assert logprobs.token_logprobs == pytest.approx([0.0] * 9, abs=1e-3)
    for word, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert len(top) == 2
        assert max(top, key=top.get) == word


def test_two_answers_to_one_prompt(server, ask):
    prompt = ask(1000)
    reply = complete(server, prompt.text, n=2, temperature=1.0, seed=7)
    assert sorted(choice.index for choice in reply.choices) == [0, 1]
    assert {choice.text for choice in reply.choices} == {" " + prompt.answer_text}


def test_stop_string(server, ask):
    prompt = ask(1000)
    first, second, third, *_ = prompt.answer_text.split()
    (choice,) = complete(server, prompt.text, stop=[f" {third}"]).choices
    assert choice.text == f" {first} {second}"
    assert choice.finish_reason == "stop"


def test_token_limit(server, ask):
    prompt = ask(1000)
    (choice,) = complete(server, prompt.text, max_tokens=3).choices
    assert choice.text.split() == prompt.answer_text.split()[:3]
    assert choice.finish_reason == "length"


def test_concurrent_requests_of_mixed_lengths(server, ask):
    """Below and above the budget, and more of them than may run at once."""
    sizes = [40, 1500, 255, 257, 600, 90, 1100, 300, 60, 800]
    prompts = [ask(size, seed=size, chain_len=4 + i) for i, size in enumerate(sizes)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = list(pool.map(lambda p: complete(server, p.text), prompts))
    assert [reply.choices[0].text for reply in replies] == [
        " " + prompt.answer_text for prompt in prompts
    ]


def test_prompt_as_long_as_the_model_allows(server, ask):
    prompt = ask(MAX_LEN - 9)
    reply = complete(server, prompt.prompt_token_ids, max_tokens=9)
    assert reply.choices[0].text == " " + prompt.answer_text


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_prompt_longer_than_the_model(server, ask, served, form):
    prompt = make_prompt(served.spec, MAX_LEN + 1, 0.5, seed=3)
    long = prompt.text if form == "text" else prompt.prompt_token_ids
    with pytest.raises(openai.BadRequestError) as refused:
        complete(server, long)
    assert refused.value.status_code == 400
    assert f"maximum context length is {MAX_LEN} tokens" in refused.value.message
    assert_serves(server, ask(300))


def test_refused_request_names_what_is_wrong(server, ask):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        complete(server, ask(300).text, temperature=-1.0)
    assert_serves(server, ask(300))


def test_client_that_hangs_up_in_mid_answer(server, ask):
    prompt = ask(1000)
    endless = {"max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    stream = complete(server, prompt.text, stream=True, **endless)
    words = [next(stream).choices[0].text.strip() for _ in range(3)]
    assert words == prompt.answer_text.split()[:3]
    assert not server.is_idle()
    before = server.metric("generation_tokens_total")
    stream.close()
    wait_until("the request is aborted", server.is_idle)
    assert server.metric("generation_tokens_total") < before + 900
    assert_serves(server, ask(300, seed=4))


class Ended(NamedTuple):
    code: int
    log: str
    finish_reasons: list[str]


@pytest.fixture(scope="module")
def ended(server, served) -> Iterator[Ended]:
    """What is left of the server after Ctrl-C, with clients of every kind."""
    assert len(server.processes()) > 1, "no engine of its own"
    text = make_prompt(served.spec, 300, 0.5, seed=5).text
    clients = Clients(server, "planted", text, MAX_LEN - 300)
    code = server.press_ctrl_c()
    yield Ended(code, server.log.read_text(), clients.finish_reasons())
    clients.close()


def test_ends_well(ended, server):
    assert ended.code == 0
    assert "Application shutdown complete." in ended.log
    wait_until("all its processes end", lambda: not server.processes())


def test_ends_every_request(ended):
    assert ended.finish_reasons == ["abort"] * (NUM_STREAMS + NUM_PLAIN)


def test_lets_go_of_clients_that_do_not_read(ended):
    assert "Closing the connections of" in ended.log


def test_logs_no_warning(ended):
    asked_for = "Exception caught. Request id:", "Development endpoints are enabled"
    assert [
        line
        for line in warnings(ended.log)
        if not any(message in line for message in asked_for)
    ] == []


def test_logs_the_plan_once(ended):
    for line in (
        "TIDAL sparse decoding of",
        "SELECT 1     2",
        "SPARSE 3     3-5",
        "budget       256 tokens per set: 64 blocks of 4, scope sequence",
        "sparse above 256 tokens of context",
    ):
        assert ended.log.count(line) == 1, line
