// The kernels of a stage's layers: see stage_step.h.
#include "cuda/stage_step.h"

#include <algorithm>

#include "cuda/decode_attention.h"
#include "cuda/decode_product.h"
#include "cuda/decode_scan.h"
#include "cuda/decode_slots.h"
#include "cuda/launches.h"

namespace mblm::cuda {
namespace {

// out = matrix applied to x (rows, stride).
Product product_of(const StageStep& in, const cpu::Matrix& matrix, const float* x, int64_t stride,
                   float* out, const Ahead& ahead = {}) {
  Product product;
  product.rows = in.rows;
  product.positions = in.positions;
  product.x = x;
  product.x_stride = stride;
  product.matrix = matrix;
  product.out = out;
  product.ahead = ahead;
  return product;
}

// What comes after a layer: the next one, or what the step is followed by.
template <class Layer>
Ahead after(const std::vector<Layer>& layers, size_t index, const StageStep& in) {
  return index + 1 < layers.size() ? beginning_of(layers[index + 1]) : in.ahead;
}

int64_t inner_width(const cpu::TransformerStage& stage) {
  return stage.layers.empty() ? 0 : stage.layers[0].expand.outputs;
}

// Width of what Mamba-2's first product gives: gate, x B C, dt.
int64_t projected_width(const cpu::Mamba2Stage& stage) {
  return 2 * stage.inner + 2 * stage.states + stage.heads;
}

}  // namespace

int64_t workspace_size(const cpu::TransformerStage& stage, int64_t rows, int64_t limit) {
  return rows * (4 * stage.heads * stage.head_dim + stage.dim + inner_width(stage)) +
         size_of_partial(rows * stage.heads, stage.head_dim, limit);
}

int64_t workspace_size(const cpu::Mamba1Stage& stage, int64_t rows, int64_t) {
  return rows * (3 * stage.inner + stage.rank + 2 * stage.states);
}

int64_t workspace_size(const cpu::Mamba2Stage& stage, int64_t rows, int64_t) {
  return rows * (projected_width(stage) + stage.inner);
}

Error step(const cpu::TransformerStage& stage, const TransformerRow& state, const StageStep& in,
           Stream stream) {
  const int64_t width = stage.heads * stage.head_dim;
  float* q = in.workspace;                      // (rows, width)
  float* kv = q + in.rows * width;              // (rows, 2, width)
  float* attended = kv + in.rows * 2 * width;   // (rows, width)
  float* middle = attended + in.rows * width;   // (rows, dim)
  float* inner = middle + in.rows * stage.dim;  // (rows, inner width)
  float* partial = inner + in.rows * inner_width(stage);
  Launches launches(stream);
  for (size_t index = 0; index < stage.layers.size(); ++index) {
    const cpu::TransformerLayer& layer = stage.layers[index];
    float* delayed[] = {state.delayed + 2 * index * state.part_stride,
                        state.delayed + (2 * index + 1) * state.part_stride};

    Product heads = product_of(in, layer.q, in.x, stage.dim, q, Ahead(layer.out));
    heads.norm = {layer.attention_norm, 0, true};
    heads.delayed = delayed[0];
    heads.second = layer.kv;
    heads.out_second = kv;
    launches.add(multiply, heads);

    CachedAttention attention;
    attention.rows = in.rows;
    attention.heads = stage.heads;
    attention.head_dim = stage.head_dim;
    attention.positions = in.positions;
    attention.limit = std::min(in.limit, state.capacity);
    attention.q = q;
    attention.kv = kv;
    attention.cos = state.cos;
    attention.sin = state.sin;
    attention.keys = state.keys + index * state.layer_stride;
    attention.values = state.values + index * state.layer_stride;
    attention.capacity = state.capacity;
    attention.out = attended;
    attention.partial = partial;
    attention.tickets = state.tickets;

    Product out = product_of(in, layer.out, attended, width, middle, Ahead(layer.expand));
    out.residual = in.x;
    out.keep = delayed[0];
    if (attends(out, attention)) {
      out.attention = attention;
    } else {
      launches.add(attend, attention);
    }
    launches.add(multiply, out);

    Product expand = product_of(in, layer.expand, middle, stage.dim, inner, Ahead(layer.contract));
    expand.norm = {layer.feed_forward_norm, 0, true};
    expand.delayed = delayed[1];
    expand.then = cpu::Then::kGelu;
    launches.add(multiply, expand);

    Product contract = product_of(in, layer.contract, inner, layer.expand.outputs, in.x,
                                  after(stage.layers, index, in));
    contract.residual = middle;
    contract.keep = delayed[1];
    launches.add(multiply, contract);
  }
  launches.add(normalize, RowNorm{stage.norm, 0, true}, in.rows, stage.dim, in.positions, in.x);
  return launches.error();
}

Error step(const cpu::Mamba1Stage& stage, const MambaRow& state, const StageStep& in,
           Stream stream) {
  const int64_t projected = stage.rank + 2 * stage.states;
  float* both = in.workspace;                           // (rows, 2 inner): convolved and the gate
  float* scanned = both + in.rows * 2 * stage.inner;    // (rows, inner)
  float* parameters = scanned + in.rows * stage.inner;  // (rows, rank + 2 states): dt, B and C
  Launches launches(stream);
  for (size_t index = 0; index < stage.layers.size(); ++index) {
    const cpu::Mamba1Layer& layer = stage.layers[index];
    Product both_branches =
        product_of(in, layer.in, in.x, stage.dim, both, Ahead(layer.x, layer.out));
    both_branches.norm = {layer.norm, layer.eps, false};
    both_branches.convolution = {
        0,          stage.inner,     stage.taps,
        layer.conv, layer.conv_bias, state.window + index * state.window_stride};
    launches.add(multiply, both_branches);
    launches.add(multiply, product_of(in, layer.x, both, 2 * stage.inner, parameters));

    ChannelScan channels;
    StateUpdate& update = channels.update;
    update.rows = in.rows;
    update.inner = stage.inner;
    update.states = stage.states;
    update.positions = in.positions;
    update.x = both;
    update.gate = both + stage.inner;
    update.stride = 2 * stage.inner;
    update.b = parameters + stage.rank;
    update.c = update.b + stage.states;
    update.bc_stride = projected;
    update.state = state.ssm + index * state.ssm_stride;
    update.out = scanned;
    channels.dt = parameters;
    channels.to_steps = layer.dt;
    channels.rates = layer.rates;
    channels.direct = layer.direct;
    launches.add(static_cast<Error (*)(const ChannelScan&, Stream)>(scan), channels);

    Product out =
        product_of(in, layer.out, scanned, stage.inner, in.x, after(stage.layers, index, in));
    out.residual = in.x;
    launches.add(multiply, out);
  }
  return launches.error();
}

Error step(const cpu::Mamba2Stage& stage, const MambaRow& state, const StageStep& in,
           Stream stream) {
  const int64_t inner = stage.inner, channels = inner + 2 * stage.states;
  const int64_t projected = projected_width(stage);
  float* scanned = in.workspace;            // (rows, inner)
  float* both = scanned + in.rows * inner;  // (rows, projected): gate, convolved x B C, dt
  Launches launches(stream);
  for (size_t index = 0; index < stage.layers.size(); ++index) {
    const cpu::Mamba2Layer& layer = stage.layers[index];
    Product all = product_of(in, layer.in, in.x, stage.dim, both, Ahead(layer.out));
    all.norm = {layer.norm, stage.eps, false};
    all.convolution = {inner,      channels,        stage.taps,
                       layer.conv, layer.conv_bias, state.window + index * state.window_stride};
    launches.add(multiply, all);

    HeadScan heads;
    StateUpdate& update = heads.update;
    update.rows = in.rows;
    update.inner = inner;
    update.states = stage.states;
    update.positions = in.positions;
    update.gate = both;
    update.x = both + inner;
    update.stride = update.bc_stride = projected;
    update.b = update.x + inner;
    update.c = update.b + stage.states;
    update.state = state.ssm + index * state.ssm_stride;
    update.out = scanned;
    heads.heads = stage.heads;
    heads.dt = both + inner + channels;
    heads.dt_bias = layer.dt_bias;
    heads.rates = layer.rates;
    heads.direct = layer.direct;
    launches.add(static_cast<Error (*)(const HeadScan&, Stream)>(scan), heads);

    Product out = product_of(in, layer.out, scanned, inner, in.x, after(stage.layers, index, in));
    out.norm = {layer.gated_norm, stage.eps, false};
    out.residual = in.x;
    launches.add(multiply, out);
  }
  launches.add(normalize, RowNorm{stage.norm, stage.eps, false}, in.rows, stage.dim, in.positions,
               in.x);
  return launches.error();
}

}  // namespace mblm::cuda
