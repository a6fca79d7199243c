// Attention of channels_last tensors, softmax(q k') v, written once over D, the products of an
// instruction set (conv_loop.h), and V, its vectors (../numerics.h).
//
// Both products are 1x1 convolutions: of the queries, with the keys as weights, and of softmax's
// weights, with the values as weights. They are made for a few queries at a time, so that the
// scores never leave the cache. A query's bits depend on its sample and its head alone.
#pragma once

#include "conv_loop.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kQueries = 48;  // at a time
constexpr int64_t kLine = 64;     // bytes, to which weights must be aligned to be loaded fast

constexpr int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A word is kDepth neighbours of a column of weights, as conv_layout.h packs them.
//
// Weights (O, I) whose rows, `stride` apart, lie as they are multiplied: sixteen by sixteen words
// are transposed.
template <class D, class V>
void pack_rows(const typename D::Element* weight, int64_t stride, int64_t rows, int64_t columns,
               typename D::Element* packed) {
  constexpr int kLanes = D::kLanes, kDepth = D::kDepth;
  const ConvBlocks<D> blocks(rows);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t lanes = blocks.lanes(block);
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      for (int64_t i = 0; i < columns; i += kLanes * kDepth) {
        typename V::F words[kLanes];
        DDPM_FAST_UNROLL
        for (int k = 0; k < kLanes; ++k) {
          const int64_t row = block * blocks.width + lane + k;
          words[k] = row < rows ? V::words(weight + row * stride + i, columns - i) : V::set(0.0f);
        }
        V::transpose(words);
        for (int k = 0; k < kLanes && i + k * kDepth < columns; ++k) {
          V::store_words(packed + (i + k * kDepth) * lanes + lane * kDepth, words[k], lanes - lane);
        }
      }
    }
    packed += lanes * padded_depth<D>(columns);
  }
}

// Weights (I, O): neighbouring rows, `stride` apart, are multiplied together.
template <class D, class V>
void pack_columns(const typename D::Element* weight, int64_t stride, int64_t rows, int64_t columns,
                  typename D::Element* packed) {
  const ConvBlocks<D> blocks(columns);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t lanes = blocks.lanes(block), first = block * blocks.width;
    for (int64_t i = 0; i < rows; i += D::kDepth) {
      for (int64_t lane = 0; lane < lanes; lane += D::kLanes) {
        const auto words = V::stacked_words(weight + i * stride + first + lane, stride, rows - i,
                                            columns - first - lane);
        V::store_words(packed + lane * D::kDepth, words, lanes - lane);
      }
      packed += lanes * D::kDepth;
    }
  }
}

// `count` scores, whole vectors of them, become weights of sum 1, which may lie in the same place.
template <class D, class V>
void softmax(float* scores, int64_t count, typename D::Element* weights) {
  using F = typename V::F;
  constexpr int kLanes = V::kLanes;
  float lanes[kLanes];
  F most = V::load(scores), sum = V::set(0.0f);
  for (int64_t j = kLanes; j < count; j += kLanes) most = V::max(most, V::load(scores + j));
  V::store(lanes, most);
  float largest = lanes[0];
  for (float x : lanes) largest = x > largest ? x : largest;
  for (int64_t j = 0; j < count; j += kLanes) {
    const F power = exponential<V>(V::sub(V::load(scores + j), V::set(largest)));
    sum = V::add(sum, power);
    V::store(scores + j, power);
  }
  V::store(lanes, sum);
  float total = 0.0f;
  for (float x : lanes) total += x;
  const F scale = V::set(1.0f / total);
  for (int64_t j = 0; j < count; j += kLanes) {
    D::store(weights + j, V::mul(V::load(scores + j), scale), kLanes);
  }
}

// `rows` of a matrix with `depth` columns, `pixel` apart, times packed weights of `channels`
// columns; the result's rows lie `stride` apart.
template <class D, class Out>
void multiply(const typename D::Element* x, int64_t pixel, int64_t rows, int64_t depth,
              const typename D::Stored* weight, int64_t channels, Out* out, int64_t stride) {
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
    with_halves<D>(blocks.halves(block), [&]<int kHalves>() { run_tiles<D, kHalves>(rows, tile); });
    tile.weight += blocks.lanes(block) * padded_depth<D>(depth);
    tile.out += blocks.width;
  }
}

// Where a thread keeps what it has packed, and the scores that it works at; from a whole line on.
template <class D>
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
template <class D, class V>
void attention(const AttentionArgs& args, int64_t begin, int64_t end, void* memory) {
  using T = typename D::Element;
  const AttentionMemory<D> parts(args);
  const int64_t positions = args.positions, channels = args.channels;
  const int64_t depth = padded_depth<D>(channels), out_row = args.heads * channels;
  T* keys = reinterpret_cast<T*>(rounded_up(reinterpret_cast<intptr_t>(memory), kLine));
  T *values = keys + parts.keys, *weights = values + parts.values;
  T* queries = weights + parts.scores;
  float* scores = reinterpret_cast<float*>(weights);
  const int64_t weights_row = parts.row * (sizeof(float) / sizeof(T));
  const auto first = [&](const AttentionInput& input, int64_t head) {
    return static_cast<const T*>(input.first) + head / args.heads * input.sample +
           head % args.heads * channels;
  };
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
      if (parts.queries > 0) {  // words would reach over a row's end
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t c = 0; c < depth; ++c) {
            queries[r * depth + c] = c < channels ? x[r * pixel + c] : T{};
          }
        }
        x = queries;
        pixel = depth;
      }
      multiply<D>(x, pixel, count, channels, keys, positions, scores, parts.row);
      for (int64_t r = 0; r < count; ++r) {
        float* row = scores + r * parts.row;
        for (int64_t j = positions; j < parts.row; ++j) row[j] = -__builtin_inff();
        softmax<D, V>(row, parts.row, weights + r * weights_row);
      }
      multiply<D>(weights, weights_row, count, positions, values, channels, out + i * out_row,
                  out_row);
    }
  }
}

template <class D, class V>
constexpr AttentionKernels attention_kernels() {
  return {[](const AttentionArgs& args) { return AttentionMemory<D>(args).bytes(); },
          attention<D, V>};
}

}  // namespace
}  // namespace ddpm_fast
