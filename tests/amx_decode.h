// Decodes Intel AMX's tile and bfloat16 instructions, as volume 2 of the Intel SDM encodes them.
#pragma once

#include <string.h>
#include <ucontext.h>

#include <cstdint>

namespace {

// In the order of amx_emulator_counts.
enum Kind { kLdcfg, kStcfg, kRelease, kZero, kLoad, kLoadT1, kStore, kProduct, kKinds };

struct Form {
  const char* name;
  uint8_t opcode, prefix;  // of VEX's second map; 1, 2 and 3 stand for 66, F3 and F2
  bool memory;             // ModRM names memory, not a register
};

constexpr Form kForms[kKinds] = {
    {"ldtilecfg", 0x49, 0, true},  {"sttilecfg", 0x49, 1, true},  {"tilerelease", 0x49, 0, false},
    {"tilezero", 0x49, 3, false},  {"tileloadd", 0x4b, 3, true},  {"tileloaddt1", 0x4b, 1, true},
    {"tilestored", 0x4b, 2, true}, {"tdpbf16ps", 0x5c, 2, false},
};

struct Instruction {
  Kind kind;
  int reg, rm, vvvv;         // ModRM's and VEX's registers
  uint64_t address, stride;  // of a memory form; the stride is the scaled index
  const uint8_t* end;
};

uint64_t general_register(const greg_t* registers, int number) {
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                     REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                     REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(registers[kOrder[number]]);
}

uint64_t fs_base() {  // x86-64's ABI keeps the segment's own address in its first word
  uint64_t base;
  asm("mov %%fs:0, %0" : "=r"(base));
  return base;
}

// Reads SIB and displacement, which lie behind ModRM; x and b are VEX's fourth bits.
void decode_memory(const greg_t* registers, const uint8_t* p, int mod, int x, int b,
                   Instruction* instruction) {
  int base = instruction->rm | b << 3;
  const bool rip_relative = mod == 0 && instruction->rm == 5;
  bool has_base = !rip_relative;
  instruction->stride = 0;
  if (instruction->rm == 4) {
    const uint8_t sib = *p++;
    const int index = (sib >> 3 & 7) | x << 3;
    if (index != 4) instruction->stride = general_register(registers, index) << (sib >> 6);
    base = (sib & 7) | b << 3;
    has_base = mod != 0 || (sib & 7) != 5;
  }
  int32_t displacement = 0;
  if (mod == 1) {
    displacement = static_cast<int8_t>(*p++);
  } else if (mod == 2 || !has_base) {
    memcpy(&displacement, p, 4);
    p += 4;
  }
  instruction->end = p;
  instruction->address = static_cast<uint64_t>(int64_t{displacement});
  if (rip_relative) instruction->address += reinterpret_cast<uint64_t>(p);
  if (has_base) instruction->address += general_register(registers, base);
}

// False for whatever is not a legal encoding of one of ours. No byte behind it is read.
bool decode(const greg_t* registers, Instruction* instruction) {
  auto* p = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const bool fs = *p == 0x64;  // a configuration in thread-local memory
  if (fs) ++p;
  if (*p++ != 0xc4) return false;
  const int rxb = ~*p >> 5 & 7;  // VEX keeps these and vvvv inverted
  if ((*p++ & 31) != 2) return false;
  const uint8_t wvlp = *p++;
  instruction->vvvv = ~wvlp >> 3 & 15;
  const uint8_t opcode = *p++;
  int kind = 0;
  for (; kind < kKinds; ++kind) {
    if (kForms[kind].opcode == opcode && kForms[kind].prefix == (wvlp & 3)) {
      if (kForms[kind].memory == (*p < 0xc0)) break;
    }
  }
  if (kind == kKinds) return false;
  instruction->kind = static_cast<Kind>(kind);
  const uint8_t modrm = *p++;
  instruction->reg = modrm >> 3 & 7;
  instruction->rm = modrm & 7;
  const bool memory = kForms[kind].memory, product = kind == kProduct, sib = opcode == 0x4b;
  const int w_l = wvlp & 0x84, r = rxb & 4;
  if (w_l != 0 || r != 0 || instruction->vvvv > (product ? 7 : 0)) return false;
  if (kind < kZero && instruction->reg != 0) return false;  // the opcode's, not a tile
  if (sib && instruction->rm != 4) return false;
  if (!memory && (rxb != 0 || (!product && instruction->rm != 0))) return false;
  instruction->end = p;
  if (memory) decode_memory(registers, p, modrm >> 6, rxb >> 1 & 1, rxb & 1, instruction);
  if (memory && !sib) instruction->address += instruction->stride;
  if (fs) instruction->address += fs_base();
  return true;
}

}  // namespace
