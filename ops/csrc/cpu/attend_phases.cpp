// Attention of one unit in phases of up to 64 tokens, with AVX512 and VNNI: all scores of a phase, one softmax, all values.
//
// Against tiles of 16 tokens and one row (attend_vnni.cpp) a key is loaded once for all rows of the query, a chain of latencies is paid once
// in 64 tokens, and sums of values stay in registers. What is hidden inside a phase has weight 0: integer codes of hidden slots are read and
// count nothing, rows of floats are replaced by zeros before, as they may hold anything. A later page is read ahead line by line inside the
// arithmetic.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "phase_lanes.h"
#include "phase_scratch.h"

namespace pikv {
namespace {

using namespace phases;

constexpr float kLn2 = 0.69314718f;
constexpr int kAheadBytes = 16 << 10;  // of the section of a head, between reading ahead and use

// Tokens of a phase: they divide a page and share the scales of a group.
int phase_tokens(const PageFormat& f) {
  for (int tokens : {64, 32, 16})
    if (f.page_size % tokens == 0 && (!format_grouped(f.format) || f.group % tokens == 0)) return tokens;
  return 0;
}

uint64_t visible_tokens(const Attend& a, const Unit& u, int t, const int32_t* positions, int count) {
  if (!a.window && !a.causal) return first_bits(count);
  const int asked = a.asked[(int64_t)(u.n / a.S) * a.T + t];
  uint64_t visible = 0;
  for (int i = 0; i < count; i += 16) {
    __mmask16 seen = (__mmask16)first_bits(std::min(16, count - i));
    const __m512i p = _mm512_maskz_loadu_epi32(seen, positions + i);
    if (a.window) seen &= _mm512_cmpgt_epi32_mask(p, _mm512_set1_epi32((int)std::max<int64_t>((int64_t)asked - a.window, INT32_MIN)));
    if (a.causal) seen &= _mm512_cmple_epi32_mask(p, _mm512_set1_epi32(asked));
    visible |= (uint64_t)seen << i;
  }
  return visible;
}

float sum_of_lanes(const float* lanes, int size, int r) {
  float sum = 0;
  for (int i = 0; i < 16 >> size; ++i) sum += lanes[r * (16 >> size) + i];
  return sum;
}

float log_sum(const Rows& rows, const float* l, int r) {
  const float sum = sum_of_lanes(l, rows.size, r);
  return sum > 0 ? (rows.m[r * (16 >> rows.size)] + std::log2(sum)) * kLn2 : -kInf;
}

void finish(const Attend& a, const Unit& u, const Scratch& own) {
  const PageFormat& f = a.f;
  const std::vector<int>& order = own.sums.at;
  for (const Rows& rows : own.rows)
    for (int r = 0; r < rows.count; ++r) {
      const float l = sum_of_lanes(rows.l, rows.size, r), inverse = l > 0 ? 1 / l : 0.0f;
      float* out = u.out + (int64_t)(rows.first + r) * f.v_dim;
      for (int d = 0; d < f.v_dim; ++d) out[d] = rows.acc[(size_t)r * own.w.sums + order[d]] * inverse;
      u.lse[rows.first + r] = log_sum(rows, rows.l, r);
    }
}

// Points the phase at rows of values of which the hidden ones are zeros.
void hide_values(const PageFormat& f, Phase& phase, Work& w) {
  for (int t = 0; t < phase.count; ++t) {
    uint8_t* to = w.clean + (size_t)t * f.v_row_bytes;
    if (phase.visible >> t & 1) std::memcpy(to, phase.v + t * phase.v_stride, f.v_row_bytes);
    else std::memset(to, 0, f.v_row_bytes);
  }
  phase.v = w.clean;
}

// How often `lines` lines are read ahead in `count` tokens of a page. Evenly over the arithmetic: scores count twice, as they take as long as
// the values and read once where those read several times; the softmax reads none, as it is over so soon that its lines would come in a
// burst, which waits for the memory. With AMX it is a good part of the whole, and keys of few bits have so few lines that no burst is too large:
// there all three steps read alike.
bool reads_alike(Tier tier, const PageFormat& f) { return tier == Tier::kAmx || (format_grouped(f.format) && format_bits(f.format) < 8); }

int reads_of(Tier tier, const PageFormat& f, bool fast, const Scratch& own, int count) {
  if (reads_alike(tier, f)) return count / 4 * (int)own.rows.size() * 4;
  int reads = 0;
  for (const Rows& rows : own.rows) {
    const int registers = own.w.sums / 16, at_once = rows.size == 2 && (!fast || f.v_format == kFp4) ? 2 : 4;
    const int value_reads = by_codes(tier, f.v_format) ? registers / at_once : registers / 4;
    reads += count * (1 << rows.size) / 16 * (2 + value_reads);
  }
  return reads;
}

Phase phase_at(const PageFormat& f, const uint8_t* head, int t0, int tokens, bool page_lse) {
  Phase phase = {};
  const int64_t group = format_grouped(f.format) ? 2ll * (t0 / f.group) * f.k_dim : 0;
  phase.k = head + f.k + (int64_t)t0 * f.k_row_bytes, phase.k_stride = f.k_row_bytes;
  phase.v = head + f.v + (int64_t)t0 * f.v_row_bytes, phase.v_stride = f.v_row_bytes;
  const bool fp4_keys = f.format == kFp4, fp4_values = f.v_format == kFp4;
  phase.k_scale = head + f.k_scale + (format_grouped(f.format) ? group : (int64_t)t0 * (fp4_keys ? fp4_blocks(f.k_dim) : 2));
  phase.k_zero = head + f.k_zero + (fp4_keys ? t0 : group);
  phase.v_scale = head + f.v_scale + (int64_t)t0 * (fp4_values ? fp4_blocks(f.v_dim) : 2);
  phase.v_zero = head + f.v_zero + (int64_t)t0 * (fp4_values ? 1 : 2);
  phase.count = tokens, phase.page_lse = page_lse;
  return phase;
}

bool phases_serve(const Attend& a, Tier tier) {
  const PageFormat& f = a.f;
  const bool widths = f.k_dim % 64 == 0 && f.v_dim % 64 == 0 && f.k_dim <= 256 && f.v_dim <= 256;
  const int tokens = phase_tokens(f), fewest = tier == Tier::kAmx ? (format_grouped(f.format) || format_grouped(f.v_format) ? 64 : 32) : 16;
  // One lot of rows over bf16 pages waits for memory, and unpacking pairs of values only adds to that.
  if (tier == Tier::kAmx && f.format == kBf16 && f.v_format == kBf16 && a.rows() <= 4) return false;
  // Floats come four rows at a time: for one or two that is more arithmetic than tiles of 16 tokens take. With AMX only fp4's is.
  const bool floats = !format_grouped(f.format) || !format_grouped(f.v_format), fp4 = f.format == kFp4 || f.v_format == kFp4;
  if (a.rows() <= 2 && (fp4 || (floats && tier == Tier::kBf16))) return false;
  return !f.latent && widths && tokens >= fewest && serves(tier, f.format) && serves(tier, f.v_format);
}

void attend_phases(const Attend& a, const Unit& u, Tier tier) {
  static thread_local Scratch own_scratch;
  Scratch* own = &own_scratch;
  asm("" : "+r"(own));  // else the compiler looks up the thread's memory anew in every loop
  prepare(a, u, tier, *own);
  Work& w = own->w;
  const PageFormat& f = a.f;
  const int tokens = phase_tokens(f), limit = a.paged(u.n, u.h);
  const int32_t *table = a.table_of(u.n, u.h), *list = a.list_of(u.n, u.h);
  const auto column_of = [&](int c) { return list ? list[c] : c; };
  const auto count_of = [&](int column) { return column < 0 ? 0 : std::min(f.page_size, limit - column * f.page_size); };
  const auto section_of = [&](int column) { return a.section(a.pages + (int64_t)table[column] * f.record_bytes, u.h); };
  KeyPhase keys[kSizes];
  ValuePhase values[kSizes];
  for (int size = 0; size < kSizes; ++size)
    keys[size] = key_phase(tier, f.format, f.k_dim, a.fast, size), values[size] = value_phase(tier, f.v_format, f.v_dim, a.fast, size);
  if (tier == Tier::kAmx) amx_start();
  const int last = list ? a.num_columns : (limit + f.page_size - 1) / f.page_size;  // the next piece is read by this thread as a rule
  const int distance = (int)std::clamp<int64_t>(kAheadBytes / f.head_bytes, 1, 8);
  const bool floats = !by_codes(tier, f.v_format), float_keys = !by_codes(tier, f.format);
  w.one_by_one = own->rows.size() == 1;
  for (int c = u.c0; c < u.c1; ++c) {
    const int column = column_of(c), count = count_of(column);
    Ahead ahead = {nullptr, nullptr, a.first_level};
    if (c + distance < last && count_of(column_of(c + distance)) > 0) {
      ahead.at = section_of(column_of(c + distance)), ahead.end = ahead.at + f.head_bytes;
    }
    const bool alike = reads_alike(tier, f);
    const int reads = std::max(1, reads_of(tier, f, a.fast, *own, count)), lines = (int)((f.head_bytes / 64 + reads - 1) / reads);
    for (int t0 = 0; t0 < count; t0 += tokens) {
      const uint8_t *record = a.pages + (int64_t)table[column] * f.record_bytes, *head = a.section(record, u.h);
      const int32_t* positions = reinterpret_cast<const int32_t*>(record + f.positions) + t0;
      Phase phase = phase_at(f, head, t0, tokens, a.page_lse != nullptr);
      const uint8_t *rows_of_values = phase.v, *values_there = nullptr;
      bool keys_there = false;
      int t = -1;
      for (Rows& rows : own->rows) {
        if (rows.t != t) {
          t = rows.t;
          phase.visible = visible_tokens(a, u, t, positions, std::min(tokens, count - t0)), phase.v = rows_of_values;
          phase.all = phase.visible == first_bits(tokens);
          if (!phase.all && floats) hide_values(f, phase, w);
        }
        if (!phase.visible) continue;
        const KeyPhase& key = keys[rows.size];
        const ValuePhase& value = values[rows.size];
        if (key.unpack && !keys_there && !(float_keys && w.one_by_one)) key.unpack(phase, w, ahead, lines), keys_there = true;
        if (value.unpack && phase.v != values_there && !(floats && w.one_by_one)) {
          value.unpack(phase, w, ahead, lines);
          values_there = phase.v == w.clean ? nullptr : phase.v;
        }
        if (key.start_group) key.start_group(rows, phase, w);
        key.scores(rows, phase, w, ahead, alike ? lines : 2 * lines);
        value.soften(rows, phase, w, ahead, alike ? lines : 0);
        value.add(rows, phase, w, ahead, lines);
      }
    }
    if (!a.page_lse) continue;
    for (Rows& rows : own->rows) {
      for (int r = 0; r < rows.count; ++r) a.page_lse_row(u.n, u.h, rows.first + r)[c] = log_sum(rows, rows.page_l, r);
      std::memset(rows.page_l, 0, 64);
    }
  }
  if (tier == Tier::kAmx) amx_end();
  finish(a, u, *own);
}

}  // namespace

bool phases_vnni_serve(const Attend& a) { return phases_serve(a, Tier::kVnni); }
bool phases_bf16_serve(const Attend& a) { return phases_serve(a, Tier::kBf16); }
bool phases_amx_serve(const Attend& a) { return phases_serve(a, Tier::kAmx); }
void attend_phases_vnni(const Attend& a, const Unit& u) { attend_phases(a, u, Tier::kVnni); }
void attend_phases_bf16(const Attend& a, const Unit& u) { attend_phases(a, u, Tier::kBf16); }
void attend_phases_amx(const Attend& a, const Unit& u) { attend_phases(a, u, Tier::kAmx); }

}  // namespace pikv
