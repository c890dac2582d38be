"""Checkpoints written here load strictly in the reference release, which computes the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mblm import MBLM, MBLMEncoder, MBLMReturnType
from mblm.utils.io import dump_yml, load_model_state, save_model_state
from tests.models import encoder, mamba, model, transformer
from tests.reference import needs_reference, run_program

pytestmark = needs_reference
CLOSE = {"atol": 2e-5, "rtol": 1e-4}

PROGRAM = """
    import sys, torch
    from safetensors.torch import load_file, save_file
    from mblm import *
    from mblm.utils.io import load_model_state, load_yml, save_model_state

    folder, kind = sys.argv[1:]
    inputs = load_file(f"{folder}/inputs.safetensors")
    config = load_yml(f"{folder}/config.yaml", MBLMModelConfig)
    if kind == "encoder":
        model = MBLMEncoder(MBLMEncoderModelConfig(mask_token_id=17, mblm_config=config))
    else:
        model = MBLM(config)
    saved = torch.load(f"{folder}/here.pth", weights_only=True)
    assert list(saved["MODEL"]) == list(model.state_dict()), "the order of the keys"
    _, loss = load_model_state(f"{folder}/here.pth", model.eval())
    assert loss == 0.25
    save_model_state(folder, "there", model, 0.75)
    ids, outputs = inputs["ids"], {}
    with torch.no_grad():
        arguments = {}
        if kind == "encoder":
            arguments = {"attention_mask": inputs["mask"], "labels": ids.clone()}
        loss, logits = model(ids, return_type=MBLMReturnType.LOSS_LOGITS, **arguments)
        outputs["logits"], outputs["loss"] = logits.contiguous(), loss[None]
        if kind == "decoder":
            torch.manual_seed(5)
            outputs["sampled"] = model.generate(
                ids[0, :7], temperature=0.9, filter_thres=0.5, enable_progress=False
            ).clone()
            outputs["draws"] = torch.rand(1)
    save_file(outputs, f"{folder}/outputs.safetensors")
"""

DECODERS = {
    "transformers": lambda: model(transformer(), seq_lens=[6, 4], num_layers=[2, 1]),
    "three stages": lambda: model(
        mamba("mamba1"), transformer(pos_emb_type="rope"), transformer(), seq_lens=[4, 3, 2]
    ),
    "one stage": lambda: model(transformer(pos_emb_type=None), seq_lens=[24]),
}


def ask_reference(folder: Path, kind: str, m: MBLM | MBLMEncoder, **inputs: torch.Tensor) -> dict:
    save_model_state(folder, "here", m, 0.25)
    dump_yml(folder / "config", m.config)
    save_file(inputs, folder / "inputs.safetensors")
    run_program(PROGRAM, folder, kind, folder=folder)
    return load_file(folder / "outputs.safetensors")


@pytest.mark.parametrize("build", DECODERS.values(), ids=DECODERS)
def test_a_decoder(build, tmp_path: Path) -> None:
    m = build()
    ids = torch.randint(0, 18, (2, 13))
    outputs = ask_reference(tmp_path, "decoder", m, ids=ids)
    with torch.no_grad():
        loss, logits = m(ids, return_type=MBLMReturnType.LOSS_LOGITS)
    torch.testing.assert_close(logits, outputs["logits"], **CLOSE)
    torch.testing.assert_close(loss, outputs["loss"][0], **CLOSE)

    torch.manual_seed(5)
    sampled = m.generate(ids[0, :7], temperature=0.9, filter_thres=0.5, enable_progress=False)
    assert sampled.tolist() == outputs["sampled"].tolist()
    assert torch.equal(torch.rand(1), outputs["draws"]), "as many random numbers were drawn"

    fresh = build()
    _, saved_loss = load_model_state(tmp_path / "there.pth", fresh)
    assert saved_loss == 0.75
    assert torch.equal(
        fresh(ids, return_type=MBLMReturnType.LOGITS), m(ids, return_type=MBLMReturnType.LOGITS)
    )


def test_an_encoder(tmp_path: Path) -> None:
    m = encoder(seq_lens=[6, 4])
    ids, mask = torch.randint(0, 17, (2, 13)), torch.rand(2, 13) < 0.8
    outputs = ask_reference(tmp_path, "encoder", m, ids=ids, mask=mask)
    with torch.no_grad():
        loss, logits = m(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(logits, outputs["logits"], **CLOSE)
    torch.testing.assert_close(loss, outputs["loss"][0], **CLOSE)
