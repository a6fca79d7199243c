// The noise by itself, and the forward process.
#include <math_constants.h>

#include "lane.cuh"
#include "quads.cuh"

namespace ddpm_fast {
namespace {

template <bool kTogether>
__global__ void __launch_bounds__(kThreads, kBlocks)
    randn_kernel(const __grid_constant__ RandnArgs args, const __grid_constant__ Layout layout) {
  const Shape shape{args.samples, 1, args.elements};
  const int64_t sample = block_sample();
  if (sample >= shape.samples) return;
  const View<float, kTogether> out{args.out, layout, args.elements, sample};
  const NoiseKey key =
      noise_key(args.seed[sample], args.sample_index[sample], args.step, args.stream);
  each_quad<kTogether>(shape, [&](const Quad& quad) {
    float z[kWide];
    normals<Lane>(key, static_cast<uint32_t>(quad.index), z);
    out.store(quad, z);
  });
}

template <bool kTogether>
__global__ void __launch_bounds__(kThreads, kBlocks)
    q_sample_kernel(const __grid_constant__ QSampleArgs args) {
  const Shape shape{args.samples, args.channels, args.pixels};
  const int64_t sample = block_sample();
  if (sample >= shape.samples) return;
  const auto view = [&]<class T>(T* tensor) {
    return View<T, kTogether>{tensor, args.layout, args.pixels, sample};
  };
  const int64_t timestep = args.timesteps[sample];
  // There is no status word: a bad timestep makes its sample NaN.
  const bool known = timestep >= 0 && timestep < args.table_rows;
  const float c0 = known ? args.coefficients[2 * timestep] : CUDART_NAN_F;
  const float c1 = known ? args.coefficients[2 * timestep + 1] : CUDART_NAN_F;
  const NoiseKey key = noise_key(args.seed[sample], args.sample_index[sample], 0, args.stream);
  each_quad<kTogether>(shape, [&](const Quad& quad) {
    float x[kWide], z[kWide];
    view(args.x_start).load(quad, x);
    if (args.noise != nullptr) {
      view(args.noise).load(quad, z);
    } else {
      normals<Lane>(key, static_cast<uint32_t>(quad.index), z);
      view(args.noise_out).store(quad, z);
    }
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[k] = Lane::add(Lane::mul(c0, x[k]), Lane::mul(c1, z[k]));
    view(args.x_t).store(quad, x);
  });
}

}  // namespace

int cuda_randn(const RandnArgs& args, void* stream) {
  const Shape shape{args.samples, 1, args.elements};
  const Layout layout{args.elements, args.elements, 1};
  const bool together = shape.elements() % kWide == 0 &&
                        lies_together(args.out, sizeof(float), layout, shape, args.samples);
  return launch(together ? randn_kernel<true> : randn_kernel<false>, shape, stream, args, layout);
}

int cuda_q_sample(const QSampleArgs& args, void* stream) {
  const Shape shape{args.samples, args.channels, args.pixels};
  bool together = shape.elements() % kWide == 0;
  for (const float* data : {args.x_start, static_cast<const float*>(args.x_t),
                            args.noise != nullptr ? args.noise : args.noise_out}) {
    together = together && lies_together(data, sizeof(float), args.layout, shape, args.samples);
  }
  return launch(together ? q_sample_kernel<true> : q_sample_kernel<false>, shape, stream, args);
}

const char* cuda_error_string(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace ddpm_fast
