// Tests of recording graphs, with a runtime of CUDA's that keeps account: of devices, of what is
// recorded where, of what is let go.
#include <atomic>
#include <barrier>
#include <set>
#include <thread>
#include <utility>

#include "check.h"
#include "cuda_emulation.h"
// The emulation comes before the sources.
#include "cuda/kernel.cuh"

namespace {

thread_local int device = 0;  // the current one
std::atomic<int> alive = 0;   // streams and graphs

struct Counted {
  Counted() { ++alive; }
  Counted(const Counted&) { ++alive; }
  ~Counted() { --alive; }
};

struct MockStream : Counted {
  int device = ::device;
  bool is_recording = false;
  std::vector<int> recorded;
};
struct MockGraph : Counted {
  int device = 0;
  std::vector<int> nodes;
};

using cudaStream_t = MockStream*;
using cudaGraph_t = MockGraph*;
using cudaGraphExec_t = MockGraph*;
using cudaGraphNode_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation };
constexpr int cudaStreamNonBlocking = 1, cudaStreamCaptureModeThreadLocal = 1;

std::vector<int> launched;
bool has_memory = true;  // for another graph

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, int flags) {
  CHECK(flags == cudaStreamNonBlocking);
  *stream = new MockStream;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, int mode) {
  CHECK(mode == cudaStreamCaptureModeThreadLocal);
  CHECK(stream->device == device && !stream->is_recording);
  stream->is_recording = true;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  CHECK(stream->device == device && stream->is_recording);
  stream->is_recording = false;
  *graph = new MockGraph;
  (*graph)->device = stream->device;
  (*graph)->nodes = std::exchange(stream->recorded, {});
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = graph->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, int) {
  if (!has_memory) return cudaErrorMemoryAllocation;
  *executable = new MockGraph(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  CHECK(graph->device == stream->device);
  launched.insert(launched.end(), graph->nodes.begin(), graph->nodes.end());
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

}  // namespace

namespace mblm::cuda {

Error message_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : "invalid value";
}

}  // namespace mblm::cuda

#define __CUDACC__
#include "cuda/decode_graph.cu"

using namespace mblm;

// Stands for launching kernels.
auto queue(std::vector<int> nodes, std::set<MockStream*>* streams = nullptr) {
  return [=](cuda::Stream on) -> cuda::Error {
    auto* const stream = static_cast<MockStream*>(on);
    CHECK(stream && stream->is_recording && stream->device == device);
    stream->recorded.insert(stream->recorded.end(), nodes.begin(), nodes.end());
    if (streams) streams->insert(stream);
    return nullptr;
  };
}

void graphs_are_of_the_device_that_they_were_recorded_on() {
  cuda::CaptureStream streams[2];
  cuda::Graph graphs[2];
  for (int i : {1, 0}) {
    device = i;
    CHECK(!streams[i].create() && !streams[i].create());  // one stream
    CHECK(!graphs[i].record(streams[i], queue({10 * i, 10 * i + 1})));
  }
  for (int i : {0, 1}) {
    device = i;
    MockStream own;
    launched.clear();
    CHECK(graphs[i] && !graphs[i].launch(&own));
    CHECK(launched == (std::vector<int>{10 * i, 10 * i + 1}));
  }
  device = 0;
  CHECK(!graphs[0].record(streams[0], queue({5})));  // instead of what it was
  MockStream own;
  launched.clear();
  CHECK(!graphs[0].launch(&own) && launched == std::vector<int>{5});
}

// Each on a device, and both inside their recordings.
void two_threads_record_at_once() {
  std::barrier both(2);
  std::set<MockStream*> streams[2];
  cuda::Graph graphs[2];
  std::thread threads[2];
  for (int i : {0, 1}) {
    threads[i] = std::thread([&, i] {
      device = i;
      cuda::CaptureStream stream;
      CHECK(!stream.create());
      CHECK(!graphs[i].record(stream, [&](cuda::Stream on) {
        both.arrive_and_wait();
        const cuda::Error error = queue({i}, &streams[i])(on);
        both.arrive_and_wait();
        return error;
      }));
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(streams[0].size() == 1 && streams[1].size() == 1 && streams[0] != streams[1]);
  for (int i : {0, 1}) {
    device = i;
    MockStream own;
    launched.clear();
    CHECK(!graphs[i].launch(&own) && launched == std::vector<int>{i});
  }
  device = 0;
}

void what_cannot_be_recorded_is_no_graph() {
  cuda::CaptureStream stream;
  cuda::Graph graph;
  CHECK(!stream.create());
  CHECK(graph.record(stream, [](cuda::Stream) -> cuda::Error { return "no"; }) != nullptr);
  CHECK(!graph && !static_cast<MockStream*>(stream.get())->is_recording);
  CHECK(graph.record(stream, queue({})) != nullptr);  // it would leave what there was
  CHECK(!graph);
  CHECK(!graph.record(stream, queue({1})) && graph);
}

// The first time as they are, then as a graph. Without memory for one they stay as they are: to
// record them each time would take longer than to queue them.
void what_is_queued_again_becomes_a_graph() {
  cuda::CaptureStream recorder;
  cuda::Repeated unit, without_memory;
  MockStream own;
  int queued = 0;
  const auto queue = [&](cuda::Stream on) -> cuda::Error {
    ++queued;
    auto* const stream = static_cast<MockStream*>(on);
    (stream->is_recording ? stream->recorded : launched).push_back(7);
    return nullptr;
  };
  launched.clear();
  for (int turn = 0; turn < 3; ++turn) CHECK(!unit.launch(recorder, queue, &own));
  CHECK(unit.is_graph() && queued == 2 && launched == (std::vector<int>{7, 7, 7}));
  queued = 0;
  launched.clear();
  for (int turn = 0; turn < 4; ++turn) {
    has_memory = turn != 1;
    CHECK(!without_memory.launch(recorder, queue, &own));
  }
  CHECK(!without_memory.is_graph() && queued == 5 && launched == (std::vector<int>{7, 7, 7, 7}));
}

int main() {
  graphs_are_of_the_device_that_they_were_recorded_on();
  two_threads_record_at_once();
  what_cannot_be_recorded_is_no_graph();
  what_is_queued_again_becomes_a_graph();
  CHECK(alive == 0);
  return test::result();
}
