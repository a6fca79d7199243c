// Running a kernel on a tensor's device, or on the CPU's cores.
#pragma once

#include <atomic>
#include <memory>
#include <new>

#include "cpu_run.h"
#include "torch_checks.h"

namespace ddpm_fast {

inline constexpr int64_t kGrain = 4;  // chunks that are worth a thread

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Torch's threads, for cpu_run.h.
inline constexpr auto torch_threads = [](int64_t chunks, const auto& body) {
  torch::stable::parallel_for(0, chunks, kGrain, body);
};

struct alignas(64) Line {
  char bytes[64];
};

// Torch's threads, each with `bytes` of memory, which it keeps: a large allocation's pages would
// cost more than a small layer.
template <class Body>
void run_with_memory(int64_t units, int64_t grain, int64_t bytes, const Body& body) {
  const int64_t wanted = (bytes + int64_t{sizeof(Line)} - 1) / int64_t{sizeof(Line)};
  std::atomic<bool> is_missing{false};
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    static thread_local std::unique_ptr<Line[]> memory;
    static thread_local int64_t lines = 0;
    if (lines < wanted) {
      lines = 0;
      memory.reset();
      memory.reset(new (std::nothrow) Line[wanted]);
      if (memory == nullptr) {
        is_missing = true;
        return;
      }
      lines = wanted;
    }
    body(begin, end, memory.get());
  });
  require(!is_missing, "there is not enough memory: each thread needs ", bytes, " bytes.");
}

inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
#ifdef DDPM_FAST_WITH_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
#else
  require(false, "this build has no CUDA kernels; use backend=\"reference\" on ",
          t.is_cuda() ? "CUDA" : "this device", ", or build beside a CUDA torch.");
#endif
  return stream;
}

// Runs body(stream) with the tensor's device current, and turns a CUDA error into a sentence.
template <class Body>
void launch(const Tensor& t, const Body& body) {
  void* stream = current_stream(t);
#ifdef DDPM_FAST_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  const int code = body(stream);
  require(code == 0, "a CUDA kernel failed: ", cuda_error_string(code), ".");
#else
  (void)stream;
  (void)body;
#endif
}

}  // namespace ddpm_fast
