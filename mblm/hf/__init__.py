"""Models for Hugging Face's libraries; importing this registers them for ``Auto`` classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mblm.hf.config import MBLMConfig
from mblm.hf.model import MBLMForCausalLM
from mblm.hf.tokenizer import MBLMTokenizer

__all__ = ["MBLMConfig", "MBLMForCausalLM", "MBLMTokenizer"]

AutoConfig.register(MBLMConfig.model_type, MBLMConfig, exist_ok=True)
AutoModelForCausalLM.register(MBLMConfig, MBLMForCausalLM, exist_ok=True)
AutoTokenizer.register(MBLMConfig, MBLMTokenizer, exist_ok=True)
# By this name a Trainer that smooths labels knows that they are to be shifted.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MBLMConfig.model_type] = MBLMForCausalLM.__name__
