// Argument checks of the operators: each failure is one sentence that says what was wanted, what
// came and, where it is not plain, what to do.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <ostream>

#include "require.h"

namespace ddpm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

// A tensor's shape as a part of a message, which is made only where something is refused.
struct ShapeText {
  const Tensor& tensor;
};

inline ShapeText shape_text(const Tensor& t) { return {t}; }

inline std::ostream& operator<<(std::ostream& out, const ShapeText& shape) {
  out << "(";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i ? ", " : "") << shape.tensor.size(i);
  return out << ")";
}

inline void require_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  require(t.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", but it is ",
          dtype_name(t.scalar_type()), ".");
  require_aligned(name, t.const_data_ptr(), t.element_size());
}

// x_t (N, C, ...) or x_start (N, ...).
inline void require_state(const char* name, const Tensor& t, int64_t dimensions) {
  require_dtype(name, t, ScalarType::Float);
  require(t.dim() >= dimensions, name, " must have the shape (N, ", dimensions > 1 ? "C, " : "",
          "...), but it is ", shape_text(t), ".");
}

inline void require_device(const char* name, const Tensor& t, const Tensor& like) {
  require(t.is_cuda() == like.is_cuda() && t.is_cpu() == like.is_cpu() &&
              (t.is_cpu() || t.get_device_index() == like.get_device_index()),
          name, " must be on the same device as the other tensors; move it there with .to().");
}

inline void require_same_shape(const char* name, const Tensor& t, const char* like_name,
                               const Tensor& like) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  require(same, name, " must have the shape of ", like_name, ", ", shape_text(like), ", but it is ",
          shape_text(t), ".");
}

// One int64 per sample.
inline Tensor per_sample(const char* name, const Tensor& t, int64_t samples, const Tensor& like) {
  require_dtype(name, t, ScalarType::Long);
  require_device(name, t, like);
  require(t.dim() == 1 && t.size(0) == samples, name, " must have the shape (", samples,
          ",), one per sample, but it is ", shape_text(t), ".");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor table(const char* name, const Tensor& t, ScalarType dtype, int64_t columns,
                    const Tensor& like) {
  require_dtype(name, t, dtype);
  require_device(name, t, like);
  require(t.dim() == 2 && t.size(1) == columns, name, " must have the shape (rows, ", columns,
          "), but it is ", shape_text(t), ".");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A sample's shape as channels and pixels; the memory order of a tensor in these terms, if its
// pixels lie at one stride.
struct Shape {
  int64_t samples, channels = 1, pixels = 1;

  explicit Shape(const Tensor& t) : samples(t.size(0)) {
    if (t.dim() > 1) channels = t.size(1);
    for (int64_t i = 2; i < t.dim(); ++i) pixels *= t.size(i);
  }
  int64_t elements() const { return channels * pixels; }
};

inline std::optional<Layout> layout_of(const Tensor& t) {
  const Shape shape(t);
  Layout layout{t.dim() > 0 ? t.stride(0) : 1, shape.pixels, 1};
  int64_t inner = 0;  // pixels of the dimensions seen so far; 0 before the first
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    if (t.size(i) == 1) continue;
    if (inner == 0) {
      layout.pixel = t.stride(i);
      inner = 1;
    }
    if (t.stride(i) != layout.pixel * inner) return std::nullopt;
    inner *= t.size(i);
  }
  if (shape.channels > 1) layout.channel = t.stride(1);
  return layout;
}

// `t` itself, or a contiguous copy if the kernels cannot walk it; never for a tensor written to.
inline Tensor walkable(const Tensor& t) { return layout_of(t) ? t : torch::stable::contiguous(t); }

inline Bytes bytes_of(const char* name, const Tensor& t) {
  const auto first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  if (t.numel() == 0) return {name, first, first};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {name, first, first + static_cast<uintptr_t>(last + 1) * t.element_size()};
}

// A tensor that is written: every element at its own address, in an order the kernels can walk.
inline Layout writable(const char* name, const Tensor& t) {
  const std::optional<Layout> layout = layout_of(t);
  const Shape shape(t);
  require(layout && is_distinct(shape.samples, shape.channels, shape.pixels, *layout), name,
          " is written, so it must be contiguous, channels_last or a slice of such a tensor; pass "
          "one that is.");
  return *layout;
}

}  // namespace ddpm_fast
