// How the tokens of a call are shared out, as far as shapes tell; kernels/work.cuh does the rest on the device. ops/nvrtc/work.py is the same.
// Include kernels/params.cuh before it.
#pragma once
#include <algorithm>
#include <cstdint>

namespace pikv {

constexpr int kUnit = 64, kFineUnit = 16, kLeastTokens = 256;  // tokens of a unit, of one where there are few, and of a worker that has any
constexpr int kBlockWarps = 4;

// How many workers fill `slots` blocks best, when each of them is `passes` blocks: no more than four waves.
inline int64_t best_workers(int64_t passes, int64_t slots) {
  int64_t best = 1;
  double most = 0;
  for (int waves = 1; waves <= 4; ++waves) {
    const int64_t workers = std::max<int64_t>(1, waves * slots / passes), blocks = workers * passes;
    const double used = (double)blocks / (double)((blocks + slots - 1) / slots * slots);
    if (used > most + 0.02) most = used, best = workers;  // fewer parts, unless it pays
  }
  return best;
}

// Fills unit, workers, splits, least; the number of parts. rows: of a block; slots: blocks that run at once. num_splits 0 = chosen here.
inline int64_t share_work(Attend& a, int rows, int64_t slots, int64_t num_splits) {
  const int64_t tables = (int64_t)a.R * a.S * a.H, passes = ((int64_t)a.T * a.G + rows - 1) / rows;
  a.unit = a.page_lse ? a.block : std::min(a.block, kUnit);
  const auto rounds = [&] { return ((int64_t)a.num_columns * ((a.block + a.unit - 1) / a.unit) + kBlockWarps - 1) / kBlockWarps; };
  const int64_t workers = best_workers(passes, slots);
  if (!a.page_lse && tables * rounds() < 24 * workers) a.unit = std::min(a.block, kFineUnit);  // finer, so that all have as much
  a.workers = 0, a.splits = 1;
  a.least = (int)std::max<int64_t>(1, kLeastTokens / (kBlockWarps * a.unit));
  if (num_splits > 0) {
    a.splits = (int)std::min<int64_t>(num_splits, std::max(1, a.num_columns));
  } else if (rounds() > a.least && passes < slots) {
    a.workers = (int)std::min(workers, (tables * rounds() + a.least - 1) / a.least);
  }
  return a.workers ? a.workers + tables : tables * a.splits;
}

// Blocks of the launch.
inline int64_t count_blocks(const Attend& a, int rows) {
  const int64_t tables = (int64_t)a.R * a.S * a.H, passes = ((int64_t)a.T * a.G + rows - 1) / rows;
  return (a.workers ? a.workers : tables * a.splits) * passes;
}

}  // namespace pikv
