// How a convolution's weights and input lie in memory: blocks of channels, and strips of rows.
// D is the products of an instruction set, see conv_loop.h; a block is at most D::kMostVectors
// wide.
#pragma once

#include "../kernels.h"
#include "conversions.h"

namespace ddpm_fast {
namespace {

// Bytes of a strip of the input, which stay in the second-level cache beside a block's weights.
constexpr int64_t kStripBytes = int64_t{1} << 18;

constexpr DType dtype_of(float) { return DType::kFloat32; }
constexpr DType dtype_of(BFloat16) { return DType::kBFloat16; }
constexpr DType dtype_of(Half) { return DType::kFloat16; }

template <class D>
int64_t padded_depth(int64_t channels) {
  return (channels + D::kDepth - 1) / D::kDepth * D::kDepth;
}

// Output channels whose sums are made together. All blocks are as wide as the first, but for the
// last one.
template <class D>
struct ConvBlocks {
  int64_t channels, width, count;

  explicit ConvBlocks(int64_t out_channels) : channels(out_channels) {
    const int64_t vectors = (channels + D::kLanes - 1) / D::kLanes;
    count = (vectors + D::kMostVectors - 1) / D::kMostVectors;
    width = (vectors + count - 1) / (count > 0 ? count : 1) * D::kLanes;
    count = (channels + width - 1) / width;
  }
  // In half vectors: 1 and 3 are worth their own code, where there are such vectors.
  int64_t halves(int64_t block) const {
    constexpr int64_t half = D::kLanes / 2;
    const int64_t left = channels - block * width, wanted = (left + half - 1) / half;
    if (left >= width) return width / half;
    return D::kHasHalves && (wanted == 1 || wanted == 3) ? wanted : (wanted + 1) / 2 * 2;
  }
  int64_t lanes(int64_t block) const { return halves(block) * (D::kLanes / 2); }
};

template <class D>
int64_t packed_elements(const ConvShape& shape) {
  const ConvBlocks<D> blocks(shape.out_channels);
  const int64_t lanes = (blocks.count - 1) * blocks.width + blocks.lanes(blocks.count - 1);
  return lanes * shape.kernel[0] * shape.kernel[1] * padded_depth<D>(shape.in_channels);
}

// (O, I, kH, kW) as (block, kH, kW, I / kDepth, lane, kDepth), with zeros where there is nothing.
template <class D>
void pack_conv2d(const ConvShape& shape, const float* weight, typename D::Stored* packed) {
  const ConvBlocks<D> blocks(shape.out_channels);
  const int64_t taps = shape.kernel[0] * shape.kernel[1], depth = shape.in_channels;
  for (int64_t block = 0; block < blocks.count; ++block) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t i = 0; i < padded_depth<D>(depth); i += D::kDepth) {
        for (int64_t lane = 0; lane < blocks.lanes(block); ++lane) {
          const int64_t o = block * blocks.width + lane;
          for (int64_t k = i; k < i + D::kDepth; ++k) {
            const bool exists = o < shape.out_channels && k < depth;
            from_float(exists ? weight[(o * depth + k) * taps + tap] : 0.0f, packed++);
          }
        }
      }
    }
  }
}

// Rows of the input: where they are, or copied with their padding.
template <class T>
struct Strip {
  const T* first;
  int64_t row, pixel;  // strides
};

template <class T>
void zero(T* at, int64_t count) {
  __builtin_memset(at, 0, count * sizeof *at);
}

// Of `channels`, as pixels of `depth`, with zeros after them.
template <class T>
void copy_pixels(const T* from, int64_t pixels, int64_t channels, int64_t depth, T* to) {
  if (depth == channels) {
    __builtin_memcpy(to, from, pixels * channels * sizeof *to);
    return;
  }
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < depth; ++c) {
      to[i * depth + c] = c < channels ? from[i * channels + c] : T{};
    }
  }
}

// Work whose units are items of blocks: of the first strip of items all blocks, one after another,
// then the next strip's. Of each strip, calls prepare(its first item, begin, end) with the items
// that are needed, then run(block, its first item, begin, end); items are counted in the strip.
template <class Prepare, class Run>
void each_strip(int64_t begin, int64_t end, int64_t items, int64_t strip, int64_t blocks,
                const Prepare& prepare, const Run& run) {
  while (begin < end) {
    const int64_t first = begin / (strip * blocks) * strip, before = first * blocks;
    const int64_t count = items - first < strip ? items - first : strip;
    const int64_t from = begin - before;
    const int64_t to = end - before < count * blocks ? end - before : count * blocks;
    const int64_t block = from / count, last = (to - 1) / count;
    // More than one block needs all of the strip.
    prepare(first, block == last ? from - block * count : 0,
            block == last ? to - block * count : count);
    for (int64_t i = block; i <= last; ++i) {
      const int64_t done = i * count;
      run(i, first, from > done ? from - done : 0, to - done < count ? to - done : count);
    }
    begin = before + to;
  }
}

// The rows of the input that some rows of the output need.
template <class D>
struct ConvStrips {
  using T = typename D::Element;
  const ConvShape& shape;
  int64_t depth, width;  // of a copied pixel; of a copied row, in pixels

  explicit ConvStrips(const ConvShape& s)
      : shape(s),
        depth(padded_depth<D>(s.in_channels)),
        width((s.out_size[1] - 1) * s.stride[1] + s.kernel[1]) {}

  bool is_copied() const {
    return shape.padding[0] != 0 || shape.padding[1] != 0 || depth != shape.in_channels ||
           in_rows(shape.out_size[0]) > shape.size[0] || width > shape.size[1];
  }
  int64_t in_rows(int64_t rows) const { return (rows - 1) * shape.stride[0] + shape.kernel[0]; }
  // Rows of the output in a strip.
  int64_t rows() const {
    if (!is_copied()) return shape.out_size[0];
    const int64_t row_bytes = width * depth * sizeof(T);
    const int64_t fitting = (kStripBytes / row_bytes - shape.kernel[0]) / shape.stride[0] + 1;
    const int64_t rows = fitting < 1 ? 1 : fitting;
    return rows < shape.out_size[0] ? rows : shape.out_size[0];
  }
  int64_t elements() const { return is_copied() ? in_rows(rows()) * width * depth : 0; }

  // The strip of `rows` output rows from y on; x: the sample, to: where a copy goes.
  Strip<T> strip(const T* x, int64_t y, int64_t rows, T* to) const {
    const int64_t channels = shape.in_channels, top = y * shape.stride[0] - shape.padding[0];
    const int64_t in_row = shape.size[1] * channels;
    if (!is_copied()) return {x + top * in_row, in_row, channels};
    const int64_t row = width * depth, left = shape.padding[1];
    const int64_t inside = width - left < shape.size[1] ? width - left : shape.size[1];
    for (int64_t i = 0; i < in_rows(rows); ++i) {
      T* at = to + i * row;
      const bool exists = top + i >= 0 && top + i < shape.size[0] && inside > 0;
      const int64_t before = exists ? left * depth : row, copied = exists ? inside * depth : 0;
      zero(at, before);
      if (exists) copy_pixels(x + (top + i) * in_row, inside, channels, depth, at + before);
      zero(at + before + copied, row - before - copied);
    }
    return {to, row, depth};
  }
};

}  // namespace
}  // namespace ddpm_fast
