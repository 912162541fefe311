"""Fixtures that tests of several folders share: engines, models, answers.

Each is made once per session. vLLM is imported by what needs it only.
"""

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from tests.support.engines import Engines
    from tidal_vllm.planted import PlantedSpec


@pytest.fixture(scope="session")
def vllm_here() -> Iterator[None]:
    """vLLM for many engines in this process.

    They share vLLM's process groups of one rank: those outlive each engine that is
    closed, and end with the session. A new architecture is inspected here, and not in
    a process of its own, which imports for 10 seconds.
    """
    from vllm import envs
    from vllm.model_executor.models import registry
    from vllm.v1.engine import core

    clean_up = core.cleanup_dist_env_and_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        keep = "cleanup_dist_env_and_memory"
        patch.setattr(core, keep, lambda *_, **__: envs.disable_envs_cache())
        yield
        # Each engine collects garbage, which takes seconds in a process this big.
        patch.setattr(gc, "collect", lambda *_: 0)
        clean_up()


@pytest.fixture(scope="session")
def engine(vllm_here: None) -> Iterator["Engines"]:
    """`engine(model, tidal=..., **kwargs)`: see `engines.Engines`."""
    from tests.support.engines import Engines

    engines = Engines()
    yield engines
    engines.shutdown()


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.models import build_random_model

    return build_random_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def random_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.models import build_random_model

    return build_random_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="session")
def planted(
    tmp_path_factory: pytest.TempPathFactory,
) -> "Callable[..., tuple[PlantedSpec, Path]]":
    """`planted(hops=2)` gives the spec and the model folder."""
    from tidal_vllm.planted import PlantedSpec, build_planted_model

    root = tmp_path_factory.mktemp("planted")

    def build(**fields: Any) -> "tuple[PlantedSpec, Path]":
        spec = PlantedSpec(**fields)
        name = "-".join(map(str, dataclasses.astuple(spec))).replace(" ", "")
        return spec, build_planted_model(root / name, spec)

    return build


@pytest.fixture(scope="session")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.drifting import build_drifting_model

    return build_drifting_model(tmp_path_factory.mktemp("drifting"))


@pytest.fixture(scope="session")
def small_engine(engine: "Engines", drifting: Path) -> Callable[..., Any]:
    """`small_engine(tidal, folder=drifting, **kwargs)`: see `engines.Engines`."""
    from tests.support.engines import SMALL_ENGINE

    def find(tidal: dict | None = None, folder: Path = drifting, **kwargs: Any) -> Any:
        return engine(folder, tidal=tidal, **SMALL_ENGINE | kwargs)

    return find


@pytest.fixture(scope="session")
def dense_answers(small_engine: Callable[..., Any]) -> Callable[..., list[list[int]]]:
    """`dense_answers(prompts, max_tokens, ...)`: tokens by vLLM's own attention.

    Args:
        max_tokens: Of each answer, or a list, one for each prompt.
    """
    from tests.support.asking import generate
    from tests.support.engines import scheduler

    llm = small_engine(max_num_seqs=16)
    assert not hasattr(scheduler(llm), "correction_interval")
    known: dict[str, list[int]] = {}

    def answer(
        prompts: list[list[int]], max_tokens: int | list[int] = 16, **more: Any
    ) -> list[list[int]]:
        if isinstance(max_tokens, int):
            max_tokens = [max_tokens] * len(prompts)
        keys = [f"{prompt} {sorted(more.items())}" for prompt in prompts]
        asked: dict[str, tuple[list[int], int]] = {}
        for key, prompt, count in zip(keys, prompts, max_tokens, strict=True):
            if count > max(len(known.get(key, ())), asked.get(key, ([], 0))[1]):
                asked[key] = prompt, count
        llm.reset_prefix_cache()
        if asked:
            found = generate(llm, *zip(*asked.values(), strict=True), **more)
            known.update((k, a.token_ids) for k, a in zip(asked, found, strict=True))
        return [known[key][:n] for key, n in zip(keys, max_tokens, strict=True)]

    return answer


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `model_configs.write_model` writes."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def configure(vllm_here: None, model_root: Path) -> "Callable[..., VllmConfig]":
    """`configure(tidal={...}, model="llama", **engine_args)`: vLLM's real config."""
    from vllm.engine.arg_utils import EngineArgs

    from tests.support.model_configs import write_model

    def create(
        tidal: object = None, model: str = "llama", **kwargs: Any
    ) -> "VllmConfig":
        arguments: dict[str, Any] = {
            "model": str(write_model(model_root, model)),
            "attention_backend": "TIDAL",
            "skip_tokenizer_init": True,
            "max_model_len": 8192,
        }
        if tidal is not None:
            arguments["additional_config"] = {"tidal": tidal}
        return EngineArgs(**arguments | kwargs).create_engine_config()

    return create


@pytest.fixture
def refusal(configure: "Callable[..., VllmConfig]") -> Callable[..., str]:
    """As `configure`, for arguments that must be refused: gives the message."""

    def refuse(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(ValueError) as refused:
            configure(*args, **kwargs)
        return str(refused.value)

    return refuse


@pytest.fixture
def tidal_log(configure: "Callable[..., VllmConfig]") -> Iterator[list[str]]:
    """What our loggers say: their messages, in order."""
    # NOTE: with its first engine config vLLM configures logging anew, which takes
    # the handlers of all its loggers away.
    configure(attention_backend=None)
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(f"{record.levelname} {record.getMessage()}")

    handler = Handler()
    logger = logging.getLogger("vllm.tidal")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
