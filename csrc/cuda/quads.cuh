// How threads walk a batch: each takes quads, the four elements of a sample that share a counter
// of the noise, and moves one at once where it lies together and aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"

namespace ddpm_fast {
namespace {

constexpr int kMaxGrid = 65535;  // blocks in the grid's second and third dimension
constexpr int kWide = 4;         // elements of a quad: 16 bytes of float32
constexpr int kThreads = 256;    // of a block, at most
constexpr int kBlocks = 4;       // of a multiprocessor, at least: so 64 registers a thread, at most

struct Shape {
  int64_t samples, channels, pixels;

  __host__ __device__ int64_t elements() const { return channels * pixels; }
  __host__ __device__ int64_t quads() const { return (elements() + kWide - 1) / kWide; }
};

struct Quad {
  int64_t index;  // of a sample's elements, 4 * index and on
  // What follows is for quads that do not move at once.
  int count;               // 4, or fewer at a sample's end
  int64_t channel, pixel;  // of the first element
  int crossed[kWide];      // how many ends of a channel lie between the first element and each
};

template <class T>
struct alignas(kWide * sizeof(T)) Pack {
  T values[kWide];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float& out, float x) { out = x; }
__device__ __forceinline__ void round_to(__nv_bfloat16& out, float x) {
  out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void round_to(__half& out, float x) { out = __float2half_rn(x); }

// Whether each quad of a tensor with `samples` samples lies together, at a multiple of its size.
inline bool lies_together(const void* data, int64_t element_size, const Layout& layout,
                          const Shape& shape, int64_t samples) {
  return layout.pixel == 1 && (layout.channel == shape.pixels || shape.channels == 1) &&
         reinterpret_cast<uintptr_t>(data) % (kWide * element_size) == 0 &&
         (layout.sample % kWide == 0 || samples == 1);
}

// A tensor's sample. kTogether: each quad is whole and moves at once.
template <class T, bool kTogether>
struct View {
  T* data;
  const Layout& layout;
  int64_t pixels;

  __device__ View(T* tensor, const Layout& layout, int64_t pixels, int64_t sample)
      : data(tensor + sample * layout.sample), layout(layout), pixels(pixels) {}

  // Calls body(k, address) for each element k of the quad.
  template <class Body>
  __device__ __forceinline__ void each(const Quad& quad, Body body) const {
    T* first = data + quad.channel * layout.channel + quad.pixel * layout.pixel;
    const int64_t crossing = layout.channel - pixels * layout.pixel;
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      if (k < quad.count) body(k, first + k * layout.pixel + quad.crossed[k] * crossing);
    }
  }

  __device__ __forceinline__ void load(const Quad& quad, float (&out)[kWide]) const {
    if constexpr (kTogether) {
      const Pack<T> loaded = reinterpret_cast<const Pack<T>*>(data)[quad.index];
#pragma unroll
      for (int k = 0; k < kWide; ++k) out[k] = to_float(loaded.values[k]);
    } else {
      each(quad, [&](int k, const T* address) { out[k] = to_float(*address); });
    }
  }

  __device__ __forceinline__ void store(const Quad& quad, const float (&in)[kWide]) const {
    if constexpr (kTogether) {
      Pack<T> stored;
#pragma unroll
      for (int k = 0; k < kWide; ++k) round_to(stored.values[k], in[k]);
      reinterpret_cast<Pack<T>*>(data)[quad.index] = stored;
    } else {
      each(quad, [&](int k, T* address) { round_to(*address, in[k]); });
    }
  }
};

__device__ __forceinline__ Quad locate(const Shape& shape, int64_t index) {
  const int64_t first = kWide * index, left = shape.elements() - first;
  // A division of 64 bits costs as much as the noise; nearly every sample does without.
  const bool small = (first | shape.pixels) >> 32 == 0;
  const int64_t channel = small ? static_cast<uint32_t>(first) / static_cast<uint32_t>(shape.pixels)
                                : first / shape.pixels;
  Quad quad{index,
            left < kWide ? static_cast<int>(left) : kWide,
            channel,
            first - channel * shape.pixels,
            {}};
  int64_t pixel = quad.pixel;
#pragma unroll
  for (int k = 1; k < kWide; ++k) {
    const bool end = ++pixel == shape.pixels;
    if (end) pixel = 0;
    quad.crossed[k] = quad.crossed[k - 1] + end;
  }
  return quad;
}

// Calls body(quad) for this thread's share of a sample.
template <bool kTogether, class Body>
__device__ __forceinline__ void each_quad(const Shape& shape, Body body) {
  const int64_t quads = shape.quads(), stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < quads;
       i += stride) {
    body(kTogether ? Quad{i, kWide} : locate(shape, i));
  }
}

// This block's sample; it may lie beyond the last.
__device__ __forceinline__ int64_t block_sample() {
  return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
}

// Launches kernel(args...) over a batch. A small one gives each thread one quad, for latency; a
// large one several, so that what is read once a sample costs little.
template <class... Args>
int launch(void (*kernel)(Args...), const Shape& shape, void* stream, const Args&... args) {
  const int64_t quads = shape.quads(), share = shape.samples * quads >> 18;
  if (shape.samples * quads == 0) return cudaSuccess;
  const int64_t each = share < 1 ? 1 : share > 8 ? 8 : share;
  const int64_t threads = quads < kThreads ? (quads + 31) / 32 * 32 : kThreads;
  const int64_t blocks = (quads + threads * each - 1) / (threads * each);
  const int64_t planes = (shape.samples + kMaxGrid - 1) / kMaxGrid;
  const int64_t rows = (shape.samples + planes - 1) / planes;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(rows),
                  static_cast<unsigned>(planes));
  kernel<<<grid, static_cast<unsigned>(threads), 0, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}

}  // namespace
}  // namespace ddpm_fast
