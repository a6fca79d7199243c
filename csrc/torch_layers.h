// The operators of a network's layers, on a CPU; shapes and units are in ddpm_fast/layer_ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace ddpm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In torch_norm.cpp.
Tensor group_norm(Tensor x, std::optional<Tensor> skip, std::optional<Tensor> shift, Tensor weight,
                  Tensor bias, int64_t groups, double eps, bool silu, bool half);
// In torch_conv.cpp.
Tensor pack_conv2d(Tensor weight, ScalarType dtype, bool winograd);
Tensor conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              int64_t out_channels, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
              std::vector<int64_t> padding, bool winograd, bool half);
Tensor upsample_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t out_channels);
// In torch_attention.cpp.
Tensor attention(Tensor query, Tensor key, Tensor value, int64_t heads);

}  // namespace ddpm_fast
