// How large the logits of pages can be. No torch here: the files with -m flags see only plain data.
#pragma once
#include <cstdint>

namespace pikv {

// N block tables = R requests x S shards; H kv heads; G query heads of a kv head.
struct Score {
  const void* q;           // [R, H * G, D] of q_type
  const void* width;       // the same shape and type, or null: |q|
  const void* bounds;      // [num_pages, bound_heads, 2, D] of bounds_type, int8 D + 2: smallest, largest
  const int32_t* table;    // [N, table_heads, max_pages]
  const int32_t* seqlens;  // [N, seqlen_heads]
  float* scores;           // [N, H, max_pages]
  int q_type, bounds_type;
  int S, H, G, D, max_pages, page_size, bound_heads, table_heads, seqlen_heads;
  float scale;
};

using ScoreTable = void (*)(const Score&, int n, int h);

// One per instruction set: the scores of table n for head h.
void score_baseline(const Score& s, int n, int h);
void score_avx2(const Score& s, int n, int h);
void score_avx512(const Score& s, int n, int h);
// Hand-written for AVX512 with VNNI, of int8 bounds.
void score_vnni(const Score& s, int n, int h);

}  // namespace pikv
