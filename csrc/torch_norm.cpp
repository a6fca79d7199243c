// GroupNorm with SiLU for torch: its checks, and the kernel over a sample's groups in parallel.
#include <algorithm>
#include <vector>

#include "torch_run.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kGrainElements = 16384;  // that are worth a thread
// Of a piece of a sample, about. Its shape alone decides the pieces, because the sums of a piece
// are added in an order of its own, and a sample's bits must not depend on its place.
constexpr int64_t kPieceElements = 65536;

// (N, C, ...) like `like`, whose elements lie without gaps, the channels innermost.
void require_channels_last(const char* name, const Tensor& t, const Tensor& like) {
  require(t.scalar_type() == like.scalar_type(), name, " must be ", dtype_name(like.scalar_type()),
          ", as out, but it is ", dtype_name(t.scalar_type()), ".");
  bool fits = t.is_cpu() && t.dim() == like.dim() && t.size(0) == like.size(0);
  for (int64_t i = 2; fits && i < t.dim(); ++i) fits = t.size(i) == like.size(i);
  require(fits, name, " must be on the CPU with the samples and the sizes of out, ",
          shape_text(like), ", but it is ", shape_text(t), ".");
  const Shape shape(t);
  const std::optional<Layout> layout = layout_of(t);
  require(t.numel() == 0 || (layout && (shape.channels == 1 || layout->channel == 1) &&
                             (shape.pixels == 1 || layout->pixel == shape.channels) &&
                             (shape.samples == 1 || layout->sample == shape.elements())),
          name, " must be channels_last without gaps.");
}

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

}  // namespace

void group_norm(Tensor out, Tensor x, std::optional<Tensor> skip, std::optional<Tensor> shift,
                Tensor weight, Tensor bias, int64_t groups, double eps, bool silu) {
  const ScalarType dtype = out.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
          "out must be float32 or bfloat16, but it is ", dtype_name(dtype), ".");
  require(out.dim() >= 3, "out must have the shape (N, C, ...), but it is ", shape_text(out), ".");
  require_channels_last("out", out, out);
  require_channels_last("x", x, out);
  if (skip) require_channels_last("skip", *skip, out);
  require_separate({bytes_of("out", out), bytes_of("x", x), bytes_of("skip", skip.value_or(x))}, 1);
  const Shape shape(out);
  require(x.size(1) + (skip ? skip->size(1) : 0) == shape.channels,
          "x and skip must together have the ", shape.channels, " channels of out.");
  require(groups > 0 && shape.channels % groups == 0, "groups must divide the ", shape.channels,
          " channels, but it is ", groups, ".");
  GroupNormArgs args{};
  args.out = out.mutable_data_ptr();
  args.x[0] = x.const_data_ptr();
  args.x[1] = skip ? skip->const_data_ptr() : nullptr;
  args.channels[0] = x.size(1);
  args.channels[1] = skip ? skip->size(1) : 0;
  args.shift_stride = shift ? row_stride("shift", *shift, out) : 0;
  args.shift = shift ? read<float>(*shift) : nullptr;
  args.affine_stride = row_stride("weight", weight, out);
  require(row_stride("bias", bias, out) == args.affine_stride,
          "weight and bias must have the same rows.");
  args.weight = read<float>(weight);
  args.bias = read<float>(bias);
  args.samples = shape.samples;
  args.pixels = shape.pixels;
  args.groups = groups;
  args.eps = eps;
  args.silu = silu;
  args.dtype = dtype == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
  const int64_t elements = shape.elements();
  if (elements == 0) return;
  const int64_t wanted = std::clamp(elements / kPieceElements, int64_t{1}, groups);
  const int64_t each = (groups + wanted - 1) / wanted, pieces = (groups + each - 1) / each;
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(
      0, shape.samples * pieces, (kGrainElements * pieces + elements - 1) / elements,
      [&](int64_t begin, int64_t end) {
        std::vector<float> memory(4 * norm_row(shape.channels));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t sample = i / pieces * groups, first = i % pieces * each;
          kernels.group_norm(args, sample + first, sample + std::min(first + each, groups),
                             memory.data());
        }
      });
}

}  // namespace ddpm_fast
