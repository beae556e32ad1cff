// mask_unit_attention in bfloat16 with AMX's tile instructions in software, so that both ways of
// multiplying are tested on every processor with AVX-512 BF16. UNIT is tiles or dots.
#include <cstdint>
#include <cstring>

#include <immintrin.h>

namespace {

float tiles[8][16][16];

float product(const float& left, const float& right, int half) {
  uint32_t bits[2];
  std::memcpy(bits, &left, 4);
  std::memcpy(bits + 1, &right, 4);
  float x[2];
  for (uint32_t& b : bits) b = b >> (16 * half) << 16;
  std::memcpy(x, bits, 8);
  return x[0] * x[1];
}

void multiply_tiles(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        const float &left = tiles[a][m][k], &right = tiles[b][k][n];
        tiles[c][m][n] += product(left, right, 0) + product(left, right, 1);
      }
    }
  }
}

}  // namespace

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(t) std::memset(tiles[t], 0, sizeof(tiles[t]))
#define _tile_loadd(t, base, stride) \
  for (int r = 0; r < 16; ++r) std::memcpy(tiles[t][r], (const char*)(base) + r * (stride), 64)
#define _tile_stored(t, base, stride) \
  for (int r = 0; r < 16; ++r) std::memcpy((char*)(base) + r * (stride), tiles[t][r], 64)
#define _tile_dpbf16ps(c, a, b) multiply_tiles(c, a, b)
#define _tile_storeconfig(to) std::memset(to, 0, 64)
#define _tile_loadconfig(from) ((void)0)
#define _tile_release() ((void)0)
#define FASTSSL_BF16_UNIT UNIT
#include "mask_unit_attention_bf16.h"
#ifndef FASTSSL_HAS_PAIRS
#error "this compiler is too old for products of pairs"
#endif

// As csrc/cpu/mask_unit_attention.cpp runs it, by one thread; forward without dout.
extern "C" void attend(int64_t heads, int64_t head_dim, int64_t unit_size, int64_t q_stride,
                       int64_t num_units, const uint16_t* qkv, const uint16_t* dout, uint16_t* out,
                       uint8_t* scratch) {
  using namespace fastssl;
  Geometry g{heads, head_dim, unit_size, q_stride, 1};
  g.group = pairs::group_of(unit_size);
  pairs::Buffers buffers;
  pairs::lay_out(g, dout != nullptr, scratch, &buffers);
  const pairs::Tiles configured;
  for (int64_t unit = 0; unit < num_units; unit += g.group) {
    const int64_t units = std::min(g.group, num_units - unit);
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t tokens = unit * unit_size * g.token_stride() + head * head_dim;
      const int64_t queries = unit * g.unit_queries() * g.dim() + head * head_dim;
      pairs::Upcoming ahead(g, units, dout != nullptr);
      if (dout) {
        pairs::backward(g, buffers, dout + queries, qkv + tokens, units, out + tokens, ahead);
      } else {
        pairs::forward(g, buffers, qkv + tokens, units, out + queries, ahead);
      }
    }
  }
}
