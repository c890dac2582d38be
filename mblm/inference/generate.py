"""The generation loop behind `MBLM.generate`: a prompt in, bytes out, streamed as they come."""

import io
from collections.abc import Collection, Sequence
from typing import Any

import torch
from tqdm import tqdm

from mblm.inference.automaton import Automaton
from mblm.inference.continuation import Continuation, generator_on
from mblm.inference.sampling import Sampler
from mblm.inference.session import Session
from mblm.model.stage import has_values
from mblm.utils.checks import check_integer, check_token_ids
from mblm.utils.modes import own_copy
from mblm.utils.stream import ByteStreamer


def generate(
    model: Any,
    prime: torch.Tensor | None = None,
    *,
    stream: ByteStreamer | None = None,
    num_tokens: int | None = None,
    end_token_id: int | None = -1,
    temperature: float = 1.0,
    filter_thres: float = 1.0,
    top_p: float | None = None,
    stop: Sequence[bytes] = (),
    seed: int | None = None,
    generator: torch.Generator | None = None,
    weights: str = "float32",
    enable_progress: bool = True,
) -> torch.Tensor:
    """Generate bytes after a prompt; must run under ``torch.inference_mode``.

    Args:
        model: An `mblm.MBLM`.
        prime: The prompt, token ids ``(L,)`` of any integer dtype, or None.
        stream: Where bytes go, every 20 ms those that have come. When its reader is gone (a broken
            pipe or connection), generation ends and what the stream was given is returned.
        num_tokens: How many bytes to generate. Default: up to the context, ``prod(seq_lens)``.
        end_token_id: Generation ends after this id, which is kept and streamed. Default: none.
        temperature: See `mblm.inference.sampling.Sampler`, as the next two.
        filter_thres: Default 1: the likeliest byte is taken.
        top_p: Replaces ``filter_thres`` where given.
        stop: Generation ends after any of these byte strings, which is kept.
        seed: Draws from a generator of its own with this seed: the bytes are those that
            ``torch.manual_seed(seed)`` before the call gives.
        generator: The generator to draw from; not together with ``seed``.
        weights: Type of the weights that compiled code reads; see `mblm.inference.session.Session`.
        enable_progress: Show a progress bar when there is no stream. Default True.

    Returns:
        The prompt followed by what was generated, token ids ``(L + generated,)`` int64.

    Raises:
        TypeError, ValueError: Bad input, a prompt longer than the context, or NaN weights; before
            anything is generated.
        BaseException: What the stream raises has the prompt and what the stream was given as its
            attribute ``ids``; anything else, Ctrl-C too, the prompt and all that was chosen.
    """
    device = model.device
    sampler = Sampler(temperature, filter_thres, top_p, _generator(seed, generator, device))
    generator_on(device, sampler.generator)
    stops = _check_stops(stop)
    _check_stream(stream)
    if end_token_id is not None:
        end_token_id = check_integer("end_of_gen_token_id", end_token_id)
    if prime is None:
        prime = torch.empty(0, dtype=torch.long, device=device)
    if isinstance(prime, torch.Tensor):
        has_values("prime", prime)
    prime = check_token_ids("prime", prime, model.num_tokens).to(device)
    if prime.ndim != 1:
        raise ValueError(f"prime: expected shape (L,), got {tuple(prime.shape)}")
    count = _check_count(model, len(prime), num_tokens)

    continuation: Continuation | None = None
    written: list[int] = []
    is_writing = False
    try:
        session = Session(model, weights=weights)
        session.feed(prime)
        continuation = session.begin(count, sampler, _stop(model, end_token_id, stops))
        with tqdm(
            total=count, unit="B", leave=False, disable=stream is not None or not enable_progress
        ) as bar:
            for (ran,) in continuation.runs():
                bar.update(len(ran.ids))
                for token in ran.ids.tolist() if stream is not None else ():
                    written.append(token)
                    is_writing = True
                    if not _write(stream, token):
                        return _joined(prime, written)
                    is_writing = False
        is_writing = stream is not None
        _write(stream, None)
        return _joined(prime, continuation.ids()[0])
    except BaseException as error:
        chosen = None if continuation is None or is_writing else continuation.settle()[0]
        ids = _joined(prime, written if chosen is None else chosen)
        error.ids = ids  # type: ignore[attr-defined]
        raise


def _joined(prime: torch.Tensor, ids: torch.Tensor | list[int]) -> torch.Tensor:
    ids = torch.as_tensor(ids, dtype=torch.long, device=prime.device)
    return own_copy(torch.cat((prime, ids)))


def _generator(
    seed: int | None, generator: torch.Generator | None, device: torch.device
) -> torch.Generator | None:
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("pass at most one of seed and generator")
    seed = check_integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer in [-2**63, 2**64), got {seed}")
    return torch.Generator(device).manual_seed(seed)


def _check_stops(stop: Sequence[bytes]) -> Collection[bytes]:
    if (
        isinstance(stop, (bytes, bytearray, str))
        or not isinstance(stop, Collection)
        or not all(isinstance(item, bytes) and item for item in stop)
    ):
        raise ValueError(f"stop: expected a list of byte strings that are not empty, got {stop!r}")
    return stop


def _stop(model: Any, end_token_id: int | None, stops: Collection[bytes]) -> Automaton | None:
    """Accepts where generation ends; None if nothing ends it."""
    strings = [*stops, *([] if end_token_id is None else [[end_token_id]])]
    return Automaton.of_strings(strings, model.num_tokens) if strings else None


def _check_stream(stream: Any) -> None:
    if stream is None:
        return
    if isinstance(stream, io.IOBase) or not callable(getattr(stream, "write", None)):
        raise TypeError(
            f"stream: expected a ByteStreamer, got {type(stream).__name__}; wrap a file or a "
            "terminal, ByteStreamer(stream)"
        )


def _check_count(model: Any, prompt_length: int, num_tokens: int | None) -> int:
    """How many bytes to generate; refuses what does not fit the context."""
    limit = model.max_length
    if limit is not None and prompt_length > limit:
        raise ValueError(f"prime: {prompt_length} bytes exceed the context of {limit} bytes")
    if num_tokens is None:
        return max(0, model.context_size - prompt_length)
    num_tokens = check_integer("num_tokens_to_generate", num_tokens)
    if num_tokens < 0:
        raise ValueError(f"num_tokens_to_generate: expected a number >= 0, got {num_tokens}")
    if limit is not None and prompt_length + num_tokens > limit:
        raise ValueError(
            f"num_tokens_to_generate: {num_tokens} bytes after a prompt of {prompt_length} exceed "
            f"the context of {limit} bytes"
        )
    return num_tokens


def _write(stream: ByteStreamer | None, token: int | None) -> bool:
    """Write a byte, or flush for None; False if there is nobody to read it any more."""
    if stream is None:
        return True
    try:
        if token is None:
            stream.flush()
        else:
            stream.write(token)
    except ConnectionError:
        return False
    return True
