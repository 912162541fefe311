"""One flag selects backend and scheduler; what cannot be corrected is refused."""

import pytest
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from tests.support.drifting import SPARSE
from tests.support.engines import SMALL_ENGINE, engine_kwargs
from tidal_vllm.engine.scheduler import TidalAsyncScheduler, TidalScheduler

CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
NATIVE = {"kv_offloading_size": 1.0, "kv_offloading_backend": "native"}
CORRECTING = SPARSE | {"correction_interval": 8}


class Ours(TidalScheduler):
    pass


class Theirs(Scheduler):
    pass


def configure(model, tidal, **kwargs):
    arguments = engine_kwargs(tidal, **SMALL_ENGINE | kwargs)
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def scheduler_class(model, tidal, **kwargs):
    return configure(model, tidal, **kwargs).scheduler_config.get_scheduler_cls()


@pytest.mark.parametrize("tidal", [SPARSE, CORRECTING, SPARSE | {"preset": "default"}])
def test_selected_with_the_backend(drifting, tidal):
    assert scheduler_class(drifting, tidal) is TidalScheduler


def test_asynchronous_where_vllm_is(drifting, monkeypatch):
    """As on a GPU: vLLM's platforms there leave asynchronous scheduling on."""
    from vllm.platforms import current_platform

    check = type(current_platform).check_and_update_config

    from tidal_vllm.plugin import _check_setup_early

    class Platform(type(current_platform)):
        @classmethod
        def check_and_update_config(cls, vllm_config):
            vllm_config.scheduler_config.async_scheduling = True

    assert not hasattr(Platform.check_and_update_config, "checks_tidal")
    _check_setup_early(Platform)
    changed = Platform.__dict__["check_and_update_config"]
    monkeypatch.setattr(type(current_platform), "check_and_update_config", changed)
    cls = scheduler_class(drifting, CORRECTING)
    assert cls is TidalAsyncScheduler
    assert issubclass(cls, AsyncScheduler)
    monkeypatch.undo()
    assert type(current_platform).check_and_update_config == check


@pytest.mark.parametrize(
    "tidal",
    [
        None,
        SPARSE | {"select_layers": [], "correction_interval": 8},
        CORRECTING | {"token_budget": 1024},
    ],
    ids=["dense", "off", "no sequence is longer than the budget"],
)
def test_vllms_own_where_every_step_is_dense(drifting, tidal):
    assert scheduler_class(drifting, tidal) is Scheduler
    assert scheduler_class(drifting, tidal, scheduler_cls=Theirs) is Theirs


def test_ours_with_speculative_decoding(drifting, monkeypatch):
    # As on a GPU: without Triton the platform refuses speculative decoding.
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 2,
        "prompt_lookup_max": 2,
    }
    cls = scheduler_class(drifting, SPARSE, speculative_config=speculative)
    assert cls is TidalScheduler


@pytest.mark.parametrize("path", [True, False])
def test_a_subclass_of_ours_is_respected(drifting, path):
    given = f"{__name__}.Ours" if path else Ours
    assert scheduler_class(drifting, CORRECTING, scheduler_cls=given) is Ours


@pytest.mark.parametrize(
    ("tidal", "reason"),
    [
        (CORRECTING, "does not run corrections"),
        (SPARSE, "would publish the KV of sparse layers"),
        (CORRECTING | {"publish_polluted": True}, "does not run corrections"),
    ],
)
def test_any_other_is_refused(drifting, tidal, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        scheduler_class(drifting, tidal, scheduler_cls=Theirs)
    assert "scheduler_cls = <class" in str(caught.value)
    assert "allowed None" in str(caught.value)


@pytest.mark.parametrize(
    ("tidal", "kwargs"),
    [
        (SPARSE | {"publish_polluted": True}, {}),
        (SPARSE, {"enable_prefix_caching": False}),
    ],
)
def test_any_other_is_respected_where_it_does_no_harm(drifting, tidal, kwargs):
    assert scheduler_class(drifting, tidal, scheduler_cls=Theirs, **kwargs) is Theirs


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"long_prefill_token_threshold": 1}, "long_prefill_token_threshold = 1: "),
        (
            {"max_num_batched_tokens": 1, "max_num_seqs": 1, "max_model_len": 64},
            "max_num_batched_tokens = 1: ",
        ),
        (
            {"additional_config": {"tidal": SPARSE | {"correction_interval": 1024}}},
            "tidal.correction_interval = 1024: must be at most",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "kv_transfer_config = ExampleConnector: ",
        ),
        (NATIVE, "kv_offloading_size = 1.0: .*kv_offloading_backend = native. copies"),
        (NATIVE | {"kv_offloading_backend": "lmcache"}, "kv_offloading_size = 1.0: "),
    ],
    ids=[
        "threshold",
        "batch",
        "interval",
        "connector",
        "offloading",
        "lmcache",
    ],
)
def test_refused_at_start_up(drifting, kwargs, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class(drifting, CORRECTING, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [NATIVE, {"kv_transfer_config": CONNECTOR}], ids=["offloading", "any"]
)
def test_a_method_that_follows_keys_takes_them_from_no_connector(drifting, kwargs):
    tidal = {"method": "quest", "token_budget": 64, "publish_polluted": True}
    with pytest.raises(ValueError, match="'quest' has not seen written; allowed None"):
        configure(drifting, tidal, **kwargs)


def test_offloading_is_respected_where_it_does_no_harm(drifting):
    tidal = SPARSE | {"publish_polluted": True}
    config = configure(drifting, tidal, **NATIVE)
    assert config.kv_transfer_config.kv_connector == "OffloadingConnector"


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        (None, "kv_transfer_config", CONNECTOR, "kv_transfer_config = ExampleConn"),
        ("parallel_config", "enable_dbo", True, "enable_dbo = True: both halves of a"),
    ],
)
def test_the_scheduler_refuses_what_has_changed_since(
    drifting, part, key, value, message
):
    """vLLM's CPU platform, for one, turns microbatches off by itself."""

    def make_scheduler(tidal):
        config = configure(drifting, tidal)
        setattr(getattr(config, part) if part else config, key, value)
        TidalScheduler(vllm_config=config)

    with pytest.raises(ValueError, match=message):
        make_scheduler(SPARSE)
    with pytest.raises(TypeError, match="missing"):  # vLLM's, which needs more
        make_scheduler(SPARSE | {"select_layers": []})
