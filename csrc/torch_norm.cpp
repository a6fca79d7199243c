// GroupNorm with SiLU for torch: its checks, and the kernel over a sample's groups in parallel.
#include <algorithm>
#include <numeric>

#include "torch_image.h"
#include "torch_layers.h"
#include "torch_run.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kGrainElements = 8192;  // that are worth a thread

// Floats (C), (1, C) or (N, C), with neighbouring columns; returns the stride of the rows.
int64_t row_stride(const char* name, const Tensor& t, const Tensor& out) {
  require_dtype(name, t, ScalarType::Float);
  require_device(name, t, out);
  const int64_t last = t.dim() - 1, channels = out.size(1);
  const bool fits = (t.dim() == 1 || t.dim() == 2) && t.size(last) == channels &&
                    (channels == 1 || t.stride(last) == 1) &&
                    (t.dim() == 1 || t.size(0) == 1 || t.size(0) == out.size(0));
  require(fits, name, " must have the shape (", channels, ",), (1, ", channels, ") or (",
          out.size(0), ", ", channels, ") with neighbouring columns, but it is ", shape_text(t),
          ".");
  return t.dim() == 1 || t.size(0) == 1 ? 0 : t.stride(0);
}

// The groups of a sample that stay together: of whole strips, where that leaves at least two parts.
int64_t groups_of_a_part(int64_t channels, int64_t groups) {
  if (channels < 2 * kNormStrip) return groups;
  const int64_t whole = kNormStrip / std::gcd(channels / groups, kNormStrip);
  return 2 * whole <= groups ? whole : 1;
}

void run(const GroupNormArgs& args) {
  const int64_t channels = args.channels[0] + args.channels[1], elements = channels * args.pixels;
  if (args.samples * elements == 0) return;
  const int64_t each = groups_of_a_part(channels, args.groups);
  const int64_t parts = (args.groups + each - 1) / each;
  const auto first_group = [&](int64_t part) {
    return part / parts * args.groups + part % parts * each;
  };
  const GroupNormKernel kernel = group_norm_kernel(args.dtype);
  run_with_memory(args.samples * parts, (kGrainElements * parts + elements - 1) / elements,
                  norm_memory(channels) * int64_t{sizeof(float)},
                  [&](int64_t begin, int64_t end, void* memory) {
                    kernel(args, first_group(begin), first_group(end), static_cast<float*>(memory));
                  });
}

}  // namespace

Tensor group_norm(Tensor x, std::optional<Tensor> skip, std::optional<Tensor> shift, Tensor weight,
                  Tensor bias, int64_t groups, double eps, bool silu, bool half) {
  const ScalarType dtype = x.scalar_type();
  const bool is_float32 = dtype == ScalarType::Float;
  require(is_float32 || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
          "x must be float32, bfloat16 or float16, but it is ", dtype_name(dtype), ".");
  require(!half || !is_float32, "half is for an x of bfloat16 or float16, but it is float32.");
  const ScalarType to = half ? ScalarType::Half : dtype;
  require_image("x", x, dtype);
  GroupNormArgs args{};
  args.samples = x.size(0);
  args.channels[0] = x.size(1);
  args.pixels = x.size(2) * x.size(3);
  args.x[0] = x.const_data_ptr();
  if (skip) {
    require_image("skip", *skip, dtype);
    require(skip->size(0) == x.size(0) && skip->size(2) == x.size(2) && skip->size(3) == x.size(3),
            "skip must have the samples and the sizes of x, ", shape_text(x), ", but it is ",
            shape_text(*skip), ".");
    args.channels[1] = skip->size(1);
    args.x[1] = skip->const_data_ptr();
  }
  const int64_t channels = args.channels[0] + args.channels[1];
  require(groups > 0 && channels % groups == 0, "groups must divide the ", channels,
          " channels, but it is ", groups, ".");
  Tensor out = empty_image(to, args.samples, channels, x.size(2), x.size(3));
  args.out = out.mutable_data_ptr();
  args.shift_stride = shift ? row_stride("shift", *shift, out) : 0;
  args.shift = shift ? read<float>(*shift) : nullptr;
  args.affine_stride = row_stride("weight", weight, out);
  require(row_stride("bias", bias, out) == args.affine_stride,
          "weight and bias must have the same rows.");
  args.weight = read<float>(weight);
  args.bias = read<float>(bias);
  args.groups = groups;
  args.eps = eps;
  args.silu = silu;
  args.dtype = kernel_dtype(dtype);
  args.out_dtype = kernel_dtype(to);
  run(args);
  return out;
}

}  // namespace ddpm_fast
