// route_pack, route_unpack and route_merge on the CPU. Bytes only, but for the merge; values keep their bits.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "route_layout.h"

namespace pikv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

Tensor route_pack(Tensor buffer, Tensor need, std::vector<Tensor> fields, std::vector<int64_t> groups, int64_t own, bool dense) {
  PK_ONE_DEVICE("route_pack", buffer, need, fields);
  const std::vector<RoutedField> read = read_sent(buffer, need, fields, groups, own);
  const int64_t K = need.size(0), G = need.size(1), N = need.size(2), most = buffer.size(1);
  const bool* asked = static_cast<const bool*>(need.const_data_ptr());
  uint8_t* message = static_cast<uint8_t*>(buffer.mutable_data_ptr());
  Tensor sizes = new_tensor({G}, aoti_torch_dtype_int64());
  int64_t* size = static_cast<int64_t*>(sizes.mutable_data_ptr());
  std::vector<int32_t> rows[kMostGroups];  // the token of each row
  for (int64_t g = 0; g < G; ++g) {
    int64_t counts[kMostGroups] = {};
    int32_t header[4] = {};
    for (int64_t k = 0; k < K; ++k) {
      rows[k].clear();
      const bool* of_rank = asked + (k * G + g) * N;
      for (int64_t t = 0; t < N; ++t)
        if (of_rank[t] || !dense) rows[k].push_back(of_rank[t] ? (int32_t)t : -1);
      counts[k] = header[k] = (int32_t)rows[k].size();
    }
    const Message m = sections_of(read, (int)K, counts, N);
    std::memcpy(message, header, sizeof header);
    for (int64_t k = 0; k < K; ++k)
      if (counts[k]) std::memcpy(message + m.tokens[k], rows[k].data(), counts[k] * 4);
    for (size_t i = 0; i < read.size(); ++i) {
      const RoutedField& f = read[i];
      uint8_t* to = message + m.fields[i];
      if (!f.row_bytes) continue;
      if (f.group < 0) {
        if (f.rows) std::memcpy(to, f.data, f.rows * f.row_bytes);
        for (int64_t r = f.rows; r < N; ++r)
          for (int64_t at = 0; at < f.row_bytes; at += 8) std::memcpy(to + r * f.row_bytes + at, &f.padding, std::min<int64_t>(8, f.row_bytes - at));
        continue;
      }
      for (int64_t r = 0; r < counts[f.group]; ++r, to += f.row_bytes) {
        const int32_t t = rows[f.group][r];
        PK_CHECK(t < f.rows, "route_pack: need names token ", t, " of field ", i, ", which has ", f.rows);
        if (t >= 0) std::memcpy(to, f.data + t * f.row_bytes, f.row_bytes);
      }
    }
    size[g] = g == own || !dense ? most : m.bytes;
    message += size[g];
  }
  return sizes;
}

void route_unpack(Tensor buffer, std::vector<Tensor> fields, Tensor tokens, Tensor counts, std::vector<int64_t> groups, bool dense) {
  PK_ONE_DEVICE("route_unpack", buffer, fields, tokens, counts);
  const std::vector<RoutedField> read = read_arrived(buffer, fields, tokens, counts, groups);
  const int64_t K = counts.size(0), G = counts.size(1), all = tokens.size(1), N = G ? all / G : 0;
  int32_t* token = static_cast<int32_t*>(tokens.mutable_data_ptr());
  int32_t* count = static_cast<int32_t*>(counts.mutable_data_ptr());
  std::fill(token, token + K * all, -1);
  int64_t done[kMostGroups] = {};
  for (int64_t g = 0; g < G; ++g) {
    const uint8_t* message = static_cast<const uint8_t*>(buffer.const_data_ptr()) + g * buffer.size(1);
    int32_t header[4];
    int64_t sent[kMostGroups] = {}, to[kMostGroups] = {};
    std::memcpy(header, message, sizeof header);
    for (int64_t k = 0; k < K; ++k) {
      PK_CHECK(header[k] >= 0 && header[k] <= N, "route_unpack: rank ", g, " has sent ", header[k], " rows of ", N, " tokens");
      count[k * G + g] = header[k];
      sent[k] = header[k];
      to[k] = dense ? done[k] : g * N;
      done[k] += sent[k];
    }
    const Message m = sections_of(read, (int)K, sent, N);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t r = 0; r < sent[k]; ++r) {
        int32_t t;
        std::memcpy(&t, message + m.tokens[k] + 4 * r, 4);
        token[k * all + to[k] + r] = t < 0 ? -1 : (int32_t)(g * N + t);
      }
    for (size_t i = 0; i < read.size(); ++i) {
      const RoutedField& f = read[i];
      const uint8_t* from = message + m.fields[i];
      if (!f.row_bytes) continue;
      if (f.group < 0) {
        std::memcpy(f.data + g * N * f.row_bytes, from, N * f.row_bytes);
      } else if (dense) {
        if (sent[f.group]) std::memcpy(f.data + to[f.group] * f.row_bytes, from, sent[f.group] * f.row_bytes);
      } else {
        for (int64_t r = 0; r < sent[f.group]; ++r)
          if (token[f.group * all + to[f.group] + r] >= 0) std::memcpy(f.data + (to[f.group] + r) * f.row_bytes, from + r * f.row_bytes, f.row_bytes);
      }
    }
  }
}

// As merge_rows of attend.cpp, over the ranks that were asked.
void merge_head(const std::vector<const float*>& parts, int64_t D, float* to, float* to_lse) {
  float top = -kInf, total = 0;
  for (const float* part : parts) top = std::max(top, part[D]);
  const float base = top == -kInf ? 0.0f : top;
  std::fill(to, to + D, 0.0f);
  for (const float* part : parts) {
    if (part[D] == -kInf) continue;
    const float weight = std::exp(part[D] - base);
    total += weight;
    for (int64_t d = 0; d < D; ++d) to[d] += weight * part[d];
  }
  if (total != 1 && total != 0)
    for (int64_t d = 0; d < D; ++d) to[d] /= total;
  *to_lse = top + std::log(total);
}

std::tuple<Tensor, Tensor> route_merge(Tensor partials, Tensor need, std::vector<int64_t> order, bool dense) {
  PK_ONE_DEVICE("route_merge", partials, need);
  check_route_merge(partials, need, order);
  const int64_t G = need.size(0), N = need.size(1), H = partials.size(1), width = partials.size(2), D = width - 1;
  const bool* asked = static_cast<const bool*>(need.const_data_ptr());
  const float* from = static_cast<const float*>(partials.const_data_ptr());
  std::vector<int64_t> row(G * N, -1);  // of each rank and token, in `partials`
  int64_t used = 0;
  for (int64_t i = 0; i < G * N; ++i) {
    if (asked[i]) row[i] = dense ? used : i;
    used += asked[i];
  }
  PK_CHECK((dense ? used : G * N) <= partials.size(0), "route_merge: need asks for ", dense ? used : G * N, " rows, partials have ", partials.size(0));
  Tensor out = new_floats({N, H, D}), lse = new_floats({N, H});
  float* to = static_cast<float*>(out.mutable_data_ptr());
  float* to_lse = static_cast<float*>(lse.mutable_data_ptr());
  torch::stable::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
    std::vector<const float*> parts;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < H; ++h) {
        parts.clear();
        for (const int64_t rank : order)
          if (row[rank * N + t] >= 0) parts.push_back(from + (row[rank * N + t] * H + h) * width);
        merge_head(parts, D, to + (t * H + h) * D, to_lse + t * H + h);
      }
  });
  return {out, lse};
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("route_pack", TORCH_BOX(&pikv::route_pack));
  m.impl("route_unpack", TORCH_BOX(&pikv::route_unpack));
  m.impl("route_merge", TORCH_BOX(&pikv::route_merge));
}
