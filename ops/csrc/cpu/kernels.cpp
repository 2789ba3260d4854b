// Which attention kernel serves: by cpuid, or as PIKV_KERNEL and PIKV_CPU say.
#include "kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu.h"
#include "devices.h"

// PK_PORTABLE: what other processors get, also on x86-64, so that it can be tested.
#if defined(__x86_64__) && !defined(PK_PORTABLE)
#define PK_X86 1
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pikv {

const char* const kKernelNames[kNumKernels] = {"baseline", "avx2", "avx512", "vnni", "phases", "phases_bf16", "phases_amx"};

namespace {

#if PK_X86
// Tiles are there, the system saves them, and it lets this process use them, which is asked for once.
bool amx_allowed() {
#ifdef __linux__
  unsigned a, b, c, d;
  constexpr unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // <asm/prctl.h>
  return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Found {
  bool runs[kNumKernels] = {true};
  int best = kBaseline;
  Found() {
    runs[kAvx2] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    runs[kAvx512] = runs[kAvx2] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    runs[kVnni] = runs[kPhases] = runs[kAvx512] && __builtin_cpu_supports("avx512vnni");
    runs[kPhasesBf16] = runs[kVnni] && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
    runs[kPhasesAmx] = runs[kPhasesBf16] && amx_allowed();
    for (int i = 0; i < kNumKernels; ++i)
      if (runs[i] && may_serve(i)) best = i;
  }
  // Zen 5 and later: into the first level reads of phases are up to a tenth faster. On Zen 4 and on Intel's processors they are slower.
  static bool reads_into_first_level() {
    unsigned a, b, c, d;
    return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 15) + (a >> 20 & 255) >= 0x1a;
  }
  // A BF16 dot product takes two cycles on Intel's processors, where two FMAs take one.
  static bool may_serve(int kernel) { return kernel != kPhasesBf16 || __builtin_cpu_is("amd"); }
};
#else
struct Found {
  bool runs[kNumKernels] = {true};
  int best = kBaseline;
  static bool may_serve(int) { return true; }
};
#endif

const Found& found() {
  static const Found once;
  return once;
}

int kernel_named(const char* name) {
  for (int i = 0; i < kNumKernels; ++i)
    if (!std::strcmp(name, kKernelNames[i])) return i;
  return -1;
}

std::string names(bool all) {
  std::string list;
  for (int i = 0; i < kNumKernels; ++i)
    if (all || found().runs[i]) list += (list.empty() ? "" : ", ") + std::string(kKernelNames[i]);
  return list;
}

// The kernel that serves, or -1 and why there is none.
int choose(std::string& refusal) {
  const char *forced = std::getenv("PIKV_KERNEL"), *cap = std::getenv("PIKV_CPU"), *name = forced ? forced : cap;
  if (!name) return found().best;
  int kernel = kernel_named(name);
  const char* variable = forced ? "PIKV_KERNEL" : "PIKV_CPU";
  if (kernel < 0) {
    refusal = std::string(variable) + "=" + name + " is not one of " + names(true);
  } else if (!found().runs[kernel]) {
    if (!forced) {
      while (!found().runs[kernel]) --kernel;
      return kernel;
    }
    refusal = std::string(variable) + "=" + name + " cannot run on this processor, which has " + names(false) + "; unset it or name one of these";
    kernel = -1;
  }
  return kernel;
}

}  // namespace

bool kernel_runs(int kernel) { return found().runs[kernel]; }

int kernel_now() {
  std::string refusal;
  const int kernel = choose(refusal);
  PK_CHECK(kernel >= 0, refusal);
  return kernel;
}

AttendUnit generic_attend() {
#if PK_X86
  const int kernel = kernel_now();
  return kernel >= kAvx512 ? attend_avx512 : kernel == kAvx2 ? attend_avx2 : attend_baseline;
#else
  return attend_baseline;
#endif
}

ScoreTable score_kernel(int bounds_type) {
#if PK_X86
  const int kernel = kernel_now();
  if (kernel >= kVnni && bounds_type == kInt8) return score_vnni;
  return kernel >= kAvx512 ? score_avx512 : kernel == kAvx2 ? score_avx2 : score_baseline;
#else
  return score_baseline;
#endif
}

AttendUnit hand_written_attend(Attend& a) {
#if PK_X86
  const int kernel = kernel_now();
  a.first_level = kernel == kVnni && !__builtin_cpu_is("amd");
  if (a.blocks > 1) return kernel >= kVnni ? attend_vnni : nullptr;  // the others take more tokens of a page than a block has
  const bool bf16 = kernel >= kPhasesBf16 && (Found::may_serve(kPhasesBf16) || kernel == kPhasesBf16);
  if (kernel >= kPhases && chunk_serves(a, bf16) && !(kernel == kPhasesAmx && phases_amx_serve(a))) return bf16 ? attend_chunk_bf16 : attend_chunk_float;
  static const bool first_level = Found::reads_into_first_level();
  const bool vnni_level = a.first_level;
  a.first_level = first_level;
  if (kernel == kPhasesAmx && phases_amx_serve(a)) return attend_phases_amx;
  if (bf16 && phases_bf16_serve(a)) return attend_phases_bf16;
  if (kernel >= kPhases && phases_vnni_serve(a)) return attend_phases_vnni;
  a.first_level = vnni_level;
  return kernel >= kVnni ? attend_vnni : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace pikv

// The kernel that serves this process now, or null and why there is none.
extern "C" const char* pikv_cpu_kernel_now() {
  std::string refusal;
  const int kernel = pikv::choose(refusal);
  return kernel < 0 ? nullptr : pikv::kKernelNames[kernel];
}
extern "C" const char* pikv_cpu_kernel_refusal() {
  static thread_local std::string refusal;
  refusal.clear();
  pikv::choose(refusal);
  return refusal.c_str();
}
// The names, the slowest first, one by one until null; whether this processor runs it.
extern "C" const char* pikv_cpu_kernel(int index) { return index >= 0 && index < pikv::kNumKernels ? pikv::kKernelNames[index] : nullptr; }
extern "C" bool pikv_cpu_kernel_runs(int index) { return pikv::kernel_runs(index); }
