// The kernels of attention by name, the slowest first, and which of them this processor can run.
#pragma once
#include "attend.h"

namespace pikv {

enum Kernel { kBaseline, kAvx2, kAvx512, kVnni, kPhases, kPhasesBf16, kPhasesAmx, kNumKernels };
extern const char* const kKernelNames[kNumKernels];

bool kernel_runs(int kernel);  // on this processor
int kernel_now();              // the one that serves; raises where PIKV_KERNEL or PIKV_CPU names none that can

}  // namespace pikv
