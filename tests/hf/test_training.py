"""Training, adapters and quantized weights by Hugging Face's libraries and torchao."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the extra hf is NOT tested")
accelerate = pytest.importorskip("accelerate", reason="the extra hf is NOT tested")

from mblm import MBLM, MBLMReturnType, Session  # noqa: E402
from mblm.hf import MBLMForCausalLM, MBLMTokenizer  # noqa: E402
from mblm.inference.native_cache import NativeCache  # noqa: E402
from mblm.inference.torch_cache import TorchCache  # noqa: E402
from mblm.ops._native import is_loaded  # noqa: E402
from tests.models import mamba, model, transformer  # noqa: E402

TEXTS = [f"text number {i}. " * (1 + i % 3) for i in range(12)]
IDS = torch.tensor([list(b"some bytes"), list(b"and others")])
BLOCKS = {"transformer": transformer, "mamba1": mamba, "mamba2": lambda: mamba("mamba2")}


@pytest.fixture(autouse=True)
def _settings_of_their_own() -> Iterator[None]:
    """`accelerate` keeps a process to the settings that it began with."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def build(kind: str = "transformer", **fields: Any) -> MBLM:
    torch.manual_seed(0)
    block = BLOCKS[kind](**fields)
    return model(block, seq_lens=[30, 4], num_tokens=257, hidden_dims=[16, 8])


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class TestTrainer:
    def trainer(self, folder: Path, lm: Any, size: int = 2, **arguments: Any) -> Any:
        # The library counts labels after padding as well, which at the left is one too many.
        tokenizer = MBLMTokenizer(padding_side="right")
        options = transformers.TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=size,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        )
        return transformers.Trainer(
            lm,
            options,
            train_dataset=[tokenizer(text) for text in TEXTS],
            eval_dataset=[tokenizer(text) for text in TEXTS[:4]],
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )

    def dropping(self) -> MBLMForCausalLM:
        return MBLMForCausalLM.from_mblm(build(attn_dropout=0.1, ff_dropout=0.1))

    @pytest.mark.parametrize(
        "arguments",
        [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}],
        ids=["float32", "bfloat16", "accumulated"],
    )
    def test_stopped_and_resumed_ends_with_the_same_bits(
        self, tmp_path: Path, arguments: dict[str, Any]
    ) -> None:
        whole, resumed = self.dropping(), self.dropping()
        before = [p.clone() for p in whole.parameters()]
        self.trainer(tmp_path, whole, **arguments).train()
        assert not any(map(torch.equal, before, whole.parameters()))
        trainer = self.trainer(tmp_path / "other", resumed, **arguments)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert same(whole, resumed)

    def test_batches_in_parts_train_as_a_whole(self, tmp_path: Path) -> None:
        trained = []
        for size, parts in ((4, 1), (2, 2)):
            lm = MBLMForCausalLM.from_mblm(build())
            trainer = self.trainer(tmp_path, lm, size, gradient_accumulation_steps=parts)
            trainer.args.max_grad_norm = 0
            trainer.train()
            trained.append(lm)
        for one, other in zip(*(lm.parameters() for lm in trained), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

    def test_smooths_the_labels_of_the_next_bytes(self, tmp_path: Path) -> None:
        lm = MBLMForCausalLM.from_mblm(build())
        trainer = self.trainer(tmp_path, lm, label_smoothing_factor=0.1)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        loss = trainer.compute_loss(lm, dict(batch))
        logits = lm(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected)

    def test_evaluates_and_writes_folders_that_both_libraries_read(self, tmp_path: Path) -> None:
        lm = self.dropping()
        trainer = self.trainer(tmp_path, lm)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        assert same(MBLM.from_pretrained(tmp_path / "checkpoint-4"), lm.model)
        folder = str(tmp_path / "checkpoint-4")
        assert same(transformers.AutoModelForCausalLM.from_pretrained(folder), lm)
        assert type(transformers.AutoTokenizer.from_pretrained(folder)) is MBLMTokenizer


@pytest.mark.parametrize("face", ["mblm", "transformers"])
def test_accelerate_trains_saves_and_resumes(face: str, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    m: Any = build(attn_dropout=0.1)
    m = m.train() if face == "mblm" else MBLMForCausalLM.from_mblm(m).train()
    prepared, optimizer = accelerator.prepare(m, torch.optim.Adam(m.parameters(), 0.01))

    def step() -> float:
        optimizer.zero_grad()
        loss = prepared(IDS) if face == "mblm" else prepared(IDS, labels=IDS).loss
        accelerator.backward(loss)
        optimizer.step()
        return loss.item()

    losses = [step(), step()]
    accelerator.save_state(tmp_path)
    losses += [step(), step()]
    whole = [p.clone() for p in m.parameters()]
    accelerator.load_state(tmp_path)
    assert [step(), step()] == losses[2:] and losses[3] < losses[0]
    assert all(map(torch.equal, whole, m.parameters()))


def decoded_logits(m: MBLM) -> Tensor:
    return Session(m, 2).feed(IDS[:, :7]).feed(IDS[:, 7:]).logits()


def engine(m: MBLM) -> type:
    return type(Session(m)._cache)


class TestPeft:
    @pytest.fixture(autouse=True)
    def peft(self) -> Any:
        return pytest.importorskip("peft", reason="peft is not installed: LoRA is NOT tested")

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    @pytest.mark.parametrize("face", ["mblm", "transformers"])
    def test_all_linear_layers_train_decode_and_merge(
        self, peft: Any, face: str, kind: str
    ) -> None:
        m = build(kind)
        base: Any = m if face == "mblm" else MBLMForCausalLM.from_mblm(m)
        plain = decoded_logits(m)
        linears = [n for n, part in base.named_modules() if isinstance(part, nn.Linear)]
        if face == "transformers":  # peft leaves out what computes the logits
            linears.remove("model.to_logits")
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(base, config)

        loss = adapted(IDS) if face == "mblm" else adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
        assert len(adapters) == 2 * len(linears)
        assert [n for n, p in adapters.items() if p.grad is None or not p.grad.any()] == []

        unmerged = decoded_logits(m)
        assert (unmerged - plain).abs().max() > 0.01 and engine(m) is TorchCache
        output = (
            base(IDS, return_type=MBLMReturnType.LOGITS) if face == "mblm" else base(IDS).logits
        )
        torch.testing.assert_close(unmerged, output[:, -1], rtol=1e-4, atol=1e-5)
        assert adapted.merge_and_unload() is base
        torch.testing.assert_close(decoded_logits(m), unmerged, rtol=1e-4, atol=1e-5)
        if is_loaded():
            assert engine(m) is NativeCache

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_adapters_alone_are_saved_and_loaded(self, peft: Any, tmp_path: Path) -> None:
        config = peft.LoraConfig(
            r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        MBLMForCausalLM.from_mblm(build()).save_pretrained(tmp_path / "base")
        base = MBLMForCausalLM.from_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(base, config)
        generated = adapted.generate(input_ids=IDS, max_new_tokens=5)
        adapted.save_pretrained(tmp_path / "adapters")
        assert not (tmp_path / "adapters" / "model.safetensors").exists()
        for loaded in (
            peft.PeftModel.from_pretrained(
                MBLMForCausalLM.from_mblm(build()), tmp_path / "adapters"
            ),
            transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "adapters")),
        ):
            assert torch.equal(loaded.generate(input_ids=IDS, max_new_tokens=5), generated)


@pytest.fixture
def torchao() -> Any:
    try:
        return importlib.import_module("torchao.quantization")
    except (ImportError, AttributeError) as error:  # it asks torch for names of later releases
        pytest.skip(f"torchao cannot be imported, int8 is NOT tested: {error}")


@pytest.mark.filterwarnings("ignore")
def test_torchao_quantizes_the_weights(torchao: Any) -> None:
    lm = MBLMForCausalLM.from_mblm(build())
    before = decoded_logits(lm.model)
    torchao.quantize_(lm, torchao.Int8WeightOnlyConfig())
    assert type(lm.model.to_logits.weight) is not nn.Parameter
    after = decoded_logits(lm.model)
    assert 0 < (after - before).abs().max() < 0.2 and engine(lm.model) is TorchCache
    torch.testing.assert_close(lm(IDS).logits[:, -1], after, rtol=1e-3, atol=1e-3)
    assert lm.generate(IDS, max_new_tokens=3).shape == (2, IDS.shape[1] + 3)


@pytest.mark.filterwarnings("ignore")
def test_torchao_quantizes_what_is_loaded(torchao: Any, tmp_path: Path) -> None:
    MBLMForCausalLM.from_mblm(build()).save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    load = transformers.AutoModelForCausalLM.from_pretrained
    lm = load(str(tmp_path), quantization_config=config)
    layer = lm.model.stage_models[0].layers[0][0].to_q
    assert type(layer.weight) is not nn.Parameter
    lm.save_pretrained(tmp_path / "quantized")
    again = load(str(tmp_path / "quantized"))
    generated = lm.generate(IDS, max_new_tokens=5)
    assert torch.equal(again.generate(IDS, max_new_tokens=5), generated)
