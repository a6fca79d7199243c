// Convolution of channels_last tensors, written once over D, the products of an instruction set.
//
// D::F holds kLanes float32 sums, one for each of as many output channels; D::dot adds to each the
// products of its weights with kDepth neighbouring input channels, which all of them share. Half is
// half of it. An output is the sum over the kernel's rows, in a row over its columns, in a column
// over the input channels, kDepth by kDepth: the shape of the layer alone decides its bits.
#pragma once

#include "../numerics.h"
#include "conversions.h"

namespace ddpm_fast {
namespace {

// Sums that fit in the registers beside the weights and the input.
constexpr int kSums = 24, kMostVectors = 4, kMostPixels = 12;
// Bytes of a strip of the input, which stay in the second-level cache beside a block's weights.
constexpr int64_t kStripBytes = int64_t{1} << 18;

template <class D>
int64_t padded_depth(int64_t channels) {
  return (channels + D::kDepth - 1) / D::kDepth * D::kDepth;
}

// The output channels from `first` on whose sums are made together: kMostVectors vectors or fewer,
// so that all blocks are as wide as the first, but for the last one.
template <class D>
struct ConvBlocks {
  int64_t channels, width, count;

  explicit ConvBlocks(int64_t out_channels) : channels(out_channels) {
    const int64_t vectors = (channels + D::kLanes - 1) / D::kLanes;
    count = (vectors + kMostVectors - 1) / kMostVectors;
    width = (vectors + count - 1) / (count > 0 ? count : 1) * D::kLanes;
    count = (channels + width - 1) / width;
  }
  // In half vectors: 1 and 3 are worth their own code.
  int64_t halves(int64_t block) const {
    constexpr int64_t half = D::kLanes / 2;
    const int64_t left = channels - block * width, wanted = (left + half - 1) / half;
    if (left >= width) return width / half;
    return wanted == 1 || wanted == 3 ? wanted : (wanted + 1) / 2 * 2;
  }
  int64_t lanes(int64_t block) const { return halves(block) * (D::kLanes / 2); }
};

template <class D>
int64_t conv_weights(const ConvShape& shape) {
  const ConvBlocks<D> blocks(shape.out_channels);
  const int64_t lanes = (blocks.count - 1) * blocks.width + blocks.lanes(blocks.count - 1);
  return lanes * shape.kernel[0] * shape.kernel[1] * padded_depth<D>(shape.in_channels);
}

// (O, I, kH, kW) as (block, kH, kW, I / kDepth, lane, kDepth), with zeros where there is nothing.
template <class D>
void conv_pack(const ConvShape& shape, const typename D::Element* weight,
               typename D::Element* packed) {
  const ConvBlocks<D> blocks(shape.out_channels);
  const int64_t taps = shape.kernel[0] * shape.kernel[1], depth = shape.in_channels;
  for (int64_t block = 0; block < blocks.count; ++block) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t i = 0; i < padded_depth<D>(depth); i += D::kDepth) {
        for (int64_t lane = 0; lane < blocks.lanes(block); ++lane) {
          const int64_t o = block * blocks.width + lane;
          for (int64_t k = i; k < i + D::kDepth; ++k) {
            const bool exists = o < shape.out_channels && k < depth;
            *packed++ = exists ? weight[(o * depth + k) * taps + tap] : typename D::Element{};
          }
        }
      }
    }
  }
}

// The rows of the input that some rows of the output need: there, or copied with their padding.
template <class D>
struct Strip {
  using T = typename D::Element;
  const T* first;
  int64_t row, pixel;  // strides
};

template <class D>
struct ConvStrips {
  const ConvShape& shape;
  int64_t depth, width;  // of a copied pixel; of a copied row, in pixels

  explicit ConvStrips(const ConvShape& s)
      : shape(s),
        depth(padded_depth<D>(s.in_channels)),
        width((s.out_size[1] - 1) * s.stride[1] + s.kernel[1]) {}

  bool is_copied() const {
    return shape.padding[0] != 0 || shape.padding[1] != 0 || depth != shape.in_channels;
  }
  int64_t in_rows(int64_t rows) const { return (rows - 1) * shape.stride[0] + shape.kernel[0]; }
  // Rows of the output in a strip.
  int64_t rows() const {
    if (!is_copied()) return shape.out_size[0];
    const int64_t row_bytes = width * depth * sizeof(typename D::Element);
    const int64_t fitting = (kStripBytes / row_bytes - shape.kernel[0]) / shape.stride[0] + 1;
    const int64_t rows = fitting < 1 ? 1 : fitting;
    return rows < shape.out_size[0] ? rows : shape.out_size[0];
  }
  int64_t elements() const { return is_copied() ? in_rows(rows()) * width * depth : 0; }

  // The strip of `rows` output rows from y on; x: the sample, to: where a copy goes.
  Strip<D> strip(const typename D::Element* x, int64_t y, int64_t rows,
                 typename D::Element* to) const {
    const int64_t channels = shape.in_channels, top = y * shape.stride[0] - shape.padding[0];
    if (!is_copied())
      return {x + top * shape.size[1] * channels, shape.size[1] * channels, channels};
    const int64_t row = width * depth, left = shape.padding[1];
    const int64_t inside = width - left < shape.size[1] ? width - left : shape.size[1];
    for (int64_t i = 0; i < in_rows(rows); ++i) {
      typename D::Element* at = to + i * row;
      const bool exists = top + i >= 0 && top + i < shape.size[0] && inside > 0;
      const int64_t before = exists ? left * depth : row, copied = exists ? inside * depth : 0;
      zero(at, before);
      if (exists) copy_pixels(x + (top + i) * shape.size[1] * channels, inside, at + before);
      zero(at + before + copied, row - before - copied);
    }
    return {to, row, depth};
  }

 private:
  static void zero(typename D::Element* at, int64_t count) {
    __builtin_memset(at, 0, count * sizeof *at);
  }
  void copy_pixels(const typename D::Element* from, int64_t pixels, typename D::Element* to) const {
    const int64_t channels = shape.in_channels;
    if (depth == channels) {
      __builtin_memcpy(to, from, pixels * channels * sizeof *to);
      return;
    }
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t c = 0; c < depth; ++c) {
        to[i * depth + c] = c < channels ? from[i * channels + c] : typename D::Element{};
      }
    }
  }
};

// Some pixels' sums of one block.
template <class D>
struct Tile {
  using T = typename D::Element;
  const T *x, *weight;       // the first pixel's first tap
  int64_t pixel;             // the distance of neighbouring ones in x
  int64_t rows, row, steps;  // the kernel's; their distance in x; in one, columns * depth / kDepth
  // Of the block's first channel; bias and residual may be null. Pixels are `stride` apart.
  const float* bias;
  const T* residual;
  T* out;
  int64_t stride, channels;
};

// kHalves: the width of the block.
template <class D, int kHalves, int kPixels>
void run_tile(const Tile<D>& tile) {
  using F = typename D::F;
  using Half = typename D::Half;
  constexpr int kFull = kHalves / 2, kLanes = D::kLanes;
  constexpr bool kHasHalf = kHalves % 2 != 0;
  F sums[kPixels][kFull + 1];
  Half half_sums[kPixels];
  DDPM_FAST_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    DDPM_FAST_UNROLL
    for (int v = 0; v < kFull; ++v) sums[p][v] = D::zero();
    if constexpr (kHasHalf) half_sums[p] = D::half_zero();
  }
  const typename D::Element* weight = tile.weight;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const typename D::Element* x[kPixels];
    DDPM_FAST_UNROLL
    for (int p = 0; p < kPixels; ++p) x[p] = tile.x + r * tile.row + p * tile.pixel;
    for (int64_t k = 0; k < tile.steps; ++k) {
      typename D::Weights weights[kFull + 1];
      typename D::HalfWeights half_weights;
      DDPM_FAST_UNROLL
      for (int v = 0; v < kFull; ++v) weights[v] = D::load_weights(weight + v * kLanes * D::kDepth);
      if constexpr (kHasHalf) {
        half_weights = D::load_half_weights(weight + kFull * kLanes * D::kDepth);
      }
      weight += kHalves * (kLanes / 2) * D::kDepth;
      DDPM_FAST_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const auto shared = D::broadcast(x[p] + k * D::kDepth);
        DDPM_FAST_UNROLL
        for (int v = 0; v < kFull; ++v) sums[p][v] = D::dot(sums[p][v], weights[v], shared);
        if constexpr (kHasHalf) half_sums[p] = D::half_dot(half_sums[p], half_weights, shared);
      }
    }
  }
  DDPM_FAST_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    typename D::Element* out = tile.out + p * tile.stride;
    const typename D::Element* residual =
        tile.residual == nullptr ? nullptr : tile.residual + p * tile.stride;
    DDPM_FAST_UNROLL
    for (int v = 0; v < kFull + kHasHalf; ++v) {
      F sum = v < kFull ? sums[p][v] : D::widened(half_sums[p]);
      const int64_t first = v * kLanes, left = tile.channels - first;
      if (tile.bias != nullptr) sum = D::add(sum, D::load(tile.bias + first, left));
      if (residual != nullptr) sum = D::add(sum, D::load(residual + first, left));
      D::store(out + first, sum, v < kFull ? left : left < kLanes / 2 ? left : kLanes / 2);
    }
  }
}

template <class D, int kHalves, int kPixels>
void run_tile_of(int64_t pixels, const Tile<D>& tile) {
  if constexpr (kPixels > 1) {
    if (pixels < kPixels) return run_tile_of<D, kHalves, kPixels - 1>(pixels, tile);
  }
  run_tile<D, kHalves, kPixels>(tile);
}

// One sample's outputs of one block, `halves` half vectors wide.
template <class D, int kHalves>
struct ConvRun {
  using T = typename D::Element;
  static constexpr int kSumsEach = kHalves / 2 + kHalves % 2;
  static constexpr int64_t kMost =
      kSums / kSumsEach < kMostPixels ? kSums / kSumsEach : kMostPixels;
  const ConvArgs& args;
  int64_t sample, channel;
  ConvStrips<D> strips;

  ConvRun(const ConvArgs& a, int64_t n, int64_t first)
      : args(a), sample(n), channel(first), strips(a.shape) {}

  // Pixels [begin, end), as strips of rows.
  void run(int64_t begin, int64_t end, T* memory) const {
    const ConvShape& shape = args.shape;
    const int64_t in_elements = shape.size[0] * shape.size[1] * shape.in_channels;
    const int64_t width = shape.out_size[1];
    const T* x = static_cast<const T*>(args.x) + sample * in_elements;
    while (begin < end) {
      const int64_t y = begin / width, last = (end - 1) / width + 1;
      const int64_t rows = last - y < strips.rows() ? last - y : strips.rows();
      const Strip<D> strip = strips.strip(x, y, rows, memory);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t stop = end < (y + i + 1) * width ? end : (y + i + 1) * width;
        row(strip, i, y + i, begin - (y + i) * width, stop - begin);
        begin = stop;
      }
    }
  }

 private:
  // `count` pixels of row y, row i of the strip, in as few tiles as there can be.
  void row(const Strip<D>& strip, int64_t i, int64_t y, int64_t column, int64_t count) const {
    const ConvShape& shape = args.shape;
    const int64_t top = y * shape.stride[0] - shape.padding[0];
    const int64_t first = top < 0 ? -top : 0;  // of the kernel's rows that do not see zeros alone
    const int64_t left = shape.size[0] - top;
    const int64_t rows = left < shape.kernel[0] ? left : shape.kernel[0];
    const int64_t kernel_row = shape.kernel[1] * strips.depth;
    Tile<D> tile;
    tile.pixel = shape.stride[1] * strip.pixel;
    tile.rows = rows - first;
    tile.row = strip.row;
    tile.steps = kernel_row / D::kDepth;
    tile.weight = static_cast<const T*>(args.weight) + channel * shape.kernel[0] * kernel_row +
                  first * kernel_row * (kHalves * D::kLanes / 2);
    tile.bias = args.bias == nullptr ? nullptr : args.bias + channel;
    tile.stride = shape.out_channels;
    tile.channels = shape.out_channels - channel;
    const int64_t place = ((sample * shape.out_size[0] + y) * shape.out_size[1] + column);
    const int64_t tiles = (count + kMost - 1) / kMost;
    for (int64_t j = 0; j < tiles; ++j) {
      const int64_t from = count * j / tiles, to = count * (j + 1) / tiles;
      const int64_t at = (place + from) * shape.out_channels + channel;
      tile.x =
          strip.first + (i * shape.stride[0] + first) * strip.row + (column + from) * tile.pixel;
      tile.out = static_cast<T*>(args.out) + at;
      tile.residual =
          args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + at;
      run_tile_of<D, kHalves, kMost>(to - from, tile);
    }
  }
};

// The range is in pixels of the output of blocks of channels, see ConvKernels.
template <class D>
void conv2d(const ConvArgs& args, int64_t begin, int64_t end, void* memory) {
  using T = typename D::Element;
  const ConvShape& shape = args.shape;
  const ConvBlocks<D> blocks(shape.out_channels);
  const int64_t pixels = shape.out_size[0] * shape.out_size[1];
  while (begin < end) {
    const int64_t run = begin / pixels, first = begin - run * pixels;
    const int64_t last = end - run * pixels < pixels ? end - run * pixels : pixels;
    const int64_t block = run / args.samples, sample = run % args.samples;
    const auto part = [&]<int kHalves>() {
      const ConvRun<D, kHalves> part(args, sample, block * blocks.width);
      part.run(first, last, static_cast<T*>(memory));
    };
    switch (blocks.halves(block)) {
      case 1:
        part.template operator()<1>();
        break;
      case 2:
        part.template operator()<2>();
        break;
      case 3:
        part.template operator()<3>();
        break;
      case 4:
        part.template operator()<4>();
        break;
      case 6:
        part.template operator()<6>();
        break;
      default:
        part.template operator()<8>();
    }
    begin = run * pixels + last;
  }
}

template <class D>
constexpr ConvKernels conv_kernels(const char* name) {
  using T = typename D::Element;
  return {name,
          conv_weights<D>,
          [](const ConvShape& shape, const void* weight, void* packed) {
            conv_pack<D>(shape, static_cast<const T*>(weight), static_cast<T*>(packed));
          },
          [](const ConvArgs& args) {
            const ConvShape& shape = args.shape;
            return ConvBlocks<D>(shape.out_channels).count * args.samples * shape.out_size[0] *
                   shape.out_size[1];
          },
          [](const ConvShape& shape) {
            return static_cast<int64_t>(ConvStrips<D>(shape).elements() * sizeof(T));
          },
          conv2d<D>};
}

}  // namespace
}  // namespace ddpm_fast
