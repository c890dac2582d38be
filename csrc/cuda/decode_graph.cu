// Graphs of kernels: see decode_graph.h. Emulated kernels run when they are launched, so that there
// a graph is the function that launches them.
#include "cuda/decode_graph.h"
#include "cuda/kernel.cuh"

namespace mblm::cuda {

Error Repeated::launch(CaptureStream& recorder, const std::function<Error(Stream)>& queue,
                       Stream stream) {
  if (runs_ < 2 && ++runs_ == 2 && !recorder.create()) graph_.record(recorder, queue);
  return graph_ ? graph_.launch(stream) : queue(stream);
}

#ifdef __CUDACC__

namespace {

cudaStream_t stream_of(Stream stream) {
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

void CaptureStream::Delete::operator()(void* stream) const {
  cudaStreamDestroy(stream_of(stream));
}

Error CaptureStream::create() {
  if (stream_) return nullptr;
  cudaStream_t stream = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) stream_.reset(stream);
  return message_of(error);
}

void Graph::Delete::operator()(void* graph) const {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

Error Graph::record(const CaptureStream& on, const std::function<Error(Stream)>& queue) {
  const cudaStream_t stream = stream_of(on.get());
  // What other threads do meanwhile, as allocating, is no concern of this one.
  cudaError_t error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  if (error != cudaSuccess) return message_of(error);
  const Error not_queued = queue(on.get());
  cudaGraph_t graph = nullptr;
  error = cudaStreamEndCapture(stream, &graph);
  size_t kernels = 0;
  if (error == cudaSuccess) error = cudaGraphGetNodes(graph, nullptr, &kernels);
  cudaGraphExec_t executable = nullptr;
  if (error == cudaSuccess && !not_queued && kernels > 0) {
    error = cudaGraphInstantiateWithFlags(&executable, graph, 0);
  }
  if (graph) cudaGraphDestroy(graph);
  if (not_queued) {
    cudaGetLastError();
    return not_queued;
  }
  if (error != cudaSuccess) return message_of(error);
  if (!executable) return "no kernel was recorded";
  graph_.reset(executable);
  return nullptr;
}

Error Graph::launch(Stream stream) const {
  return message_of(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_.get()), stream_of(stream)));
}

Error wait_for(Stream stream) {
  return message_of(cudaStreamSynchronize(stream_of(stream)));
}

#else

void CaptureStream::Delete::operator()(void*) const {}

Error CaptureStream::create() {
  return nullptr;
}

void Graph::Delete::operator()(void* graph) const {
  delete static_cast<std::function<Error(Stream)>*>(graph);
}

Error Graph::record(const CaptureStream&, const std::function<Error(Stream)>& queue) {
  graph_.reset(new std::function<Error(Stream)>(queue));
  return nullptr;
}

Error Graph::launch(Stream stream) const {
  return (*static_cast<std::function<Error(Stream)>*>(graph_.get()))(stream);
}

Error wait_for(Stream) {
  return nullptr;
}

#endif

}  // namespace mblm::cuda
