// GroupNorm, and SiLU after it, of channels_last tensors, written once over V (see ../numerics.h).
//
// A sample's channels, or a range of whole groups of them, are read three times while they lie in
// the cache: for the mean, for the variance about it, and to be normalised.
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
  // The same elements as fewer, longer rows, where they lie without gaps: four vectors then begin
  // with the same channel in each row. What belongs to a channel is repeated `times` in a row.
  template <class V>
  Rows merged(int64_t* times) const {
    Rows rows = *this;
    while (width == stride && rows.count % 2 == 0 && rows.width % (4 * V::kLanes) != 0 &&
           2 * rows.width <= kNormRow) {
      rows = {first, rows.count / 2, 2 * rows.width, 2 * rows.stride};
    }
    *times = rows.width / width;
    return rows;
  }
};

// One input's part of a run of channels: `first` is its place in the run.
template <class T>
struct Segment {
  Rows<const T> rows;
  int64_t first;
};

// Adds x, or with `center` (x - center)^2, of `vectors` vectors from column j on to `sums`.
template <class V, int vectors, class T>
void add_strip(const Rows<const T>& rows, int64_t j, const float* center, float* sums) {
  using F = typename V::F;
  for (int64_t begin = 0; begin < rows.count; begin += kNormBlock) {
    const int64_t end = begin + kNormBlock < rows.count ? begin + kNormBlock : rows.count;
    F sum[vectors];
    for (int k = 0; k < vectors; ++k) sum[k] = V::set(0.0f);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = rows.row(i) + j;
      DDPM_FAST_UNROLL
      for (int k = 0; k < vectors; ++k) {
        const F value = V::template load<1>(x + k * V::kLanes);
        if (center == nullptr) {
          sum[k] = V::add(sum[k], value);
        } else {
          const F apart = V::sub(value, V::load(center + j + k * V::kLanes));
          sum[k] = V::fma(apart, apart, sum[k]);
        }
      }
    }
    for (int k = 0; k < vectors; ++k) {
      float* to = sums + j + k * V::kLanes;
      V::store(to, V::add(V::load(to), sum[k]));
    }
  }
}

// Per column, over the rows; see add_strip.
template <class V, class T>
void add_columns(const Rows<const T>& rows, const float* center, float* sums) {
  int64_t j = 0;
  for (; j + 4 * V::kLanes <= rows.width; j += 4 * V::kLanes) {
    add_strip<V, 4>(rows, j, center, sums);
  }
  for (; j + V::kLanes <= rows.width; j += V::kLanes) add_strip<V, 1>(rows, j, center, sums);
  for (; j < rows.width; ++j) {
    for (int64_t i = 0; i < rows.count; ++i) {
      const float x = to_float(rows.row(i)[j]);
      const float apart = center == nullptr ? x : x - center[j];
      sums[j] += center == nullptr ? x : apart * apart;
    }
  }
}

// x / (1 + exp(-x)); the relative error is below 2^-19, near 0 2^-21, or if not kExact 2^-11.
template <class V, bool kExact>
DDPM_FAST_INLINE typename V::F silu(typename V::F x) {
  using F = typename V::F;
  // (2^f - 1) / f for |f| <= 1/2, with relative errors of 2^f below 2^-26 and 2^-12.
  constexpr float kExact2[] = {0x1.62e430p-1f, 0x1.ebfbe0p-3f,  0x1.c6af6cp-5f,
                               0x1.3b2a1cp-7f, 0x1.5f08a0p-10f, 0x1.44400ap-13f};
  constexpr float kShort2[] = {0x1.62e2d2p-1f, 0x1.efb0b2p-3f, 0x1.c96d94p-5f};
  const F minus_log2e = V::set(-0x1.715476p0f), rounder = V::set(0x1.8p23f);
  // exp(-x) is 2^(n + f). Beyond the bounds the result is x, or nearly 0.
  const F y = V::min(V::set(87.0f), V::max(V::set(-87.0f), x));
  const F shifted = V::fma(y, minus_log2e, rounder);  // n, in its last bits
  const F f = V::fma(y, minus_log2e, V::sub(rounder, shifted));
  const F quotient = kExact ? horner<V>(kExact2, f) : horner<V>(kShort2, f);
  const F power = V::fma(quotient, f, V::set(1.0f));
  const auto n = V::template shift_left<23>(V::bits(shifted));
  const F divisor = V::add(V::set(1.0f), V::from_bits(V::add(V::bits(power), n)));
  F inverse = V::reciprocal(divisor);
  if constexpr (kExact) {  // one step of Newton's
    inverse = V::mul(inverse, V::fma(V::sub(V::set(0.0f), divisor), inverse, V::set(2.0f)));
  }
  return V::mul(x, inverse);
}

template <class V, bool kSilu, class T>
DDPM_FAST_INLINE void normalize_vector(const T* x, const float* scale, const float* offset, T* y) {
  const typename V::F value = V::fma(V::template load<1>(x), V::load(scale), V::load(offset));
  V::template store<1>(y, kSilu ? silu<V, sizeof(T) == sizeof(float)>(value) : value);
}

// y = x * scale + offset, and then SiLU: rows of the same width.
template <class V, bool kSilu, class T>
void normalize(const Rows<const T>& x, const float* scale, const float* offset, const Rows<T>& y) {
  constexpr int kLanes = V::kLanes;
  const int64_t width = x.width, last = width - kLanes;
  for (int64_t i = 0; i < x.count; ++i) {
    const T* from = x.row(i);
    T* to = y.row(i);
    int64_t j = 0;
    for (; j <= last; j += kLanes) {
      normalize_vector<V, kSilu>(from + j, scale + j, offset + j, to + j);
    }
    if (j == width) continue;
    if (last >= 0) {  // once more, what the last whole vector has in common with the one before
      normalize_vector<V, kSilu>(from + last, scale + last, offset + last, to + last);
      continue;
    }
    T in[kLanes] = {}, out[kLanes];
    float scales[kLanes] = {}, offsets[kLanes] = {};
    for (int64_t k = 0; k < width; ++k) {
      in[k] = from[k];
      scales[k] = scale[k];
      offsets[k] = offset[k];
    }
    normalize_vector<V, kSilu>(in, scales, offsets, out);
    for (int64_t k = 0; k < width; ++k) to[k] = out[k];
  }
}

// `from` (width) repeated `times`, in `to`.
inline const float* repeated(const float* from, int64_t width, int64_t times, float* to) {
  if (times == 1) return from;
  for (int64_t i = 0; i < times; ++i) {
    for (int64_t j = 0; j < width; ++j) to[i * width + j] = from[j];
  }
  return to;
}

// Groups [first, last) of one sample.
template <class T>
struct NormRun {
  const GroupNormArgs& args;
  int64_t sample, first, last;
  float* memory;  // 4 * norm_row(channels) floats

  int64_t channels() const { return args.channels[0] + args.channels[1]; }
  int64_t group_size() const { return channels() / args.groups; }
  int64_t begin() const { return first * group_size(); }
  int64_t width() const { return (last - first) * group_size(); }
  // Four arrays: two of a channel each, two of a merged row each.
  float* scratch(int i) const { return memory + i * norm_row(channels()); }

  // The part of input i that lies in the run; of no width if there is none.
  Segment<T> segment(int i) const {
    const int64_t base = i == 0 ? 0 : args.channels[0], count = args.channels[i];
    const int64_t from = begin() > base ? begin() : base;
    const int64_t end = begin() + width(), to = end < base + count ? end : base + count;
    const T* x = static_cast<const T*>(args.x[i]) + sample * args.pixels * count;
    return {{x + (from - base), args.pixels, to > from ? to - from : 0, count}, from - begin()};
  }
};

// Per channel of the run, over the pixels: the sum of x, or with `center` of (x - center)^2.
template <class V, class T>
void channel_sums(const NormRun<T>& run, const float* center, float* sums) {
  for (int i = 0; i < 2; ++i) {
    const Segment<T> part = run.segment(i);
    const int64_t width = part.rows.width;
    if (width <= 0) continue;
    int64_t times;
    const Rows<const T> rows = part.rows.template merged<V>(&times);
    float* columns = run.scratch(2);
    for (int64_t j = 0; j < rows.width; ++j) columns[j] = 0.0f;
    if (center != nullptr) {
      add_columns<V>(rows, repeated(center + part.first, width, times, run.scratch(3)), columns);
    } else {
      add_columns<V, T>(rows, nullptr, columns);
    }
    for (int64_t j = 0; j < width; ++j) {
      float sum = 0.0f;
      for (int64_t k = 0; k < times; ++k) sum += columns[k * width + j];
      sums[part.first + j] = sum;
    }
  }
}

// Turns the run's channel means and variances into y = x * scale + offset.
template <class V, class T>
void norm_coefficients(const NormRun<T>& run, float* scale, float* offset) {
  const GroupNormArgs& args = run.args;
  const int64_t size = run.group_size();
  const float* shift =
      args.shift == nullptr ? nullptr : args.shift + run.sample * args.shift_stride + run.begin();
  const float* weight = args.weight + run.sample * args.affine_stride + run.begin();
  const float* bias = args.bias + run.sample * args.affine_stride + run.begin();
  const double pixels = static_cast<double>(args.pixels), count = pixels * size;
  float *sums = scale, *center = offset;
  channel_sums<V, T>(run, nullptr, sums);
  for (int64_t c = 0; c < run.width(); c += size) {
    double sum = 0.0;
    for (int64_t j = c; j < c + size; ++j) {
      sum += sums[j] + (shift == nullptr ? 0.0 : pixels * shift[j]);
    }
    const float mean = static_cast<float>(sum / count);
    for (int64_t j = c; j < c + size; ++j) {
      center[j] = shift == nullptr ? mean : mean - shift[j];
    }
  }
  channel_sums<V, T>(run, center, sums);
  for (int64_t c = 0; c < run.width(); c += size) {
    double sum = 0.0;
    for (int64_t j = c; j < c + size; ++j) sum += sums[j];
    const double inverse = 1.0 / __builtin_sqrt(sum / count + args.eps);
    for (int64_t j = c; j < c + size; ++j) {
      scale[j] = static_cast<float>(inverse * weight[j]);
      offset[j] = bias[j] - center[j] * scale[j];
    }
  }
}

template <class V, class T>
void norm_run(const NormRun<T>& run) {
  float *scale = run.scratch(0), *offset = run.scratch(1);
  norm_coefficients<V, T>(run, scale, offset);
  const int64_t channels = run.channels();
  T* out = static_cast<T*>(run.args.out) + run.sample * run.args.pixels * channels + run.begin();
  for (int i = 0; i < 2; ++i) {
    const Segment<T> part = run.segment(i);
    const int64_t width = part.rows.width;
    if (width <= 0) continue;
    Rows<const T> from = part.rows;
    Rows<T> to = {out + part.first, from.count, width, channels};
    int64_t times = 1;
    if (width == channels) {
      from = from.template merged<V>(&times);
      to = {to.first, from.count, from.width, from.stride};
    }
    const float* scales = repeated(scale + part.first, width, times, run.scratch(2));
    const float* offsets = repeated(offset + part.first, width, times, run.scratch(3));
    if (run.args.silu) {
      normalize<V, true>(from, scales, offsets, to);
    } else {
      normalize<V, false>(from, scales, offsets, to);
    }
  }
}

template <class V>
void group_norm(const GroupNormArgs& args, int64_t begin, int64_t end, float* memory) {
  for (int64_t i = begin; i < end;) {
    const int64_t sample = i / args.groups, first = i % args.groups;
    const int64_t left = end - i, last = args.groups - first < left ? args.groups : first + left;
    if (args.dtype == DType::kFloat32) {
      norm_run<V>(NormRun<float>{args, sample, first, last, memory});
    } else {
      norm_run<V>(NormRun<BFloat16>{args, sample, first, last, memory});
    }
    i += last - first;
  }
}

}  // namespace
}  // namespace ddpm_fast
