// Carries out Intel AMX's tile and bfloat16 instructions where the CPU has none: the illegal
// instruction's signal is caught, the instruction's own bytes are decoded, and the thread goes on
// behind it. So what is tested is what the compiler emitted. What would fault on a CPU with AMX
// prints a sentence and aborts. Any other illegal instruction is left to the handler from before.
//
// The encodings and the semantics are those of the Intel SDM, volume 2: LDTILECFG, STTILECFG,
// TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED, TDPBF16PS. Needs a CPU with AVX2 and
// FMA, for float32 sums as AMX has them. See amx.py.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>

#include "amx_decode.h"

namespace {

// The same bytes as in memory: the palette, the first row, eight tiles' colsb and rows.
struct Config {
  uint8_t palette, start_row, reserved0[14];
  uint16_t colsb[8];
  uint8_t reserved1[16], rows[8], reserved2[8];
};
static_assert(sizeof(Config) == 64);

// What lies outside a tile's rows and columns is zero: a new configuration clears everything, and
// nothing is ever written there.
struct State {
  Config config;  // all zero where no tiles are configured
  uint32_t data[8][16][16];
};

thread_local State state;
std::atomic<uint64_t> counts[kKinds];
struct sigaction previous;
bool installed = false;

void require(bool holds, Kind kind, const char* sentence) {
  if (holds) return;
  dprintf(STDERR_FILENO, "amx_emulator: %s: %s\n", kForms[kind].name, sentence);
  abort();
}

void load_config(const void* memory) {
  Config config;
  memcpy(&config, memory, sizeof config);
  if (config.palette != 0) {
    require(config.palette == 1, kLdcfg, "the palette is not 1");
    for (uint8_t byte : config.reserved0) require(byte == 0, kLdcfg, "a reserved byte is set");
    for (uint8_t byte : config.reserved1) require(byte == 0, kLdcfg, "a reserved byte is set");
    for (uint8_t byte : config.reserved2) require(byte == 0, kLdcfg, "a reserved byte is set");
    for (int tile = 0; tile < 8; ++tile) {
      require(config.colsb[tile] <= 64, kLdcfg, "a tile has more than 64 bytes per row");
      require(config.rows[tile] <= 16, kLdcfg, "a tile has more than 16 rows");
      require((config.colsb[tile] == 0) == (config.rows[tile] == 0), kLdcfg,
              "a tile has rows without bytes, or bytes without rows");
    }
  }
  memset(&state, 0, sizeof state);
  if (config.palette != 0) state.config = config;
}

void check_tile(int tile, Kind kind) {
  require(state.config.palette != 0, kind, "this thread has configured no tiles");
  require(state.config.rows[tile] != 0, kind, "the tile has no rows in the configuration");
  require(state.config.colsb[tile] % 4 == 0, kind, "the tile's row is not of whole 4 bytes");
}

void move_tile(const Instruction& instruction) {
  const int tile = instruction.reg;
  const Config& config = state.config;
  check_tile(tile, instruction.kind);
  require(config.start_row < config.rows[tile], instruction.kind, "start_row is behind the tile");
  for (uint64_t row = config.start_row; row < config.rows[tile]; ++row) {
    auto* memory = reinterpret_cast<void*>(instruction.address + row * instruction.stride);
    if (instruction.kind == kStore) {
      memcpy(memory, state.data[tile][row], config.colsb[tile]);
    } else {
      memcpy(state.data[tile][row], memory, config.colsb[tile]);
    }
  }
}

// Not inlined: the compiler would be free to move the sums before MXCSR's setting.
__attribute__((noinline, target("avx2,fma"))) void add_products(int c, int a, int b) {
  const Config& config = state.config;
  const int columns = config.colsb[c] / 4;
  for (int m = 0; m < config.rows[c]; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < config.colsb[a] / 4; ++k) {
      const uint32_t left = state.data[a][m][k];
      for (int n = 0; n < columns; ++n) {
        const uint32_t right = state.data[b][k][n];
        even[n] =
            std::fma(std::bit_cast<float>(left << 16), std::bit_cast<float>(right << 16), even[n]);
        odd[n] = std::fma(std::bit_cast<float>(left & 0xffff0000),
                          std::bit_cast<float>(right & 0xffff0000), odd[n]);
      }
    }
    for (int n = 0; n < columns; ++n) {
      const float sum = std::bit_cast<float>(state.data[c][m][n]) + (even[n] + odd[n]);
      state.data[c][m][n] = std::bit_cast<uint32_t>(sum);
    }
  }
}

void product(int c, int a, int b) {
  require(c != a && a != b && c != b, kProduct, "two of the three tiles are the same");
  for (int tile : {c, a, b}) check_tile(tile, kProduct);
  const Config& config = state.config;
  require(config.rows[c] == config.rows[a], kProduct, "C and A have different rows");
  require(config.colsb[c] == config.colsb[b], kProduct, "C and B have different columns");
  require(config.colsb[a] / 4 == config.rows[b], kProduct, "A's columns are not B's rows");
  // Nearest even, denormals in and out are zero, no exceptions. The signal's return restores it.
  _mm_setcsr(0x9fc0);
  add_products(c, a, b);
}

void carry_out(const Instruction& instruction) {
  auto* memory = reinterpret_cast<void*>(instruction.address);
  switch (instruction.kind) {
    case kLdcfg:
      return load_config(memory);
    case kStcfg:
      memcpy(memory, &state.config, sizeof(Config));
      return;
    case kRelease:
      memset(&state, 0, sizeof state);
      return;
    case kZero:
      check_tile(instruction.reg, kZero);
      memset(state.data[instruction.reg], 0, sizeof state.data[0]);
      break;
    case kProduct:
      product(instruction.reg, instruction.rm, instruction.vvvv);
      break;
    default:
      move_tile(instruction);
  }
  state.config.start_row = 0;
}

void leave_to_previous(int number, siginfo_t* info, void* context) {
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(number, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(number);
  } else {  // the default action, when the instruction faults once more
    sigaction(SIGILL, &previous, nullptr);
    if (info->si_code <= 0) raise(SIGILL);  // it was no instruction, but another process's signal
  }
}

void on_illegal_instruction(int number, siginfo_t* info, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction instruction{};
  if (info->si_code <= 0 || !decode(registers, &instruction)) {
    return leave_to_previous(number, info, context);
  }
  carry_out(instruction);
  ++counts[instruction.kind];
  registers[REG_RIP] = reinterpret_cast<greg_t>(instruction.end);
}

}  // namespace

extern "C" {

// Not to be called by two threads at once, as amx_emulator_remove.
void amx_emulator_install() {
  if (installed) return;
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &previous);
  installed = true;
}

void amx_emulator_remove() {
  if (installed) sigaction(SIGILL, &previous, nullptr);
  installed = false;
}

// How many were carried out, by all threads: of ldtilecfg, sttilecfg, tilerelease, tilezero,
// tileloadd, tileloaddt1, tilestored, tdpbf16ps.
void amx_emulator_counts(uint64_t result[8]) {
  for (int kind = 0; kind < kKinds; ++kind) result[kind] = counts[kind];
}

void amx_emulator_reset_counts() {
  for (auto& count : counts) count = 0;
}
}
