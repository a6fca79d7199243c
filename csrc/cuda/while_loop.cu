// A captured step, repeated on the device: one graph whose WHILE node holds the step and counts
// down (CUDA programming guide, "Conditional graph nodes"; CUDA 12.4).
#include <cuda_runtime.h>

#include "../kernels.h"

namespace ddpm_fast {

#if CUDART_VERSION >= 12040

struct WhileLoop {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
};

namespace {

__global__ void count_down(int64_t* remaining, cudaGraphConditionalHandle handle) {
  cudaGraphSetConditional(handle, --*remaining > 0);
}

// An empty WHILE node in `graph`; its first round is always taken.
cudaError_t add_while(cudaGraph_t graph, cudaGraphConditionalHandle handle, cudaGraph_t* body) {
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaGraphAddNode(&node, graph, nullptr, nullptr, 0, &params);
#else
  const cudaError_t error = cudaGraphAddNode(&node, graph, nullptr, 0, &params);
#endif
  if (error == cudaSuccess) *body = params.conditional.phGraph_out[0];
  return error;
}

// The step, of which the graph keeps a copy, then the count.
cudaError_t fill_body(cudaGraph_t body, cudaGraph_t step, int64_t* remaining,
                      cudaGraphConditionalHandle handle) {
  cudaGraphNode_t taken, counted;
  const cudaError_t error = cudaGraphAddChildGraphNode(&taken, body, nullptr, 0, step);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&remaining, &handle};
  cudaKernelNodeParams params{};
  params.func = reinterpret_cast<void*>(&count_down);
  params.gridDim = params.blockDim = dim3(1);
  params.kernelParams = arguments;
  return cudaGraphAddKernelNode(&counted, body, &taken, 1, &params);
}

cudaError_t build(WhileLoop* loop, cudaGraph_t step, int64_t* remaining) {
  cudaGraphConditionalHandle handle;
  cudaGraph_t body;
  cudaError_t error = cudaGraphCreate(&loop->graph, 0);
  if (error == cudaSuccess) {
    error = cudaGraphConditionalHandleCreate(&handle, loop->graph, 1, cudaGraphCondAssignDefault);
  }
  if (error == cudaSuccess) error = add_while(loop->graph, handle, &body);
  if (error == cudaSuccess) error = fill_body(body, step, remaining, handle);
  if (error == cudaSuccess) error = cudaGraphInstantiate(&loop->exec, loop->graph, 0);
  return error;
}

}  // namespace

bool cuda_has_while_loops() {
  int driver = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12040;
}

int cuda_while_loop(void* step, int64_t* remaining, WhileLoop** loop) {
  *loop = new WhileLoop;
  const cudaError_t error = build(*loop, static_cast<cudaGraph_t>(step), remaining);
  if (error != cudaSuccess) {
    cudaGetLastError();  // said to the caller, and not left for the next kernel's
    cuda_destroy(*loop);
    *loop = nullptr;
  }
  return error;
}

int cuda_launch(const WhileLoop* loop, void* stream) {
  return cudaGraphLaunch(loop->exec, static_cast<cudaStream_t>(stream));
}

void cuda_destroy(WhileLoop* loop) {
  if (loop->exec != nullptr) cudaGraphExecDestroy(loop->exec);
  if (loop->graph != nullptr) cudaGraphDestroy(loop->graph);
  delete loop;
}

#else

bool cuda_has_while_loops() { return false; }
int cuda_while_loop(void*, int64_t*, WhileLoop**) { return cudaErrorNotSupported; }
int cuda_launch(const WhileLoop*, void*) { return cudaErrorNotSupported; }
void cuda_destroy(WhileLoop*) {}

#endif

}  // namespace ddpm_fast
