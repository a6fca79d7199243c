// Attention for torch: its checks, and the kernel over all cores.
#include "torch_image.h"
#include "torch_layers.h"
#include "torch_run.h"

namespace ddpm_fast {
namespace {

// (N, C, H, W) like `like`, whose channels are neighbours and whose pixels lie at one stride.
AttentionInput input_of(const char* name, const Tensor& t, const Tensor& like) {
  require_dtype(name, t, like.scalar_type());
  require(t.is_cpu() && t.dim() == 4, name,
          " must be on the CPU, of the shape (N, C, H, W), but it is ", shape_text(t), ".");
  require_same_shape(name, t, "query", like);
  const std::optional<Layout> layout = layout_of(t);
  require(t.numel() == 0 || (layout && (t.size(1) == 1 || layout->channel == 1)), name,
          " must be channels_last, or channels of such a tensor.");
  return {t.const_data_ptr(), layout ? layout->sample : 0, layout ? layout->pixel : 0};
}

}  // namespace

Tensor attention(Tensor query, Tensor key, Tensor value, int64_t heads) {
  const ScalarType dtype = query.scalar_type();
  const bool is_bfloat16 = dtype == ScalarType::BFloat16;
  require(is_bfloat16 || dtype == ScalarType::Float,
          "query must be float32 or bfloat16, but it is ", dtype_name(dtype), ".");
  AttentionArgs args{};
  args.query = input_of("query", query, query);
  args.key = input_of("key", key, query);
  args.value = input_of("value", value, query);
  const int64_t channels = query.size(1);
  require(heads > 0 && channels > 0 && channels % heads == 0, "heads must divide the ", channels,
          " channels, but it is ", heads, ".");
  const AttentionKernels* kernels =
      attention_kernels(is_bfloat16 ? DType::kBFloat16 : DType::kFloat32);
  require(kernels != nullptr, "attention needs a CPU with ",
          is_bfloat16 ? "AVX512-BF16" : "AVX-512",
          ", and DDPM_FAST_CPU not below avx512; use "
          "torch.nn.functional.scaled_dot_product_attention.");
  Tensor out = empty_image(dtype, query.size(0), channels, query.size(2), query.size(3));
  args.samples = query.size(0);
  args.positions = query.size(2) * query.size(3);
  args.heads = heads;
  args.channels = channels / heads;
  args.out = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  const int64_t each = 2 * args.positions * args.channels;
  run_with_memory(args.samples * heads * args.positions, kernels->grain / each + 1,
                  kernels->memory_bytes(args), [&](int64_t begin, int64_t end, void* memory) {
                    kernels->attention(args, begin, end, memory);
                  });
  return out;
}

}  // namespace ddpm_fast
