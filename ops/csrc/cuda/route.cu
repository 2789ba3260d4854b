// route_pack, route_unpack and route_merge: checks and launches. Messages have a place for every token; nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/route_layout.h"
#include "arguments.h"
#include "kernels.h"

namespace pikv {
namespace {

constexpr int kMostFields = sizeof Route::fields / sizeof(RouteField);
constexpr int kMostRanks = sizeof RouteMerge::order / sizeof(int);

void check_places(const char* op, bool dense) {
  PK_CHECK(!dense, op, ": dense messages are packed on the CPU; on a device every token has a place (dense False), so that sizes are known");
}

void run(const char* op, Route r, const Tensor& buffer, const std::vector<RoutedField>& fields, bool unpack) {
  PK_CHECK(fields.size() <= kMostFields, op, ": ", fields.size(), " fields, at most ", kMostFields);
  const int64_t full[kMostGroups] = {r.N, r.N, r.N, r.N};
  const Message m = sections_of(fields, r.K, full, r.N);
  r.buffer = const_cast<unsigned char*>(static_cast<const unsigned char*>(buffer.const_data_ptr()));
  r.most = buffer.size(1);
  r.num_fields = (int)fields.size();
  for (int k = 0; k < r.K; ++k) r.token_start[k] = m.tokens[k];
  for (size_t i = 0; i < fields.size(); ++i)
    r.fields[i] = {fields[i].data, fields[i].rows, fields[i].row_bytes, m.fields[i], fields[i].padding, fields[i].group};
  const Device device(buffer);
  const int64_t blocks = std::min<int64_t>((int64_t)r.G * r.N, 8LL * device.num_processors());
  if (blocks) check_launch(launch_route(r, (int)blocks, unpack, device.stream()));
}

Tensor route_pack(Tensor buffer, Tensor need, std::vector<Tensor> fields, std::vector<int64_t> groups, int64_t own, bool dense) {
  PK_ONE_DEVICE("route_pack", buffer, need, fields);
  const std::vector<RoutedField> read = read_sent(buffer, need, fields, groups, own);
  check_places("route_pack", dense);
  Route r = {};
  r.need = static_cast<const unsigned char*>(need.const_data_ptr());
  r.K = (int)need.size(0), r.G = (int)need.size(1), r.N = (int)need.size(2);
  run("route_pack", r, buffer, read, false);
  Tensor sizes = torch::stable::new_empty(buffer, {buffer.size(0)}, ScalarType::Long);
  return torch::stable::fill_(sizes, (double)buffer.size(1));
}

void route_unpack(Tensor buffer, std::vector<Tensor> fields, Tensor tokens, Tensor counts, std::vector<int64_t> groups, bool dense) {
  PK_ONE_DEVICE("route_unpack", buffer, fields, tokens, counts);
  const std::vector<RoutedField> read = read_arrived(buffer, fields, tokens, counts, groups);
  check_places("route_unpack", dense);
  Route r = {};
  r.tokens = static_cast<int*>(tokens.mutable_data_ptr());
  r.counts = static_cast<int*>(counts.mutable_data_ptr());
  r.K = (int)counts.size(0), r.G = (int)counts.size(1), r.N = r.G ? (int)(tokens.size(1) / r.G) : 0;
  run("route_unpack", r, buffer, read, true);
}

std::tuple<Tensor, Tensor> route_merge(Tensor partials, Tensor need, std::vector<int64_t> order, bool dense) {
  PK_ONE_DEVICE("route_merge", partials, need);
  check_route_merge(partials, need, order);
  check_places("route_merge", dense);
  RouteMerge m = {};
  m.G = (int)need.size(0), m.N = (int)need.size(1), m.H = (int)partials.size(1), m.D = (int)partials.size(2) - 1;
  PK_CHECK(m.G <= kMostRanks, "route_merge: ", m.G, " ranks, at most ", kMostRanks);
  PK_CHECK((int64_t)m.G * m.N <= partials.size(0), "route_merge: need asks for ", (int64_t)m.G * m.N, " rows, partials have ", partials.size(0));
  Tensor out = torch::stable::new_empty(partials, {m.N, m.H, m.D}), lse = torch::stable::new_empty(partials, {m.N, m.H});
  m.partials = static_cast<const float*>(partials.const_data_ptr());
  m.need = static_cast<const unsigned char*>(need.const_data_ptr());
  m.out = static_cast<float*>(out.mutable_data_ptr());
  m.lse = static_cast<float*>(lse.mutable_data_ptr());
  for (int i = 0; i < m.G; ++i) m.order[i] = (int)order[i];
  const Device device(partials);
  if ((int64_t)m.N * m.H) check_launch(launch_route_merge(m, device.stream()));
  return {out, lse};
}

}  // namespace
}  // namespace pikv

PK_LIBRARY_IMPL(m) {
  m.impl("route_pack", TORCH_BOX(&pikv::route_pack));
  m.impl("route_unpack", TORCH_BOX(&pikv::route_unpack));
  m.impl("route_merge", TORCH_BOX(&pikv::route_merge));
}
