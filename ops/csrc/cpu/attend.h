// Attention of one work unit, and the arguments that all units share. No torch here: the files with -m flags see only plain data.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../include/page_format.h"

namespace pikv {

// Tokens [first, first + count) of the page in a column of the table; count <= 0: nothing is read.
struct Piece {
  int column, first, count;
};

// N block tables = R requests x S shards; H kv heads; a request has T queries, a kv head G query heads: M = T * G rows, row t * G + g.
struct Attend {
  PageFormat f;
  const uint8_t* pages;
  int64_t num_pages;
  const int32_t* table;       // [N, table_heads, max_pages]
  const int32_t* seqlens;     // [N, seqlen_heads]
  const int32_t* asked;       // [R, T] positions of the queries, or null
  const int32_t* list;        // [N, list_heads, num_columns] of column * blocks + block, -1 = none; or null: everything
  const void* tail;           // [rows, f.num_kv_heads, group, k_dim] of tail_type, or null
  const int32_t* tail_rows;   // [N, tail_heads]
  const void* q;              // [R, T, H * G, k_dim] of q_type
  float* page_lse;            // [N, T, H * G, num_columns] or null
  int tail_type, q_type;      // kFp32, kBf16 or kFp16
  int R, T, S, H, G, max_pages, num_columns;
  int block, blocks;          // tokens that are listed as one, and how many times a page has them: its size and 1
  int table_heads, seqlen_heads, list_heads, tail_heads;
  float scale;
  int window;
  bool causal;
  bool first_level;           // read ahead into the first level: "vnni" on Intel's processors, as in its first version; phases on Zen 5
  bool fast;                  // ops.precision: integer queries and weights in one byte

  int rows() const { return T * G; }
  bool hides() const { return window || causal; }  // some of what is stored from some rows
  int pick(int heads, int n, int h) const { return n * heads + (heads == 1 ? 0 : h); }
  int seqlen(int n, int h) const { return seqlens[pick(seqlen_heads, n, h)]; }
  const int32_t* table_of(int n, int h) const { return table + (int64_t)pick(table_heads, n, h) * max_pages; }
  const int32_t* list_of(int n, int h) const { return list ? list + (int64_t)pick(list_heads, n, h) * num_columns : nullptr; }
  // The section of head h: pages that hold one head each serve any head.
  const uint8_t* section(const uint8_t* record, int h) const { return record + (f.num_kv_heads == 1 ? 0 : h) * f.head_bytes; }
  int64_t q_row(int n, int h, int m) const { return ((int64_t)(n / S) * T + m / G) * H * G + (int64_t)h * G + m % G; }
  float* page_lse_row(int n, int h, int m) const {
    return page_lse + (((int64_t)n * T + m / G) * H * G + (int64_t)h * G + m % G) * num_columns;
  }
  // What the c-th number of a list names, or c itself, of a table of which `limit` entries are read.
  Piece piece(const int32_t* named, int c, int limit) const {
    const int at = named ? named[c] : c;
    if (at < 0) return {-1, 0, 0};
    const int column = at / blocks, first = at % blocks * block;
    return {column, first, std::min(block, limit - column * f.page_size - first)};
  }
  // Entries that are read from the pages; the rest of a grouped format is in the tail.
  int paged(int n, int h) const {
    const int len = seqlen(n, h);
    return format_grouped(f.format) ? len - len % f.group : len;
  }
};

// Columns [c0, c1) of one table and head, or the tail of it. Writes out [M, v_dim] (0 if nothing is visible) and lse [M] (-inf).
struct Unit {
  int n, h, c0, c1;
  bool tail;
  float* out;
  float* lse;
};

using AttendUnit = void (*)(const Attend&, const Unit&);

// One per instruction set. `scratch_*` live on the caller's thread inside.
void attend_baseline(const Attend& a, const Unit& u);
void attend_avx2(const Attend& a, const Unit& u);
void attend_avx512(const Attend& a, const Unit& u);
// Hand-written for AVX512 with VNNI.
void attend_vnni(const Attend& a, const Unit& u);
// In phases of up to 64 tokens, for the layouts that they serve: with VNNI, with BF16 and VBMI too, with AMX too.
void attend_phases_vnni(const Attend& a, const Unit& u);
void attend_phases_bf16(const Attend& a, const Unit& u);
void attend_phases_amx(const Attend& a, const Unit& u);
// As matrix products, for many rows: of f32, or of bf16 where that is exact.
void attend_chunk_float(const Attend& a, const Unit& u);
void attend_chunk_bf16(const Attend& a, const Unit& u);
bool chunk_serves(const Attend& a, bool bf16);
bool phases_vnni_serve(const Attend& a);
bool phases_bf16_serve(const Attend& a);
bool phases_amx_serve(const Attend& a);

}  // namespace pikv
