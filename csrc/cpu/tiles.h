// From chunks to tiles of float32 in logical order, for every instruction set.
//
// The arithmetic runs over float32 in the logical order of the elements. What lies in another
// order or type is brought into small buffers first, tile by tile, and results are put back.
#pragma once

#include "../kernels.h"
#include "conversions.h"

namespace ddpm_fast {
namespace {

constexpr int kTile = 1024;  // elements; the buffers of a step then fit the first-level cache

// A run of elements [first, first + count) of one sample of `pixels` a channel.
struct Run {
  int64_t sample, first, count, pixels;

  bool linear(const Layout& layout) const { return layout.pixel == 1 && layout.channel == pixels; }
  int64_t offset(const Layout& layout) const { return sample * layout.sample; }

  // Calls body(offset of the first, stride, position in the run, count) for each channel, or once
  // where the whole run lies in order.
  template <class Body>
  void each_channel(const Layout& layout, Body body) const {
    if (linear(layout)) return body(offset(layout) + first, 1, 0, count);
    int64_t channel = first / pixels, pixel = first % pixels;
    for (int64_t done = 0; done < count; ++channel, pixel = 0) {
      int64_t n = pixels - pixel < count - done ? pixels - pixel : count - done;
      body(offset(layout) + channel * layout.channel + pixel * layout.pixel, layout.pixel, done, n);
      done += n;
    }
  }
};

template <class V, int stride, class T>
int64_t load_vectors(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    V::store(to + i, V::template load<stride>(from + i * stride));
  }
  return i;
}

template <class V, int stride, class T>
int64_t store_vectors(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    V::template store<stride>(to + i * stride, V::load(from + i));
  }
  return i;
}

// Calls body.operator()<stride>() where V has vectors of that stride, and returns what it returns:
// how many elements are done.
template <class V, class Body>
int64_t at_stride(int64_t stride, Body body) {
  if (stride == 1) return body.template operator()<1>();
  if constexpr (V::kMaxStride >= 4) {
    if (stride == 2) return body.template operator()<2>();
    if (stride == 3) return body.template operator()<3>();
    if (stride == 4) return body.template operator()<4>();
  }
  return 0;
}

template <class V, class T>
void gather(const Run& run, const T* from, const Layout& layout, float* to) {
  run.each_channel(layout, [&](int64_t offset, int64_t stride, int64_t done, int64_t n) {
    const T* source = from + offset;
    int64_t i =
        at_stride<V>(stride, [&]<int s>() { return load_vectors<V, s>(source, n, to + done); });
    for (; i < n; ++i) to[done + i] = to_float(source[i * stride]);
  });
}

template <class V, class T>
void scatter(const Run& run, const float* from, const Layout& layout, T* to) {
  run.each_channel(layout, [&](int64_t offset, int64_t stride, int64_t done, int64_t n) {
    T* target = to + offset;
    int64_t i =
        at_stride<V>(stride, [&]<int s>() { return store_vectors<V, s>(from + done, n, target); });
    for (; i < n; ++i) from_float(from[done + i], target + i * stride);
  });
}

// Calls body with the pointer in its own type.
template <class Body>
void as_typed(const void* p, DType dtype, Body body) {
  if (dtype == DType::kFloat32) body(static_cast<const float*>(p));
  if (dtype == DType::kBFloat16) body(static_cast<const BFloat16*>(p));
  if (dtype == DType::kFloat16) body(static_cast<const Half*>(p));
}
template <class Body>
void as_typed(void* p, DType dtype, Body body) {
  if (dtype == DType::kFloat32) body(static_cast<float*>(p));
  if (dtype == DType::kBFloat16) body(static_cast<BFloat16*>(p));
  if (dtype == DType::kFloat16) body(static_cast<Half*>(p));
}

// The run's elements as float32 in logical order: where they lie, or a copy in `buffer`.
template <class V>
const float* fetch(const Run& run, const float* from, const Layout& layout, float* buffer) {
  if (from == nullptr) return nullptr;
  if (run.linear(layout)) return from + run.offset(layout) + run.first;
  gather<V>(run, from, layout, buffer);
  return buffer;
}

// Of any type: only float32 can be read where it lies.
template <class V, class T>
const float* fetch(const Run& run, const T* from, const Layout& layout, float* buffer) {
  gather<V>(run, from, layout, buffer);
  return buffer;
}

// Where a run's results go: in place, or in `buffer`, to be scattered when the run is done.
inline float* place(const Run& run, float* to, const Layout& layout, float* buffer) {
  if (to == nullptr) return nullptr;
  return run.linear(layout) ? to + run.offset(layout) + run.first : buffer;
}

template <class V>
void put_back(const Run& run, const float* from, const Layout& layout, float* to) {
  if (to != nullptr && !run.linear(layout)) scatter<V>(run, from, layout, to);
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
