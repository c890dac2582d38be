// Graphs of kernels, by CUDA's own runtime: what is queued once is launched again in one call.
#pragma once

#include <functional>
#include <utility>

#include "cuda/stream.h"

namespace mblm::cuda {

// A stream of the current device, on which graphs are recorded.
class CaptureStream {
 public:
  CaptureStream() = default;
  CaptureStream(CaptureStream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  CaptureStream& operator=(CaptureStream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  ~CaptureStream();

  Error create();
  Stream get() const { return stream_; }

 private:
  Stream stream_ = nullptr;
};

class Graph {
 public:
  Graph() = default;
  Graph(Graph&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(graph_, other.graph_);
    return *this;
  }
  ~Graph();

  // Records what a function queues on the stream that it is given; nothing is run.
  Error record(const CaptureStream& stream, const std::function<Error(Stream)>& queue);
  explicit operator bool() const { return graph_; }
  Error launch(Stream stream) const;

 private:
  void* graph_ = nullptr;  // a cudaGraphExec_t
};

// Kernels that are queued again and again: the first time as they are, which loads them, then as a
// graph, unless there was no memory for one.
class Repeated {
 public:
  // queue: always the same.
  Error launch(CaptureStream& recorder, const std::function<Error(Stream)>& queue, Stream stream);
  bool is_graph() const { return bool(graph_); }

 private:
  int runs_ = 0;  // counted up to the second
  Graph graph_;
};

// Waits until all that is queued on a stream is done.
Error wait_for(Stream stream);

}  // namespace mblm::cuda
