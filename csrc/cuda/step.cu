// The fused step: one launch for the whole batch.
#include "../step.h"
#include "lane.cuh"
#include "quads.cuh"

namespace ddpm_fast {
namespace {

// The first report stays.
__device__ void report(int32_t* status, Status code, int64_t row, int64_t sample) {
  if (status == nullptr || atomicCAS(status, 0, static_cast<int32_t>(code)) != 0) return;
  status[1] = static_cast<int32_t>(row);
  status[2] = static_cast<int32_t>(sample);
}

// Whether the step can be taken by the table's row `at`.
__device__ bool usable(const StepArgs& args, int64_t at) {
  if (at < 0 || at >= args.table_rows) return false;
  const StepRow row = step_row(args, at);
  return row.noise_step >= 0 && row.noise_step < kMaxStep &&
         (!row.learned || args.model_channels == 2 * args.channels) &&
         (row.c2 == 0.0f || args.previous != nullptr);
}

// How a step is taken: with quads that lie scattered in some tensor; that move at once in all; and
// the same, known to have no guidance, learned variance, given noise or previous pred_xstart.
enum class Path { kScattered, kTogether, kPlain };

// One sample's step.
template <class Model, Path path>
struct SampleStep {
  static constexpr bool kTogether = path != Path::kScattered, kAny = path != Path::kPlain;

  const StepArgs& args;
  int64_t sample;
  StepRow row;
  NoiseKey key;

  __device__ bool guided() const { return kAny && args.guidance_scale != nullptr; }
  __device__ bool learned() const { return kAny && row.learned; }
  __device__ bool noise_given() const { return kAny && args.noise != nullptr; }
  __device__ bool has_previous() const { return kAny && args.previous != nullptr; }

  template <class T>
  __device__ __forceinline__ View<T, kTogether> view(T* tensor, const Layout& layout) const {
    return {tensor, layout, args.pixels, sample};
  }

  __device__ __forceinline__ void load_state(const Quad& quad, float (&x)[kWide]) const {
    view(args.x_t, args.x_layout).load(quad, x);
  }

  // `offset`: from the prediction to another part of the model's output.
  __device__ __forceinline__ void load_model(const Quad& quad, int64_t offset,
                                             float (&out)[kWide]) const {
    view(static_cast<const Model*>(args.model_output) + offset, args.model_layout).load(quad, out);
  }

  // The prediction, guided where that is asked for.
  __device__ __forceinline__ void load_prediction(const Quad& quad, float (&model)[kWide]) const {
    load_model(quad, 0, model);
    if (!guided()) return;
    float other[kWide] = {};
    load_model(quad, args.samples * args.model_layout.sample, other);
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      model[k] = guide<Lane>(model[k], other[k], *args.guidance_scale);
    }
  }

  // The noise times its standard deviation: the row's, or by the model's extra channels.
  __device__ __forceinline__ void load_noise(const Quad& quad, float (&z)[kWide]) const {
    if (noise_given()) {
      view(args.noise, args.noise_layout).load(quad, z);
    } else {
      normals<Lane>(key, static_cast<uint32_t>(quad.index), z);
    }
    float extra[kWide] = {};
    if (learned()) load_model(quad, args.channels * args.model_layout.channel, extra);
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      z[k] = Lane::mul(learned() ? learned_sigma<Lane>(row, extra[k]) : row.sigma, z[k]);
    }
  }

  // x_t becomes x_prev.
  __device__ __forceinline__ void update(const Quad& quad, float (&x)[kWide]) const {
    float model[kWide] = {}, previous[kWide] = {}, pred_xstart[kWide], z[kWide] = {};
    load_prediction(quad, model);
#pragma unroll
    for (int k = 0; k < kWide; ++k) pred_xstart[k] = predict_xstart<Lane>(row, x[k], model[k]);
    if (has_previous()) {
      const auto place = view(args.previous, args.previous_layout);
      if (row.c2 != 0.0f) place.load(quad, previous);
      place.store(quad, pred_xstart);
    }
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      x[k] = combine<Lane>(row, pred_xstart[k], x[k], previous[k], model[k]);
    }
    if (!row.noisy()) return;
    load_noise(quad, z);
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[k] = Lane::add(x[k], z[k]);
  }

  template <class T>
  __device__ __forceinline__ void store_next(const Quad& quad, const float (&x)[kWide]) const {
    auto next = view(static_cast<T*>(args.next_input), args.next_layout);
    next.store(quad, x);
    if (!guided()) return;
    next.data += args.samples * args.next_layout.sample;
    next.store(quad, x);
  }

  // x_prev, into the state and the network's next input.
  __device__ __forceinline__ void store(const Quad& quad, const float (&x)[kWide]) const {
    view(args.out, args.out_layout).store(quad, x);
    if (args.next_input == nullptr) return;
    switch (args.next_dtype) {
      case DType::kBFloat16:
        return store_next<__nv_bfloat16>(quad, x);
      case DType::kFloat16:
        return store_next<__half>(quad, x);
      default:
        return store_next<float>(quad, x);
    }
  }
};

template <class Model, Path path>
__global__ void __launch_bounds__(kThreads, kBlocks)
    step_kernel(const __grid_constant__ StepArgs args) {
  const Shape shape{args.samples, args.channels, args.pixels};
  const int64_t sample = block_sample();
  if (sample >= shape.samples) return;
  using Step = SampleStep<Model, path>;
  Step step{args, sample};
  const int64_t at = args.row[sample];
  const bool known = usable(args, at);
  if (known) {
    step.row = step_row(args, at);
    if (!Step::kAny) step.row.c2 = 0.0f;  // as it must be without a previous pred_xstart
    step.key = noise_key(args.seed[sample], args.sample_index[sample], step.row.noise_step, 0);
  } else if (threadIdx.x == 0) {
    report(args.status, Status::kBadRow, at, sample);
  }
  each_quad<Step::kTogether>(shape, [&](const Quad& quad) {
    float x[kWide] = {};
    step.load_state(quad, x);
    if (known) step.update(quad, x);
    step.store(quad, x);
    bool finite = true;
#pragma unroll
    for (int k = 0; k < kWide; ++k) finite = finite && (k >= quad.count || isfinite(x[k]));
    if (known && !finite) report(args.status, Status::kNotFinite, at, sample);
  });
}

// Whether all tensors' quads lie together.
bool together(const StepArgs& args, const Shape& shape) {
  const auto lies = [&](const void* data, DType dtype, const Layout& layout, int64_t samples) {
    return data == nullptr ||
           lies_together(data, dtype == DType::kFloat32 ? 4 : 2, layout, shape, samples);
  };
  const int64_t rows = args.guidance_scale != nullptr ? 2 * args.samples : args.samples;
  // Where the variance begins; with one channel nothing else has checked its stride.
  const bool variance = args.model_channels == args.channels ||
                        args.channels * args.model_layout.channel % kWide == 0;
  return variance && shape.elements() % kWide == 0 &&
         lies(args.out, DType::kFloat32, args.out_layout, args.samples) &&
         lies(args.x_t, DType::kFloat32, args.x_layout, args.samples) &&
         lies(args.model_output, args.model_dtype, args.model_layout, rows) &&
         lies(args.noise, DType::kFloat32, args.noise_layout, args.samples) &&
         lies(args.previous, DType::kFloat32, args.previous_layout, args.samples) &&
         lies(args.next_input, args.next_dtype, args.next_layout, rows);
}

template <class Model>
int launch_step(const StepArgs& args, void* stream) {
  const Shape shape{args.samples, args.channels, args.pixels};
  if (!together(args, shape)) {
    return launch(step_kernel<Model, Path::kScattered>, shape, stream, args);
  }
  const bool plain = args.guidance_scale == nullptr && args.model_channels == args.channels &&
                     args.noise == nullptr && args.previous == nullptr;
  return launch(plain ? step_kernel<Model, Path::kPlain> : step_kernel<Model, Path::kTogether>,
                shape, stream, args);
}

}  // namespace

int cuda_step(const StepArgs& args, void* stream) {
  switch (args.model_dtype) {
    case DType::kBFloat16:
      return launch_step<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return launch_step<__half>(args, stream);
    default:
      return launch_step<float>(args, stream);
  }
}

}  // namespace ddpm_fast
