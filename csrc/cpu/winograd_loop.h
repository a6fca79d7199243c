// Convolution with a kernel of 3 x 3 and stride 1 by Winograd's algorithm F(4 x 4, 3 x 3): Lavin
// and Gray, "Fast algorithms for convolutional neural networks", 2015, equation (8).
//
// A tile of 4 x 4 outputs is A^T s A, where s, of 6 x 6 places, is the sum over the input channels
// of (G g G^T) * (B^T d B), element by element: g is the kernel, d the 6 x 6 inputs that the tile
// sees. These are 36 products for 16 outputs instead of 144. At each place the sums are those of a
// 1 x 1 convolution over tiles, see conv_loop.h. All is float32; the layer alone decides the bits.
//
// Written once over D, the float32 products of an instruction set, as conv_loop.h, and T and Out,
// the elements of input and output. D::Stored, the weights', may have less range than float32: each
// output channel's are then kept as multiples of a power of two.
#pragma once

#include "conv_loop.h"
#include "winograd_layout.h"

namespace ddpm_fast {
namespace {

template <class D, class T, class Out>
struct WinogradRun {
  using F = typename D::F;
  using Stored = typename D::Stored;
  const ConvArgs& args;
  WinogradLayout<D> layout;
  float *input, *sums;
  T* zeros;

  WinogradRun(const ConvArgs& arguments, float* memory)
      : args(arguments),
        layout(args.shape),
        input(memory),
        sums(input + kPlaces * layout.input_place()),
        zeros(reinterpret_cast<T*>(sums + kPlaces * layout.sums_place())) {
    __builtin_memset(zeros, 0, layout.depth * sizeof *zeros);
  }

  // Tiles [begin, end) of a strip that begins with tile `first`; tiles are counted over all
  // samples.
  void transform_inputs(int64_t first, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) transform_tile(first + i, input + i * layout.depth);
  }
  void run_block(int64_t block, int64_t first, int64_t begin, int64_t end) const {
    if (begin == end) return;
    with_halves<D>(layout.blocks.halves(block),
                   [&]<int kHalves>() { add_products<kHalves>(block, begin, end); });
    for (int64_t i = begin; i < end; ++i)
      finish_tile(first + i, sums + i * layout.blocks.width, block);
  }

 private:
  struct Place {
    int64_t sample, row, column;  // of a tile's first output
  };
  Place place(int64_t tile) const {
    const int64_t sample = tile / layout.tiles(), i = tile - sample * layout.tiles();
    return {sample, i / layout.tiles_across * kTile, i % layout.tiles_across * kTile};
  }
  const Stored* block_of(int64_t block) const {
    return static_cast<const Stored*>(args.weight) + layout.packed_before(block);
  }

  void transform_tile(int64_t tile, float* to) const {
    const ConvShape& shape = args.shape;
    const Place at = place(tile);
    const int64_t channels = shape.in_channels, place = layout.input_place();
    const T* x =
        static_cast<const T*>(args.x) + at.sample * shape.size[0] * shape.size[1] * channels;
    const T* pixels[kSide][kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      for (int64_t j = 0; j < kSide; ++j) {
        const int64_t row = at.row + i - shape.padding[0],
                      column = at.column + j - shape.padding[1];
        const bool exists =
            row >= 0 && row < shape.size[0] && column >= 0 && column < shape.size[1];
        pixels[i][j] = exists ? x + (row * shape.size[1] + column) * channels : zeros;
      }
    }
    for (int64_t c = 0; c < channels; c += D::kLanes) {
      F columns[kSide][kSide], row[kSide];
      DDPM_FAST_UNROLL
      for (int j = 0; j < kSide; ++j) {
        DDPM_FAST_UNROLL
        for (int i = 0; i < kSide; ++i) columns[j][i] = D::load(pixels[i][j] + c, channels - c);
        transform_input<D>(columns[j]);
      }
      DDPM_FAST_UNROLL
      for (int i = 0; i < kSide; ++i) {
        DDPM_FAST_UNROLL
        for (int j = 0; j < kSide; ++j) row[j] = columns[j][i];
        transform_input<D>(row);
        DDPM_FAST_UNROLL
        for (int j = 0; j < kSide; ++j) D::store(to + (i * kSide + j) * place + c, row[j]);
      }
    }
  }

  template <int kHalves>
  void add_products(int64_t block, int64_t begin, int64_t end) const {
    constexpr int64_t kBlockLanes = kHalves * D::kLanes / 2;
    const Stored* weight = block_of(block) + layout.scales(kBlockLanes);
    Tile<D> tile{};
    tile.pixel = layout.depth;
    tile.rows = 1;
    tile.steps = args.shape.in_channels;
    tile.stride = layout.blocks.width;
    tile.channels = kBlockLanes;
    for (int p = 0; p < kPlaces; ++p) {
      tile.weight = weight + p * layout.weight_place(kBlockLanes);
      tile.x = input + p * layout.input_place() + begin * tile.pixel;
      tile.out = sums + p * layout.sums_place() + begin * tile.stride;
      run_tiles<D, kHalves>(end - begin, tile);
    }
  }

  // A^T s A, with scales, bias and residual.
  void finish_tile(int64_t tile, const float* s, int64_t block) const {
    const ConvShape& shape = args.shape;
    const Place at = place(tile);
    const int64_t place = layout.sums_place();
    const int64_t rows = within(shape.out_size[0] - at.row, 0, kTile);
    const int64_t columns = within(shape.out_size[1] - at.column, 0, kTile);
    const int64_t first = block * layout.blocks.width, left = shape.out_channels - first;
    const int64_t channels = within(layout.blocks.lanes(block), 0, left);
    for (int64_t c = 0; c < channels; c += D::kLanes) {
      const int64_t count = channels - c;
      F sum[kSide][kSide], row[kSide];  // sum: by column
      DDPM_FAST_UNROLL
      for (int j = 0; j < kSide; ++j) {
        DDPM_FAST_UNROLL
        for (int i = 0; i < kSide; ++i) {
          sum[j][i] = D::load(s + (i * kSide + j) * place + c, count);
        }
        transform_sums<D>(sum[j]);
      }
      const F bias = args.bias == nullptr ? D::zero() : D::load(args.bias + first + c, count);
      F scale = D::set(1.0f);
      if constexpr (WinogradLayout<D>::kIsScaled) {
        scale = D::load(reinterpret_cast<const float*>(block_of(block)) + c, count);
      }
      DDPM_FAST_UNROLL
      for (int i = 0; i < kTile; ++i) {
        if (i >= rows) break;
        DDPM_FAST_UNROLL
        for (int j = 0; j < kSide; ++j) row[j] = sum[j][i];
        transform_sums<D>(row);
        const int64_t start = at.sample * args.out_sample + (at.row + i) * args.out_row +
                              at.column * args.out_pixel + first + c;
        Out* out = static_cast<Out*>(args.out) + start;
        DDPM_FAST_UNROLL
        for (int j = 0; j < kTile; ++j) {
          if (j >= columns) break;
          F y = D::fma(row[j], scale, bias);
          if (args.residual != nullptr) {
            const Out* residual = static_cast<const Out*>(args.residual) + start;
            y = D::add(y, D::load(residual + j * args.out_pixel, count));
          }
          D::store(out + j * args.out_pixel, y, count);
        }
      }
    }
  }
};

// The range is in tiles of a block: of the first strip's all, block after block, then the next's.
template <class D, class T, class Out>
void winograd_conv2d(const ConvArgs& args, int64_t begin, int64_t end, void* memory) {
  const WinogradRun<D, T, Out> run(args, static_cast<float*>(memory));
  each_strip(
      begin, end, args.samples * run.layout.tiles(), run.layout.strip, run.layout.blocks.count,
      [&](int64_t first, int64_t from, int64_t to) { run.transform_inputs(first, from, to); },
      [&](int64_t block, int64_t first, int64_t from, int64_t to) {
        run.run_block(block, first, from, to);
      });
}

// Of one or two kinds of results.
template <class D, class T, class Out = T, class Other = Out>
constexpr ConvKernels winograd_kernels(const char* name) {
  return {name,
          dtype_of(typename D::Stored{}),
          kGrainProducts,
          packed_winograd_elements<D>,
          [](const ConvShape& shape, const float* weight, void* packed) {
            pack_winograd<D>(shape, weight, static_cast<typename D::Stored*>(packed));
          },
          [](const ConvArgs& args) {
            const WinogradLayout<D> layout(args.shape);
            return layout.blocks.count * args.samples * layout.tiles();
          },
          [](const ConvShape& shape) {
            return WinogradLayout<D>(shape).memory_floats() * int64_t{sizeof(float)};
          },
          [](const ConvArgs& args, int64_t begin, int64_t end, void* memory) {
            if (args.out_dtype == dtype_of(Out{})) {
              return winograd_conv2d<D, T, Out>(args, begin, end, memory);
            }
            winograd_conv2d<D, T, Other>(args, begin, end, memory);
          }};
}

}  // namespace
}  // namespace ddpm_fast
