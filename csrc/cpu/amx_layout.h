// Convolution by tiles, see amx.cpp: how its weights, its input and its outputs lie in memory.
#pragma once

#include "amx_tiles.h"
#include "avx512_bf16.h"
#include "conv_layout.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kBlockTiles = 2;  // of output channels, whose sums are made together
// Of a strip of the input, and of weights, that stay in a second-level cache of 2 MiB together.
constexpr int64_t kAmxStripBytes = int64_t{1} << 19, kAmxWeightBytes = int64_t{1} << 20;

constexpr int64_t tiles_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

// See conv_layout.h.
inline void copy_pixels(const BFloat16* from, int64_t pixels, int64_t channels, int64_t depth,
                        BFloat16* to) {
  if (depth == channels) {
    __builtin_memcpy(to, from, pixels * channels * sizeof *to);
    return;
  }
  for (int64_t i = 0; i < pixels; ++i, from += channels, to += depth) {
    for (int64_t c = 0; c < depth; c += kTileDepth) {
      const int64_t left = channels - c;
      const __mmask32 exist = left < kTileDepth ? (1u << left) - 1 : ~0u;
      _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(exist, from + c));
    }
  }
}
inline void copy_pixels(const Float16* from, int64_t pixels, int64_t channels, int64_t depth,
                        BFloat16* to) {
  using D = Avx512Bf16Sums;
  for (int64_t i = 0; i < pixels; ++i, from += channels) {
    for (int64_t c = 0; c < depth; c += D::kLanes) {
      D::store(to + i * depth + c, c < channels ? D::load(from + c, channels - c) : D::zero(),
               D::kLanes);
    }
  }
}

// A sample's rows follow each other with one padding between them, which is both the right one of
// the upper and the left one of the lower; likewise samples. So the pixels that a tap of the kernel
// sees lie at one distance for all outputs of all samples, if between the outputs as many places
// are left out as the padding takes. Outputs are counted with these places.
//
// T: of the input, which is copied unless it can be read where it is.
template <class T>
struct AmxLayout {
  static constexpr bool kIsRead = dtype_of(T{}) == DType::kBFloat16;  // as it is, by the tiles
  const ConvShape& shape;
  int64_t depth;      // of a pixel
  int64_t row, rows;  // pixels from row to row, and rows from sample to sample, of the input
  int64_t out_row, out_rows;  // of the outputs

  explicit AmxLayout(const ConvShape& s)
      : shape(s),
        depth(tiles_of(s.in_channels, kTileDepth) * kTileDepth),
        row(padded(1)),
        rows(padded(0)),
        out_row(row / s.stride[1] * s.stride[0]),
        out_rows(rows / s.stride[0]) {}

  bool is_copied() const {
    const bool is_1x1 = shape.kernel[0] * shape.kernel[1] * shape.stride[0] * shape.stride[1] == 1;
    return !kIsRead || !is_1x1 || depth != shape.in_channels || row != shape.size[1] ||
           rows != shape.size[0];
  }
  int64_t in_rows(int64_t rows) const { return (rows - 1) * shape.stride[0] + shape.kernel[0]; }
  // Rows of the output in a strip that is copied.
  int64_t strip_rows() const {
    const int64_t row_bytes = row * depth * int64_t{sizeof(BFloat16)};
    const int64_t fitting = (kAmxStripBytes / row_bytes - shape.kernel[0]) / shape.stride[0] + 1;
    return fitting < 1 ? 1 : fitting;
  }
  // Outputs in a strip.
  int64_t strip() const {
    if (is_copied()) return strip_rows() * out_row;
    const int64_t fitting = kAmxStripBytes / (depth * int64_t{sizeof(BFloat16)});
    return fitting < kTileRows ? kTileRows : fitting;
  }
  // With what the last outputs' tile and padding reach over its end.
  int64_t strip_elements() const {
    const int64_t over = shape.kernel[1] + kTileRows * shape.stride[1];
    return is_copied() ? (in_rows(strip_rows()) * row + over) * depth : 0;
  }
  // The first output from `i` on that exists, or one past all.
  int64_t next(int64_t i) const {
    int64_t y = i / out_row, x = i % out_row;
    if (x >= shape.out_size[1]) {
      ++y;
      x = 0;
    }
    const int64_t in_sample = y % out_rows;
    if (in_sample >= shape.out_size[0]) return (y - in_sample + out_rows) * out_row;
    return y * out_row + x;
  }

  // Rows [begin, end) of the strip's outputs need some of the input's, which are copied to their
  // places in `to`; `first`: the row of its first outputs.
  void copy(const ConvArgs& args, int64_t first, int64_t begin, int64_t end, BFloat16* to) const {
    const int64_t pixels = shape.size[1], channels = shape.in_channels, before = shape.padding[1];
    to += begin * shape.stride[0] * row * depth;
    const int64_t top = (first + begin) * shape.stride[0];
    for (int64_t i = top; i < top + in_rows(end - begin); ++i, to += row * depth) {
      const int64_t sample = i / rows, y = i % rows - shape.padding[0];
      if (sample >= args.samples || y < 0 || y >= shape.size[0]) {
        zero(to, row * depth);
        continue;
      }
      const T* x = static_cast<const T*>(args.x) + (sample * shape.size[0] + y) * pixels * channels;
      zero(to, before * depth);
      copy_pixels(x, pixels, channels, depth, to + before * depth);
      zero(to + (before + pixels) * depth, (row - before - pixels) * depth);
    }
    zero(to, shape.kernel[1] * depth);  // the padding after the last row
  }

 private:
  // Of a side of the input, with the larger one of its paddings, so that all outputs have places;
  // it is the same for an upsampling's phases, whose paddings change sides.
  int64_t padded(int side) const {
    const int64_t stride = shape.stride[side], before = shape.padding[side];
    const int64_t used = (shape.out_size[side] - 1) * stride + shape.kernel[side];
    const int64_t after = used - before - shape.size[side];
    int64_t size = shape.size[side] + (before > after ? before : after);
    if (size < shape.out_size[side] * stride) size = shape.out_size[side] * stride;
    return tiles_of(size, stride) * stride;
  }
};

inline int64_t packed_amx_elements(const ConvShape& shape) {
  return tiles_of(shape.out_channels, kTileLanes) * shape.kernel[0] * shape.kernel[1] *
         tiles_of(shape.in_channels, kTileDepth) * kTileElements;
}

inline int64_t amx_blocks(const ConvShape& shape) {
  return tiles_of(shape.out_channels, kBlockTiles * kTileLanes);
}

// Into how many parts cores may cut the blocks: one where a core's second-level cache holds all
// weights, since then each had better copy no more of the input than it needs.
inline int64_t amx_parts(const ConvShape& shape) {
  const int64_t bytes = packed_amx_elements(shape) * int64_t{sizeof(BFloat16)};
  return bytes > kAmxWeightBytes ? amx_blocks(shape) : 1;
}

// (O, I, kH, kW) as (block, kH, kW, I / kTileDepth, tile of the block), where a tile has pairs of
// input channels as rows, each (lane, 2); zeros where there is nothing.
inline void pack_amx(const ConvShape& shape, const float* weight, BFloat16* packed) {
  const int64_t taps = shape.kernel[0] * shape.kernel[1], channels = shape.in_channels;
  constexpr int64_t kWidth = kBlockTiles * kTileLanes;
  for (int64_t block = 0; block < shape.out_channels; block += kWidth) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t depth = 0; depth < channels; depth += kTileDepth) {
        const int64_t last = block + kWidth;
        for (int64_t tile = block; tile < last && tile < shape.out_channels; tile += kTileLanes) {
          for (int64_t k = 0; k < kTileElements; ++k) {
            const int64_t o = tile + k / 2 % kTileLanes;
            const int64_t i = depth + k / (2 * kTileLanes) * 2 + k % 2;
            const bool exists = o < shape.out_channels && i < channels;
            from_float(exists ? weight[(o * channels + i) * taps + tap] : 0.0f, packed++);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace ddpm_fast
