// What a run does between the steps of its stage: see run.h.
#include "cpu/run.h"

namespace mblm::cpu {

void LocalInput::embed(int64_t row, int64_t step, int64_t token, float* out) const {
  std::copy_n(table + token * dim, dim, out);
  if (rotation) {
    const float* angle = rotation + step * dim;
    for (int64_t i = 0; i + 1 < dim; i += 2) {
      const float first = out[i], second = out[i + 1];
      out[i] = first * angle[i] - second * angle[i + 1];
      out[i + 1] = second * angle[i] + first * angle[i + 1];
    }
  }
  const auto add = [&](const float* values) {
    for (int64_t i = 0; i < dim; ++i) out[i] += values[i];
  };
  if (positions) add(positions + step * dim);
  if (context) add(context + row * context_stride + step * dim);
}

void Run::embed_rows() {
  for (int64_t row = 0; row < rows; ++row) {
    input.embed(row, num_steps, pending[row], x + row * input.dim);
  }
}

void Run::sample_rows() {
  const int64_t vocabulary = to_logits.outputs;
  draw(uniform.data());
  bool ended = false;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = sample(sampling, logits.data() + row * vocabulary,
                                 uniform.data() + row * vocabulary, vocabulary, order);
    ids[row * max_tokens + num_tokens] = pending[row] = token;
    ended = ended || (ends && ends[token]);
  }
  ++num_tokens;
  done = ended || num_tokens == max_tokens || num_steps == max_steps;
}

}  // namespace mblm::cpu
