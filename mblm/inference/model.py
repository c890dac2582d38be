"""Whether a model decodes."""

from typing import Any


def check_model(model: Any) -> None:
    """Refuse what does not decode."""
    if not hasattr(model, "empty_logits"):
        raise TypeError(f"model: expected an mblm.MBLM, got {type(model).__name__}")
    if model.device.type == "meta":
        raise ValueError("model: it is on the device meta, where weights have no values")
