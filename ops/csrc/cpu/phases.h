// What the parts of the attention in phases hand to each other: plain data, and for each format functions for keys and for values, by the
// number of query rows at a time. attend_phases.cpp says what a phase is.
#pragma once
#include <cstdint>

#include "attend.h"

namespace pikv::phases {

constexpr int kTokens = 64;  // most tokens of a phase
constexpr int kSizes = 3;    // rows at a time: 1, 2 or 4, R = 1 << size

// A register of scores has 16 / R tokens of R rows: lane r * 16 / R + t.
constexpr int tokens_of(int R) { return 16 / R; }

// R rows of the query that share one token of it, and what has been summed for them.
struct Rows {
  float *q, *acc;                  // [R, q_width] scaled to base 2, in the order of the keys; [R, sums] in that of the values' format
  uint16_t* q_bf16;                // float keys: the query as bf16, [parts, q_width / 32, 4, 32]; AMX: tiles [q_width / 32, 16, 16, 2]
  uint8_t* q_codes;                // fp4 keys as integers: the query in the order of phase_fp4.cpp
  float *m, *l, *page_l;           // 16 lanes: the largest score of each row in all of its lanes; sums by lane
  int first, t, size, count;       // count: of the R rows that are rows of the query
};

struct Phase {
  const uint8_t *k, *v, *k_scale, *k_zero, *v_scale, *v_zero;  // at its first token; of integer keys the scales and zeros of its group
  int64_t k_stride, v_stride;
  int count;         // tokens: 16, 32 or 64
  uint64_t visible;  // of them, by bit
  bool all;          // nothing is hidden
  bool page_lse;
};

// Lines of a later page, read ahead in the arithmetic: `lines` of them about every four tokens in each of its steps.
struct Ahead {
  const uint8_t *at, *end;
  bool first_level;  // into it, else into the second
};

struct Work {
  float* s;                            // [16 lanes] for each register of scores: scores, then weights
  uint8_t *w_hi, *w_lo;                // the weights as the values want them, in the same order
  int8_t *q_hi, *q_lo;                 // [R, q_width] (q * scale) of a group as hi + lo / 256
  float *q_step, *q_bias;              // 16 lanes
  float *v_scales, *v_tops;            // fp4 values as integers: scales of the phase, the largest of each of its tokens
  float *w_step, *w_zero;              // 16 lanes: the step of integer weights, and what the zeros of the values add to every column
  float* product;                      // [R, q_width]
  uint16_t* ordered;                   // [2, q_width] scales and zeros of a group of integer keys in the order of the codes
  const uint8_t* ordered_of;           // which group
  uint8_t* clean;                      // [kTokens] rows of values without what is hidden
  int q_width, sums, k_blocks, v_blocks;  // sums: of a row of values; blocks: registers of a row, the last one perhaps not full
  uint64_t k_last, v_last;             // bytes of the last register that are there
  int k_dim, v_dim;
  int q_parts;                         // bf16 numbers of which a number of the query is the sum: 1 or 3
  float scale;                         // of the scores of float keys, to base 2
  // AMX, else null: keys and values of 64 tokens as operands, weights and query too, sums of four tiles.
  uint8_t *k_codes, *v_codes, *w_tile, *q_tile;
  int32_t* tile;
  bool one_by_one;  // floats: 64 columns are unpacked just before they are used, for the one lot of rows that there is: they stay near
};

// Unpacks rows of a phase into memory, where a kernel reads them from there; else null. Once for all rows of the query.
using Unpack = void (*)(const Phase& phase, Work& w, Ahead& ahead, int lines);

struct KeyPhase {
  Unpack unpack;
  // Of fp4 as integers: the query, before all phases. Else null.
  void (*start_query)(Rows& rows, Work& w);
  // Of integers: (q * scale) and the share of the zeros of a group, before its first phase. Else null.
  void (*start_group)(const Rows& rows, const Phase& phase, Work& w);
  void (*scores)(const Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines);
};

struct ValuePhase {
  Unpack unpack;
  // Scores become weights: raises rows.m, adds to rows.l and rows.page_l.
  void (*soften)(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines);
  void (*add)(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines);
};

// What the processor has beside AVX512 and VNNI, which serve integers: BF16 and VBMI, and with them AMX.
enum class Tier { kVnni, kBf16, kAmx };

bool serves(Tier tier, int format);
// For R = 1 << size rows; floats have only R = 4, and fewer rows of integers need no AMX.
KeyPhase key_phase(Tier tier, int format, int dim, bool fast, int size);
ValuePhase value_phase(Tier tier, int format, int dim, bool fast, int size);
void amx_start();  // around the phases of a unit
void amx_end();

// Formats whose codes meet bytes: integers, and without AMX fp4, whose values are whole numbers of halves.
inline constexpr bool by_codes(Tier tier, int format) { return format_grouped(format) || (format == kFp4 && tier != Tier::kAmx); }

// Integer rows of at most 32 bytes are folded to fill a register (phase_codes.h). Registers of a row, and columns that they have room for.
inline constexpr bool folds(int format, int dim) { return format_grouped(format) && format != kInt8 && dim * format_bits(format) <= 256; }
inline constexpr int row_blocks(int format, int dim) { return (dim * format_bits(format) / 8 + 63) / 64; }
inline constexpr int row_columns(Tier tier, int format, int dim) {
  if (!by_codes(tier, format)) return dim;
  return folds(format, dim) ? 256 / format_bits(format) : row_blocks(format, dim) * 512 / format_bits(format);
}

// Where the sum of a column of values lies, and the column of the query that meets element e of a key as it is unpacked.
int sum_of(Tier tier, int format, int dim, int column);
int query_of(Tier tier, int format, int dim, int e);

// Bytes of the query of four rows, and of each half of the weights of a phase, for fp4 as integers.
int64_t fp4_query_bytes(int k_blocks);
int64_t fp4_weight_bytes(int v_blocks);

}  // namespace pikv::phases
