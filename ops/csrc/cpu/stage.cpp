// What lies in staging, of pages in two tiers: which listed pages are there, which take whose place, and their bytes. On the CPU alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "checks.h"

namespace pikv {
namespace {

constexpr int32_t kNowhere = -1, kComing = -2;

// X sections of a record, each with G slots of its own; Q far pages.
struct Staging {
  int32_t* slot;   // [X, Q], -1 = not staged
  int64_t* held;   // [X, G] far pages, -1 = none
  int64_t* asked;  // [X, G] clock
  bool* ahead;     // [X, G]
  int64_t X, Q, G, first_far;

  bool is_far(int32_t id) const { return id >= first_far; }
  // The m slots of a section that were asked for longest ago, before `clock`; of equal ones the lower.
  void oldest(int64_t x, int64_t clock, int64_t m, std::vector<int32_t>& found) const {
    const int64_t* when = asked + x * G;
    found.clear();
    for (int64_t g = 0; g < G; ++g)
      if (when[g] < clock) found.push_back((int32_t)g);
    const auto older = [when](int32_t a, int32_t b) { return when[a] != when[b] ? when[a] < when[b] : a < b; };
    m = std::min<int64_t>(m, (int64_t)found.size());
    std::partial_sort(found.begin(), found.begin() + m, found.end(), older);
    found.resize(m);
  }
  void place(int64_t x, int32_t far, int32_t g, int64_t clock, bool early) {
    const int64_t gone = held[x * G + g];
    if (gone >= 0) slot[x * Q + gone] = kNowhere;
    held[x * G + g] = far, slot[x * Q + far] = g, asked[x * G + g] = clock, ahead[x * G + g] = early;
  }
};

Staging read_staging(const Tensor& slot, const Tensor& held, const Tensor& asked, const Tensor& ahead, int64_t first_far) {
  PK_CHECK(slot.scalar_type() == ScalarType::Int && slot.dim() == 2 && slot.is_contiguous(), "slot must be contiguous int32 [sections, far pages], got ",
           dtype_name(slot), " ", shape(slot));
  const int64_t X = slot.size(0), G = held.dim() == 2 ? held.size(1) : -1;
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>{"held", held}, {"asked", asked}})
    PK_CHECK(x.scalar_type() == ScalarType::Long && x.dim() == 2 && x.size(0) == X && x.size(1) == G && x.is_contiguous(), name,
             " must be contiguous int64 [", X, ", slots], got ", dtype_name(x), " ", shape(x));
  PK_CHECK(ahead.scalar_type() == ScalarType::Bool && ahead.dim() == 2 && ahead.size(0) == X && ahead.size(1) == G && ahead.is_contiguous(),
           "ahead must be contiguous bool [", X, ", ", G, "], got ", shape(ahead));
  return {static_cast<int32_t*>(slot.mutable_data_ptr()), static_cast<int64_t*>(held.mutable_data_ptr()),
          static_cast<int64_t*>(asked.mutable_data_ptr()), static_cast<bool*>(ahead.mutable_data_ptr()), X, slot.size(1), G, first_far};
}

// Ids of tables [N, 1, C] whose listed columns are read.
struct Listed {
  const int32_t *table, *list;
  int64_t N, heads, C, K;
  const int32_t* columns(int64_t n, int64_t h) const { return list + (n * heads + h) * K; }
  int32_t id(int64_t n, int32_t column) const { return table[n * C + column]; }
};

Listed read_listed(const Tensor& block_table, const Tensor& page_list, const Staging& s) {
  PK_CHECK(block_table.scalar_type() == ScalarType::Int && block_table.dim() == 3 && block_table.size(1) == 1 && block_table.is_contiguous(),
           "block_table must be contiguous int32 [N, 1, columns], got ", dtype_name(block_table), " ", shape(block_table));
  PK_CHECK(page_list.scalar_type() == ScalarType::Int && page_list.dim() == 3 && page_list.size(0) == block_table.size(0) &&
               (s.X == 1 || page_list.size(1) == s.X) && page_list.is_contiguous(),
           "page_list must be contiguous int32 [", block_table.size(0), ", ", s.X, ", num_listed], got ", dtype_name(page_list), " ",
           shape(page_list));
  const Listed l = {static_cast<const int32_t*>(block_table.const_data_ptr()), static_cast<const int32_t*>(page_list.const_data_ptr()),
                    block_table.size(0), page_list.size(1), block_table.size(2), page_list.size(2)};
  for (int64_t n = 0; n < l.N; ++n)
    for (int64_t i = 0; i < l.heads * l.K; ++i) {
      const int32_t column = l.columns(n, 0)[i];
      if (column < 0) continue;
      PK_CHECK(column < l.C, "page_list names column ", column, " of a block table with ", l.C);
      const int32_t id = l.id(n, column);
      PK_CHECK(id >= 0 && id < s.first_far + s.Q, "block_table names page ", id, ", there are ", s.first_far + s.Q);
    }
  return l;
}

using Staged = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Staged stage(Tensor block_table, Tensor page_list, Tensor slot, Tensor held, Tensor asked, Tensor ahead, int64_t first_far, int64_t num_near,
             int64_t clock) {
  PK_ONE_DEVICE("stage", block_table, page_list, slot, held, asked, ahead);
  Staging s = read_staging(slot, held, asked, ahead, first_far);
  const Listed l = read_listed(block_table, page_list, s);
  const auto ints = aoti_torch_dtype_int32(), longs = aoti_torch_dtype_int64();
  Tensor table = new_tensor({l.N, s.X, l.C}, ints), listed = new_tensor({l.N, l.heads, l.K}, ints), left = new_tensor({l.N, l.heads, l.K}, ints);
  Tensor coming = new_tensor({s.X * s.G, 3}, longs), counts = new_tensor({4}, longs);
  int32_t *ids = static_cast<int32_t*>(table.mutable_data_ptr()), *now = static_cast<int32_t*>(listed.mutable_data_ptr()),
          *later = static_cast<int32_t*>(left.mutable_data_ptr());
  int64_t *moves = static_cast<int64_t*>(coming.mutable_data_ptr()), num_coming = 0, wanted = 0, used_ahead = 0, num_left = 0;
  std::memset(ids, 0, sizeof(int32_t) * l.N * s.X * l.C);
  std::vector<int32_t> missing, places;
  for (int64_t x = 0; x < s.X; ++x) {
    const int64_t h0 = s.X == 1 ? 0 : x, h1 = s.X == 1 ? l.heads : x + 1;
    const auto each = [&](auto&& visit) {
      for (int64_t n = 0; n < l.N; ++n)
        for (int64_t h = h0; h < h1; ++h)
          for (int64_t k = 0; k < l.K; ++k) visit(n, (n * l.heads + h) * l.K + k, l.columns(n, h)[k]);
    };
    int64_t there = 0;
    missing.clear();
    each([&](int64_t n, int64_t, int32_t column) {
      if (column < 0 || !s.is_far(l.id(n, column))) return;
      const int32_t far = l.id(n, column) - (int32_t)first_far;
      int32_t& at = s.slot[x * s.Q + far];
      if (at == kNowhere) {
        at = kComing, missing.push_back(far);
      } else if (at >= 0 && s.asked[x * s.G + at] != clock) {
        s.asked[x * s.G + at] = clock, ++there;
        used_ahead += s.ahead[x * s.G + at], s.ahead[x * s.G + at] = false;
      }
    });
    const int64_t take = std::min<int64_t>((int64_t)missing.size(), s.G - there);
    for (size_t i = take; i < missing.size(); ++i) s.slot[x * s.Q + missing[i]] = kNowhere;
    s.oldest(x, clock, take, places);
    wanted += there + take;
    for (int64_t i = 0; i < take; ++i) {
      s.place(x, missing[i], places[i], clock, false);
      int64_t* move = moves + 3 * num_coming++;
      move[0] = missing[i], move[1] = places[i], move[2] = x;
    }
    each([&](int64_t n, int64_t at, int32_t column) {
      now[at] = later[at] = -1;
      if (column < 0) return;
      const int32_t id = l.id(n, column), far = id - (int32_t)first_far;
      const int32_t where = s.is_far(id) ? s.slot[x * s.Q + far] : id;
      if (where < 0) {
        later[at] = column, ++num_left;
        return;
      }
      now[at] = column, ids[(n * s.X + x) * l.C + column] = s.is_far(id) ? (int32_t)num_near + where : id;
    });
  }
  std::fill(moves + 3 * num_coming, moves + 3 * s.X * s.G, -1);
  int64_t* counted = static_cast<int64_t*>(counts.mutable_data_ptr());
  counted[0] = num_coming, counted[1] = wanted, counted[2] = used_ahead, counted[3] = num_left;
  return {table, listed, left, coming, counts};
}

std::tuple<Tensor, Tensor> stage_ahead(Tensor score, Tensor hidden, Tensor block_table, Tensor slot, Tensor held, Tensor asked, Tensor ahead,
                                       int64_t first_far, int64_t clock, int64_t most) {
  PK_ONE_DEVICE("stage_ahead", score, hidden, block_table, slot, held, asked, ahead);
  Staging s = read_staging(slot, held, asked, ahead, first_far);
  PK_CHECK(block_table.scalar_type() == ScalarType::Int && block_table.dim() == 3 && block_table.size(1) == 1 && block_table.is_contiguous(),
           "block_table must be contiguous int32 [N, 1, columns], got ", dtype_name(block_table), " ", shape(block_table));
  const int64_t N = block_table.size(0), C = block_table.size(2);
  PK_CHECK(score.scalar_type() == ScalarType::Float && score.dim() == 3 && score.size(0) == N && score.size(1) == s.X && score.size(2) == C &&
               score.is_contiguous(),
           "score must be contiguous float32 [", N, ", ", s.X, ", ", C, "], got ", dtype_name(score), " ", shape(score));
  PK_CHECK(hidden.scalar_type() == ScalarType::Bool && hidden.dim() == 2 && hidden.size(0) == N && hidden.size(1) == C && hidden.is_contiguous(),
           "hidden must be contiguous bool [", N, ", ", C, "], got ", dtype_name(hidden), " ", shape(hidden));
  const int32_t* ids = static_cast<const int32_t*>(block_table.const_data_ptr());
  const float* scores = static_cast<const float*>(score.const_data_ptr());
  const bool* hides = static_cast<const bool*>(hidden.const_data_ptr());
  Tensor coming = new_tensor({s.X * s.G, 3}, aoti_torch_dtype_int64()), count = new_tensor({1}, aoti_torch_dtype_int64());
  int64_t *moves = static_cast<int64_t*>(coming.mutable_data_ptr()), num_coming = 0;
  for (int64_t i = 0; i < N * C; ++i)
    PK_CHECK(hides[i] || ids[i] < first_far + s.Q, "block_table names page ", ids[i], ", there are ", first_far + s.Q);
  std::vector<std::pair<float, int32_t>> best;  // minus the score, far page: ascending
  std::vector<int32_t> places;
  for (int64_t x = 0; x < s.X; ++x) {
    s.oldest(x, clock, most, places);
    best.clear();
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < C; ++c) {
        const int32_t id = ids[n * C + c];
        const float value = scores[(n * s.X + x) * C + c];
        if (hides[n * C + c] || !s.is_far(id) || !(value > -INFINITY)) continue;
        if (s.slot[x * s.Q + id - first_far] == kNowhere) best.emplace_back(-value, id - (int32_t)first_far);
      }
    std::sort(best.begin(), best.end());
    size_t taken = 0;
    for (const auto& [value, far] : best) {
      if (taken == places.size()) break;
      if (s.slot[x * s.Q + far] != kNowhere) continue;  // another table has named it
      s.place(x, far, places[taken++], clock - 1, true);
      int64_t* move = moves + 3 * num_coming++;
      move[0] = far, move[1] = places[taken - 1], move[2] = x;
    }
  }
  std::fill(moves + 3 * num_coming, moves + 3 * s.X * s.G, -1);
  *static_cast<int64_t*>(count.mutable_data_ptr()) = num_coming;
  return {coming, count};
}

void gather_sections(Tensor target, std::vector<Tensor> source, Tensor records, Tensor coming, std::vector<int64_t> begins, int64_t first,
                     int64_t section_bytes) {
  PK_ONE_DEVICE("gather_sections", target, source, records, coming);
  PK_CHECK(target.scalar_type() == ScalarType::Byte && target.dim() == 2 && target.is_contiguous(),
           "target must be contiguous uint8 [num_pages, record_bytes]");
  const int64_t bytes = target.size(1), part = section_bytes;
  PK_CHECK(part >= 1 && part <= bytes, "section_bytes must be 1 to ", bytes, ", got ", part);
  PK_CHECK(begins.size() == source.size(), "begins has ", (int64_t)begins.size(), " numbers for ", (int64_t)source.size(), " sources");
  int64_t end = 0;
  for (size_t i = 0; i < source.size(); ++i) {
    PK_CHECK(source[i].scalar_type() == ScalarType::Byte && source[i].dim() == 2 && source[i].size(1) == bytes && source[i].is_contiguous(),
             "source ", (int64_t)i, " must be contiguous uint8 [num_pages, ", bytes, "]");
    PK_CHECK(begins[i] == end, "source ", (int64_t)i, " begins at record ", begins[i], ", the one before ends at ", end);
    end += source[i].size(0);
  }
  PK_CHECK(records.scalar_type() == ScalarType::Long && records.dim() == 1 && records.is_contiguous(), "records must be contiguous int64 [far pages]");
  PK_CHECK(coming.scalar_type() == ScalarType::Long && coming.dim() == 2 && coming.size(1) == 3 && coming.is_contiguous(),
           "coming must be contiguous int64 [n, 3], got ", dtype_name(coming), " ", shape(coming));
  const int64_t *at = static_cast<const int64_t*>(records.const_data_ptr()), *moves = static_cast<const int64_t*>(coming.const_data_ptr());
  const int64_t n = coming.size(0), num_far = records.size(0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t far = moves[3 * i], to = first + moves[3 * i + 1], section = moves[3 * i + 2];
    PK_CHECK(far >= 0 && far < num_far && at[far] >= 0 && at[far] < end, "coming names far page ", far, " of ", num_far);
    PK_CHECK(to >= first && to < target.size(0), "coming names slot ", to - first, ", there are ", target.size(0) - first);
    PK_CHECK(section >= 0 && section < bytes / part, "coming names section ", section, " of ", bytes / part);
  }
  uint8_t* out = static_cast<uint8_t*>(target.mutable_data_ptr());
  const auto where = [&](int64_t i) {
    const int64_t record = at[moves[3 * i]];
    const size_t in = std::upper_bound(begins.begin(), begins.end(), record) - begins.begin() - 1;
    return static_cast<const uint8_t*>(source[in].const_data_ptr()) + (record - begins[in]) * bytes + moves[3 * i + 2] * part;
  };
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(part, 1)), [&](int64_t begin, int64_t stop) {
    for (int64_t i = begin; i < stop; ++i) {
      if (i + 1 < stop) {  // the next one is on its way while this one is copied
        const uint8_t* next = where(i + 1);
        for (int64_t b = 0; b < std::min<int64_t>(part, 2048); b += 64) __builtin_prefetch(next + b);
      }
      std::memcpy(out + (first + moves[3 * i + 1]) * bytes + moves[3 * i + 2] * part, where(i), part);
    }
  });
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("stage", TORCH_BOX(&pikv::stage));
  m.impl("stage_ahead", TORCH_BOX(&pikv::stage_ahead));
  m.impl("gather_sections", TORCH_BOX(&pikv::gather_sections));
}
