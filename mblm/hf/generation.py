"""Hugging Face's ``generate`` on the decoding of an `mblm.MBLM`."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from mblm.hf.padding import rows_of
from mblm.inference.session import Session
from mblm.model.sampling import gumbel_sample


class MBLMGenerationMixin(GenerationMixin):
    """Greedy decoding and sampling; what needs a cache of the library's own is refused."""

    _is_stateful = True
    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]  # noqa: RUF012

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``GenerationMixin.generate``; without a prompt, from nothing."""
        if inputs is None and kwargs.get("input_ids") is None:
            inputs = torch.empty(1, 0, dtype=torch.long, device=self.device)
            kwargs.pop("input_ids", None)
        return super().generate(inputs, *args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """All bytes may come unless ``top_k`` is given: 50 is for vocabularies of thousands."""
        given = (
            kwargs.get("top_k"),
            *(config and config.top_k for config in (generation_config, self.generation_config)),
        )
        prepared, others = super()._prepare_generation_config(generation_config, *args, **kwargs)
        if all(top_k is None for top_k in given):
            prepared.top_k = 0
        return prepared, others

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> StoppingCriteriaList:
        """Stop strings end a row by their bytes, for which no tokenizer is needed."""
        stops, generation_config.stop_strings = generation_config.stop_strings, None
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if stops:
            criteria.append(StopBytes([stops] if isinstance(stops, str) else stops))
        return criteria

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate byte by byte, and ask for the library's wishes at each."""
        session = Session(self.model, len(input_ids)).feed(rows_of(input_ids, attention_mask))
        pad = generation_config.pad_token_id
        pad = self.config.pad_token_id if pad is None else pad
        going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        scores: tuple[Tensor, ...] = ()
        all_logits: tuple[Tensor, ...] = ()
        while True:
            logits = session.logits().to(input_ids.device, torch.float32)
            processed = logits_processor(input_ids, logits)
            if generation_config.output_scores:
                scores += (processed,)
            if generation_config.output_logits:
                all_logits += (logits,)
            sampled = generation_config.do_sample
            chosen = gumbel_sample(processed) if sampled else processed.argmax(-1)
            chosen = chosen.masked_fill(~going, pad)
            input_ids = torch.cat([input_ids, chosen[:, None]], 1)
            if streamer is not None:
                streamer.put(chosen.cpu())
            going = going & ~stopping_criteria(input_ids, scores)
            if not going.any():
                break
            session.feed(chosen[:, None])
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids, scores=scores or None, logits=all_logits or None
        )


class StopBytes(StoppingCriteria):
    """Ends a row after any of some strings.

    Args:
        strings: The strings, as UTF-8.
    """

    def __init__(self, strings: list[str]) -> None:
        self.strings = [string.encode() for string in strings]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows of ``input_ids (B, L)`` end with one of them, ``(B,)``."""
        ends = [
            (input_ids[:, -len(s) :] == torch.tensor(list(s), device=input_ids.device)).all(1)
            if input_ids.shape[1] >= len(s)
            else input_ids.new_zeros(len(input_ids), dtype=torch.bool)
            for s in self.strings
        ]
        return torch.stack(ends).any(0)
