// What both passes of Mamba-1's selective scan are made of: see selective_scan.h.
//
// All chunks are worked on at once: first each from a zero state, to its end; then the states
// before the chunks follow from those ends, one after the other; then each chunk again, from the
// state before it. Gradients go the other way likewise.
//
// Four states of a channel are in a lane, the lanes of a channel next to each other, a power of two
// of them. A block takes a tile of channels of one chunk; all its threads take every turn of every
// loop, those beyond the channels or states with zeros.
#pragma once

#include "cuda/kernel.cuh"
#include "cuda/selective_scan.h"

namespace mblm::cuda {

using cpu::SelectiveScanInput;

constexpr int kStates = 4;  // of a lane
constexpr int kScanThreads = 128;

inline int lanes_for(int64_t padded_states) {
  int lanes = 1;
  while (lanes * kStates < padded_states) lanes *= 2;
  return lanes;
}

// What a thread works on.
template <class T>
struct Lane {
  using C = compute_t<T>;
  using States = Pack<C, kStates>;
  const SelectiveScanInput<T>& in;
  int lanes;         // of a channel
  int state;         // the lane's first
  int positions;     // of the chunk
  int64_t unit;      // the chunk, among all rows'
  int64_t position;  // the chunk's first, among all rows'
  int64_t tile, channel;
  bool has_channel, has_states;

  MBLM_DEVICE Lane(const SelectiveScanInput<T>& in, int lanes, int64_t item)
      : in(in), lanes(lanes) {
    const int64_t chunks = (in.length + in.chunk_size - 1) / in.chunk_size;
    const int64_t tile_channels = kScanThreads / lanes;
    const int64_t tiles = (in.channels + tile_channels - 1) / tile_channels;
    unit = quotient(item, tiles);
    tile = item - unit * tiles;
    const int64_t row = quotient(unit, chunks), chunk = unit - row * chunks;
    channel = tile * tile_channels + threadIdx.x / lanes;
    state = threadIdx.x % lanes * kStates;
    const int64_t start = chunk * in.chunk_size, left = in.length - start;
    position = row * in.length + start;
    positions = int(left < in.chunk_size ? left : in.chunk_size);
    has_channel = channel < in.channels;
    has_states = has_channel && state < in.padded_states;
  }

  MBLM_DEVICE C of_channel(const C* values, int t) const {
    return has_channel ? values[(position + t) * in.channels + channel] : C(0);
  }
  MBLM_DEVICE C of_channel_rounded(const T* values, int t) const {
    return has_channel ? value_of(values[(position + t) * in.channels + channel]) : C(0);
  }

  // Of B or C, at a position.
  MBLM_DEVICE States weights(const C* values, int t) const {
    if (!has_states) return {};
    return load_pack<kStates>(values + (position + t) * in.padded_states + state);
  }
  // Of A.
  MBLM_DEVICE States rates() const {
    if (!has_states) return {};
    return load_pack<kStates>(in.rates + channel * in.padded_states + state);
  }

  // Of this chunk and channel, in a tensor (rows, chunks, D).
  MBLM_DEVICE int64_t chunk_channel() const { return unit * in.channels + channel; }
  // These states in a tensor (rows, chunks, D, N).
  MBLM_DEVICE int64_t place() const { return chunk_channel() * in.states + state; }
  MBLM_DEVICE States read(const C* from) const {
    States states = {};
    for (int n = 0; n < kStates; ++n) {
      if (has_channel && state + n < in.states) states.values[n] = from[n];
    }
    return states;
  }
  MBLM_DEVICE void write(const States& states, C* to) const {
    for (int n = 0; n < kStates; ++n) {
      if (has_channel && state + n < in.states) to[n] = states.values[n];
    }
  }

  // The same sum in all lanes of a channel.
  MBLM_DEVICE C sum_of_channel(C value) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
  }
  // The same sum over the warp's channels, for each of their lanes.
  MBLM_DEVICE C sum_over_channels(C value) const {
    for (int offset = kWarp / 2; offset >= lanes; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
  }

  MBLM_DEVICE bool is_first_of_channel() const { return has_channel && state == 0; }
};

// exp(delta_t A) and h_t from h_{t-1}.
template <class C>
MBLM_DEVICE void advance(const Pack<C, kStates>& rates, C step, C arriving,
                         const Pack<C, kStates>& weight_in, Pack<C, kStates>& decay,
                         Pack<C, kStates>& h) {
  for (int n = 0; n < kStates; ++n) {
    decay.values[n] = exp(rates.values[n] * step);
    h.values[n] = decay.values[n] * h.values[n] + weight_in.values[n] * arriving;
  }
}

template <class T>
int64_t item_count(const SelectiveScanInput<T>& in) {
  const int64_t chunks = divide_up(in.length, in.chunk_size);
  return in.rows * chunks * selective_scan_parts(in.channels, in.padded_states);
}

// Puts the parts of the chunks (rows, chunks, D, N) together: state is what enters the first, in
// the order of the walk, and becomes what leaves the last; parts become what enters each chunk.
template <class T>
Error join(const SelectiveScanInput<T>& in, bool backwards, const compute_t<T>* delta_sums,
           compute_t<T>* parts, compute_t<T>* state, Stream stream);

}  // namespace mblm::cuda
