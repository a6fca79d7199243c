// From chunks to tiles of float32 in logical order, for every instruction set.
//
// The arithmetic runs over float32 in the logical order of the elements. What lies in another
// order or type is brought into small buffers first, tile by tile, and results are put back.
#pragma once

#include "../kernels.h"

namespace ddpm_fast {
namespace {

constexpr int kTile = 1024;  // elements; the buffers of a step then fit the first-level cache

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class V>
inline float to_float(float x) {
  return x;
}
template <class V>
inline float to_float(BFloat16 x) {
  uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}
template <class V>
inline float to_float(Half x) {
  return V::from_half(x.bits);
}

// A run of elements [first, first + count) of one sample of `pixels` a channel.
struct Run {
  int64_t sample, first, count, pixels;

  bool linear(const Layout& layout) const { return layout.pixel == 1 && layout.channel == pixels; }
  int64_t offset(const Layout& layout) const { return sample * layout.sample; }

  // Calls body(offset of the first, stride, position in the run, count) for each channel.
  template <class Body>
  void each_channel(const Layout& layout, Body body) const {
    int64_t channel = first / pixels, pixel = first % pixels;
    for (int64_t done = 0; done < count; ++channel, pixel = 0) {
      int64_t n = pixels - pixel < count - done ? pixels - pixel : count - done;
      body(offset(layout) + channel * layout.channel + pixel * layout.pixel, layout.pixel, done, n);
      done += n;
    }
  }
};

template <class V, class T>
void gather(const Run& run, const T* from, const Layout& layout, float* to) {
  run.each_channel(layout, [&](int64_t offset, int64_t stride, int64_t done, int64_t n) {
    const T* source = from + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[done + i] = to_float<V>(source[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[done + i] = to_float<V>(source[i * stride]);
    }
  });
}

inline void scatter(const Run& run, const float* from, const Layout& layout, float* to) {
  run.each_channel(layout, [&](int64_t offset, int64_t stride, int64_t done, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[offset + i * stride] = from[done + i];
  });
}

// The run's elements as float32 in logical order: where they lie, or a copy in `buffer`.
template <class V>
const float* fetch(const Run& run, const float* from, const Layout& layout, float* buffer) {
  if (from == nullptr) return nullptr;
  if (run.linear(layout)) return from + run.offset(layout) + run.first;
  gather<V>(run, from, layout, buffer);
  return buffer;
}

template <class V>
const float* fetch(const Run& run, const void* from, DType dtype, const Layout& layout,
                   int64_t skip, float* buffer) {
  switch (dtype) {
    case DType::kFloat32:
      return fetch<V>(run, static_cast<const float*>(from) + skip, layout, buffer);
    case DType::kBFloat16:
      gather<V>(run, static_cast<const BFloat16*>(from) + skip, layout, buffer);
      return buffer;
    case DType::kFloat16:
      gather<V>(run, static_cast<const Half*>(from) + skip, layout, buffer);
      return buffer;
  }
  return nullptr;
}

// Where a run's results go: in place, or in `buffer`, to be scattered when the run is done.
inline float* place(const Run& run, float* to, const Layout& layout, float* buffer) {
  if (to == nullptr) return nullptr;
  return run.linear(layout) ? to + run.offset(layout) + run.first : buffer;
}

inline void put_back(const Run& run, const float* from, const Layout& layout, float* to) {
  if (to != nullptr && !run.linear(layout)) scatter(run, from, layout, to);
}

inline void copy(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// Calls body(run) for each tile of the chunks [begin, end).
template <class Body>
void each_tile(int64_t begin, int64_t end, int64_t elements, int64_t pixels, Body body) {
  const int64_t chunks = chunks_of(elements);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t sample = chunk / chunks, first = chunk % chunks * kChunk;
    const int64_t last = first + kChunk < elements ? first + kChunk : elements;
    for (int64_t i = first; i < last; i += kTile) {
      body(Run{sample, i, last - i < kTile ? last - i : kTile, pixels});
    }
  }
}

}  // namespace
}  // namespace ddpm_fast
