// Graphs of kernels, by CUDA's own runtime: what is queued once is launched again in one call.
#pragma once

#include <functional>
#include <memory>

#include "cuda/stream.h"

namespace mblm::cuda {

// A stream of the current device, on which graphs are recorded.
class CaptureStream {
 public:
  Error create();
  Stream get() const { return stream_.get(); }

 private:
  struct Delete {
    void operator()(void* stream) const;
  };
  std::unique_ptr<void, Delete> stream_;  // a cudaStream_t
};

class Graph {
 public:
  // Records what a function queues on the stream that it is given; nothing is run.
  Error record(const CaptureStream& stream, const std::function<Error(Stream)>& queue);
  explicit operator bool() const { return bool(graph_); }
  Error launch(Stream stream) const;

 private:
  struct Delete {
    void operator()(void* graph) const;
  };
  std::unique_ptr<void, Delete> graph_;  // a cudaGraphExec_t
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
