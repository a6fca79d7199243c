// Convolution with kernels of 3 x 3 and stride 1 by Winograd's algorithm F(m x m, 3 x 3): Lavin and
// Gray, "Fast algorithms for convolutional neural networks", 2015, equation (8). A tile of m x m
// outputs is A^T [sum over the channels of (G g G^T) * (B^T d B)] A, where d is the n x n inputs
// that it sees, n = m + 2, and * multiplies element by element: n^2 / m^2 products for each output
// and input channel instead of 9. The sums over the channels, n^2 of them, each its own place of
// the tile, are those of conv_loop.h. All is float32; the layer alone decides an output's bits.
//
// Written over D, the float32 products of an instruction set, as conv_loop.h, and T, the elements of
// input and output. D::Stored may have less range than float32: each output channel's transformed
// weights are then stored as multiples of a power of two.
#pragma once

#include "conv_loop.h"

namespace ddpm_fast {
namespace {

// Bytes of the transformed input that is in use at once.
constexpr int64_t kWinogradBytes = int64_t{1} << 20;

// The matrices that evaluate polynomials at 0, a, -a, ..., and at infinity.
template <int m>
struct WinogradMatrices;

template <>
struct WinogradMatrices<2> {
  static constexpr int kPlaces = 4;
  static constexpr double kKernel[4][3] = {{-1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};

  template <class D, class F>
  static DDPM_FAST_INLINE void transform_input(F (&d)[4]) {
    const F d1 = d[1], d2 = d[2];
    d[0] = D::sub(d2, d[0]);
    d[1] = D::add(d2, d1);
    d[2] = D::sub(d2, d1);
    d[3] = D::sub(d[3], d1);
  }
  template <class D, class F>
  static DDPM_FAST_INLINE void transform_sums(F (&s)[4]) {
    const F odd = D::sub(s[1], s[2]);
    s[0] = D::add(s[0], D::add(s[1], s[2]));
    s[1] = D::add(odd, s[3]);
  }
};

template <>
struct WinogradMatrices<4> {
  static constexpr int kPlaces = 6;
  // Of the points tried, those with the smallest error; they and their products are exact.
  static constexpr double a = 0.625, b = 1.5, a2 = a * a, b2 = b * b;
  static constexpr double kOfA = 1 / (2 * a2 * (a2 - b2)), kOfB = 1 / (2 * b2 * (b2 - a2));
  static constexpr double kKernel[6][3] = {{1 / (a2 * b2), 0, 0},
                                           {kOfA, kOfA * a, kOfA * a2},
                                           {kOfA, -kOfA * a, kOfA * a2},
                                           {kOfB, kOfB * b, kOfB * b2},
                                           {kOfB, -kOfB * b, kOfB * b2},
                                           {0, 0, 1}};

  template <class D, class F>
  static DDPM_FAST_INLINE void transform_input(F (&d)[6]) {
    const F minus_a2 = D::set(-a2), minus_b2 = D::set(-b2);
    const F a2b2 = D::set(a2 * b2), minus_both = D::set(-(a2 + b2));
    const F even_a = D::fma(d[2], minus_b2, d[4]), odd_a = D::fma(d[1], minus_b2, d[3]);
    const F even_b = D::fma(d[2], minus_a2, d[4]), odd_b = D::fma(d[1], minus_a2, d[3]);
    d[0] = D::fma(d[0], a2b2, D::fma(d[2], minus_both, d[4]));
    d[5] = D::fma(d[1], a2b2, D::fma(d[3], minus_both, d[5]));
    d[1] = D::fma(odd_a, D::set(a), even_a);
    d[2] = D::fma(odd_a, D::set(-a), even_a);
    d[3] = D::fma(odd_b, D::set(b), even_b);
    d[4] = D::fma(odd_b, D::set(-b), even_b);
  }
  template <class D, class F>
  static DDPM_FAST_INLINE void transform_sums(F (&s)[6]) {
    const F even_a = D::add(s[1], s[2]), odd_a = D::sub(s[1], s[2]);
    const F even_b = D::add(s[3], s[4]), odd_b = D::sub(s[3], s[4]);
    s[0] = D::add(s[0], D::add(even_a, even_b));
    s[1] = D::fma(odd_b, D::set(b), D::mul(odd_a, D::set(a)));
    s[2] = D::fma(even_b, D::set(b2), D::mul(even_a, D::set(a2)));
    s[3] = D::fma(odd_b, D::set(b * b2), D::fma(odd_a, D::set(a * a2), s[5]));
  }
};

// How the weights, the transformed input and the sums lie in memory: the weights as (block, place,
// I, lane), each block after its channels' scales, the others as (place, tile, channel).
template <class D, int m>
struct WinogradLayout {
  static constexpr int kSide = WinogradMatrices<m>::kPlaces, kPlaces = kSide * kSide;
  static constexpr int64_t kLine = 64 / sizeof(float);
  // Elements of a scale; 0: there is none.
  static constexpr int64_t kScale = sizeof(float) / sizeof(typename D::Stored) / 2 * 2;
  const ConvShape& shape;
  ConvBlocks<D> blocks;
  int64_t depth;                     // of a tile's transformed input
  int64_t tiles_down, tiles_across;  // of a sample
  int64_t strip;                     // tiles that are transformed together

  explicit WinogradLayout(const ConvShape& s)
      : shape(s),
        blocks(s.out_channels),
        depth((s.in_channels + D::kLanes - 1) / D::kLanes * D::kLanes),
        tiles_down((s.out_size[0] + m - 1) / m),
        tiles_across((s.out_size[1] + m - 1) / m) {
    const int64_t fitting = kWinogradBytes / (kPlaces * depth * int64_t{sizeof(float)});
    strip = fitting < D::kSums / 2 ? D::kSums / 2 : fitting;
  }
  int64_t tiles() const { return tiles_down * tiles_across; }
  // From place to place, which must not fall on the same lines of the first-level cache.
  int64_t input_place() const { return strip * depth + kLine; }
  int64_t sums_place() const { return strip * blocks.width + kLine; }
  int64_t weight_place(int64_t lanes) const { return shape.in_channels * lanes; }
  // The input, the sums, and a pixel of zeros.
  int64_t elements() const { return kPlaces * (input_place() + sums_place()) + depth; }

  int64_t packed_elements(int64_t lanes) const {
    return lanes * kScale + kPlaces * weight_place(lanes);
  }
  // All blocks but the last are as wide as the first.
  int64_t block_at(int64_t block) const { return block * packed_elements(blocks.width); }
};

// G g G^T of the kernel of output channel o and input channel i.
template <int m, class T>
void transform_kernel(const T* g, double* to) {
  using Matrices = WinogradMatrices<m>;
  constexpr int kSide = Matrices::kPlaces;
  for (int i = 0; i < kSide; ++i) {
    double row[3] = {};
    for (int k = 0; k < 9; ++k) row[k % 3] += Matrices::kKernel[i][k / 3] * to_float(g[k]);
    for (int j = 0; j < kSide; ++j) {
      const double* of = Matrices::kKernel[j];
      to[i * kSide + j] = row[0] * of[0] + row[1] * of[1] + row[2] * of[2];
    }
  }
}

// The power of two that brings x near to float16's largest, but for what is not finite or 0.
inline double scale_of(double x) {
  if (!(x > 0.0 && x < 0x1p128)) return 1.0;
  int exponent;
  __builtin_frexp(x, &exponent);
  return __builtin_ldexp(1.0, exponent - 15);
}

// weight: (O, I, 3, 3).
template <class D, class T, int m>
void pack_winograd(const ConvShape& shape, const T* weight, typename D::Stored* packed) {
  using Layout = WinogradLayout<D, m>;
  const Layout layout(shape);
  const int64_t channels = shape.in_channels;
  for (int64_t block = 0; block < layout.blocks.count; ++block) {
    const int64_t lanes = layout.blocks.lanes(block), place = layout.weight_place(lanes);
    typename D::Stored *scales = packed + layout.block_at(block), *to = scales + lanes * Layout::kScale;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t o = block * layout.blocks.width + lane;
      const bool exists = o < shape.out_channels;
      double transformed[Layout::kPlaces] = {}, largest = 0.0;
      for (int64_t i = 0; Layout::kScale > 0 && exists && i < channels; ++i) {
        transform_kernel<m>(weight + (o * channels + i) * 9, transformed);
        for (double x : transformed) largest = __builtin_fabs(x) > largest ? __builtin_fabs(x) : largest;
      }
      const float scale = Layout::kScale > 0 ? static_cast<float>(scale_of(largest)) : 1.0f;
      __builtin_memcpy(scales + lane * Layout::kScale, &scale,
                       Layout::kScale * sizeof(typename D::Stored));
      for (int64_t i = 0; i < channels; ++i) {
        if (exists) transform_kernel<m>(weight + (o * channels + i) * 9, transformed);
        for (int p = 0; p < Layout::kPlaces; ++p) {
          from_float(static_cast<float>(transformed[p] / scale), to + p * place + i * lanes + lane);
        }
      }
    }
  }
}

template <class D, class T, int m>
struct WinogradRun {
  using Layout = WinogradLayout<D, m>;
  using Matrices = WinogradMatrices<m>;
  using F = typename D::F;
  using Stored = typename D::Stored;
  static constexpr int kSide = Layout::kSide, kPlaces = Layout::kPlaces;
  const ConvArgs& args;
  Layout layout;
  float *input, *sums;
  T* zeros;

  WinogradRun(const ConvArgs& a, float* memory)
      : args(a),
        layout(a.shape),
        input(memory),
        sums(memory + kPlaces * layout.input_place()),
        zeros(reinterpret_cast<T*>(sums + kPlaces * layout.sums_place())) {
    __builtin_memset(zeros, 0, layout.depth * sizeof *zeros);
  }

  const Stored* block_of(int64_t block) const {
    return static_cast<const Stored*>(args.weight) + layout.block_at(block);
  }

  // The first row and column of a tile's outputs, and its sample.
  struct Place {
    int64_t sample, row, column;
  };
  Place place(int64_t tile) const {
    const int64_t in_sample = tile % layout.tiles();
    return {tile / layout.tiles(), in_sample / layout.tiles_across * m,
            in_sample % layout.tiles_across * m};
  }

  // B^T d B of one tile, which is the strip's `to`th.
  void transform_input(int64_t tile, int64_t to) const {
    const ConvShape& shape = args.shape;
    const Place at = place(tile);
    const int64_t channels = shape.in_channels;
    const T* x =
        static_cast<const T*>(args.x) + at.sample * shape.size[0] * shape.size[1] * channels;
    const T* pixels[kSide][kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      for (int64_t j = 0; j < kSide; ++j) {
        const int64_t row = at.row + i - shape.padding[0], column = at.column + j - shape.padding[1];
        const bool exists =
            row >= 0 && row < shape.size[0] && column >= 0 && column < shape.size[1];
        pixels[i][j] = exists ? x + (row * shape.size[1] + column) * channels : zeros;
      }
    }
    float* out = input + to * layout.depth;
    const int64_t place = layout.input_place();
    for (int64_t c = 0; c < channels; c += D::kLanes) {
      F d[kSide][kSide];  // by column
      DDPM_FAST_UNROLL
      for (int j = 0; j < kSide; ++j) {
        DDPM_FAST_UNROLL
        for (int i = 0; i < kSide; ++i) d[j][i] = D::load(pixels[i][j] + c, channels - c);
        Matrices::template transform_input<D>(d[j]);
      }
      DDPM_FAST_UNROLL
      for (int i = 0; i < kSide; ++i) {
        F row[kSide];
        DDPM_FAST_UNROLL
        for (int j = 0; j < kSide; ++j) row[j] = d[j][i];
        Matrices::template transform_input<D>(row);
        DDPM_FAST_UNROLL
        for (int j = 0; j < kSide; ++j) D::store(out + (i * kSide + j) * place + c, row[j]);
      }
    }
  }

  // The strip's tiles [begin, end): their sums of one block.
  template <int kHalves>
  void add_products(int64_t block, int64_t begin, int64_t end) const {
    constexpr int kSumsEach = kHalves / 2 + kHalves % 2;
    constexpr int64_t kMost =
        D::kSums / kSumsEach < kMostPixels ? D::kSums / kSumsEach : kMostPixels;
    Tile<D> tile{};
    tile.pixel = layout.depth;
    tile.rows = 1;
    tile.steps = args.shape.in_channels;
    tile.stride = layout.blocks.width;
    tile.channels = kHalves * D::kLanes / 2;
    const Stored* weight = block_of(block) + layout.blocks.lanes(block) * Layout::kScale;
    for (int p = 0; p < kPlaces; ++p) {
      tile.weight = weight + p * layout.weight_place(layout.blocks.lanes(block));
      const float* x = input + p * layout.input_place();
      float* out = sums + p * layout.sums_place();
      const int64_t groups = (end - begin + kMost - 1) / kMost;
      for (int64_t at = begin, left = groups, count; left > 0; at += count, --left) {
        count = (end - at + left - 1) / left;
        tile.x = x + at * tile.pixel;
        tile.out = out + at * tile.stride;
        run_tile_of<D, kHalves, kMost>(count, tile);
      }
    }
  }

  // A^T s A of one tile's block, with bias and residual.
  void finish(int64_t tile, int64_t from, int64_t block) const {
    const ConvShape& shape = args.shape;
    const Place at = place(tile);
    const int64_t rows = shape.out_size[0] - at.row < m ? shape.out_size[0] - at.row : m;
    const int64_t columns = shape.out_size[1] - at.column < m ? shape.out_size[1] - at.column : m;
    const int64_t first = block * layout.blocks.width, lanes = layout.blocks.lanes(block);
    const int64_t left = shape.out_channels - first;
    const int64_t pixel =
        (at.sample * shape.out_size[0] + at.row) * shape.out_size[1] + at.column;
    const float* s = sums + from * layout.blocks.width;
    for (int64_t c = 0; c < lanes && c < left; c += D::kLanes) {
      const int64_t count = (lanes < left ? lanes : left) - c;
      F sum[kSide][kSide];  // by column
      DDPM_FAST_UNROLL
      for (int j = 0; j < kSide; ++j) {
        DDPM_FAST_UNROLL
        for (int i = 0; i < kSide; ++i) {
          sum[j][i] = D::load(s + (i * kSide + j) * layout.sums_place() + c, count);
        }
        Matrices::template transform_sums<D>(sum[j]);
      }
      const F bias = args.bias == nullptr ? D::zero() : D::load(args.bias + first + c, count);
      F scale = D::set(1.0f);
      if constexpr (Layout::kScale > 0) {
        scale = D::load(reinterpret_cast<const float*>(block_of(block)) + c, count);
      }
      DDPM_FAST_UNROLL
      for (int i = 0; i < m; ++i) {
        if (i >= rows) break;
        F row[kSide];
        DDPM_FAST_UNROLL
        for (int j = 0; j < kSide; ++j) row[j] = sum[j][i];
        Matrices::template transform_sums<D>(row);
        DDPM_FAST_UNROLL
        for (int j = 0; j < m; ++j) {
          if (j >= columns) break;
          const int64_t place =
              (pixel + i * shape.out_size[1] + j) * shape.out_channels + first + c;
          F y = D::fma(row[j], scale, bias);
          if (args.residual != nullptr) {
            y = D::add(y, D::load(static_cast<const T*>(args.residual) + place, count));
          }
          D::store(static_cast<T*>(args.out) + place, y, count);
        }
      }
    }
  }

  template <int kHalves>
  static void run_products(const WinogradRun& run, int64_t block, int64_t begin, int64_t end) {
    if constexpr (kHalves <= 2 * D::kMostVectors) run.add_products<kHalves>(block, begin, end);
  }

  // The tiles [begin, end) of a strip that begins with tile `first`.
  void run_block(int64_t block, int64_t first, int64_t begin, int64_t end) const {
    using Products = void (*)(const WinogradRun&, int64_t block, int64_t begin, int64_t end);
    constexpr Products kProducts[] = {
        nullptr, run_products<1>, run_products<2>, run_products<3>, run_products<4>,
        nullptr, run_products<6>, nullptr,         run_products<8>};
    kProducts[layout.blocks.halves(block)](*this, block, begin, end);
    for (int64_t i = begin; i < end; ++i) finish(first + i, i, block);
  }
};

// The range is in tiles of one block: all of a strip's, of one block after another; strip by strip.
template <class D, class T, int m>
void winograd_conv2d(const ConvArgs& args, int64_t begin, int64_t end, void* memory) {
  const WinogradRun<D, T, m> run(args, static_cast<float*>(memory));
  const int64_t tiles = args.samples * run.layout.tiles(), blocks = run.layout.blocks.count;
  while (begin < end) {
    const int64_t first = begin / (run.layout.strip * blocks) * run.layout.strip;
    const int64_t count = tiles - first < run.layout.strip ? tiles - first : run.layout.strip;
    const int64_t from = begin - first * blocks;
    const int64_t to = end - first * blocks < count * blocks ? end - first * blocks : count * blocks;
    const bool is_one_block = from / count == (to - 1) / count;
    const int64_t low = is_one_block ? from % count : 0;
    const int64_t high = is_one_block ? (to - 1) % count + 1 : count;
    for (int64_t i = low; i < high; ++i) run.transform_input(first + i, i);
    for (int64_t block = from / count; block * count < to; ++block) {
      run.run_block(block, first, within(from - block * count, 0, count),
                    within(to - block * count, 0, count));
    }
    begin = first * blocks + to;
  }
}

template <class D, class T, int m>
constexpr ConvKernels winograd_kernels(const char* name) {
  return {name,
          dtype_of(typename D::Stored{}),
          [](const ConvShape& shape) {
            const WinogradLayout<D, m> layout(shape);
            const int64_t last = layout.blocks.count - 1;
            return layout.block_at(last) + layout.packed_elements(layout.blocks.lanes(last));
          },
          [](const ConvShape& shape, const void* weight, void* packed) {
            pack_winograd<D, T, m>(shape, static_cast<const T*>(weight),
                                   static_cast<typename D::Stored*>(packed));
          },
          [](const ConvArgs& args) {
            const WinogradLayout<D, m> layout(args.shape);
            return layout.blocks.count * args.samples * layout.tiles();
          },
          [](const ConvShape& shape) {
            return static_cast<int64_t>(WinogradLayout<D, m>(shape).elements() * sizeof(float));
          },
          winograd_conv2d<D, T, m>};
}

}  // namespace
}  // namespace ddpm_fast
