"""Decodes with llama.cpp for `peer.py`, in an environment that has llama-cpp-python and gguf.

Writes a Llama model of random weights, loads it, tells its facts as a line of JSON, and then
decodes once for every line on standard input, answering each with the seconds per token.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf.quants import quantize

VOCABULARY = 256
HEAD_WIDTH = 64


def write_model(path: Path, job: dict[str, Any]) -> int:
    """Write a model of random weights; returns the bytes of weights that one token reads."""
    width, hidden, layers = job["width"], job["feed_forward"], job["layers"]
    kind = gguf.GGMLQuantizationType[job["type"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(width // HEAD_WIDTH)
    writer.add_head_count_kv(width // HEAD_WIDTH)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)

    numbers = np.random.default_rng(0)

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        values = numbers.standard_normal((outputs, inputs), dtype=np.float32) / inputs**0.5
        return quantize(values, kind)

    # Every layer has weights of its own in the file, though of the same values: quick to write.
    layer = {
        "attn_q": matrix(width, width),
        "attn_k": matrix(width, width),
        "attn_v": matrix(width, width),
        "attn_output": matrix(width, width),
        "ffn_gate": matrix(hidden, width),
        "ffn_up": matrix(hidden, width),
        "ffn_down": matrix(width, hidden),
    }
    norm = np.ones(width, np.float32)
    writer.add_tensor("token_embd.weight", matrix(VOCABULARY, width), raw_dtype=kind)
    logits = matrix(VOCABULARY, width)
    writer.add_tensor("output.weight", logits, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", norm)
    for n in range(layers):
        writer.add_tensor(f"blk.{n}.attn_norm.weight", norm)
        writer.add_tensor(f"blk.{n}.ffn_norm.weight", norm)
        for name, weight in layer.items():
            writer.add_tensor(f"blk.{n}.{name}.weight", weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    of_layer = sum(weight.nbytes for weight in layer.values()) + 2 * norm.nbytes
    return layers * of_layer + logits.nbytes + norm.nbytes


class Decoder:
    """A loaded model that decodes one sequence."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp made no context of this model")

    def decode(self, count: int) -> float:
        """Seconds per token, one after another in a new sequence; sampling is left out."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        token = (llama_cpp.llama_token * 1)()
        begin = time.perf_counter()
        for position in range(count):
            token[0] = position * 7 % VOCABULARY
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(token, 1)):
                raise RuntimeError(f"llama_decode failed at position {position}")
            logits = llama_cpp.llama_get_logits(self.context)
        seconds = time.perf_counter() - begin
        if not np.isfinite(logits[:VOCABULARY]).all():
            raise RuntimeError("llama.cpp gave logits that are not finite")
        return seconds / count


def main() -> None:
    job = json.loads(sys.argv[1])
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        size = write_model(path, job)
        decoder = Decoder(path, job["threads"])
        decoder.decode(job["count"])
        facts = {
            "bytes": size,
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }
        print(json.dumps(facts), flush=True)
        for _ in sys.stdin:
            print(json.dumps(decoder.decode(job["count"])), flush=True)


if __name__ == "__main__":
    main()
