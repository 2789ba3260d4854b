// What this CPU can run, decided once, and how many threads torch uses.
#pragma once
#include <cstdint>

#include "attend.h"
#include "score.h"

namespace pikv {

AttendUnit generic_attend();
ScoreTable generic_score();
bool has_vnni();  // AVX512 with bf16 dot products and VNNI
int64_t num_threads();

}  // namespace pikv
