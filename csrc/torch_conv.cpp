// Convolutions for torch: their checks, and the kernel over all cores.
#include <vector>

#include "torch_image.h"
#include "torch_run.h"

namespace ddpm_fast {
namespace {

using Pair = std::vector<int64_t>;

constexpr int64_t kMostTaps = 1 << 10;       // along a side
constexpr int64_t kGrainProducts = 500'000;  // that are worth a thread

// Of the tensors' dtype.
const ConvKernels& kernels_for(const char* name, const Tensor& t) {
  const bool is_bfloat16 = t.scalar_type() == ScalarType::BFloat16;
  require(is_bfloat16 || t.scalar_type() == ScalarType::Float, name,
          " must be float32 or bfloat16, but it is ", dtype_name(t.scalar_type()), ".");
  require_aligned(name, t.const_data_ptr(), t.element_size());
  const ConvKernels* found = conv_kernels(is_bfloat16 ? DType::kBFloat16 : DType::kFloat32);
  require(found != nullptr, "conv2d needs a CPU with ", is_bfloat16 ? "AVX512-BF16" : "AVX-512",
          ", and DDPM_FAST_CPU not below avx512; use torch.nn.functional.conv2d.");
  return *found;
}

// (height, width), each of them at least `least`.
void set_pair(const char* name, const Pair& values, int64_t least, int64_t (&to)[2]) {
  require(values.size() == 2 && values[0] >= least && values[1] >= least &&
              values[0] <= kMostTaps && values[1] <= kMostTaps,
          name, " must be two integers from ", least, " to ", kMostTaps, ", for height and width.");
  to[0] = values[0];
  to[1] = values[1];
}

ConvShape shape_of(const Tensor& x, int64_t out_channels, const Pair& kernel_size,
                   const Pair& stride, const Pair& padding) {
  ConvShape shape{};
  shape.in_channels = x.size(1);
  shape.out_channels = out_channels;
  require(out_channels > 0 && shape.in_channels > 0,
          "x and the result must have channels, but they have ", shape.in_channels, " and ",
          out_channels, ".");
  set_pair("kernel_size", kernel_size, 1, shape.kernel);
  set_pair("stride", stride, 1, shape.stride);
  set_pair("padding", padding, 0, shape.padding);
  for (int i = 0; i < 2; ++i) {
    shape.size[i] = x.size(i + 2);
    const int64_t room = shape.size[i] + 2 * shape.padding[i] - shape.kernel[i];
    require(room >= 0, "x, ", shape_text(x), ", must be as large as the kernel, with its padding.");
    shape.out_size[i] = room / shape.stride[i] + 1;
  }
  return shape;
}

void run(const ConvKernels& kernel, ConvArgs args) {
  ConvShape& shape = args.shape;
  const int64_t taps = shape.kernel[0] * shape.kernel[1];
  if (taps * shape.stride[0] * shape.stride[1] == 1 && shape.padding[0] + shape.padding[1] == 0) {
    // Pixels do not see each other: all are one row, with fewer tiles cut short.
    shape.size[1] = shape.out_size[1] = args.samples * shape.size[0] * shape.size[1];
    shape.size[0] = shape.out_size[0] = args.samples = 1;
  }
  const int64_t outputs = args.samples * shape.out_size[0] * shape.out_size[1] * shape.out_channels;
  if (outputs == 0) return;
  const int64_t units = kernel.units(args), each = outputs * taps * shape.in_channels / units;
  torch::stable::parallel_for(0, units, kGrainProducts / (each + 1) + 1,
                              [&](int64_t begin, int64_t end) {
                                // Kept: a large allocation's pages would cost more than a small
                                // layer.
                                static thread_local std::vector<uint64_t> memory;
                                const size_t words = (kernel.memory_bytes(shape) + 7) / 8;
                                if (memory.size() < words) memory.resize(words);
                                kernel.conv2d(args, begin, end, memory.data());
                              });
}

}  // namespace

Tensor pack_conv2d(Tensor weight) {
  const ConvKernels& kernel = kernels_for("weight", weight);
  require(weight.is_cpu() && weight.dim() == 4 && weight.numel() > 0,
          "weight must be on the CPU, of the shape (O, I, kH, kW) and not empty, but it is ",
          shape_text(weight), ".");
  weight = torch::stable::contiguous(weight);
  ConvShape shape{};
  shape.out_channels = weight.size(0);
  shape.in_channels = weight.size(1);
  set_pair("the weight's kernel", {weight.size(2), weight.size(3)}, 1, shape.kernel);
  const std::vector<int64_t> size{kernel.packed_elements(shape)};
  Tensor packed = torch::stable::new_empty(weight, size);
  kernel.pack(shape, weight.const_data_ptr(), packed.mutable_data_ptr());
  return packed;
}

Tensor conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              int64_t out_channels, Pair kernel_size, Pair stride, Pair padding) {
  const ConvKernels& kernel = kernels_for("x", x);
  const ScalarType dtype = x.scalar_type();
  require_image("x", x, dtype);
  ConvArgs args{};
  const ConvShape& shape = args.shape = shape_of(x, out_channels, kernel_size, stride, padding);
  require_dtype("weight", weight, dtype);
  require(
      weight.is_cpu() && weight.is_contiguous() && weight.numel() == kernel.packed_elements(shape),
      "weight must be what pack_conv2d makes of a weight (", out_channels, ", ", shape.in_channels,
      ", ", shape.kernel[0], ", ", shape.kernel[1], ").");
  args.samples = x.size(0);
  Tensor out = empty_image(dtype, args.samples, out_channels, shape.out_size[0], shape.out_size[1]);
  if (bias) {
    require_dtype("bias", *bias, ScalarType::Float);
    require(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == out_channels &&
                bias->is_contiguous(),
            "bias must have the shape (", out_channels, ",), but it is ", shape_text(*bias), ".");
    args.bias = read<float>(*bias);
  }
  if (residual) {
    require_image("residual", *residual, dtype);
    require_same_shape("residual", *residual, "the result", out);
    args.residual = residual->const_data_ptr();
  }
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  run(kernel, args);
  return out;
}

}  // namespace ddpm_fast
