"""Checkpoints: a round trip, and that a bad file is named and changes nothing."""

import io
import os
import pickle
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mblm.utils.io import load_model_state, save_model_state


class Tiny(nn.Module):
    """An embedding, a projection and a mask that is rightly infinite."""

    def __init__(self, num_tokens=4, dim=3):
        super().__init__()
        self.emb = nn.Embedding(num_tokens, dim)
        self.to_logits = nn.Linear(dim, num_tokens)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        nn.init.normal_(self.to_logits.bias)


def copy_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    for key in state:
        assert torch.equal(state[key], other[key]), key


def save_raw(folder, content):
    path = folder / "raw.pth"
    torch.save(content, path)
    return path


def assert_refused(path, message, model=None, **options):
    """Loading raises one ValueError that names the file and matches; the model stays as it was."""
    model = model or Tiny()
    before = copy_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_model_state(path, model, **options)
    assert str(path) in str(caught.value)
    assert_same(copy_of(model), before)


class TestRoundTrip:
    @pytest.mark.parametrize("as_state", [False, True], ids=["module", "state dict"])
    def test_weights_and_loss_come_back(self, tmp_path, as_state):
        source, target = Tiny(), Tiny()
        saved = save_model_state(
            tmp_path / "a" / "b", "best", source.state_dict() if as_state else source, 1.5
        )
        assert saved == (False, tmp_path / "a" / "b" / "best.pth")
        model, loss = load_model_state(str(saved[1]), target)
        assert model is target
        assert type(loss) is float and loss == 1.5
        assert_same(copy_of(target), copy_of(source))

    def test_the_file_is_what_torch_save_makes_of_model_and_loss(self, tmp_path):
        model = Tiny()
        _, path = save_model_state(tmp_path, "x", model, torch.tensor(2.0))
        content = torch.load(path, weights_only=True)
        assert list(content) == ["MODEL", "LOSS"]
        assert content["LOSS"] == 2.0 and type(content["LOSS"]) is float
        assert_same(content["MODEL"], model.state_dict())

    def test_an_open_file_can_be_loaded_too(self):
        model, buffer = Tiny(), io.BytesIO()
        torch.save({"MODEL": model.state_dict(), "LOSS": 1}, buffer)
        buffer.seek(0)
        target, _ = load_model_state(buffer, Tiny(), map_location="cpu")
        assert_same(copy_of(target), copy_of(model))

    def test_half_precision_weights_load_into_a_float_model(self, tmp_path):
        source = Tiny().bfloat16()
        _, path = save_model_state(tmp_path, "x", source, 1)
        target, _ = load_model_state(path, Tiny())
        assert target.emb.weight.dtype == torch.float32
        assert torch.equal(target.emb.weight, source.emb.weight.float())

    @pytest.mark.parametrize("failing", ["write", "replace"])
    def test_a_failed_save_leaves_the_old_file(self, tmp_path, monkeypatch, failing):
        def fail(*args):
            raise OSError(28, "No space left on device")

        _, path = save_model_state(tmp_path, "x", Tiny(), 1)
        old = path.read_bytes()
        if failing == "replace":
            monkeypatch.setattr(os, "replace", fail)
        else:
            monkeypatch.setattr(torch, "save", lambda content, file: (file.write(b"PK"), fail()))
        with pytest.raises(OSError, match="No space"):
            save_model_state(tmp_path, "x", Tiny(), 2)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("model, loss", [([1], 1.0), (Tiny(), "low"), (Tiny(), None)])
    def test_what_is_no_model_or_loss_is_refused(self, tmp_path, model, loss):
        with pytest.raises(TypeError, match="must be a"):
            save_model_state(tmp_path, "x", model, loss)
        assert list(tmp_path.iterdir()) == []


class TestDamagedFiles:
    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pth"):
            load_model_state(tmp_path / "none.pth", Tiny())

    @given(data=st.data())
    @settings(deadline=None, max_examples=25)
    def test_a_truncated_file(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("truncated")
        _, path = save_model_state(folder, "x", Tiny(), 1)
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        assert_refused(path, "cannot be read as a checkpoint")

    @given(garbage=st.binary(max_size=64))
    @settings(deadline=None, max_examples=25)
    def test_garbage(self, tmp_path_factory, garbage):
        path = tmp_path_factory.mktemp("garbage") / "x.pth"
        path.write_bytes(garbage)
        assert_refused(path, "x.pth")

    @pytest.mark.parametrize("pickled_by", ["torch", "pickle"])
    def test_a_hostile_file_is_not_run(self, tmp_path, pickled_by):
        marker = tmp_path / "marker"

        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        path = tmp_path / "hostile.pth"
        content = {"MODEL": Tiny().state_dict(), "LOSS": 1.0, "EXTRA": Hostile()}
        if pickled_by == "torch":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content, protocol=2))
        assert_refused(path, "tensors and plain values")
        assert not marker.exists()
        pickle.loads(pickle.dumps(Hostile()))  # what would have happened
        assert marker.exists()

    @pytest.mark.parametrize(
        "content, message",
        [
            ({"LOSS": 1.0}, 'entries "MODEL" and "LOSS"'),
            ({"MODEL": {}}, 'entries "MODEL" and "LOSS"'),
            (Tiny().state_dict(), 'entries "MODEL" and "LOSS"'),
            ([1, 2], 'entries "MODEL" and "LOSS"'),
            ({"MODEL": [1], "LOSS": 1.0}, '"MODEL" must be a dict'),
            ({"MODEL": {1: torch.ones(1)}, "LOSS": 1.0}, '"MODEL" must be a dict'),
            ({"MODEL": {}, "LOSS": None}, '"LOSS" must be a number, got NoneType'),
            ({"MODEL": {}, "LOSS": torch.ones(2)}, '"LOSS" must be a number, got Tensor'),
        ],
    )
    def test_a_file_of_something_else(self, tmp_path, content, message):
        assert_refused(save_raw(tmp_path, content), message)


class TestMisfits:
    def changed(self, folder, **changes):
        """A checkpoint of a Tiny with entries replaced, or removed where None."""
        state = Tiny().state_dict() | {key.replace("__", "."): v for key, v in changes.items()}
        state = {key: value for key, value in state.items() if value is not None}
        return save_raw(folder, {"MODEL": state, "LOSS": 1.0})

    def test_everything_that_does_not_fit_is_named_at_once(self, tmp_path):
        path = self.changed(
            tmp_path,
            emb__weight=torch.zeros(5, 3),
            to_logits__weight=torch.zeros(4),
            to_logits__bias=None,
            other=torch.zeros(1),
        )
        assert_refused(
            path,
            r"does not fit Tiny: missing: to_logits.bias \| unexpected: other \| mismatched: "
            r"emb.weight: expected \(4, 3\), got \(5, 3\); "
            r"to_logits.weight: expected \(4, 3\), got \(4,\)$",
        )

    @pytest.mark.parametrize(
        "value, got",
        [
            ([1.0] * 4, "dense tensor, got list"),
            (torch.zeros(4).to_sparse(), "dense tensor, got Tensor"),
            (torch.zeros(4, device="meta"), "dense tensor, got a tensor without values"),
            (torch.zeros(4, dtype=torch.complex64), "torch.float32, got torch.complex64"),
        ],
    )
    def test_what_is_no_dense_real_tensor(self, tmp_path, value, got):
        assert_refused(self.changed(tmp_path, to_logits__bias=value), f"to_logits.bias: .*{got}")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_weights_that_are_not_finite(self, tmp_path, value):
        bias = torch.tensor([0.0, value, 0.0, 0.0])
        path = self.changed(tmp_path, to_logits__bias=bias)
        assert_refused(path, "NaN or infinite values in to_logits.bias$")

    def test_a_weight_that_the_model_s_precision_cannot_hold(self, tmp_path):
        path = self.changed(tmp_path, to_logits__bias=torch.full((4,), 1e30))
        assert_refused(path, "infinite values in to_logits.bias$", model=Tiny().half())


class TestRename:
    def test_the_first_matching_prefix_is_replaced(self, tmp_path):
        source = Tiny()
        state = {key.replace("to_logits", "head"): v for key, v in source.state_dict().items()}
        state["old_emb"] = state.pop("emb.weight")
        _, path = save_model_state(tmp_path, "x", state, 1)
        messages = []
        model, _ = load_model_state(
            path,
            Tiny(),
            map_rename_modules=iter([("head.", "to_logits."), ("old_emb", "emb.weight")]),
            on_success=messages.append,
        )
        assert_same(copy_of(model), copy_of(source))
        assert messages == [
            "Renamed head.weight to to_logits.weight",
            "Renamed head.bias to to_logits.bias",
            "Renamed old_emb to emb.weight",
        ]

    def test_two_tensors_may_not_get_one_name(self, tmp_path):
        _, path = save_model_state(tmp_path, "x", Tiny(), 1)
        assert_refused(
            path,
            "two tensors the name to_logits.weight",
            map_rename_modules=[("emb.", "to_logits.")],
        )


TABLES = {"emb.weight", "to_logits.weight", "to_logits.bias", "not.there"}


class TestExtend:
    @pytest.mark.parametrize("num_tokens", [4, 5, 9])
    def test_fewer_rows_fill_the_first_rows(self, tmp_path, num_tokens):
        source, target = Tiny(4), Tiny(num_tokens)
        before = copy_of(target)
        _, path = save_model_state(tmp_path, "x", source, 1)
        messages = []
        load_model_state(path, target, map_extend_embeddings=TABLES, on_success=messages.append)
        for key in TABLES - {"not.there"}:
            assert torch.equal(target.state_dict()[key][:4], source.state_dict()[key])
            assert torch.equal(target.state_dict()[key][4:], before[key][4:])
            assert f"Loaded 4 of {num_tokens} rows of {key}" in messages

    def test_the_rows_that_stay_keep_their_precision(self, tmp_path):
        target = Tiny(5)
        last = target.emb.weight[4].clone()
        _, path = save_model_state(tmp_path, "x", Tiny(4).half(), 1)
        load_model_state(path, target, map_extend_embeddings=TABLES)
        assert torch.equal(target.emb.weight[4], last)

    @pytest.mark.parametrize(
        "source, message",
        [
            (Tiny(6), r"emb.weight: expected \(5, 3\), got \(6, 3\)"),
            (Tiny(4, dim=2), r"emb.weight: expected \(5, 3\), got \(4, 2\)"),
        ],
        ids=["more rows", "other width"],
    )
    def test_what_cannot_be_extended_is_named(self, tmp_path, source, message):
        _, path = save_model_state(tmp_path, "x", source, 1)
        assert_refused(path, message, model=Tiny(5), map_extend_embeddings=TABLES)

    def test_only_what_is_listed_is_extended(self, tmp_path):
        _, path = save_model_state(tmp_path, "x", Tiny(4), 1)
        assert_refused(
            path,
            r"mismatched: to_logits.weight: [^;]*; to_logits.bias: [^;]*$",
            model=Tiny(5),
            map_extend_embeddings={"emb.weight"},
        )


def test_a_model_may_migrate_older_keys(tmp_path):
    class Renamed(Tiny):
        def migrate_state_dict(self, state_dict):
            return {key.removeprefix("old."): value for key, value in state_dict.items()}

    source = Tiny(4)
    older = {f"older.{key}": value for key, value in source.state_dict().items()}
    _, path = save_model_state(tmp_path, "x", older, 1)
    model, _ = load_model_state(
        path,
        Renamed(5),
        map_rename_modules=[("older.", "old.")],
        map_extend_embeddings=TABLES,
    )
    assert torch.equal(model.emb.weight[:4], source.emb.weight)


class Tied(Tiny):
    """Embedding and projection are one tensor."""

    def __init__(self):
        super().__init__()
        self.to_logits.weight = self.emb.weight


def test_tied_weights_come_back(tmp_path):
    source = Tied()
    _, path = save_model_state(tmp_path, "x", source, 1)
    for target in (Tied(), Tiny()):
        load_model_state(path, target)
        assert_same(copy_of(target), copy_of(source))


def test_weights_that_differ_do_not_fit_where_they_are_tied(tmp_path):
    _, path = save_model_state(tmp_path, "x", Tiny(), 1)
    assert_refused(path, "emb.weight and to_logits.weight differ, but are tied in Tied", Tied())


@pytest.mark.parametrize("room", [0, 100, 100_000])
def test_a_disk_that_fills_up_is_an_os_error_that_names_the_file(tmp_path, room):
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model\.pth"):
            save_model_state(tmp_path, "model.pth", {"w": torch.zeros(100_000)}, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))
    assert list(tmp_path.iterdir()) == []
