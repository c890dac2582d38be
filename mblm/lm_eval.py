"""The model ``mblm`` of lm-evaluation-harness: importing this module registers it.

The harness finds models by import alone, so that its command line is started from here:

    python -m mblm.lm_eval --model mblm --model_args pretrained=my-model --tasks ...
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from mblm.inference.prompt import utf8
from mblm.inference.score import Score
from mblm.inference.scorer import BATCH_BYTES, sequence_length
from mblm.model.mblm import MBLM
from mblm.model.pretrained import load_checkpoint
from mblm.utils.checks import check_integer
from mblm.utils.cuda import find_device

# Requests that are scored between two steps of the progress bar.
_AT_ONCE = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@register_model("mblm")
class MBLMForHarness(LM):
    """What the harness asks of a model, of bytes: contexts need no tokens and no special ones.

    Args:
        pretrained: A folder from ``save_pretrained``, a run's folder, its ``.pth`` file, ``latest``
            or a model's id on the hub; or an `mblm.MBLM`.
        device: Such as ``cpu`` or ``cuda:1``. Default, and for ``cuda:0``: a GPU if there is one.
        length, stride, batch_bytes: See `mblm.MBLM.score`.
        weights: What compiled code reads weights as when it generates; see `mblm.Session`.
        max_rows: How many texts are generated side by side. Default 64.
        max_gen_toks: Bytes to generate where a task does not say. Default 256.
        batch_size, max_batch_size: The harness's, not looked at.
    """

    tokenizer_name = "bytes"  # which the harness knows its cached requests by

    def __init__(
        self,
        pretrained: Any,
        *,
        device: str | None = None,
        length: int | None = None,
        stride: int | None = None,
        batch_bytes: int = BATCH_BYTES,
        weights: str = "float32",
        max_rows: int = 64,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, MBLM):
            # The harness asks for a GPU where nobody has asked for one.
            is_asked = device != "cuda:0" or torch.cuda.is_available()
            place = find_device(device if is_asked else None)
            pretrained = load_checkpoint(MBLM, str(pretrained), map_location=place).float()
        self.model: MBLM = pretrained.eval()
        self._device = self.model.device
        self._of_scores: dict[str, Any] = {
            "length": length,
            "stride": stride,
            "batch_bytes": batch_bytes,
        }
        self._of_generations: dict[str, Any] = {
            "filter_thres": 0.0,  # which a temperature of 0 does not look at
            "weights": weights,
            "max_rows": max_rows,
        }
        self._max_gen_toks = check_integer("max_gen_toks", max_gen_toks, 0)
        self.model.score(b"", **self._of_scores)  # which refuse what is wrong
        self.model.generate_batch([], **self._of_generations, enable_progress=False)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of continuations after contexts, and whether each is greedy.

        Of a context that does not fit with its continuation, only the end counts.
        """
        return self._scored(
            "loglikelihood", requests, disable_tqdm, lambda s: (_nats(s), s.is_greedy)
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of whole texts, in windows where they exceed the context."""
        return self._scored("loglikelihood_rolling", requests, disable_tqdm, _nats)

    def _scored(
        self, kind: str, requests: list[Instance], disable_tqdm: bool, result: Callable[..., Any]
    ) -> list[Any]:
        """The results of the scores of each request's last text, given what comes before it."""
        results = []
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for first in range(0, len(requests), _AT_ONCE):
                part = requests[first : first + _AT_ONCE]
                texts = [request.args[-1] for request in part]
                given = ["".join(request.args[:-1]) for request in part]
                scores: Any = self.model.score(texts, given, **self._of_scores)
                for request, score in zip(part, scores, strict=True):
                    results.append(result(score))
                    self.cache_hook.add_partial(kind, request.args, results[-1])
                bar.update(len(part))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is generated after contexts, up to a stop text, which is cut off.

        Of a context that leaves no room for what is to be generated, only the end counts.
        """
        if not requests:
            return []
        wishes = [self._wishes(*request.args) for request in requests]
        by_name: dict[str, Any] = {name: [each[name] for each in wishes] for name in wishes[0]}
        generations = self.model.generate_batch(
            **by_name, **self._of_generations, enable_progress=not disable_tqdm
        )
        results = []
        for request, each, generation in zip(requests, wishes, generations, strict=True):
            data = generation.data
            for stop in each["stop"]:
                data = data.split(stop)[0]
            results.append(data.decode(errors="replace"))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _wishes(self, context: str, options: dict[str, Any]) -> dict[str, Any]:
        """What `MBLM.generate_batch` takes for one prompt."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, self._max_gen_toks))
        prompt = utf8("context", context)
        count = check_integer("max_gen_toks", given.pop("max_gen_toks"), 0)
        if (limit := sequence_length(self.model)) is not None:
            if count >= limit:
                raise ValueError(
                    f"max_gen_toks: {count} bytes leave no room for a prompt in the context of "
                    f"{limit}; pass fewer, such as --gen_kwargs max_gen_toks={limit // 2}"
                )
            prompt = prompt[count - limit :]
        stops = tuple(utf8("until", stop) for stop in given.pop("until") if stop)
        sampling = {name: given.pop(name, None) for name in _SAMPLING}
        if sampling["temperature"] is None:
            sampling["temperature"] = 1.0
        if not given.pop("do_sample"):  # to the likeliest byte, filters mean nothing
            sampling = {**dict.fromkeys(_SAMPLING), "temperature": 0.0}
        if given:
            logging.getLogger(__name__).warning("generation ignores %s", ", ".join(given))
        return {"prompts": prompt, "max_bytes": count, "stop": stops, **sampling}


def _nats(score: Score) -> float:
    return float(score.log_probs.double().sum())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
