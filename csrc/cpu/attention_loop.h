// Attention of channels_last tensors, softmax(q k') v, written once over D, how the products of an
// instruction set read their weights (conv_layout.h), V, its vectors (../numerics.h), and Products,
// which makes them.
//
// Both products are 1x1 convolutions: of the queries, with the keys as weights, and of softmax's
// weights, with the values as weights. They are made for a few queries at a time, so that the
// scores never leave the cache. A query's bits depend on its sample and its head alone.
#pragma once

#include "conv_loop.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kLine = 64;  // bytes, to which weights must be aligned to be loaded fast

constexpr int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A word is 32 bits of a column of weights, one or two neighbours, as conv_layout.h packs them. The
// depth is padded with zeros.
template <class D>
constexpr int kWord = sizeof(float) / sizeof(typename D::Element);

// Weights (O, I) whose rows, `stride` apart, lie as they are multiplied: sixteen by sixteen words
// are transposed.
template <class D, class V>
void pack_rows(const typename D::Element* weight, int64_t stride, int64_t rows, int64_t columns,
               typename D::Element* packed) {
  constexpr int kLanes = D::kLanes, kWords = kWord<D>;
  const ConvBlocks<D> blocks(rows);
  const int64_t depth = padded_depth<D>(columns);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t lanes = blocks.lanes(block);
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      for (int64_t i = 0; i < columns; i += kLanes * kWords) {
        typename V::F words[kLanes];
        DDPM_FAST_UNROLL
        for (int k = 0; k < kLanes; ++k) {
          const int64_t row = block * blocks.width + lane + k;
          words[k] = row < rows ? V::words(weight + row * stride + i, columns - i) : V::set(0.0f);
        }
        V::transpose(words);
        for (int k = 0; k < kLanes && i + k * kWords < depth; ++k) {
          V::store_words(packed + (i + k * kWords) * lanes + lane * kWords, words[k], lanes - lane);
        }
      }
    }
    packed += lanes * depth;
  }
}

// Weights (I, O): neighbouring rows, `stride` apart, are multiplied together.
template <class D, class V>
void pack_columns(const typename D::Element* weight, int64_t stride, int64_t rows, int64_t columns,
                  typename D::Element* packed) {
  constexpr int kWords = kWord<D>;
  const ConvBlocks<D> blocks(columns);
  const int64_t depth = padded_depth<D>(rows);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t lanes = blocks.lanes(block), first = block * blocks.width;
    int64_t i = 0;
    for (; i < rows; i += kWords) {
      for (int64_t lane = 0; lane < lanes; lane += D::kLanes) {
        const auto words = V::stacked_words(weight + i * stride + first + lane, stride, rows - i,
                                            columns - first - lane);
        V::store_words(packed + lane * kWords, words, lanes - lane);
      }
      packed += lanes * kWords;
    }
    if (i < depth) zero(packed, (depth - i) * lanes);
    packed += (depth - i) * lanes;
  }
}

// `positions` scores become weights of sum 1, which may lie in the same place: whole vectors of
// both, where what is more are zeros.
template <class D, class V>
void softmax(float* scores, int64_t positions, typename D::Element* weights) {
  using F = typename V::F;
  constexpr int kLanes = V::kLanes;
  // 2^f for 0 <= f < 1, with relative errors below 2^-22.
  constexpr float kPower[] = {0x1.fffffep-1f, 0x1.62e4f6p-1f, 0x1.ebd5a8p-3f,
                              0x1.c95446p-5f, 0x1.26900cp-7f, 0x1.ec320ap-10f};
  const int64_t count = rounded_up(positions, kLanes);
  V::store_words(scores + positions, V::set(-__builtin_inff()), count - positions);
  F most = V::load(scores), sum = V::set(0.0f);
  for (int64_t j = kLanes; j < count; j += kLanes) most = V::max(most, V::load(scores + j));
  most = V::set(V::largest(most));
  for (int64_t j = 0; j < count; j += kLanes) {
    const F t = V::mul(V::sub(V::load(scores + j), most), V::set(0x1.715476p0f));
    const F power = V::scale(horner<V>(kPower, V::fraction(t)), t);
    sum = V::add(sum, power);
    V::store(scores + j, power);
  }
  const F scale = V::set(1.0f / V::total(sum));
  for (int64_t j = 0; j < count; j += kLanes) {
    D::store(weights + j, V::mul(V::load(scores + j), scale), kLanes);
  }
}

// Products by vectors.
template <class D>
struct VectorProducts {
  static constexpr int64_t kQueries = 48;  // at a time

  // `rows` of a matrix with `depth` columns, `pixel` apart, times packed weights of `channels`
  // columns; the result's rows lie `stride` apart.
  template <class Out>
  void multiply(const typename D::Element* x, int64_t pixel, int64_t rows, int64_t depth,
                const typename D::Stored* weight, int64_t channels, Out* out,
                int64_t stride) const {
    const ConvBlocks<D> blocks(channels);
    Tile<D, Out> tile{};
    tile.x = x;
    tile.weight = weight;
    tile.pixel = pixel;
    tile.rows = 1;
    tile.steps = padded_depth<D>(depth) / D::kDepth;
    tile.out = out;
    tile.stride = stride;
    for (int64_t block = 0; block < blocks.count; ++block) {
      tile.channels = channels - block * blocks.width;
      with_halves<D>(blocks.halves(block),
                     [&]<int kHalves>() { run_tiles<D, kHalves>(rows, tile); });
      tile.weight += blocks.lanes(block) * padded_depth<D>(depth);
      tile.out += blocks.width;
    }
  }
};

// With zeros up to the depth.
template <class D, class V>
void copy_row(const typename D::Element* from, int64_t channels, int64_t depth,
              typename D::Element* to) {
  constexpr int kWords = kWord<D>;
  for (int64_t c = 0; c < depth; c += D::kLanes * kWords) {
    V::store_words(to + c, V::words(from + c, channels - c), (depth - c) / kWords);
  }
}

// Where a thread keeps what it has packed, and the scores that it works at; from a whole line on.
template <class D, int64_t kQueries>
struct AttentionMemory {
  using T = typename D::Element;
  int64_t keys, values, scores, queries;  // elements
  int64_t row;                            // of scores, whole vectors

  explicit AttentionMemory(const AttentionArgs& args) {
    constexpr int64_t line = kLine / sizeof(T);
    row = rounded_up(args.positions, D::kLanes);
    keys = rounded_up(packed(args.channels, args.positions), line);
    values = rounded_up(packed(args.positions, args.channels), line);
    scores = rounded_up(kQueries * row * (sizeof(float) / sizeof(T)), line);
    queries = args.channels % D::kDepth == 0 ? 0 : kQueries * padded_depth<D>(args.channels);
  }
  static int64_t packed(int64_t in, int64_t out) {
    ConvShape shape{};
    shape.in_channels = in;
    shape.out_channels = out;
    shape.kernel[0] = shape.kernel[1] = 1;
    return packed_elements<D>(shape);
  }
  int64_t bytes() const {
    return kLine + static_cast<int64_t>((keys + values + scores + queries) * sizeof(T));
  }
};

// The range is in queries: of all positions of a head, then of a sample's next head.
template <class D, class V, class Products>
void attention(const AttentionArgs& args, int64_t begin, int64_t end, void* memory) {
  using T = typename D::Element;
  constexpr int64_t kQueries = Products::kQueries;
  const AttentionMemory<D, kQueries> parts(args);
  const int64_t positions = args.positions, channels = args.channels;
  const int64_t depth = padded_depth<D>(channels), out_row = args.heads * channels;
  T* keys = reinterpret_cast<T*>(rounded_up(reinterpret_cast<intptr_t>(memory), kLine));
  T *values = keys + parts.keys, *weights = values + parts.values;
  T* queries = weights + parts.scores;
  float* scores = reinterpret_cast<float*>(weights);
  const int64_t weights_row = parts.row * kWord<D>, padded = padded_depth<D>(positions);
  const auto first = [&](const AttentionInput& input, int64_t head) {
    return static_cast<const T*>(input.first) + head / args.heads * input.sample +
           head % args.heads * channels;
  };
  Products products;
  for (int64_t head = begin / positions; head * positions < end; ++head) {
    const int64_t from = within(begin - head * positions, 0, positions);
    const int64_t to = within(end - head * positions, 0, positions);
    pack_rows<D, V>(first(args.key, head), args.key.position, positions, channels, keys);
    pack_columns<D, V>(first(args.value, head), args.value.position, positions, channels, values);
    T* out = static_cast<T*>(args.out) + head / args.heads * positions * out_row +
             head % args.heads * channels;
    for (int64_t i = from; i < to; i += kQueries) {
      const int64_t count = to - i < kQueries ? to - i : kQueries;
      const T* x = first(args.query, head) + i * args.query.position;
      int64_t pixel = args.query.position;
      if (parts.queries > 0) {  // products would reach over a row's end
        for (int64_t r = 0; r < count; ++r) {
          copy_row<D, V>(x + r * pixel, channels, depth, queries + r * depth);
        }
        x = queries;
        pixel = depth;
      }
      products.multiply(x, pixel, count, channels, keys, positions, scores, parts.row);
      for (int64_t r = 0; r < count; ++r) {
        T* row = weights + r * weights_row;
        softmax<D, V>(scores + r * parts.row, positions, row);
        if (parts.row < padded) zero(row + parts.row, padded - parts.row);
      }
      products.multiply(weights, weights_row, count, positions, values, channels, out + i * out_row,
                        out_row);
    }
  }
}

template <class D, class V, class Products = VectorProducts<D>>
constexpr AttentionKernels attention_kernels(int64_t grain = kGrainProducts) {
  return {grain,
          [](const AttentionArgs& args) {
            return AttentionMemory<D, Products::kQueries>(args).bytes();
          },
          attention<D, V, Products>};
}

}  // namespace
}  // namespace ddpm_fast
