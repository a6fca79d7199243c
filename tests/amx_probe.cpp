// What a compiler makes of AMX's intrinsics, for the emulator's tests; amx_forms.py has the single
// instructions.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

struct Config {
  uint8_t palette = 1, start_row = 0, reserved0[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace

extern "C" {

// c (m, n) of float32 += a (m, 2 * pairs) times b of bfloat16, whose row of 2 * n numbers holds two
// rows of the matrix, number by number; all are dense.
void probe_matmul(int64_t m, int64_t n, int64_t pairs, const uint16_t* a, const uint16_t* b,
                  float* c) {
  for (int64_t i = 0; i < m; i += 16) {
    for (int64_t j = 0; j < n; j += 16) {
      for (int64_t k = 0; k < pairs; k += 16) {
        const int64_t rows = std::min<int64_t>(16, m - i), columns = std::min<int64_t>(16, n - j);
        const int64_t depth = std::min<int64_t>(16, pairs - k);
        Config config;
        config.rows[0] = config.rows[1] = static_cast<uint8_t>(rows);
        config.rows[2] = static_cast<uint8_t>(depth);
        config.colsb[0] = config.colsb[2] = static_cast<uint16_t>(4 * columns);
        config.colsb[1] = static_cast<uint16_t>(4 * depth);
        _tile_loadconfig(&config);
        _tile_loadd(0, c + i * n + j, 4 * n);
        _tile_loadd(1, a + 2 * (i * pairs + k), 4 * pairs);
        _tile_stream_loadd(2, b + 2 * (k * n + j), 4 * n);
        _tile_dpbf16ps(0, 1, 2);
        _tile_stored(0, c + i * n + j, 4 * n);
      }
    }
  }
  _tile_release();
}
}
