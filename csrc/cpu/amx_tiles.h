// AMX's tiles of bfloat16, and sums of their products.
//
// A tile holds 16 rows of 64 bytes: of x, 32 neighbouring elements of 16 rows of memory at one
// distance; of the weights, 16 columns of 32 rows, whose pairs are neighbours. The product adds to
// 16 by 16 sums. Two tiles of x by two of the weights fill the registers, of which there are eight:
// 0 to 3 hold the sums, 4 and 5 x, 6 and 7 the weights.
#pragma once

#include <immintrin.h>

#include "../numerics.h"
#include "conversions.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileLanes = 16;
constexpr int64_t kTileElements = kTileDepth * kTileLanes;
constexpr int64_t kTileSums = kTileRows * kTileLanes;
constexpr int64_t kTileRow = 64;  // bytes

// GCC's intrinsics do not say how much they read: what lies at p is to be in memory.
DDPM_FAST_INLINE void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// The registers as tiles: those of x's first tile and its sums have `rows`, the second's `others`.
inline void configure(int64_t rows, int64_t others) {
  struct alignas(kTileRow) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } tiles{};
  static_assert(sizeof tiles == 64);
  tiles.palette = 1;
  const int64_t all[] = {rows, rows, others, others, rows, others, kTileRows, kTileRows};
  for (int i = 0; i < 8; ++i) {
    tiles.row_bytes[i] = kTileRow;
    tiles.rows[i] = static_cast<uint8_t>(all[i]);
  }
  written(&tiles);
  _tile_loadconfig(&tiles);
}

// Tiles of x, whose rows lie `stride` bytes apart, and of the weights: `row` bytes from row to row,
// and `lane` elements from the first tile to the second.
struct TileOperands {
  const BFloat16* x[2];
  int64_t stride;
  const BFloat16* weight;
  int64_t row, lane;
};

// kTiles of x, kLanes of the weights.
template <int kTiles, int kLanes>
DDPM_FAST_INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (kLanes > 1) _tile_zero(1);
  if constexpr (kTiles > 1) {
    _tile_zero(2);
    if constexpr (kLanes > 1) _tile_zero(3);
  }
}

// `steps` times the depth of a tile; the weights go from step to step by kLanes tiles' elements.
template <int kTiles, int kLanes>
DDPM_FAST_INLINE void add_products(const TileOperands& operands, int64_t steps) {
  const BFloat16 *x = operands.x[0], *other = operands.x[1], *weight = operands.weight;
  const int64_t stride = operands.stride, row = operands.row;
  for (; steps > 0; --steps) {
    _tile_loadd(4, x, stride);
    _tile_loadd(6, weight, row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kLanes > 1) {
      _tile_loadd(7, weight + operands.lane, row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTiles > 1) {
      _tile_loadd(5, other, stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kLanes > 1) _tile_dpbf16ps(3, 5, 7);
    }
    x += kTileDepth;
    other += kTileDepth;
    weight += kLanes * kTileElements;
  }
}

// To rows `stride` bytes apart; `tile` and `lane` elements between the tiles.
template <int kTiles, int kLanes>
DDPM_FAST_INLINE void store_sums(float* sums, int64_t stride, int64_t tile, int64_t lane) {
  _tile_stored(0, sums, stride);
  if constexpr (kLanes > 1) _tile_stored(1, sums + lane, stride);
  if constexpr (kTiles > 1) {
    _tile_stored(2, sums + tile, stride);
    if constexpr (kLanes > 1) _tile_stored(3, sums + tile + lane, stride);
  }
}

}  // namespace
}  // namespace ddpm_fast
