// choose_pages on the CPU: the best columns of each row without sorting them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "checks.h"
#include "cpu.h"

namespace pikv {
namespace {

constexpr int32_t kPinned = 0x7F800000;            // the key of +inf
constexpr int32_t kHidden = (int32_t)0x807FFFFFu;  // that of -inf: nothing up to it is chosen
constexpr int kSamples = 256;  // of the keys of a row, by which it is known about where the last one that is chosen lies

// Ascends with the float.
inline int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

struct Room {
  std::vector<int32_t> keys, some;
};

// The wanted-th highest of the keys above kHidden, of which there are more. Those up to a key that is most likely below it are left out first.
int32_t last_key(Room& room, int64_t wanted, int64_t& above) {
  const int C = (int)room.keys.size(), step = std::max(1, C / kSamples), samples = (C + step - 1) / step;
  const auto descending = std::greater<int32_t>();
  room.some.resize(std::max(C, samples));
  for (int i = 0; i < samples; ++i) room.some[i] = room.keys[(size_t)i * step];
  const int64_t place = std::min<int64_t>(samples - 1, wanted * samples / C * 5 / 4 + 8);
  std::nth_element(room.some.begin(), room.some.begin() + place, room.some.begin() + samples, descending);
  int count = 0;
  for (int32_t floor = std::max(room.some[place], kHidden + 1); count < wanted; floor = kHidden + 1) {
    count = 0;
    for (int c = 0; c < C; ++c) room.some[count] = room.keys[c], count += room.keys[c] >= floor;
  }
  std::nth_element(room.some.begin(), room.some.begin() + (wanted - 1), room.some.begin() + count, descending);
  const int32_t last = room.some[wanted - 1];
  above = std::count_if(room.some.begin(), room.some.begin() + wanted, [&](int32_t key) { return key > last; });
  return last;
}

// Columns of the `budget` highest scores, all pinned ones among them, ascending; of equal scores the lower columns. The rest is -1.
void choose_row(const float* score, const uint8_t* hidden, const uint8_t* pinned, int C, int64_t budget, int32_t* out, int width, Room& room) {
  room.keys.resize(C);
  int seen = 0, num_pinned = 0;
  for (int c = 0; c < C; ++c) {
    const int32_t free = key_of(score[c]), shown = pinned[c] ? kPinned : free, key = hidden[c] ? kHidden : shown;
    room.keys[c] = key, num_pinned += key == kPinned, seen += key > kHidden;
  }
  const int64_t wanted = std::min<int64_t>(std::max<int64_t>(std::max<int64_t>(budget, num_pinned), 1), width);
  int32_t last = kHidden;
  int64_t ties = 0;  // of the last key that are taken
  if (seen > wanted) {
    int64_t above;
    last = last_key(room, wanted, above), ties = wanted - above;
  }
  int written = 0;
  for (int c = 0; c < C && written < width; ++c)
    if (room.keys[c] > last || (room.keys[c] == last && ties-- > 0)) out[written++] = c;
  std::fill(out + written, out + width, -1);
}

Tensor choose_pages(Tensor score, Tensor hidden, Tensor pinned, MaybeTensor budget, int64_t width) {
  PK_ONE_DEVICE("choose_pages", score, hidden, pinned, budget);
  PK_CHECK(score.dim() == 3 && score.scalar_type() == ScalarType::Float && score.is_contiguous(),
           "score must be contiguous float32 [Q, heads, columns], got ", dtype_name(score), " ", shape(score));
  const int64_t Q = score.size(0), H = score.size(1), C = score.size(2);
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>{"hidden", hidden}, {"pinned", pinned}})
    PK_CHECK(x.scalar_type() == ScalarType::Bool && x.dim() == 2 && x.size(0) == Q && x.size(1) == C && x.is_contiguous(), name,
             " must be contiguous bool [", Q, ", ", C, "], got ", dtype_name(x), " ", shape(x));
  PK_CHECK(!budget || (budget->scalar_type() == ScalarType::Long && budget->numel() == Q && budget->is_contiguous()),
           "budget must be contiguous int64 [", Q, "], got ", budget ? shape(*budget) : std::string());
  PK_CHECK(width >= 1, "width must be at least 1, got ", width);
  const int most = (int)std::min(width, C);
  Tensor list = torch::stable::new_empty(score, {Q, H, (int64_t)most}, ScalarType::Int);
  const float* scores = static_cast<const float*>(score.const_data_ptr());
  const uint8_t *hides = static_cast<const uint8_t*>(hidden.const_data_ptr()), *pins = static_cast<const uint8_t*>(pinned.const_data_ptr());
  const int64_t* budgets = budget ? static_cast<const int64_t*>(budget->const_data_ptr()) : nullptr;
  int32_t* out = static_cast<int32_t*>(list.mutable_data_ptr());
  if (!most) return list;
  torch::stable::parallel_for(0, Q * H, 1, [&](int64_t begin, int64_t end) {
    static thread_local Room room;
    for (int64_t i = begin; i < end; ++i)
      choose_row(scores + i * C, hides + i / H * C, pins + i / H * C, (int)C, budgets ? budgets[i / H] : width, out + i * most, most, room);
  });
  return list;
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) { m.impl("choose_pages", TORCH_BOX(&pikv::choose_pages)); }
