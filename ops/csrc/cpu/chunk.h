// Attention of many rows of the query as blocked matrix products: what its parts hand to each other. attend_chunk.cpp says how it goes.
//
// Everything lies in dwords: an f32, or two bf16 that a dot product takes at once, columns of keys, tokens of values.
#pragma once
#include <cstdint>

namespace pikv::chunks {

constexpr int kTokens = 256;  // packed at once
constexpr int kPanel = 64;    // tokens, or columns, whose products lie in registers: four of them
constexpr int kRows = 24;     // rows of the query that meet them while they are near

// Up to kTokens tokens that some row sees, filled up to whole panels with zeros.
struct Block {
  const uint32_t* k;            // [panels][k_steps][kPanel]
  const uint32_t* v;            // [v_steps][v_width]
  const float *k_factor, *v_factor;  // [kTokens] of the scores, the scale of the attention and base 2 in it; of the weights, or null: 1
  int count, panels;
};

// Numbers of one type on both sides of a product.
struct Keys {
  int per_dword;
  // q [rows][k_steps] -> s [rows][kTokens], times k_factor
  void (*scores)(const uint32_t* q, int rows, int k_steps, const Block& block, float* s);
  // rows [tokens][k_steps] -> [tokens / kPanel][k_steps][kPanel]
  void (*pack)(const uint32_t* rows, int tokens, int k_steps, uint32_t* to);
};

struct Values {
  int per_dword;
  // Scores of one row become weights. `visible`: bits of tokens, or null. m and l: its largest score and the sum of its weights, to base 2;
  // where m rises, l and out [v_dim] shrink.
  void (*soften)(float* s, const uint64_t* visible, const Block& block, float& m, float& l, float* out, int v_dim);
  // out [rows][v_dim] += weights x values
  void (*add)(const float* s, int rows, const Block& block, int v_dim, float* out);
  void (*pack)(const uint32_t* rows, int tokens, int v_width, uint32_t* to);  // null: rows are taken as they lie
};

extern const Keys kFloatKeys, kBf16Keys;
extern const Values kFloatValues, kBf16Values;

}  // namespace pikv::chunks
