// The fused step for torch: its checks, and the two forms of the operator.
#include "torch_run.h"

namespace ddpm_fast {
namespace {

// The operators' arguments.
struct StepInputs {
  Tensor x_t, model_output, coefficients, index, row, seed, sample_index;
  std::optional<Tensor> noise, guidance_scale, previous, status, next_input;
};

DType network_dtype(const char* name, const Tensor& t) {
  require_aligned(name, t.const_data_ptr(), t.element_size());
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      break;
  }
  require(false, name, " must be float32, bfloat16 or float16, but it is ",
          dtype_name(t.scalar_type()), ".");
  return DType::kFloat32;
}

// The channels of model_output: C, or 2 C with a learned variance.
int64_t model_channels(const StepInputs& in, const Shape& shape) {
  const Tensor &x = in.x_t, &model = in.model_output;
  const int64_t samples = in.guidance_scale ? 2 * shape.samples : shape.samples;
  bool same = model.dim() == x.dim() && model.size(0) == samples;
  for (int64_t i = 2; same && i < x.dim(); ++i) same = model.size(i) == x.size(i);
  const int64_t channels = same && x.dim() > 1 ? model.size(1) : shape.channels;
  same = same && (channels == shape.channels || channels == 2 * shape.channels);
  require(same, "model_output must have the shape of x_t, ", shape_text(x),
          in.guidance_scale ? ", with twice the samples (conditional, then unconditional)" : "",
          ", and C or 2 C channels, but it is ", shape_text(model), ".");
  return channels;
}

void check_optional(const StepInputs& in) {
  if (in.noise) {
    require_dtype("noise", *in.noise, ScalarType::Float);
    require_device("noise", *in.noise, in.x_t);
    require_same_shape("noise", *in.noise, "x_t", in.x_t);
  }
  if (in.guidance_scale) {
    require_dtype("guidance_scale", *in.guidance_scale, ScalarType::Float);
    require_device("guidance_scale", *in.guidance_scale, in.x_t);
    require(in.guidance_scale->numel() == 1, "guidance_scale must have one element, but it is ",
            shape_text(*in.guidance_scale), ".");
  }
  if (in.previous) {
    require_dtype("previous_pred_xstart", *in.previous, ScalarType::Float);
    require_device("previous_pred_xstart", *in.previous, in.x_t);
    require_same_shape("previous_pred_xstart", *in.previous, "x_t", in.x_t);
  }
  if (in.status) {
    require_dtype("status", *in.status, ScalarType::Int);
    require_device("status", *in.status, in.x_t);
    require(in.status->dim() == 1 && in.status->size(0) == 4 && in.status->is_contiguous(),
            "status must be contiguous, of shape (4,), but it is ", shape_text(*in.status), ".");
  }
}

// x_t's shape, under guidance with twice the samples.
void check_next_input(const StepInputs& in) {
  if (!in.next_input) return;
  const Tensor &x = in.x_t, &next = *in.next_input;
  require_device("next_input", next, x);
  bool same = next.dim() == x.dim() && next.size(0) == x.size(0) * (in.guidance_scale ? 2 : 1);
  for (int64_t i = 1; same && i < x.dim(); ++i) same = next.size(i) == x.size(i);
  require(same, "next_input must have the shape of x_t, ", shape_text(x),
          in.guidance_scale ? ", with twice the samples (conditional, then unconditional)" : "",
          ", but it is ", shape_text(next), ".");
}

void check_memory(const StepInputs& in, bool in_place) {
  std::vector<Bytes> all;
  auto add = [&](const char* name, const std::optional<Tensor>& t) {
    if (t) all.push_back(bytes_of(name, *t));
  };
  add("previous_pred_xstart", in.previous);
  add("next_input", in.next_input);
  add("status", in.status);
  const size_t written = all.size() + (in_place ? 1 : 0);
  add("x_t", in.x_t);
  add("model_output", in.model_output);
  add("noise", in.noise);
  add("guidance_scale", in.guidance_scale);
  add("coefficients", in.coefficients);
  add("index", in.index);
  add("row", in.row);
  add("seed", in.seed);
  add("sample_index", in.sample_index);
  require_separate(all, written);
}

// `out` null: x_t is written in place.
void run(StepInputs in, const Tensor* out) {
  require_state("x_t", in.x_t, 2);
  const Shape shape(in.x_t);
  require_elements(shape.elements());
  require_device("model_output", in.model_output, in.x_t);
  const DType dtype = network_dtype("model_output", in.model_output);
  const int64_t channels = model_channels(in, shape);
  in.coefficients =
      table("coefficients", in.coefficients, ScalarType::Float, kCoefficients, in.x_t);
  in.index = table("index", in.index, ScalarType::Int, kIndexColumns, in.x_t);
  require(in.index.size(0) == in.coefficients.size(0), "index and coefficients must have as many ",
          "rows, but they have ", in.index.size(0), " and ", in.coefficients.size(0), ".");
  in.row = per_sample("row", in.row, shape.samples, in.x_t);
  in.seed = per_sample("seed", in.seed, shape.samples, in.x_t);
  in.sample_index = per_sample("sample_index", in.sample_index, shape.samples, in.x_t);
  check_optional(in);
  check_next_input(in);
  check_memory(in, out == nullptr);
  const Tensor& target = out != nullptr ? *out : in.x_t;
  const Layout out_layout = writable("x_t", target);
  const Layout previous_layout =
      in.previous ? writable("previous_pred_xstart", *in.previous) : Layout{};
  if (out != nullptr) in.x_t = walkable(in.x_t);
  in.model_output = walkable(in.model_output);
  if (in.noise) in.noise = walkable(*in.noise);
  StepArgs args{};
  args.out = write<float>(target);
  args.x_t = read<float>(in.x_t);
  args.model_output = in.model_output.const_data_ptr();
  args.noise = in.noise ? read<float>(*in.noise) : nullptr;
  args.previous = in.previous ? write<float>(*in.previous) : nullptr;
  args.guidance_scale = in.guidance_scale ? read<float>(*in.guidance_scale) : nullptr;
  args.coefficients = read<Coefficients>(in.coefficients);
  args.index = read<RowIndex>(in.index);
  args.row = read<int64_t>(in.row);
  args.seed = read<int64_t>(in.seed);
  args.sample_index = read<int64_t>(in.sample_index);
  args.status = in.status ? write<int32_t>(*in.status) : nullptr;
  args.out_layout = out_layout;
  args.x_layout = *layout_of(in.x_t);
  args.model_layout = *layout_of(in.model_output);
  args.noise_layout = in.noise ? *layout_of(*in.noise) : Layout{};
  args.previous_layout = previous_layout;
  args.samples = shape.samples;
  args.channels = shape.channels;
  args.pixels = shape.pixels;
  args.table_rows = in.coefficients.size(0);
  args.model_dtype = dtype;
  args.model_channels = channels;
  if (in.next_input) {
    args.next_input = in.next_input->mutable_data_ptr();
    args.next_layout = writable("next_input", *in.next_input);
    args.next_dtype = network_dtype("next_input", *in.next_input);
  }
  if (target.is_cpu()) {  // where what is wrong with a row is said at once
    step_on_cpu(args, in.previous.has_value(), torch_threads);
  } else {
    launch(target, [&](void* stream) { return cuda_step(args, stream); });
  }
}

}  // namespace

Tensor p_sample_step(Tensor x_t, Tensor model_output, Tensor coefficients, Tensor index, Tensor row,
                     Tensor seed, Tensor sample_index, std::optional<Tensor> noise,
                     std::optional<Tensor> guidance_scale,
                     std::optional<Tensor> previous_pred_xstart, std::optional<Tensor> status,
                     std::optional<Tensor> next_input) {
  require_state("x_t", x_t, 2);
  Tensor out = torch::stable::empty_like(x_t);
  const bool direct = layout_of(out).has_value();
  const Tensor target = direct ? out : torch::stable::empty_like(torch::stable::contiguous(x_t));
  run({x_t, model_output, coefficients, index, row, seed, sample_index, noise, guidance_scale,
       previous_pred_xstart, status, next_input},
      &target);
  return direct ? out : torch::stable::copy_(out, target);
}

void p_sample_step_(Tensor x_t, Tensor model_output, Tensor coefficients, Tensor index, Tensor row,
                    Tensor seed, Tensor sample_index, std::optional<Tensor> noise,
                    std::optional<Tensor> guidance_scale,
                    std::optional<Tensor> previous_pred_xstart, std::optional<Tensor> status,
                    std::optional<Tensor> next_input) {
  run({x_t, model_output, coefficients, index, row, seed, sample_index, noise, guidance_scale,
       previous_pred_xstart, status, next_input},
      nullptr);
}

}  // namespace ddpm_fast
