#include "cpu.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "checks.h"

// PK_PORTABLE: what other processors get, also on x86-64, so that it can be tested.
#if defined(__x86_64__) && !defined(PK_PORTABLE)
#define PK_X86 1
#endif

namespace pikv {
namespace {

const char* const kLevels[] = {"baseline", "avx2", "avx512", "vnni"};

// PIKV_CPU=baseline|avx2|avx512|vnni caps the instruction set: for tests and for measuring what each brings.
int level() {
#if PK_X86
  static const int found = [] {
    int best = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
    if (best == 1 && wide) best = 2;
    if (best == 2 && __builtin_cpu_supports("avx512vnni")) best = 3;
    return best;
  }();
  const char* cap = std::getenv("PIKV_CPU");
  if (!cap) return found;
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(cap, kLevels[i])) return std::min(i, found);
  PK_CHECK(false, "PIKV_CPU=", cap, " is not one of baseline, avx2, avx512, vnni");
  return 0;
#else
  return 0;
#endif
}

}  // namespace

#if PK_X86
extern const bool kPrefetchToL2;
const bool kPrefetchToL2 = (__builtin_cpu_init(), __builtin_cpu_is("amd") != 0);
#endif

AttendUnit generic_attend() {
#if PK_X86
  const int best = level();
  return best >= 2 ? attend_avx512 : best == 1 ? attend_avx2 : attend_baseline;
#else
  return attend_baseline;
#endif
}

ScoreTable generic_score() {
#if PK_X86
  const int best = level();
  return best >= 2 ? score_avx512 : best == 1 ? score_avx2 : score_baseline;
#else
  return score_baseline;
#endif
}

AttendUnit hand_written_attend(const Attend& a) {
#if PK_X86
  if (level() < 3 || a.f.rope >= 0 || (a.f.latent && format_grouped(a.f.format))) return nullptr;
  return attend_vnni;
#else
  return nullptr;
#endif
}

int64_t num_threads() {
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return count;
}

}  // namespace pikv

// The instruction set that serves this process now.
extern "C" const char* pikv_cpu_instruction_set() { return pikv::kLevels[pikv::level()]; }
