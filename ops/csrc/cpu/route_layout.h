// Messages of route_pack and route_unpack: their arguments, read and refused alike on CPU and CUDA, and where the sections of a message lie.
#pragma once
#include "fields.h"

namespace pikv {

constexpr int kMostGroups = 4, kMessageHeader = 16;

struct RoutedField {
  uint8_t* data;
  int64_t rows, row_bytes;
  int group;  // -1 = every rank gets all rows
  uint64_t padding;
};

struct Message {
  std::vector<int64_t> fields;
  int64_t tokens[kMostGroups], bytes;
};

// counts: rows of each group.
inline Message sections_of(const std::vector<RoutedField>& fields, int num_groups, const int64_t* counts, int64_t num_tokens) {
  Message m = {};
  int64_t end = kMessageHeader;
  const auto section = [&](int64_t rows, int64_t width) {
    const int64_t start = end;
    end = (end + rows * width + 15) / 16 * 16;
    return start;
  };
  size_t i = 0;
  for (int group = -1; group < num_groups; ++group) {
    const int64_t rows = group < 0 ? num_tokens : counts[group];
    if (group >= 0) m.tokens[group] = section(rows, 4);
    for (; i < fields.size() && fields[i].group == group; ++i) m.fields.push_back(section(rows, fields[i].row_bytes));
  }
  m.bytes = end;
  return m;
}

// rows: of each field, exactly (unpack) or at most (pack).
inline std::vector<RoutedField> read_route(const char* op, const Tensor& buffer, const std::vector<Tensor>& fields,
                                          const std::vector<int64_t>& groups, int64_t num_groups) {
  PK_CHECK(buffer.scalar_type() == ScalarType::Byte && buffer.dim() == 2 && buffer.is_contiguous(), op,
           ": buffer must be contiguous uint8 [ranks, bytes], got ", dtype_name(buffer), " ", shape(buffer));
  PK_CHECK(groups.size() == fields.size(), op, ": ", fields.size(), " fields need as many groups, got ", groups.size());
  std::vector<RoutedField> read;
  for (size_t i = 0; i < fields.size(); ++i) {
    const Tensor& x = fields[i];
    PK_CHECK(x.dim() >= 1 && x.is_contiguous(), op, ": field ", i, " must be contiguous [rows, ...], got ", shape(x));
    const uint64_t padding = minus_one(x);
    PK_CHECK(groups[i] >= (i ? groups[i - 1] : -1) && groups[i] < num_groups, op, ": groups must ascend from -1 to ", num_groups - 1, ", got ",
             groups[i], " at ", i);
    read.push_back({const_cast<uint8_t*>(static_cast<const uint8_t*>(x.const_data_ptr())), x.size(0), row_bytes(x), (int)groups[i], padding});
  }
  return read;
}

inline void check_room(const char* op, const Tensor& buffer, const std::vector<RoutedField>& fields, int num_groups, int64_t num_tokens) {
  const int64_t full[kMostGroups] = {num_tokens, num_tokens, num_tokens, num_tokens};
  const int64_t most = sections_of(fields, num_groups, full, num_tokens).bytes;
  PK_CHECK(most <= buffer.size(1) && buffer.size(1) % 16 == 0, op, ": a message of ", num_tokens, " tokens takes ", most, " bytes, buffer has ",
           buffer.size(1), " for each; a multiple of 16");
}

inline std::vector<RoutedField> read_sent(const Tensor& buffer, const Tensor& need, const std::vector<Tensor>& fields,
                                         const std::vector<int64_t>& groups, int64_t own) {
  PK_CHECK(need.scalar_type() == ScalarType::Bool && need.dim() == 3 && need.is_contiguous(),
           "route_pack: need must be contiguous torch.bool [groups, ranks, tokens], got ",
           need.scalar_type() == ScalarType::Bool ? "torch.bool" : dtype_name(need), " ", shape(need));
  const int64_t K = need.size(0), G = need.size(1), N = need.size(2);
  std::vector<RoutedField> read = read_route("route_pack", buffer, fields, groups, K);
  PK_CHECK(K <= kMostGroups && G == buffer.size(0), "route_pack: need has ", K, " groups and ", G, " ranks, buffer has room for ", kMostGroups,
           " and ", buffer.size(0));
  PK_CHECK(own >= 0 && own < G, "route_pack: own = ", own, " of ", G, " ranks");
  for (size_t i = 0; i < read.size(); ++i)
    PK_CHECK(read[i].rows <= N, "route_pack: field ", i, " has ", read[i].rows, " rows, need ", N, " tokens");
  check_room("route_pack", buffer, read, (int)K, N);
  return read;
}

inline std::vector<RoutedField> read_arrived(const Tensor& buffer, const std::vector<Tensor>& fields, const Tensor& tokens, const Tensor& counts,
                                            const std::vector<int64_t>& groups) {
  PK_CHECK(counts.scalar_type() == ScalarType::Int && counts.dim() == 2 && counts.is_contiguous(),
           "route_unpack: counts must be contiguous torch.int32 [groups, ranks], got ", dtype_name(counts), " ", shape(counts));
  const int64_t K = counts.size(0), G = counts.size(1);
  std::vector<RoutedField> read = read_route("route_unpack", buffer, fields, groups, K);
  PK_CHECK(K <= kMostGroups && G == buffer.size(0), "route_unpack: counts has ", K, " groups and ", G, " ranks, buffer has room for ", kMostGroups,
           " and ", buffer.size(0));
  PK_CHECK(tokens.scalar_type() == ScalarType::Int && tokens.dim() == 2 && tokens.is_contiguous() && tokens.size(0) == K &&
               tokens.size(1) % std::max<int64_t>(G, 1) == 0,
           "route_unpack: tokens must be contiguous torch.int32 [", K, ", ", G, " * tokens], got ", dtype_name(tokens), " ", shape(tokens));
  for (size_t i = 0; i < read.size(); ++i)
    PK_CHECK(read[i].rows == tokens.size(1), "route_unpack: field ", i, " has ", read[i].rows, " rows, tokens ", tokens.size(1));
  check_room("route_unpack", buffer, read, (int)K, tokens.size(1) / std::max<int64_t>(G, 1));
  return read;
}

inline void check_route_merge(const Tensor& partials, const Tensor& need, const std::vector<int64_t>& order) {
  PK_CHECK(partials.scalar_type() == ScalarType::Float && partials.dim() == 3 && partials.size(2) > 0 && partials.is_contiguous(),
           "route_merge: partials must be contiguous torch.float32 [rows, heads, width + 1], got ", dtype_name(partials), " ", shape(partials));
  PK_CHECK(need.scalar_type() == ScalarType::Bool && need.dim() == 2 && need.is_contiguous(),
           "route_merge: need must be contiguous torch.bool [ranks, tokens], got ",
           need.scalar_type() == ScalarType::Bool ? "torch.bool" : dtype_name(need), " ", shape(need));
  std::vector<int64_t> sorted(order);
  std::sort(sorted.begin(), sorted.end());
  bool once = (int64_t)sorted.size() == need.size(0);
  std::string given;
  for (size_t i = 0; i < order.size(); ++i) {
    once = once && sorted[i] == (int64_t)i;
    given += (i ? ", " : "") + std::to_string(order[i]);
  }
  PK_CHECK(once, "route_merge: order must name ", need.size(0), " ranks once, got [", given, "]");
}

}  // namespace pikv
