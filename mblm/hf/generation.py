"""Hugging Face's ``generate`` on the decoding of an `mblm.MBLM`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mblm.hf.padding import rows_of
from mblm.inference.session import Session
from mblm.model.sampling import gumbel_sample
from mblm.utils.checks import check_id_dtype

_BYTES = 256


class MBLMGenerationMixin(GenerationMixin):
    """Greedy decoding and sampling.

    What the decoding engine can do, it does; where the library's functions have a say in each byte,
    they are called. Either way the same bytes come for the same seed. Beams and assisted decoding
    are refused.
    """

    _is_stateful = True
    _supported_generation_modes = [  # noqa: RUF012
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
    ]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``GenerationMixin.generate``; without a prompt, from nothing."""
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if inputs is None:
            inputs = torch.empty(1, 0, dtype=torch.long, device=self.device)
        inputs = check_id_dtype("input_ids", inputs)
        if inputs.ndim != 2 or not len(inputs):
            raise ValueError(
                f"input_ids: expected shape (B, L) of at least one row, got {tuple(inputs.shape)}"
            )
        return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Refused: the library's is for caches of its own."""
        raise NotImplementedError(
            "many prompts in one call: model.model.generate_batch, of the mblm.MBLM"
        )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """All bytes may come unless ``top_k`` is given: 50 is for vocabularies of thousands.

        There is no cache of the library's, which what it calls in between would count on.
        """
        given = (generation_config, self.generation_config)
        top_k = [kwargs.get("top_k"), *(config and config.top_k for config in given)]
        prepared, others = super()._prepare_generation_config(generation_config, *args, **kwargs)
        if all(k is None for k in top_k):
            prepared.top_k = 0
        prepared.use_cache = False
        return prepared, others

    def heal_tokens(self, input_ids: Tensor, tokenizer: Any = None) -> Tensor:
        """The prompt as it is: no token straddles its end."""
        return input_ids

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
        logits_processor: list[Any],
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        tokenizer: Any = None,
        **others: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue prompts ``(B, L)`` as the library has prepared it."""
        if unknown := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{', '.join(unknown)}: not known to {type(self).__name__}")
        prompts = rows_of(input_ids, attention_mask)
        count = max(stopping_criteria.max_length - input_ids.shape[1], 1)
        longest, limit = max(map(len, prompts)), self.model.max_length
        if limit is not None and longest + count > limit:
            raise ValueError(
                f"max_new_tokens: {count} bytes after a prompt of {longest} exceed the context of "
                f"{limit} bytes"
            )
        for criterion in stopping_criteria:
            if isinstance(criterion, StopBytes):
                criterion.begin = input_ids.shape[1]
        pad = generation_config.pad_token_id
        pad = self.config.pad_token_id if pad is None else pad
        wishes = _sampling(
            logits_processor, generation_config, self.model.num_tokens, self.model.device
        )
        stops = _stops(stopping_criteria)
        is_recorded = generation_config.output_scores or generation_config.output_logits
        is_streamed_at_once = streamer is not None and len(prompts) > 1
        if wishes is None or stops is None or is_recorded or is_streamed_at_once:
            output = _run_byte_by_byte(
                Session(self.model, len(prompts)).feed(prompts),
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
                pad,
            )
        else:
            rows = _run(self.model, prompts, count, wishes | stops, streamer)
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
            sequences = torch.cat([input_ids, padded.to(input_ids.device)], 1)
            output = GenerateDecoderOnlyOutput(sequences=sequences)
        if streamer is not None:
            streamer.end()
        return output if generation_config.return_dict_in_generate else output.sequences


class StopBytes(StoppingCriteria):
    """Ends a row that was generated up to any of some strings.

    Args:
        strings: The strings, as UTF-8.

    Attributes:
        begin: Where what is generated begins.
    """

    def __init__(self, strings: list[str]) -> None:
        is_list = isinstance(strings, (list, tuple))
        if not is_list or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop_strings: expected texts, none empty, got {strings!r}")
        self.strings = [string.encode() for string in strings]
        self.begin = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows of ``input_ids (B, L)`` end with one of them, ``(B,)``."""
        generated = input_ids[:, self.begin :]
        ended = input_ids.new_zeros(len(input_ids), dtype=torch.bool)
        for string in self.strings:
            if len(string) <= generated.shape[1]:
                end = torch.tensor(list(string), device=input_ids.device)
                ended |= (generated[:, -len(string) :] == end).all(1)
        return ended


def _run(
    model: Any, prompts: list[Tensor], count: int, wishes: dict[str, Any], streamer: Any
) -> list[Tensor]:
    """Generate by the engine: what comes after each prompt; with a streamer, after one."""
    if streamer is None:
        return list(Session(model, len(prompts)).feed(prompts).generate(count, **wishes))
    (prompt,), to_streamer = prompts, _ToStreamer(streamer)
    ids = model.generate(prompt, to_streamer, num_tokens_to_generate=count, **wishes)
    return [ids[len(prompt) :]]


class _ToStreamer:
    """A streamer of the library's with the face of a `ByteStreamer`."""

    def __init__(self, streamer: Any) -> None:
        self._put = streamer.put

    def write(self, token: int) -> None:
        self._put(torch.tensor([token]))

    def flush(self) -> None:
        """Nothing: a streamer shows what it gets."""


def _run_byte_by_byte(
    session: Session,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any,
    pad: int,
) -> GenerateDecoderOnlyOutput:
    """Generate with the library's functions, which see each byte of all rows."""
    scores: tuple[Tensor, ...] = ()
    raw: tuple[Tensor, ...] = ()
    going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        logits = session.logits().to(input_ids.device, torch.float32)
        processed = logits_processor(input_ids, logits)
        if generation_config.output_scores:
            scores += (processed,)
        if generation_config.output_logits:
            raw += (logits,)
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
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores or None, logits=raw or None)


def _sampling(
    processors: list[Any],
    generation_config: GenerationConfig,
    num_tokens: int,
    device: torch.device,
) -> dict[str, Any] | None:
    """What processors of logits mean as arguments of a request; None if they are others."""
    kinds = [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]
    names = ["temperature", "top_k", "top_p", "min_p"]
    wishes: dict[str, Any] = {}
    for processor in processors:
        if type(processor) not in kinds:
            return None
        at = kinds.index(type(processor))  # and from here on only those that come after it
        wishes[names[at]] = getattr(processor, names[at])
        if at and (processor.min_tokens_to_keep, processor.filter_value) != (1, -float("inf")):
            return None
        kinds, names = kinds[at + 1 :], names[at + 1 :]
    if not generation_config.do_sample:  # for which the library draws no numbers
        return {"temperature": 0.0, "generator": torch.Generator(device)}
    if {"top_k", "top_p"} <= wishes.keys() or wishes.get("top_p") == 0:
        return None
    if "top_p" not in wishes:
        wishes["top_k"] = min(wishes.get("top_k", num_tokens), num_tokens)
    return wishes


def _stops(criteria: StoppingCriteriaList) -> dict[str, Any] | None:
    """What ends rows as arguments of a request; None if it is something else."""
    strings: list[bytes] = []
    ends: set[int] = set()
    for criterion in criteria:
        if type(criterion) is StopBytes:
            strings += criterion.strings
        elif type(criterion) is EosTokenCriteria:
            ends.update(criterion.eos_token_id.tolist())
        elif type(criterion) is not MaxLengthCriteria:
            return None
    special = [end for end in ends if end >= _BYTES]
    strings += [bytes([end]) for end in ends if 0 <= end < _BYTES]
    if len(special) > 1:
        return None
    return {"stop": strings, "end_of_gen_token_id": special[0] if special else None}
