// Tensors (N, C, H, W) in channels_last order.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "torch_checks.h"

namespace ddpm_fast {

// A tensor (N, C, H, W) on the CPU, channels_last without gaps.
inline void require_image(const char* name, const Tensor& t, ScalarType dtype) {
  require_dtype(name, t, dtype);
  require(t.is_cpu() && t.dim() == 4, name,
          " must be on the CPU, of the shape (N, C, H, W), but it is ", shape_text(t), ".");
  int64_t expected = 1;
  for (int i : {1, 3, 2, 0}) {
    require(t.size(i) == 1 || t.stride(i) == expected || t.numel() == 0, name,
            " must be channels_last without gaps.");
    expected *= t.size(i);
  }
}

// Of float32, bfloat16 and float16.
inline DType kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float  ? DType::kFloat32
         : dtype == ScalarType::Half ? DType::kFloat16
                                     : DType::kBFloat16;
}

constexpr int64_t kLine = 64;  // bytes, at a multiple of which an image begins

// An image of float32, bfloat16 or float16, without the dispatcher, which costs a microsecond.
//
// Its memory is malloc's, whose address lies before the first element. Torch's own comes from
// posix_memalign, which leaves splinters beside each block; where these are in use, what is freed
// is some bytes too small for the next image of the same size, and a network's layers, one after
// another, take twice the memory that they have at once.
inline Tensor empty_image(ScalarType dtype, int64_t n, int64_t channels, int64_t height,
                          int64_t width) {
  const int64_t sizes[] = {n, channels, height, width};
  const int64_t strides[] = {channels * height * width, 1, channels * width, channels};
  const int64_t bytes = n * channels * height * width * (dtype == ScalarType::Float ? 4 : 2);
  char* memory = static_cast<char*>(std::malloc(static_cast<size_t>(bytes + kLine)));
  require(memory != nullptr, "there is not enough memory for a result of ", n, " x ", channels,
          " x ", height, " x ", width, " ", dtype_name(dtype), "; use smaller batches.");
  char* first = memory + kLine - reinterpret_cast<uintptr_t>(memory) % kLine;
  __builtin_memcpy(first - sizeof memory, &memory, sizeof memory);
  return torch::stable::from_blob(
      first, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
      [](void* first) {
        void* memory;
        __builtin_memcpy(&memory, static_cast<char*>(first) - sizeof memory, sizeof memory);
        std::free(memory);
      });
}

}  // namespace ddpm_fast
