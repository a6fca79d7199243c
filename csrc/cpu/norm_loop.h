// GroupNorm, and SiLU after it, of channels_last tensors, written once over V (see ../numerics.h).
//
// A sample's channels, or a range of whole groups of them, are read twice while they lie in the
// cache: for mean and variance, and to be normalised. The first time each channel is summed about a
// center of its own, the mean of its first pixels. The squared distance between the mean of m of n
// values and that of all is at most n / m variances: what cancels is bounded whatever the values.
#pragma once

#include "norm_moments.h"
#include "silu.h"

namespace ddpm_fast {
namespace {

// One input's part of a run of channels: `first` is its place in the run.
template <class T>
struct Segment {
  Rows<const T> rows;
  int64_t first;
};

// y = x * scale + offset of `vectors` vectors, and then SiLU. Several advance together, because
// each operation waits for the one before.
template <class V, bool kSilu, int vectors, class T, class Out>
DDPM_FAST_INLINE void normalize_vectors(const T* x, const float* scale, const float* offset,
                                        Out* y) {
  constexpr int kLanes = V::kLanes;
  typename V::F values[vectors];
  DDPM_FAST_UNROLL
  for (int k = 0; k < vectors; ++k) {
    values[k] = V::fma(V::template load<1>(x + k * kLanes), V::load(scale + k * kLanes),
                       V::load(offset + k * kLanes));
  }
  DDPM_FAST_UNROLL
  for (int k = 0; kSilu && k < vectors; ++k) {
    values[k] = silu<V, sizeof(Out) == sizeof(float)>(values[k]);
  }
  if constexpr (vectors % 2 == 0 && requires { V::store_pair(y, values[0], values[1]); }) {
    DDPM_FAST_UNROLL
    for (int k = 0; k < vectors; k += 2) V::store_pair(y + k * kLanes, values[k], values[k + 1]);
  } else {
    DDPM_FAST_UNROLL
    for (int k = 0; k < vectors; ++k) V::template store<1>(y + k * kLanes, values[k]);
  }
}

// Rows of the same width.
template <class V, bool kSilu, class T, class Out>
void normalize(const Rows<const T>& x, const float* scale, const float* offset,
               const Rows<Out>& y) {
  constexpr int kLanes = V::kLanes;
  const int64_t width = x.width, last = width - kLanes;
  for (int64_t i = 0; i < x.count; ++i) {
    const T* from = x.row(i);
    Out* to = y.row(i);
    int64_t j = 0;
    for (; j + 4 * kLanes <= width; j += 4 * kLanes) {
      normalize_vectors<V, kSilu, 4>(from + j, scale + j, offset + j, to + j);
    }
    for (; j <= last; j += kLanes) {
      normalize_vectors<V, kSilu, 1>(from + j, scale + j, offset + j, to + j);
    }
    if (j == width) continue;
    if (last >= 0) {  // once more, what the last whole vector has in common with the one before
      normalize_vectors<V, kSilu, 1>(from + last, scale + last, offset + last, to + last);
      continue;
    }
    T in[kLanes] = {};
    Out out[kLanes];
    float scales[kLanes] = {}, offsets[kLanes] = {};
    for (int64_t k = 0; k < width; ++k) {
      in[k] = from[k];
      scales[k] = scale[k];
      offsets[k] = offset[k];
    }
    normalize_vectors<V, kSilu, 1>(in, scales, offsets, out);
    for (int64_t k = 0; k < width; ++k) to[k] = out[k];
  }
}

// `from` (width) repeated `times`, in `to`.
inline float* repeated(float* from, int64_t width, int64_t times, float* to) {
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
  float* memory;  // norm_memory(channels) floats

  int64_t channels() const { return args.channels[0] + args.channels[1]; }
  int64_t group_size() const { return channels() / args.groups; }
  int64_t begin() const { return first * group_size(); }
  int64_t width() const { return (last - first) * group_size(); }
  // The first three arrays are for channels, the others for merged rows.
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

// The moments of each channel of the run, over the pixels.
template <class V, class T>
void channel_moments(const NormRun<T>& run, const Moments& moments) {
  for (int i = 0; i < 2; ++i) {
    const Segment<T> part = run.segment(i);
    const int64_t width = part.rows.width;
    if (width <= 0) continue;
    const Rows<const T>& rows = part.rows;
    const int64_t times = pixels_of_a_row(rows.count, rows.stride);
    const Moments to = moments.from(part.first);
    find_centers<V>(rows, to.center);
    Moments columns{run.scratch(3), run.scratch(4), run.scratch(5)};
    for (int64_t j = 0; j < width * times; ++j) columns.sum[j] = columns.square[j] = 0.0f;
    columns.center = repeated(to.center, width, times, columns.center);
    if (width == rows.stride) {
      add_columns<V>(rows.merged(times), columns);
    } else {  // of each row's pixels in turn
      for (int64_t k = 0; k < times; ++k) {
        const Rows<const T> every{rows.row(k), rows.count / times, width, rows.stride * times};
        add_columns<V>(every, columns.from(k * width));
      }
    }
    for (int64_t j = 0; j < width; ++j) to.sum[j] = to.square[j] = 0.0f;
    for (int64_t k = 0; k < times; ++k) {
      for (int64_t j = 0; j < width; ++j) {
        to.sum[j] += columns.sum[k * width + j];
        to.square[j] += columns.square[k * width + j];
      }
    }
  }
}

// Turns the run's moments into y = x * scale + offset, whose arrays may be theirs.
template <class T>
void norm_coefficients(const NormRun<T>& run, const Moments& moments, float* scale, float* offset) {
  const GroupNormArgs& args = run.args;
  const int64_t size = run.group_size();
  const float* shift =
      args.shift == nullptr ? nullptr : args.shift + run.sample * args.shift_stride + run.begin();
  const float* weight = args.weight + run.sample * args.affine_stride + run.begin();
  const float* bias = args.bias + run.sample * args.affine_stride + run.begin();
  const double pixels = static_cast<double>(args.pixels), count = pixels * size;
  for (int64_t first = 0; first < run.width(); first += size) {
    double sum = 0.0, squares = 0.0;
    for (int64_t j = first; j < first + size; ++j) {
      const double center = moments.center[j] + (shift == nullptr ? 0.0 : shift[j]);
      sum += moments.sum[j] + pixels * center;
    }
    const double mean = sum / count;
    for (int64_t j = first; j < first + size; ++j) {  // about the mean instead of the center
      const double center = moments.center[j] + (shift == nullptr ? 0.0 : shift[j]);
      const double apart = center - mean;
      squares += moments.square[j] + apart * (2.0 * moments.sum[j] + pixels * apart);
    }
    if (squares < 0.0) squares = 0.0;  // by rounding
    const double inverse = 1.0 / __builtin_sqrt(squares / count + args.eps);
    for (int64_t j = first; j < first + size; ++j) {
      const double from = mean - (shift == nullptr ? 0.0 : shift[j]), factor = inverse * weight[j];
      scale[j] = static_cast<float>(factor);
      offset[j] = static_cast<float>(bias[j] - from * factor);
    }
  }
}

template <class V, class Out, class T>
void norm_run(const NormRun<T>& run) {
  const Moments moments{run.scratch(0), run.scratch(1), run.scratch(2)};
  channel_moments<V>(run, moments);
  float *scale = moments.sum, *offset = moments.center;
  norm_coefficients(run, moments, scale, offset);
  const int64_t channels = run.channels();
  Out* out =
      static_cast<Out*>(run.args.out) + run.sample * run.args.pixels * channels + run.begin();
  for (int i = 0; i < 2; ++i) {
    const Segment<T> part = run.segment(i);
    const int64_t width = part.rows.width;
    if (width <= 0) continue;
    const int64_t times = width == channels ? pixels_of_a_row(part.rows.count, width) : 1;
    const Rows<const T> from = part.rows.merged(times);
    const Rows<Out> to =
        Rows<Out>{out + part.first, part.rows.count, width, channels}.merged(times);
    const float* scales = repeated(scale + part.first, width, times, run.scratch(3));
    const float* offsets = repeated(offset + part.first, width, times, run.scratch(4));
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
      norm_run<V, float>(NormRun<float>{args, sample, first, last, memory});
    } else if (args.out_dtype == DType::kBFloat16) {
      norm_run<V, BFloat16>(NormRun<BFloat16>{args, sample, first, last, memory});
    } else if (args.dtype == DType::kBFloat16) {
      norm_run<V, Half>(NormRun<BFloat16>{args, sample, first, last, memory});
    } else {
      norm_run<V, Half>(NormRun<Half>{args, sample, first, last, memory});
    }
    i += last - first;
  }
}

}  // namespace
}  // namespace ddpm_fast
