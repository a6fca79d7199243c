// Convolutions for torch: their checks, and the kernel over all cores.
#include <algorithm>
#include <vector>

#include "torch_image.h"
#include "torch_layers.h"
#include "torch_run.h"

namespace ddpm_fast {
namespace {

using Integers = std::vector<int64_t>;

constexpr int64_t kMostTaps = 1 << 10;  // along a side

const ConvKernels& kernels_for(ScalarType dtype, bool winograd) {
  const bool is_float32 = dtype == ScalarType::Float;
  const bool is_half = dtype == ScalarType::Half;
  const ConvKernels* found = is_float32 || is_half || dtype == ScalarType::BFloat16
                                 ? conv_kernels(kernel_dtype(dtype), winograd)
                                 : nullptr;
  require(is_float32 || dtype == ScalarType::BFloat16 || (is_half && (winograd || found)),
          "conv2d is for float32 and bfloat16, but the dtype is ", dtype_name(dtype), ".");
  require(found != nullptr, "conv2d needs a CPU with ", is_float32 ? "AVX2" : "AVX512-BF16",
          ", and DDPM_FAST_CPU not below ", is_float32 ? "avx2" : "avx512",
          "; use torch.nn.functional.conv2d.");
  return *found;
}

ScalarType packed_dtype(const ConvKernels& kernel) {
  return kernel.packed == DType::kFloat32    ? ScalarType::Float
         : kernel.packed == DType::kBFloat16 ? ScalarType::BFloat16
                                             : ScalarType::Half;
}

// (height, width).
void set_pair(const char* name, const Integers& values, int64_t (&to)[2]) {
  require(values.size() == 2 && values[0] > 0 && values[1] > 0 && values[0] <= kMostTaps &&
              values[1] <= kMostTaps,
          name, " must be two integers from 1 to ", kMostTaps, ", for height and width.");
  to[0] = values[0];
  to[1] = values[1];
}

// Of (height, width), or (top, left, bottom, right), and the sizes of input and output. The shape
// does not say how much follows the input: the output's size does.
void set_padding(const Tensor& x, const Integers& padding, ConvShape& shape) {
  const auto fits = [](int64_t value) { return value >= 0 && value <= kMostTaps; };
  require((padding.size() == 2 || padding.size() == 4) &&
              std::all_of(padding.begin(), padding.end(), fits),
          "padding must be two integers from 0 to ", kMostTaps,
          ", for height and width, or four, for top, left, bottom and right.");
  for (int i = 0; i < 2; ++i) {
    shape.size[i] = x.size(i + 2);
    shape.padding[i] = padding[i];
    const int64_t after = padding[padding.size() - 2 + i];
    const int64_t room = shape.size[i] + padding[i] + after - shape.kernel[i];
    require(room >= 0, "x, ", shape_text(x), ", must be as large as the kernel, with its padding.");
    shape.out_size[i] = room / shape.stride[i] + 1;
  }
}

ConvShape shape_of(const Tensor& x, int64_t out_channels, const Integers& kernel_size,
                   const Integers& stride, const Integers& padding) {
  ConvShape shape{};
  shape.in_channels = x.size(1);
  shape.out_channels = out_channels;
  require(out_channels > 0 && shape.in_channels > 0,
          "x and the result must have channels, but they have ", shape.in_channels, " and ",
          out_channels, ".");
  set_pair("kernel_size", kernel_size, shape.kernel);
  set_pair("stride", stride, shape.stride);
  set_padding(x, padding, shape);
  return shape;
}

void require_3x3(const ConvShape& shape) {
  require(shape.kernel[0] == 3 && shape.kernel[1] == 3,
          "winograd is for kernels of 3 x 3, but this is ", shape.kernel[0], " x ", shape.kernel[1],
          ".");
}

// Layers that differ in their padding, weights and places alone: all at once.
void run(const ConvKernels& kernel, const std::vector<ConvArgs>& layers) {
  const ConvArgs& args = layers[0];
  const ConvShape& shape = args.shape;
  const int64_t outputs = args.samples * shape.out_size[0] * shape.out_size[1] * shape.out_channels;
  if (outputs == 0) return;
  const int64_t units = kernel.units(args), count = static_cast<int64_t>(layers.size());
  const int64_t each = outputs * shape.kernel[0] * shape.kernel[1] * shape.in_channels / units;
  int64_t bytes = 0;
  for (const ConvArgs& layer : layers) bytes = std::max(bytes, kernel.memory_bytes(layer.shape));
  run_with_memory(count * units, kernel.grain / (each + 1) + 1, bytes,
                  [&](int64_t begin, int64_t end, void* memory) {
                    while (begin < end) {
                      const int64_t first = begin / units * units;
                      const int64_t last = std::min(end, first + units);
                      kernel.conv2d(layers[first / units], begin - first, last - first, memory);
                      begin = last;
                    }
                  });
}

// Of the result of `conv2d`, without gaps.
void set_places(const ConvKernels& kernel, ConvArgs& args) {
  ConvShape& shape = args.shape;
  if (shape.kernel[0] * shape.kernel[1] * shape.stride[0] * shape.stride[1] == 1 &&
      shape.padding[0] + shape.padding[1] == 0 && kernel.memory_bytes(shape) == 0) {
    // Pixels do not see each other: all are one row, with fewer tiles cut short. (Where rows are
    // copied, this would copy all at once.)
    shape.size[1] = shape.out_size[1] = args.samples * shape.size[0] * shape.size[1];
    shape.size[0] = shape.out_size[0] = args.samples = 1;
  }
  args.out_pixel = shape.out_channels;
  args.out_row = shape.out_size[1] * args.out_pixel;
  args.out_sample = shape.out_size[0] * args.out_row;
}

void set_bias(const std::optional<Tensor>& bias, ConvArgs& args) {
  if (!bias) return;
  const int64_t channels = args.shape.out_channels;
  require_dtype("bias", *bias, ScalarType::Float);
  require(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == channels && bias->is_contiguous(),
          "bias must have the shape (", channels, ",), but it is ", shape_text(*bias), ".");
  args.bias = read<float>(*bias);
}

}  // namespace

Tensor pack_conv2d(Tensor weight, ScalarType dtype, bool winograd) {
  const ConvKernels& kernel = kernels_for(dtype, winograd);
  require_dtype("weight", weight, ScalarType::Float);
  require(weight.is_cpu() && weight.dim() == 4 && weight.numel() > 0,
          "weight must be on the CPU, of the shape (O, I, kH, kW) and not empty, but it is ",
          shape_text(weight), ".");
  weight = torch::stable::contiguous(weight);
  ConvShape shape{};
  shape.out_channels = weight.size(0);
  shape.in_channels = weight.size(1);
  set_pair("the weight's kernel", {weight.size(2), weight.size(3)}, shape.kernel);
  if (winograd) require_3x3(shape);
  const std::vector<int64_t> size{kernel.packed_elements(shape)};
  Tensor packed = torch::stable::new_empty(weight, size, packed_dtype(kernel));
  kernel.pack(shape, read<float>(weight), packed.mutable_data_ptr());
  return packed;
}

Tensor conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              int64_t out_channels, Integers kernel_size, Integers stride, Integers padding,
              bool winograd, bool half) {
  const ScalarType dtype = x.scalar_type();
  const ConvKernels& kernel = kernels_for(dtype, winograd);
  require_image("x", x, dtype);
  ConvArgs args{};
  const ConvShape& shape = args.shape = shape_of(x, out_channels, kernel_size, stride, padding);
  if (winograd) {
    require_3x3(shape);
    require(shape.stride[0] == 1 && shape.stride[1] == 1, "winograd is for stride 1, but it is ",
            shape.stride[0], " and ", shape.stride[1], ".");
  }
  require_dtype("weight", weight, packed_dtype(kernel));
  require(
      weight.is_cpu() && weight.is_contiguous() && weight.numel() == kernel.packed_elements(shape),
      "weight must be what pack_conv2d makes of a weight (", out_channels, ", ", shape.in_channels,
      ", ", shape.kernel[0], ", ", shape.kernel[1], ").");
  args.samples = x.size(0);
  const bool is_half = dtype == ScalarType::Half;
  require(!half || is_half, "half is for an x of float16, but it is ", dtype_name(dtype), ".");
  const ScalarType to = is_half && !half ? ScalarType::BFloat16 : dtype;
  args.out_dtype = kernel_dtype(to);
  Tensor out = empty_image(to, args.samples, out_channels, shape.out_size[0], shape.out_size[1]);
  set_bias(bias, args);
  if (residual) {
    require_image("residual", *residual, to);
    require_same_shape("residual", *residual, "the result", out);
    args.residual = residual->const_data_ptr();
  }
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  set_places(kernel, args);
  run(kernel, {args});
  return out;
}

Tensor upsample_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t out_channels) {
  const ScalarType dtype = x.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
          "x must be float32 or bfloat16, but it is ", dtype_name(dtype), ".");
  const ConvKernels& kernel = kernels_for(dtype, false);
  require_image("x", x, dtype);
  require_dtype("weight", weight, dtype);
  const int64_t phases = weight.dim() == 2 ? weight.size(0) : 0, rows = phases / 2;
  require(
      phases == 2 || phases == 4,
      "weight must have the shape (4, packed), or (2, packed) to double the width alone, but it "
      "is ",
      shape_text(weight), ".");
  // At a pixel 2 i + phase, of the doubled input's three pixels those of i - 1 and i, or of i and
  // i + 1.
  ConvArgs args{};
  ConvShape& shape = args.shape = shape_of(x, out_channels, {1, 1}, {1, 1}, {0, 0});
  shape.kernel[0] = rows;
  shape.kernel[1] = 2;
  require(
      weight.is_cpu() && weight.is_contiguous() && weight.size(1) == kernel.packed_elements(shape),
      "weight must be what pack_conv2d makes of ", phases, " weights (", out_channels, ", ",
      shape.in_channels, ", ", rows, ", 2).");
  args.samples = x.size(0);
  const int64_t height = rows * shape.size[0], width = 2 * shape.size[1];
  Tensor out = empty_image(dtype, args.samples, out_channels, height, width);
  set_bias(bias, args);
  args.x = x.const_data_ptr();
  args.out_pixel = 2 * out_channels;
  args.out_row = rows * width * out_channels;
  args.out_sample = height * width * out_channels;
  const int64_t bytes = x.element_size();
  std::vector<ConvArgs> layers;
  for (int64_t phase = 0; phase < phases; ++phase) {
    const int64_t row = phase / 2, column = phase % 2;
    shape.padding[0] = rows - 1 - row;
    shape.padding[1] = 1 - column;
    args.weight = read<char>(weight) + phase * weight.size(1) * bytes;
    args.out = write<char>(out) + (row * width + column) * out_channels * bytes;
    layers.push_back(args);
  }
  run(kernel, layers);
  return out;
}

}  // namespace ddpm_fast
