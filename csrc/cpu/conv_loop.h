// Convolution of channels_last tensors, written once over D, the products of an instruction set.
//
// D::F holds kLanes float32 sums, one for each of as many output channels, and kSums of these fit
// in the registers beside the weights and the input; D::dot adds to each the products of its
// weights with kDepth neighbouring input channels, which all of them share. Half is half of it. An
// output is the sum over the kernel's rows, in a row over its columns, in a column over the input
// channels, kDepth by kDepth: the shape of the layer alone decides its bits.
#pragma once

#include "../numerics.h"
#include "conv_layout.h"

namespace ddpm_fast {
namespace {

constexpr int kMostPixels = 12;  // of a tile
// Pixels below which a tile waits for its own sums.
constexpr int64_t kFewest = 4;

inline int64_t within(int64_t x, int64_t least, int64_t most) {
  return x < least ? least : x > most ? most : x;
}

// Some pixels' sums of one block, rounded to Out.
template <class D, class Out = typename D::Element>
struct Tile {
  using T = typename D::Element;
  const T* x;  // the first pixel's first tap
  const typename D::Stored* weight;
  int64_t pixel, row, weight_row;  // distances: of pixels and the kernel's rows in x, in weight
  int64_t rows, steps;             // the kernel's; in each row, columns * depth / kDepth
  // Of the block's first channel; bias and residual may be null. Pixels are `stride` apart.
  const float* bias;
  const Out* residual;
  Out* out;
  int64_t stride, channels;
};

// kHalves: the width of the block, in half vectors.
template <class D, int kHalves, int kPixels, class Out>
void run_tile(const Tile<D, Out>& tile) {
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
  for (int64_t r = 0; r < tile.rows; ++r) {
    const typename D::Stored* weight = tile.weight + r * tile.weight_row;
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
    Out* out = tile.out + p * tile.stride;
    const Out* residual = tile.residual == nullptr ? nullptr : tile.residual + p * tile.stride;
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

template <class D, int kHalves, int kPixels, class Out>
void run_tile_of(int64_t pixels, const Tile<D, Out>& tile) {
  if constexpr (kPixels > 1) {
    if (pixels < kPixels) return run_tile_of<D, kHalves, kPixels - 1>(pixels, tile);
  }
  run_tile<D, kHalves, kPixels>(tile);
}

// Pixels of a block whose sums fit in the registers.
template <class D, int kHalves>
constexpr int64_t most_pixels() {
  constexpr int64_t fitting = D::kSums / (kHalves / 2 + kHalves % 2);
  return fitting < kMostPixels ? fitting : kMostPixels;
}

// `pixels` in a row, in as few tiles as there can be.
template <class D, int kHalves, class Out>
void run_tiles(int64_t pixels, Tile<D, Out> tile) {
  constexpr int64_t kMost = most_pixels<D, kHalves>();
  for (int64_t left = (pixels + kMost - 1) / kMost, count; left > 0; --left, pixels -= count) {
    count = (pixels + left - 1) / left;
    run_tile_of<D, kHalves, kMost>(count, tile);
    tile.x += count * tile.pixel;
    tile.out += count * tile.stride;
  }
}

// body<halves>(), of a block's half vectors.
template <class D, class Body>
DDPM_FAST_INLINE void with_halves(int64_t halves, const Body& body) {
  if (halves == 1) return body.template operator()<1>();
  if (halves == 2) return body.template operator()<2>();
  if (halves == 3) return body.template operator()<3>();
  if (halves == 4) return body.template operator()<4>();
  if constexpr (D::kMostVectors > 2) {
    if (halves == 6) return body.template operator()<6>();
    if (halves == 8) return body.template operator()<8>();
  }
}

// One sample's outputs of one block, from `channel` on.
template <class D, int kHalves>
struct ConvRun {
  using T = typename D::Element;
  static constexpr int64_t kMost = most_pixels<D, kHalves>();
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
      const int64_t stop = end < (y + rows) * width ? end : (y + rows) * width;
      run_part({strips.strip(x, y, rows, memory), y}, begin, stop);
      begin = stop;
    }
  }

 private:
  struct Part {
    Strip<T> strip;
    int64_t y;  // of its first row
  };

  // Pixels [begin, end). Where all pixels of a tile see the same padding, it costs nothing: so the
  // first and the last columns are cut from top to bottom, and all else from left to right.
  void run_part(const Part& part, int64_t begin, int64_t end) const {
    const int64_t width = args.shape.out_size[1];
    int64_t top = begin / width, bottom = (end - 1) / width + 1, left = 0, right = width;
    while (top < bottom && sees_padding(0, top)) ++top;
    while (top < bottom && sees_padding(0, bottom - 1)) --bottom;
    while (left < right && sees_padding(1, left)) ++left;
    while (left < right && sees_padding(1, right - 1)) --right;
    const bool is_cut = bottom - top >= kFewest && right - left >= kFewest;
    for (int64_t y = begin / width; y * width < end; ++y) {
      const bool whole = !is_cut || y < top || y >= bottom;
      const int64_t first = whole ? 0 : left, last = whole ? width : right;
      const int64_t from = within(begin - y * width, first, last);
      line(part, y, from, within(end - y * width, first, last) - from, false);
    }
    for (int64_t x = 0; is_cut && x < width; ++x) {
      if (x >= left && x < right) continue;
      const int64_t from = within((begin - x + width - 1) / width, top, bottom);
      line(part, from, x, within((end - x + width - 1) / width, top, bottom) - from, true);
    }
  }

  // `count` pixels from (y, x) on, to the right or down, in as few tiles as there can be.
  void line(const Part& part, int64_t y, int64_t x, int64_t count, bool down) const {
    const ConvShape& shape = args.shape;
    const int64_t tap = strips.depth * (kHalves * D::kLanes / 2), pixel = part.strip.pixel;
    Tile<D> tile;
    tile.pixel = down ? shape.stride[0] * part.strip.row : shape.stride[1] * pixel;
    tile.row = part.strip.row;
    tile.weight_row = shape.kernel[1] * tap;
    tile.bias = args.bias == nullptr ? nullptr : args.bias + channel;
    tile.stride = down ? args.out_row : args.out_pixel;
    tile.channels = shape.out_channels - channel;
    const int64_t tiles = (count + kMost - 1) / kMost;
    for (int64_t begin = 0, left = tiles, pixels; left > 0; begin += pixels, --left) {
      pixels = (count - begin + left - 1) / left;
      const int64_t at[] = {down ? y + begin : y, down ? x : x + begin};
      const int64_t end[] = {down ? at[0] + pixels - 1 : y, down ? x : at[1] + pixels - 1};
      const int64_t row = first_tap(0, end[0]), column = first_tap(1, end[1]);
      tile.rows = last_tap(0, at[0]) - row;
      tile.steps = (last_tap(1, at[1]) - column) * strips.depth / D::kDepth;
      tile.x = part.strip.first + ((at[0] - part.y) * shape.stride[0] + row) * tile.row +
               (at[1] * shape.stride[1] + column) * pixel;
      tile.weight = static_cast<const typename D::Stored*>(args.weight) +
                    channel * shape.kernel[0] * shape.kernel[1] * strips.depth +
                    row * tile.weight_row + column * tap;
      const int64_t place =
          sample * args.out_sample + at[0] * args.out_row + at[1] * args.out_pixel + channel;
      tile.out = static_cast<T*>(args.out) + place;
      tile.residual =
          args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + place;
      run_tile_of<D, kHalves, kMost>(pixels, tile);
    }
  }

  // Of the kernel's rows (side 0) or columns, those that do not lie in the padding at output i.
  int64_t first_tap(int side, int64_t i) const {
    const ConvShape& shape = args.shape;
    return within(shape.padding[side] - i * shape.stride[side], 0, shape.kernel[side]);
  }
  int64_t last_tap(int side, int64_t i) const {
    const ConvShape& shape = args.shape;
    return within(shape.size[side] + shape.padding[side] - i * shape.stride[side], 0,
                  shape.kernel[side]);
  }
  bool sees_padding(int side, int64_t i) const {
    return first_tap(side, i) > 0 || last_tap(side, i) < args.shape.kernel[side];
  }
};

// The range is in pixels of the output: of all samples of a block, then of the next block.
template <class D>
void conv2d(const ConvArgs& args, int64_t begin, int64_t end, void* memory) {
  const ConvBlocks<D> blocks(args.shape.out_channels);
  const int64_t pixels = args.shape.out_size[0] * args.shape.out_size[1];
  while (begin < end) {
    const int64_t run = begin / pixels, first = begin - run * pixels;
    const int64_t last = end - run * pixels < pixels ? end - run * pixels : pixels;
    const int64_t block = run / args.samples;
    with_halves<D>(blocks.halves(block), [&]<int kHalves>() {
      ConvRun<D, kHalves>(args, run % args.samples, block * blocks.width)
          .run(first, last, static_cast<typename D::Element*>(memory));
    });
    begin = run * pixels + last;
  }
}

template <class D>
constexpr ConvKernels conv_kernels(const char* name) {
  using T = typename D::Element;
  return {name,
          dtype_of(typename D::Stored{}),
          kGrainProducts,
          packed_elements<D>,
          [](const ConvShape& shape, const float* weight, void* packed) {
            pack_conv2d<D>(shape, weight, static_cast<typename D::Stored*>(packed));
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
