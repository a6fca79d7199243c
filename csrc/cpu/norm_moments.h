// Rows of channels_last tensors, and the sums of their columns, written once over V (see
// ../numerics.h). Every column is summed in the same way, whatever its neighbours.
#pragma once

#include "../numerics.h"
#include "conversions.h"

namespace ddpm_fast {
namespace {

// `count` rows of `width` neighbouring elements, `stride` apart.
template <class T>
struct Rows {
  T* first;
  int64_t count, width, stride;

  T* row(int64_t i) const { return first + i * stride; }
  // `times` rows as one, where they lie without gaps.
  Rows merged(int64_t times) const { return {first, count / times, width * times, stride * times}; }
};

// How many pixels make a row: where there are few channels, several, for rows of whole strips.
inline int64_t pixels_of_a_row(int64_t pixels, int64_t channels) {
  int64_t times = 1;
  while (pixels / times % 2 == 0 && times * channels % kNormStrip != 0 &&
         2 * times * channels <= kNormRow) {
    times *= 2;
  }
  return times;
}

// Of some columns: about which values to sum, and the sums of x - center and of its square.
struct Moments {
  float *center, *sum, *square;

  Moments from(int64_t column) const { return {center + column, sum + column, square + column}; }
};

// The mean of the first rows.
template <class V, class T>
void find_centers(const Rows<const T>& rows, float* center) {
  const int64_t count = rows.count < kNormCenter ? rows.count : kNormCenter;
  const float share = 1.0f / static_cast<float>(count);
  int64_t j = 0;
  for (; j + V::kLanes <= rows.width; j += V::kLanes) {
    typename V::F sum = V::set(0.0f);
    for (int64_t i = 0; i < count; ++i) sum = V::add(sum, V::template load<1>(rows.row(i) + j));
    V::store(center + j, V::mul(sum, V::set(share)));
  }
  for (; j < rows.width; ++j) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += to_float(rows.row(i)[j]);
    center[j] = sum * share;
  }
}

// Adds `vectors` vectors of each row; row(i) is where they lie.
template <class V, int vectors, class Row>
DDPM_FAST_INLINE void add_strip(int64_t count, const Row& row, const Moments& moments) {
  using F = typename V::F;
  F center[vectors];
  for (int k = 0; k < vectors; ++k) center[k] = V::load(moments.center + k * V::kLanes);
  for (int64_t begin = 0; begin < count; begin += kNormBlock) {
    const int64_t end = begin + kNormBlock < count ? begin + kNormBlock : count;
    F sum[vectors], square[vectors];
    for (int k = 0; k < vectors; ++k) sum[k] = square[k] = V::set(0.0f);
    for (int64_t i = begin; i < end; ++i) {
      const auto* x = row(i);
      DDPM_FAST_UNROLL
      for (int k = 0; k < vectors; ++k) {
        const F apart = V::sub(V::template load<1>(x + k * V::kLanes), center[k]);
        sum[k] = V::add(sum[k], apart);
        square[k] = V::fma(apart, apart, square[k]);
      }
    }
    for (int k = 0; k < vectors; ++k) {
      float *to = moments.sum + k * V::kLanes, *to_square = moments.square + k * V::kLanes;
      V::store(to, V::add(V::load(to), sum[k]));
      V::store(to_square, V::add(V::load(to_square), square[k]));
    }
  }
}

// The columns from j on, fewer than a vector has lanes.
template <class V, class T>
void add_last_columns(const Rows<const T>& rows, int64_t j, const Moments& moments) {
  constexpr int kLanes = V::kLanes;
  float center[kLanes] = {}, sum[kLanes] = {}, square[kLanes] = {};
  const int64_t first = rows.width < kLanes ? 0 : rows.width - kLanes;
  for (int64_t k = first; k < rows.width; ++k) center[k - first] = moments.center[k];
  if (rows.width < kLanes) {
    T x[kLanes] = {};
    const auto padded = [&](int64_t i) {
      for (int64_t k = 0; k < rows.width; ++k) x[k] = rows.row(i)[k];
      return x;
    };
    add_strip<V, 1>(rows.count, padded, {center, sum, square});
  } else {
    const auto row = [&](int64_t i) { return rows.row(i) + first; };
    add_strip<V, 1>(rows.count, row, {center, sum, square});
  }
  for (int64_t k = j; k < rows.width; ++k) {
    moments.sum[k] += sum[k - first];
    moments.square[k] += square[k - first];
  }
}

// Over all rows.
template <class V, class T>
void add_columns(const Rows<const T>& rows, const Moments& moments) {
  constexpr int kLanes = V::kLanes;
  int64_t j = 0;
  const auto row = [&](int64_t i) { return rows.row(i) + j; };
  for (; j + 4 * kLanes <= rows.width; j += 4 * kLanes) {
    add_strip<V, 4>(rows.count, row, moments.from(j));
  }
  for (; j + kLanes <= rows.width; j += kLanes) add_strip<V, 1>(rows.count, row, moments.from(j));
  if (j < rows.width) add_last_columns<V>(rows, j, moments);
}

}  // namespace
}  // namespace ddpm_fast
