"""Saving and loading whole models: folders, hub ids, and everything that can be wrong with them."""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mblm import MBLM, MBLMEncoder, MBLMModelConfig, MBLMReturnType
from mblm.model.find import CONFIG_FILE, INDEX_FILE, SHARDS, WEIGHTS_FILE
from mblm.model.pretrained import load_checkpoint
from mblm.utils.io import load_model_state, save_model_state
from tests.model.test_embeddings import old_keys
from tests.models import encoder, mamba, model, transformer


def build() -> MBLM:
    return model(mamba("mamba1"), transformer(pos_emb_type="rope"), seq_lens=[3, 4])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, drop: str | None = None, **fields: Any) -> None:
    config = {**json.loads((folder / CONFIG_FILE).read_text()), **fields}
    config.pop(drop, None)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def change_weights(folder: Path, drop: str | None = None, **tensors: torch.Tensor) -> None:
    weights = {**load_file(folder / WEIGHTS_FILE), **tensors}
    weights.pop(drop, None)
    save_file(weights, folder / WEIGHTS_FILE)


def split_weights(folder: Path) -> None:
    """Have every weight in a file of its own, with an index, as transformers may write them."""
    weights = load_file(folder / WEIGHTS_FILE)
    files = {
        name: f"model-{n:05}-of-{len(weights):05}.safetensors" for n, name in enumerate(weights)
    }
    for name, file in files.items():
        save_file({name: weights[name]}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / WEIGHTS_FILE).unlink()


def interrupting(call: Callable[..., Any], calls: Iterator[int], number: int) -> Any:
    """A function that interrupts the program instead of being called for the ``number``-th time."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    return counted


class TestRoundTrip:
    def test_of_a_decoder(self, tmp_path: Path) -> None:
        m = build()
        m.save_pretrained(tmp_path / "new" / "folder")
        assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == {
            CONFIG_FILE,
            WEIGHTS_FILE,
        }
        for name in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder")):
            loaded = MBLM.from_pretrained(name)
            assert loaded.config == m.config and not loaded.training
            ids = torch.randint(0, 18, (2, 9))
            assert torch.equal(
                loaded(ids, return_type=MBLMReturnType.LOGITS),
                m(ids, return_type=MBLMReturnType.LOGITS),
            )

    def test_of_weights_in_several_files(self, folder: Path) -> None:
        m = build()
        m.save_pretrained(folder)
        split_weights(folder)
        state = MBLM.from_pretrained(folder).state_dict()
        assert state.keys() == m.state_dict().keys()
        assert all(torch.equal(state[name], weight) for name, weight in m.state_dict().items())
        later = build()
        later.save_pretrained(folder)  # beside them
        state = MBLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in later.state_dict().items())

    def test_of_an_encoder(self, tmp_path: Path) -> None:
        m = encoder(seq_lens=[3, 4], mask_reduce_strat="all")
        m.save_pretrained(tmp_path)
        loaded = MBLMEncoder.from_pretrained(tmp_path)
        assert loaded.pretrained_config == m.pretrained_config
        ids = torch.randint(0, 17, (2, 9))
        assert torch.equal(loaded(ids, labels=ids)[0], m(ids, labels=ids)[0])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_of_another_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        m = build().to(dtype)
        m.save_pretrained(tmp_path)
        loaded = MBLM.from_pretrained(tmp_path)
        assert {weight.dtype for weight in loaded.parameters()} == {dtype}
        ids = torch.randint(0, 18, (2, 9))
        assert torch.equal(loaded(ids), m(ids))
        asked_for = MBLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert {weight.dtype for weight in asked_for.parameters()} == {torch.float32}

    def test_of_several_dtypes(self, tmp_path: Path) -> None:
        m = build()
        m.stage_models[0].bfloat16()
        m.save_pretrained(tmp_path)
        loaded = MBLM.from_pretrained(tmp_path)
        assert [w.dtype for w in loaded.parameters()] == [w.dtype for w in m.parameters()]

    @pytest.mark.parametrize(
        "value", [torch.qint8, torch.empty(3, device="meta")], ids=["dtype", "meta"]
    )
    def test_of_what_is_no_plain_tensor_is_refused(self, tmp_path: Path, value: object) -> None:
        m = build()
        m.register_state_dict_post_hook(lambda *args: args[1].__setitem__("to_logits.scale", value))
        with pytest.raises(TypeError, match=r"to_logits\.scale is"):
            m.save_pretrained(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()

    def test_of_tied_weights(self, tmp_path: Path) -> None:
        class Tied(MBLM):
            def __init__(self, cfg: MBLMModelConfig) -> None:
                super().__init__(cfg)
                self.to_logits.weight = self.token_embs_rev[0].embedding.weight

        m = Tied(build().config).eval()
        m.save_pretrained(tmp_path)
        ids = torch.randint(0, 18, (2, 9))
        for model_class in (Tied, MBLM):
            loaded = model_class.from_pretrained(tmp_path)
            assert torch.equal(loaded(ids), m(ids))

    def test_of_weights_that_share_memory_in_part(self, tmp_path: Path) -> None:
        m = build()
        table = torch.randn(2 * 19, 8)
        m.token_embs_rev[0].embedding.weight.data = table[5:24]
        m.token_embs_rev[1].embedding.weight.data = table[:19]
        m.to_logits.weight.data = table[19:]
        m.save_pretrained(tmp_path)
        loaded = MBLM.from_pretrained(tmp_path)
        for name, weight in m.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight)

    def test_of_a_subclass(self, tmp_path: Path) -> None:
        class Own(MBLM):
            pass

        m = Own(build().config)
        m.save_pretrained(tmp_path / "own")
        build().save_pretrained(tmp_path / "base")
        assert type(MBLM.from_pretrained(tmp_path / "own")) is MBLM
        assert type(Own.from_pretrained(tmp_path / "own")) is Own
        assert type(Own.from_pretrained(tmp_path / "base")) is Own

    def test_of_a_folder_without_a_name_is_refused(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"save_directory: .* got an empty text"):
            build().save_pretrained("")
        with pytest.raises(TypeError, match=r"save_directory: expected a folder, .* got None"):
            build().save_pretrained(None)  # type: ignore[arg-type]
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("compiled_again", [False, True])
    def test_of_compiled_stages(self, tmp_path: Path, compiled_again: bool) -> None:
        m, fresh = build(), build()
        m.stage_models[1] = torch.compile(m.stage_models[1])
        m.save_pretrained(tmp_path)
        assert not any("_orig_mod" in name for name in load_file(tmp_path / WEIGHTS_FILE))
        loaded = MBLM.from_pretrained(tmp_path)
        assert torch.equal(loaded.stage_models[1].norm.g, m.stage_models[1].norm.g)

        _, file = save_model_state(tmp_path, "compiled", m, 1.0)
        if compiled_again:
            fresh.stage_models[1] = torch.compile(fresh.stage_models[1])
        load_model_state(file, fresh)
        for saved, weight in zip(m.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(saved, weight)

    def test_of_a_file_that_holds_the_names_of_compiled_stages(self, folder: Path) -> None:
        weights = load_file(folder / WEIGHTS_FILE)
        compiled = {
            name.replace("stage_models.1.", "stage_models.1._orig_mod."): weight
            for name, weight in weights.items()
        }
        assert compiled.keys() != weights.keys()
        save_file(compiled, folder / WEIGHTS_FILE)
        loaded = MBLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())

    def test_of_a_file_that_holds_the_names_of_release_0_4_0(self, folder: Path) -> None:
        weights = load_file(folder / WEIGHTS_FILE)
        save_file(old_keys(weights), folder / WEIGHTS_FILE)
        loaded = MBLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())

    def test_without_values_on_the_meta_device(self, folder: Path, tmp_path: Path) -> None:
        _, file = save_model_state(tmp_path, "best", m := build(), 1.5)
        params = {"params": m.config.model_dump(mode="json")}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(params))
        for loaded in (
            MBLM.from_pretrained(folder, map_location="meta"),
            load_checkpoint(MBLM, file, map_location="meta"),
        ):
            assert all(weight.is_meta for weight in loaded.parameters())
            assert [w.shape for w in loaded.parameters()] == [w.shape for w in m.parameters()]
        with pytest.raises(ValueError, match="got a tensor without values"):
            load_model_state(file, m, map_location="meta")
        with pytest.raises(ValueError, match="the model's is on the meta device"):
            load_model_state(file, loaded)

    def test_from_the_home_folder(self, folder: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        assert MBLM.from_pretrained("~/model").num_tokens == 19
        build().save_pretrained("~/other")
        assert (folder.parent / "other" / CONFIG_FILE).exists()

    def test_leaves_what_is_there_when_it_fails(self, folder: Path, monkeypatch: Any) -> None:
        before = {file.name: file.read_bytes() for file in folder.iterdir()}

        def fail(*_: Any) -> bytes:
            raise OSError("disk full")

        monkeypatch.setattr("safetensors.torch.save", fail)
        with pytest.raises(OSError, match="disk full"):
            build().save_pretrained(folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    @pytest.mark.parametrize("with_ids", [True, False], ids=["", "what is there is older"])
    @pytest.mark.parametrize("other", [True, False], ids=["other configuration", "same"])
    def test_interrupted_anywhere_never_mixes_two_models(
        self, tmp_path: Path, monkeypatch: Any, other: bool, with_ids: bool
    ) -> None:
        """The two configurations differ in positions alone, so that any weights fit either."""
        old = model(transformer(pos_emb_type="rope"), seq_lens=[3, 4])
        new = model(transformer(pos_emb_type=None if other else "rope"), seq_lens=[3, 4])
        ids = torch.randint(0, 18, (2, 9))
        outputs = [m(ids).item() for m in (old, new)]
        ends = []
        for interrupted in itertools.count():
            folder = tmp_path / str(interrupted)
            old.save_pretrained(folder)
            if not with_ids:
                change_config(folder, drop="config_id")
                change_weights(folder)
            with monkeypatch.context() as patch:
                calls = itertools.count()
                for name in ("open", "fsync", "replace"):
                    patch.setattr(os, name, interrupting(getattr(os, name), calls, interrupted))
                try:
                    new.save_pretrained(folder)
                    whole = True
                except KeyboardInterrupt:
                    whole = False
            try:
                ends.append(outputs.index(MBLM.from_pretrained(folder)(ids).item()))
            except ValueError as error:
                assert "saved with another config.json" in str(error)
                ends.append(-1)
            if whole:
                break
        assert len(ends) > 4 and ends[0] == 0 and ends[-1] == 1
        assert (-1 in ends) == other, "what can be loaded is"

    def test_the_config_is_plain_json_that_names_the_class(self, folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        assert config["model_type"] == "MBLM"
        assert config["block"][0]["block_type"] == "mamba1"


class TestBadFolder:
    def fails(self, folder: Path, words: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=words) as caught:
            MBLM.from_pretrained(folder)
        assert str(folder) in str(caught.value)

    @pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
    def test_a_file_is_missing(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        self.fails(folder, f"holds no {file}", FileNotFoundError)

    def test_a_file_of_several_is_missing_or_damaged(self, folder: Path) -> None:
        split_weights(folder)
        file = next(folder.glob(SHARDS))
        file.write_bytes(file.read_bytes()[:-1])
        self.fails(folder, f"{file.name}: not a whole safetensors file")
        file.unlink()
        self.fails(folder, file.name, FileNotFoundError)

    def test_two_files_of_several_have_a_weight(self, folder: Path) -> None:
        split_weights(folder)
        one, other = sorted(folder.glob(SHARDS))[:2]
        name, *_ = load_file(one)
        save_file(load_file(one) | load_file(other), other)
        self.fails(folder, f"{other.name}: another file of {INDEX_FILE} has {name}, too")

    @pytest.mark.parametrize(
        "index",
        ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 99999]
        + [f'{{"weight_map": {{"a": "{name}"}}}}' for name in ("../x.safetensors", "x.bin", "")],
    )
    def test_an_index_is_none(self, folder: Path, index: str) -> None:
        split_weights(folder)
        (folder / INDEX_FILE).write_text(index)
        self.fails(folder, f"{INDEX_FILE}: ")

    @pytest.mark.parametrize("size", [0, 4, 100, 5000])
    def test_weights_are_cut_short(self, folder: Path, size: int) -> None:
        content = (folder / WEIGHTS_FILE).read_bytes()
        assert size < len(content)
        (folder / WEIGHTS_FILE).write_bytes(content[:size])
        self.fails(folder, f"{WEIGHTS_FILE}: not a whole safetensors file")

    def test_weights_are_a_pickle(self, folder: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (pytest.fail, ("unpickled",))

        torch.save({"x": Evil()}, folder / WEIGHTS_FILE)
        self.fails(folder, "not a whole safetensors file")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_are_not_finite(self, folder: Path, value: float) -> None:
        change_weights(folder, **{"to_logits.bias": torch.full((19,), value)})
        self.fails(folder, "NaN or infinite values in to_logits.bias")

    def test_weights_are_missing_unknown_or_of_another_shape(self, folder: Path) -> None:
        change_weights(folder, drop="to_logits.bias", extra=torch.zeros(1))
        change_weights(folder, **{"to_logits.weight": torch.zeros(19, 7)})
        with pytest.raises(ValueError) as caught:
            MBLM.from_pretrained(folder)
        for words in (
            "missing: to_logits.bias",
            "unexpected: extra",
            "to_logits.weight: expected (19, 8), got (19, 7)",
        ):
            assert words in str(caught.value)

    def test_config_is_of_another_model(self, folder: Path) -> None:
        change_config(folder, num_tokens=20)
        self.fails(folder, r"to_logits.weight: expected \(20, 8\), got \(19, 8\)")

    @pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"MBLM"', "\xff", "[" * 9999])
    def test_config_is_no_json_object(self, folder: Path, text: str) -> None:
        (folder / CONFIG_FILE).write_bytes(text.encode("latin-1"))
        self.fails(folder, "not a JSON file|not the configuration of a MBLM")

    def test_config_is_of_another_class(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="not the configuration of a MBLMEncoder"):
            MBLMEncoder.from_pretrained(folder)
        change_config(folder, model_type="Bert")
        self.fails(folder, "not the configuration of a MBLM")

    def test_config_has_an_unknown_field(self, folder: Path) -> None:
        change_config(folder, colour="red")
        self.fails(folder, "colour")

    def test_config_lacks_a_field(self, folder: Path) -> None:
        change_config(folder, drop="seq_lens")
        self.fails(folder, r"seq_lens\s+Field required")

    def test_config_has_a_block_that_is_not_registered(self, folder: Path) -> None:
        change_config(folder, block={"block_type": "unheard of", "size": 3})
        self.fails(folder, "matches no registered stage block")


def test_weights_that_may_not_be_read_are_not_called_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(file: Path, *mode: Any, **options: Any) -> Any:
        if file.name == WEIGHTS_FILE:  # as one of mode 000, which root may read
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=WEIGHTS_FILE):
        MBLM.from_pretrained(folder)


@pytest.mark.parametrize("device", ["nope", 3.5, {"": "cpu"}, "cuda:4096", "hpu", 1 << 70])
def test_a_device_that_does_not_work(tmp_path: Path, device: Any) -> None:
    """It is told before anything is read."""
    for name in (tmp_path / "nothing", tmp_path / "nothing.pth"):
        for load in (MBLM.from_pretrained, functools.partial(load_checkpoint, MBLM)):
            with pytest.raises(ValueError, match=r"map_location: .+ cannot be used"):
                load(name, map_location=device)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, float])
def test_a_dtype_that_is_none(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"dtype: expected a floating point torch.dtype"):
        MBLM.from_pretrained("python", dtype=dtype)
