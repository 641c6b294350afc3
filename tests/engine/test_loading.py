"""One set of weights per process, and errors that say what is missing."""

import json
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from turboquant_local.engine import loading
from turboquant_local.engine.loading import ModelSpec, acquire_model, release_model
from turboquant_local.errors import BackendError, ConfigError, ModelLoadError

MODEL = Path(__file__).parents[2] / "examples" / "tiny-model"


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may hold the same model."""
    monkeypatch.setattr(loading, "_shared", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model's files that a test may break."""
    files = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    for name in files:
        shutil.copy(MODEL / name, tmp_path / name)
    return tmp_path


def spec(**fields: object) -> ModelSpec:
    return ModelSpec(**{"model": str(MODEL), "device": "cpu", **fields})


def test_equal_specs_share_one_model_until_the_last_release() -> None:
    first, second = acquire_model(spec()), acquire_model(spec(model_kwargs={}))
    assert first is second
    weights = weakref.ref(first.model)
    del first, second
    release_model(spec().key)
    assert weights() is not None
    release_model(spec().key)
    assert weights() is None
    assert not loading._shared


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float32"},
        {"model_kwargs": {"attn_implementation": "eager"}},
        {"tokenizer_kwargs": {"padding_side": "left"}},
        {"trust_remote_code": True},
        {"revision": "v1"},
    ],
)
def test_whatever_changes_the_model_makes_another_one(fields: dict[str, object]) -> None:
    assert spec(**fields).key != spec().key
    assert spec(**fields).key == spec(**fields).key


def test_the_default_dtype_has_one_key() -> None:
    assert spec(dtype="auto").key == spec().key
    assert spec(model_kwargs={"dtype": "float32"}).key != spec().key


def test_the_key_sees_through_spellings_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MODEL.parent)
    assert spec(model="tiny-model").key == spec().key


@pytest.mark.parametrize("where", ["model_kwargs", "tokenizer_kwargs"])
@pytest.mark.parametrize("name", ["revision", "token", "trust_remote_code"])
def test_what_model_and_tokenizer_share_is_given_once(where: str, name: str) -> None:
    # transformers would load the model of one revision and the tokenizer of another.
    with pytest.raises(ConfigError, match=rf"{where}\['{name}'\]: model and tokenizer must have the same"):
        spec(**{where: {name: True}})


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_is_given_once(name: str) -> None:
    with pytest.raises(ConfigError, match="dtype='bfloat16': model_kwargs has one too"):
        spec(dtype="bfloat16", model_kwargs={name: "float32"})


def test_settings_without_a_hash_stand_for_themselves() -> None:
    class Settings:
        __hash__ = None

    settings = Settings()
    assert (
        spec(model_kwargs={"quantization_config": settings}).key
        == spec(model_kwargs={"quantization_config": settings}).key
    )
    assert (
        spec(model_kwargs={"quantization_config": settings}).key
        != spec(model_kwargs={"quantization_config": Settings()}).key
    )


def test_concurrent_loads_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = loading._load

    def slow_load(wanted: ModelSpec) -> loading.LoadedModel:
        loads.append(wanted)
        time.sleep(0.1)
        return load(wanted)

    monkeypatch.setattr(loading, "_load", slow_load)
    start = threading.Barrier(4)

    def acquire() -> loading.LoadedModel:
        start.wait()
        return acquire_model(spec())

    with ThreadPoolExecutor(4) as pool:
        models = {id(future.result()) for future in [pool.submit(acquire) for _ in range(4)]}
    assert len(models) == len(loads) == 1
    for _ in range(4):
        release_model(spec().key)
    assert not loading._shared


def test_the_dtype_is_the_one_asked_for() -> None:
    for fields, dtype in (
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"model_kwargs": {"dtype": "float32"}}, torch.float32),
    ):
        wanted = spec(**fields)
        try:
            assert acquire_model(wanted).model.dtype == dtype
        finally:
            release_model(wanted.key)


def test_the_models_generation_config_is_kept_aside() -> None:
    loaded = acquire_model(spec())
    try:
        assert loaded.defaults.max_new_tokens == 256
        assert loaded.model.generation_config.max_new_tokens is None
        assert loaded.context_length == 4096
        assert not loaded.model.training
    finally:
        release_model(spec().key)


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        (("config.json",), "lacks config.json (the model's configuration)."),
        (("model.safetensors",), "lacks weights (model.safetensors)."),
        (("tokenizer.json",), "lacks tokenizer files (tokenizer.json, or tokenizer.model)."),
        (("config.json", "tokenizer.json"), "lacks config.json (the model's configuration); tokenizer files"),
    ],
)
def test_a_folder_with_missing_files(folder: Path, removed: tuple[str, ...], words: str) -> None:
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(ModelLoadError) as caught:
        acquire_model(spec(model=str(folder)))
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not loading._shared


def test_a_missing_shard_is_named(folder: Path) -> None:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / shards["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelLoadError, match=r"lacks model-00002-of-00002\.safetensors \(weights\)\."):
        acquire_model(spec(model=str(folder)))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="not a readable index of weights"):
        acquire_model(spec(model=str(folder)))


def test_unreadable_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelLoadError, match=r"could not be loaded \(SafetensorError"):
        acquire_model(spec(model=str(folder)))


def test_weights_that_are_not_there_are_no_random_numbers(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    lacking = next(name for name in weights if "down_proj" in name)
    save_file({name: weight for name, weight in weights.items() if name != lacking}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"lacks 1 of the weights .* such as {lacking}"):
        acquire_model(spec(model=str(folder)))


def test_a_failed_load_can_be_tried_again(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError):
        acquire_model(spec(model=str(folder)))
    (folder / "model.safetensors").write_bytes(weights)
    acquire_model(spec(model=str(folder)))
    release_model(spec(model=str(folder)).key)


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "~/missing-model", "a/b/c"])
def test_a_path_that_does_not_exist(model: str) -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        acquire_model(spec(model=model))


def test_a_file_instead_of_a_folder() -> None:
    with pytest.raises(ModelLoadError, match="give the folder that holds it"):
        acquire_model(spec(model=str(MODEL / "config.json")))


@pytest.mark.parametrize(("token", "sent"), [("hf_x", {"token": "hf_x"}), ("", {}), (None, {})])
def test_an_empty_token_is_not_sent(monkeypatch: pytest.MonkeyPatch, token: str | None, sent: dict[str, str]) -> None:
    asked: list[dict[str, object]] = []

    def from_pretrained(source: str, **kwargs: object) -> None:
        asked.append(kwargs)
        raise OSError("out of reach")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ModelLoadError):
        acquire_model(spec(token=token))
    assert asked == [{**sent, "trust_remote_code": False}]


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"the hub cannot be reached .* give a local folder"):
        acquire_model(spec(model="nobody/no-such-model"))


def test_unknown_settings_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="dtype='fp8': expected one of auto, float32, float16, bfloat16"):
        spec(dtype="fp8")
    with pytest.raises(ConfigError, match="device='gpu0': expected a torch device"):
        spec(device="gpu0")
    with pytest.raises(ConfigError, match="model=''"):
        spec(model="")


def test_a_device_that_is_not_here() -> None:
    with pytest.raises(BackendError, match="device='cuda:99'"):
        acquire_model(spec(device="cuda:99"))


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(spec(token="secret"))


def test_the_cpu_is_mentioned_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    loading._log_no_gpu.cache_clear()
    assert [loading.default_device() for _ in range(3)] == ["cpu"] * 3
    assert [record.message for record in caplog.records] == ["no GPU is visible to torch: models run on the CPU"]
