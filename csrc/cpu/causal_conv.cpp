// Short depthwise causal convolution and SiLU: see causal_conv.h.
//
// What a tile needs is copied to buffers of whole lanes first: there, types, strides, the window
// and the last channels make no difference.
#include "cpu/causal_conv.h"

#include <algorithm>
#include <vector>

#include "cpu/lanes.h"

namespace mblm::cpu {

template <class C>
using Buffer = std::vector<C>;  // (.., kConvTile)

// One tile of channels.
struct Tile {
  int64_t first, count;
};

template <class T>
MBLM_INLINE Tile tile_of(const CausalConvInput<T>& in, int64_t tile) {
  const int64_t first = tile * kConvTile;
  return {first, std::min(kConvTile, in.channels - first)};
}

// Entries [begin, end) of concat(window, x) of one row.
template <class T, class C>
MBLM_INLINE void read_extended(const CausalConvInput<T>& in, int64_t row, Tile tile, int64_t begin,
                               int64_t end, C* to) {
  const int64_t before = in.taps - 1;
  for (int64_t e = begin; e < end; ++e, to += kConvTile) {
    if (e >= before) {
      convert(in.x + row * in.x_row_stride + (e - before) * in.x_position_stride + tile.first,
              tile.count, to);
    } else if (in.window) {
      convert(in.window + (row * before + e) * in.channels + tile.first, tile.count, to);
    } else {
      std::fill_n(to, tile.count, C(0));
    }
  }
}

// The convolution at one position, in lanes from channel c of the tile.
template <class C>
MBLM_INLINE Lanes<C> convolve(const C* extended, const C* weight_bias, int64_t taps, int64_t c) {
  Lanes<C> sum = load(weight_bias + taps * kConvTile + c);
  for (int64_t k = 0; k < taps; ++k) {
    sum += load(weight_bias + k * kConvTile + c) * load(extended + k * kConvTile + c);
  }
  return sum;
}

template <class T, class C>
MBLM_INLINE void read_weight(const CausalConvInput<T>& in, Tile tile, C* to) {
  for (int64_t k = 0; k <= in.taps; ++k) {
    convert(in.weight_bias + k * in.channels + tile.first, tile.count, to + k * kConvTile);
  }
}

template <class T>
MBLM_CLONES void causal_conv(const CausalConvInput<T>& in, T* y, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t tiles = in.tiles(), blocks = in.blocks();
  Buffer<C> weight((in.taps + 1) * kConvTile);
  Buffer<C> extended((kConvPositions + in.taps - 1) * kConvTile), out(kConvTile);
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tile_of(in, item % tiles);
    const int64_t row = item / tiles / blocks, start = item / tiles % blocks * kConvPositions;
    const int64_t stop = std::min(start + kConvPositions, in.length);
    read_weight(in, tile, weight.data());
    read_extended(in, row, tile, start, stop + in.taps - 1, extended.data());
    for (int64_t t = start; t < stop; ++t) {
      for (int64_t c = 0; c < kConvTile; c += kLaneCount<C>) {
        const Lanes<C> v =
            convolve(extended.data() + (t - start) * kConvTile, weight.data(), in.taps, c);
        store(out.data() + c, v / (C(1) + exp(-v)));
      }
      convert(out.data(), tile.count, y + (row * in.length + t) * in.channels + tile.first);
    }
  }
}

// Gradients of the convolution's result from those of the SiLU's, at positions [start, stop).
template <class C>
MBLM_INLINE void through_silu(const C* extended, const C* weight, int64_t taps, int64_t positions,
                              C* grad) {
  for (int64_t t = 0; t < positions; ++t, extended += kConvTile, grad += kConvTile) {
    for (int64_t c = 0; c < kConvTile; c += kLaneCount<C>) {
      const Lanes<C> v = convolve(extended, weight, taps, c);
      const Lanes<C> gate = C(1) / (C(1) + exp(-v));
      store(grad + c, load(grad + c) * gate * (C(1) + v * (C(1) - gate)));
    }
  }
}

// Adds what the positions give to the gradients of weight and bias, (taps + 1, kConvTile).
template <class C>
MBLM_INLINE void add_weight_bias(const C* extended, const C* grad, int64_t taps, int64_t positions,
                                 C* sums) {
  for (int64_t k = 0; k <= taps; ++k, sums += kConvTile) {
    for (int64_t c = 0; c < kConvTile; c += kLaneCount<C>) {
      Lanes<C> sum = load(sums + c);
      for (int64_t t = 0; t < positions; ++t) {
        const Lanes<C> g = load(grad + t * kConvTile + c);
        sum += k < taps ? g * load(extended + (t + k) * kConvTile + c) : g;
      }
      store(sums + c, sum);
    }
  }
}

template <class T>
MBLM_CLONES void causal_conv_backward(const CausalConvInput<T>& in,
                                      const CausalConvGradients<T>& grad, int64_t tile_index,
                                      int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const Tile tile = tile_of(in, tile_index);
  const int64_t taps = in.taps, before = taps - 1, blocks = in.blocks();
  Buffer<C> weight((taps + 1) * kConvTile), sums((taps + 1) * kConvTile);
  Buffer<C> extended((kConvPositions + 2 * before) * kConvTile);
  // From `before` positions ahead of the block to as many after it.
  Buffer<C> grad_conv((kConvPositions + 2 * before) * kConvTile);
  Buffer<C> out(kConvTile), given(kConvTile);
  C* const g = grad_conv.data() + before * kConvTile;
  read_weight(in, tile, weight.data());
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks, start = unit % blocks * kConvPositions;
    const int64_t stop = std::min(start + kConvPositions, in.length);
    const int64_t seen = std::min(stop + before, in.length);  // the last to reach into the block
    read_extended(in, row, tile, start, seen + before, extended.data());
    std::fill(grad_conv.begin(), grad_conv.end(), C(0));
    for (int64_t t = start; t < seen; ++t) {
      convert(grad.y + (row * in.length + t) * in.channels + tile.first, tile.count,
              g + (t - start) * kConvTile);
    }
    through_silu(extended.data(), weight.data(), taps, seen - start, g);
    add_weight_bias(extended.data(), g, taps, stop - start, sums.data());

    // Entry e of concat(window, x) takes part in positions e - before to e.
    for (int64_t e = start > 0 ? start + before : 0; e < stop + before; ++e) {
      const bool is_kept = grad.next_window && e >= in.length;
      if (is_kept) {
        convert(grad.next_window + (row * before + e - in.length) * in.channels + tile.first,
                tile.count, given.data());
      }
      for (int64_t c = 0; c < kConvTile; c += kLaneCount<C>) {
        Lanes<C> sum = is_kept ? load(given.data() + c) : Lanes<C>{};
        for (int64_t k = 0; k < taps; ++k) {
          sum +=
              load(weight.data() + k * kConvTile + c) * load(g + (e - start - k) * kConvTile + c);
        }
        store(out.data() + c, sum);
      }
      T* to = e < before ? grad.window + (row * before + e) * in.channels
                         : grad.x + (row * in.length + e - before) * in.channels;
      convert(out.data(), tile.count, to + tile.first);
    }
  }
  for (int64_t k = 0; k <= taps; ++k) {
    std::copy_n(sums.data() + k * kConvTile, tile.count,
                grad.weight_bias + k * in.channels + tile.first);
  }
}

MBLM_INSTANTIATE(causal_conv)
MBLM_INSTANTIATE(causal_conv_backward)

}  // namespace mblm::cpu
