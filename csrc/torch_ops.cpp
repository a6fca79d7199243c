// The operators for torch, through LibTorch's stable ABI: one source for torch 2.11 and later.
// Schemas and registrations are at the end; shapes and units are in ddpm_fast/ops.py.
#include "torch_layers.h"
#include "torch_run.h"

namespace ddpm_fast {

// In torch_step.cpp.
Tensor p_sample_step(Tensor x_t, Tensor model_output, Tensor coefficients, Tensor index, Tensor row,
                     Tensor seed, Tensor sample_index, std::optional<Tensor> noise,
                     std::optional<Tensor> guidance_scale,
                     std::optional<Tensor> previous_pred_xstart, std::optional<Tensor> status,
                     std::optional<Tensor> next_input);
void p_sample_step_(Tensor x_t, Tensor model_output, Tensor coefficients, Tensor index, Tensor row,
                    Tensor seed, Tensor sample_index, std::optional<Tensor> noise,
                    std::optional<Tensor> guidance_scale,
                    std::optional<Tensor> previous_pred_xstart, std::optional<Tensor> status,
                    std::optional<Tensor> next_input);
// In torch_replay.cpp.
Tensor record(std::vector<int64_t> code, std::vector<Tensor> constants, std::vector<Tensor> inputs);
Tensor replay(Tensor recording, std::vector<Tensor> inputs);

namespace {

Tensor randn(Tensor seed, Tensor sample_index, std::vector<int64_t> shape, int64_t step,
             int64_t stream) {
  require(seed.dim() == 1, "seed must have the shape (N,), but it is ", shape_text(seed), ".");
  const int64_t samples = seed.size(0);
  seed = per_sample("seed", seed, samples, seed);
  sample_index = per_sample("sample_index", sample_index, samples, seed);
  require_noise(step, stream);
  std::vector<int64_t> sizes{samples};
  for (int64_t size : shape) {
    require(size >= 0, "shape must have no negative size, but it has ", size, ".");
    sizes.push_back(size);
  }
  int64_t elements = 1;
  for (int64_t size : shape) {
    elements *= size;
    require_elements(elements);
  }
  Tensor out = torch::stable::new_empty(seed, sizes, ScalarType::Float);
  const RandnArgs args{
      write<float>(out), read<int64_t>(seed),        read<int64_t>(sample_index), samples,
      elements,          static_cast<int32_t>(step), static_cast<int32_t>(stream)};
  if (out.is_cpu()) {
    randn_on_cpu(args, torch_threads);
  } else {
    launch(out, [&](void* s) { return cuda_randn(args, s); });
  }
  return out;
}

// Bytes of results that will not be found in a cache by whoever reads them next; written past the
// caches, their places need not be read first.
constexpr int64_t kBeyondCaches = int64_t{1} << 24;

// `t`, or a copy of it in the memory order of `like`.
Tensor ordered_like(const Tensor& like, const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) > 1 && t.stride(i) != like.stride(i)) {
      Tensor same = torch::stable::empty_like(like);
      return torch::stable::copy_(same, t);
    }
  }
  return t;
}

std::tuple<Tensor, Tensor> q_sample(Tensor x_start, Tensor coefficients, Tensor timesteps,
                                    Tensor seed, Tensor sample_index, std::optional<Tensor> noise) {
  require_state("x_start", x_start, 1);
  const Shape shape(x_start);
  require_elements(shape.elements());
  coefficients = table("coefficients", coefficients, ScalarType::Float, 2, x_start);
  timesteps = per_sample("timesteps", timesteps, shape.samples, x_start);
  seed = per_sample("seed", seed, shape.samples, x_start);
  sample_index = per_sample("sample_index", sample_index, shape.samples, x_start);
  Tensor x_t = torch::stable::empty_like(x_start);
  const std::optional<Layout> layout = layout_of(x_t);
  if (!layout) {  // the results lie like x_start all the same
    auto [result, drawn] = q_sample(torch::stable::contiguous(x_start), coefficients, timesteps,
                                    seed, sample_index, noise);
    if (!noise) {
      Tensor lying = torch::stable::empty_like(x_start);
      drawn = torch::stable::copy_(lying, drawn);
    }
    return {torch::stable::copy_(x_t, result), drawn};
  }
  // One layout serves all four: where they differ (a slice, say), the inputs are copied.
  x_start = ordered_like(x_t, x_start);
  if (noise) {
    require_dtype("noise", *noise, ScalarType::Float);
    require_device("noise", *noise, x_start);
    require_same_shape("noise", *noise, "x_start", x_start);
    noise = ordered_like(x_t, *noise);
  }
  const std::vector<int64_t> none{0};
  Tensor drawn = noise ? torch::stable::new_empty(x_t, none) : torch::stable::empty_like(x_t);
  const QSampleArgs args{.samples = shape.samples,
                         .channels = shape.channels,
                         .pixels = shape.pixels,
                         .table_rows = coefficients.size(0),
                         .x_t = write<float>(x_t),
                         .noise_out = noise ? nullptr : write<float>(drawn),
                         .x_start = read<float>(x_start),
                         .noise = noise ? read<float>(*noise) : nullptr,
                         .coefficients = read<float>(coefficients),
                         .timesteps = read<int64_t>(timesteps),
                         .seed = read<int64_t>(seed),
                         .sample_index = read<int64_t>(sample_index),
                         .layout = *layout,
                         .past_caches = 4 * x_t.numel() * (noise ? 1 : 2) >= kBeyondCaches};
  if (x_t.is_cpu()) {  // where what is wrong with a timestep is said at once
    q_sample_on_cpu(args, torch_threads);
  } else {
    launch(x_t, [&](void* s) { return cuda_q_sample(args, s); });
  }
  return {x_t, drawn};
}

#define DDPM_FAST_STEP_ARGUMENTS                                                      \
  "Tensor model_output, Tensor coefficients, Tensor index, Tensor row, Tensor seed, " \
  "Tensor sample_index, Tensor? noise=None, Tensor? guidance_scale=None, "

STABLE_TORCH_LIBRARY(ddpm_fast, m) {
  m.def("randn(Tensor seed, Tensor sample_index, SymInt[] shape, int step, int stream) -> Tensor");
  m.def(
      "q_sample(Tensor x_start, Tensor coefficients, Tensor timesteps, Tensor seed, "
      "Tensor sample_index, Tensor? noise=None) -> (Tensor, Tensor)");
  m.def("p_sample_step(Tensor x_t, " DDPM_FAST_STEP_ARGUMENTS
        "Tensor(a!)? previous_pred_xstart=None, Tensor(b!)? status=None, "
        "Tensor(c!)? next_input=None) -> Tensor");
  m.def("p_sample_step_(Tensor(a!) x_t, " DDPM_FAST_STEP_ARGUMENTS
        "Tensor(b!)? previous_pred_xstart=None, Tensor(c!)? status=None, "
        "Tensor(d!)? next_input=None) -> ()");
  m.def(
      "group_norm(Tensor x, Tensor? skip, Tensor? shift, Tensor weight, Tensor bias, int groups, "
      "float eps, bool silu, bool half=False) -> Tensor");
  m.def("pack_conv2d(Tensor weight, ScalarType dtype, bool winograd=False) -> Tensor");
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int out_channels, "
      "int[] kernel_size, int[] stride, int[] padding, bool winograd=False, "
      "bool half=False) -> Tensor");
  m.def("upsample_conv2d(Tensor x, Tensor weight, Tensor? bias, int out_channels) -> Tensor");
  m.def("attention(Tensor query, Tensor key, Tensor value, int heads) -> Tensor");
  m.def("record(int[] code, Tensor[] constants, Tensor[] inputs) -> Tensor");
  m.def("replay(Tensor recording, Tensor[] inputs) -> Tensor");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("randn", TORCH_BOX(&randn));
  m.impl("q_sample", TORCH_BOX(&q_sample));
  m.impl("p_sample_step", TORCH_BOX(&p_sample_step));
  m.impl("p_sample_step_", TORCH_BOX(&p_sample_step_));
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  implement(m);
  m.impl("group_norm", TORCH_BOX(&group_norm));
  m.impl("pack_conv2d", TORCH_BOX(&pack_conv2d));
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("upsample_conv2d", TORCH_BOX(&upsample_conv2d));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("replay", TORCH_BOX(&replay));
}
// Constants may be of any layout, oneDNN's too.
STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CompositeExplicitAutograd, m) {
  m.impl("record", TORCH_BOX(&record));
}
STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) { implement(m); }

}  // namespace
}  // namespace ddpm_fast
