// Decode attention over two bf16 pages by attend_generic.cpp, and the same in double precision. Prints the largest relative error.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/attend.h"
#include "cpu/numbers.h"

using namespace pikv;

int main() {
  constexpr int D = 64, G = 4, P = 16, L = 27;
  const PageFormat f = make_page_format(kBf16, 1, D, D, P, 64, 0);
  std::vector<uint8_t> pages(3 * f.record_bytes, 0xff);
  const int32_t table[2] = {2, 0}, length = L;
  unsigned seed = 1;
  const auto number = [&] { return (float)((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1.0f; };
  std::vector<float> q(G * D), k(L * D), v(L * D);
  for (float& x : q) x = number();
  for (int t = 0; t < L; ++t)
    for (int d = 0; d < D; ++d) {
      uint8_t* record = pages.data() + table[t / P] * f.record_bytes + 2 * ((t % P) * D + d);
      const uint16_t key = float_to_bf16(number()), value = float_to_bf16(number());
      std::memcpy(record + f.k, &key, 2), std::memcpy(record + f.v, &value, 2);
      k[t * D + d] = bf16_to_float(key), v[t * D + d] = bf16_to_float(value);
    }
  Attend a = {};
  a.f = f, a.pages = pages.data(), a.num_pages = 3, a.table = table, a.seqlens = &length, a.q = q.data(), a.q_type = kFp32;
  a.R = a.T = a.S = a.H = a.table_heads = a.seqlen_heads = 1, a.G = G, a.max_pages = a.num_columns = 2, a.scale = 0.125f;
  std::vector<float> out(G * D), lse(G);
  attend_baseline(a, {0, 0, 0, 2, false, out.data(), lse.data()});
  double worst = 0;
  const auto note = [&](double error) __attribute__((noinline)) { if (!(std::fabs(error) <= worst)) worst = std::fabs(error); };  // NaN too
  for (int g = 0; g < G; ++g) {
    double total = 0, sum[D] = {};
    for (int t = 0; t < L; ++t) {
      double s = 0;
      for (int d = 0; d < D; ++d) s += (double)q[g * D + d] * k[t * D + d];
      const double e = std::exp(s * 0.125);
      total += e;
      for (int d = 0; d < D; ++d) sum[d] += e * v[t * D + d];
    }
    for (int d = 0; d < D; ++d) note(out[g * D + d] - sum[d] / total);
    note(lse[g] - std::log(total));
  }
  std::printf("error %.3e\n", worst);
}
