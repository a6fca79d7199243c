// The CUDA kernels and their launchers: the same arithmetic as on the CPU, four elements a thread.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include "../step.h"

namespace ddpm_fast {
namespace {

constexpr int kThreads = 256;

struct Lane {
  using F = float;
  using U = uint32_t;
  using W = uint64_t;
  static constexpr int kParts = 1;

  static __device__ F set(float x) { return x; }
  static __device__ U set_u(uint32_t x) { return x; }
  static __device__ W set_w(uint32_t x) { return x; }
  static __device__ F add(F a, F b) { return __fadd_rn(a, b); }
  static __device__ F sub(F a, F b) { return __fsub_rn(a, b); }
  static __device__ F mul(F a, F b) { return __fmul_rn(a, b); }
  static __device__ F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  static __device__ F sqrt(F x) { return __fsqrt_rn(x); }
  static __device__ F max(F a, F b) { return a > b ? a : b; }  // b where either is NaN
  static __device__ F min(F a, F b) { return a < b ? a : b; }

  static __device__ U bits(F x) { return __float_as_uint(x); }
  static __device__ F from_bits(U u) { return __uint_as_float(u); }
  static __device__ F from_unsigned(U u) { return __uint2float_rn(u); }
  static __device__ F from_signed(U u) { return __int2float_rn(static_cast<int>(u)); }
  static __device__ U to_signed(F x) { return static_cast<U>(__float2int_rz(x)); }
  static __device__ U add(U a, U b) { return a + b; }
  static __device__ U sub(U a, U b) { return a - b; }
  static __device__ U bit_and(U a, U b) { return a & b; }
  static __device__ U bit_xor(U a, U b) { return a ^ b; }
  template <int n>
  static __device__ U shift_left(U a) {
    return a << n;
  }
  template <int n>
  static __device__ U shift_right_signed(U a) {
    return static_cast<U>(static_cast<int>(a) >> n);
  }
  template <int bit>
  static __device__ F select_bit(U a, F if_set, F if_clear) {
    return a >> bit & 1 ? if_set : if_clear;
  }

  static __device__ W multiply(W a, uint32_t b) { return (a & 0xFFFFFFFFu) * b; }
  static __device__ W high(W a) { return a >> 32; }
  static __device__ W xor3(W a, W b, uint32_t c) { return a ^ b ^ c; }
  static __device__ W counters(uint32_t first, int) { return first; }
  static __device__ U join(W (*words)[4], int i) { return static_cast<U>(words[0][i]); }
  static __device__ void interleave(F*) {}
};

// Element `element` of a sample (logical order) in a layout.
__device__ int64_t address(const Layout& layout, int64_t sample, int64_t element, int64_t pixels) {
  return sample * layout.sample + element / pixels * layout.channel +
         element % pixels * layout.pixel;
}

__device__ float load(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

// The first report stays.
__device__ void report(int32_t* status, Status code, int64_t row, int64_t sample) {
  if (status == nullptr || atomicCAS(status, 0, static_cast<int32_t>(code)) != 0) return;
  status[1] = static_cast<int32_t>(row);
  status[2] = static_cast<int32_t>(sample);
}

// Calls body(sample, element) for the first of each four elements; the grid strides over them.
template <class Body>
__device__ void each_four(int64_t samples, int64_t elements, Body body) {
  const int64_t quads = (elements + 3) / 4, total = samples * quads;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += stride) {
    body(i / quads, i % quads * 4);
  }
}

__global__ void randn_kernel(RandnArgs args) {
  each_four(args.samples, args.elements, [&](int64_t sample, int64_t first) {
    float z[4];
    NoiseKey key = noise_key(args.seed[sample], args.sample_index[sample], args.step, args.stream);
    normals<Lane>(key, static_cast<uint32_t>(first / 4), z);
    for (int k = 0; k < 4 && first + k < args.elements; ++k) {
      args.out[sample * args.elements + first + k] = z[k];
    }
  });
}

__global__ void q_sample_kernel(QSampleArgs args) {
  const int64_t elements = args.channels * args.pixels;
  each_four(args.samples, elements, [&](int64_t sample, int64_t first) {
    const int64_t timestep = args.timesteps[sample];
    // There is no status word: a bad timestep makes its sample NaN.
    const bool known = timestep >= 0 && timestep < args.table_rows;
    const float c0 = known ? args.coefficients[2 * timestep] : CUDART_NAN_F;
    const float c1 = known ? args.coefficients[2 * timestep + 1] : CUDART_NAN_F;
    float z[4];
    if (args.noise == nullptr) {
      NoiseKey key = noise_key(args.seed[sample], args.sample_index[sample], 0, args.stream);
      normals<Lane>(key, static_cast<uint32_t>(first / 4), z);
    }
    for (int k = 0; k < 4 && first + k < elements; ++k) {
      const int64_t i = address(args.layout, sample, first + k, args.pixels);
      const float noise = args.noise != nullptr ? args.noise[i] : z[k];
      args.x_t[i] = Lane::add(Lane::mul(c0, args.x_start[i]), Lane::mul(c1, noise));
      if (args.noise == nullptr) args.noise_out[i] = noise;
    }
  });
}

// Whether the step can be taken by the table's row `at`.
__device__ bool usable(const StepArgs& args, int64_t at) {
  if (at < 0 || at >= args.table_rows) return false;
  const StepRow row = step_row(args, at);
  return (!row.learned || args.model_channels == 2 * args.channels) &&
         (row.c2 == 0.0f || args.previous != nullptr);
}

__device__ float step_element(const StepArgs& args, const StepRow& row, int64_t sample,
                              int64_t element, float z) {
  const int64_t i = address(args.model_layout, sample, element, args.pixels);
  const float x = args.x_t[address(args.x_layout, sample, element, args.pixels)];
  float model = load(args.model_output, args.model_dtype, i);
  if (args.guidance_scale != nullptr) {
    const int64_t other = i + args.samples * args.model_layout.sample;
    model =
        guide<Lane>(model, load(args.model_output, args.model_dtype, other), *args.guidance_scale);
  }
  const float pred_xstart = predict_xstart<Lane>(row, x, model);
  float previous = 0.0f;
  if (args.previous != nullptr) {
    float* place = args.previous + address(args.previous_layout, sample, element, args.pixels);
    previous = *place;
    *place = pred_xstart;
  }
  float sum = combine<Lane>(row, pred_xstart, x, previous, model);
  if (row.noisy()) {
    float sigma = row.sigma;
    if (row.learned) {
      const int64_t extra = i + args.channels * args.model_layout.channel;
      sigma = learned_sigma<Lane>(row, load(args.model_output, args.model_dtype, extra));
    }
    if (args.noise != nullptr) {
      z = args.noise[address(args.noise_layout, sample, element, args.pixels)];
    }
    sum = Lane::add(sum, Lane::mul(sigma, z));
  }
  return sum;
}

__global__ void step_kernel(StepArgs args) {
  const int64_t elements = args.channels * args.pixels;
  each_four(args.samples, elements, [&](int64_t sample, int64_t first) {
    const int64_t at = args.row[sample];
    if (!usable(args, at)) {
      report(args.status, Status::kBadRow, at, sample);
      for (int k = 0; k < 4 && first + k < elements; ++k) {
        args.out[address(args.out_layout, sample, first + k, args.pixels)] =
            args.x_t[address(args.x_layout, sample, first + k, args.pixels)];
      }
      return;
    }
    const StepRow row = step_row(args, at);
    float z[4] = {};
    if (row.noisy() && args.noise == nullptr) {
      NoiseKey key = noise_key(args.seed[sample], args.sample_index[sample], row.noise_step, 0);
      normals<Lane>(key, static_cast<uint32_t>(first / 4), z);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (first + k >= elements) break;
      const float out = step_element(args, row, sample, first + k, z[k]);
      args.out[address(args.out_layout, sample, first + k, args.pixels)] = out;
      if (!isfinite(out)) report(args.status, Status::kNotFinite, at, sample);
    }
  });
}

unsigned blocks_for(int64_t samples, int64_t elements) {
  const int64_t blocks = (samples * ((elements + 3) / 4) + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < (int64_t{1} << 20) ? blocks : int64_t{1} << 20);
}

}  // namespace

int cuda_randn(const RandnArgs& args, void* stream) {
  const unsigned blocks = blocks_for(args.samples, args.elements);
  if (blocks == 0) return cudaSuccess;
  randn_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

int cuda_q_sample(const QSampleArgs& args, void* stream) {
  const unsigned blocks = blocks_for(args.samples, args.channels * args.pixels);
  if (blocks == 0) return cudaSuccess;
  q_sample_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

int cuda_step(const StepArgs& args, void* stream) {
  const unsigned blocks = blocks_for(args.samples, args.channels * args.pixels);
  if (blocks == 0) return cudaSuccess;
  step_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

const char* cuda_error_string(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace ddpm_fast
