// What a run does between the steps of its stage: see run.h.
#include "cpu/run.h"

#include <numeric>

namespace mblm::cpu {

void LocalInput::embed(int64_t position, int64_t token, const float* context, float* out) const {
  std::copy_n(table + token * dim, dim, out);
  if (rotation) {
    const float* angle = rotation + position * dim;
    for (int64_t i = 0; i + 1 < dim; i += 2) {
      const float first = out[i], second = out[i + 1];
      out[i] = first * angle[i] - second * angle[i + 1];
      out[i + 1] = second * angle[i] + first * angle[i + 1];
    }
  }
  const auto add = [&](const float* values) {
    for (int64_t i = 0; i < dim; ++i) out[i] += values[i];
  };
  if (positions) add(positions + position * dim);
  if (context) add(context + position * dim);
}

void Run::begin() {
  active.resize(rows.size());
  std::iota(active.begin(), active.end(), 0);
  x.resize(active.size() * input.dim);
  logits.resize(active.size() * to_logits.outputs);
  for (const int64_t row : active) {
    std::copy_n(rows[row].x, input.dim, x.data() + row * input.dim);
  }
}

void Run::embed_rows() {
  for (size_t place = 0; place < active.size(); ++place) {
    const RunRow& row = rows[active[place]];
    input.embed(row.first + row.num_steps, row.pending, row.context, x.data() + place * input.dim);
  }
}

std::vector<int64_t> Run::sample_rows(bool has_stepped) {
  const int64_t vocabulary = to_logits.outputs;
  bool ended = false;
  for (size_t place = 0; place < active.size(); ++place) {
    RunRow& row = rows[active[place]];
    row.num_steps += has_stepped;
    row.pending = sample(sampling, logits.data() + place * vocabulary,
                         uniform(active[place], row.num_tokens), vocabulary, order);
    row.ids[row.num_tokens++] = row.pending;
    ended = ended || (ends && ends[row.pending]);
  }
  // From the last place on, so that those before keep theirs.
  std::vector<int64_t> places;
  for (int64_t place = int64_t(active.size()) - 1; place >= 0; --place) {
    const RunRow& row = rows[active[place]];
    if (!ended && row.num_tokens < row.max_tokens && row.num_steps < row.max_steps) continue;
    const auto begin = x.begin() + place * input.dim, end = begin + input.dim;
    std::copy(begin, end, row.x);
    x.erase(begin, end);
    active.erase(active.begin() + place);
    places.push_back(place);
  }
  return places;
}

}  // namespace mblm::cpu
