// AMX with BF16: attention of bfloat16, both of whose products are of tiles.
//
// A score is summed over 32 channels at a time, and a result over 32 positions, as the instruction
// adds them.
#include "amx_tiles.h"
#include "attention_loop.h"
#include "avx512.h"
#include "avx512_bf16.h"

namespace ddpm_fast {
namespace {

// What attention_loop.h packs for these can be read as tiles, two beside each other.
struct TileWeights : Avx512Bf16Sums {
  using Element = BFloat16;
  using Stored = BFloat16;
  static constexpr int kDepth = kTileDepth, kMostVectors = 2;
  static constexpr bool kHasHalves = false;
};

// A thread's, which gives its tiles back at its end: else each change of threads would save them.
class TileProducts {
 public:
  static constexpr int64_t kQueries = 2 * kTileRows;

  TileProducts() = default;
  TileProducts(const TileProducts&) = delete;
  ~TileProducts() { _tile_release(); }

  // See VectorProducts.
  template <class Out>
  void multiply(const BFloat16* x, int64_t pixel, int64_t rows, int64_t depth,
                const BFloat16* weight, int64_t channels, Out* out, int64_t stride) {
    const ConvBlocks<TileWeights> blocks(channels);
    take_rows(rows);
    written(x);  // and the weights
    const int64_t steps = padded_depth<TileWeights>(depth) / kTileDepth;
    TileOperands operands{};
    operands.x[0] = x;
    operands.x[1] = rows > kTileRows ? x + kTileRows * pixel : x;
    operands.stride = pixel * int64_t{sizeof *x};
    operands.lane = 2 * kTileLanes;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const Sums<Out> sums{out + block * blocks.width, stride, rows,
                           channels - block * blocks.width};
      const int64_t lanes = blocks.lanes(block) / kTileLanes;
      operands.weight = weight;
      operands.row = lanes * kTileRow;
      if (rows > kTileRows) {
        lanes > 1 ? run<2, 2>(operands, steps, sums) : run<2, 1>(operands, steps, sums);
      } else {
        lanes > 1 ? run<1, 2>(operands, steps, sums) : run<1, 1>(operands, steps, sums);
      }
      weight += lanes * steps * kTileElements;
    }
  }

 private:
  template <class Out>
  struct Sums {
    Out* out;
    int64_t stride, rows, channels;
  };

  // No tile reaches over the last row.
  void take_rows(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    configure(rows < kTileRows ? rows : kTileRows, rows > kTileRows ? rows - kTileRows : kTileRows);
  }

  template <int kTiles, int kLanes, class Out>
  void run(const TileOperands& operands, int64_t steps, const Sums<Out>& sums) const {
    zero_sums<kTiles, kLanes>();
    add_products<kTiles, kLanes>(operands, steps);
    store<kTiles, kLanes>(sums);
  }
  // Scores: rows of whole vectors.
  template <int kTiles, int kLanes>
  void store(const Sums<float>& sums) const {
    store_sums<kTiles, kLanes>(sums.out, sums.stride * int64_t{sizeof(float)},
                               kTileRows * sums.stride, kTileLanes);
  }
  template <int kTiles, int kLanes>
  void store(const Sums<BFloat16>& sums) const {
    using D = TileWeights;
    constexpr int64_t kRow = kLanes * kTileLanes;
    alignas(kTileRow) float rows[kTiles * kTileRows * kRow];
    store_sums<kTiles, kLanes>(rows, kLanes * kTileRow, kTileRows * kRow, kTileLanes);
    for (int64_t r = 0; r < sums.rows; ++r) {
      BFloat16* out = sums.out + r * sums.stride;
      DDPM_FAST_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t first = lane * kTileLanes;
        D::store(out + first, D::load(rows + r * kRow + first, kTileLanes), sums.channels - first);
      }
    }
  }

  int64_t rows_ = 0;  // that the tiles are configured for
};

}  // namespace

// Softmax, which is left, takes about as long as these products.
const AttentionKernels kAmxBf16Attention =
    attention_kernels<TileWeights, Avx512, TileProducts>(8 * kGrainProducts);

}  // namespace ddpm_fast
