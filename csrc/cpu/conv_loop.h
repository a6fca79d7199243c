// Convolution of channels_last tensors, written once over D, the products of an instruction set.
//
// D::F holds kLanes float32 sums, one for each of as many output channels; D::dot adds to each the
// products of its weights with kDepth neighbouring input channels, which all of them share. Half is
// half of it. An output is the sum over the kernel's rows, in a row over its columns, in a column
// over the input channels, kDepth by kDepth: the shape of the layer alone decides its bits.
#pragma once

#include "../numerics.h"
#include "conv_layout.h"

namespace ddpm_fast {
namespace {

// Sums that fit in the registers beside the weights and the input, of so many pixels at most.
constexpr int kSums = 24, kMostPixels = 12;

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

// kHalves: the width of the block, in half vectors.
template <class D, int kHalves, int kPixels>
void run_tile(const Tile<D>& tile) {
  using T = typename D::Element;
  using F = typename D::F;
  constexpr int kFull = kHalves / 2, kLanes = D::kLanes;
  constexpr bool kHasHalf = kHalves % 2 != 0;
  F sums[kPixels][kFull + 1];
  typename D::Half half_sums[kPixels];
  DDPM_FAST_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    DDPM_FAST_UNROLL
    for (int v = 0; v < kFull; ++v) sums[p][v] = D::zero();
    if constexpr (kHasHalf) half_sums[p] = D::half_zero();
  }
  const T* weight = tile.weight;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* x[kPixels];
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
    T* out = tile.out + p * tile.stride;
    const T* residual = tile.residual == nullptr ? nullptr : tile.residual + p * tile.stride;
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

// One sample's outputs of one block, from `channel` on.
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
      const Strip<T> strip = strips.strip(x, y, rows, memory);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t stop = end < (y + i + 1) * width ? end : (y + i + 1) * width;
        row(strip, i, y + i, begin - (y + i) * width, stop - begin);
        begin = stop;
      }
    }
  }

 private:
  // `count` pixels of row y, row i of the strip, in as few tiles as there can be.
  void row(const Strip<T>& strip, int64_t i, int64_t y, int64_t column, int64_t count) const {
    const ConvShape& shape = args.shape;
    const int64_t top = y * shape.stride[0] - shape.padding[0];
    // Of the kernel's rows, those that do not lie in the padding.
    const int64_t first = top >= 0 ? 0 : -top < shape.kernel[0] ? -top : shape.kernel[0];
    const int64_t left = shape.size[0] - top, kernel_row = shape.kernel[1] * strips.depth;
    const int64_t last = left < shape.kernel[0] ? left : shape.kernel[0];
    Tile<D> tile;
    tile.pixel = shape.stride[1] * strip.pixel;
    tile.rows = last - first;
    tile.row = strip.row;
    tile.steps = kernel_row / D::kDepth;
    tile.weight = static_cast<const T*>(args.weight) + channel * shape.kernel[0] * kernel_row +
                  first * kernel_row * (kHalves * D::kLanes / 2);
    tile.bias = args.bias == nullptr ? nullptr : args.bias + channel;
    tile.stride = shape.out_channels;
    tile.channels = shape.out_channels - channel;
    const int64_t place = (sample * shape.out_size[0] + y) * shape.out_size[1] + column;
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

template <class D, int kHalves>
void run_block(const ConvArgs& args, int64_t sample, int64_t channel, int64_t begin, int64_t end,
               void* memory) {
  const ConvRun<D, kHalves> run(args, sample, channel);
  run.run(begin, end, static_cast<typename D::Element*>(memory));
}

// The range is in pixels of the output: of all samples of a block, then of the next block.
template <class D>
void conv2d(const ConvArgs& args, int64_t begin, int64_t end, void* memory) {
  constexpr decltype(&run_block<D, 1>) kRuns[] = {
      // by width
      nullptr, run_block<D, 1>, run_block<D, 2>, run_block<D, 3>, run_block<D, 4>,
      nullptr, run_block<D, 6>, nullptr,         run_block<D, 8>};
  const ConvBlocks<D> blocks(args.shape.out_channels);
  const int64_t pixels = args.shape.out_size[0] * args.shape.out_size[1];
  while (begin < end) {
    const int64_t run = begin / pixels, first = begin - run * pixels;
    const int64_t last = end - run * pixels < pixels ? end - run * pixels : pixels;
    const int64_t block = run / args.samples;
    kRuns[blocks.halves(block)](args, run % args.samples, block * blocks.width, first, last,
                                memory);
    begin = run * pixels + last;
  }
}

template <class D>
constexpr ConvKernels conv_kernels(const char* name) {
  using T = typename D::Element;
  return {name,
          packed_elements<D>,
          [](const ConvShape& shape, const void* weight, void* packed) {
            pack_conv2d<D>(shape, static_cast<const T*>(weight), static_cast<T*>(packed));
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
