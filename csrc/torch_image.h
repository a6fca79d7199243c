// Tensors (N, C, H, W) in channels_last order.
#pragma once

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

// Without the dispatcher, which costs a microsecond.
inline Tensor empty_image(ScalarType dtype, int64_t n, int64_t channels, int64_t height,
                          int64_t width) {
  const int64_t sizes[] = {n, channels, height, width};
  const int64_t strides[] = {channels * height * width, 1, channels * width, channels};
  const int32_t type = dtype == ScalarType::Float  ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Half ? aoti_torch_dtype_float16()
                                                   : aoti_torch_dtype_bfloat16();
  AtenTensorHandle image;
  const auto failed =
      aoti_torch_empty_strided(4, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &image);
  require(!failed, "there is not enough memory for a result of ", n, " x ", channels, " x ", height,
          " x ", width, " ", dtype_name(dtype), "; use smaller batches.");
  return Tensor(image);
}

}  // namespace ddpm_fast
