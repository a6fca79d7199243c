// AMX with BF16: convolutions of bfloat16 as products of tiles.
//
// A tile of the input (amx_tiles.h) is 32 channels of the 16 pixels that a tap of the kernel sees
// at 16 neighbouring outputs, which are rows of memory at one distance (amx_layout.h); times a tile
// of weights it adds to the sums of these outputs' 16 channels.
//
// An output is the sum over the kernel's rows, in a row over its columns, in a column over the
// input channels, as the instruction adds them: the layer alone decides its bits.
#include "amx_layout.h"
#include "amx_tiles.h"

namespace ddpm_fast {
namespace {

using D = Avx512Bf16Sums;

template <class T, class Out>
struct AmxRun {
  const ConvArgs& args;
  AmxLayout<T> layout;
  BFloat16* memory;
  bool is_copied;

  AmxRun(const ConvArgs& arguments, void* bytes)
      : args(arguments),
        layout(args.shape),
        memory(static_cast<BFloat16*>(bytes)),
        is_copied(layout.is_copied()) {}

  int64_t outputs() const { return args.samples * layout.out_rows * layout.out_row; }

  // Of the strip from output `first` on: what its outputs [begin, end) see.
  void prepare(int64_t first, int64_t begin, int64_t end) const {
    if (!is_copied) return;
    const int64_t row = layout.out_row;
    layout.copy(args, first / row, begin / row, tiles_of(end, row), memory);
    written(memory);
  }

  // Outputs [begin, end) of the strip from `first` on.
  void run_block(int64_t block, int64_t first, int64_t begin, int64_t end) const {
    const int64_t left = args.shape.out_channels - block * kBlockTiles * kTileLanes;
    end += first;
    // Where nothing is copied, the last tile's rows must not reach over the end of x.
    const int64_t whole = is_copied ? end : outputs() - kTileRows + 1;
    for (int64_t i = layout.next(first + begin); i < end;) {
      const int64_t second = layout.next(i + kTileRows);
      const bool is_whole = i < whole, are_two = second < end && second < whole;
      if (!is_whole) configure(outputs() - i, kTileRows);
      const Outputs at{{i, second}, first, end, block};
      if (left > kTileLanes) {
        are_two ? run_tiles<2, 2>(at) : run_tiles<1, 2>(at);
      } else {
        are_two ? run_tiles<2, 1>(at) : run_tiles<1, 1>(at);
      }
      if (!is_whole) configure(kTileRows, kTileRows);
      i = are_two ? layout.next(second + kTileRows) : second;
    }
  }

 private:
  struct Outputs {
    int64_t tiles[2];    // their first outputs
    int64_t first, end;  // of the strip; of what is to be done
    int64_t block;
  };

  const BFloat16* pixel(const Outputs& at, int64_t output) const {
    if (!is_copied) return static_cast<const BFloat16*>(args.x) + output * layout.depth;
    return memory + (output - at.first) * args.shape.stride[1] * layout.depth;
  }

  // kTiles of outputs, each of kLanes of channels.
  template <int kTiles, int kLanes>
  void run_tiles(const Outputs& at) const {
    alignas(kTileRow) float sums[kTiles][kLanes][kTileSums];
    const ConvShape& shape = args.shape;
    const int64_t steps = shape.kernel[1] * layout.depth / kTileDepth;  // of a row of the kernel
    const BFloat16 *first = pixel(at, at.tiles[0]), *other = pixel(at, at.tiles[kTiles - 1]);
    TileOperands operands{};
    operands.stride = shape.stride[1] * layout.depth * int64_t{sizeof *first};
    operands.weight = static_cast<const BFloat16*>(args.weight) +
                      at.block * kBlockTiles * shape.kernel[0] * steps * kTileElements;
    operands.row = kTileRow;
    operands.lane = kTileElements;
    zero_sums<kTiles, kLanes>();
    for (int64_t i = 0; i < shape.kernel[0]; ++i) {  // columns and their channels follow each other
      operands.x[0] = first + i * layout.row * layout.depth;
      operands.x[1] = other + i * layout.row * layout.depth;
      add_products<kTiles, kLanes>(operands, steps);
      operands.weight += steps * kLanes * kTileElements;
    }
    store_sums<kTiles, kLanes>(sums[0][0], kTileRow, kLanes * kTileSums, kTileSums);
    for (int i = 0; i < kTiles; ++i) finish<kLanes>(sums[i], at.tiles[i], at.end, at.block);
  }

  // A tile's sums from output `i` on, of which some may not exist, with bias and residual.
  template <int kLanes>
  void finish(const float (&sums)[kLanes][kTileSums], int64_t i, int64_t end, int64_t block) const {
    const int64_t* size = args.shape.out_size;
    const int64_t channel = block * kBlockTiles * kTileLanes;
    const int64_t left = args.shape.out_channels - channel;
    D::F bias[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t first = lane * kTileLanes;
      bias[lane] =
          args.bias == nullptr ? D::zero() : D::load(args.bias + channel + first, left - first);
    }
    const int64_t row = layout.out_row, count = end - i < kTileRows ? end - i : kTileRows;
    for (int64_t done = 0, run; done < count; done += run) {  // of each image row that it sees
      const int64_t rows = (i + done) / row, x = i + done - rows * row;
      const int64_t sample = rows / layout.out_rows, y = rows - sample * layout.out_rows;
      run = row - x < count - done ? row - x : count - done;
      const int64_t existing = y < size[0] ? size[1] - x < run ? size[1] - x : run : 0;
      const Pixels<kLanes> pixels{
          sums[0] + done * kTileLanes, bias, existing, left,
          sample * args.out_sample + y * args.out_row + x * args.out_pixel + channel};
      if (left >= kLanes * kTileLanes) {
        store<true>(pixels);
      } else {
        store<false>(pixels);
      }
    }
  }

  template <int kLanes>
  struct Pixels {
    const float* sums;  // the lanes are kTileSums apart
    const D::F (&bias)[kLanes];
    int64_t count, channels, place;  // channels: how many there are; place: of the first
  };

  // kIsFull: all channels of all lanes exist, so that the compiler need not count them.
  template <bool kIsFull, int kLanes>
  void store(const Pixels<kLanes>& pixels) const {
    const float* sums = pixels.sums;
    Out* out = static_cast<Out*>(args.out) + pixels.place;
    const Out* residual = static_cast<const Out*>(args.residual);
    if (residual != nullptr) residual += pixels.place;
    const int64_t step = args.out_pixel, residual_step = residual == nullptr ? 0 : step;
    for (int64_t left = pixels.count; left > 0; --left) {
      DDPM_FAST_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t first = lane * kTileLanes;
        const int64_t channels = kIsFull ? kTileLanes : pixels.channels - first;
        D::F sum = D::add(D::load(sums + lane * kTileSums, kTileLanes), pixels.bias[lane]);
        if (residual != nullptr) sum = D::add(sum, D::load(residual + first, channels));
        D::store(out + first, sum, channels);
      }
      sums += kTileLanes;
      out += step;
      residual += residual_step;
    }
  }
};

// The range is in outputs of a part of the blocks: of the first strip's all, part after part, then
// the next's.
template <class T, class Out>
void amx_conv2d(const ConvArgs& args, int64_t begin, int64_t end, void* memory) {
  const AmxRun<T, Out> run(args, memory);
  const int64_t parts = amx_parts(args.shape), each = amx_blocks(args.shape) / parts;
  configure(kTileRows, kTileRows);
  each_strip(
      begin, end, run.outputs(), run.layout.strip(), parts,
      [&](int64_t first, int64_t from, int64_t to) { run.prepare(first, from, to); },
      [&](int64_t part, int64_t first, int64_t from, int64_t to) {
        for (int64_t block = part * each; block < (part + 1) * each; ++block) {
          run.run_block(block, first, from, to);
        }
      });
  _tile_release();  // else each change of threads would save the tiles
}

// Of one or two kinds of results.
template <class T, class Out, class Other = Out>
constexpr ConvKernels amx_kernels() {
  return {"amx",
          DType::kBFloat16,
          16 * kGrainProducts,
          packed_amx_elements,
          [](const ConvShape& shape, const float* weight, void* packed) {
            pack_amx(shape, weight, static_cast<BFloat16*>(packed));
          },
          [](const ConvArgs& args) {
            const AmxLayout<T> layout(args.shape);
            return amx_parts(args.shape) * args.samples * layout.out_rows * layout.out_row;
          },
          [](const ConvShape& shape) {
            return AmxLayout<T>(shape).strip_elements() * int64_t{sizeof(BFloat16)};
          },
          [](const ConvArgs& args, int64_t begin, int64_t end, void* memory) {
            if (args.out_dtype == dtype_of(Out{})) {
              return amx_conv2d<T, Out>(args, begin, end, memory);
            }
            amx_conv2d<T, Other>(args, begin, end, memory);
          }};
}

}  // namespace

const ConvKernels kAmxBf16Conv = amx_kernels<BFloat16, BFloat16>();
const ConvKernels kAmxFp16Conv = amx_kernels<Float16, BFloat16, Float16>();

}  // namespace ddpm_fast
